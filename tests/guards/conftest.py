"""Shared by the guards' tests: demo clips, and a finding by its code."""

from __future__ import annotations

from pathlib import Path

import pytest

from svdtune.config.load import load_config
from svdtune.config.schema import Config
from svdtune.data.demo import write_demo

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that may ask the hub: a base that is not here yet is no error there. Preflight itself asks nobody."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six demo clips, 64 x 96."""
    folder = tmp_path_factory.mktemp("clips")
    write_demo(folder, clips=6, motion="down", seed=0)
    return folder


@pytest.fixture
def tiny(clips: Path, tmp_path: Path):
    """The shipped tiny run on those clips, with overrides; its run folder is private."""

    def make(*overrides: str) -> Config:
        own = [f"data.root={clips}", f"run.dir={tmp_path / 'runs'}", "train.batch_size=1", "data.workers=0"]
        return load_config(CONFIGS / "tiny.yaml", [*own, *overrides])

    return make
