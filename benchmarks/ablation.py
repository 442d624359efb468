"""Every trick by itself: memory and seconds of an update with all of them, with one left out, and with none.

    python benchmarks/ablation.py configs/svd_xt_full.yaml train.ema=false
    python benchmarks/ablation.py configs/tiny.yaml train.precision=bf16 --steps 3 --only all none "no fold"    # on a CPU

Random weights, one clip of the configuration's size. What does not fit says so and the next row follows. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from updates import device, our_update, timed, unfolded, versions

from svdtune.config.load import load_config, with_overrides
from svdtune.config.schema import Config


@dataclass(frozen=True)
class Row:
    """What one row changes of the configuration."""

    overrides: tuple[str, ...] = ()
    folded: bool = True


ALL = (
    "memory.checkpointing=units",
    "memory.parameters=bf16",
    "data.windows=1",
    "data.latents=cache",
    "memory.attention=auto",
)
COMPILED = "train.compile=true"
ROWS = {
    "all": Row(),
    "no fold": Row(folded=False),
    "no cache": Row(("data.latents=null",)),
    "no compile": Row(("train.compile=false",)),
    "float32 parameters": Row(("memory.parameters=fp32",)),
    "8-bit states": Row(("train.optimizer=adamw8bit",)),
    "torch's choice of attention": Row(("memory.attention=sdpa",)),
    "attention by flash": Row(("memory.attention=flash",)),
    "attention by xformers": Row(("memory.attention=xformers",)),
    "nothing recomputed": Row(("memory.checkpointing=none",)),
    "level0": Row(("memory.checkpointing=level0",)),
    "nested": Row(("memory.checkpointing=nested",)),
    "nested, offloaded": Row(("memory.checkpointing=nested", "memory.offload=true")),
    "offloaded": Row(("memory.offload=true",)),
    "diffusers' flag": Row(("memory.checkpointing=diffusers",)),
    "none": Row(("memory.checkpointing=diffusers", "memory.parameters=fp32", "data.latents=null", "memory.attention=sdpa",
                 "train.compile=false"), folded=False),
}  # fmt: skip
"""`all`, each trick left out or exchanged by itself, and diffusers' flag without any of ours."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--steps", type=int, default=3, help="updates timed, after two that are not")
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--no-compile", action="store_true", help="compile in no row")
    arguments = parser.parse_intermixed_args()
    compiled = device().type == "cuda" and not arguments.no_compile
    base = load_config(Path(arguments.config), [*arguments.overrides, *ALL, *([COMPILED] if compiled else [])])
    rows = {}
    for name in arguments.only:
        rows[name] = measured(base, ROWS[name], arguments.steps)
        print(json.dumps({name: rows[name]}), file=sys.stderr, flush=True)
    print(json.dumps({**versions(), "command": " ".join(["python", "benchmarks/ablation.py", *sys.argv[1:]]),
                      "all": [*ALL, *([COMPILED] if compiled else [])], "rows": rows}, indent=2))  # fmt: skip


def measured(base: Config, row: Row, steps: int) -> dict[str, Any]:
    """One row; what cannot be done here says why."""
    config = with_overrides(base, row.overrides)
    try:
        with nullcontext() if row.folded else unfolded():
            return {"overrides": list(row.overrides), **timed(partial(our_update, config, device()), steps)}
    except ImportError as error:
        return {"cannot": f"{type(error).__name__}: {str(error).splitlines()[0]}"}


if __name__ == "__main__":
    main()
