"""The verb `inspect`: what a checkpoint is, from headers alone, and in what it differs from another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from svdtune.config.schema import Adapt
from svdtune.errors import UsageError
from svdtune.guards.differences import told_by_cause
from svdtune.guards.family import Family, Shapes, recognise
from svdtune.guards.findings import Finding
from svdtune.guards.headers import BadFile, Entry, read_header
from svdtune.guards.model_json import check_json, read_jsons
from svdtune.guards.weights import STEMS, expected_shapes, find_weights, read_part
from svdtune.model.facts import FILES, PACKAGE, TINY

SHIPPED = {"svd": PACKAGE / "facts" / "svd", "svd-xt": PACKAGE / "facts" / "svd-xt", "tiny": TINY}
_FACTS = ("in_channels", "out_channels", "cross_attention_dim", "time_ids_width", "width")


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
        """Every file is readable, and nothing differs from `against`."""
        return not self.problems and not self.differences

    def as_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return {"ok": self.ok, **asdict(self)}


def inspect_path(path: Path, against: str | None = None) -> Inspection:
    """Look at a file or folder; raises UsageError for a path or an `against` that does not exist."""
    if not path.exists():
        raise UsageError(f"inspect: no such file or folder: {path}")
    tables, problems = _tables(path)
    parts = [_describe(name, table) for name, table in tables.items()]
    if against is None:
        return Inspection(str(path), parts, problems)
    return Inspection(str(path), parts, problems, against, _differences(tables, _reference(against)))


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
            lines += [f"      {item.why}"] if item.why else []
    if found.against and not found.differences:
        compared = "in what families and numbers show" if _is_original(found) else "in names and shapes"
        lines.append(f"  no difference from {found.against} {compared}")
    return "\n".join(lines)


def _is_original(found: Inspection) -> bool:
    return any(part.naming == "original" for part in found.parts)


def _tables(path: Path) -> tuple[dict[str, dict[str, Entry]], list[Finding]]:
    """Tensors by part (or file name), and what cannot be read. A folder without parts is read file by file."""
    if path.is_file():
        return _files([path])
    if not any((path / part).is_dir() for part in STEMS):
        files = sorted(path.glob("*.safetensors"))
        return (
            _files(files)
            if files
            else ({}, [Finding("CKP201", "error", str(path), "no safetensors", "weights to look at")])
        )
    tables, problems = {}, []
    for part, stem in STEMS.items():
        found = find_weights(path / part, stem, None)
        if not found.files and found.variants:
            found = find_weights(path / part, stem, found.variants[0])
        if found.files:
            tables[part], wrong = read_part(found)
            problems += wrong
        elif (path / part).is_dir():
            problems.append(
                Finding(
                    "CKP206",
                    "error",
                    str(path / part),
                    f"there: {', '.join(found.others) or 'no weights'}",
                    "safetensors",
                )
            )
    if (path / "unet").is_dir() and (path / FILES["unet"]).is_file():
        jsons, wrong = read_jsons(path)
        problems += wrong + check_json(path, jsons)
    return tables, problems


def _files(paths: list[Path]) -> tuple[dict[str, dict[str, Entry]], list[Finding]]:
    tables, problems = {}, []
    for path in paths:
        try:
            tables[path.name] = dict(read_header(path).tensors)
        except BadFile as bad:
            problems.append(Finding("CKP205", "error", str(bad.path), bad.what))
    return tables, problems


def _describe(name: str, table: Mapping[str, Entry]) -> Part:
    family = recognise(_shapes(table))
    dtypes = dict(Counter(entry.dtype for entry in table.values()).most_common())
    facts = {key: value for key, value in family.facts.items() if key not in ("temporal", "linear_proj_in")}
    numbers = sum(entry.numbers for entry in table.values())
    return Part(name, family.name, family.naming, family.parts, numbers, dtypes, facts, family.notes)


def _shapes(table: Mapping[str, Entry]) -> dict[str, tuple[int, ...]]:
    return {name: entry.shape for name, entry in table.items()}


def _reference(against: str) -> dict[str, dict[str, tuple[int, ...]]]:
    """Names and shapes of each part: of the networks that the JSON of a shipped model makes, or of a folder's own weights."""
    if against in SHIPPED:
        configs, _ = read_jsons(SHIPPED[against])
        return {part: expected_shapes(part, configs[part]) for part in STEMS}
    folder = Path(against).expanduser()
    if not folder.exists():
        raise UsageError(f"--against: got {against}, expected {', '.join(SHIPPED)}, or a file or folder that exists")
    tables, problems = _tables(folder)
    if not tables:
        raise UsageError(f"--against: {'; '.join(f'{item.where}: {item.got}' for item in problems)}")
    return {part: _shapes(table) for part, table in tables.items()}


def _differences(tables: Mapping[str, Mapping[str, Entry]], reference: Mapping[str, Shapes]) -> list[Finding]:
    """Weight by weight where the names can be compared, else by family and numbers."""
    own = {_part_of(name, table): _shapes(table) for name, table in tables.items()}
    if not set(own) <= set(STEMS):
        merged = {name: shape for table in own.values() for name, shape in table.items()}
        return _by_facts(merged, reference)
    # One part alone is compared with that part; a pipeline folder must have all.
    wanted = [part for part in reference if part in own or set(tables) <= set(STEMS)]
    findings = []
    for part in wanted:
        if part not in own:
            findings.append(Finding("CKP209", "error", part, "not there", f"{len(reference[part])} weights"))
        else:
            findings += told_by_cause(part, part, reference[part], own[part], adapts=False, adapt=Adapt(method="full"))
    return findings


def _part_of(name: str, table: Mapping[str, Entry]) -> str:
    """The part that a file is, where it is one part in diffusers' naming; else its own name."""
    family = recognise(_shapes(table))
    return family.parts[0] if name not in STEMS and len(family.parts) == 1 and family.naming != "original" else name


def _by_facts(shapes: Shapes, reference: Mapping[str, Shapes]) -> list[Finding]:
    """Family, parts, numbers of the UNet, and how many weights it has."""
    whole = {f"{part}.{name}": shape for part, table in reference.items() for name, shape in table.items()}
    if shapes in (whole, {name: shape for table in reference.values() for name, shape in table.items()}):
        return []
    got, expected = recognise(shapes), recognise(whole)
    keys = [key for key in _FACTS if key in got.facts or key in expected.facts]
    pairs = [
        ("family", got.name, expected.name),
        *((f"UNet {key}", got.facts.get(key), expected.facts.get(key)) for key in keys),
    ]
    pairs += [(part, "not there", "there") for part in expected.parts if part not in got.parts]
    pairs.append(("UNet parameters", _unet_numbers(shapes, got), _unet_numbers(whole, expected)))
    why = "The names differ (original and diffusers naming), so families and numbers are compared, not single weights."
    why = why if got.naming != expected.naming else ""
    return [Finding("CKP207", "error", what, str(one), str(other), why) for what, one, other in pairs if one != other]


def _unet_numbers(shapes: Shapes, family: Family) -> int:
    prefix = family.prefixes.get("unet")
    return sum(prod(shape) for name, shape in shapes.items() if prefix is not None and name.startswith(prefix))
