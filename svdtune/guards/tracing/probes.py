"""Probes on real numbers: does a sample's answer depend on its neighbours, and does a batch of one keep its axes?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import permutations
from typing import Any

import torch
from torch import nn

from svdtune.guards.calls import tensors_in
from svdtune.guards.findings import Finding
from svdtune.guards.tracing.repairs import Candidate, swallowed
from svdtune.guards.tracing.running import Change, Operation, Run, run
from svdtune.guards.tracing.text import plain, where

_RESHAPES = ("view", "reshape", "flatten")
_SEQUENCE_FIRST = (nn.RNNBase, nn.MultiheadAttention)


def probe(module: nn.Module, inputs: Sequence[Any]) -> tuple[list[Finding], list[str]]:
    """SHP454, SHP455 and SHP456 for a module that runs on these real inputs."""
    given = _at_least_two(inputs)
    if given is None:
        return [], ["batch probes skipped: the first input has no batch axis"]
    base = _run(module, given)
    if not base.ok:
        return [], [f"batch probes skipped: in eval mode with {len(given[0])} samples it raises {plain(base.error)}"]  # pyright: ignore[reportArgumentType]
    outputs = tensors_in(base.outputs)
    if not outputs or outputs[0].numel() == 1 or not _numbers(outputs[0]):
        return [], ["batch probes skipped: the output is one number for the whole batch, or none"]
    if _unbatched_pictures(base):
        return [], ["batch probes skipped: a convolution is given one picture without a batch axis"]
    findings = _independence(module, given, base) + _one_sample(module, given, base)
    return findings + ([] if findings else _unbatched(module, inputs)), []


def _unbatched_pictures(base: Run) -> bool:
    """Whether a convolution took its input as a single sample."""
    axes = {nn.Conv1d: 3, nn.Conv2d: 4, nn.Conv3d: 5}
    return any(
        isinstance(call.module, kind) and call.inputs and len(call.inputs[0]) < count
        for call in base.calls for kind, count in axes.items()
    )  # fmt: skip


def _run(module: nn.Module, inputs: Sequence[Any], changes: Sequence[Change] = ()) -> Run:
    return run(module, inputs, changes, fake=False, evaluate=True, backward=False)


def _numbers(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and bool(torch.isfinite(tensor).all())


def _at_least_two(inputs: Sequence[Any]) -> list[Any] | None:
    first = inputs[0] if inputs else None
    if not isinstance(first, torch.Tensor) or first.dim() < 1 or not len(first):
        return None
    if len(first) > 1:
        return list(inputs)
    return [_resize(value, 1, 2) for value in inputs]


def _resize(value: Any, rows: int, wanted: int) -> Any:
    """Tensors with `rows` rows get `wanted`; what is shared by all samples stays."""
    if not isinstance(value, torch.Tensor) or value.dim() < 1 or len(value) != rows:
        return value
    return value[torch.arange(wanted) % rows].detach().clone()


def _independence(module: nn.Module, given: list[Any], base: Run) -> list[Finding]:
    if _mixes_by_design(module) or not _depends(module, given, base) or _independent(module, given, base):
        return []
    fix = _first_fix(module, given, _mixing(base))
    rows, out = len(given[0]), base.shapes[0]
    if out[0] == rows:
        got = f"changing one of {rows} samples changes the outputs of others"
        why = "Samples leak into each other: the loss of one depends on which others are in its batch."
    elif _trailing_kept(base, rows):
        return []
    else:
        got = f"{rows} samples go in, the output {out} has no row for each of them"
        why = "An operation has merged the batch axis with others, or has put samples together."
    return [
        Finding("SHP454", "error" if fix else "warning", fix[0] if fix else type(module).__name__, got,
                "output i depends on sample i alone", why, fix[1] if fix else "")
    ]  # fmt: skip


def _mixes_by_design(module: nn.Module) -> bool:
    norms = (m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    return any(not norm.track_running_stats for norm in norms)


def _independent(module: nn.Module, given: list[Any], base: Run, changes: Sequence[Change] = ()) -> bool:
    """Some axis of the output belongs to axis 0 of the input, or (sequence first) to axis 1."""
    axes = [0] + ([1] if given[0].dim() > 2 else [])
    return any(_follows(module, given, base, changes, axis) for axis in axes)


def _depends(module: nn.Module, given: list[Any], base: Run) -> bool:
    """Whether the output depends on the first input at all; a parameter given back does not."""
    changed = _run(module, [_perturbed(given[0], 0, 0), *given[1:]])
    return changed.ok and bool(_different(tensors_in(base.outputs)[0], tensors_in(changed.outputs)[0]).any())


def _follows(module: nn.Module, given: list[Any], base: Run, changes: Sequence[Change], axis: int) -> bool:
    rows, out = given[0].shape[axis], tensors_in(base.outputs)[0]
    fitting = [i for i, size in enumerate(out.shape) if size == rows]
    # A sequence-first module may answer with the batch first.
    fitting = fitting if axis else [i for i in fitting if i == 0 or out.shape[0] != rows]
    if rows < 2 or not fitting:
        return False
    for index in (0, rows - 1):
        changed = _run(module, [_perturbed(given[0], axis, index), *given[1:]], changes)
        if not changed.ok:
            return False
        different = _different(out, tensors_in(changed.outputs)[0])
        fitting = [i for i in fitting if _only(different, i, index)]
    return bool(fitting)


def _perturbed(tensor: torch.Tensor, axis: int, index: int) -> torch.Tensor:
    made = tensor.detach().clone()
    part = made.select(axis, index)
    if tensor.is_floating_point():
        part += 0.5 + torch.rand(part.shape, generator=torch.Generator().manual_seed(1)).to(part.dtype)
    elif tensor.dtype == torch.bool:
        part.logical_not_()
    else:
        part.copy_((part + 1) % max(int(tensor.max()) + 1, 2))
    return made


def _different(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a - b).abs() > 1e-5 * (1 + a.abs().max())


def _only(different: torch.Tensor, axis: int, index: int) -> bool:
    rest = different.clone()
    rest.select(axis, index).fill_(False)
    if rest.dim() > 1 and axis == 0 and rest.shape[1] == rest.shape[0]:
        rest[:, index] = False  # every pair of samples has its number: that is what the module computes
    return not bool(rest.any())


def _trailing_kept(base: Run, rows: int) -> bool:
    """Frames or tokens folded into the batch, their other axes as before: (b, t, ...) -> (b*t, ...)."""
    out = base.shapes[0]
    if not out or out[0] % rows:
        return False
    folds = [o for o in base.operations if o.name in _RESHAPES and o.inputs and o.output and len(o.inputs[0]) > 1]
    return any(o.output[0] == math.prod(o.inputs[0][:2]) and o.output[1:] == o.inputs[0][2:] for o in folds if o.output)


def _mixing(base: Run) -> Iterator[tuple[str, Candidate]]:
    """Where samples could have been mixed, and the operation that keeps them apart."""
    for operation in base.operations:
        at, here = (operation.path, operation.number), where(operation.path, operation.file, operation.line, base)
        if operation.name in ("softmax", "log_softmax"):
            change = Change("operation", at, lambda f, a, _k: f(a[0], dim=-1))
            yield here, Candidate(f"{operation.name} over the last axis (dim=-1), not over the batch", "", (change,))
        for order in _orders(operation):
            change = Change("operation", at, lambda _f, a, _k, order=order: a[0].permute(order))
            kinds = f"x.permute{order} where {operation.name} stands: {operation.name} keeps the order in memory and only cuts it elsewhere"
            yield here, Candidate(kinds, "", (change,))
    for candidate in swallowed(base):
        yield candidate.changes[0].at[0] or type(base.module).__name__, candidate
    for call in base.calls:
        if (
            call.path
            and getattr(call.module, "batch_first", None) is False
            and isinstance(call.module, _SEQUENCE_FIRST)
        ):
            yield (
                call.path,
                Candidate(f"{call.path} with batch_first=True", "", (Change("swap", call.path, _batch_first),)),
            )


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


def _first_fix(module: nn.Module, given: list[Any], tried: Iterator[tuple[str, Candidate]]) -> tuple[str, str] | None:
    for place, candidate in tried:
        again = _run(module, given, candidate.changes)
        if again.ok and again.shapes and _independent(module, given, again, candidate.changes):
            return place, f"{candidate.change} (verified: the samples are independent then)"
    return None


def _one_sample(module: nn.Module, given: list[Any], base: Run) -> list[Finding]:
    one = [_resize(value, len(given[0]), 1) for value in given]
    alone = _run(module, one)
    if alone.ok and [len(s) for s in alone.shapes] == [len(s) for s in base.shapes]:
        return []
    squeezes = [o for o in base.operations if o.name == "squeeze" and len(o.arguments[0]) == 1 and not o.arguments[1]]
    fix = _keeping_squeeze(module, one, base, squeezes)
    if not alone.ok and not fix:
        got = f"runs with {len(given[0])} samples, raises with one: {plain(alone.error)}"  # pyright: ignore[reportArgumentType]
        return [Finding("SHP455", "warning", type(module).__name__, got, "any number of samples",
                        "The last batch of an epoch, and inference, often have a single sample.")]  # fmt: skip
    got = f"one sample gives {_list(alone.shapes)}" if alone.ok else "one sample raises " + plain(alone.error)  # pyright: ignore[reportArgumentType]
    return [
        Finding("SHP455", "error", fix[0] if fix else type(module).__name__, f"{len(given[0])} samples give {_list(base.shapes)}, {got}",
                "the same axes for every number of samples",
                "squeeze() without a dim removes every axis of length 1, and with one sample the batch axis is one.", fix[1] if fix else "")
    ]  # fmt: skip


def _keeping_squeeze(module: nn.Module, one: list[Any], base: Run, squeezes: list[Operation]) -> tuple[str, str] | None:
    def squeeze(dims: tuple[int, ...]):
        return lambda _f, a, _k: a[0].squeeze(dims)

    if not squeezes:
        return None
    dims = [tuple(i for i, size in enumerate(o.inputs[0]) if size == 1) for o in squeezes]
    changes = [Change("operation", (o.path, o.number), squeeze(d)) for o, d in zip(squeezes, dims, strict=True)]
    again = _run(module, one, changes)
    if not again.ok or [len(s) for s in again.shapes] != [len(s) for s in base.shapes]:
        return None
    first = squeezes[0]
    named = dims[0][0] if len(dims[0]) == 1 else dims[0]
    return where(
        first.path, first.file, first.line, base
    ), f"squeeze({named}) instead of squeeze() (verified with one sample)"


def _unbatched(module: nn.Module, inputs: Sequence[Any]) -> list[Finding]:
    """SHP456: a picture (channels, height, width) whose channels are taken for the samples."""
    shape = tuple(inputs[0].shape)
    if len(shape) != 3 or shape[0] not in (1, 3) or min(shape[1:]) < 8 or not inputs[0].is_floating_point():
        return []
    base = _run(module, inputs)
    first = next((o for o in base.operations if o.inputs and o.inputs[0] == shape), None)
    merged = (shape[0], shape[1] * shape[2])
    if first is None or first.name not in _RESHAPES or first.output != merged:
        return []
    more = _run(module, [_resize(value, shape[0], 5) for value in inputs])
    if not more.ok or not more.shapes or more.shapes[0][:1] != (5,):
        return []
    return [
        Finding(
            "SHP456", "warning", where(first.path, first.file, first.line, base),
            f"the input {shape} becomes {merged}: axis 0 is taken for the samples",
            f"(batch, {shape[0]}, {shape[1]}, {shape[2]}), or (batch, {shape[1]}, {shape[2]})",
            f"If this is one picture (channels, height, width), its {shape[0]} channel{'s pass' if shape[0] > 1 else ' passes'} for the "
            f"batch: it runs, and with 5 instead of {shape[0]} it gives 5 answers.",
            "x.unsqueeze(0) makes a batch of one picture; flatten(1) then merges channels, height and width.",
        )
    ]  # fmt: skip


def _list(shapes: Sequence[tuple[int, ...]]) -> str:
    return ", ".join(map(str, shapes))
