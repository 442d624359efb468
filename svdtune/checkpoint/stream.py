"""Writing a safetensors file tensor by tensor: the library's writer needs all of them, and a copy of each, in memory at once."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from svdtune.model.weights import DTYPES, Form, Weights

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_weights(
    path: Path, weights: Weights, metadata: Mapping[str, str], told: Callable[[int], None] = lambda _: None
) -> None:
    """Write `weights` to `path` durably; `told` hears of the bytes of each tensor. The order of `weights` is kept.

    Wide dtypes first is the reader's best order, so that each tensor lies at a multiple of its own size: see `by_width`.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, form in weights.forms.items():
        size = num_bytes(form)
        header[name] = {"dtype": _NAMES[form.dtype], "shape": list(form.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, form in weights.forms.items():
            tensor = weights.read(name)
            if (tensor.dtype, tuple(tensor.shape)) != (form.dtype, form.shape):
                raise ValueError(
                    f"{name}: read {tensor.dtype} {tuple(tensor.shape)}, announced {form.dtype} {form.shape}"
                )
            file.write(as_bytes(tensor))
            told(num_bytes(form))
        file.flush()
        os.fsync(file.fileno())


def by_width(weights: Weights) -> Weights:
    """The same with wide dtypes first, then by name, as safetensors itself orders them."""
    order = sorted(weights.forms, key=lambda name: (-weights.forms[name].dtype.itemsize, name))
    return Weights({name: weights.forms[name] for name in order}, weights.read)


def num_bytes(form: Form) -> int:
    """Bytes of one tensor in the file."""
    return torch.Size(form.shape).numel() * form.dtype.itemsize


def as_bytes(tensor: Tensor) -> memoryview:
    """The bits of a tensor (numpy knows no bfloat16)."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
