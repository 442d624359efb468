"""Changes that might mend a run, and the search that keeps those with which the module really does what it should."""

from __future__ import annotations

import linecache
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from svdtune.guards.calls import Call, tensors_in
from svdtune.guards.tracing.layers import (
    CONVS,
    TRANSPOSED,
    bridge,
    bridge_text,
    can_be_rebuilt,
    features,
    rebuilt,
    shares_weights,
)
from svdtune.guards.tracing.records import Remedy, Shape
from svdtune.guards.tracing.running import Change, Run, count, innermost, run
from svdtune.guards.tracing.text import where

_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
RESHAPES = ("view", "reshape", "flatten")
ELEMENTWISE = ("add", "__add__", "__radd__", "__iadd__", "add_", "sub", "__sub__", "__rsub__", "mul", "__mul__", "__rmul__", "div",
               "__truediv__")  # fmt: skip
_DEPTH = 3
_MOST_RUNS = 60


@dataclass(frozen=True)
class Candidate:
    """One change to try."""

    change: str
    meaning: str
    changes: tuple[Change, ...]
    follows: bool = False
    """Such a change may also be the second step of another one."""
    parameters: int = 0
    """Of layers that a changed operation brings with it."""
    place: str = ""
    """Where the operation stands that is changed."""


@dataclass
class Search:
    """Tries candidates until the budget is spent."""

    attempt: Callable[[Sequence[Change]], Run]
    accept: Callable[[Run, Sequence[Change]], bool]
    inputs: Sequence[Any]
    base: int
    """Parameters of the unchanged module."""
    left: int = _MOST_RUNS

    def verified(self, tried: Candidate, before: Run, depth: int = 1) -> Remedy | None:
        """The remedy, where the module runs with it (and perhaps one or two further changes) and is accepted."""
        if self.left <= 0:
            return None
        self.left -= 1
        again = self.attempt(tried.changes)
        if again.ok:
            if not self.accept(again, tried.changes):
                return None
            return Remedy(tried.change, again.parameters - self.base + tried.parameters, tried.meaning, again.shapes)
        further = again.stage == "forward" and (before.ok or len(again.operations) > len(before.operations))
        for more in candidates(again, self.inputs) if further and depth < _DEPTH else ():
            if more.follows:
                both = Candidate(
                    f"{tried.change}; then {more.change}", f"{tried.meaning} {more.meaning}".strip(), tried.changes + more.changes,
                    parameters=tried.parameters + more.parameters,
                )  # fmt: skip
                if made := self.verified(both, again, depth + 1):
                    return made
        return None


def attempts(module: nn.Module, inputs: Sequence[Any], *, real: bool) -> Callable[[Sequence[Change]], Run]:
    """How a change is tried: on fake tensors, and where that works and the module is small on real numbers too."""

    def attempt(changes: Sequence[Change]) -> Run:
        again = run(module, inputs, changes)
        return run(module, inputs, changes, fake=False) if again.ok and real else again

    return attempt


def remedies(module: nn.Module, inputs: Sequence[Any], failed: Run) -> list[Remedy]:
    """Every candidate for `failed` that was run and found to work, nearest first."""
    search = Search(
        attempts(module, inputs, real=not failed.fake),
        lambda after, _changes: keeps_samples(after),
        inputs,
        count(module),
    )
    made = (search.verified(candidate, failed) for candidate in candidates(failed, inputs))
    return list({one.change: one for one in made if one}.values())


def keeps_samples(after: Run) -> bool:
    """A repair that loses the samples (flattening the batch) is none: some axis of the output must still belong to them."""
    rows, out = leading(after), after.shapes[0] if after.shapes else ()
    return rows < 2 or not out or rows in out or folds_frames(after, rows)


