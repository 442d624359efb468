"""A failed matrix product: which layer of this model takes that width, and what would have made the other one."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from svdtune.guards.explain.explanation import ENCODERS, Confidence, Explanation, believed, counted
from svdtune.guards.explain.messages import Message
from svdtune.guards.explain.numbers import Numbers, id_names

_OTHER_LAYERS = {"attn1", "ff", "ff_in", "time_pos_embed", "time_emb_proj", "proj_in", "proj_out", "visual_projection",
                 "to_q", "to_out", "time_embedding"}  # fmt: skip
_SAY_NOTHING = {"unet", "model", "module", "net", "accelerator", "pipe", "pipeline", "linear_1", "processor"}
_BATCH = 64
"""More rows than this are tokens or pixels, not clips."""


@dataclass(frozen=True)
class _Product:
    rows: int
    """0 where the text has a symbol instead."""
    given: int
    taken: int
    out: int

    @property
    def text(self) -> str:
        return f"({self.rows or 'rows '}x{self.given} and {self.taken}x{self.out})"


def product(message: Message, numbers: Numbers) -> list[Explanation]:
    """Causes of `mat1 and mat2 shapes cannot be multiplied` in either wording."""
    it = _Product(*message.numbers(0, 1, 2, 3))
    named = consumer_named(message)
    found: list[Explanation] = []
    if named == "time ids" or (named is None and message.site != "other"):
        found += _time_ids(it, message, numbers, named is not None)
    if named == "context" or (named is None and message.site != "other"):
        found += _context(it, message, numbers, named is not None)
    return found or [_linear(it, message)]


def consumer_named(message: Message) -> str | None:
    """Which reader of a conditioning tensor the stack names; `other` for any other module, None when it names none."""
    words = [word for path in message.modules for word in re.findall(r"\w+", path)]
    for word in reversed(words):
        if word == "add_embedding":
            return "time ids"
        # Every attention has to_k; only in SVD's own code, or below attn2, is it the cross-attention's.
        if word == "attn2" or (word in ("to_k", "to_v") and ("attn2" in words or message.site == "svd")):
            return "context"
        if word in _OTHER_LAYERS:
            return "other"
    return None if set(words) <= _SAY_NOTHING else "other"


def _time_ids(it: _Product, message: Message, numbers: Numbers, named: bool) -> list[Explanation]:
    if (it.taken, it.out) == (numbers.ids_width, numbers.time_width):
        return _of_this_model(it, message, numbers, named)
    if it.given == numbers.ids_width and it.out == numbers.time_width and it.rows <= _BATCH and numbers.ids:
        return _of_another_release(it, message, numbers, named)
    if not named:
        return []
    # SVD has three ids whatever their width: the layer's own width tells how wide one is.
    if message.site == "svd" and not numbers.own and it.taken % 3 == 0:
        guess = replace(numbers, source="three ids of one width, as in SVD", id_width=it.taken // 3, ids_width=it.taken)
        if found := _counts(it, message, guess):
            return [replace(one, confidence="medium", reason="the stack names add_embedding; that it takes three ids is assumed")
                    for one in found]  # fmt: skip
    return [_not_known(it, message, numbers)]


def _of_this_model(it: _Product, message: Message, numbers: Numbers, named: bool) -> list[Explanation]:
    found = _counts(it, message, numbers)
    if not found and (named or numbers.own):
        return [_narrower(it, message, numbers, named)] if numbers.ids and it.given % numbers.ids == 0 else []
    if len(found) == 1 and not (it.given in ENCODERS and it.taken in ENCODERS and not named):
        confidence = believed(message, numbers, named=named)
        confidence = "medium" if confidence == "low" and message.site == "bare" else confidence
        reason = (
            "the stack names add_embedding, and the numbers divide"
            if named
            else f"in-width, out-width and count fit {numbers.whose}"
        )
    else:
        confidence: Confidence = "medium" if named or numbers.own else "low"
        reason = "more than one cause gives these numbers; the shapes tell them apart"
    return [replace(one, confidence=confidence, reason=reason) for one in found]


def _counts(it: _Product, message: Message, numbers: Numbers) -> list[Explanation]:
    found = []
    if it.given % numbers.id_width == 0:
        found.append(_count(it, numbers))
    if it.rows and it.rows * it.given % numbers.ids_width == 0 and numbers.ids:
        found.append(_clips(it, numbers, it.rows * it.given // numbers.ids_width))
    return found


def _count(it: _Product, numbers: Numbers) -> Explanation:
    given, ids, rows = it.given // numbers.id_width, numbers.ids, it.rows or "batch"
    return Explanation(
        code="SHP402",
        title=f"{counted(given, 'time id')} for each clip instead of {ids}",
        confidence="high",
        reason="",
        evidence=f"{it.text}: {it.given} = {given} x {numbers.id_width}, {it.taken} = {ids} x {numbers.id_width}, where "
        f"{numbers.id_width} is addition_time_embed_dim and {it.out} the width of the time embedding ({numbers.whose}). So the layer "
        f"is add_embedding.linear_1, and added_time_ids was ({rows}, {given}), expected ({rows}, {ids}){id_names(ids)}.",
        why="Every id becomes addition_time_embed_dim numbers, and add_embedding takes the ids of one clip side by side.",
        fix=f"Give added_time_ids of shape ({rows}, {ids}){id_names(ids)}: one row for each clip, all {ids} columns.",
    )


def _clips(it: _Product, numbers: Numbers, clips: int) -> Explanation:
    return Explanation(
        code="SHP414",
        title=f"time ids for {counted(clips, 'clip')}, but a sample whose first axis is {it.rows}",
        confidence="high",
        reason="",
        evidence=f"{it.text}: {it.rows} x {it.given} = {it.rows * it.given} = {clips} x {it.taken}, so added_time_ids was "
        f"({clips}, {numbers.ids}), complete, for {counted(clips, 'clip')}; {it.taken} = {numbers.ids} x {numbers.id_width} is the width "
        f"of add_embedding ({numbers.whose}), and its rows come from the first axis of `sample`, {it.rows}.",
        why="The UNet reads the batch size from sample's first axis and reshapes the ids to that many rows. A 4-D sample without its "
        "frame axis, or with batch and frames flattened, fails here and not where the mistake is. Ids not doubled for classifier-free "
        "guidance too.",
        fix="Print sample.shape: it must have 5 axes (batch, frames, channels, height, width), and added_time_ids and "
        f"encoder_hidden_states one row for each of its batch. If batch is right as {it.rows}, give ids of shape "
        f"({it.rows}, {numbers.ids}).",
    )


def _narrower(it: _Product, message: Message, numbers: Numbers, named: bool) -> Explanation:
    ids, width = numbers.ids or 1, it.given // (numbers.ids or 1)
    return Explanation(
        code="SHP402",
        title=f"the ids are embedded {width} wide, add_embedding takes them {numbers.id_width} wide",
        confidence=believed(message, numbers, named=named),
        reason=f"in-width and out-width fit {numbers.whose}, and {it.given} is {ids} of one other width",
        evidence=f"{it.text}: {it.given} = {ids} x {width}, {it.taken} = {ids} x {numbers.id_width}.",
        why="addition_time_embed_dim of the config that was used is another than the one add_embedding's weights were made for.",
        fix=f"Set addition_time_embed_dim {numbers.id_width} in unet/config.json, or take it from the release of the weights.",
    )


def _of_another_release(it: _Product, message: Message, numbers: Numbers, named: bool) -> list[Explanation]:
    """add_embedding of another model: this model's ids come, another width is taken."""
    family = {256: "SV3D-u has 256, one id", 1280: "SV3D-p has 1280 = 256 + 512 + 512"}.get(it.taken)
    if it.taken % numbers.id_width and not named:
        return []
    confidence = believed(message, numbers, named=named)
    return [
        Explanation(
            code="SHP402",
            title="the UNet's add_embedding is that of another release",
            confidence="medium" if confidence == "high" else "low",
            reason=f"{it.given} and {it.out} fit {numbers.whose}" + ("; the stack names add_embedding" if named else "; no "
            "module is named"),
            evidence=f"{it.text}: {it.given} = {numbers.ids} x {numbers.id_width}, the ids of {numbers.source}, but this checkpoint's "
            f"layer takes {it.taken}{f' ({family})' if family and numbers.id_width == 256 else ''}.",
            why="SV3D and other derivatives share SVD's layout and take other conditions, so only this width tells them apart.",
            fix="Take the UNet weights and config.json from the same release as the code that makes the ids.",
        )
    ]  # fmt: skip


