"""What the document says of svdtune, against svdtune itself and the README."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

from cloud_doc import ROOT, shell_blocks, shellcheck, trainings

from svdtune.config.load import load_config, option_types
from svdtune.errors import ConfigError
from svdtune.trainer.run_folder import State

_OPTION = re.compile(r"`(\w+\.\w+)(=[^`]+)?`")
_SECTIONS = {name.split(".")[0] for name in option_types()}
_ROW = re.compile(r"^\| ([\d, ]+) \| (?:`(\w+)`)?", re.MULTILINE)
_LINK = re.compile(r"\]\(([^)]+)\)")
_FILE = re.compile(r"\b(?:docker|configs|scripts)/[\w./-]*\w")
_FIELDS = re.compile(r"the true one as (.*?)\.\n", re.DOTALL)
_EXAMPLES = 6


def problems(doc: str) -> list[str]:
    """Options, files, links, exit codes and secrets."""
    return [
        *_option_problems(doc),
        *_code_problems(doc),
        *_field_problems(doc),
        *[f"{path} does not exist" for path in sorted(set(_FILE.findall(doc))) if not (ROOT / path).is_file()],
        *[f"link to {link}" for link in _LINK.findall(doc) if not link.startswith("https://") and not _is_file(link)],
        *[f"a token in the document: {token}" for token in re.findall(r"hf_\w{8,}", doc)],
        *[line for text in shell_blocks(doc) for line in shellcheck(text, "SC1091", "SC2016")],
    ]


def _is_file(link: str) -> bool:
    return (ROOT / "docs" / Path(link.partition("#")[0])).is_file()


def _option_problems(doc: str) -> list[str]:
    told, found = [], trainings(doc)
    for training in found:
        try:
            load_config(ROOT / training.config, training.overrides)
        except ConfigError as error:
            told.append(str(error))
    if len(found) != _EXAMPLES:
        told.append(f"{len(found)} trainings, expected {_EXAMPLES}")
    for name, value in _OPTION.findall(doc):
        if name.split(".")[0] in _SECTIONS and name not in option_types():
            told.append(f"no option {name}")
        elif name in option_types() and value:
            told += _told_by_loading(f"{name}{value}")
    return told


def _told_by_loading(override: str) -> list[str]:
    try:
        load_config(ROOT / "configs/tiny.yaml", [override])
    except ConfigError as error:
        return [str(error)]
    return []


def _codes(text: str) -> dict[str, str]:
    """State by exit code, as the table of `text` gives them; no state where it gives none."""
    return {code: state for codes, state in _ROW.findall(text) for code in codes.replace(" ", "").split(",")}


def _code_problems(doc: str) -> list[str]:
    ours, readme = _codes(doc), _codes((ROOT / "README.md").read_text())
    told = [] if set(ours) == set(readme) else [f"exit codes {sorted(ours)}, README has {sorted(readme)}"]
    told += [f"no state {state!r}" for state in ours.values() if state not in get_args(State)]
    expected = {"0": "done", "143": "stopped", "4": "diverged"}
    told += [f"code {code} is {ours.get(code)!r}" for code, state in expected.items() if ours.get(code) != state]
    return told


def _field_problems(doc: str) -> list[str]:
    """What is said to stand in status.json is written there by name."""
    sources = "".join(path.read_text() for path in sorted((ROOT / "svdtune/trainer").glob("*.py")))
    named = re.findall(r"`(\w+)`", "".join(_FIELDS.findall(doc)))
    told = [] if len(named) > 5 else ["the fields of status.json are not told"]
    return told + [f"status.json has no {name}" for name in named if not re.search(rf'\b{name}=|"{name}":', sources)]
