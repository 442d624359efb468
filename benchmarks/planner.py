"""Predicted and real peak memory, configuration by configuration.

    python benchmarks/planner.py                       # the tiny network on this CPU: method x checkpointing x precision
    python benchmarks/planner.py --device cuda         # SVD-XT at real sizes, random weights, on the GPU
    python benchmarks/planner.py --device cuda --rows 3 7

On a CPU the real peak is what torch's profiler sees the allocator do in the second update, and the prediction is made by the CPU's rules.
On a GPU it is `max_memory_allocated` and `max_memory_reserved` over two updates, and predictions are made meanwhile in other processes,
which use no GPU. A configuration that does not fit says so. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from updates import GIB, our_update, versions

from svdtune.config.load import load_config
from svdtune.config.schema import Config
from svdtune.guards.memory import estimate
from svdtune.guards.plan_pass import record

CONFIGS = Path(__file__).parents[1] / "configs"
PREDICTORS = 6
_ALONE = ("validation.samples=0", "train.accumulation=1", "train.ema=false")
"""The update alone, as it is measured."""
TINY = [("tiny.yaml", (f"adapt.method={method}", f"memory.checkpointing={level}", f"train.precision={precision}"))
        for method, level, precision in product(("full", "temporal", "lora"), ("none", "level0", "units", "nested", "diffusers"),
                                                ("no", "bf16"))]  # fmt: skip


def at(frames: int, height: int, width: int, *more: str) -> tuple[str, ...]:
    """Overrides of size, and more."""
    return f"data.num_frames={frames}", f"data.height={height}", f"data.width={width}", *more


_CACHED = ("data.latents=cache", "data.windows=1")
REAL = [
    ("svd_xt_lora.yaml", at(14, 256, 448, "memory.checkpointing=none")),
    ("svd_xt_lora.yaml", at(14, 320, 512, "memory.checkpointing=units")),
    ("svd_xt_lora.yaml", at(25, 320, 512, "memory.checkpointing=level0", "train.batch_size=2")),
    ("svd_xt_lora.yaml", at(25, 576, 1024, "memory.checkpointing=units")),
    ("svd_xt_lora.yaml", at(25, 576, 1024, "memory.checkpointing=nested", *_CACHED)),
    ("svd_xt_lora.yaml", at(14, 576, 1024, "memory.checkpointing=diffusers")),
    ("svd_xt_full.yaml", at(14, 320, 512, "memory.checkpointing=units")),
    ("svd_xt_full.yaml", at(25, 576, 1024, "memory.checkpointing=units")),
    ("svd_xt_full.yaml", at(25, 576, 1024, "memory.checkpointing=nested", "train.ema=true")),
    ("svd_xt_full.yaml", at(25, 576, 1024, "memory.checkpointing=units", "memory.parameters=bf16", *_CACHED)),
    (
        "svd_xt_full.yaml",
        at(25, 576, 1024, "memory.checkpointing=nested", "memory.parameters=bf16", "train.optimizer=adamw8bit"),
    ),
    ("svd_xt_full.yaml", at(14, 576, 1024, "memory.checkpointing=level0", "memory.parameters=bf16")),
    ("svd_xt_full.yaml", at(14, 320, 512, "memory.checkpointing=none", "adapt.method=temporal")),
    (
        "svd_xt_full.yaml",
        at(14, 576, 1024, "memory.checkpointing=units", "adapt.method=temporal", "train.batch_size=2"),
    ),
    ("svd_xt_full.yaml", at(25, 576, 1024, "memory.checkpointing=none")),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rows", type=int, nargs="+", help="these rows of the grid alone")
    arguments = parser.parse_args()
    grid = REAL if arguments.device == "cuda" else TINY
    chosen = [grid[i] for i in arguments.rows or range(len(grid))]
    rows = on_gpu(chosen) if arguments.device == "cuda" else [on_cpu(loaded(*row)) | named(row) for row in chosen]
    errors = [abs(row["error"]) for row in rows if "error" in row]
    print(json.dumps({**versions(), "command": " ".join(["python", "benchmarks/planner.py", *sys.argv[1:]]), "rows": rows,
                      "largest_error": max(errors, default=None)}, indent=2))  # fmt: skip


def loaded(name: str, overrides: tuple[str, ...]) -> Config:
    """A configuration of the grid."""
    return load_config(CONFIGS / name, [*_ALONE, *overrides])


def named(row: tuple[str, tuple[str, ...]]) -> dict[str, Any]:
    return {"config": row[0], "overrides": list(row[1])}


def on_cpu(config: Config) -> dict[str, Any]:
    """Predicted and real bytes at the peak of an update on this CPU."""
    predicted = record(config, gpu=False).top[1].bytes
    real = real_peak(config)
    return {"predicted": predicted, "real": real, "error": round(predicted / real - 1, 5)}


def real_peak(config: Config) -> int:
    """The most bytes that the CPU's allocator has given out during the second update, networks and optimizer included."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        update = our_update(config, torch.device("cpu"))
        update()
        began = time.time_ns()
        update()
    now = most = 0
    for event in seen.profiler.kineto_results.events():  # pyright: ignore[reportOptionalMemberAccess]
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now) if event.start_ns() > began else most
    return most


def on_gpu(rows: list[tuple[str, tuple[str, ...]]]) -> list[dict[str, Any]]:
    """Each measured while the next are predicted."""
    total = torch.cuda.get_device_properties(0).total_memory
    with ProcessPoolExecutor(PREDICTORS, multiprocessing.get_context("spawn")) as pool:
        coming = [pool.submit(predicted, row, total) for row in rows]
        found = []
        for row in rows:
            began = time.perf_counter()
            found.append(named(row) | measured(loaded(*row)) | {"seconds": round(time.perf_counter() - began, 1)})
            print(json.dumps(found[-1]), file=sys.stderr, flush=True)
        for row, future in zip(found, coming, strict=True):
            row |= future.result()
            if "allocated_gib" in row:
                row["error"] = round(row["predicted_gib"] / row["allocated_gib"] - 1, 4)
                row["reserved_error"] = round(row["predicted_reserved_gib"] / row["reserved_gib"] - 1, 4)
    return found


def predicted(row: tuple[str, tuple[str, ...]], total: int) -> dict[str, Any]:
    """In a process of its own, one thread."""
    torch.set_num_threads(1)
    needed = estimate(record(loaded(*row)))
    return {"predicted_gib": round(needed.peak / GIB, 3), "predicted_reserved_gib": round(needed.reserved / GIB, 3),
            "predicted_fits": needed.fits(total), "where": needed.where}  # fmt: skip


def measured(config: Config) -> dict[str, Any]:
    """GiB at the peak of two updates, or what was missing."""
    update: Any = None
    try:
        update = our_update(config, torch.device("cuda"))
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        update()
        update()
        torch.cuda.synchronize()
    except torch.OutOfMemoryError as error:
        return {"fits": False, "out_of_memory": str(error).split(". ")[0]}
    finally:
        peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        update = None
        gc.collect()
        torch.cuda.empty_cache()
    return {"fits": True, "allocated_gib": round(peaks[0] / GIB, 3), "reserved_gib": round(peaks[1] / GIB, 3)}


if __name__ == "__main__":
    main()
