"""Optimizer state by parameter name, without pickle: tensors in optimizer.safetensors, all else in optimizer.json.

A tensor is keyed `<parameter>/<state>` (`down.0.weight/exp_avg`), so nothing depends on the order of parameters.
Any optimizer works whose state is tensors and plain values per parameter: AdamW, Adafactor, 8-bit AdamW.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from svdtune.checkpoint.files import load_json, save_json
from svdtune.checkpoint.tensors import (
    NamedParameters,
    load_tensors,
    require_same,
    save_tensors,
    shapes_of,
    shared_out,
    whole,
)
from svdtune.errors import CheckpointError

_TENSORS, _PLAIN = "optimizer.safetensors", "optimizer.json"
_OF_THE_MACHINE = ("params", "foreach", "fused", "capturable", "differentiable")
"""Settings of a group that choose a kernel, not a result: the resuming machine decides them."""


@dataclass(frozen=True)
class OptimizerState:
    """What the two files hold."""

    tensors: Mapping[str, Tensor]
    plain: Mapping[str, Any]


def write_optimizer(folder: Path, state: OptimizerState) -> None:
    """Write both files."""
    save_tensors(folder / _TENSORS, state.tensors)
    save_json(folder / _PLAIN, dict(state.plain))


def optimizer_state(optimizer: Optimizer, named_parameters: NamedParameters, *, keep: bool = True) -> OptimizerState:
    """The state by names, shards put together: then it is called on every rank, with `keep` where the tensors are wanted.

    Raises ValueError when the optimizer holds a parameter that has no name.
    """
    parameters = dict(named_parameters)
    names = {parameter: name for name, parameter in parameters.items()}
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{_name(names, parameter)}/{key}"] = whole(value, keep=keep)
            else:
                plain.setdefault(_name(names, parameter), {})[key] = value
    return OptimizerState(
        tensors,
        {
            "optimizer": _class_name(optimizer),
            "shapes": shapes_of(parameters),
            "groups": [_save_group(group, names) for group in optimizer.param_groups],
            "plain": plain,
        },
    )


def load_optimizer(folder: Path, optimizer: Optimizer, named_parameters: NamedParameters) -> None:
    """Put the saved state into `optimizer`, equal to the bit, each tensor on the device where the optimizer wants it.

    Raises CheckpointError when the files are missing, or were written by another optimizer or for other parameters.
    """
    parameters = dict(named_parameters)
    path = folder / _PLAIN
    saved = load_json(path)
    if saved["optimizer"] != _class_name(optimizer):
        raise CheckpointError(
            f"{path}: the run was made with the optimizer {saved['optimizer']}, this config uses "
            f"{_class_name(optimizer)}. Resume needs the same train.optimizer and memory.parameters: restore them, or start a new "
            "run with another run.name."
        )
    shapes = {name: tuple(shape) for name, shape in saved["shapes"].items()}
    require_same(path, shapes, shapes_of(parameters))
    _load_groups(path, optimizer, saved["groups"], parameters)
    _load_state(optimizer, load_tensors(folder / _TENSORS), saved["plain"], parameters)


def _load_groups(path: Path, optimizer: Optimizer, saved: list[dict[str, Any]], parameters: Mapping[str, Any]) -> None:
    names = {parameter: name for name, parameter in parameters.items()}
    current = [[_name(names, parameter) for parameter in group["params"]] for group in optimizer.param_groups]
    if [sorted(group["params"]) for group in saved] != [sorted(group) for group in current]:
        raise CheckpointError(
            f"{path}: the run had {len(saved)} parameter groups of {[len(group['params']) for group in saved]} parameters, "
            f"this config has {len(current)} of {[len(group) for group in current]}. "
            "Resume needs the same groups: start a new run with another run.name."
        )
    for group, values in zip(optimizer.param_groups, saved, strict=True):
        for key, value in values.items():
            if key not in _OF_THE_MACHINE:
                group[key] = tuple(value) if isinstance(value, list) else value


def _load_state(
    optimizer: Optimizer,
    tensors: Mapping[str, Tensor],
    plain: Mapping[str, Mapping[str, Any]],
    parameters: Mapping[str, Parameter],
) -> None:
    on_device = {id(p) for group in optimizer.param_groups if _steps_on_device(group) for p in group["params"]}
    optimizer.state.clear()
    for name, values in plain.items():
        optimizer.state[parameters[name]].update(values)
    for full_name, tensor in tensors.items():
        name, key = full_name.rsplit("/", 1)
        parameter = parameters[name]
        stays = key == "step" and id(parameter) not in on_device
        divided = tensor.shape == parameter.shape
        there = shared_out(tensor, parameter) if divided else tensor.to(parameter.device)
        optimizer.state[parameter][key] = tensor if stays else there


def _steps_on_device(group: Mapping[str, Any]) -> bool:
    """Torch keeps `step` on the CPU unless the kernel reads it on the device (`Optimizer.load_state_dict` has the same rule)."""
    return bool(group.get("fused") or group.get("capturable"))


def _save_group(group: Mapping[str, Any], names: Mapping[Any, str]) -> dict[str, Any]:
    values = {key: value for key, value in group.items() if key not in _OF_THE_MACHINE}
    return {**values, "params": [_name(names, parameter) for parameter in group["params"]]}


def _name(names: Mapping[Any, str], parameter: Tensor) -> str:
    if parameter not in names:
        raise ValueError(f"the optimizer holds a parameter of shape {tuple(parameter.shape)} that has no name")
    return names[parameter]


def _class_name(optimizer: Optimizer) -> str:
    """Class of the optimizer, seen through accelerate's wrapper."""
    return type(getattr(optimizer, "optimizer", optimizer)).__name__