def folds_frames(after: Run, rows: int) -> bool:
    """Frames or tokens folded into the batch, their other axes as before: (b, t, ...) -> (b*t, ...)."""
    out = after.shapes[0]
    folds = [o for o in after.operations if o.name in RESHAPES and o.inputs and o.output and len(o.inputs[0]) > 1]
    kept = any(o.output[0] == math.prod(o.inputs[0][:2]) and o.output[1:] == o.inputs[0][2:] for o in folds if o.output)
    return bool(out) and out[0] % rows == 0 and kept


def candidates(failed: Run, inputs: Sequence[Any]) -> Iterator[Candidate]:
    """What might mend `failed`, nearest first."""
    if failed.stage == "backward":
        yield from _not_in_place(failed)
        return
    call = innermost(failed)
    if call is not None and call.inputs:
        yield from _of_module(call, failed)
    yield from _of_operation(failed, call)
    yield from _without_pooling(failed)
    yield from _of_types(failed, inputs)
    if not _about_types(failed):
        yield from _of_axes(inputs)


def _about_types(failed: Run) -> bool:
    return bool(re.search(r"\bd?types?\b|index out of range", str(failed.error), re.IGNORECASE))


def _of_module(call: Call, failed: Run) -> Iterator[Candidate]:
    fixed, shape = features(call.module), call.inputs[0]
    yield from _other_rank(call, shape)
    if fixed is None or not _has_axis(shape, fixed.axis) or shape[fixed.axis] == fixed.size:
        return
    came = shape[fixed.axis]
    yield from _flattened(call, failed, shape, fixed.size)
    yield from _glu(failed, came, fixed.size)
    # Axes in another order cost nothing and lose nothing: where they fit they come first.
    yield from _rearranged(call, shape, fixed.axis, fixed.size)
    yield from _restructured(call, failed, came)
    yield from _bridged(call, shape, fixed.axis, fixed.size)
    yield from _producer(failed, shape, fixed.axis, fixed.size)
    yield from _picked(call, shape, fixed.axis, fixed.size)


def _has_axis(shape: Shape, axis: int) -> bool:
    return -len(shape) <= axis < len(shape)


def _restructured(call: Call, failed: Run, came: int) -> Iterator[Candidate]:
    fixed = features(call.module)
    if not call.path or fixed is None or not can_be_rebuilt(call.module):
        return
    tied = shares_weights(call.path, failed.module)
    groups = getattr(call.module, "num_groups", 1)
    if came % groups:
        return
    yield Candidate(
        f"give {call.path} {fixed.keyword}={came} instead of {fixed.size}",
        f"The layer is made anew for {came} features: weights trained for {fixed.size} do not fit it any more."
        + (f" It no longer shares its weight with {tied}." if tied else ""),
        (Change("swap", call.path, lambda old: rebuilt(old, **{fixed.keyword: came})),),
        follows=True,
    )


def _bridged(call: Call, shape: Shape, axis: int, wanted: int) -> Iterator[Candidate]:
    came, spatial = shape[axis], len(shape) - 2
    if isinstance(call.module, nn.MultiheadAttention) or (
        axis != -1 and (spatial not in (1, 2, 3) or axis % len(shape) != 1)
    ):
        return  # attention reads three inputs; a picture without a batch axis is better given one
    kind = "Linear" if axis == -1 else f"Conv{spatial}d"
    yield Candidate(
        f"put a bridge {bridge_text(kind, came, wanted, call.module)} before {call.path or 'the module'}",
        f"{call.path or 'It'} keeps its weights and its {wanted} features; the bridge is one more layer that has to be trained.",
        (Change("before", call.path, lambda: bridge(kind, came, wanted, call.module)),),
    )


