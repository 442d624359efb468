"""Sentences of a trace: where a number comes from, what a layer expected."""

from __future__ import annotations

import linecache
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from svdtune.guards.calls import Call
from svdtune.guards.tracing.records import Shape

if TYPE_CHECKING:
    from svdtune.guards.tracing.running import Run

_AXES = {2: "channels × length", 3: "channels × height × width", 4: "channels × frames × height × width"}
_SIZE_CHANGING = (
    nn.GLU, nn.PixelShuffle, nn.PixelUnshuffle, nn.Flatten, nn.Upsample, nn.Softmax2d, nn.Unflatten,
)  # fmt: skip


def where(path: str, file: str, line: int, the_run: Run) -> str:
    """A place in a forward, as a person writes it: class, file, line, text."""
    owner = path or type(the_run.module).__name__
    text = linecache.getline(file, line).strip()
    return f"{owner} ({Path(file).name}:{line}{f': `{text}`' if text else ''})" if line else owner


def plain(error: Exception | None) -> str:
    """First line of a message, in the wording of real tensors."""
    lines = str(error).strip().splitlines()
    text = lines[0].partition(" Hint: the backtrace")[0].rstrip(".") if lines else ""
    shapes = re.search(r"got \[(\d+), (\d+)\] X \[(\d+), (\d+)\]", text)
    if shapes:
        a, b, c, d = shapes.groups()
        text = f"mat1 and mat2 shapes cannot be multiplied ({a}x{b} and {c}x{d})"
    return f"{type(error).__name__}: {text}".rstrip(": ")


def origin(features: int, wanted: int, failed: Run) -> str:
    """Where the number of features comes from, when it can be factored from an earlier shape."""
    for operation in reversed(failed.operations):
        shape = operation.output
        if not shape or len(shape) < 3:
            continue
        if math.prod(shape[1:]) == features:
            made = _product(features, shape[1:], operation.path or "its own forward")
            return f"{made}{_multiple(wanted, shape)}"
        if math.prod(shape) == features and shape[0] > 1:
            product = "·".join(map(str, shape))
            return f"{features} = {product}: all {shape[0]} samples of {shape} in one row. The batch was flattened too."
        return ""
    return ""


def _product(number: int, sizes: Shape, path: str) -> str:
    return f"{number} = {'·'.join(map(str, sizes))}: {_AXES.get(len(sizes), 'product')} of what {path} gives."


def _multiple(wanted: int, shape: Shape) -> str:
    if wanted % shape[1]:
        return f" {wanted} is no multiple of {shape[1]} channels: no picture size gives it."
    rest, side = wanted // shape[1], math.isqrt(wanted // shape[1])
    if len(shape) == 4 and side * side == rest and side > 1:
        return f" {wanted} = {shape[1]}·{side}·{side} would be a map of {side}×{side}: a picture of another size."
    return ""


def changer(call: Call, failed: Run, came: int, wanted: int) -> str:
    """The parameterless layer or operation that made `came` out of `wanted` features (a GLU halves them)."""
    for other in reversed(failed.calls):
        if other.done and isinstance(other.module, _SIZE_CHANGING) and other.inputs and other.output_shapes:
            a, b = other.inputs[0], other.output_shapes[0]
            if wanted in a and came in b and a != b:
                kind = type(other.module).__name__
                more = "It halves the channels: half of them gate the other half." if kind == "GLU" else ""
                return f"{other.path} ({kind}) turns {a} into {b}. {more}".strip()
    for operation in reversed(failed.operations):
        if operation.name == "glu" and operation.output and wanted in operation.inputs[0] and came in operation.output:
            here = where(operation.path, operation.file, operation.line, failed)
            return f"F.glu in {here} turns {operation.inputs[0]} into {operation.output}: it halves the channels."
    return ""
