"""Reading a result back: names, dtypes, shapes and every bit; and that its networks compute what the source's do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svdtune.checkpoint.lora import Adapted, read_lora
from svdtune.checkpoint.stream import as_bytes, num_bytes
from svdtune.convert.sources import Adapter, Whole
from svdtune.errors import CheckpointError, ModelError
from svdtune.model.facts import IMAGE_DECODER, ModelConfigs, class_name
from svdtune.model.headers import read_header
from svdtune.model.load import load_part, network_of
from svdtune.model.original import QUANT
from svdtune.model.single_file import read_single_file
from svdtune.model.source import PARTS, read_configs
from svdtune.model.weights import Weights, stored

_EXACT = 1e-5
"""Relative difference of two networks with the same weights: kernels may choose another order for other memory."""
_FOLDED = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""The same for a VAE whose `quant_conv` was folded into a convolution of that dtype."""
_AGAIN = "Nothing was kept. Try again on another disk; if it stays, please report it."


def same_tensors(path: Path, expected: Weights, told: Callable[[int], None]) -> None:
    """Raise CheckpointError unless the file holds exactly `expected`, to the bit."""
    found = stored([read_header(path)])
    if found.forms != expected.forms:
        names = sorted(
            name
            for name in found.forms.keys() | expected.forms.keys()
            if found.forms.get(name) != expected.forms.get(name)
        )
        raise CheckpointError(
            f"{path}: {len(names)} tensors were not written as meant ({', '.join(names[:3])}). {_AGAIN}"
        )
    for name, form in expected.forms.items():
        if as_bytes(found.read(name)) != as_bytes(expected.read(name)):
            raise CheckpointError(f"{path}: {name} does not read back as it was written. {_AGAIN}")
        told(num_bytes(form))


@dataclass(frozen=True)
class Forward:
    """What the networks of a model give for one small input, by part."""

    outputs: Mapping[str, list[Tensor]]
    bounds: Mapping[str, float]
    """How far another file's may be from it, relative."""


def forward(whole: Whole, where: str) -> Forward:
    """Build each network and let it run, one after another. Raises ModelError where its weights are not exactly its config's."""
    outputs = {}
    file = read_single_file(whole.configs.source) if whole.configs.source.is_file() else None
    for part in PARTS:
        unknown = file.plan(part).unknown if file else ()
        network = network_of(part, getattr(whole.configs, part), whole.parts[part], f"{where}: {part}", unknown)
        outputs[part] = _outputs(part, network, whole.configs)
        if not all(bool(output.isfinite().all()) for output in outputs[part]):
            raise ModelError(
                f"{where}: its {part} gives values that are not finite for a small random input. Its weights are damaged, or the training "
                "diverged: take the file again, or an earlier checkpoint."
            )
        del network  # never two at once
    return Forward(outputs, {part: _bound(whole, part) for part in PARTS})


def same_forward(expected: Forward, written: Path) -> None:
    """Raise CheckpointError unless each network in `written` computes what the source's did."""
    configs = read_configs(written)
    for part in PARTS:
        got = _outputs(part, load_part(configs, part, None), configs)
        for one, other in zip(expected.outputs[part], got, strict=True):
            difference = float((one - other).norm() / one.norm().clamp_min(1e-12))
            if not difference <= expected.bounds[part]:
                raise CheckpointError(
                    f"{written}: its {part} does not compute what the source's does (relative difference {difference:.2g}). {_AGAIN}"
                )


def same_adapter(adapter: Adapter, written: Path, dtype: torch.dtype) -> None:
    """Raise CheckpointError unless the LoRA in `written` is the source's in `dtype`: layers, matrices to the bit, alphas."""
    expected, got = adapter.lora.layers, read_lora(written, adapter.unet).layers
    wrong = [
        name
        for name in expected.keys() | got.keys()
        if name not in expected or name not in got or _content(expected[name], dtype) != _content(got[name], dtype)
    ]
    if wrong:
        raise CheckpointError(
            f"{written}: {len(wrong)} layers do not read back as they were written ({', '.join(sorted(wrong)[:3])}). {_AGAIN}"
        )


def _content(layer: Adapted, dtype: torch.dtype) -> list[object]:
    tensors = [layer.up, layer.down, *([] if layer.magnitude is None else [layer.magnitude])]
    return [layer.alpha, *((tuple(tensor.shape), bytes(as_bytes(tensor.to(dtype)))) for tensor in tensors)]


def _outputs(part: str, network: Any, configs: ModelConfigs) -> list[Tensor]:
    """What the network gives for one small random input: frames of 8 by 8 latents, or as many as its levels need."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    unet, vae, clip = configs.unet, configs.vae, configs.image_encoder
    side = 2 ** max(3, len(unet["block_out_channels"]))
    with torch.no_grad():
        if part == "image_encoder":
            size = clip["image_size"]
            return [network(normal(1, clip["num_channels"], size, size)).image_embeds]
        if part == "vae":
            pixels = normal(2, vae["in_channels"], *[8 * 2 ** (len(vae["block_out_channels"]) - 1)] * 2)
            latents = normal(2, vae["latent_channels"], 8, 8)
            frames = {"num_frames": 2} if class_name(vae) != IMAGE_DECODER else {}
            return [network.encode(pixels).latent_dist.parameters, network.decode(latents, **frames).sample]
        ids = unet["projection_class_embeddings_input_dim"] // unet["addition_time_embed_dim"]
        return [
            network(
                normal(1, 2, unet["in_channels"], side, side), torch.tensor([0.3]), normal(1, 1, unet["cross_attention_dim"]),
                normal(1, ids).abs(),
            ).sample
        ]  # fmt: skip


def _bound(whole: Whole, part: str) -> float:
    quant = whole.parts["vae"].forms.get(f"{QUANT}.weight")
    return _FOLDED[quant.dtype] if part == "vae" and quant is not None else _EXACT