def _producer(failed: Run, shape: Shape, axis: int, wanted: int) -> Iterator[Candidate]:
    """The layer before made to give what is read."""
    done = [
        call
        for call in failed.calls
        if call.done and isinstance(call.module, (nn.Linear, *CONVS, *TRANSPOSED)) and call.path
    ]
    last = done[-1] if done else None
    if last is None or not can_be_rebuilt(last.module) or last.output_shapes[:1] != [shape]:
        return
    linear = isinstance(last.module, nn.Linear)
    keyword = "out_features" if linear else "out_channels"
    if axis % len(shape) != (len(shape) - 1 if linear else 1):
        return
    yield Candidate(
        f"give {last.path} {keyword}={wanted} instead of {shape[axis]}",
        f"The layer before is made anew: weights trained for {shape[axis]} do not fit it any more.",
        (Change("swap", last.path, lambda old: rebuilt(old, **{keyword: wanted})),),
    )


def _rearranged(call: Call, shape: Shape, axis: int, wanted: int) -> Iterator[Candidate]:
    here, name = axis % len(shape), call.path or "the module"
    fitting = [
        i for i, size in enumerate(shape) if size == wanted and i != here and (i > 0 or (here > 0 and len(shape) == 3))
    ]
    for i in reversed(fitting):
        order = list(range(len(shape)))
        order.insert(here, order.pop(i))
        if order[0] != 0 and not (isinstance(call.module, CONVS) and len(shape) == len(call.module.kernel_size) + 1):
            continue  # the batch stays in front; only a single picture has none
        last = " (PIL and numpy give channels last)" if i == len(shape) - 1 and wanted in (1, 3, 4) else ""
        yield Candidate(
            f"give the axes before {name} another order: x.permute({', '.join(map(str, order))})",
            f"Axis {i} has the {wanted} entries that {name} reads at axis {here}{last}; the numbers stay the same.",
            (Change("before", call.path, lambda order=order: lambda x: x.permute(order)),),
        )


def _picked(call: Call, shape: Shape, axis: int, wanted: int) -> Iterator[Candidate]:
    """Colour channels that are too few or one too many."""
    came, name = shape[axis], call.path or "the module"
    if not isinstance(call.module, CONVS) or axis % len(shape) != 1:
        return
    if came == 1 < wanted <= 4:
        rest = [-1] * (len(shape) - 2)
        yield Candidate(
            f"repeat the channel before {name}: x.expand(-1, {wanted}, {', '.join(map(str, rest))})",
            f"The same picture in all {wanted} channels (grey as colour); nothing new is learned from the copies.",
            (Change("before", call.path, lambda: lambda x: x.expand(-1, wanted, *rest)),),
        )
    if came == wanted + 1 and wanted >= 3:
        yield Candidate(
            f"drop the last channel before {name}: x[:, :{wanted}]",
            f"Channel {came} (often alpha) is thrown away.",
            (Change("before", call.path, lambda: lambda x: x[:, :wanted]),),
        )


def _flattened(call: Call, failed: Run, shape: Shape, wanted: int) -> Iterator[Candidate]:
    if len(shape) > 2 and math.prod(shape[1:]) == wanted:
        yield Candidate(
            f"flatten the input of {call.path or 'the module'}: x.flatten(1)",
            f"All {wanted} = {'·'.join(map(str, shape[1:]))} numbers of a sample are read at once, as the layer was built for.",
            (Change("before", call.path, lambda: lambda x: x.flatten(1)),),
        )
    yield from swallowed(failed)
    before = last_picture(failed)
    if before and len(shape) == 2 and before[1] == wanted and math.prod(before[1:]) == shape[1]:
        yield Candidate(
            f"average each channel before {call.path}: x.mean over {'·'.join(map(str, before[2:]))} (nn.AdaptiveAvgPool2d(1))",
            f"Only the mean of each of the {wanted} channels is read, not where in the picture it is; any picture size fits then.",
            (Change("before", call.path, lambda: lambda x: x.unflatten(1, (wanted, -1)).mean(-1)),),
        )


