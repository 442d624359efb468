"""The verified changes written into the YAML, its comments kept."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from svdtune.config.load import load_config
from svdtune.errors import UsageError


def write_repaired(source: Path, target: Path, overrides: Sequence[str], *, option: str = "--fix") -> None:
    """`source` with `overrides` (`section.key=value`) set, written to `target`; what is not named stays as it was written.

    Raises UsageError when `target` is another file that exists, ConfigError when the result would not load.
    """
    if target.exists() and not target.samefile(source):
        raise UsageError(
            f"{option}: {target} exists already; give another name, or {source} itself to change it in place"
        )
    if not target.absolute().parent.is_dir():
        raise UsageError(f"{option}: there is no folder {target.parent} to write {target.name} in")
    written = source.read_bytes().decode("utf-8")
    text = written.replace("\r\n", "\n")
    yaml = _like(text)
    tree = yaml.load(text) or {}
    for override in overrides:
        key, _, value = override.partition("=")
        section, _, option = key.partition(".")
        if not tree.get(section):
            tree[section] = {}
        tree[section][option] = _kept(tree[section].get(option), _value(value))
    partial = target.with_name(f".{target.name}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\r\n" if text != written else "\n") as file:
            yaml.dump(tree, file)
        load_config(partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _like(text: str) -> Any:
    """A reader and writer of YAML that indents as `text` does."""
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096
    yaml.representer.add_representer(
        type(None), lambda made, _: made.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    option = re.search(r"^( +)\w+:", text, re.MULTILINE)
    item = re.search(r"^( *)\w+:[ \t]*(?:#.*)?\n(?: *#.*\n)*( *)- ", text, re.MULTILINE)
    offset = len(item[2]) - len(item[1]) if item else 0
    yaml.indent(mapping=len(option[1]) if option else 2, sequence=offset + 2, offset=offset)
    return yaml


def _value(text: str) -> Any:
    from ruamel.yaml import YAML

    return YAML().load(text) if text else ""


def _kept(old: Any, new: Any) -> Any:
    """A list as it was written, with the items that are gone taken out and those that are new put in: comments stay."""
    if not isinstance(old, list) or not isinstance(new, list) or not all(item in old for item in new):
        return new
    for item in [item for item in old if item not in new]:
        del old[old.index(item)]
    return old if list(old) == list(new) else new
