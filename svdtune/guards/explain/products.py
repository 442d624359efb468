"""A failed matrix product: which layer of this model takes that width, and what would have made the other one."""

from __future__ import annotations

import re
from dataclasses import dataclass

from svdtune.guards.explain.explanation import Confidence, Explanation
from svdtune.guards.explain.messages import Message
from svdtune.guards.explain.numbers import Numbers, id_names

ENCODERS = {
    512: "CLIP ViT-B/32 (the class default)",
    768: "CLIP ViT-L/14",
    1024: "OpenCLIP ViT-H/14",
    1280: "OpenCLIP ViT-bigG, or the hidden states of ViT-H before its projection",
}
"""Widths that published image encoders give, and that cross-attentions are made for."""
_TIME_IDS = ("add_embedding",)
_CONTEXT = ("attn2", "to_k", "to_v")
_TIME = ("time_embedding",)
_OTHERS = (
    "attn1",
    "ff",
    "ff_in",
    "time_pos_embed",
    "time_emb_proj",
    "proj_in",
    "proj_out",
    "visual_projection",
    "to_q",
    "to_out",
)


@dataclass(frozen=True)
class _Product:
    rows: int
    given: int
    taken: int
    out: int

    @property
    def text(self) -> str:
        return f"({self.rows}x{self.given} and {self.taken}x{self.out})"


def product(message: Message, numbers: Numbers) -> list[Explanation]:
    """Causes of `mat1 and mat2 shapes cannot be multiplied` in either wording."""
    it = _Product(*message.numbers(0, 1, 2, 3))
    named = consumer_named(message.modules)
    found: list[Explanation] = []
    if named in (None, "time ids"):
        found += _time_ids(it, numbers, named is not None)
    if named in (None, "context"):
        found += _context(it, numbers, named is not None)
    return found or [_linear(it, message)]


def consumer_named(modules: tuple[str, ...]) -> str | None:
    """Which reader of a conditioning tensor the traceback names; `other` for any other module, None when it names none."""
    words = [word for path in modules for word in re.findall(r"\w+", path)]
    for word in reversed(words):
        if word in _TIME_IDS:
            return "time ids"
        if word in _CONTEXT:
            return "context"
        if word in _TIME or word in _OTHERS:
            return "other"
    return "other" if words and not _only_wrappers(words) else None


def _only_wrappers(words: list[str]) -> bool:
    """Names that say nothing about which layer it was."""
    return all(
        word in {"unet", "model", "module", "net", "accelerator", "pipe", "pipeline", "linear_1", "processor"}
        for word in words
    )


