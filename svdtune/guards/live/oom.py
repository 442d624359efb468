"""Out of memory in the trial step: what was planned, what came, what differs, and the next setting that fits."""

from __future__ import annotations

import torch

from svdtune.config.schema import Config
from svdtune.guards.findings import Finding
from svdtune.guards.memory import CONTEXT, GIB, Estimate
from svdtune.guards.plan import Planner
from svdtune.guards.shapes import rehearse

_NEAR = 0.03
"""Of the prediction: what a kernel takes for itself."""


def out_of_memory(config: Config, error: BaseException, device: torch.device) -> Finding:
    """MEM703. The next setting is predicted as preflight does, times what the prediction was too low by."""
    free, total = torch.cuda.mem_get_info(device)
    taken, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    needed = rehearse(config).needed
    measured = f"{_gib(taken)} allocated and {_gib(max(reserved, taken))} reserved of {_gib(total)}"
    got = f"out of memory in the trial step with {measured}; {_asked_for(error)}"
    if needed is None:
        return Finding("MEM703", "error", "memory", got, why="The step could not be predicted.")
    expected = f"{_gib(needed.peak)} allocated and {_gib(needed.reserved)} reserved, as preflight predicted"
    others = max(0, total - free - max(reserved, taken) - CONTEXT)
    # Counted at the end: what was given back meanwhile is not missing.
    why = _difference(needed, taken, total, others if free else 0)
    return Finding(
        "MEM703", "error", "memory", got, expected, why, *_next_that_fits(config, max(1.0, taken / needed.peak), total)
    )


def _difference(needed: Estimate, taken: int, total: int, others: int) -> str:
    if not needed.fits(total):
        return f"The prediction was above the card already: its peak is in {needed.where}."
    if others > GIB // 4:
        return f"Another process holds {_gib(others)} of the card: nvidia-smi names it."
    if taken > needed.peak * (1 + _NEAR):
        return f"{_gib(taken - needed.peak)} more were allocated than predicted: a part of the step that the prediction does not know."
    return (
        f"Allocated was as predicted or less; what failed is a block in one piece, and the allocator's free blocks were too small "
        f"(predicted: {_gib(needed.reserved - needed.peak)} of them). PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True joins them."
    )


def _asked_for(error: BaseException) -> str:
    """`CUDA out of memory. Tried to allocate 2.00 GiB`; the rest of torch's message is a manual."""
    return ". ".join(str(error).split(". ")[:2])


def _next_that_fits(config: Config, factor: float, total: int) -> tuple[str, tuple[str, ...]]:
    """Only changes that need less than what has just failed."""
    planner = Planner(config, total, factor)
    failed = planner.row().needed.peak
    row = planner.pick(eight=True, below=failed)
    if row is None:
        fewer = "fewer frames (data.num_frames), smaller ones (data.height, data.width)"
        return f"No setting was found that fits: take {fewer}, or a larger card.", ()
    said = "" if row.exact else " It rounds updates by chance; nothing exact fits."
    return (
        f"Set {' '.join(row.changes)}: {_gib(row.needed.peak * factor)}, by the prediction times {factor:.2f}.{said}",
        row.changes,
    )


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
