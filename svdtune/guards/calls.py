"""Which module of a network was running when something failed, and what it was given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import nn


@dataclass
class Call:
    """One call of one module. `outputs` stays None when it raised."""

    path: str
    """Name of the module in its network (`down_blocks.0.resnets.0`); empty for the network itself."""
    module: nn.Module
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    outputs: Any = None
    done: bool = False

    @property
    def inputs(self) -> list[tuple[int, ...]]:
        """Shapes of the tensors it was given, in order."""
        return [tuple(t.shape) for t in tensors_in((self.arguments, self.keywords))]

    @property
    def output_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the tensors it gave, in order."""
        return [tuple(t.shape) for t in tensors_in(self.outputs)]


@contextmanager
def record_calls(network: nn.Module, name: str = "") -> Iterator[list[Call]]:
    """Every module call inside `network` while the block runs, in order of their beginning.

    After an exception the calls that are not `done` are the stack at the failure, outermost first.
    """
    calls: list[Call] = []
    open_calls: list[Call] = []
    handles = []

    def enter(path: str):
        def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            call = Call(path, module, arguments, keywords)
            calls.append(call)
            open_calls.append(call)

        return hook

    def leave(module: nn.Module, _arguments: Any, _keywords: Any, outputs: Any) -> None:
        call = open_calls.pop()
        while call.module is not module:
            call.done = True  # it raised, and a module around it went on without it
            call = open_calls.pop()
        call.outputs, call.done = outputs, True

    for path, module in network.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue  # compiled: it takes no hooks, so its calls are its caller's
        full = ".".join(part for part in (name, path) if part)
        handles.append(module.register_forward_pre_hook(enter(full), prepend=True, with_kwargs=True))
        handles.append(module.register_forward_hook(leave, with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors inside nested tuples, lists, dicts and dataclass-like outputs, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for item in value.values() for t in tensors_in(item)]
    if isinstance(value, list | tuple):
        return [t for item in value for t in tensors_in(item)]
    if is_dataclass(value) and not isinstance(value, type):
        return [t for part in fields(value) for t in tensors_in(getattr(value, part.name))]
    return []
