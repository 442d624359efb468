"""Which of the broken runs, and of the sound ones beside them, a run of the tests takes: a third, another one with each commit.

SVDTUNE_MUTATIONS=all scripts/test tests/mutations
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TypeVar

SHARES = 3
Case = TypeVar("Case")


def share(cases: Sequence[Case]) -> list[Case]:
    """Every third of `cases`; with SVDTUNE_MUTATIONS=all every one."""
    if os.environ.get("SVDTUNE_MUTATIONS") == "all":
        return list(cases)
    return list(cases[turn(_commit()) :: SHARES])


def turn(commit: str) -> int:
    """Which third a commit takes: 0, 1 or 2."""
    return int(commit or "0", 16) % SHARES


@cache
def _commit() -> str:
    """The commit that is checked out; empty outside of git, as in an image."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
