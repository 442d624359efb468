"""Weights that are not the network of their config, told by cause: one finding for each cause, not one for each key. No torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from svdtune.config.schema import Adapt
from svdtune.guards.findings import Finding
from svdtune.model.facts import HARMLESS
from svdtune.model.family import Family, Shapes, recognise
from svdtune.model.widen import Widening, plan_widening

_RANDOM = (
    "They would train from random values: plain diffusers fills them in and only logs it. svdtune refuses; no setting leaves a "
    "weight random."
)
_REFUSED = (
    "diffusers refuses them, and advises ignore_mismatched_sizes=True, which would leave these layers random. No setting of svdtune "
    "leaves a weight random."
)
_TEMPORAL = re.compile(
    r"temporal_transformer_blocks\.|temporal_res_block\.|time_pos_embed\.|time_mixer\.|time_conv_out\."
)
_BLOCK = re.compile(
    r"(?:model\.diffusion_model\.|first_stage_model\.|conditioner\.embedders\.\d+\.[\w.]*?(?=visual))?"
    r"(?:encoder\.|decoder\.|visual\.)?\w+(?:\.\d+)?(?:\.layers\.\d+|\.resblocks\.\d+)?"
)
_ANCHOR = {
    "unet": "conv_in.weight",
    "vae": "encoder.conv_in.weight",
    "image_encoder": "vision_model.embeddings.class_embedding",
}
_NATURAL = {"unet": ("SVD",), "vae": ("SVD VAE (temporal decoder)",), "image_encoder": ("CLIP vision tower",)}
_ONE_RELEASE = "Take weights and config.json of this part from one SVD release."
_UNEXPECTED = (
    (re.compile(r"lora_|\.lora\.|lora_[AB]"), "LoRA adapters lie among the weights: merge them into the base before training on it."),
    (re.compile(r"\.base_layer\."), "The model was saved with PEFT adapters still inside: merge or unload them, then save again."),
    (re.compile(r"text_model\."), "It is the whole CLIP; SVD has its vision tower only: save CLIPVisionModelWithProjection from it."),
    (re.compile(r"absmax|quant_|weight_scale|SCB|qzeros|qweight"), "The weights are quantised for inference: take the fp16 or fp32 ones."),
    (re.compile(r"post_quant_conv\."), "It is the VAE of an image model (AutoencoderKL): take the vae folder of the SVD release."),
)  # fmt: skip
_MISSHAPEN: tuple[tuple[Callable[[str], bool], str], ...] = (
    (lambda n: n == "conv_in.weight", "Another number of input channels: the condition is another than SVD's (2 x latents)."),
    (lambda n: "attn2.to_k." in n or "attn2.to_v." in n, "Another cross-attention width: these weights are made for another encoder (768: "
     "CLIP ViT-L, SD 1.x; 1024: OpenCLIP ViT-H, SVD and SD 2.x; 2048: SDXL)."),
    (lambda n: n.startswith("add_embedding.linear_1."), "Another number of ids: SVD has three; SV3D-u one (256), SV3D-p 1280."),
    (lambda n: n.startswith("visual_projection."), "Another projection_dim: the embedding would not be as wide as the config says."),
)  # fmt: skip


def without_prefix(part: str, expected: Iterable[str], got: Shapes) -> tuple[str, dict[str, tuple[int, ...]]]:
    """A wrapper's prefix that stands before (almost) every name of `part`, and the table without it; '' for none."""
    anchor, wanted = "." + _ANCHOR[part], set(expected)
    prefixes = {name.removesuffix(anchor) + "." for name in got if name.endswith(anchor)}
    for prefix in sorted(prefixes, key=len):
        stripped = {name.removeprefix(prefix): shape for name, shape in got.items() if name.startswith(prefix)}
        if len(wanted & set(stripped)) >= 0.9 * len(wanted):
            return prefix, stripped
    return "", dict(got)


def told_by_cause(where: str, part: str, expected: Shapes, got: Shapes, *, adapts: bool, adapt: Adapt) -> list[Finding]:
    """CKP207-211 and CKP218 for the weights `got` of a part whose config makes `expected` (name -> shape)."""
    got = {name: shape for name, shape in got.items() if name not in HARMLESS or name in expected}
    if dict(expected) == got:
        return []
    prefix, stripped = without_prefix(part, expected, got)
    findings = [_prefixed(where, prefix)] if prefix else []
    widening = plan_widening(expected, got) if part == "unet" else None
    if widening is not None:
        return [_widened(where, widening, recognise(got), adapts=adapts, adapt=adapt)]
    family = recognise(got)
    if not prefix and _another(part, family, expected, got):
        return [_of_another_family(where, part, family)]
    return findings + _by_key(where, part, expected, stripped)


def _another(part: str, family: Family, expected: Shapes, got: Shapes) -> bool:
    """Whether the file is of another kind, so that listing keys would only hide that."""
    if all(expected.get(name) == shape for name, shape in got.items()):
        return False  # Nothing in it is foreign: it is incomplete.
    if family.name in _NATURAL[part] and family.naming != "original":
        return False
    if family.name == "unknown" or family.name == "SVD UNet without temporal layers":
        return False
    return family.name != recognise(expected).name or family.naming == "original"


