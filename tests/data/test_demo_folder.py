"""Where `write_demo` cannot write."""

from __future__ import annotations

from pathlib import Path

import pytest

from svdtune.data.demo import write_demo
from svdtune.errors import UsageError


def message(folder: Path) -> str:
    with pytest.raises(UsageError) as caught:
        write_demo(folder, clips=1)
    return str(caught.value)


def test_the_folder_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "notes"
    path.touch()
    for folder in (path, path / "below"):
        assert message(folder) == (
            f"{folder}: demo clips cannot be written there: {path} is a file, not a folder. "
            "Give a folder that can be written to."
        )


def test_the_folder_cannot_be_made_or_takes_no_files() -> None:
    assert message(Path("/proc/nope")) == (
        "/proc/nope: demo clips cannot be written there: No such file or directory. "
        "Give a folder that can be written to."
    )
    assert message(Path("/proc")).startswith("/proc: demo clips cannot be written there: ")
