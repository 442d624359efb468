"""`svdtune trace`: any nn.Module layer by layer, where it fails, and which changes make it run."""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from svdtune.errors import UsageError
from svdtune.guards.calls import Call, tensors_in
from svdtune.guards.findings import Finding
from svdtune.guards.tracing.layers import features
from svdtune.guards.tracing.likeness import unlike
from svdtune.guards.tracing.probes import probe
from svdtune.guards.tracing.records import Failure, Layer, TraceReport
from svdtune.guards.tracing.repairs import remedies
from svdtune.guards.tracing.running import Run, count, innermost, is_users, materialized, run, source_of, total
from svdtune.guards.tracing.target import SMALL, load_target
from svdtune.guards.tracing.text import changer, origin, plain, where

_MOST_NUMBERS = 100_000_000
"""Activations up to which a module is also run on real numbers."""


def trace(
    module: nn.Module | type[nn.Module], *inputs: Any, like: Sequence[int] | torch.Tensor | None = None
) -> TraceReport:
    """Run a copy of `module` on `inputs`, forward and backward: layers, failure, verified remedies, findings.

    `like` is what the output should equal, as a tensor or a shape. The module, its weights and the random state stay as they are.
    """
    made = module() if inspect.isclass(module) else module
    made = getattr(made, "_orig_mod", made)  # what torch.compile wrapped
    if not isinstance(made, nn.Module):
        raise UsageError(f"trace needs an nn.Module, got {type(made).__name__}")
    if isinstance(made, torch.jit.ScriptModule):
        raise UsageError("trace cannot look into a ScriptModule; give the nn.Module that it was made from")
    with redirect_stdout(sys.stderr):
        return _trace(made, inputs, tuple(like.shape) if isinstance(like, torch.Tensor) else tuple(like or ()))


def trace_file(spec: str, inputs: Sequence[str], like: str | None = None, arguments: str = "{}") -> TraceReport:
    """`FILE.py:Name` on inputs of the shapes `2,1,28,28` or `int64:2,16`. Raises UsageError for what cannot be read."""
    target = load_target(spec, arguments)
    if not inputs:
        raise UsageError("--input: give the shape of each input, as in --input 2,1,28,28")
    made = [parse_input(text, target.module) for text in inputs]
    report = trace(target.module, *made, like=_shape("--like", like) if like else None)
    return replace(report, notes=(*target.notes, *report.notes))


def parse_input(text: str, module: nn.Module) -> torch.Tensor:
    """A tensor for `[DTYPE:]SIZE,SIZE,...`; integers stay below the smallest embedding of `module`."""
    kind, _, sizes = text.rpartition(":")
    shape, dtype = _shape("--input", sizes), getattr(torch, kind or "float32", None)
    if not isinstance(dtype, torch.dtype):
        raise UsageError(f"--input {text}: {kind} is no dtype of torch; expected as in int64:2,16")
    if math.prod(shape) > _MOST_NUMBERS:
        raise UsageError(
            f"--input {text}: {math.prod(shape):,} numbers; sizes up to {_MOST_NUMBERS:,} in all show the same shapes"
        )
    generator = torch.Generator().manual_seed(0)
    if dtype == torch.bool:
        return torch.ones(shape, dtype=dtype)
    if not dtype.is_floating_point and not dtype.is_complex:
        highest = min([m.num_embeddings for m in module.modules() if isinstance(m, nn.Embedding)], default=2)
        return torch.randint(0, max(highest, 1), shape, generator=generator).to(dtype)
    return torch.randn(shape, generator=generator).to(dtype)


