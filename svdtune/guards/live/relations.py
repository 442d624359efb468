"""What two tensors of a step have to do with each other, and how it is told when they do not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from svdtune.guards.catalog import RULES
from svdtune.guards.findings import Finding

OFF, OFF_NETWORK = 1e-4, 1e-2
"""Of the largest value: rounding in float32 is a hundred times smaller, every known mistake much larger. A convolution may use
TF32, and other kernels for other sizes."""
_SMALL = 1e-3
"""Values below are as good as zero: nothing is divided by them."""

Mistakes = Callable[[], Sequence[tuple[str, Tensor]]]


@dataclass(frozen=True)
class Relation:
    """`actual` should be `expected`; both (rows, ...), compared row by row."""

    code: str
    where: str
    actual: Tensor
    expected: Tensor
    words: str
    """What is expected."""
    why: str
    mistakes: Mistakes = tuple
    """What it would be under known mistakes, to name the one that was made; computed only then."""
    off: float = OFF


def broken(relations: Iterable[Relation]) -> Iterator[Finding]:
    """A finding for each relation that does not hold, one for each place."""
    told: set[tuple[str, str]] = set()
    for r in relations:
        got = _difference(r)
        if got and (r.code, r.where) not in told:
            told.add((r.code, r.where))
            yield Finding(r.code, "error", r.where, got, r.words, r.why, f"Mend {RULES[r.code].fix}")


def _difference(r: Relation) -> str:
    if r.actual.shape != r.expected.shape:
        return f"shape {list(r.actual.shape)}, expected {list(r.expected.shape)}"
    if not bool(r.actual.isfinite().all()):
        return "values that are not finite"
    off = distance(r.actual, r.expected)
    if off <= r.off:
        return ""
    for text, value in r.mistakes():
        if value.shape == r.actual.shape and distance(r.actual, value) <= r.off:
            return text
    return f"values off by up to {off:.2g} of the largest"


def distance(one: Tensor, other: Tensor) -> float:
    """The largest difference in units of the largest value, of the worst row; 0 for rows that are the same."""
    one, other = one.float().reshape(len(one), -1), other.float().reshape(len(other), -1)
    size = other.abs().amax(1).clamp_min(_SMALL)
    return float(((one - other).abs().amax(1) / size).max().nan_to_num(torch.inf))


def like(values: Tensor, tensor: Tensor) -> Tensor:
    """values (b,) with the axes of `tensor` (b, ...)."""
    return values.reshape(values.shape + (1,) * (tensor.ndim - values.ndim))
