"""Probes on real numbers: does a sample's answer depend on its neighbours, and does a batch of one keep its axes?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from math import prod
from typing import Any

import torch
from torch import nn

from svdtune.guards.calls import tensors_in
from svdtune.guards.findings import Finding
from svdtune.guards.tracing.layers import CONVS
from svdtune.guards.tracing.repairs import ELEMENTWISE, RESHAPES, Candidate, Search, folds_frames, swallowed
from svdtune.guards.tracing.running import Change, Operation, Run, count, run
from svdtune.guards.tracing.text import plain, where

_SEQUENCE_FIRST = (nn.RNNBase, nn.MultiheadAttention)
_ALONG = {"softmax", "log_softmax", "mean", "sum", "std", "var", "norm", "cumsum", "cumprod", "max", "min", "amax", "amin", "sort",
          "flip", "roll", "logsumexp", "normalize"}  # fmt: skip
"""Functions whose dim says along which axis they mix."""


def probe(module: nn.Module, inputs: Sequence[Any]) -> tuple[list[Finding], list[str]]:
    """SHP454, SHP455 and SHP456 for a module that runs on these real inputs, and notes on what could not be probed."""
    given = _at_least_two(inputs)
    if given is None:
        return [], ["batch probes skipped: the first input has no batch axis"]
    as_given = _run(module, inputs)
    if _unbatched_pictures(as_given):
        return _channels_for_samples(inputs, as_given), []
    base = _run(module, given)
    if base.error is not None:
        return [], [f"batch probes skipped: in eval mode with {len(given[0])} samples it raises {plain(base.error)}"]
    if reason := _no_probe(module, given, base):
        return [], [f"batch probes skipped: {reason}"]
    found, notes = _Probe(module, given, base).independence()
    found += _one_sample(module, given, base)
    return found or _flattened_picture(module, inputs), notes


def _no_probe(module: nn.Module, given: list[Any], base: Run) -> str:
    outputs = tensors_in(base.outputs)
    if not outputs or outputs[0].numel() == 1:
        return "the output is one number for the whole batch, or none"
    if (
        len(outputs) == len(given[0])
        and isinstance(base.outputs, list | tuple)
        and outputs[0].shape[:1] != (len(given[0]),)
    ):
        return "it gives one output for each sample"
    if not all(bool(torch.isfinite(t).all()) for t in outputs if t.is_floating_point()):
        return "the output is not finite"
    again = _run(module, given)
    if again.ok and any(bool(_different(a, b).any()) for a, b in zip(outputs, tensors_in(again.outputs), strict=True)):
        return "it draws random numbers of its own, so two runs differ"
    if any(not m.track_running_stats for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
        return "a normalisation without running statistics mixes the samples by design"
    if _cuts_batch(base, len(given[0])):
        return "axis 0 is cut into clips and frames, which belong together"
    return ""


def _cuts_batch(base: Run, rows: int) -> bool:
    """(b*t, ...) -> (b, t, ...): what stands on axis 0 is meant to be mixed."""
    for operation in base.operations:
        came, out = operation.inputs[0] if operation.inputs else (), operation.output or ()
        came = came[1:] if came[:1] == (1,) else came
        cut = len(out) == len(came) + 1 and out[2:] == came[1:] and prod(out[:2]) == rows and rows not in out[:1]
        if operation.name in ("view", "reshape", "unflatten") and came[:1] == (rows,) and cut:
            return True
    return False


def _run(module: nn.Module, inputs: Sequence[Any], changes: Sequence[Change] = ()) -> Run:
    return run(module, inputs, changes, fake=False, evaluate=True, backward=False)


def _at_least_two(inputs: Sequence[Any]) -> list[Any] | None:
    first = inputs[0] if inputs else None
    if not isinstance(first, torch.Tensor) or first.dim() < 1 or not len(first):
        return None
    return list(inputs) if len(first) > 1 else [_resize(value, 1, 2) for value in inputs]


def _resize(value: Any, rows: int, wanted: int) -> Any:
    """Tensors with `rows` rows get `wanted`, also in tuples and dicts; what is shared by all samples stays."""
    if isinstance(value, dict):
        return {key: _resize(item, rows, wanted) for key, item in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(_resize(item, rows, wanted) for item in value)
    if not isinstance(value, torch.Tensor) or value.dim() < 1 or len(value) != rows:
        return value
    return value[torch.arange(wanted) % rows].detach().clone()


@dataclass(frozen=True)
class _Probe:
    """Perturbs one sample and looks which answers change."""

    module: nn.Module
    given: list[Any]
    base: Run

    @property
    def rows(self) -> int:
        return len(self.given[0])

    def independence(self) -> tuple[list[Finding], list[str]]:
        """SHP454, and a note where a layer's own setting says that the samples stand on axis 1."""
        if pairs := self._pairs_by_broadcast():
            return [pairs], []
        if not self._depends() or self._apart(self.base, ()):
            return [], []
        first = self.given[0]
        other_axis = first.dim() > 2 and self._apart(self.base, (), axis=1)
        layers = _sequence_first(self.base)
        if other_axis and layers:
            return [], [
                f"{layers[0]} has batch_first=False: axis 1 of the input, {first.shape[1]} long, is taken for the samples"
            ]
        if self.base.shapes[0][:1] != (self.rows,) and folds_frames(self.base, self.rows):
            return [], []
        return [self._finding(other_axis)], []

    def _finding(self, other_axis: bool) -> Finding:
        place, change = self._fix() or (self._suspect(), "")
        out = self.base.shapes[0]
        if out[:1] == (self.rows,):
            got = f"changing one of {self.rows} samples changes the outputs of others"
            why = "Samples leak into each other: the loss of one depends on which others are in its batch."
        else:
            got = f"{self.rows} samples go in, the output {out} has no row for each of them"
            why = "An operation has merged the batch axis with others, or has put samples together."
        if other_axis:
            why += " Along axis 1 nothing leaks: if that axis holds the samples (sequence first), all is well."
        return Finding("SHP454", "error" if change and not other_axis else "warning", place or type(self.module).__name__, got,
                       "output i depends on sample i alone", why, change, verified=bool(change))  # fmt: skip

    def _depends(self) -> bool:
        """Whether the output depends on the first input at all; a parameter given back does not."""
        changed = _run(self.module, [_perturbed(self.given[0], 0, 0), *self.given[1:]])
        pairs = zip(tensors_in(self.base.outputs), tensors_in(changed.outputs), strict=False)
        return changed.ok and any(bool(_different(a, b).any()) for a, b in pairs)

    def _apart(self, base: Run, changes: Sequence[Change], axis: int = 0) -> bool:
        """Every output that has a row for each sample on `axis` keeps the samples apart, whichever input is perturbed."""
        rows = self.given[0].shape[axis]
        outputs = tensors_in(base.outputs)
        fitting = [_axes_of(out, rows, axis) for out in outputs]
        asked = [k for k, out in enumerate(outputs) if k == 0 or out.shape[:1] == (rows,)]
        if rows < 2 or not fitting[0]:
            return False
        for j in self._batch_inputs() if axis == 0 else [0]:
            for index in (0, rows - 1):
                given = [_perturbed(value, axis, index) if i == j else value for i, value in enumerate(self.given)]
                changed = _run(self.module, given, changes)
                if not changed.ok:
                    return False
                for k, (one, other) in enumerate(zip(outputs, tensors_in(changed.outputs), strict=True)):
                    different = _different(one, other)
                    fitting[k] = [i for i in fitting[k] if _only(different, i, index)]
        return all(fitting[k] for k in asked)

    def _batch_inputs(self) -> list[int]:
        """Inputs with a row for each sample: those that cannot stay as they are when there is one sample more."""
        others = [
            j for j, v in enumerate(self.given) if j and isinstance(v, torch.Tensor) and v.shape[:1] == (self.rows,)
        ]
        found = [0]
        for j in others:
            more = [v if i == j else _resize(v, self.rows, self.rows + 1) for i, v in enumerate(self.given)]
            found += [] if _run(self.module, more).ok else [j]
        return found

    def _fix(self) -> tuple[str, str] | None:
        """Where samples are mixed, and the change that keeps them apart, verified."""

        def attempt(changes: Sequence[Change]) -> Run:
            return _run(self.module, self.given, changes)

        search = Search(attempt, lambda after, changes: self._apart(after, changes), self.given, count(self.module))
        for candidate in _mixing(self.base):
            if made := search.verified(candidate, self.base):
                return candidate.place, f"{made.change} (verified: the samples are independent then)"
        return None

    def _suspect(self) -> str:
        """The first operation along axis 0, or one after which the rows are no longer those of the samples."""
        for operation in self.base.operations:
            came, out = operation.inputs[0] if operation.inputs else (), operation.output
            if came[:1] != (self.rows,):
                continue
            if (operation.name in _ALONG and _dim(operation) == 0) or (
                out is not None and out[:1] != (self.rows,) and out
            ):
                return where(operation.path, operation.file, operation.line, self.base)
        return ""

    def _pairs_by_broadcast(self) -> Finding | None:
        """(n, 1) beside (n,): torch makes (n, n) of it, every sample with every other, without a word."""
        n = self.rows
        for operation in self.base.operations:
            shapes = operation.inputs
            if operation.name not in ELEMENTWISE or operation.output != (n, n) or sorted(shapes) != [(n,), (n, 1)]:
                continue
            here = where(operation.path, operation.file, operation.line, self.base)
            flat = "second" if shapes[1] == (n,) else "first"
            return Finding("SHP454", "error", here, f"{shapes[0]} and {shapes[1]} are broadcast to {(n, n)}", "one row for each sample",
                           "Every sample meets every other one: numbers that do not belong together.",
                           f"Give the {flat} tensor its second axis: .unsqueeze(1).")  # fmt: skip
        return None


