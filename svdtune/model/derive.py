"""The diffusers configs of an original single file, from its shapes. What no shape shows is SVD's: head widths, scheduler, scaling.

Needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import count
from math import isqrt
from typing import Any

from svdtune.errors import ModelError
from svdtune.model.facts import FILES, PACKAGE
from svdtune.model.original import PREFIXES, QUANT, TEMPORAL_VAE

Shapes = Mapping[str, tuple[int, ...]]

_HEAD = 64
"""`num_head_channels` of the original's UNet, at every level (SGM svd.yaml)."""
_BLOCK = "transformer_blocks.{}.norm1.weight"
_CLIP_HEADS = {768: 12, 1024: 16, 1280: 16, 1408: 16, 1664: 16}
"""Heads by width of open_clip's towers: ViT-B, L, H, g, bigG."""
_FULL, _PLAIN = ("CrossAttnDownBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), (
    "DownBlockSpatioTemporal",
    "UpBlockSpatioTemporal",
)  # fmt: skip


def derive_configs(shapes: Shapes, *, num_frames: int) -> dict[str, dict[str, Any]]:
    """The JSON of all five parts, from the names and shapes of a whole single file.

    `num_frames` is for the UNet's config: SVD (14) and SVD-XT (25) have the same shapes.
    Raises ModelError for a structure that SVD's classes in diffusers cannot have, or a head count that is not known.
    """
    found: dict[str, dict[str, Any]] = {}
    for part, derive in (("unet", _unet), ("vae", _vae), ("image_encoder", _clip)):
        try:
            found[part] = derive(_below(shapes, PREFIXES[part]))
        except KeyError as error:
            raise ModelError(
                f"no network of SVD can be built from these weights: {PREFIXES[part]}{error.args[0]} is not there, or has another "
                "shape. Take the file of the release again."
            ) from None
    found["unet"]["num_frames"] = num_frames
    found["scheduler"] = {}
    size = found["image_encoder"]["image_size"]
    found["feature_extractor"] = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    shipped = PACKAGE / "facts" / "svd-xt"
    return {part: {**json.loads((shipped / FILES[part]).read_text()), **own} for part, own in found.items()}


def _below(shapes: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def _size(shapes: Shapes, name: str, axis: int) -> int:
    """Raises KeyError with the name, also where the tensor has no such axis."""
    if len(shapes[name]) <= axis:
        raise KeyError(name)
    return shapes[name][axis]


def _count(shapes: Shapes, name: str) -> int:
    """How many tensors of this name there are, `{}` counting from 0."""
    return next(n for n in count() if name.format(n) not in shapes)


def _unet(shapes: Shapes) -> dict[str, Any]:
    levels: list[list[int]] = [[]]
    depths: list[int] = [0]
    index = 1
    while any(name.startswith(f"input_blocks.{index}.") for name in shapes):
        if f"input_blocks.{index}.0.op.weight" in shapes:
            levels.append([])
            depths.append(0)
        else:
            levels[-1].append(_size(shapes, f"input_blocks.{index}.0.in_layers.2.weight", 0))
            depths[-1] = max(depths[-1], _count(shapes, f"input_blocks.{index}.1.{_BLOCK}"))
        index += 1
    if [] in levels:
        raise KeyError(f"input_blocks.*: a ResNet of level {levels.index([])}")
    layers, channels = [len(level) for level in levels], [level[0] for level in levels]
    if wrong := [width for width in channels if width % _HEAD]:
        raise ModelError(
            f"model.diffusion_model: a level has {wrong[0]} channels, which are no heads of {_HEAD}. How many heads there are shows "
            "in no shape: give the diffusers folder, whose unet/config.json says it."
        )
    context = _size(shapes, "middle_block.1.transformer_blocks.0.attn2.to_k.weight", 1)
    # Where a level has no transformer its number is not used, but for the last one's: it is the middle's.
    every = [depth or _count(shapes, f"middle_block.1.{_BLOCK}") for depth in depths]
    ids = _size(shapes, "label_emb.0.0.weight", 1)
    return {
        "in_channels": _size(shapes, "input_blocks.0.0.weight", 1),
        "out_channels": _size(shapes, "out.2.weight", 0),
        "block_out_channels": channels,
        "layers_per_block": layers[0] if len(set(layers)) == 1 else layers,
        "num_attention_heads": [width // _HEAD for width in channels],
        "cross_attention_dim": context,
        "transformer_layers_per_block": every[0] if len(set(every)) == 1 else every,
        "addition_time_embed_dim": ids // 3,
        "projection_class_embeddings_input_dim": ids,
        "down_block_types": [(_FULL if depth else _PLAIN)[0] for depth in depths],
        "up_block_types": [(_FULL if depth else _PLAIN)[1] for depth in reversed(depths)],
    }


def _vae(shapes: Shapes) -> dict[str, Any]:
    conv = "encoder.down.{}.block.{}.conv1.weight"
    widths = [_size(shapes, conv.format(n, 0), 0) for n in range(_count(shapes, conv.format("{}", 0)) or 1)]
    found = {
        "in_channels": _size(shapes, "encoder.conv_in.weight", 1),
        "out_channels": _size(shapes, "decoder.conv_out.weight", 0),
        "latent_channels": _size(shapes, "decoder.conv_in.weight", 1),
        "block_out_channels": widths,
        "layers_per_block": _count(shapes, conv.format(0, "{}")),
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
    }
    if "decoder.conv_out.time_mix_conv.weight" in shapes:
        return {"_class_name": TEMPORAL_VAE, **found}
    return {
        "_class_name": "AutoencoderKL",
        **found,
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "use_quant_conv": f"{QUANT}.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def _clip(shapes: Shapes) -> dict[str, Any]:
    width, patch = _size(shapes, "class_embedding", 0), _size(shapes, "conv1.weight", 2)
    if width not in _CLIP_HEADS:
        raise ModelError(
            f"{PREFIXES['image_encoder']}*: the tower's width is {width}, expected one of open_clip's "
            f"({', '.join(map(str, _CLIP_HEADS))}). How many heads it has shows in no shape: give the diffusers folder, whose "
            "image_encoder/config.json says it."
        )
    return {
        "hidden_size": width,
        "intermediate_size": _size(shapes, "transformer.resblocks.0.mlp.c_fc.weight", 0),
        "num_hidden_layers": _count(shapes, "transformer.resblocks.{}.ln_1.weight"),
        "num_attention_heads": _CLIP_HEADS[width],
        "num_channels": _size(shapes, "conv1.weight", 1),
        "patch_size": patch,
        "image_size": patch * isqrt(max(_size(shapes, "positional_embedding", 0) - 1, 0)),
        "projection_dim": _size(shapes, "proj", 1),
    }
