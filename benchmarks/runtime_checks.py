"""What everything that looks on costs in training: pairs of real optimizer steps, with and without it.

    python benchmarks/runtime_checks.py                                             # 30 pairs on the tiny base
    python benchmarks/runtime_checks.py --pairs 6 configs/svd_xt_lora.yaml model.pretrained=PATH data.root=CLIPS

On are the contract checks of `train_step` and the watch over loss, gradient norm, loader and pace; off is the same loop
without them. The tiny base makes the worst case: its step is thousands of times cheaper than SVD's, the checks cost the same.
What ranks compare every 100 steps has a benchmark of its own, rank_checks.py.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from svdtune.config.load import load_config
from svdtune.contracts import VideoBatch
from svdtune.data.catalog import scan
from svdtune.data.demo import write_demo
from svdtune.guards.live.watcher import Watcher
from svdtune.trainer import loop, step
from svdtune.trainer.build import Session, build, make_accelerator
from svdtune.trainer.run_folder import RunFolder
from svdtune.trainer.state import Position
from svdtune.trainer.watch import Seen, Watch

TINY = Path(__file__).parents[1] / "configs" / "tiny.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("config", nargs="?", type=Path, default=TINY)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as work:
        clips = Path(work) / "clips"
        write_demo(clips, clips=8)
        fixed = [
            "data.workers=0",
            "train.accumulation=1",
            "train.steps=100000",
            f"run.dir={work}",
            "tracking.backends=[]",
        ]
        config = load_config(arguments.config, [f"data.root={clips}", "run.threads=1", *arguments.overrides, *fixed])
        session = build(config, make_accelerator(config), RunFolder(Path(work) / "run"), scan(config.data))
        measure(session, arguments.pairs)


def measure(session: Session, pairs: int) -> None:
    batches = iter(loop.loader_from(session, Position()))
    watcher, spent = Watcher(None), [0.0]
    for _ in range(2):  # the first steps tune kernels
        one_step(session, batches, Watch())
    ratios, shares = [], []
    for _ in range(pairs):
        with_all = one_step(session, batches, watcher)
        with patch.object(step, "require", lambda *_: None):
            ratios.append(with_all / one_step(session, batches, Watch()))
        spent[0] = 0.0
        with (
            patch.object(step, "require", timed(step.require, spent)),
            patch.object(watcher, "stepped", timed(watcher.stepped, spent)),
        ):
            seconds = one_step(session, batches, watcher)
        shares.append(spent[0] / seconds)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{device}: step with everything on / off, median of {pairs} pairs: {statistics.median(ratios):.4f}")
    print(f"share of the step spent in it, median: {100 * statistics.median(shares):.3f} %")


def one_step(session: Session, batches: Iterator[VideoBatch], watch: Watch) -> float:
    """Seconds of one optimizer step as the loop makes it."""
    started = time.perf_counter()
    accumulated = loop.accumulate(session, batches)
    norm, report = loop.update(session, accumulated)
    clips = accumulated.samples, accumulated.noise, accumulated.names
    watch.stepped(session, Seen(1, report, norm, time.perf_counter() - started, accumulated.waited, *clips))
    return time.perf_counter() - started


def timed(function: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    """`function`, whose seconds are added to `spent`."""

    def call(*arguments: object) -> Any:
        started = time.perf_counter()
        result = function(*arguments)
        spent[0] += time.perf_counter() - started
        return result

    return call


if __name__ == "__main__":
    main()
