"""The training state as files of a checkpoint folder, and back, equal to the bit. Nothing here is or reads a pickle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from svdtune.checkpoint.files import load_json, save_json
from svdtune.checkpoint.tensors import (
    NamedParameters,
    NamedTensors,
    load_tensors,
    require_same,
    save_tensors,
    shapes_of,
    shared_out,
)
from svdtune.errors import CheckpointError

if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel
    from torch import Tensor

_FULL, _LORA, _EMA, _EMA_COUNTERS = "unet.safetensors", "lora.safetensors", "ema.safetensors", "ema.json"


def save_trained(folder: Path, named_parameters: NamedTensors, lora: bool) -> None:
    """Write the trained parameters (and no frozen ones) to lora.safetensors or unet.safetensors."""
    save_tensors(folder / (_LORA if lora else _FULL), dict(named_parameters), {"format": "pt"})


def load_trained(folder: Path, named_parameters: NamedParameters, *, ema: bool = False) -> None:
    """Copy the saved values into the trained parameters; with `ema` their moving averages (what is sampled and exported).

    Raises CheckpointError when names, shapes or dtypes are not exactly those of `named_parameters`; bfloat16 goes into float32 too.
    """
    parameters = dict(named_parameters)
    path = folder / (_EMA if ema else _LORA if (folder / _LORA).exists() else _FULL)
    _copy_exactly(path, {name: parameter.data for name, parameter in parameters.items()})


def save_ema(folder: Path, ema: EMAModel, named_parameters: NamedParameters) -> None:
    """Write the averages to ema.safetensors under their parameters' names, and decay and counters to ema.json.

    `named_parameters` are those that `ema` was made from, in the same order.
    """
    save_tensors(folder / _EMA, _shadows(ema, named_parameters), {"format": "pt"})
    counters = {key: value for key, value in ema.state_dict().items() if key != "shadow_params"}
    save_json(folder / _EMA_COUNTERS, {**counters, "cur_decay_value": ema.cur_decay_value})


def load_ema(folder: Path, ema: EMAModel, named_parameters: NamedParameters) -> None:
    """Copy averages, decay and counters into `ema`. Raises CheckpointError as `load_trained` does."""
    counters = load_json(folder / _EMA_COUNTERS)
    _copy_exactly(folder / _EMA, _shadows(ema, named_parameters))
    ema.cur_decay_value = counters.pop("cur_decay_value")
    ema.load_state_dict(counters)


def _shadows(ema: EMAModel, named_parameters: NamedParameters) -> dict[str, Tensor]:
    return dict(zip(dict(named_parameters), ema.shadow_params, strict=True))


def _copy_exactly(path: Path, targets: dict[str, Tensor]) -> None:
    saved: dict[str, Any] = load_tensors(path)
    require_same(path, shapes_of(saved), shapes_of(targets))
    for name, target in targets.items():
        loses_nothing = (saved[name].dtype, target.dtype) == (torch.bfloat16, torch.float32)
        if saved[name].dtype != target.dtype and not loses_nothing:
            raise CheckpointError(
                f"{path}: {name} was saved as {saved[name].dtype}, this run holds it as {target.dtype}: "
                "resume would round it. Restore memory.parameters, or start a new run with another run.name."
            )
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(shared_out(saved[name], target))
