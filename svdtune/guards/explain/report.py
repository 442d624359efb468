"""Text in, causes out; best first, nothing where nothing is known."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from difflib import get_close_matches
from typing import Any

from svdtune.guards.catalog import RULES
from svdtune.guards.explain import channels, loading, plain, products, runtime, spatial
from svdtune.guards.explain.explanation import RANK, Explanation
from svdtune.guards.explain.messages import Message, last_errors, parse, shapes_in, shortened
from svdtune.guards.explain.numbers import Numbers, run_numbers, shipped_numbers

CAUSES: dict[str, Callable[[Message, Numbers], list[Explanation]]] = {
    **products.CAUSES, **channels.CAUSES, **spatial.CAUSES, **loading.CAUSES, **runtime.CAUSES, **plain.CAUSES,
}  # fmt: skip
"""Kind of message to the function that reasons about it."""
_SHOWN = 3
_GENERIC = "SHP410"
_COLLECTIVE = re.compile(r"nccl|gloo|Dist\w*Error|[Tt]imed out|[Ww]atchdog|closed by|collective|SIGABRT", re.IGNORECASE)


def explain(text: str, facts: Numbers | None = None) -> list[Explanation]:
    """Causes that fit an error text, best first; empty when it is not known.

    `facts` are the numbers of the model that failed (`numbers_of`); without them SVD-XT's are tried, and said to be assumed.
    """
    numbers = facts or shipped_numbers()
    found: dict[tuple[str, str, str], tuple[bool, Explanation]] = {}
    for message in parse(text):
        for one in CAUSES[message.kind](message, numbers):
            if not message.last and one.confidence == "high":
                one = replace(
                    one, confidence="medium", reason=f"{one.reason}; but it is not the error that the text ends with"
                )
            if not message.raised and one.confidence != "low":
                one = replace(one, confidence="low", reason=f"{one.reason}; but no line of the text is an error's")
            key = (one.code, one.why, one.fix)
            if key not in found or RANK[one.confidence] < RANK[found[key][1].confidence]:
                found[key] = (message.last, _with_ranks(one, message))
    pairs = sorted(found.values(), key=lambda pair: (RANK[pair[1].confidence], not pair[0]))
    ordered, ends_with = [one for _, one in pairs], {one.code for last, one in pairs if last}
    if ends_with == {_GENERIC}:
        return ordered
    # A mismatch that fits no pattern is not worth saying beside something better.
    specific = [_with_culprit(one, text) for one in ordered if one.code != _GENERIC]
    if any(one.code == "CKP254" for one in specific):
        # The reader's complaint about the header is only the first half of a chained error.
        specific = [one for one in specific if one.code != "CKP252"]
    return specific or ordered


def explain_exception(error: BaseException, config: Any = None) -> str | None:
    """A few lines about an uncaught exception, for printing before its traceback; None when it is not known.

    `config` is the run's `Config`: its model gives exact numbers. Low confidence is not enough to speak unasked.
    """
    numbers, _ = run_numbers(config) if config is not None else (None, "")
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    sure = [one for one in explain(text, numbers) if one.confidence != "low"]
    return render(sure[:1]) if sure else None


def render(explanations: Sequence[Explanation], text: str = "") -> str:
    """What the CLI prints; for an empty list what was understood of `text`, and what to send."""
    if not explanations:
        return _unknown(text)
    blocks = [_block(number, one, len(explanations)) for number, one in enumerate(explanations[:_SHOWN], 1)]
    if len(explanations) > _SHOWN:
        blocks.append(f"({len(explanations) - _SHOWN} less likely; --json shows all)")
    if text and not any(message.last for message in parse(text)):
        blocks.append(f"The text ends with another error, which I do not know: {last_errors(text)[-1][:200]}")
    return "\n\n".join(blocks)


def as_json(explanations: Sequence[Explanation]) -> list[dict[str, str]]:
    """The array that `--json` prints."""
    return [asdict(one) for one in explanations]


def nearest_rules(code: str) -> str:
    """Rules whose codes are near a mistyped one, as `SHP402 (its title) or ...`; empty where it looks like none."""
    if not re.fullmatch(r"[A-Za-z]{2,4}\d{1,4}", code):
        return ""
    near = get_close_matches(code.upper(), sorted(RULES), n=3, cutoff=0.5)
    return " or ".join(f"{code} ({RULES[code].title})" for code in near)


def _with_culprit(one: Explanation, text: str) -> Explanation:
    """A rank that waited says nothing of the cause; another error in the text does."""
    if one.code != "DST803":
        return one
    others = [line for line in last_errors(text) if not _COLLECTIVE.search(line)]
    if not others:
        return one
    return replace(one, evidence=f"{one.evidence} Another rank's own error: {others[0][:200]}",
                   fix=f"Mend that error first. {one.fix}")  # fmt: skip


def _with_ranks(one: Explanation, message: Message) -> Explanation:
    if len(message.ranks) < 2:
        return one
    return replace(one, evidence=f"{one.evidence} (ranks {', '.join(message.ranks)})")


def _block(number: int, one: Explanation, of: int) -> str:
    head = f"{number}. " if of > 1 else ""
    return (
        f"{head}{one.code}  {one.title}\n  confidence {one.confidence}: {one.reason}\n  evidence: {one.evidence}\n"
        f"  why: {one.why}\n  fix: {one.fix}"
    )


def _unknown(text: str) -> str:
    errors, shapes = last_errors(text), shapes_in(text)
    understood = [f"  error: {line}" for line in errors[-2:]] + (
        [f"  shapes: {', '.join(shapes[:8])}"] if shapes else []
    )
    said = (
        "\n".join(["What I could read:", *understood]) if understood else "I found no error line and no shapes in it."
    )
    if len(shortened(text)) < len(text):
        said += f"\nOf this long text I read the start and the end ({len(shortened(text)) // 1000} of {len(text) // 1000} kB)."
    return (
        f"I do not know this one.\n{said}\nTo find out more send the whole traceback from its first line, of the first rank that failed, "
        "with --config CONFIG;\n`svdtune trace FILE.py:Class --input SHAPE` follows the shapes of your own module."
    )
