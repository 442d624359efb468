"""What a step on fake tensors allocates and computes: every storage with its birth and death, and each phase's peak and cost."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from svdtune.guards.plan_ops import H100, Card, Cost, cost_of, cpu_workspaces, tensors, workspaces

ASKS_DEVICE = torch.ops.prim.device.default
"""Autograd and autocast ask it of every fake tensor, twice as often as they compute: answered at once, it costs nothing."""
BLOCK = 512
"""The allocator rounds every size up to a multiple of it."""


@dataclass(frozen=True)
class Peak:
    """The most bytes alive in a phase, and what was running then."""

    bytes: int = 0
    where: str = ""


@dataclass(frozen=True)
class Record:
    """What was seen."""

    events: Sequence[tuple[int, int]]
    """(storage, bytes) for a birth and (storage, 0) for a death, in their order, as an allocator sees them; storages count from 1."""
    peaks: Mapping[str, Peak]
    """By phase."""
    costs: Mapping[str, Cost]


class Recorder(TorchDispatchMode):
    """Follows every storage that operators make; `phase` names what is going on, backward passes aside, and is set by the caller.

    A module that runs inside a backward pass is being recomputed.
    """

    def __init__(self, networks: Mapping[str, nn.Module] = {}, *, gpu: bool = True, card: Card = H100) -> None:
        super().__init__()
        self.card, self.phase, self.live = card, "", 0
        self._private = workspaces if gpu else cpu_workspaces
        self.events: list[tuple[int, int]] = []
        self.peaks: dict[str, Peak] = {}
        self.costs: dict[str, Cost] = {}
        self._seen: dict[int, weakref.ref[Any]] = {}
        self._made = 0
        self._names = {module: f"{part}.{name}".strip(".") for part, network in networks.items()
                       for name, module in network.named_modules()}  # fmt: skip
        self._stack: list[str] = []
        self._behind = ""

    @property
    def peak(self) -> int:
        """Bytes alive at the most, in any phase."""
        return max((peak.bytes for peak in self.peaks.values()), default=0)

    def hold(self, held: Iterable[Tensor]) -> int:
        """Count what is there already; returns its bytes."""
        before = self.live
        for tensor in held:
            self._count(tensor)
        return self.live - before

    def pass_over(self, *known: Tensor) -> None:
        """These are counted elsewhere."""
        for tensor in known:
            storage = tensor.untyped_storage()
            self._seen[storage._cdata] = weakref.ref(storage)

    def record(self) -> Record:
        """So far."""
        return Record(self.events, self.peaks, self.costs)

    def repeat(self, other: Record) -> None:
        """What another recorder saw, on top of what is here now."""
        first = self._made
        self.events += [(number + first, size) for number, size in other.events]
        self._made += max((number for number, _ in other.events), default=0)
        for phase, peak in other.peaks.items():
            if self.live + peak.bytes > self.peaks.get(phase, _NONE).bytes:
                self.peaks[phase] = Peak(self.live + peak.bytes, peak.where)
        for phase, cost in other.costs.items():
            self.costs.setdefault(phase, Cost()).add(cost)

    @contextmanager
    def watching(self) -> Iterator[Recorder]:
        """Record inside, with the modules that run."""
        with ExitStack() as undo:
            undo.enter_context(self)
            for hook in (
                register_module_forward_pre_hook(self._enter),
                register_module_forward_hook(self._leave, always_call=True),
            ):
                undo.callback(hook.remove)
            yield self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is ASKS_DEVICE:
            return args[0].device
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        for tensor in tensors(result):
            self._count(tensor)
        own = [(self._born(size), size) for size in map(_rounded, self._private(func, args))]
        for number, size in own:
            self._dead(number, size)
        if (cost := cost_of(func, args, kwargs, result, self.card)) is not None:
            self.spent().add(cost)
        return result

    def spent(self) -> Cost:
        """The sum so far of what is going on now."""
        return self.costs.setdefault(self._now, Cost())

    @property
    def _now(self) -> str:
        if torch._C._current_graph_task_id() == -1:
            return self.phase
        return "recompute" if self._stack else "backward"

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if (key := storage._cdata) in self._seen or tensor.device.type == "meta":
            return
        size = _rounded(storage.nbytes())
        number = self._born(size)

        def gone(_: Any) -> None:
            del self._seen[key]
            self._dead(number, size)

        self._seen[key] = weakref.ref(storage, gone)

    def _born(self, size: int) -> int:
        self._made += 1
        self.events.append((self._made, size))
        self.live += size
        if self.live > self.peaks.get(self._now, _NONE).bytes:
            behind = self._behind if self._now == "backward" else ""
            self.peaks[self._now] = Peak(self.live, self._stack[-1] if self._stack else behind)
        return self._made

    def _dead(self, number: int, size: int) -> None:
        self.events.append((number, 0))
        self.live -= size

    def _enter(self, module: nn.Module, _args: Any) -> None:
        self._stack.append(self._names.get(module) or (self._stack[-1] if self._stack else ""))

    def _leave(self, module: nn.Module, _args: Any, output: Any) -> None:
        name = self._stack.pop()
        if self._now == "forward" and isinstance(output, Tensor) and output.grad_fn is not None:
            output.grad_fn.register_prehook(lambda _: setattr(self, "_behind", name))


_NONE = Peak()


def _rounded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
