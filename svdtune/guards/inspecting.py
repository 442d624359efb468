"""The verb `inspect`: what a checkpoint is, from headers and JSON alone, and in what it differs from another."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from svdtune.config.schema import Adapt, Config, Model
from svdtune.errors import UsageError
from svdtune.guards.differences import blocks_of, some, told_by_cause
from svdtune.guards.findings import Finding
from svdtune.guards.model_json import check_part_json, read_jsons
from svdtune.guards.weights import check_folder, check_part, expected_shapes, read_part
from svdtune.model.facts import CLASSES, FILES, PACKAGE, STEMS, TINY, class_name
from svdtune.model.family import Family, Shapes, recognise
from svdtune.model.files import WeightFiles, find_weights
from svdtune.model.headers import BadFile, Entry, read_header
from svdtune.model.single_file import LEFTOVERS

SHIPPED = {"svd": PACKAGE / "facts" / "svd", "svd-xt": PACKAGE / "facts" / "svd-xt", "tiny": TINY}
_LEDGER = PACKAGE / "facts" / "original" / "svd_xt.json.gz"
"""Names and shapes of the authors' single file; those of SVD and SVD-XT are the same."""
_WRAPPERS = ("module.", "_orig_mod.")
_FACTS = ("in_channels", "out_channels", "cross_attention_dim", "time_ids_width", "width")
_NOT_COMPARED = {"sample_size", "architectures", "transformers_version", "torch_dtype", "dtype"}
"""Keys of a config that change neither a shape nor a number that is computed."""


@dataclass(frozen=True)
class Part:
    """One network of a checkpoint, or a single file."""

    name: str
    family: str
    naming: str
    holds: tuple[str, ...]
    parameters: int
    dtypes: Mapping[str, int]
    """Tensors by dtype."""
    facts: Mapping[str, Any]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found; sound when `problems` and `differences` are empty."""

    path: str
    parts: list[Part] = field(default_factory=list)
    problems: list[Finding] = field(default_factory=list)
    against: str | None = None
    differences: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Every file is readable and of its config, and nothing differs from `against`."""
        return not self.problems and not self.differences

    def as_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return {"ok": self.ok, **asdict(self)}


@dataclass
class _Contents:
    """What lies at a path: tensors and JSON by part (a file that is no single part: by its name)."""

    tables: dict[str, dict[str, Entry]] = field(default_factory=dict)
    jsons: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    problems: list[Finding] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)

    def shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        return {tensor: entry.shape for tensor, entry in self.tables[name].items()}


def inspect_path(path: Path, against: str | None = None) -> Inspection:
    """Look at a file or folder; raises UsageError for a path or an `against` that does not exist."""
    if not path.exists():
        raise UsageError(f"inspect: no such file or folder: {path}")
    found = _contents(path, check=True)
    parts = [_describe(name, table, found.notes.get(name)) for name, table in found.tables.items()]
    problems = list(dict.fromkeys(found.problems))
    if against is None:
        return Inspection(str(path), parts, problems)
    return Inspection(str(path), parts, problems, against, _differences(found, against))


def render_inspection(found: Inspection) -> str:
    """A few lines for people."""
    lines = [found.path]
    for part in found.parts:
        dtypes = ", ".join(f"{dtype} ({count})" for dtype, count in part.dtypes.items())
        lines.append(f"  {part.name}: {part.family}" + (f", {part.naming} naming" if part.naming else ""))
        if part.holds and part.holds != (part.name,):
            lines.append(f"      holds      {', '.join(part.holds)}")
        lines.append(f"      parameters {part.parameters:,}")
        lines.append(f"      dtypes     {dtypes}")
        lines += [f"      {key:<10} {value}" for key, value in part.facts.items() if value is not None]
        lines += [f"      {note}" for note in part.notes]
    for kind, findings in (("problem", found.problems), (f"differs from {found.against}", found.differences)):
        for item in findings:
            lines.append(
                f"  {kind}: {item.where}: {item.got}" + (f", expected {item.expected}" if item.expected else "")
            )
            lines += [f"      {text}" for text in (item.why, item.fix) if text]
    if found.against and not found.differences:
        lines.append(
            f"  no difference from {found.against} in the names and shapes of {', '.join(part.name for part in found.parts)}"
        )
    return "\n".join(lines)


def _contents(path: Path, *, check: bool) -> _Contents:
    if path.is_file():
        return _files([path])
    if any((path / part).is_dir() for part in FILES):
        return _pipeline(path, check=check)
    if (path / "config.json").is_file() and (part := _part_of_folder(path)):
        return _lone_part(path, part, check=check)
    files = sorted(path.glob("*.safetensors"))
    if files:
        return _files(files)
    return _Contents(problems=[Finding("CKP201", "error", str(path), "no safetensors in it", "weights to look at")])


