"""Which kind of model a checkpoint is, from names and shapes alone: structure and arithmetic, never the file's name. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]

_TEMPORAL = ("temporal_transformer_blocks.", "temporal_res_block.", ".time_stack.")
_LORA = (".lora_down.weight", ".lora_A.weight", ".lora.down.weight", "_lora.down.weight", ".lora_A.default.weight")
_LYCORIS = (".hada_w1_a", ".lokr_w1", ".lokr_w1_a", ".oft_blocks", ".diff_b")
_NO_FRAMES = "SVD (14 frames) and SVD-XT (25) have the same shapes: no header tells them apart."


@dataclass(frozen=True)
class Family:
    """What a checkpoint is."""

    name: str
    """`SVD`, `SD 1.x`, `LoRA`, ..., or `unknown`."""
    naming: str
    """`original` (one file of the authors), `diffusers`, `transformers`, the format of a LoRA, or empty."""
    parts: tuple[str, ...] = ()
    """Of unet, controlnet, vae, image_encoder, text_encoder."""
    prefixes: Mapping[str, str] = field(default_factory=dict)
    """What stands before the names of each part."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """in_channels, out_channels, cross_attention_dim, time_ids_width, width of the UNet; None: it has no such layer."""
    notes: tuple[str, ...] = ()

    @property
    def is_svd(self) -> bool:
        """Whether this is a UNet that svdtune trains, under any naming."""
        return self.name in ("SVD", "SVD image_decoder")


def recognise(shapes: Shapes) -> Family:
    """The family of a table of name -> shape; `unknown` rather than a guess."""
    if lora := _lora(shapes):
        return lora
    found = {part: hit for part, hit in _parts(shapes).items() if hit is not None}
    prefixes = {part: hit[0] for part, hit in found.items()}
    naming = next((hit[1] for hit in found.values()), "")
    for part in ("controlnet", "unet"):
        if part in found:
            return _with_unet(shapes, part, found, prefixes)
    if _motion_module(shapes):
        return Family(
            "AnimateDiff motion module",
            "",
            notes=("It is an addition to an image model, not a model.",),
        )
    for part, name in (("vae", "VAE"), ("image_encoder", "CLIP vision tower"), ("text_encoder", "CLIP text tower")):
        if part in found:
            facts = {"temporal_decoder": _temporal_decoder(shapes, prefixes["vae"])} if part == "vae" else {}
            named = "SVD VAE (temporal decoder)" if facts.get("temporal_decoder") else name
            return Family(named, naming, tuple(found), prefixes, facts)
    return Family("unknown", "")


def _with_unet(shapes: Shapes, part: str, found: Mapping[str, tuple[str, str]], prefixes: Mapping[str, str]) -> Family:
    prefix, naming = found[part]
    facts = unet_facts(shapes, prefix, naming)
    if part == "controlnet":
        base = "video" if facts["temporal"] else _image_base(facts)
        notes: tuple[str, ...] = (f"A ControlNet for {base}: it adds to a UNet and is none.",)
        return Family("ControlNet", naming, tuple(found), prefixes, facts, notes)
    stripped = not facts["temporal"] and any(".spatial_res_block." in name for name in shapes)
    if stripped:
        return Family(
            "SVD UNet without temporal layers",
            naming,
            tuple(found),
            prefixes,
            facts,
            ("Its temporal layers were left out.",),
        )
    name, notes = _video(facts) if facts["temporal"] else _image(shapes, facts)
    if name == "SVD" and "vae" in found and not _temporal_decoder(shapes, prefixes["vae"]):
        name, notes = "SVD image_decoder", (*notes, "The VAE decodes each frame for itself: it has no temporal layers.")
    return Family(name, naming, tuple(found), prefixes, facts, notes)


def unet_facts(shapes: Shapes, prefix: str, naming: str) -> dict[str, Any]:
    """The numbers of a UNet that its shapes show."""
    names = {
        "original": ("input_blocks.0.0.weight", "out.2.weight", "label_emb.0.0.weight"),
        "diffusers": ("conv_in.weight", "conv_out.weight", "add_embedding.linear_1.weight"),
    }[naming]
    conv_in, conv_out, ids = (shapes.get(prefix + name) for name in names)
    own = {name: shape for name, shape in shapes.items() if name.startswith(prefix)}
    to_k = [
        s for n, s in own.items() if n.endswith("attn2.to_k.weight") and not _is_temporal(n) and "motion_mod" not in n
    ]
    proj_in = [s for n, s in own.items() if n.endswith("proj_in.weight") and "motion_mod" not in n and "temp_" not in n]
    return {
        "in_channels": conv_in[1] if conv_in and len(conv_in) == 4 else None,
        "out_channels": conv_out[0] if conv_out else None,
        "width": conv_in[0] if conv_in else None,
        "cross_attention_dim": to_k[0][1] if to_k and len(to_k[0]) == 2 else None,
        "time_ids_width": ids[1] if ids and len(ids) == 2 else None,
        "linear_proj_in": bool(proj_in) and len(proj_in[0]) == 2,
        "temporal": any(_is_temporal(name) for name in own),
    }


def _video(facts: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """SVD and what was made of it: told apart by the ids that add_embedding takes and by conv_in's channels."""
    ids, takes, gives = facts["time_ids_width"], facts["in_channels"], facts["out_channels"]
    if ids == 256:
        return "SV3D-u", ("add_embedding takes 256 = 1 x 256: one id, SVD has three (768 = 3 x 256).",)
    if ids == 1280:
        return "SV3D-p", (
            "add_embedding takes 1280 = 256 + 512 + 512: noise level, elevation and azimuth instead of SVD's 3 x 256.",
        )
    if ids is None or ids % 3:
        return "video UNet", ("It has SVD's temporal layers, but not SVD's three ids.",)
    if takes is None or gives is None:
        return "video UNet", ("Its first or last convolution is not here, so it is not whole.",)
    if takes == 2 * gives:
        return "SVD", (_NO_FRAMES,)
    known = {
        gives: "no conditioning latents",
        2 * gives + 1: "SVD's channels and a mask",
        3 * gives: "SVD's and another latent",
    }
    note = f"conv_in takes {takes} channels ({known.get(takes, 'another conditioning')}), SVD's {2 * gives}."
    return f"SVD derivative ({takes} channels)", (note,)


