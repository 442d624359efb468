"""The verb `plan`: what a run needs, which settings fit, and the fastest of them written into the YAML."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from svdtune.config.load import load_config
from svdtune.errors import UsageError
from svdtune.guards.cli import parse_size
from svdtune.guards.memory import GIB, device_bytes
from svdtune.guards.plan import Changes, Planner, Row, sizes, told
from svdtune.guards.preflight import merged
from svdtune.guards.repair import write_repaired

_HEADS = ("allocated", "reserved", "s a clip", "fits", "settings")


def plan_verb(path: Path, overrides: Sequence[str], *, gpu: str | None, apply: Path | None, as_json: bool) -> None:
    """Print the plan, and write it with `apply`. Raises UsageError for an `apply` without anything to write."""
    config = load_config(path, overrides)
    capacity = device_bytes(None if gpu is None else parse_size(gpu))
    planner = Planner(config, capacity)
    now = planner.row()
    if not as_json:
        print(summary(now, capacity), flush=True)
    pick = planner.pick(beyond=True)
    rows = []
    for row in table(planner, now, pick):
        rows.append(row)
        if not as_json:
            _show(row, pick, first=len(rows) == 1)
    if as_json:
        shown = {"config": str(path), "device_gib": None if capacity is None else round(capacity / GIB, 3), "now": now.as_json(),
                 "rows": [row.as_json() for row in rows], "pick": pick.as_json() if pick else None}  # fmt: skip
        print(json.dumps(shown, indent=2))
    else:
        print(verdict(path, pick, capacity))
    if apply is not None:
        _apply(path, apply, overrides, pick)


def summary(row: Row, capacity: int | None) -> str:
    """What the configuration needs as it is."""
    cost = row.cost
    against = (
        ""
        if capacity is None
        else f" The device has {capacity / GIB:.1f} GiB: it {'fits' if row.fits else 'does not fit'}."
    )
    return (
        f"As it is: {told(row.needed)}; the peak is in {row.needed.where}.{against}\n"
        f"One micro-step: {cost.flops / 1e12:.2f} TFLOP as executed, {cost.model_flops / 1e12:.2f} TFLOP of the model; "
        f"{row.seconds:.3f} s at the least on an H100.\n"
    )


def table(planner: Planner, now: Row, pick: Row | None) -> Iterator[Row]:
    """Rows as they are computed: the settings of memory, what needs more than a setting, and other clips."""
    yield now
    seen = {now.changes}
    for changes in [*planner.exact(), *_least(planner.rounded()), *_least(planner.eight())]:
        if changes not in seen and (row := planner.tried(changes)):
            seen.add(changes)
            yield row
    if pick and pick.changes not in seen:
        yield pick
    base = pick.changes if pick else ()
    if not planner.config.data.latents:
        cached = (*base, "data.latents=latents/", *(() if planner.config.data.windows else ("data.windows=4",)))
        if row := planner.tried(cached, keeps=False, note="after `svdtune cache`"):
            yield row
    for changes, note in sizes(planner.config):
        if row := planner.tried((*base, *changes), keeps=False, note=note):
            yield row


def _least(rows: Iterator[Changes]) -> list[Changes]:
    """The last two levels: where others are not enough."""
    return [changes for changes in rows if not any(level in " ".join(changes) for level in ("=none", "=level0"))]


def _show(row: Row, pick: Row | None, *, first: bool) -> None:
    widths = (10, 10, 9, 5)
    if first:
        print(" ".join(f"{head:>{width}}" for head, width in zip(_HEADS, widths, strict=False)), " settings")
    fits = "" if row.fits is None else "yes" if row.fits else "no"
    cells = (
        f"{row.needed.peak / GIB:.2f} GiB",
        f"{row.needed.reserved / GIB:.2f} GiB",
        f"{row.seconds / row.clips:.3g}",
        fits,
    )
    settings = " ".join(row.changes) or "as it is"
    notes = ", ".join(note for note in (row.note, "" if row.exact else "rounds by chance") if note)
    mark = "*" if pick and row.changes == pick.changes else " "
    line = " ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
    print(f"{line} {mark}{settings}{f'  ({notes})' if notes else ''}", flush=True)


def verdict(path: Path, pick: Row | None, capacity: int | None) -> str:
    """The last line."""
    if capacity is None:
        return "\nNo device was named and no GPU is visible: give --gpu 24GiB to have the fastest settings that fit picked."
    if pick is None:
        return f"\nNothing here fits into {capacity / GIB:.1f} GiB: fewer or smaller frames, cached clips, or adapt.method=lora."
    command = " ".join(["svdtune train", str(path), *pick.changes])
    return f"\n* the fastest that fits{'' if pick.exact else ' (nothing exact does)'}: {command}"


def _apply(source: Path, target: Path, overrides: Sequence[str], pick: Row | None) -> None:
    if pick is None:
        raise UsageError(f"--apply: {target} was not written: no settings were picked")
    changes = merged([overrides, pick.changes])
    write_repaired(source, target, changes, option="--apply")
    print(f"{target}: {source} with {' '.join(changes) or 'no change'}", file=sys.stderr)
