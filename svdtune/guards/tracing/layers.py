"""torch's own layers: which axis of their input the weights fix, and the same layer for another size."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
_OF_RECURRENT = (
    "input_size",
    "hidden_size",
    "num_layers",
    "bias",
    "batch_first",
    "dropout",
    "bidirectional",
    "proj_size",
    "nonlinearity",
)


@dataclass(frozen=True)
class Features:
    """What a layer's weights fix."""

    axis: int
    """Of the input."""
    size: int
    keyword: str
    """The argument of the layer that says so."""


def features(module: nn.Module) -> Features | None:
    """The axis that the module's weights fix; None when they fix none, or more than one."""
    if isinstance(module, nn.Linear):
        return Features(-1, module.in_features, "in_features")
    if isinstance(module, CONVS + TRANSPOSED):
        return Features(-1 - len(module.kernel_size), module.in_channels, "in_channels")
    if isinstance(module, NORMS):
        return Features(1, module.num_features, "num_features")
    if isinstance(module, nn.GroupNorm):
        return Features(1, module.num_channels, "num_channels")
    if isinstance(module, nn.LayerNorm | nn.RMSNorm) and len(module.normalized_shape) == 1:
        return Features(-1, int(module.normalized_shape[0]), "normalized_shape")
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return Features(-1, module.input_size, "input_size")
    if isinstance(module, nn.PReLU) and module.num_parameters > 1:
        return Features(1, module.num_parameters, "num_parameters")
    if isinstance(module, nn.MultiheadAttention):
        return Features(-1, module.embed_dim, "embed_dim")
    return None


def can_be_rebuilt(module: nn.Module) -> bool:
    """Whether the layer is nothing but what torch's class makes: weight norm and heads of attention are more."""
    normed = is_parametrized(module) or any(name.endswith("_g") for name, _ in module.named_parameters(recurse=False))
    return features(module) is not None and not normed and not isinstance(module, nn.MultiheadAttention)


def rebuilt(old: nn.Module, **changed: int) -> nn.Module:
    """The same layer of torch with some arguments changed, its other settings and dtype kept. Raises what torch raises."""
    kind: Any = next(cls for cls in type(old).__mro__ if cls.__module__.startswith("torch.nn.modules"))
    names = _OF_RECURRENT if isinstance(old, nn.RNNBase) else tuple(inspect.signature(kind.__init__).parameters)
    arguments = {
        name: _setting(old, name) for name in names if hasattr(old, name) and name not in ("self", "device", "dtype")
    }
    if isinstance(old, nn.RNNBase) and not isinstance(old, nn.LSTM):
        del arguments["proj_size"]
    # Made in its type: `.to(dtype)` does not work on fake tensors.
    weights = next(old.parameters(), None)
    typed = {} if weights is None else {"dtype": weights.dtype}
    return kind(**{**arguments, **changed, **typed})


def shares_weights(path: str, module: nn.Module) -> str:
    """The name of another module that holds the same weight as the one at `path`; empty when none does."""
    own = {id(parameter) for parameter in module.get_submodule(path).parameters(recurse=False)}
    others = (name for name, m in module.named_modules(remove_duplicate=False) if name != path
              and any(id(parameter) in own for parameter in m.parameters(recurse=False)))  # fmt: skip
    return next(others, "")


def bridge(kind: str, came: int, wanted: int, like: nn.Module | None = None) -> nn.Module:
    """A new layer `came` -> `wanted`: `Linear`, or a convolution of one pixel; in the dtype of `like`'s weights."""
    weights = next(like.parameters(), None) if like is not None else None
    dtype = weights.dtype if weights is not None and weights.is_floating_point() else torch.get_default_dtype()
    if kind == "Linear":
        return nn.Linear(came, wanted, dtype=dtype)
    return getattr(nn, kind)(came, wanted, 1, dtype=dtype)


def bridge_text(kind: str, came: int, wanted: int, like: nn.Module | None = None) -> str:
    """How a person writes it."""
    weights = next(like.parameters(), None) if like is not None else None
    typed = (
        f", dtype={weights.dtype}" if weights is not None and weights.dtype not in (torch.float32, torch.int64) else ""
    )
    return f"nn.{kind}({came}, {wanted}{'' if kind == 'Linear' else ', 1'}{typed})"


def _setting(old: nn.Module, name: str) -> Any:
    value = getattr(old, name)
    return value is not None and value is not False if name == "bias" else value