def _of_another_family(where: str, part: str, family: Family) -> Finding:
    got = f"{family.name}, {family.naming} naming" if family.naming else family.name
    why = " ".join(family.notes) or "Its layers are others than those of config.json."
    fix = f"Put the {part} of an SVD release (diffusers folder) here."
    if family.naming == "original":
        why = f"{why} The names are those of the authors' single files, in a folder they are diffusers'. Where it "
        why += "is a whole model, give the file itself as model.pretrained (`svdtune convert FILE FOLDER` makes a folder of it)."
        why = why.strip()
    return Finding("CKP207", "error", where, got, f"the {part} that config.json describes, diffusers naming", why, fix)


def _widened(where: str, widening: Widening, family: Family, *, adapts: bool, adapt: Adapt) -> Finding:
    trains = adapt.method == "full" or (adapt.method == "spatial" and not widening.zero)
    patch = () if trains else _to_full(adapt)
    if adapts:
        return Finding(
            "CKP218", "warning" if trains else "error", where, f"{family.name} weights, widened", "SVD's own weights",
            " ".join(widening.said) + ("" if trains else f" adapt.method={adapt.method} does not train what starts at zero."),
            "" if trains else "Set adapt.method=full.", patch,
        )  # fmt: skip
    lacks = "the conditioning channels of conv_in" if not widening.zero else "layers that SVD's UNet has"
    why = f"They lack {lacks}. {_RANDOM}"
    fix = "Take SVD's own UNet. Or train on these: model.on_mismatch=adapt starts what is missing so that it changes nothing."
    return Finding(
        "CKP207", "error", where, f"{family.name} weights", "SVD's UNet", why, fix, ("model.on_mismatch=adapt", *patch)
    )


def _to_full(adapt: Adapt) -> tuple[str, ...]:
    """Overrides to method full; what acts only with LoRA must go with it, or the schema refuses."""
    off = {"targets": None, "alpha": None, "dora": False}
    return (
        "adapt.method=full",
        *(f"adapt.{key}={'null' if v is None else 'false'}" for key, v in off.items() if getattr(adapt, key) != v),
    )


def _prefixed(where: str, prefix: str) -> Finding:
    return Finding(
        "CKP208", "error", where, f"every name begins with {prefix!r}", "the names of the network itself",
        "The file was saved from a wrapper around the network (DataParallel, torch.compile, a training class). No weight would find "
        "its place, and all would stay random.",
        f"Save it again with {prefix!r} removed from each name.",
    )  # fmt: skip


def _by_key(where: str, part: str, expected: Shapes, got: Shapes) -> list[Finding]:
    missing = [name for name in expected if name not in got]
    unexpected = [name for name in got if name not in expected]
    misshapen = {name: (got[name], expected[name]) for name in expected if name in got and got[name] != expected[name]}
    findings = [_missing(where, part, missing, expected)] if missing else []
    if unexpected:
        findings.append(_unexpected(where, unexpected))
    return findings + _misshapen(where, misshapen)


def _missing(where: str, part: str, missing: list[str], expected: Shapes) -> Finding:
    finding = Finding(
        "CKP209", "error", where, "", f"all {len(expected)} weights of config.json", _RANDOM, _ONE_RELEASE
    )
    temporal = [name for name in expected if _TEMPORAL.search(name)]
    if temporal and set(missing) == set(temporal):
        return replace(
            finding, got=f"all {len(missing)} weights of the temporal layers are missing",
            why=f"The {part} was saved without them (an image model's weights under new names, or a pruned file). {_RANDOM}",
        )  # fmt: skip
    if len(missing) == len(expected):
        return replace(finding, got=f"none of its names is there (missing: {some(missing)})")
    return replace(finding, got=f"{len(missing)} weights are missing: {blocks_of(missing)}")


def _unexpected(where: str, names: list[str]) -> Finding:
    hint = next((told for pattern, told in _UNEXPECTED if any(pattern.search(name) for name in names)), "")
    why = (
        hint
        or "They belong to a network with more or other layers than config.json describes; they would be left out silently."
    )
    return Finding(
        "CKP210",
        "error",
        where,
        f"{len(names)} weights that the network has no place for: {some(names)}",
        "none",
        why,
        _ONE_RELEASE,
    )


def _misshapen(where: str, shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> list[Finding]:
    """One finding for each cause that explains some of them, one for the rest."""
    left, findings = dict(shapes), []
    for holds, why in (
        *_MISSHAPEN,
        (lambda _: True, "The layer sizes of config.json (or class defaults, where it lacks keys) are others."),
    ):
        some = {name: left.pop(name) for name in list(left) if holds(name)}
        # Where all widths differ, conv_in and the cross-attention are not causes of their own.
        if some:
            name, (got, expected) = next(iter(some.items()))
            others = f" and {len(some) - 1} more" if len(some) > 1 else ""
            told = f"{name} {list(got)}{others}"
            findings.append(
                Finding("CKP211", "error", where, told, str(list(expected)), f"{why} {_REFUSED}", _ONE_RELEASE)
            )
    return findings


def some(names: list[str]) -> str:
    """The first three names."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def blocks_of(names: list[str]) -> str:
    """`down_blocks.0 (12), conv_out (2)`: how many of which block."""
    matches = (re.match(_BLOCK, name) for name in names)
    blocks = Counter(match.group(0) for match in matches if match)
    told = [f"{block} ({count})" for block, count in blocks.most_common(6)]
    return ", ".join(told) + (f" and {len(blocks) - 6} more blocks" if len(blocks) > 6 else "")