def swallowed(seen: Run) -> Iterator[Candidate]:
    """Operations that changed the leading axis: reshapes and joins that keep it."""
    rows = leading(seen)
    for operation in reversed(seen.operations):
        came, out = operation.inputs[0] if operation.inputs else (), operation.output
        if len(came) < 2 or came[0] != rows or (out and (out[0] == rows or (len(out) > 1 and out[1:] == came[2:]))):
            continue  # the samples are kept, or frames are folded into the batch on purpose
        at, here = (operation.path, operation.number), where(operation.path, operation.file, operation.line, seen)
        if operation.name in RESHAPES:
            yield Candidate(
                f"keep the batch axis: x.flatten(1) instead of {operation.name} in {here}",
                f"Every sample keeps its own row: {came} -> {(came[0], math.prod(came[1:]))}.",
                (Change("operation", at, lambda _f, a, _k: a[0].flatten(1)),),
                follows=True,
                place=here,
            )
        elif operation.name in ("cat", "concat") and all(shape[0] == rows for shape in operation.inputs):
            yield Candidate(
                f"join the features: {operation.name}(..., dim=1) in {here}",
                f"Every sample keeps its own row; joined along axis 0 the {rows} samples become {rows * len(operation.inputs)}.",
                (Change("operation", at, lambda f, a, _k: f(a[0], dim=1)),),
                follows=True,
                place=here,
            )


def _glu(failed: Run, came: int, wanted: int) -> Iterator[Candidate]:
    for other in failed.calls:
        if isinstance(other.module, nn.GLU) and other.done and wanted == 2 * came and other.path:
            yield Candidate(
                f"replace {other.path} (GLU) by nn.SiLU()",
                "An activation that keeps its shape: no gate any more, no parameters changed.",
                (Change("swap", other.path, lambda _old: nn.SiLU()),),
            )
    for operation in failed.operations:
        if operation.name == "glu" and operation.output and wanted == 2 * came:
            yield Candidate(
                f"F.silu instead of F.glu in {where(operation.path, operation.file, operation.line, failed)}",
                "An activation that keeps its shape: no gate any more, no parameters changed.",
                (Change("operation", (operation.path, operation.number), lambda _f, a, _k: F.silu(a[0])),),
            )


def _other_rank(call: Call, shape: Shape) -> Iterator[Candidate]:
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}.get(len(shape))
    if (
        not isinstance(call.module, nn.modules.batchnorm._BatchNorm)
        or not kind
        or type(call.module) is kind
        or not call.path
    ):
        return

    def other(old: nn.Module) -> nn.Module:
        dtype = next(old.parameters(), torch.zeros(())).dtype
        return kind(call.module.num_features, call.module.eps, call.module.momentum, call.module.affine, dtype=dtype)

    yield Candidate(
        f"make {call.path} an nn.{kind.__name__}({call.module.num_features})",
        f"The same normalisation for inputs with {len(shape)} axes; weights and running means fit as they are.",
        (Change("swap", call.path, other),),
        follows=True,
    )