def _axes_of(out: torch.Tensor, rows: int, axis: int) -> list[int]:
    """Axes of an output that could hold the samples; a sequence-first module may answer with the batch first."""
    fitting = [i for i, size in enumerate(out.shape) if size == rows]
    return fitting if axis else [i for i in fitting if i == 0 or out.shape[0] != rows]


def _perturbed(tensor: torch.Tensor, axis: int, index: int) -> torch.Tensor:
    made = tensor.detach().clone()
    part = made.select(axis, index)
    if tensor.is_floating_point() or tensor.is_complex():
        part += 0.5 + torch.rand(part.shape, generator=torch.Generator().manual_seed(1)).to(part.dtype)
    elif tensor.dtype == torch.bool:
        part.logical_not_()
    else:
        part.copy_((part + 1) % max(int(tensor.max()) + 1, 2))
    return made


def _different(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if a.shape != b.shape or not (a.is_floating_point() or a.is_complex()):
        return a != b if a.shape == b.shape else torch.ones(a.shape, dtype=torch.bool)
    return (a - b).abs() > 1e-5 * (1 + a.abs().max())


def _only(different: torch.Tensor, axis: int, index: int) -> bool:
    rest = different.clone()
    rest.select(axis, index).fill_(False)
    if rest.dim() > 1 and axis == 0 and rest.shape[1] == rest.shape[0]:
        rest[:, index] = False  # every pair of samples has its number: that is what the module computes
    return not bool(rest.any())


def _dim(operation: Operation) -> int | None:
    args, kwargs = operation.arguments
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    dim = dim[0] if isinstance(dim, list | tuple) and len(dim) == 1 else dim
    return dim if isinstance(dim, int) and not isinstance(dim, bool) else None


def _sequence_first(base: Run) -> list[str]:
    layers = [
        c
        for c in base.calls
        if isinstance(c.module, _SEQUENCE_FIRST) and getattr(c.module, "batch_first", None) is False
    ]
    return list(dict.fromkeys(call.path or type(call.module).__name__ for call in layers))


def _mixing(base: Run) -> Iterator[Candidate]:
    """Where samples could have been mixed, and the operation that keeps them apart."""
    for operation in base.operations:
        at, here = (operation.path, operation.number), where(operation.path, operation.file, operation.line, base)
        if operation.name in ("softmax", "log_softmax") and _dim(operation) == 0:
            change = Change("operation", at, lambda f, a, _k: f(a[0], dim=-1))
            yield Candidate(
                f"{operation.name} over the last axis (dim=-1), not over the batch", "", (change,), place=here
            )
        for order in _orders(operation):
            change = Change("operation", at, lambda _f, a, _k, order=order: a[0].permute(order))
            kinds = f"x.permute{order} where {operation.name} stands: {operation.name} keeps the order in memory and only cuts it elsewhere"
            yield Candidate(kinds, "", (change,), place=here)
    yield from swallowed(base)
    if layers := [name for name in _sequence_first(base) if name in dict(base.module.named_modules())]:
        changes = tuple(Change("swap", name, _batch_first) for name in layers)
        yield Candidate(f"{', '.join(layers)} with batch_first=True", "", changes, place=layers[0])


def _batch_first(old: nn.Module) -> nn.Module:
    vars(old)["batch_first"] = True  # a plain attribute
    return old


def _orders(operation: Operation) -> list[tuple[int, ...]]:
    if operation.name not in ("view", "reshape") or not operation.inputs or not operation.output:
        return []
    came, out = operation.inputs[0], operation.output
    if came == out or sorted(came) != sorted(out) or len(came) > 5:
        return []
    return [order for order in permutations(range(len(came))) if tuple(came[i] for i in order) == out]


def _one_sample(module: nn.Module, given: list[Any], base: Run) -> list[Finding]:
    """SHP455: with one sample it raises, or gives other axes."""
    rows = len(given[0])
    alone = _run(module, [_resize(value, rows, 1) for value in given])
    if not alone.ok:  # an input may only happen to have as many rows
        first = _run(module, [_resize(given[0], rows, 1), *given[1:]])
        alone = first if first.ok else alone
    if alone.ok and (
        len(alone.shapes) != len(base.shapes) or [len(s) for s in alone.shapes] == [len(s) for s in base.shapes]
    ):
        return []  # as many outputs as samples: each has its own
    squeezes = [o for o in base.operations if o.name == "squeeze" and _dim(o) in (None, 0)]
    fix = _keeping_squeeze(module, [_resize(value, rows, 1) for value in given], base, squeezes)
    if not alone.ok and not fix:
        got = f"runs with {rows} samples, raises with one: {plain(alone.error)}"
        return [Finding("SHP455", "warning", type(module).__name__, got, "any number of samples",
                        "The last batch of an epoch, and inference, often have a single sample.")]  # fmt: skip
    got = f"one sample gives {_list(alone.shapes)}" if alone.ok else f"one sample raises {plain(alone.error)}"
    why = "With one sample the batch axis has length 1, and it is lost."
    if squeezes:
        why = (
            "squeeze() without a dim removes every axis of length 1, and with one sample the batch axis is one."
            if _dim(squeezes[0]) is None
            else "squeeze(0) removes the batch axis as soon as there is one sample."
        )
    return [
        Finding("SHP455", "error", fix[0] if fix else type(module).__name__, f"{rows} samples give {_list(base.shapes)}, {got}",
                "the same axes for every number of samples", why, fix[1] if fix else "", verified=bool(fix))
    ]  # fmt: skip


def _keeping_squeeze(module: nn.Module, one: list[Any], base: Run, squeezes: list[Operation]) -> tuple[str, str] | None:
    """The place, and the squeeze that leaves the batch axis alone; none where it was to remove only that."""

    def squeeze(dims: tuple[int, ...]):
        return lambda _f, a, _k: a[0].squeeze(dims) if dims else a[0]

    if not squeezes:
        return None
    dims = [tuple(i for i, size in enumerate(o.inputs[0]) if size == 1) if _dim(o) is None else () for o in squeezes]
    changes = [Change("operation", (o.path, o.number), squeeze(d)) for o, d in zip(squeezes, dims, strict=True)]
    again = _run(module, one, changes)
    if not again.ok or [len(s) for s in again.shapes] != [len(s) for s in base.shapes]:
        return None
    first = squeezes[0]
    here = where(first.path, first.file, first.line, base)
    if not dims[0]:
        return here, "Leave the squeeze out (verified with one sample)."
    named = dims[0][0] if len(dims[0]) == 1 else dims[0]
    return here, f"squeeze({named}) instead of squeeze() (verified with one sample)"


def _unbatched_pictures(base: Run) -> bool:
    """Whether a convolution took its input as a single sample."""
    convs = (call for call in base.calls if isinstance(call.module, CONVS) and call.inputs)
    return any(len(call.inputs[0]) == len(call.module.kernel_size) + 1 for call in convs)  # pyright: ignore[reportArgumentType]


def _channels_for_samples(inputs: Sequence[Any], base: Run) -> list[Finding]:
    """SHP456 behind a convolution: (c, h, w) of one picture becomes (c, h*w), and the channels pass for the samples."""
    for operation in base.operations:
        came, out = operation.inputs[0] if operation.inputs else (), operation.output
        if operation.name in RESHAPES and len(came) == 3 and out == (came[0], prod(came[1:])) and came[0] > 1:
            here = where(operation.path, operation.file, operation.line, base)
            return [_picture_without_batch(here, tuple(inputs[0].shape), came, (came[0], prod(came[1:])))]
    return []


def _flattened_picture(module: nn.Module, inputs: Sequence[Any]) -> list[Finding]:
    """SHP456: a picture (channels, height, width) is flattened from axis 1, its channels taken for the samples."""
    shape = tuple(inputs[0].shape)
    if len(shape) != 3 or shape[0] not in (1, 3) or min(shape[1:]) < 8 or not inputs[0].is_floating_point():
        return []
    base = _run(module, inputs)
    first = next((o for o in base.operations if o.inputs and o.inputs[0] == shape), None)
    merged = (shape[0], shape[1] * shape[2])
    if first is None or first.name not in RESHAPES or first.output != merged:
        return []
    more = _run(module, [_resize(value, shape[0], 5) for value in inputs])
    if not more.ok or not more.shapes or more.shapes[0][:1] != (5,):
        return []
    return [_picture_without_batch(where(first.path, first.file, first.line, base), shape, shape, merged)]


def _picture_without_batch(
    here: str, shape: tuple[int, ...], came: tuple[int, ...], merged: tuple[int, int]
) -> Finding:
    return Finding(
        "SHP456", "warning", here, f"{came} becomes {merged}: axis 0 is taken for the samples",
        f"(batch, {shape[0]}, {shape[1]}, {shape[2]})",
        f"If the input {shape} is one picture (channels, height, width), its {came[0]} channel{'s pass' if came[0] > 1 else ' passes'} "
        f"for the batch: it runs, and gives {merged[0]} answer{'s' * (merged[0] > 1)}, one for each channel.",
        "x.unsqueeze(0) makes a batch of one picture; flatten(1) then merges channels, height and width.",
    )  # fmt: skip


def _list(shapes: Sequence[tuple[int, ...]]) -> str:
    return ", ".join(map(str, shapes))
