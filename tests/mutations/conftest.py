"""The private world of each case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

from tests.mutations.sandbox import Sandbox, link_tree


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that may ask the hub: a base that is not here yet is no error there. Preflight itself asks nobody."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.fixture(scope="session")
def demo_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six slow H.264 clips: 100 frames at 24 fps, long enough for 25 frames at 7 fps."""
    from svdtune.data.demo import write_demo

    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder, clips=6, num_frames=100, fps=24, height=64, width=96, motion_bucket=12)
    return folder


_SAMPLED: dict[Any, Any] = {}


@pytest.fixture(autouse=True)
def sampled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 8,000 samples are drawn once for each configuration and each code that draws or judges them."""
    from svdtune.contracts import spec
    from svdtune.diffusion import draws, edm
    from svdtune.guards import batch, samplers

    real = samplers.check_samplers

    def remembered(config: Any, facts: Any) -> Any:
        functions = [value for module in (spec, draws, edm, samplers) for value in vars(module).values()]
        code = tuple(value.__code__ for value in functions if isinstance(value, FunctionType))
        key = code, repr((config.run.seed, config.objective, config.conditioning, facts))
        if key not in _SAMPLED:
            _SAMPLED[key] = real(config, facts)
        return _SAMPLED[key]

    monkeypatch.setattr(batch, "check_samplers", remembered)


_REHEARSED: dict[Any, Any] = {}


@pytest.fixture
def rehearsed_once(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """For cases that leave the code as it is: configurations and model JSON that are alike are rehearsed once for all of them."""
    from svdtune.guards import shapes
    from svdtune.guards.preflight import _of_step

    real = shapes.rehearse

    def remembered(config: Any) -> Any:
        runs, model = Path(config.run.dir), Path(config.model.pretrained)
        if runs.exists():  # what a run left is looked at too
            return real(config)
        alike = replace(
            config,
            run=replace(config.run, dir="runs"),
            model=replace(config.model, pretrained="tiny"),
        )
        key = repr((_of_step(alike), [path.read_bytes() for path in sorted(model.glob("*/*.json"))] or str(model)))
        if key not in _REHEARSED:
            _REHEARSED[key] = real(config)
        return _REHEARSED[key]

    return lambda: monkeypatch.setattr(shapes, "rehearse", remembered)


@pytest.fixture
def box(demo_clips: Path, svd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    """A sandbox of its own for one test."""
    return Sandbox(
        clips=link_tree(demo_clips, tmp_path / "clips"),
        model=link_tree(svd_folder, tmp_path / "model"),
        work=tmp_path,
        monkeypatch=monkeypatch,
    )
