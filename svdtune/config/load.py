"""YAML and `section.key=value` overrides into a `Config`; every error says where the value was written.

OmegaConf's structured configs judge each value by itself, so that a mistake is known by its key and its line.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from svdtune.config.schema import Config
from svdtune.errors import ConfigError

_REFERENCE = re.compile(r"\$\{(?:(?P<key>\w+\.\w+)|oc\.env:\s*(?P<variable>\w+)\s*(?:,[^${}]*)?)\}")
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)
# The values that were written as `${...}`, kept beside the fields of a loaded Config so that a dump repeats what was
# written and not what the environment held.
_INTERPOLATIONS = "_interpolations"
_LISTED = 5


@dataclass(frozen=True)
class _Entry:
    """One value as somebody wrote it."""

    key: str
    value: Any
    where: str


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The run that the YAML at `path` describes, with `overrides` (`section.key=value`) on top.

    Raises ConfigError, its message starting with `file:line:` or `override '...':`.
    """
    entries = [*_read_yaml(Path(path)), *map(_read_override, overrides)]
    merged = OmegaConf.structured(Config)
    for entry in entries:
        _assign(merged, entry)
    config = _build(merged, {entry.key: entry.where for entry in entries}, str(path))
    final = {entry.key: entry.value for entry in entries}
    vars(config)[_INTERPOLATIONS] = {key: value for key, value in final.items() if "${" in str(value)}
    return config


def with_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """A copy of `config` with `overrides` (`section.key=value`) on top. Raises ConfigError as `load_config` does."""
    merged = OmegaConf.structured(Config)
    for section, options in asdict(config).items():
        for key, value in options.items():
            OmegaConf.update(merged, f"{section}.{key}", value, merge=False)
    entries = [_read_override(override) for override in overrides]
    for entry in entries:
        _assign(merged, entry)
    changed = _build(merged, {entry.key: entry.where for entry in entries}, "override")
    written = vars(config).get(_INTERPOLATIONS, {})
    given = {entry.key for entry in entries}
    vars(changed)[_INTERPOLATIONS] = {key: value for key, value in written.items() if key not in given}
    return changed


def resolved_yaml(config: Config) -> str:
    """Every option of `config` as YAML that loads again; what was written as `${...}` is written so again."""
    options = asdict(config)
    for key, written in vars(config).get(_INTERPOLATIONS, {}).items():
        section, name = key.split(".")
        options[section][name] = written
    return OmegaConf.to_yaml(OmegaConf.create(options), resolve=False)


@cache
def option_types() -> dict[str, Any]:
    """Type of every option by its full key (`data.width`)."""
    return {
        f"{section}.{name}": hint
        for section, section_type in get_type_hints(Config).items()
        for name, hint in get_type_hints(section_type).items()
    }


