"""The diffusers configs of an original single file, from its shapes. What no shape shows is SVD's: head widths, scheduler, scaling.

Needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import isqrt
from typing import Any

from svdtune.errors import ModelError
from svdtune.model.facts import FILES, PACKAGE
from svdtune.model.original import PREFIXES, QUANT, TEMPORAL_VAE

Shapes = Mapping[str, tuple[int, ...]]

_HEAD = 64
"""`num_head_channels` of the original's UNet, at every level (SGM svd.yaml)."""
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
    own = {part: _below(shapes, prefix) for part, prefix in PREFIXES.items()}
    try:
        found: dict[str, dict[str, Any]] = {
            "unet": {**_unet(own["unet"]), "num_frames": num_frames},
            "vae": _vae(own["vae"]),
            "image_encoder": _clip(own["image_encoder"]),
            "scheduler": {},
            "feature_extractor": {},
        }
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise ModelError(
            f"no network of SVD can be built from these weights: {error} is not there. Take the file of the release again."
        ) from None
    size = found["image_encoder"]["image_size"]
    found["feature_extractor"] = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    shipped = PACKAGE / "facts" / "svd-xt"
    return {part: {**json.loads((shipped / FILES[part]).read_text()), **own} for part, own in found.items()}


def _below(shapes: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def _unet(shapes: Shapes) -> dict[str, Any]:
    levels: list[list[int]] = [[]]
    attends: list[bool] = [False]
    index = 1
    while any(name.startswith(f"input_blocks.{index}.") for name in shapes):
        if f"input_blocks.{index}.0.op.weight" in shapes:
            levels.append([])
            attends.append(False)
        else:
            levels[-1].append(shapes[f"input_blocks.{index}.0.in_layers.2.weight"][0])
            attends[-1] |= f"input_blocks.{index}.1.proj_in.weight" in shapes
        index += 1
    layers, channels = [len(level) for level in levels], [level[0] for level in levels]
    if wrong := [width for width in channels if width % _HEAD]:
        raise ModelError(
            f"model.diffusion_model: a level has {wrong[0]} channels, which are no heads of {_HEAD}. How many heads there are shows "
            "in no shape: give the diffusers folder, whose unet/config.json says it."
        )
    contexts = [shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")]
    depths = {
        int(name.split("transformer_blocks.")[1].split(".")[0]) for name in shapes if ".transformer_blocks." in name
    }
    ids = shapes["label_emb.0.0.weight"][1]
    return {
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": channels,
        "layers_per_block": layers[0] if len(set(layers)) == 1 else layers,
        "num_attention_heads": [width // _HEAD for width in channels],
        "cross_attention_dim": contexts[0],
        "transformer_layers_per_block": max(depths) + 1,
        "addition_time_embed_dim": ids // 3,
        "projection_class_embeddings_input_dim": ids,
        "down_block_types": [(_FULL if attend else _PLAIN)[0] for attend in attends],
        "up_block_types": [(_FULL if attend else _PLAIN)[1] for attend in reversed(attends)],
    }


def _vae(shapes: Shapes) -> dict[str, Any]:
    widths = []
    while (name := f"encoder.down.{len(widths)}.block.0.conv1.weight") in shapes:
        widths.append(shapes[name][0])
    layers = sum(f"encoder.down.0.block.{layer}.conv1.weight" in shapes for layer in range(100))
    found = {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "block_out_channels": widths,
        "layers_per_block": layers,
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
    width, patch = shapes["class_embedding"][0], shapes["conv1.weight"][2]
    layers = sum(name.endswith(".ln_1.weight") for name in shapes)
    if width not in _CLIP_HEADS:
        raise ModelError(
            f"{PREFIXES['image_encoder']}*: the tower's width is {width}, expected one of open_clip's "
            f"({', '.join(map(str, _CLIP_HEADS))}). How many heads it has shows in no shape: give the diffusers folder, whose "
            "image_encoder/config.json says it."
        )
    return {
        "hidden_size": width,
        "intermediate_size": shapes["transformer.resblocks.0.mlp.c_fc.weight"][0],
        "num_hidden_layers": layers,
        "num_attention_heads": _CLIP_HEADS[width],
        "num_channels": shapes["conv1.weight"][1],
        "patch_size": patch,
        "image_size": patch * isqrt(shapes["positional_embedding"][0] - 1),
        "projection_dim": shapes["proj"][1],
    }
