"""A built session of the small random SVD, and accelerate's process-wide state put back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState

from svdtune.config.load import load_config
from svdtune.config.schema import Config
from svdtune.data.catalog import scan
from svdtune.trainer.build import Session, build, make_accelerator
from svdtune.trainer.run_folder import RunFolder

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.fixture
def small(clips: Path, svd_folder: Path, tmp_path: Path) -> Callable[..., Config]:
    """`small("train.lr=1e-3")`: LoRA of rank 2 on three frames of 64 x 96, nothing validated."""

    def make(*overrides: str) -> Config:
        own = [f"model.pretrained={svd_folder}", "model.variant=null", f"data.root={clips}", f"run.dir={tmp_path / 'runs'}",
               "run.name=r", "run.threads=1", "data.num_frames=3", "data.height=64", "data.width=96", "data.workers=0",
               "train.batch_size=2", "train.steps=3", "train.warmup=0", "train.log_interval=1", "adapt.method=lora", "adapt.rank=2",
               "validation.clips=0", "validation.samples=0"]  # fmt: skip
        return load_config(CONFIGS / "tiny.yaml", [*own, *overrides])

    return make


@pytest.fixture
def fresh() -> Iterator[None]:
    """Accelerate as in a process that has not used it."""
    _reset()
    yield
    _reset()


@pytest.fixture
def session(small: Callable[..., Config], fresh: None) -> Callable[..., Session]:
    """`session(*overrides)`: the run of `small`, built."""

    def make(*overrides: str) -> Session:
        _reset()
        config = small(*overrides)
        return build(config, make_accelerator(config), RunFolder(Path(config.run.dir) / "r"), scan(config.data))

    return make


def _reset() -> None:
    for shared in (AcceleratorState, PartialState, GradientState):
        shared._shared_state.clear()
