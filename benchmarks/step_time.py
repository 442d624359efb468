"""Clips per second of svdtune against the usual single-script loop, at the same frames, size and trained set, in one run.

    python benchmarks/step_time.py configs/svd_xt_full.yaml data.num_frames=14 --fastest memory.parameters=bf16
    python benchmarks/step_time.py configs/tiny.yaml --steps 3                                # the same path on a CPU

Three rows: the usual loop (`usual_loop.py`), svdtune with what it encodes live, and svdtune as fast as it goes: from a latent cache,
with nothing recomputed, compiled where there is a GPU, and what `--fastest` adds. Beside the seconds: model FLOPs of one
update, the share of the card's peak that they are (MFU), and the step's eager roofline. Random weights. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from updates import device, our_update, timed, versions
from usual_loop import usual_update

from svdtune.config.load import load_config, with_overrides
from svdtune.config.schema import Config
from svdtune.guards.cost import StepCost, step_cost

_ALONE = ("train.ema=false", "train.accumulation=1", "validation.samples=0")
PEAK = 989.5e12
"""bf16 FLOP/s of an H100 or H200 without sparsity, by its datasheet."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--steps", type=int, default=5, help="updates timed, after two that are not")
    parser.add_argument("--fastest", nargs="*", default=[], help="overrides of the last row")
    arguments = parser.parse_intermixed_args()
    config = load_config(Path(arguments.config), [*_ALONE, *arguments.overrides])
    where = device()
    fastest = ["data.windows=1", "data.latents=cache", "memory.checkpointing=none"]
    fastest += [*(["train.compile=true"] if where.type == "cuda" else []), *arguments.fastest]
    quick = with_overrides(config, fastest)
    made = {
        "usual loop": (config, usual_update),
        "svdtune, live": (config, our_update),
        f"svdtune, {' '.join(fastest)}": (quick, our_update),
    }
    with ProcessPoolExecutor(
        2, multiprocessing.get_context("spawn")
    ) as pool:  # the cost of a step is counted on the CPU
        costs = {name: pool.submit(step_cost, asked) for name, (asked, _) in made.items()}
        rows = {}
        for name, (asked, update) in made.items():
            rows[name] = timed(partial(update, asked, where), arguments.steps)
            print(json.dumps({name: rows[name]}), file=sys.stderr, flush=True)
        for name, row in rows.items():
            row |= compared(config, row, costs[name].result(), rows["usual loop"].get("seconds"))
    print(json.dumps({**versions(), "command": " ".join(["python", "benchmarks/step_time.py", *sys.argv[1:]]), "rows": rows},
                     indent=2))  # fmt: skip


def compared(config: Config, row: dict[str, Any], cost: StepCost, usual: float | None) -> dict[str, float]:
    """What follows from the seconds of a row. The usual loop is held against the cost of svdtune's live row."""
    told = {"model_tflop": round(cost.model_flops / 1e12, 2), "roofline_seconds": round(cost.seconds, 4)}
    if "seconds" not in row:
        return told
    told["clips_per_second"] = round(config.train.batch_size / row["seconds"], 4)
    if usual:
        told["times_the_usual_loop"] = round(usual / row["seconds"], 3)
    if device().type == "cuda":
        told["mfu"] = round(cost.model_flops / row["seconds"] / PEAK, 4)
        told["of_roofline"] = round(row["seconds"] / cost.seconds, 3)
    return told


if __name__ == "__main__":
    main()