def _of_operation(failed: Run, call: Call | None) -> Iterator[Candidate]:
    operation = failed.operations[-1] if failed.operations else None
    if operation is None or operation.outputs is not None or call is None or operation.path != call.path:
        return
    here, at, shapes = (
        where(operation.path, operation.file, operation.line, failed),
        (operation.path, operation.number),
        operation.inputs,
    )
    if operation.name == "view":
        yield Candidate(
            f"reshape instead of view in {here}",
            "reshape copies where the memory is not contiguous; the numbers and their order are the same.",
            (Change("operation", at, lambda _f, a, k: a[0].reshape(*a[1:], **k)),),
        )
    if operation.name in RESHAPES and shapes and len(shapes[0]) > 2:
        yield from swallowed(failed)
    if operation.name in ("cat", "concat") and len(shapes) == 2 and len(shapes[0]) == len(shapes[1]) > 2:
        yield from _same_grid(at, here, shapes, lambda func, a, b, rest, kwargs: func([a, b], *rest, **kwargs))
    if operation.name in ELEMENTWISE and len(shapes) == 2:
        yield from _more_axes(at, here, shapes)
        yield from _same_grid(at, here, shapes, lambda func, a, b, _rest, _kwargs: func(a, b))
        yield from _projected(at, here, shapes)
        yield from _cut(at, here, shapes)
    if operation.name == "linear" and len(shapes) > 1 and shapes[1][:1] == shapes[0][-1:]:
        yield Candidate(
            f"transpose the weight in {here}: F.linear(x, weight.T)",
            f"F.linear reads weights as (out, in); this one is {shapes[1]}, (in, out).",
            (Change("operation", at, lambda f, a, k: f(a[0], a[1].T, *a[2:], **k)),),
        )
    if operation.name in ("matmul", "__matmul__", "bmm", "mm") and len(shapes) == 2 and len(shapes[1]) > 1:
        yield Candidate(
            f"transpose the second factor in {here}: b.transpose(-2, -1)",
            f"Products over the features that both have: {shapes[0]} with {shapes[1]}.",
            (Change("operation", at, lambda f, a, _k: f(a[0], a[1].transpose(-2, -1))),),
        )