def _not_known(it: _Product, message: Message, numbers: Numbers) -> Explanation:
    return Explanation(
        code="SHP402",
        title=f"add_embedding takes {it.taken} numbers for each sample and got {it.given}",
        confidence="medium" if message.site == "svd" else "low",
        reason=f"the stack names add_embedding, but its widths are not those of {numbers.source}, so what they are made of is not known",
        evidence=f"{it.text}.",
        why="add_embedding takes everything that is added to the timestep side by side: in SVD the micro-conditions of one clip, each "
        "embedded to addition_time_embed_dim numbers; in SDXL a pooled text embedding and six such ids.",
        fix="Compare projection_class_embeddings_input_dim and addition_time_embed_dim in the UNet's config.json with what the code gives.",
    )  # fmt: skip


def _context(it: _Product, message: Message, numbers: Numbers, named: bool) -> list[Explanation]:
    level = it.out in numbers.channels
    own = it.taken == numbers.context and level
    known = {it.given, it.taken} <= ENCODERS.keys() and level
    if not (named or own or known):
        return []
    known_width = it.given in ENCODERS or it.given in (numbers.clip_hidden, numbers.clip_width)
    if named and own:
        confidence, reason = believed(message, numbers, named=True), "the stack names the cross-attention"
    elif named:
        confidence = "medium" if message.site == "svd" else "low"
        reason = f"the stack names a cross-attention, whose width {it.taken} is not that of {numbers.source}"
    elif own and known_width:
        confidence = believed(message, numbers, named=False)
        reason = f"{it.taken} and {it.out} fit {numbers.whose}"
    elif own:
        confidence, reason = (
            "low",
            f"{it.taken} and {it.out} fit {numbers.whose}; {it.given} is no known encoder's width",
        )
    else:
        confidence, reason = (
            "low",
            f"both widths are those of published encoders and {it.out} is a level of {numbers.whose}; no module is named",
        )
    return [_wide(it, numbers, confidence, reason, "image" if message.site == "svd" or own else "text or image")]  # fmt: skip


