"""Out of memory in the trial step: what was planned, what came, and the next setting that fits."""

from __future__ import annotations

import torch

from svdtune.config.load import with_overrides
from svdtune.config.schema import Config
from svdtune.guards.findings import Finding
from svdtune.guards.memory import GIB, smaller
from svdtune.guards.preflight import merged
from svdtune.guards.shapes import rehearse

_TRIED = 4
_ROOM = 0.95
"""Of the device: the rest is lost between blocks."""


def out_of_memory(config: Config, error: BaseException, device: torch.device) -> Finding:
    """MEM703. The next setting is estimated as preflight does, times what the estimate was too low by."""
    total, taken = torch.cuda.mem_get_info(device)[1], torch.cuda.max_memory_allocated(device)
    planned = rehearse(config).needed
    got = f"out of memory in the trial step with {taken / GIB:.1f} GiB allocated of {total / GIB:.1f} GiB; {_asked_for(error)}"
    expected = f"about {planned.peak / GIB:.1f} GiB, as preflight estimated" if planned else ""
    factor = max(1.0, taken / planned.peak) if planned else 1.0
    why = "Another process on the card, or a part that the estimate does not see."
    if planned and planned.peak > total:
        why = "The estimate was above the card already."
    return Finding("MEM703", "error", "memory", got, expected, why, *_next_that_fits(config, factor, total))  # fmt: skip


def _asked_for(error: BaseException) -> str:
    """`CUDA out of memory. Tried to allocate 2.00 GiB`; the rest of torch's message is a manual."""
    return ". ".join(str(error).split(". ")[:2])


def _next_that_fits(config: Config, factor: float, total: int) -> tuple[str, tuple[str, ...]]:
    patches: list[tuple[str, ...]] = []
    now = config
    for _ in range(_TRIED):
        text, patch = smaller(now)
        if not patch:
            return f"{text} No other change keeps what is learned.", ()
        patches.append(patch)
        now = with_overrides(now, patch)
        needed = rehearse(now).needed
        if needed and needed.peak * factor <= total * _ROOM:
            changes = tuple(merged(patches))
            return (
                f"Set {' '.join(changes)}: about {needed.peak * factor / GIB:.1f} GiB, by the estimate times {factor:.2f}.",
                changes,
            )
    return "No setting was found that fits: take a larger card.", ()
