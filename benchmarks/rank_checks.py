"""What it costs to see, while two processes train, that their weights are still equal.

    python -m torch.distributed.run --standalone --nproc_per_node=2 benchmarks/rank_checks.py [pairs]

Each pair is one real step of the tiny base and one check, timed apart, after a barrier. The tiny base makes the worst case:
its step is thousands of times cheaper than SVD's, the check reads each trained number once.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from svdtune.config.load import load_config
from svdtune.data.catalog import scan
from svdtune.data.demo import write_demo
from svdtune.guards.live.ranks import parameters_agree
from svdtune.trainer import loop
from svdtune.trainer.build import Session, build, dismiss, make_accelerator
from svdtune.trainer.run_folder import RunFolder
from svdtune.trainer.state import Position

EVERY = (50, 100)
"""Steps between two checks."""


def main(pairs: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_demo(Path(folder) / "demo", clips=6, motion="down", seed=0)
        own = [f"data.root={folder}/demo", f"train.steps={pairs + 2}", "data.workers=0", "run.threads=1"]
        config = load_config(Path(__file__).parents[1] / "configs" / "tiny.yaml", own)
        accelerator = make_accelerator(config)
        session = build(config, accelerator, RunFolder(Path(folder)), scan(config.data))
        steps, checks = _measure(session, accelerator, pairs)
        if accelerator.is_main_process:
            numbers = sum(p.numel() for p in session.trained.values())
            _say(steps, checks, f"{len(session.trained)} parameters, {numbers:,} numbers")
        accelerator.wait_for_everyone()
        del session
        dismiss(accelerator)


def _measure(session: Session, accelerator: Accelerator, pairs: int) -> tuple[list[float], list[float]]:
    """Seconds of each step and of each check; the first pair of each warms up."""
    batches = iter(loop.loader_from(session, Position()))

    def step() -> None:
        loop.update(session, loop.accumulate(session, batches))

    steps, checks = [], []
    for _ in range(pairs + 1):
        steps.append(_seconds(accelerator, step))
        checks.append(_seconds(accelerator, lambda: parameters_agree(session, 1)))
    return steps[1:], checks[1:]


def _seconds(accelerator: Accelerator, run: Callable[[], Any]) -> float:
    accelerator.wait_for_everyone()
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _say(steps: list[float], checks: list[float], what: str) -> None:
    share = statistics.median(check / step for step, check in zip(steps, checks, strict=True))
    every = ", ".join(f"{100 * share / n:.4f} % every {n} steps" for n in EVERY)
    print(
        f"{what}, median of {len(steps)} pairs: a step {1e3 * statistics.median(steps):.1f} ms, "
        f"a check {1e3 * statistics.median(checks):.2f} ms: {every}"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 30)
