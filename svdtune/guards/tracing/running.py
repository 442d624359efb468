"""Run a copy of any module, changed or not, on fake or real tensors, and keep what every layer and operation was given."""

from __future__ import annotations

import logging
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from svdtune.guards.calls import Call, record_calls, tensors_in
from svdtune.guards.tracing.copying import twin_of

_TORCH = str(Path(torch.__file__).parent)
_OURS = str(Path(__file__).parents[1])


@dataclass(frozen=True)
class Change:
    """One edit of a traced module."""

    kind: Literal["swap", "before", "after", "operation", "input"]
    """Another module in its place, something before or after a module, another operation in a forward, another input."""
    at: Any
    """Module path; (module path, number of the operation in it); index of the input."""
    make: Callable[..., Any]
    """swap: old module -> new one. before, after: -> callable on the tensor. operation: (func, args, kwargs) -> result.
    input: tensor -> tensor."""


@dataclass
class Operation:
    """One torch function called by a module's own forward."""

    path: str
    number: int
    """How manieth operation of that module path."""
    name: str
    func: Any
    arguments: tuple[Any, ...]
    file: str
    line: int
    outputs: Any = None

    @property
    def inputs(self) -> list[tuple[int, ...]]:
        """Shapes of the tensors it was given."""
        return [tuple(t.shape) for t in tensors_in(self.arguments)]

    @property
    def output(self) -> tuple[int, ...] | None:
        """Shape of its first tensor; None when it raised or gave none."""
        found = tensors_in(self.outputs)
        return tuple(found[0].shape) if found else None


@dataclass
class Run:
    """What one run showed."""

    module: nn.Module
    calls: list[Call]
    operations: list[Operation]
    outputs: Any = None
    error: Exception | None = None
    stage: Literal["change", "forward", "backward", ""] = ""
    fake: bool = False
    anomaly: str = ""
    """torch's traceback of the forward operation whose backward failed."""
    reached: list[Call] = field(default_factory=list)
    """Calls whose outputs got their gradient, in that order."""
    parameters: int = 0

    @property
    def ok(self) -> bool:
        """Nothing was raised."""
        return self.error is None

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the tensors in the output."""
        return tuple(tuple(t.shape) for t in tensors_in(self.outputs))


def run(
    module: nn.Module,
    inputs: Sequence[Any],
    changes: Sequence[Change] = (),
    *,
    fake: bool = True,
    evaluate: bool = False,
    backward: bool = True,
) -> Run:
    """A copy of `module` with `changes`, forward and backward; `module` itself and the random state stay as they are."""
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext()
    with _quiet(), torch.random.fork_rng(devices=[]), mode, torch.enable_grad():
        torch.manual_seed(0)
        copied = twin_of(module, fake=fake)
        if evaluate:
            copied.eval()
        given = list(twin_of(tuple(inputs), fake=fake))
        try:
            added = _apply(copied, given, changes)
        except Exception as error:  # a change that this module cannot take
            return Run(copied, [], [], error=error, stage="change", fake=fake)
        return _run(copied, given, changes, added, backward=backward, fake=fake)


def count(module: nn.Module) -> int:
    """Parameters, shared ones once; those of lazy layers are not known yet."""
    return sum(p.numel() for p in module.parameters() if not is_lazy(p))


def materialized(module: nn.Module, inputs: Sequence[Any]) -> nn.Module:
    """The module itself, or a copy whose lazy layers know their sizes (as far as it runs)."""
    if not any(is_lazy(p) for p in module.parameters()):
        return module
    made = twin_of(module, fake=False)
    with torch.random.fork_rng(devices=[]), torch.no_grad(), suppress(Exception):  # a failure shows again in the trace
        made(*twin_of(tuple(inputs), fake=False))
    return made


def innermost(the_run: Run) -> Call | None:
    """The module whose forward was running when it failed."""
    stack = [call for call in the_run.calls if not call.done]
    return stack[-1] if stack else None


def source_of(error: Exception) -> tuple[str, int]:
    """File and line of the user's source that raised; ("", 0) when none of it was running."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if is_users(f.filename)]
    own = [f for f in frames if "site-packages" not in f.filename] or frames
    return (own[-1].filename, own[-1].lineno or 0) if own else ("", 0)


def is_users(file: str) -> bool:
    """Neither torch nor svdtune's guards nor Python's own."""
    return not file.startswith((_TORCH, _OURS, "<")) and "/lib/python" not in file.replace("/site-packages", "@")