def _read_yaml(path: Path) -> list[_Entry]:
    text = _read_text(path)
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is None:
            raise ConfigError(f"{path}: the file is empty; expected sections such as run:, data:, train:")
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{path}:1: expected sections such as `run:` and `data:`, got {text.strip()[:40]!r}")
        _check_keys(root, path)
        values = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except yaml.MarkedYAMLError as error:
        raise ConfigError(_syntax_message(path, error)) from None
    assert isinstance(values, dict)
    return list(_entries(root, values, path))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file.{_nearest_yaml(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text: {error}") from None


def _nearest_yaml(path: Path) -> str:
    folders = {folder.resolve(): folder for folder in (Path("."), Path("configs"), path.parent)}
    names = {str(found): found.stem for folder in folders.values() for found in sorted(folder.glob("*.y*ml"))}
    close = get_close_matches(path.stem, names.values(), n=1)
    nearest = [found for found, name in names.items() if name in close]
    if nearest:
        return f" Did you mean {nearest[0]}?"
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f" There are: {', '.join(list(names)[:_LISTED])}{more}." if names else ""


def _syntax_message(path: Path, error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    where = f"{path}:{mark.line + 1}" if mark else str(path)
    problem = error.problem or error.context or "cannot be parsed"
    hint = " YAML is indented by spaces; replace the tab." if "\\t" in problem else ""
    return f"{where}: not valid YAML: {problem}.{hint}"


def _check_keys(mapping: yaml.MappingNode, path: Path, parent: str = "") -> None:
    """Refuse duplicate keys, `<<` merges and keys that are no scalar: their lines could not be told."""
    lines: dict[str, int] = {}
    for key_node, value_node in mapping.value:
        key, line = f"{parent}{key_node.value}", key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode) or key_node.value == "<<":
            raise ConfigError(f"{path}:{line}: got the key {key_node.value!r}, expected a plain name")
        if key in lines:
            raise ConfigError(f"{path}:{line}: {key} is given twice, first in line {lines[key]}; keep one")
        lines[key] = line
        if not parent and isinstance(value_node, yaml.MappingNode):
            _check_keys(value_node, path, f"{key}.")


def _entries(root: yaml.MappingNode, values: dict[Any, Any], path: Path) -> Iterator[_Entry]:
    """The options below the sections of `root`, in the order of the file."""
    for (key_node, node), (name, section) in zip(root.value, values.items(), strict=True):
        where = f"{path}:{key_node.start_mark.line + 1}"
        if name not in get_type_hints(Config):
            raise ConfigError(f"{where}: {_unknown_section(str(name))}")
        if not isinstance(section, dict) or not isinstance(node, yaml.MappingNode):
            got = "nothing" if section is None else repr(section)
            raise ConfigError(
                f"{where}: {name}: got {got}, expected options below it, such as `{_options(str(name))[0]}: ...`. "
                "To keep all defaults remove the section"
            )
        for (option_node, _), (option, value) in zip(node.value, section.items(), strict=True):
            yield _Entry(f"{name}.{option}", value, f"{path}:{option_node.start_mark.line + 1}")


def _read_override(override: str) -> _Entry:
    where = f"override {override!r}"
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"{where}: no '='; expected section.key=value, such as train.steps=100")
    section, _, option = key.partition(".")
    if section in get_type_hints(Config) and not option:
        raise ConfigError(
            f"{where}: {section!r} is a section; expected section.key=value, such as {section}.{_options(section)[0]}=..."
        )
    if section not in get_type_hints(Config):
        raise ConfigError(f"{where}: {_unknown_section(key if not option else section)}")
    if _is_text(option_types().get(key)) and text not in ("", "null"):
        return _Entry(key, text, where)
    try:
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{where}: {text!r} is not valid YAML: {error.problem}") from None
    assert isinstance(parsed, dict)
    return _Entry(key, parsed["value"], where)


def _assign(merged: DictConfig, entry: _Entry) -> None:
    hint = option_types().get(entry.key)
    if hint is None:
        raise ConfigError(f"{entry.where}: {_unknown_option(entry.key)}")
    _refuse_secrets(entry)
    problem = f"{entry.where}: {entry.key}: got {entry.value!r}, expected {_describe(hint)}"
    if _is_text(hint) and isinstance(entry.value, bool | int | float):
        read_as = {bool: "a bool", int: "an int", float: "a float"}[type(entry.value)]
        raise ConfigError(f"{problem}; put it in quotes, or YAML reads it as {read_as}")
    try:
        OmegaConf.update(merged, entry.key, entry.value, merge=False)
    except OmegaConfBaseException:
        raise ConfigError(problem) from None


def _refuse_secrets(entry: _Entry) -> None:
    """Only `${section.key}` and `${oc.env:NAME}` are allowed, and no NAME that sounds like a secret."""
    for text in filter(lambda item: isinstance(item, str), _flatten(entry.value)):
        for reference in _REFERENCE.finditer(text):
            if _SECRET.search(reference["variable"] or ""):
                raise ConfigError(
                    f"{entry.where}: {entry.key}: reads the environment variable {reference['variable']}, whose name "
                    "sounds like a secret; a config is copied into the run folder. Libraries read such variables themselves"
                )
        if "${" in _REFERENCE.sub("", text):
            raise ConfigError(
                f"{entry.where}: {entry.key}: got {text!r}, expected no other interpolation than "
                "${section.key}, ${oc.env:NAME} or ${oc.env:NAME,default}"
            )


def _flatten(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _flatten(item)
    else:
        yield value


def _build(merged: DictConfig, origins: dict[str, str], path: str) -> Config:
    """The dataclasses, whose `__post_init__` checks ranges and relations; their messages start with `section.key`."""
    try:
        config = OmegaConf.to_object(merged)
    except InterpolationResolutionError as error:
        key = str(error.full_key).partition("[")[0]
        problem = str(error).splitlines()[0].removeprefix("KeyError raised while resolving interpolation: ").strip('"')
        raise ConfigError(f"{origins.get(key, path)}: {key}: {problem}") from None
    except OmegaConfBaseException as error:
        key = str(error.full_key).partition("[")[0]
        expected = _describe(option_types()[key])
        raise ConfigError(f"{origins.get(key, path)}: {key}: got {error.value!r}, expected {expected}") from None
    except ConfigError as error:
        key = str(error).partition(":")[0]
        raise ConfigError(f"{origins.get(key, f'{path} (default)')}: {error}", error.patch) from None
    assert isinstance(config, Config)
    return config


def _options(section: str) -> list[str]:
    return list(get_type_hints(get_type_hints(Config)[section]))


def _unknown_section(name: str) -> str:
    sections = list(get_type_hints(Config))
    as_option = [key for key in option_types() if key.endswith(f".{name}")]
    if as_option:
        return f"unknown section {name!r}. Did you mean {' or '.join(as_option)}?"
    close = get_close_matches(name, sections, n=1)
    nearest = f"Did you mean {close[0]!r}?" if close else f"Sections: {', '.join(sections)}."
    return f"unknown section {name!r}. {nearest}"


def _unknown_option(key: str) -> str:
    section, _, option = key.partition(".")
    elsewhere = [known for known in option_types() if known.endswith(f".{option}")]
    initials = "".join(word[0] for word in option.split("_") if word)  # learning_rate for lr
    near = [initials] if initials in _options(section) else get_close_matches(option, _options(section), n=1)
    close = elsewhere or [f"{section}.{name}" for name in near]
    if close:
        return f"unknown key {key}. Did you mean {' or '.join(close)}?"
    return f"unknown key {key}. Keys of {section}: {', '.join(_options(section))}."


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _is_text(hint: Any) -> bool:
    return any(part is str or get_origin(part) is Literal for part in _alternatives(hint))


def _describe(hint: Any) -> str:
    """A type in the words of somebody who writes YAML."""
    if len(_alternatives(hint)) > 1:
        return " or ".join(_describe(part) for part in _alternatives(hint))
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is tuple:
        return f"a list of {len(arguments)}: [{', '.join(map(_describe, arguments))}]"
    if origin is list:
        return f"a list [...] of {_describe(arguments[0])}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return words[hint]
