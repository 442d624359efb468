"""The README's table: GPU memory by method, frames and size, as the planner predicts it.

    python benchmarks/memory_table.py            # the table, a minute or two on a CPU
    python benchmarks/memory_table.py --json

Allocated GiB at the peak of a step of one clip, everything on the card counted: networks, state, gradients, activations. From cached clips
(`data.latents`), no averages. Predicted, not measured: `benchmarks/planner.py` says how far predictions are right.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from svdtune.config.load import load_config
from svdtune.guards.memory import GIB, estimate
from svdtune.guards.plan_pass import record

CONFIGS = Path(__file__).parents[1] / "configs"
ALONE = ("train.accumulation=1", "train.batch_size=1", "train.ema=false", "validation.samples=0", "data.windows=4",
         "data.latents=latents")  # fmt: skip
SIZES = ((14, 320, 512), (25, 320, 512), (14, 576, 1024), (25, 576, 1024))
_LEAN = ("memory.checkpointing=nested", "memory.offload=true")
METHODS = {
    "LoRA": ("lora", ()),
    "LoRA, leanest": ("lora", _LEAN),
    "temporal": ("temporal", ()),
    "full": ("full", ()),
    "full, bf16": ("full", ("memory.parameters=bf16",)),
    "full, bf16, nested": ("full", ("memory.parameters=bf16", "memory.checkpointing=nested")),
    "full, bf16, 8-bit, leanest": ("full", ("memory.parameters=bf16", "train.optimizer=adamw8bit", *_LEAN)),
    "full, diffusers' flag": ("full", ("memory.checkpointing=diffusers",)),
}
"""Name of a row: adapt.method, and overrides."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = {}
    for name, (method, more) in METHODS.items():
        rows[name] = [allocated(method, size, more) for size in SIZES]
        print(name, rows[name], file=sys.stderr, flush=True)
    if arguments.json:
        print(json.dumps({"sizes": SIZES, "gib": rows}, indent=2))
        return
    heads = [f"{frames} × {height} × {width}" for frames, height, width in SIZES]
    print(f"| GiB allocated at the peak | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}", sep="\n")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(f'{gib:.1f}' for gib in row)} |")


def allocated(method: str, size: tuple[int, int, int], more: tuple[str, ...]) -> float:
    """GiB of one configuration."""
    frames, height, width = size
    shape = (f"data.num_frames={frames}", f"data.height={height}", f"data.width={width}")
    file = CONFIGS / ("svd_xt_lora.yaml" if method == "lora" else "svd_xt_full.yaml")
    config = load_config(file, [*ALONE, *shape, f"adapt.method={method}", *more])
    return round(estimate(record(config)).peak / GIB, 2)


if __name__ == "__main__":
    main()
