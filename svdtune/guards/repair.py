"""The verified changes written into the YAML, its comments kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from svdtune.config.load import load_config
from svdtune.errors import UsageError


def write_repaired(source: Path, target: Path, overrides: Sequence[str]) -> None:
    """`source` with `overrides` (`section.key=value`) set, written to `target`; what is not named stays as it was written.

    Raises UsageError when `target` is another file that exists, ConfigError when the result would not load.
    """
    if target.exists() and not target.samefile(source):
        raise UsageError(f"--fix: {target} exists already; give another name, or {source} itself to change it in place")
    if not target.absolute().parent.is_dir():
        raise UsageError(f"--fix: there is no folder {target.parent} to write {target.name} in")
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096
    tree = yaml.load(source.read_text(encoding="utf-8")) or {}
    for override in overrides:
        key, _, text = override.partition("=")
        section, _, option = key.partition(".")
        if not tree.get(section):
            tree[section] = {}
        tree[section][option] = _value(text)
    partial = target.with_name(f".{target.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            yaml.dump(tree, file)
        load_config(partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _value(text: str) -> Any:
    from ruamel.yaml import YAML

    return YAML().load(text) if text else ""
