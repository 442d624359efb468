"""One possible cause of an error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Confidence = Literal["high", "medium", "low"]


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


RANK = {"high": 0, "medium": 1, "low": 2}


def commas(values: list[str]) -> str:
    """`a, b or c`."""
    return values[0] if len(values) == 1 else f"{', '.join(values[:-1])} or {values[-1]}"