def _time_ids(it: _Product, numbers: Numbers, named: bool) -> list[Explanation]:
    if (it.taken, it.out) != (numbers.ids_width, numbers.time_width):
        return _other_release(it, numbers, named)
    total = it.rows * it.given
    found = []
    if it.given % numbers.id_width == 0:
        found.append(_count(it, numbers))
    if total % numbers.ids_width == 0 and numbers.ids:
        found.append(_clips(it, numbers, total // numbers.ids_width))
    return [_rated(one, numbers, named, unique=len(found) == 1 and not _maybe_context(it)) for one in found]


def _count(it: _Product, numbers: Numbers) -> Explanation:
    given, ids = it.given // numbers.id_width, numbers.ids
    return Explanation(
        "SHP402",
        f"{given} time id{'s' * (given != 1)} for each clip instead of {ids}",
        "high",
        "",
        f"{it.text}: {it.given} = {given} x {numbers.id_width}, {it.taken} = {ids} x {numbers.id_width}, where {numbers.id_width} is "
        f"addition_time_embed_dim, and {it.out} = 4 x {numbers.channels[0]} is the time embedding, of {numbers.whose}. So the layer is "
        f"add_embedding.linear_1, and added_time_ids was ({it.rows}, {given}), expected ({it.rows}, {ids}){id_names(ids)}.",
        "Every id becomes addition_time_embed_dim numbers, and add_embedding takes the ids of one clip side by side.",
        f"Give added_time_ids of shape ({it.rows}, {ids}){id_names(ids)}: one row for each clip, all {ids} columns.",
    )


def _clips(it: _Product, numbers: Numbers, clips: int) -> Explanation:
    what = f"{it.rows} x {it.given} = {it.rows * it.given} = {clips} x {it.taken}"
    return Explanation(
        "SHP414",
        f"time ids for {clips} clip{'s' * (clips != 1)}, but a sample whose first axis is {it.rows}",
        "high",
        "",
        f"{it.text}: {what}, so added_time_ids was ({clips}, {numbers.ids}), complete, for {clips} clips; {it.taken} = {numbers.ids} x "
        f"{numbers.id_width} is the width of add_embedding in {numbers.whose}, and its rows come from the first axis "
        f"of `sample`, {it.rows}.",
        "The UNet reads the batch size from sample's first axis and reshapes the ids to that many rows. A 4-D sample without its frame "
        "axis, or with batch and frames flattened, fails here and not where the mistake is. Ids not doubled for "
        "classifier-free guidance too.",
        f"Print sample.shape: it must have 5 axes (batch, frames, channels, height, width), and added_time_ids and encoder_hidden_states "
        f"one row for each of its batch. If batch is right as {it.rows}, repeat the ids to ({it.rows}, {numbers.ids}).",
    )


def _other_release(it: _Product, numbers: Numbers, named: bool) -> list[Explanation]:
    """add_embedding of another model: the widths are multiples of one id, but not this model's number of them."""
    whole = it.taken % numbers.id_width == 0 and it.given % numbers.id_width == 0 and numbers.ids is not None
    if whole and it.out == numbers.time_width and it.given == numbers.ids_width:
        wants = it.taken // numbers.id_width
        family = {
            1: "SV3D-u (elevation and azimuth left out)",
            5: "SV3D-p (noise augmentation, elevation, azimuth)",
        }.get(wants)
        svd = numbers.id_width == 256
        released = f"; published widths with 256: SVD 768, {family} {it.taken}" if family and svd else ""
        return [
            Explanation(
                "SHP402",
                "the UNet's add_embedding is that of another release",
                "medium" if named or family else "low",
                f"the traceback names add_embedding; {it.given} fits {numbers.source}"
                if named
                else f"{it.given} and {it.out} fit {numbers.whose}; no module is named",
                f"{it.text}: {it.given} = {numbers.ids} x {numbers.id_width}, the ids of {numbers.whose}, but this "
                f"checkpoint's layer takes "
                f"{it.taken}{released}.",
                "SV3D and other derivatives share SVD's layout and take other conditions, so only this width tells them apart.",
                "Take the UNet weights and config.json from the same release as the code that makes the ids.",
            )
        ]
    if not named:
        return []
    share = it.taken // it.given if it.taken % it.given == 0 else 0
    part = (
        f"{it.given} is 1/{share} of {it.taken}, as if 1 of {share} ids was given"
        if share > 1
        else f"{it.given} is no whole part of {it.taken}"
    )
    return [
        Explanation(
            "SHP402",
            f"add_embedding takes {it.taken} numbers for each clip and got {it.given}",
            "medium",
            f"the traceback names add_embedding, but its widths are not those of {numbers.source}, so the number of ids is not known",
            f"{it.text}: {part}.",
            "add_embedding takes all micro-conditions of one clip side by side, each embedded to addition_time_embed_dim numbers.",
            "Give as many ids as projection_class_embeddings_input_dim / addition_time_embed_dim of this UNet's config.json.",
        )
    ]


def _maybe_context(it: _Product) -> bool:
    return it.given in ENCODERS and it.taken in ENCODERS


def _context(it: _Product, numbers: Numbers, named: bool) -> list[Explanation]:
    into = it.out in numbers.channels
    is_own = it.taken == numbers.context and into
    other = it.taken in ENCODERS and into and it.given in ENCODERS
    if not (named or is_own or other):
        return []
    if is_own and not named and it.given not in ENCODERS and it.given not in (numbers.clip_hidden, numbers.clip_width):
        return [
            _wide(
                it,
                numbers,
                "low",
                f"{it.taken} and {it.out} fit {numbers.whose}; {it.given} is no known encoder's width",
            )
        ]
    if is_own:
        sure = named or numbers.own
        reason = "the traceback names the cross-attention" if named else f"{it.taken} and {it.out} fit {numbers.whose}"
        return [_wide(it, numbers, "high" if sure else "low", reason)]
    if named:
        return [
            _wide(
                it,
                numbers,
                "medium",
                f"the traceback names the cross-attention, whose width {it.taken} is not {numbers.source}'s",
            )
        ]
    return [
        _wide(
            it,
            numbers,
            "low",
            f"both widths are those of published encoders and {it.out} is a level of {numbers.whose}; no module is named",
        )
    ]


def _wide(it: _Product, numbers: Numbers, confidence: Confidence, reason: str) -> Explanation:
    encoders = "; ".join(
        f"{width} is the width of {ENCODERS[width]}" for width in (it.given, it.taken) if width in ENCODERS
    )
    hidden = (
        f" {it.given} is also the hidden width of this model's image encoder: its projection was left out (take image_embeds, not "
        "last_hidden_state)."
        if it.given == numbers.clip_hidden != numbers.clip_width
        else ""
    )
    return Explanation(
        "SHP403",
        f"{'perhaps ' * (confidence == 'low')}the image embedding has width {it.given}, the cross-attention takes {it.taken}",
        confidence,
        reason,
        f"{it.text}: attn2.to_k or to_v takes {it.taken} and gives {it.out}, encoder_hidden_states came with "
        f"{it.given}. {encoders}{'.' * bool(encoders)}{hidden}",
        "encoder_hidden_states goes into attn2.to_k and to_v, whose in-width is the UNet's cross_attention_dim; the image encoder's "
        "projection_dim must equal it.",
        f"Take the image encoder of the UNet's own release (projection_dim {it.taken}), or train a projection: "
        f"conditioning.bridge=linear.",
    )


def _rated(one: Explanation, numbers: Numbers, named: bool, *, unique: bool) -> Explanation:
    if unique and (named or numbers.own):
        confidence: Confidence = "high"
        reason = (
            "the traceback names add_embedding, and the numbers divide"
            if named
            else f"in-width and out-width fit {numbers.source} exactly"
        )
    elif unique:
        confidence, reason = "medium", f"in-width, out-width and count fit {numbers.whose}; the text names no module"
    else:
        confidence, reason = (
            "medium" if named or numbers.own else "low",
            "more than one cause gives these numbers; the shapes tell them apart",
        )
    return Explanation(one.code, one.title, confidence, reason, one.evidence, one.why, one.fix)


def _linear(it: _Product, message: Message) -> Explanation:
    where = f" (called as self.{message.modules[-1]})" if message.modules else ""
    return Explanation(
        "SHP410",
        f"a Linear layer expects in_features={it.taken}, got {it.given}",
        "low",
        "only the product itself is certain: these widths fit no layer of SVD that takes a conditioning tensor",
        f"{it.text}{where}: {it.rows} rows of {it.given} numbers into a layer {it.taken} -> {it.out}.",
        "The last axis of a layer's input must be its in_features. Another layer, a flatten or a missing transpose "
        "before it made another.",
        f"Make the layer's in_features {it.given}, or change what comes before it so that the last axis is {it.taken}; "
        "`svdtune trace FILE.py:Class --input SHAPE` shows every layer up to it.",
    )
