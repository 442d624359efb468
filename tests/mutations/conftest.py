"""The private world of each case."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutations.sandbox import Sandbox, link_tree


@pytest.fixture(scope="session")
def demo_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six slow H.264 clips: 100 frames at 24 fps, long enough for 25 frames at 7 fps."""
    from svdtune.data.demo import write_demo

    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder, clips=6, num_frames=100, fps=24, height=64, width=96, motion_bucket=12)
    return folder


@pytest.fixture
def box(demo_clips: Path, svd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    """A sandbox of its own for one test."""
    return Sandbox(
        clips=link_tree(demo_clips, tmp_path / "clips"),
        model=link_tree(svd_folder, tmp_path / "model"),
        work=tmp_path,
        monkeypatch=monkeypatch,
    )
