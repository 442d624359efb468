"""A failure of the step, told: which record field or module, what came, what was expected, what would mend it, why in SVD."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import nn

from svdtune.contracts import Axes, Mismatch, UNetInput, check
from svdtune.errors import ContractError, SvdtuneError
from svdtune.guards.calls import Call, record_calls, tensors_in
from svdtune.guards.findings import Finding
from svdtune.guards.place import frame_of, place_of
from svdtune.trainer.step import Parts

_CODES = {
    "UNetInput.added_time_ids": "SHP402",
    "UNetInput.encoder_hidden_states": "SHP403",
    "UNetInput.sample": "SHP404",
}
_WHY = {
    "UNetInput.added_time_ids": "Every id becomes addition_time_embed_dim numbers and add_embedding takes them all at once, flattened: "
    "another number of ids does not fit, and transposed ones mix clips without an error.",
    "UNetInput.encoder_hidden_states": "SVD's image context is one token per clip; the UNet itself repeats it for every frame. "
    "Cross-attention is folded on that and refuses more; other axes or rows do not fit.",
    "UNetInput.sample": "The UNet reads (batch, frames, channels, height, width): noisy latents and conditioning latents side by side "
    "on the channel axis (dim 2). With frames and channels swapped it fails, or runs silently where they are equally many.",
    "UNetInput.timestep": "One noise level per clip: ln(sigma) / 4.",
    "VideoBatch.pixels": "The VAE and the CLIP tower see frames as (batch, channels, height, width) in RGB.",
    "Draws.sigma": "One noise level per clip; one per frame or per batch trains something else.",
}
_FEEDS = (
    ("add_embedding", "UNetInput.added_time_ids"),
    ("add_time_proj", "UNetInput.added_time_ids"),
    ("time_embedding", "UNetInput.timestep"),
    ("time_proj", "UNetInput.timestep"),
    ("attn2", "UNetInput.encoder_hidden_states"),
    ("image_bridge", "UNetInput.encoder_hidden_states"),
)
"""Part of a module path in the UNet, and the field that is read there."""


def told(error: Exception, parts: Parts, axes: Axes, again: Callable[[], object]) -> list[Finding]:
    """Findings for `error`, raised by a step at `axes`; `again` repeats the step's forward pass, to watch the modules."""
    if isinstance(error, ContractError) and error.mismatches:
        return [_field(mismatch) for mismatch in error.mismatches]
    if isinstance(error, SvdtuneError):
        return [Finding("SHP401", "error", "train_step", str(error))]
    calls = _watched(parts, again)
    stack = [call for call in calls if not call.done]
    unet_call = next((call for call in stack if call.module is parts.unet), None)
    wrong = _wrong_arguments(unet_call.arguments, unet_call.keywords, axes) if unet_call else []
    if wrong:
        return [_field(mismatch) for mismatch in wrong]
    return [_module(stack[-1], error) if stack else _outside(error)]