def _files(paths: list[Path]) -> _Contents:
    found = _Contents()
    for path in paths:
        try:
            table = dict(read_header(path).tensors)
        except BadFile as bad:
            found.problems.append(Finding("CKP205", "error", str(bad.path), bad.what))
            continue
        family = recognise({name: entry.shape for name, entry in table.items()})
        alone = len(family.parts) == 1 and family.naming in ("diffusers", "transformers") and family.parts[0] in STEMS
        name = family.parts[0] if alone and family.parts[0] not in found.tables else path.name
        found.tables[name] = table
        if shard := re.search(r"-0*(\d+)-of-0*(\d+)\.", path.name):
            found.notes[name] = (
                f"By its name it is shard {shard[1]} of {shard[2]}: only all of them together are a model."
            )
    return found


def _pipeline(path: Path, *, check: bool) -> _Contents:
    weights = {part: _of_any_variant(path / part, part) for part in STEMS if (path / part).is_dir()}
    found = _read(weights)
    jsons, _ = read_jsons(path)
    found.jsons |= jsons
    if check:
        variants = [item.variants[0] for item in weights.values() if item.files and not item.plain and item.variants]
        found.problems = check_folder(path, Config(model=Model(variant=variants[0] if variants else None)))
    return found


def _lone_part(path: Path, part: str, *, check: bool) -> _Contents:
    weights = _of_any_variant(path, part)
    found = _read({part: weights})
    try:
        found.jsons[part] = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        found.problems.append(
            Finding("CKP201", "error", str(path / "config.json"), f"not valid JSON: {error}", "a JSON object")
        )
    if check and part in found.jsons:
        found.problems += check_part_json(path / "config.json", part, found.jsons[part])
        found.problems += check_part(path, part, weights, found.jsons[part], Config()) if weights.files else []
    if not weights.files:
        others = f"there: {', '.join(weights.others) or 'no weights'}"
        found.problems.append(Finding("CKP206", "error", str(path), others, "safetensors"))
    return found


def _part_of_folder(path: Path) -> str | None:
    """By the class that config.json names, else by the weights."""
    try:
        name = class_name(json.loads((path / "config.json").read_text(encoding="utf-8")))
    except (ValueError, AttributeError):
        name = None
    by_class = next((part for part in STEMS if CLASSES[part] == name), None)
    return by_class or next((part for part, stem in STEMS.items() if any(path.glob(f"{stem}*.safetensors"))), None)


def _of_any_variant(folder: Path, part: str) -> WeightFiles:
    plain = find_weights(folder, part, None)
    return plain if plain.files or not plain.variants else find_weights(folder, part, plain.variants[0])


def _read(weights: Mapping[str, WeightFiles]) -> _Contents:
    found = _Contents()
    for part, item in weights.items():
        if not item.files:
            continue
        found.tables[part], wrong = read_part(item)
        found.problems += wrong
        if not item.plain and item.variants:
            found.notes[part] = f"Only *.{item.variants[0]}.safetensors are here: set model.variant={item.variants[0]}."
    return found


def _describe(name: str, table: Mapping[str, Entry], note: str | None) -> Part:
    family = recognise({tensor: entry.shape for tensor, entry in table.items()})
    dtypes = dict(Counter(entry.dtype for entry in table.values()).most_common())
    facts = {key: value for key, value in family.facts.items() if key not in ("temporal", "linear_proj_in")}
    left = [tensor for tensor in table if tensor.startswith(LEFTOVERS)] if family.naming == "original" else []
    notes = [*family.notes, *([note] if note else [])]
    if left:
        notes.append(
            f"{len(left)} weights beside the model (averages, text tower, a second encoder) are not used: {some(left)}"
        )
    if wrapper := next((p for p in _WRAPPERS if all(tensor.startswith(p) for tensor in table)), ""):
        notes.append(
            f"Every name begins with {wrapper!r}, a wrapper's: loaders that are strict refuse it, others leave all weights random."
        )
    numbers = sum(entry.numbers for entry in table.values())
    return Part(name, family.name, family.naming, family.parts, numbers, dtypes, facts, tuple(notes))


def _differences(own: _Contents, against: str) -> list[Finding]:
    """Weight by weight where the names can be compared, else by family; then the numbers in the configs that no weight shows."""
    reference = _reference(against, own)
    found: list[Finding] = []
    compared = 0
    for name, expected in reference.tables.items():
        if name in own.tables:
            compared += 1
            found += _weight_by_weight(name, expected, own.shapes(name))
        elif _whole(own):
            found.append(Finding("CKP209", "error", name, "not there", f"{len(expected)} weights"))
    if not compared:
        held, wanted = (", ".join(names) or "nothing readable" for names in (own.tables, reference.tables))
        got = f"nothing of it can be compared: here are {held}, there {wanted}"
        return [*found, Finding("CKP207", "error", against, got, "the same parts")]
    # Where weights differ the config does too, and the weights say it better.
    same = {part: config for part, config in own.jsons.items() if part not in {item.where for item in found}}
    return [*found, *_json_by_key(same, reference.jsons)]


