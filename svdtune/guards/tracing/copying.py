"""A copy of any module with fake or real twins of its tensors, whatever else it holds; the module itself is never touched."""

from __future__ import annotations

import copy
import functools
import types
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

_AS_THEY_ARE = (
    str,
    bytes,
    int,
    float,
    complex,
    type(None),
    type,
    types.ModuleType,
    types.BuiltinFunctionType,
    torch.dtype,
    torch.device,
)


def twin_of(value: Any, *, fake: bool) -> Any:
    """A deep copy: modules, tensors and containers anew, hooks bound to the copy; what cannot be copied (locks, files) is shared."""
    return _Copier(fake).twin(value)


class _Copier:
    """Twins by identity, so that shared weights stay shared and cycles end."""

    def __init__(self, fake: bool) -> None:
        self.fake = fake
        self.memo: dict[int, Any] = {}

    def twin(self, value: Any) -> Any:
        if isinstance(value, _AS_THEY_ARE):
            return value
        if id(value) not in self.memo:
            self.memo[id(value)] = self._made(value)
        return self.memo[id(value)]

    def _made(self, value: Any) -> Any:
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, torch.Generator):
            return value.clone_state()
        if isinstance(value, dict | list | tuple):
            return self._container(value)
        if isinstance(value, types.MethodType):
            return types.MethodType(value.__func__, self.twin(value.__self__))
        if isinstance(value, functools.partial):
            return functools.partial(self.twin(value.func), *self.twin(value.args), **self.twin(value.keywords))
        if isinstance(value, types.FunctionType):
            return self._function(value)
        try:
            return copy.deepcopy(value, dict(self.memo))
        except Exception:  # a lock, a file, a handle of another library
            return value

    def _module(self, value: nn.Module) -> nn.Module:
        made = self.memo[id(value)] = type(value).__new__(type(value))
        made.__dict__.update({name: self.twin(held) for name, held in vars(value).items()})
        return made

    def _tensor(self, value: torch.Tensor) -> torch.Tensor:
        if is_lazy(value):
            return copy.deepcopy(value)
        shape, stride, dtype = value.shape, value.stride(), value.dtype
        made = torch.empty_strided(shape, stride, dtype=dtype, device="cpu") if self.fake else value.detach().clone()
        if isinstance(value, nn.Parameter):
            return nn.Parameter(made, requires_grad=value.requires_grad)
        return made.requires_grad_() if value.requires_grad and value.is_leaf else made

    def _container(self, value: Any) -> Any:
        if isinstance(value, tuple):
            items = [self.twin(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        made = self.memo[id(value)] = copy.copy(value)
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            made[key] = self.twin(value[key])
        return made

    def _function(self, value: types.FunctionType) -> types.FunctionType:
        """A hook made inside `__init__` holds the module in its closure: the copy's hook must hold the copy."""
        if not value.__closure__:
            return value
        self.memo[id(value)] = value
        cells = tuple(types.CellType(self.twin(cell.cell_contents)) for cell in value.__closure__)
        made = types.FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, cells)
        made.__kwdefaults__ = value.__kwdefaults__
        return made