def plain(error: Exception) -> str:
    """The message in the wording of real tensors (fake ones word a failed product otherwise)."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else ""
    shapes = re.search(r"got \[(\d+), (\d+)\] X \[(\d+), (\d+)\]", text)
    if shapes:
        a, b, c, d = shapes.groups()
        text = f"mat1 and mat2 shapes cannot be multiplied ({a}x{b} and {c}x{d})"
    if type(error).__name__ in ("DataDependentOutputException", "DynamicOutputShapeException"):
        text += " (a value is read on the host, such as by .item(), bool() or a mask: the GPU would wait for it in every step)"
    return f"{type(error).__name__}: {text}".rstrip(": ")


def _field(mismatch: Mismatch) -> Finding:
    return Finding(
        _CODES.get(mismatch.where, "SHP401"),
        "error",
        mismatch.where,
        mismatch.got,
        f"{mismatch.expected}, {mismatch.meaning}",
        _WHY.get(mismatch.where, ""),
        mismatch.hint,
    )


def _watched(parts: Parts, again: Callable[[], object]) -> list[Call]:
    """Module calls of all three networks, in order, up to where the forward pass fails (if it does)."""
    with ExitStack() as stack:
        recorded = [
            stack.enter_context(record_calls(network, name))
            for name, network in (("unet", parts.unet), ("vae", parts.vae), ("image_encoder", parts.image_encoder))
        ]
        try:
            again()
        except Exception:  # the failure that is being told
            return [call for calls in recorded for call in calls]
    return []


def told_arguments(arguments: tuple[Any, ...], keywords: dict[str, Any], axes: Axes) -> list[Finding]:
    """Findings for a call of the UNet that runs and is not given what the table says."""
    return [_field(mismatch) for mismatch in _wrong_arguments(arguments, keywords, axes)]


def _wrong_arguments(arguments: tuple[Any, ...], keywords: dict[str, Any], axes: Axes) -> list[Mismatch]:
    """Which of the UNet's arguments is not what the table says."""
    given: list[Any] = [*arguments, *keywords.values()]
    if len(arguments) < 2 or not {"encoder_hidden_states", "added_time_ids"} <= set(keywords):
        return []
    sample, timestep = given[:2]
    record = UNetInput(sample, timestep, keywords["encoder_hidden_states"], keywords["added_time_ids"])
    # The compute dtype was chosen on purpose; only shapes are in question here.
    return [m for m in check(record, axes) if m.expected.startswith("(")]


def _module(call: Call, error: Exception) -> Finding:
    where = call.path or type(call.module).__name__
    network, _, inside = where.partition(".")
    fields = {"unet": "UNetInput.sample", "vae": "VideoBatch.pixels", "image_encoder": "VideoBatch.pixels"}
    field = next((name for part, name in _FEEDS if part in inside), fields.get(network, ""))
    kind, shapes = type(call.module).__name__, ", ".join(map(str, call.inputs)) or "no tensors"
    if re.search(r"dtype|Input type", str(error)):
        given = ", ".join(str(t.dtype).removeprefix("torch.") for t in tensors_in((call.arguments, call.keywords)))
        weights = next((str(p.dtype).removeprefix("torch.") for p in call.module.parameters()), "")
        return Finding(
            "SHP401", "error", where, f"{kind} was given {given}: {plain(error)}", f"{weights}, the type of its weights",
            "Under autocast types are made equal; outside it they must be. The VAE and the loss run in float32 outside it.",
            "Cast the input where it is made, or keep the call inside (or outside) autocast as it was.",
        )  # fmt: skip
    return Finding(
        "SHP401", "error", where,
        f"{kind} was given {shapes}: {plain(error)}",
        _takes(call),
        f"It is fed by {field}. {_WHY.get(field, '')}".strip(),
        "The networks' own configs and the record that feeds this module disagree; take all parts from one release, or mend the "
        "code that makes the record.",
    )  # fmt: skip


def _takes(call: Call) -> str:
    """What the innermost module says of itself."""
    module = call.module
    for kind, attribute, axis in (
        (nn.Linear, "in_features", "last axis"),
        (nn.Conv2d | nn.Conv3d, "in_channels", "axis 1"),
        (nn.GroupNorm, "num_channels", "axis 1"),
    ):
        if isinstance(module, kind):
            return f"{axis} = {getattr(module, attribute)} ({attribute})"
    if isinstance(module, nn.LayerNorm):
        return f"last axes = {tuple(module.normalized_shape)}"
    return ""


def _outside(error: Exception) -> Finding:
    """It failed in our own code between the networks, or in the backward pass."""
    if "does not require grad" in str(error):
        return Finding(
            "SHP406", "error", "train_step", "the loss has no way back to any trained parameter", "a gradient for each",
            "backward raises \"element 0 of tensors does not require grad\": the UNet's answer is detached, or the UNet is called "
            "under no_grad.", "Take the detach or no_grad on the way from the UNet to the loss away.",
        )  # fmt: skip
    frame = frame_of(error)
    if frame is None:
        return Finding(
            "SHP401",
            "error",
            "backward pass",
            plain(error),
            why="The forward pass runs; this gradient cannot be computed.",
        )
    return Finding("SHP401", "error", place_of(error), plain(error), why=f"The line is `{frame.line}`.")
