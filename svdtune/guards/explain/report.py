"""Text in, causes out; best first, nothing where nothing is known."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from difflib import get_close_matches
from typing import Any

from svdtune.guards.catalog import RULES
from svdtune.guards.explain import channels, loading, products, runtime, spatial
from svdtune.guards.explain.explanation import RANK, Explanation
from svdtune.guards.explain.messages import Message, last_errors, parse, shapes_in
from svdtune.guards.explain.numbers import Numbers, run_numbers, shipped_numbers

_CAUSES: dict[str, Callable[[Message, Numbers], list[Explanation]]] = {
    "product": products.product,
    "conv": channels.conv,
    "norm": channels.norm,
    "conv_rank": channels.conv_rank,
    "cat": spatial.cat,
    "cat_bare": spatial.cat,
    "broadcast": spatial.broadcast,
    "broadcast_fake": spatial.broadcast,
    "expand": spatial.expand,
    "expand_rank": spatial.expand,
    "view": spatial.view,
    "unpack": spatial.unpack,
    "clip_size": spatial.clip_size,
    "frame_limit": spatial.frame_limit,
    "load_cannot": loading.load,
    "load_size": loading.load,
    "load_versus": loading.load,
    "keys": loading.keys,
    "keys_log": loading.keys,
    "init": loading.init,
    "header": loading.header,
    "unreadable": loading.header,
    "lfs": loading.lfs,
    "missing_file": loading.missing_file,
    "revision": loading.hub,
    "hub": loading.hub,
    "dtype_conv": runtime.dtypes,
    "dtype_product": runtime.dtypes,
    "dtype_attention": runtime.dtypes,
    "unscale": runtime.unscale,
    "nan": runtime.nan,
    "attribute": runtime.attribute,
    "attribute_bare": runtime.attribute,
    "memory": runtime.memory,
    "launch_shape": runtime.launch_shape,
    "operator": runtime.operator,
    "device": runtime.device,
    "stack": runtime.stack,
    "short_clip": runtime.short_clip,
    "decode": runtime.decode,
    "reduction": runtime.ranks,
    "no_grad": runtime.ranks,
    "watchdog": runtime.ranks,
    "optimizer": runtime.ranks,
    "seed": runtime.ranks,
    "scheduler": runtime.scheduler,
    "empty_scalar": runtime.scheduler,
    "none_tensor": runtime.none_tensor,
}
_SHOWN = 3


def explain(text: str, facts: Numbers | None = None) -> list[Explanation]:
    """Causes that fit an error text, best first; empty when it is not known.

    `facts` are the numbers of the model that failed (`numbers_of`); without them SVD-XT's are tried, and said to be assumed.
    """
    numbers = facts or shipped_numbers()
    found: dict[tuple[str, str], Explanation] = {}
    for message in parse(text):
        for one in _CAUSES[message.kind](message, numbers):
            known = found.get((one.code, one.title))
            if known is None or RANK[one.confidence] < RANK[known.confidence]:
                found[one.code, one.title] = _with_ranks(one, message)
    ordered = sorted(found.values(), key=lambda one: RANK[one.confidence])
    ordered = list({(one.code, one.why, one.fix): one for one in reversed(ordered)}.values())[::-1]
    specific = [one for one in ordered if one.code != "SHP410"]
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
    return "\n\n".join(_block(number, one, len(explanations)) for number, one in enumerate(explanations[:_SHOWN], 1))


def as_json(explanations: Sequence[Explanation]) -> list[dict[str, str]]:
    """The array that `--json` prints."""
    return [asdict(one) for one in explanations]


def rule_text(code: str) -> str | None:
    """A rule of the catalog, or the nearest codes for a mistyped one; None when `code` does not look like one."""
    wanted = code.upper()
    if rule := RULES.get(wanted):
        return f"{rule.code}  {rule.title}\n\n{rule.why}\n\nfix: {rule.fix}"
    if len(wanted) > 8 or not wanted[:1].isalpha() or not any(c.isdigit() for c in wanted) or not wanted.isalnum():
        return None
    near = get_close_matches(wanted, sorted(RULES), n=3, cutoff=0.5)
    return f"no rule {wanted}." + (
        f" Did you mean {' or '.join(f'{c} ({RULES[c].title})' for c in near)}?" if near else ""
    )


def _with_ranks(one: Explanation, message: Message) -> Explanation:
    if len(message.ranks) < 2:
        return one
    return Explanation(**{**asdict(one), "evidence": f"{one.evidence} (ranks {', '.join(message.ranks)})"})


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
    return (
        f"I do not know this one.\n{said}\nTo find out more send the whole traceback from its first line, of the first rank that failed, "
        "with --config CONFIG;\n`svdtune trace FILE.py:Class --input SHAPE` follows the shapes of your own module."
    )