@dataclass
class _Reference:
    tables: Mapping[str, Shapes]
    jsons: dict[str, Mapping[str, Any]]


def _reference(against: str, own: _Contents) -> _Reference:
    """Names and shapes of what a shipped model's JSON makes (or the authors' single file), or of a file or folder."""
    if against in SHIPPED:
        return _of_shipped(against, own)
    path = Path(against).expanduser()
    if not path.exists():
        raise UsageError(f"--against: got {against}, expected {', '.join(SHIPPED)}, or a file or folder that exists")
    there = _contents(path, check=False)
    if not there.tables:
        raise UsageError(f"--against: {'; '.join(f'{item.where}: {item.got}' for item in there.problems)}")
    tables = {name: there.shapes(name) for name in there.tables}
    if len(own.tables) == len(tables) == 1 and own.tables.keys() != tables.keys():
        tables = {next(iter(own.tables)): next(iter(tables.values()))}  # two files, whatever their names
    return _Reference(tables, there.jsons)


def _of_shipped(against: str, own: _Contents) -> _Reference:
    jsons, _ = read_jsons(SHIPPED[against])

    def shapes(name: str) -> Shapes:
        if name not in STEMS and against != "tiny" and recognise(own.shapes(name)).naming == "original":
            return _ledger()
        part = name if name in STEMS else "unet"
        return expected_shapes(part, jsons[part])

    names = dict.fromkeys([*own.tables, *(STEMS if _whole(own) else ())])
    return _Reference({name: shapes(name) for name in names}, dict(jsons))


def _whole(own: _Contents) -> bool:
    """Whether it is a pipeline, which must have all parts."""
    return set(own.tables) <= set(STEMS) and len(own.tables) > 1


def _ledger() -> Shapes:
    with gzip.open(_LEDGER, "rt", encoding="utf-8") as file:
        return {name: tuple(shape) for name, shape in json.load(file).items()}


def _weight_by_weight(name: str, expected: Shapes, got: Shapes) -> list[Finding]:
    ours, theirs = recognise(got), recognise(expected)
    if name in STEMS and theirs.naming != "original":
        return told_by_cause(name, name, expected, got, adapts=False, adapt=Adapt(method="full"))
    if ours.name != theirs.name or ours.naming != theirs.naming:
        return [*_by_family(ours, theirs), *(_by_name(expected, got) if ours.naming == theirs.naming else ())]
    return list(_by_name(expected, got))


def _by_family(ours: Family, theirs: Family) -> list[Finding]:
    """What a checkpoint of another kind is, and the numbers of its UNet that differ."""
    told = f"{ours.name}, {ours.naming} naming" if ours.naming else ours.name
    first = Finding("CKP207", "error", "family", told, f"{theirs.name}, {theirs.naming} naming", " ".join(ours.notes))
    numbers = [(key, ours.facts.get(key), theirs.facts.get(key)) for key in _FACTS if ours.facts.get(key) is not None]
    differ = [
        Finding("CKP207", "error", f"UNet {key}", str(a), str(b)) for key, a, b in numbers if b is not None and a != b
    ]
    gone = [
        Finding("CKP207", "error", part, "not there", "there")
        for part in theirs.parts
        if part not in ours.parts and ours.parts
    ]
    return [first, *differ, *gone]


def _by_name(expected: Shapes, got: Shapes) -> Iterator[Finding]:
    """Missing, unexpected and misshapen weights; leftovers of a release are neither."""
    missing = [name for name in expected if name not in got]
    if missing:
        yield Finding("CKP209", "error", "weights", f"{len(missing)} are missing: {blocks_of(missing)}", f"all {len(expected)}",
                      f"Such as {some(missing)}. Converted, they would be random.")  # fmt: skip
    more = [name for name in got if name not in expected and not name.startswith(LEFTOVERS)]
    if more:
        yield Finding(
            "CKP210", "error", "weights", f"{len(more)} that the model has no place for: {some(more)}", "none"
        )
    for name, shape in got.items():
        if name in expected and tuple(expected[name]) != tuple(shape):
            yield Finding("CKP211", "error", name, str(list(shape)), str(list(expected[name])))


def _json_by_key(own: Mapping[str, Mapping[str, Any]], reference: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    """Numbers in the configs, which no weight need show: head counts, frames, the schedule."""
    for part in own.keys() & reference.keys():
        for key, expected in reference[part].items():
            if key.startswith("_") or key in _NOT_COMPARED or key not in own[part] or own[part][key] == expected:
                continue
            yield Finding("CKP213", "error", f"{FILES[part]}: {key}", json.dumps(own[part][key]), json.dumps(expected))
