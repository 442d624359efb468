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
import sys
from pathlib import Path
from typing import Any

from updates import device, our_update, timed, versions
from usual_loop import usual_update

from svdtune.config.load import load_config, with_overrides
from svdtune.config.schema import Config
from svdtune.guards.cost import step_cost

PEAK = 989.5e12
"""bf16 FLOP/s of an H100 or H200 without sparsity, by its datasheet."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--steps", type=int, default=5, help="updates timed, after two that are not")
    parser.add_argument("--fastest", nargs="*", default=[], help="overrides of the last row")
    arguments = parser.parse_intermixed_args()
    config = load_config(Path(arguments.config), ["train.ema=false", *arguments.overrides])
    where = device()
    fastest = ["data.windows=1", "data.latents=cache", "memory.checkpointing=none"]
    fastest += [*(["train.compile=true"] if where.type == "cuda" else []), *arguments.fastest]
    rows = {
        "usual loop": timed(usual_update(config, where), arguments.steps),
        "svdtune, live": timed(our_update(config, where), arguments.steps),
        f"svdtune, {' '.join(fastest)}": timed(our_update(with_overrides(config, fastest), where), arguments.steps),
    }
    cost = step_cost(config)
    for row in rows.values():
        row |= compared(config, row, cost, rows["usual loop"].get("seconds"))
    print(json.dumps({**versions(), "command": " ".join(["python", "benchmarks/step_time.py", *sys.argv[1:]]),
                      "model_flops": cost.flops, "roofline_seconds": cost.seconds, "rows": rows}, indent=2))  # fmt: skip


def compared(config: Config, row: dict[str, Any], cost: Any, usual: float | None) -> dict[str, float]:
    """What follows from the seconds of a row."""
    if "seconds" not in row:
        return {}
    told = {"clips_per_second": round(config.train.batch_size / row["seconds"], 4)}
    if usual:
        told["times_the_usual_loop"] = round(usual / row["seconds"], 3)
    if device().type == "cuda":
        told |= {
            "mfu": round(cost.flops / row["seconds"] / PEAK, 4),
            "of_roofline": round(row["seconds"] / cost.seconds, 3),
        }
    return told


if __name__ == "__main__":
    main()
