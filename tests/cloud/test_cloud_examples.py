"""Every example of docs/cloud.md, by the tool that it is for; and that each of these checks can fail."""

from __future__ import annotations

from collections.abc import Callable

import cloud_docker
import cloud_kubernetes
import cloud_runpod
import cloud_skypilot
import cloud_slurm
import cloud_svdtune
import pytest
from cloud_doc import DOC

CHECKS: dict[str, Callable[[str], list[str]]] = {
    "docker": cloud_docker.problems,
    "kubernetes": cloud_kubernetes.problems,
    "runpod": cloud_runpod.problems,
    "skypilot": cloud_skypilot.problems,
    "slurm": cloud_slurm.problems,
    "svdtune": cloud_svdtune.problems,
}


@pytest.mark.parametrize("check", CHECKS)
def test_the_examples_are_sound(check: str) -> None:
    assert CHECKS[check](DOC) == []
