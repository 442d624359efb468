"""Named tensors that are read one at a time: of a folder, of a single file, under the other's names, with others laid over."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from svdtune.errors import ModelError
from svdtune.model.original import PREFIXES, QUANT, Take, is_identity, to_original

if TYPE_CHECKING:
    from torch import Tensor

    from svdtune.model.headers import Header

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""By the names that safetensors has for them."""


@dataclass(frozen=True)
class Form:
    """Dtype and shape of a tensor that is not read yet."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    def meta(self) -> Tensor:
        """It, without memory."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


@dataclass(frozen=True)
class Weights:
    """Tensors by name, in the order in which they are to be read."""

    forms: Mapping[str, Form]
    read: Callable[[str], Tensor]
    """One tensor on the CPU, in memory of its own; dtype and bits as stored."""

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """All of them, one after another."""
        return ((name, self.read(name)) for name in self.forms)


def stored(headers: list[Header]) -> Weights:
    """What lies in one or several safetensors files. Raises ModelError for a dtype that is for inference only."""
    where = {name: header.path for header in headers for name in header.tensors}
    forms = {}
    for header in headers:
        for name, entry in header.tensors.items():
            if entry.dtype not in DTYPES or (entry.dtype in ("I8", "U8") and len(entry.shape) > 1):
                raise ModelError(
                    f"{header.path}: {name} is {entry.dtype}, expected F32, F16 or BF16. Quantised weights cannot be trained or converted: "
                    "take the fp16 or fp32 file."
                )
            forms[name] = Form(DTYPES[entry.dtype], entry.shape)
    opened: dict[Path, Any] = {}

    def read(name: str) -> Tensor:
        path = where[name]
        try:
            if path not in opened:
                opened[path] = safe_open(path, framework="pt")
            # A tensor that maps the file would keep the file's pages and alignment.
            return opened[path].get_tensor(name).clone()
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path}: {name} cannot be read ({error}). Download the file again.") from error

    return Weights(forms, read)


def taken(source: Weights, takes: Mapping[str, Take]) -> Weights:
    """Each of `takes` made from `source`, under its new name."""
    forms = {}
    for name, take in takes.items():
        made = take.apply(source.forms[part].meta() for part in take.sources)
        forms[name] = Form(made.dtype, tuple(made.shape))

    def read(name: str) -> Tensor:
        made = takes[name].apply(source.read(part) for part in takes[name].sources)
        return made.contiguous() if len(takes[name].sources) > 1 else made.clone(memory_format=torch.contiguous_format)

    return Weights(forms, read)


def in_memory(tensors: Mapping[str, Tensor]) -> Weights:
    """Tensors that are there."""
    forms = {name: Form(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return Weights(forms, lambda name: tensors[name])


def laid_over(source: Weights, tensors: Mapping[str, Tensor]) -> Weights:
    """`source` with `tensors` in the places of those of the same name."""
    over = in_memory(tensors)
    return Weights(
        {**source.forms, **over.forms}, lambda name: over.read(name) if name in over.forms else source.read(name)
    )


def cast(source: Weights, dtype: torch.dtype | None) -> Weights:
    """Floating tensors in `dtype`; None leaves all as they are. Raises ModelError where a value does not fit."""
    return source if dtype is None else cast_each(source, dict.fromkeys(source.forms, dtype))


def cast_each(source: Weights, dtypes: Mapping[str, torch.dtype]) -> Weights:
    """Floating tensors each in its own of `dtypes`, by name; the others as they are. Raises ModelError where a value does not fit."""
    forms = {
        name: Form(dtypes.get(name, form.dtype) if form.dtype.is_floating_point else form.dtype, form.shape)
        for name, form in source.forms.items()
    }

    def read(name: str) -> Tensor:
        tensor = source.read(name)
        made = tensor.to(forms[name].dtype)
        if made.dtype == torch.float16 and not bool(made.isfinite().all()) and bool(tensor.isfinite().all()):
            raise ModelError(
                f"{name} has values that float16 cannot hold (largest magnitude {float(tensor.abs().max()):.3g}). Use --dtype bf16 "
                "or fp32."
            )
        return made

    return Weights(forms, read)


def original_weights(configs: Mapping[str, Mapping[str, Any]], parts: Mapping[str, Weights]) -> Weights:
    """All parts under the original's names, with prefixes: the tensors of a single file. Raises ModelError for a name without rule."""
    forms: dict[str, Form] = {}
    readers: dict[str, tuple[Weights, str]] = {}
    for part, source in parts.items():
        plan = to_original(part, configs[part], source.forms, fold=part == "vae" and not _plain_quant(source))
        if plan.unknown:
            raise ModelError(
                f"{part}: {len(plan.unknown)} weights have no name in the original ({', '.join(plan.unknown[:3])}). Its config.json is "
                "of another model than the weights."
            )
        made = taken(source, plan.takes)
        for name, form in made.forms.items():
            forms[PREFIXES[part] + name] = form
            readers[PREFIXES[part] + name] = (made, name)
    return Weights(forms, lambda name: readers[name][0].read(readers[name][1]))


def _plain_quant(vae: Weights) -> bool:
    """Whether the VAE's `quant_conv` is the identity, or not there."""
    if f"{QUANT}.weight" not in vae.forms:
        return True
    return is_identity(vae.read(f"{QUANT}.weight"), vae.read(f"{QUANT}.bias"))
