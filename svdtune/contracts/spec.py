"""Shapes as short strings over named sizes, and the check that reads them.

`"b t 2*z h/f w/f"` is five axes; each is a product or exact quotient of names from `Axes` and integers.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any, TypeVar

from svdtune.errors import ContractError

if TYPE_CHECKING:
    from torch import Tensor

Axes = Mapping[str, int]
"""Sizes by axis name, e.g. `{"b": 2, "t": 25, "h": 576, "w": 1024, "f": 8, ...}`."""

Record = TypeVar("Record")

_TERM = re.compile(r"[*/]|[^*/]+")


@dataclass(frozen=True)
class TensorSpec:
    """What one tensor must be: axes, meaning, dtype (`float32`, `int64`, `float` for any floating type), column names."""

    axes: str
    meaning: str
    dtype: str = "float"
    columns: tuple[str, ...] = ()

    def shape(self, axes: Axes) -> tuple[int, ...]:
        """The sizes of all axes. Raises ContractError when a name is unknown or a quotient is not exact."""
        return tuple(_evaluate(expression, axes) for expression in self.axes.split())


@dataclass(frozen=True)
class Mismatch:
    """One tensor that is not what its line in the table says."""

    where: str
    expected: str
    got: str
    meaning: str
    hint: str = ""

    def __str__(self) -> str:
        hint = f" {self.hint}" if self.hint else ""
        return f"{self.where}: got {self.got}, expected {self.expected}. {self.meaning}.{hint}"


def tensor(axes: str, meaning: str, *, dtype: str = "float", columns: tuple[str, ...] = ()) -> Any:
    """A dataclass field that carries a `TensorSpec`."""
    return field(metadata={"spec": TensorSpec(axes, meaning, dtype, columns)})


def specs(record: Any) -> dict[str, TensorSpec]:
    """Field name to spec, for a record class or an instance of one."""
    return dict(_specs_of(record if isinstance(record, type) else type(record)))


@cache
def _specs_of(record: type) -> dict[str, TensorSpec]:
    return {f.name: f.metadata["spec"] for f in fields(record) if "spec" in f.metadata}


def move(record: Record, device: Any) -> Record:
    """The record with its tensors on `device` (a torch.device); copies to a GPU start from pinned memory and do not wait."""
    moved = {name: _move_one(getattr(record, name), device) for name in specs(record)}
    return replace(record, **moved)  # pyright: ignore[reportArgumentType]


def check(record: Any, axes: Axes) -> list[Mismatch]:
    """Every shape or dtype in `record` that differs from its spec. Reads no values, so fake tensors pass through."""
    found = (
        _check_one(f"{type(record).__name__}.{name}", getattr(record, name), spec, axes)
        for name, spec in specs(record).items()
    )
    return [mismatch for mismatch in found if mismatch]


def require(record: Any, axes: Axes) -> None:
    """Raise ContractError listing every mismatch of `record`; return nothing when it is right."""
    if mismatches := check(record, axes):
        raise ContractError("\n".join(map(str, mismatches)), mismatches)


def _move_one(value: Tensor, device: Any) -> Tensor:
    if device.type == "cuda" and value.device.type == "cpu" and not value.is_pinned():
        value = value.pin_memory()
    return value.to(device, non_blocking=True)


def _check_one(where: str, value: Tensor, spec: TensorSpec, axes: Axes) -> Mismatch | None:
    expected = spec.shape(axes)
    got = tuple(value.shape)
    if got != expected:
        return Mismatch(
            where, f"({spec.axes}) = {expected}", str(got), spec.meaning, _repair(got, expected, spec, axes)
        )
    dtype = str(value.dtype).removeprefix("torch.")
    if spec.dtype not in (dtype, "float") or (spec.dtype == "float" and not value.dtype.is_floating_point):
        return Mismatch(where, spec.dtype, dtype, spec.meaning, "")
    return None


def _repair(got: tuple[int, ...], expected: tuple[int, ...], spec: TensorSpec, axes: Axes) -> str:
    """The change that would make the shape fit, in words, or nothing."""
    missing = [i for i, size in enumerate(expected) if size == 1 and got == expected[:i] + expected[i + 1 :]]
    if missing:
        names = spec.axes.split()
        axis = min(missing, key=lambda i: names[i] != "1")  # at batch 1 the batch axis would match too
        return f"An axis of size 1 is missing: .unsqueeze({axis}) would match."
    if len(got) == len(expected) and sorted(got) == sorted(expected):
        orders = (p for p in itertools.permutations(range(len(got))) if tuple(got[i] for i in p) == expected)
        return f"Axes are swapped: .permute{next(orders)} would match."
    if len(got) != len(expected):
        return _other_rank(got, expected)
    differing = [i for i, size in enumerate(expected) if got[i] != size]
    return _one_axis(got, expected, differing[0], spec, axes) if len(differing) == 1 else ""


def _other_rank(got: tuple[int, ...], expected: tuple[int, ...]) -> str:
    if prod(got) == prod(expected):
        return (
            f"It has {len(got)} axes instead of {len(expected)}; .reshape{expected} would match if the order is kept."
        )
    return f"It has {len(got)} axes instead of {len(expected)}."


def _one_axis(got: tuple[int, ...], expected: tuple[int, ...], i: int, spec: TensorSpec, axes: Axes) -> str:
    came, wanted = got[i], expected[i]
    if spec.columns and i == len(expected) - 1:
        return f"Its {wanted} columns are {', '.join(spec.columns)}."
    if i == 0 and came == axes["b"] * axes["t"]:
        return "It has one row per frame; one row per clip is wanted: [::t] would match if each was repeated."
    if came == 2 * wanted and came not in axes.values():
        return f"Axis {i} is twice as long, as for guidance or after a repeat: .chunk(2, dim={i})[0] would match."
    if spec.axes.split()[i].startswith("2*") and 2 * came == wanted:
        return f"Half of axis {i} is missing: the other half is joined by torch.cat([...], dim={i})."
    if came > wanted:
        return f"Axis {i} is too long: .narrow({i}, 0, {wanted}) would match."
    # Repeating what is too short would match as well, and train on copies.
    return f"Axis {i} is too short."


def _evaluate(expression: str, axes: Axes) -> int:
    value, operator = 1, "*"
    for term in _terms(expression):
        if term in "*/":
            operator = term
            continue
        size = _size(term, axes, expression)
        if operator == "/" and value % size:
            raise ContractError(
                f"axis {expression!r}: {value} is not divisible by {term}={size}. "
                f"The VAE would floor it silently; choose a multiple of {size}."
            )
        value = value // size if operator == "/" else value * size
    return value


@cache  # thousands of draws ask for the same few shapes
def _terms(expression: str) -> list[str]:
    return _TERM.findall(expression)


def _size(term: str, axes: Axes, expression: str) -> int:
    if term.isdecimal():
        return int(term)
    if term not in axes:
        raise ContractError(f"axis {expression!r}: no size named {term!r}; known: {', '.join(sorted(axes))}")
    return axes[term]