def _shape(option: str, text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\s*\d+(\s*,\s*\d+)*\s*,?\s*", text):
        raise UsageError(f"{option} {text}: expected sizes with commas between them, as in 2,1,28,28")
    return tuple(int(part) for part in text.split(",") if part.strip())


def _trace(module: nn.Module, inputs: Sequence[Any], like: tuple[int, ...]) -> TraceReport:
    module = materialized(module, inputs)
    on_shapes = run(module, inputs)
    reason = _too_large(module, inputs, on_shapes)
    done = on_shapes if reason else run(module, inputs, fake=False)
    name, notes = type(module).__name__, []
    if reason:
        notes.append(f"run on shapes alone, batch probes skipped: {reason}")
    if not done.ok and _unknowable(done.error):
        notes.append(f"cannot be followed on shapes alone: {plain(done.error)}")
        return TraceReport(name, _layers(done), done.shapes, notes=tuple(notes))
    if not done.ok:
        return _failed(module, inputs, done, on_shapes, notes)
    findings = _no_gradient(done)
    wrong, mended = unlike(module, inputs, done, like) if like else ([], [])
    if not reason:
        found, said = probe(module, inputs)
        findings, notes = findings + found, notes + said
    return TraceReport(name, _layers(done), done.shapes, None, tuple(mended), tuple(wrong + findings), tuple(notes))


def _too_large(module: nn.Module, inputs: Sequence[Any], on_shapes: Run) -> str:
    parameters = count(module)
    if any(p.is_meta for p in module.parameters()) or parameters >= SMALL:
        return f"{parameters:,} parameters (the limit is {SMALL:,})"
    numbers = sum(t.numel() for call in on_shapes.calls for t in tensors_in(call.outputs))
    numbers += sum(t.numel() for t in tensors_in(tuple(inputs)))
    return f"{numbers:,} activations (the limit is {_MOST_NUMBERS:,})" if numbers > _MOST_NUMBERS else ""


def _unknowable(error: Exception | None) -> bool:
    """Fake tensors have no values and some operators no rule: that says nothing about the module."""
    return type(error).__module__.startswith("torch._subclasses") or "for tensor subclasses" in str(error)


def _layers(done: Run) -> tuple[Layer, ...]:
    blamed = innermost(done) if done.stage == "forward" else None
    return tuple(
        Layer(call.path or type(call.module).__name__, type(call.module).__name__, tuple(call.inputs), tuple(call.output_shapes),
              count(call.module), call is blamed)
        for call in done.calls
    )  # fmt: skip


def _failed(module: nn.Module, inputs: Sequence[Any], done: Run, on_shapes: Run, notes: list[str]) -> TraceReport:
    assert done.error is not None
    failure = _backward(done) if done.stage == "backward" else _forward(done)
    # The operations of a fake run are those of the real one, unless values decide.
    mended = [] if _unknowable(on_shapes.error) else remedies(module, inputs, done)
    code = "SHP451" if done.stage == "backward" else "SHP450"
    at = f"{failure.module} ({failure.type}){f', {failure.source}' if failure.source else ''}"
    why = f"{failure.message}. {failure.why}".strip()
    fix = mended[0].change if mended else ""
    finding = Finding(code, "error", at, failure.got, failure.expected, why, fix, verified=bool(mended))
    return TraceReport(type(module).__name__, _layers(done), (), failure, tuple(mended), (finding,), tuple(notes))


def _forward(done: Run) -> Failure:
    assert done.error is not None
    call = innermost(done) or Call("", done.module, (), {})
    file, line = source_of(done.error)
    # Inside a layer of torch the line above it only says who called.
    own = is_users(inspect.getsourcefile(type(call.module)) or "") if _has_source(call.module) else True
    source = f"{Path(file).name}:{line}" if line else ""
    got, expected, why = _expectation(call, done)
    if own and not expected:
        operation = done.operations[-1] if done.operations else None
        shapes = ", ".join(map(str, operation.inputs)) if operation and operation.outputs is None else ""
        if shapes and operation is not None:
            got = f"{operation.name} on {shapes}"
            why = f"The failing operation is in its own forward: {where(call.path, file, line, done)}."
    return Failure("forward", call.path or type(done.module).__name__, type(call.module).__name__, source, plain(done.error), got,
                   expected, why)  # fmt: skip


def _has_source(module: nn.Module) -> bool:
    try:
        return bool(inspect.getsourcefile(type(module)))
    except TypeError:  # a class made by exec
        return False


def _expectation(call: Call, done: Run) -> tuple[str, str, str]:
    shapes = ", ".join(map(str, call.inputs)) or "no tensors"
    if isinstance(call.module, nn.Embedding):
        return _looked_up(call, call.module.num_embeddings, shapes)
    fixed = features(call.module)
    if fixed is None or not call.inputs or not -len(call.inputs[0]) <= fixed.axis < len(call.inputs[0]):
        return f"input {shapes}", "", ""
    came = call.inputs[0][fixed.axis]
    if came == fixed.size:
        return f"input {shapes}", "", ""
    axis = fixed.axis if fixed.axis == -1 else fixed.axis % len(call.inputs[0])
    why = f"{origin(came, fixed.size, done)} {changer(call, done, came, fixed.size)}".strip()
    return f"input {shapes}: {came} at axis {axis}", f"{fixed.keyword}={fixed.size}: {fixed.size} at axis {axis}", why


def _looked_up(call: Call, rows: int, shapes: str) -> tuple[str, str, str]:
    """What an embedding was asked for."""
    given, expected = tensors_in(call.arguments), f"whole numbers from 0 to {rows - 1} (num_embeddings={rows})"
    if not given or not given[0].numel() or isinstance(given[0], FakeTensor) or given[0].is_floating_point():
        return f"input {shapes}" + (f" of {given[0].dtype}" if given else ""), expected, ""
    return f"input {shapes} with numbers from {int(given[0].min())} to {int(given[0].max())}", expected, ""


def _backward(done: Run) -> Failure:
    assert done.error is not None
    frames = [(file, int(line)) for file, line in re.findall(r'File "([^"]+)", line (\d+), in ', done.anomaly)]
    users = [frame for frame in frames if is_users(frame[0])]
    file, line = users[-1] if users else ("", 0)
    call = _owner(done, frames)
    path, kind = call.path, type(call.module).__name__
    name = path or type(done.module).__name__
    message = plain(done.error)
    own = _holds(call.module, file, line) or not type(call.module).__module__.startswith("torch.")
    why = f"The operation whose backward fails is in {where(path, file, line, done) if own else name}." if line else ""
    if "inplace operation" in message:
        why += " Its result, or what it was given, was overwritten in place before the backward pass could use it."
    source = f"{Path(file).name}:{line}" if line else ""
    return Failure(
        "backward",
        name,
        kind,
        source,
        message,
        "forward runs, backward raises",
        "a gradient for every layer",
        why.strip(),
    )


def _owner(done: Run, frames: list[tuple[str, int]]) -> Call:
    """The innermost call whose forward holds one of the lines; of equal ones the last that a gradient came to."""
    for file, line in reversed(frames):
        held = [call for call in done.calls if _holds(call.module, file, line)]
        if held:
            return next((call for call in reversed(done.reached) if any(call is one for one in held)), held[-1])
    return done.reached[-1] if done.reached else done.calls[0]


def _holds(module: nn.Module, file: str, line: int) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    if code is None or code.co_filename != file:
        return False
    return code.co_firstlineno <= line <= max((number for *_, number in code.co_lines() if number), default=0)


def _no_gradient(done: Run) -> list[Finding]:
    """SHP452: nothing that leaves the module can be learned from, or a layer that ran gets no gradient."""
    trained = [name for name, p in done.module.named_parameters() if p.requires_grad]
    made = tensors_in(done.outputs)
    if not trained:
        return []
    if not made:
        return [Finding("SHP452", "error", type(done.module).__name__, f"forward returns {type(done.outputs).__name__}", "tensors",
                        "There is nothing to make a loss of.", "Return the result: mostly the return is forgotten.")]  # fmt: skip
    return _cut_off(done) if total(done.outputs) is not None else [_all_cut(done, made)]


def _all_cut(done: Run, made: list[torch.Tensor]) -> Finding:
    last = next((c for c in reversed(done.calls) if any(t.requires_grad for t in tensors_in(c.outputs))), None)
    cut = next((o for o in done.operations if _cuts(o)), None)
    at = where(cut.path, cut.file, cut.line, done) if cut else type(done.module).__name__
    where_last = f"the last output with a gradient is that of {last.path}" if last else "no layer's output has one"
    kind = f"after {cut.name} nothing requires a gradient" if cut else "the output has no way back to the parameters"
    numbers = made[0].is_floating_point() or made[0].is_complex()
    return Finding(
        "SHP452", "error" if numbers else "warning", at, f"{kind}: {where_last}" if numbers else f"the output is {made[0].dtype}",
        "an output that requires grad",
        "loss.backward() raises \"element 0 of tensors does not require grad and does not have a grad_fn\".",
        "Return the tensor before it is detached, and leave torch.no_grad to the code that only infers." if numbers
        else "For training return the numbers from which it is made.",
    )  # fmt: skip


def _cut_off(done: Run) -> list[Finding]:
    """Layers that gave something with a gradient, of which none came back."""
    lost = [call for call in done.calls if _learns_nothing(call)]
    names = list(dict.fromkeys(call.path or type(call.module).__name__ for call in lost))
    if not names:
        return []
    cut = next((o for o in done.operations if _cuts(o)), None)
    at = where(cut.path, cut.file, cut.line, done) if cut else names[0]
    return [
        Finding(
            "SHP452", "warning", at, f"no gradient reaches {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}",
            "a gradient for each layer that ran", "What these layers give is detached, or has no part in what the module returns: they "
            "would stay as they are, and DDP would wait for their gradients.",
            "Take the detach or no_grad away, or freeze them with requires_grad_(False) where that is meant.",
        )
    ]  # fmt: skip


def _learns_nothing(call: Call) -> bool:
    own = [parameter for parameter in call.module.parameters(recurse=False) if parameter.requires_grad]
    gave = any(tensor.requires_grad for tensor in tensors_in(call.outputs))
    return gave and bool(own) and all(parameter.grad is None for parameter in own)


def _cuts(operation: Any) -> bool:
    given, made = tensors_in(operation.arguments), tensors_in(operation.outputs)
    return any(t.requires_grad for t in given) and bool(made) and not any(t.requires_grad for t in made)
