"""What the checks of every training step cost: pairs of steps on the tiny base, with and without them.

    python benchmarks/runtime_checks.py [pairs]

The tiny base makes the worst case: its step is thousands of times cheaper than SVD's, the checks cost the same.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch

from svdtune.config.load import load_config
from svdtune.contracts import Draws, VideoBatch, specs
from svdtune.model.adapt import adapt
from svdtune.model.load import load_model
from svdtune.trainer import step
from svdtune.trainer.build import clip_pixels


def main(pairs: int) -> None:
    torch.set_num_threads(1)
    run = _step()
    run()
    ratios, inside = [], []
    for _ in range(pairs):
        spent: list[float] = []
        with patch.object(step, "require", _timed(step.require, spent)):
            timed = _seconds(run)
        inside.append(sum(spent) / timed)
        with_checks = _seconds(run)
        with patch.object(step, "require", lambda *_: None):
            ratios.append(with_checks / _seconds(run))
    print(f"step with checks / without, median of {pairs} pairs: {statistics.median(ratios):.4f}")
    print(f"share of the step spent in the checks, median: {100 * statistics.median(inside):.3f} %")


def _step() -> Callable[[], None]:
    config = load_config(Path(__file__).parents[1] / "configs" / "tiny.yaml")
    model = load_model(config.model)
    adapt(model.unet, config.adapt, dtype=torch.float32, seed=0)
    model.unet.train()
    parts = step.Parts(model.unet, model.vae, model.image_encoder, clip_pixels(model), model.facts, torch.float32, 4)
    axes = model.facts.axes(b=1, t=config.data.num_frames, h=config.data.height, w=config.data.width)
    batch, draws = (
        kind(**{
            name: torch.ones(spec.shape(axes), dtype=getattr(torch, spec.dtype)) for name, spec in specs(kind).items()
        })
        for kind in (VideoBatch, Draws)
    )  # fmt: skip
    return lambda: step.train_step(parts, batch, draws).loss.backward()


def _timed(function: Callable[..., None], spent: list[float]) -> Callable[..., None]:
    def call(*args: object) -> None:
        started = time.perf_counter()
        function(*args)
        spent.append(time.perf_counter() - started)

    return call


def _seconds(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 30)