def _run(
    copied: nn.Module, given: list[Any], changes: Sequence[Change], added: list[Any], *, backward: bool, fake: bool
) -> Run:
    with record_calls(copied) as calls:
        watch = _Operations(calls, {c.at: c.make for c in changes if c.kind == "operation"})
        result = Run(copied, calls, watch.seen, fake=fake)
        try:
            with watch:
                result.outputs = copied(*given)
        except Exception as error:  # the failure that the trace is about
            result.error, result.stage = error, "forward"
        except SystemExit as stop:
            result.error, result.stage = RuntimeError(f"sys.exit({stop.code!r}) was called"), "forward"
    result.parameters = count(copied) + sum(count(m) for m in added if isinstance(m, nn.Module))
    if result.ok and backward:
        _backward(result)
    return result


def _backward(result: Run) -> None:
    loss = total(result.outputs)
    if loss is None:
        return
    for call in result.calls:
        for tensor in tensors_in(call.outputs):
            if tensor.requires_grad:
                tensor.register_hook(lambda _grad, call=call: result.reached.append(call))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            loss.backward()
        except Exception as error:  # the failure that the trace is about
            result.error, result.stage = error, "backward"
    result.anomaly = next((str(w.message) for w in caught if "forward call" in str(w.message)), "")


def total(outputs: Any) -> torch.Tensor | None:
    """Sum of all numbers that a gradient can flow from; None when there are none."""
    parts = [t.abs().sum() if t.is_complex() else t.sum() for t in tensors_in(outputs) if t.requires_grad]
    return torch.stack([part.float() for part in parts]).sum() if parts else None


class _Operations(TorchFunctionMode):
    """Every torch function that a forward of a module calls, with its line of source."""

    def __init__(self, calls: list[Call], replaced: dict[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self.seen: list[Operation] = []
        self._calls = calls
        self._replaced = replaced
        self._numbers: dict[str, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if name in ("__get__", "size", "dim", "stride", "numel", "__len__", "is_floating_point", "requires_grad_"):
            return func(*args, **kwargs)
        path = next((call.path for call in reversed(self._calls) if not call.done), "")
        number = self._numbers[path] = self._numbers.get(path, -1) + 1
        operation = Operation(path, number, name, func, (args, kwargs), *_users_line())
        self.seen.append(operation)
        replacement = self._replaced.get((path, number))
        made = replacement(func, args, kwargs) if replacement else func(*args, **kwargs)
        operation.outputs = made
        return made


def _users_line() -> tuple[str, int]:
    frame = sys._getframe(2)
    first: tuple[str, int] = ("", 0)
    while frame is not None:
        file = frame.f_code.co_filename
        if is_users(file):
            first = first if first[1] else (file, frame.f_lineno)
            if "site-packages" not in file:
                return file, frame.f_lineno
        frame = frame.f_back
    return first


def _apply(copied: nn.Module, given: list[Any], changes: Sequence[Change]) -> list[Any]:
    """Make the changes that are not made while running; returns what stands before or after modules."""
    added = []
    for change in changes:
        if change.kind == "input":
            given[change.at] = change.make(given[change.at])
        elif change.kind == "swap":
            parent, _, name = change.at.rpartition(".")
            holder = copied.get_submodule(parent)
            setattr(holder, name, change.make(holder.get_submodule(name)).train(copied.training))
        elif change.kind in ("before", "after"):
            made = change.make()
            added.append(made)
            target = copied.get_submodule(change.at)
            if change.kind == "before":
                target.register_forward_pre_hook(_pre_hook(made), with_kwargs=True)
            else:
                target.register_forward_hook(_post_hook(made))
    return added


def _pre_hook(made: Callable[[torch.Tensor], torch.Tensor]):
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # What is added must not be counted among the operations of the module around it.
        with torch._C.DisableTorchFunction():
            if args:
                return (made(args[0]), *args[1:]), kwargs
            first = next(iter(kwargs))
            return args, {**kwargs, first: made(kwargs[first])}

    return hook


def _post_hook(made: Callable[[torch.Tensor], torch.Tensor]):
    def hook(_module: nn.Module, _args: Any, outputs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            if isinstance(outputs, tuple | list):
                return (made(outputs[0]), *outputs[1:])
            return made(outputs) if isinstance(outputs, torch.Tensor) else outputs

    return hook


@contextmanager
def _quiet() -> Iterator[None]:
    """Warnings of the user's code and torch's log lines about failed fake operators are not findings."""
    with ExitStack() as undo:
        undo.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        undo.enter_context(torch.autograd.set_detect_anomaly(True, check_nan=False))
        for name in ("torch._subclasses.fake_tensor", "torch._subclasses.fake_utils", "torch._subclasses"):
            logger = logging.getLogger(name)
            undo.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)
        yield