def _same_grid(at: Any, here: str, shapes: list[Shape], joined: Callable[..., Any]) -> Iterator[Candidate]:
    """Two maps of different height and width: one is stretched to the other, or the smaller padded by its missing row."""
    a, b = shapes
    if len(a) != len(b) or len(a) not in (3, 4, 5) or a[2:] == b[2:]:
        return

    def fitted(first: bool, pad: bool) -> Callable[..., Any]:
        def make(func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
            x, y = tensors_in(args)[:2]
            small, big = (x, y) if first else (y, x)
            missing = [side for n, m in zip(small.shape[:1:-1], big.shape[:1:-1], strict=True) for side in (0, m - n)]
            small = F.pad(small, missing) if pad else F.interpolate(small, size=big.shape[2:])
            pair = (small, big) if first else (big, small)
            rest = args[1:] if isinstance(args[0], list | tuple) else args[2:]
            return joined(func, *pair, rest, kwargs)

        return make

    for first, (small, big) in ((True, (a, b)), (False, (b, a))):
        one, other = ("first", "second") if first else ("second", "first")
        if all(0 <= m - n <= 1 for n, m in zip(small[2:], big[2:], strict=True)):
            yield Candidate(
                f"pad the {one} tensor in {here} by the row that is missing: F.pad",
                f"{small[2:]} becomes {big[2:]}; zeros stand at its edge. Halving an odd size and doubling it again loses a row.",
                (Change("operation", at, fitted(first, True)),),
            )
        yield Candidate(
            f"resize the {one} tensor in {here} to the {other}: F.interpolate(a, size=b.shape[2:])",
            f"{small[2:]} is stretched to {big[2:]} (nearest neighbour).",
            (Change("operation", at, fitted(first, False)),),
        )


def _more_axes(at: Any, here: str, shapes: list[Shape]) -> Iterator[Candidate]:
    """(b, c) beside (b, c, h, w): axes of length 1 behind."""
    for first, (short, long) in ((False, (shapes[1], shapes[0])), (True, (shapes[0], shapes[1]))):
        missing = len(long) - len(short)
        if missing < 1 or len(short) < 2 or any(n not in (1, m) for n, m in zip(short, long, strict=False)):
            continue

        def make(func: Any, args: tuple[Any, ...], _kwargs: Any, first: bool = first, missing: int = missing) -> Any:
            a, b = args[:2]
            return func(a[(..., *[None] * missing)], b) if first else func(a, b[(..., *[None] * missing)])

        yield Candidate(
            f"give the {'first' if first else 'second'} tensor in {here} axes of length 1 behind: x[..., {', '.join(['None'] * missing)}]",
            f"{short} is the same for every place of {long}.",
            (Change("operation", at, make),),
        )


def _projected(at: Any, here: str, shapes: list[Shape]) -> Iterator[Candidate]:
    """A residual whose branches differ in channels, and perhaps by a stride: a projection shortcut."""
    for first, (big, small) in ((False, (shapes[1], shapes[0])), (True, (shapes[0], shapes[1]))):
        stride = _stride(big, small)
        if not stride:
            continue
        linear, more = len(big) == 2, f", stride={stride}" if stride > 1 else ""
        text = f"nn.Linear({big[1]}, {small[1]})" if linear else f"nn.Conv2d({big[1]}, {small[1]}, 1{more})"

        def project(
            func: Any, args: tuple[Any, ...], _kwargs: Any, first: bool = first, stride: int = stride,
            came: int = big[1], wanted: int = small[1],
        ) -> Any:  # fmt: skip
            x = args[0 if first else 1]
            layer = (
                nn.Linear(came, wanted, dtype=x.dtype)
                if x.dim() == 2
                else nn.Conv2d(came, wanted, 1, stride=stride, dtype=x.dtype)
            )
            return func(layer(x), args[1]) if first else func(args[0], layer(x))

        yield Candidate(
            f"put a bridge {text} on the {'first' if first else 'second'} tensor in {here}",
            f"One more layer ({big[1] * small[1] + small[1]} parameters) brings {big[1]} channels to {small[1]} (a projection shortcut).",
            (Change("operation", at, project),),
            parameters=big[1] * small[1] + small[1],
        )


def _stride(big: Shape, small: Shape) -> int:
    """The stride of a 1 x 1 convolution that brings one map to the other's size and channels; 0 when there is none."""
    if len(big) != len(small) or len(big) not in (2, 4) or big[0] != small[0] or big[1] == small[1]:
        return 0
    grid, wanted = big[2:], small[2:]
    strides = {side // to for side, to in zip(grid, wanted, strict=True) if to} or {1}
    stride = max(strides)
    return stride if stride and tuple(-(-side // stride) for side in grid) == wanted else 0


def _cut(at: Any, here: str, shapes: list[Shape]) -> Iterator[Candidate]:
    """A table of positions that is longer than the sequence."""
    a, b = shapes
    axes = [i for i in range(1, len(a)) if len(a) == len(b) and a[i] != b[i]]
    if len(axes) != 1 or len(a) != 3 or b[0] != 1 or b[axes[0]] < a[axes[0]]:
        return
    axis, length = axes[0], a[axes[0]]
    yield Candidate(
        f"take the first {length} positions of the second tensor in {here}: b.narrow({axis}, 0, {length})",
        f"A table of {b[axis]} positions serves shorter sequences too.",
        (Change("operation", at, lambda f, x, _k: f(x[0], x[1].narrow(axis, 0, length))),),
    )


def _without_pooling(failed: Run) -> Iterator[Candidate]:
    """Without one of the poolings before the failure."""
    for call in failed.calls:
        if isinstance(call.module, _POOLS) and call.done and call.path:
            yield Candidate(
                f"remove the pooling {call.path}",
                f"Later layers see {call.inputs[0][2:]} instead of {call.output_shapes[0][2:]}: finer, and more work.",
                (Change("swap", call.path, lambda _old: nn.Identity()),),
            )


def _of_types(failed: Run, inputs: Sequence[Any]) -> Iterator[Candidate]:
    """Integers where rows are looked up, the weights' own type everywhere else."""
    waiting = [call.module for call in reversed(failed.calls) if not call.done]
    rows = next((module.num_embeddings for module in waiting if isinstance(module, nn.Embedding)), 0)
    weights = next((p for module in waiting for p in module.parameters() if p.is_floating_point()), None)
    for i, value in enumerate(inputs):
        if not isinstance(value, torch.Tensor):
            continue
        name = _input_name(i, inputs)
        if rows:
            yield Candidate(
                f"give {name} as row numbers from 0 to {rows - 1} (int64)", "An embedding looks rows up by number.",
                (Change("input", i, lambda x: x.long().clamp(0, rows - 1)),), follows=True,
            )  # fmt: skip
        elif weights is not None and value.dtype != weights.dtype:
            yield Candidate(
                f"give {name} in the weights' type: x.to({weights.dtype})", "torch multiplies only numbers of one type.",
                (Change("input", i, lambda x, dtype=weights.dtype: x.to(dtype)),), follows=True,
            )  # fmt: skip


def _input_name(i: int, inputs: Sequence[Any]) -> str:
    return "the input" if len(inputs) == 1 else f"input {i}"


def _of_axes(inputs: Sequence[Any]) -> Iterator[Candidate]:
    for i, value in enumerate(inputs):
        if isinstance(value, torch.Tensor):
            yield from _of_input_axes(i, _input_name(i, inputs), tuple(value.shape))


def _of_input_axes(i: int, name: str, shape: Shape) -> Iterator[Candidate]:
    if len(shape) in (2, 3):
        yield Candidate(
            f"add a channel axis to {name}: x.unsqueeze(1)",
            f"{shape} is read as {shape[0]} samples of one channel each: {(shape[0], 1, *shape[1:])}.",
            (Change("input", i, lambda x: x.unsqueeze(1)),),
        )
    if len(shape) in (1, 3):
        yield Candidate(
            f"add the batch axis to {name}: x.unsqueeze(0)",
            f"{shape} is read as one sample: {(1, *shape)}.",
            (Change("input", i, lambda x: x.unsqueeze(0)),),
        )
    if len(shape) == 3:
        yield Candidate(
            f"swap the last two axes of {name}: x.transpose(1, 2)",
            f"{shape} becomes {(shape[0], shape[2], shape[1])}: features where this module reads them.",
            (Change("input", i, lambda x: x.transpose(1, 2)),),
        )


def _not_in_place(failed: Run) -> Iterator[Candidate]:
    """Without writing into a tensor that the backward pass still needs."""
    for call in failed.calls:
        if getattr(call.module, "inplace", False) and call.path:
            yield Candidate(
                f"make {call.path} not write in place: inplace=False",
                "The same numbers; one more tensor is kept for the backward pass.",
                (Change("swap", call.path, _plain_activation),),
            )
    for operation in failed.operations:
        # Of `x.add_(1)` alone the result may be dropped: only `x += 1` becomes `x = x + 1`.
        sign = _SIGN.get(operation.name)
        if sign and f"{sign}=" in linecache.getline(operation.file, operation.line):
            yield Candidate(
                "a new tensor instead of writing in place in "
                f"{where(operation.path, operation.file, operation.line, failed)}: x = x {sign} ...",
                "The same numbers; one more tensor is kept for the backward pass.",
                (Change("operation", (operation.path, operation.number), _out_of_place(operation.name)),),
            )


_SIGN = {"__iadd__": "+", "__isub__": "-", "__imul__": "*", "__itruediv__": "/", "__idiv__": "/",
         "add_": "+", "sub_": "-", "mul_": "*", "div_": "/"}  # fmt: skip


def _plain_activation(old: nn.Module) -> nn.Module:
    vars(old)["inplace"] = False  # a plain attribute
    return old


def _out_of_place(name: str) -> Callable[..., Any]:
    plain = {"+": torch.add, "-": torch.sub, "*": torch.mul, "/": torch.div}[_SIGN[name]]
    return lambda _f, args, _k: plain(args[0], args[1])


def leading(the_run: Run) -> int:
    """Length of the first axis of the first input: the samples."""
    shapes = the_run.calls[0].inputs if the_run.calls else []
    return shapes[0][0] if shapes and shapes[0] else 0


def last_picture(the_run: Run) -> Shape | None:
    """The last shape with at least three axes before the failure."""
    return next((o.output for o in reversed(the_run.operations) if o.output and len(o.output) > 2), None)