def _wide(it: _Product, numbers: Numbers, confidence: Confidence, reason: str, kind: str) -> Explanation:
    hidden = it.given == numbers.clip_hidden != numbers.clip_width
    told = [f"{width} is the width of {ENCODERS[width]}." for width in (it.given, it.taken) if width in ENCODERS]
    if hidden:
        told.append(f"{it.given} is also the hidden width of this model's image encoder, before its projection.")
        fix = f"Take image_embeds, not last_hidden_state: the projection brings {it.given} to {numbers.clip_width}."
    else:
        fix = (
            f"Take the encoder of the UNet's own release (its projection_dim is {it.taken}), or train a projection: "
            "conditioning.bridge=linear."
        )
    return Explanation(
        code="SHP403",
        title=f"{'perhaps ' * (confidence == 'low')}the {kind} embedding has width {it.given}, the cross-attention takes {it.taken}",
        confidence=confidence,
        reason=reason,
        evidence=" ".join([f"{it.text}: attn2.to_k or to_v takes {it.taken} and gives {it.out}, encoder_hidden_states came with "
                           f"{it.given}.", *told]),
        why="encoder_hidden_states goes into attn2.to_k and to_v, whose in-width is the UNet's cross_attention_dim; the encoder's "
        "projection_dim must equal it.",
        fix=fix,
    )  # fmt: skip


def _linear(it: _Product, message: Message) -> Explanation:
    where = f" (called as self.{message.modules[-1]})" if message.modules else ""
    return Explanation(
        code="SHP410",
        title=f"a Linear layer expects in_features={it.taken}, got {it.given}",
        confidence="low",
        reason="only the product itself is certain: nothing says that the layer is one of SVD's that takes a conditioning tensor",
        evidence=f"{it.text}{where}: {it.rows or 'some'} rows of {it.given} numbers into a layer {it.taken} -> {it.out}.",
        why="The last axis of a layer's input must be its in_features. Another layer, a flatten or a missing transpose before it made "
        "another.",
        fix=f"Make the layer's in_features {it.given}, or change what comes before it so that the last axis is {it.taken}; "
        "`svdtune trace FILE.py:Class --input SHAPE` shows every layer up to it.",
    )


CAUSES = {"product": product}
