"""docs/cloud.md as data: its code blocks, their shell commands, the trainings that they start."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DOC = (ROOT / "docs/cloud.md").read_text()
TOOLS: dict[str, Any] = json.loads((ROOT / "tests/assets/cloud_tools.json").read_text())
IMAGE = "registry.example.com/you/svdtune"

_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_TRAINING = re.compile(r"\btrain[ ,]+(configs/[\w.]+)((?:[ ,]+\w+\.\w+=[^\s,\]]+)*)")


def hidden_by(volume: str) -> list[str]:
    """Folders of the image that a volume at this path would hide."""
    dockerfile = (ROOT / "docker/Dockerfile").read_text()
    needed = ["/opt/svdtune", "/opt/venv", *re.findall(r"^WORKDIR (\S+)$", dockerfile, re.MULTILINE)]
    return [folder for folder in needed if f"{folder}/".startswith(f"{volume.rstrip('/')}/")]


@dataclass(frozen=True)
class Training:
    """`train CONFIG SECTION.KEY=VALUE ...`, in whatever quotes it stands."""

    config: str
    overrides: tuple[str, ...]

    def option(self, key: str) -> str:
        """The value of `key`; empty when it is not given."""
        given = dict(override.split("=", 1) for override in self.overrides)
        return given.get(key, "")


def blocks(doc: str, section: str, language: str) -> list[str]:
    """Code blocks of one language below `## section`."""
    _, found, rest = doc.partition(f"\n## {section}\n")
    assert found, f"no section {section!r}"
    return [text for kind, text in _FENCE.findall(rest.split("\n## ")[0]) if kind == language]


def shell_blocks(doc: str) -> list[str]:
    """Every bash block of the document."""
    return [text for kind, text in _FENCE.findall(doc) if kind == "bash"]


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a script without quotes over several lines."""
    for line in text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def trainings(text: str) -> list[Training]:
    """All trainings in `text`, in their order."""
    found = _TRAINING.findall(text.replace("\\\n", " "))
    return [Training(config, tuple(re.split(r"[ ,]+", options)[1:])) for config, options in found]


def shellcheck(script: str, *allowed: str) -> list[str]:
    """What shellcheck says about a bash script, but for the codes `allowed`."""
    command = [str(Path(sys.executable).parent / "shellcheck"), "--shell=bash", "--format=gcc", "-"]
    command.insert(1, f"--exclude={','.join(allowed)}") if allowed else None
    return subprocess.run(command, input=script, capture_output=True, text=True, check=False).stdout.splitlines()
