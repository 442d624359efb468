"""`svdtune explain`: where the text comes from, and in which form the answer goes."""

from __future__ import annotations

import codecs
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path

from svdtune.config.load import load_config
from svdtune.errors import UsageError
from svdtune.guards.catalog import RULES
from svdtune.guards.explain.numbers import run_numbers
from svdtune.guards.explain.report import as_json, explain, nearest_rules, render

_LONGEST_NAME = 255


def explain_verb(target: str, config: Path | None, *, json_out: bool) -> str:
    """What to print for FILE, `-`, a rule's code, or the message itself. Raises UsageError when it is none of them."""
    rule = RULES.get(target.upper())
    if rule is not None and not Path(target).exists():
        return json.dumps({"rule": asdict(rule)}, indent=2) if json_out else (
            f"{rule.code}  {rule.title}\n\n{rule.why}\n\nfix: {rule.fix}"
        )  # fmt: skip
    text = _text(target)
    numbers, unknown = run_numbers(load_config(config)) if config else (None, "")
    note = f"The model of {config} cannot be used: {unknown}. SVD-XT's numbers are assumed." if unknown else ""
    found = explain(text, numbers)
    if json_out:
        return json.dumps({"findings": as_json(found), **({"note": note} if note else {})}, indent=2)
    return "\n\n".join(filter(None, [note, render(found, text)]))


def _text(target: str) -> str:
    if target == "-":
        return _decoded(sys.stdin.buffer.read())
    path = Path(target)
    if len(target) <= _LONGEST_NAME and "\n" not in target and path.exists():
        if path.is_dir():
            raise UsageError(f"{target} is a folder. Give the file in it that holds the error text.")
        return _decoded(path.read_bytes())
    if len(target) > _LONGEST_NAME or re.search(r"\s|(?:Error|Exception)$", target):
        return target
    near = f" Did you mean {near}?" if (near := nearest_rules(target)) else ""
    raise UsageError(
        f"{target}: no such file, and no rule's code.{near} Give a file with the error text, - for standard input, a code such as SHP402, "
        'or the message in quotes: svdtune explain "RuntimeError: mat1 and mat2 ..."'
    )


def _decoded(raw: bytes) -> str:
    """UTF-8, or the UTF-16 that PowerShell writes; what is neither is replaced."""
    wide = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return raw.decode("utf-16" if wide else "utf-8-sig", errors="replace")
