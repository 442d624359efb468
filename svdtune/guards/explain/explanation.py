"""One possible cause of an error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from svdtune.guards.explain.messages import Message
    from svdtune.guards.explain.numbers import Numbers

Confidence = Literal["high", "medium", "low"]
RANK = {"high": 0, "medium": 1, "low": 2}
ENCODERS = {
    512: "CLIP ViT-B/32 (the class default)",
    768: "CLIP ViT-L/14 (Stable Diffusion 1.x)",
    1024: "OpenCLIP ViT-H/14 (SVD, Stable Diffusion 2.x)",
    1280: "OpenCLIP ViT-bigG, or the hidden states of ViT-H before its projection",
    2048: "the two encoders of SDXL together",
}
"""Widths that published encoders give, and that cross-attentions are made for."""


@dataclass(frozen=True)
class Explanation:
    """A cause that fits the text, how sure that is and why, and what mends it."""

    code: str
    """A rule of `guards/catalog.py`."""
    title: str
    confidence: Confidence
    reason: str
    """Why the confidence is what it is."""
    evidence: str
    """What of the text it rests on, with the arithmetic."""
    why: str
    fix: str


def commas(values: list[str]) -> str:
    """`a, b or c`."""
    return values[0] if len(values) == 1 else f"{', '.join(values[:-1])} or {values[-1]}"


def counted(number: int, noun: str) -> str:
    """`1 clip`, `2 clips`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def believed(message: Message, numbers: Numbers, *, named: bool) -> Confidence:
    """How far numbers that fit may be trusted: by whose code ran, and by whether the failing model's own were compared."""
    if message.site == "other":
        return "medium" if named else "low"
    if named or numbers.own:
        return "high"
    return "medium" if message.site == "svd" else "low"