def _image(shapes: Shapes, facts: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    note = ("It is an image model: it has no temporal layers.",)
    if any(".motion_modules." in name for name in shapes):
        return "AnimateDiff UNet", ("Its motion modules are other temporal layers than SVD's.",)
    if any(".temp_attentions." in name or ".temp_convs." in name for name in shapes):
        return "text-to-video UNet (ModelScope)", ("Its temporal layers are others than SVD's.",)
    base, takes, gives = _image_base(facts), facts["in_channels"], facts["out_channels"]
    if takes is not None and gives and takes != gives:
        extra = {2 * gives + 1: "inpainting", gives + 1: "depth", 2 * gives: "with an image beside the latents"}
        return f"{base} {extra.get(takes, 'derivative')} ({takes} channels)", note
    return base, note


def _image_base(facts: Mapping[str, Any]) -> str:
    """By cross-attention width at the released size, by structure at any other."""
    cross, released = facts["cross_attention_dim"], facts["width"] == 320
    if facts["time_ids_width"] is not None:
        return {2048: "SDXL", 1280: "SDXL refiner"}.get(cross, "image UNet") if released else "SDXL"
    if released:
        return {768: "SD 1.x", 1024: "SD 2.x"}.get(cross, "image UNet")
    if cross is None:
        return "image UNet"
    return "SD 2.x" if facts["linear_proj_in"] else "SD 1.x"


def _parts(shapes: Shapes) -> dict[str, tuple[str, str] | None]:
    """Prefix and naming of each part that is there. Two names of one structure must stand behind the same prefix."""
    original = _before(shapes, "input_blocks.0.0.weight", "time_embed.0.weight")
    diffusers = _before(shapes, "conv_in.weight", "time_embedding.linear_1.weight")
    unet = (
        (original, "original") if original is not None else (diffusers, "diffusers") if diffusers is not None else None
    )
    hint = _before(shapes, "input_hint_block.0.weight") if original is not None else None
    cond = _before(shapes, "controlnet_cond_embedding.conv_in.weight", "conv_in.weight")
    control = (hint, "original") if hint is not None else (cond, "diffusers") if cond is not None else None
    return {
        "controlnet": control,
        "unet": None if unet is None or (control and unet[0] == control[0]) else unet,
        "vae": _first(
            (_before(shapes, "encoder.conv_in.weight", "encoder.down.0.block.0.norm1.weight"), "original"),
            (_before(shapes, "encoder.conv_in.weight", "encoder.down_blocks.0.resnets.0.norm1.weight"), "diffusers"),
        ),
        "image_encoder": _first(
            (_before(shapes, "visual.conv1.weight", "visual.class_embedding"), "original"),
            (_before(shapes, "vision_model.embeddings.patch_embedding.weight", "vision_model.embeddings.class_embedding"), "transformers"),
        ),
        "text_encoder": _first(
            (_before(shapes, "text_model.embeddings.token_embedding.weight"), "transformers"),
            (_before(shapes, "embeddings.token_embedding.weight", "final_layer_norm.weight"), "transformers"),
            (_before(shapes, "token_embedding.weight", "text_projection"), "original"),
        ),
    }  # fmt: skip


def _first(*candidates: tuple[str | None, str]) -> tuple[str, str] | None:
    return next(((prefix, naming) for prefix, naming in candidates if prefix is not None), None)


def _before(shapes: Shapes, name: str, sibling: str | None = None) -> str | None:
    """What stands before `name`, where `sibling` stands behind the same; the shortest such prefix."""
    found = [
        n.removesuffix(name) for n in shapes if n.endswith(name) and (n == name or n.removesuffix(name)[-1] == ".")
    ]
    found = [prefix for prefix in found if sibling is None or prefix + sibling in shapes]
    return min(found, key=len, default=None)


def _temporal_decoder(shapes: Shapes, prefix: str) -> bool:
    marks = ("temporal_res_block.", "time_stack.", "time_conv_out.", "time_mix_conv.")
    return any(name.startswith(prefix) and any(mark in name for mark in marks) for name in shapes)


def _is_temporal(name: str) -> bool:
    return any(mark in name for mark in _TEMPORAL)


def _motion_module(shapes: Shapes) -> bool:
    motion = [name for name in shapes if "motion_modules." in name]
    return bool(motion) and len(motion) > len(shapes) / 2


def _lora(shapes: Shapes) -> Family | None:
    """A LoRA of any writer; its base by the width that the adapters of cross-attention take."""
    down = {name: shape for name, shape in shapes.items() if name.endswith(_LORA)}
    others = [n for n in shapes if not any(mark in n for mark in ("lora", "alpha", "dora_scale", "network_"))]
    if any(name.endswith(_LYCORIS) for name in shapes):
        return Family("LoRA", "lycoris", notes=("LoHa, LoKr or OFT: it adds to a model and is none.",))
    if not down or len(others) > len(down):
        return None
    kohya = any(name.endswith(".lora_down.weight") for name in down)
    peft = any(name.startswith("base_model.model.") or ".lora_A." in name for name in down)
    naming = "kohya" if kohya else "peft" if peft else "diffusers"
    cross = {s[1] for n, s in down.items() if "attn2" in n and any(k in n for k in ("to_k", "to_v")) and len(s) == 2}
    if any(
        mark in name for name in down for mark in ("temporal_transformer_blocks", "temporal_res_block", "time_stack")
    ):
        base = "SVD (it adapts temporal layers)"
    elif len(cross) == 1:
        width = cross.pop()
        known = {768: "SD 1.x", 1024: "SD 2.x, or SVD's spatial layers", 2048: "SDXL"}
        base = known.get(width, f"a base with cross-attention {width}")
    else:
        base = "unknown (no adapter of the cross-attention keys shows a width)"
    ranks = sorted({shape[0] for shape in down.values() if shape})
    return Family(
        "LoRA", naming, facts={"base": base, "ranks": ranks}, notes=(f"For {base}; it adds to a model and is none.",)
    )
