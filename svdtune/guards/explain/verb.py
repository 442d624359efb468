"""`svdtune explain`: where the text comes from, and in which form the answer goes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from svdtune.config.load import load_config
from svdtune.errors import UsageError
from svdtune.guards.explain.numbers import run_numbers
from svdtune.guards.explain.report import as_json, explain, render, rule_text


def explain_verb(target: str, config: Path | None, *, json_out: bool) -> str:
    """What to print for FILE, `-`, a rule's code, or the message itself. Raises UsageError when it is none of them."""
    if (rule := rule_text(target)) is not None and not Path(target).exists():
        return json.dumps({"rule": rule}) if json_out else rule
    text = _text(target)
    numbers, unknown = run_numbers(load_config(config)) if config else (None, "")
    found = explain(text, numbers)
    if json_out:
        return json.dumps({"findings": as_json(found)}, indent=2)
    note = f"The model of {config} cannot be used: {unknown}. SVD-XT's numbers are assumed.\n\n" if unknown else ""
    return note + render(found, text)


def _text(target: str) -> str:
    if target == "-":
        return sys.stdin.read()
    if any(c.isspace() for c in target):
        return target
    path = Path(target)
    if len(target) > 255:
        return target
    if path.is_file():
        return path.read_bytes().decode("utf-8", errors="replace")
    raise UsageError(
        f"{target}: no such file, and no rule's code. Give a file with the error text, - for standard input, a code such as SHP402, "
        'or the message in quotes: svdtune explain "RuntimeError: mat1 and mat2 ..."'
    )
