"""Reading a result back: names, dtypes, shapes and every bit; and that its networks compute what the source's do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svdtune.checkpoint.lora import read_lora
from svdtune.checkpoint.stream import as_bytes, num_bytes
from svdtune.convert.sources import Adapter, Whole
from svdtune.errors import CheckpointError
from svdtune.model.facts import IMAGE_DECODER, ModelConfigs, class_name
from svdtune.model.headers import read_header
from svdtune.model.load import load_part, network_of
from svdtune.model.original import QUANT
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


def same_forward(whole: Whole, written: Path) -> None:
    """Raise CheckpointError unless each network in `written` computes what the one of `whole` does, on a small input."""
    configs = read_configs(written)
    for part in PARTS:
        source = network_of(part, getattr(whole.configs, part), whole.parts[part], f"the source's {part}")
        expected = _outputs(part, source, whole.configs)
        del source  # never two networks at once
        got = _outputs(part, load_part(configs, part, None), configs)
        for one, other in zip(expected, got, strict=True):
            difference = float((one - other).norm() / one.norm().clamp_min(1e-12))
            if not difference <= _bound(whole, part):
                raise CheckpointError(
                    f"{written}: its {part} does not compute what the source's does (relative difference {difference:.2g}). {_AGAIN}"
                )


def same_adapter(adapter: Adapter, written: Path, dtype: torch.dtype) -> None:
    """Raise CheckpointError unless the LoRA in `written` adds to every layer what the source's does, in `dtype`."""
    got = read_lora(written, adapter.unet)
    expected = {
        name: replace(layer, up=layer.up.to(dtype), down=layer.down.to(dtype))
        for name, layer in adapter.lora.layers.items()
    }
    wrong = [
        name
        for name in expected
        if name not in got.layers or not torch.equal(*_effects(expected[name], got.layers[name]))
    ]
    if wrong or got.layers.keys() != expected.keys():
        raise CheckpointError(
            f"{written}: {len(wrong) or 'other'} layers do not read back as they were written. {_AGAIN}"
        )


def _effects(*layers: Any) -> list[Tensor]:
    """What each adds to the output of its layer for one input."""
    first = layers[0].down.flatten(1)
    given = torch.randn(first.shape[1], generator=torch.Generator().manual_seed(0))
    return [
        layer.alpha / layer.rank * (layer.up.float().flatten(1) @ (layer.down.float().flatten(1) @ given))
        for layer in layers
    ]


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
