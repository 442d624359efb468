"""Prove the run before it starts: six stages, all findings collected, each offered change proved by running again with it."""

from __future__ import annotations

import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from svdtune.config.load import with_overrides
from svdtune.config.schema import Config
from svdtune.errors import ConfigError, SvdtuneError
from svdtune.guards.findings import Finding, Report, Stage
from svdtune.guards.place import place_of

STAGES = ("env", "config", "checkpoint", "data", "shapes", "memory")
_GOT = re.compile(r"(?P<where>.*?): got (?P<got>.*?)(?:, expected (?P<expected>.*))?", re.DOTALL)
"""How most messages of the loader are built: `file:line: section.key: got X, expected Y`."""
_MORE = 4
"""Further changes that one finding may ask for while it does not go away: each is proved with those before it."""


@dataclass(frozen=True)
class Options:
    """How preflight looks."""

    only: str | None = None
    """One stage of `STAGES`; None: all."""
    exhaustive: bool = False
    """Look at every clip, not at a sample."""
    device_bytes: int | None = None
    """Memory of the GPU that the run is for; None: the one of this machine, if it has one."""
    on_stage: Callable[[Stage], None] | None = None
    """Told each stage as it ends."""


def run_preflight(config: Config | None, options: Options = Options()) -> Report:
    """All stages; a stage that cannot start because of an earlier one is marked skipped.

    `config` may be None for the stage `env` alone. The patches of findings are applied one after another, everything is run
    again with each, and one that does not make its finding go away, or brings a new error, is dropped.
    """
    first = Pass(config, options)
    return first.report() if config is None else _proved(first)


def unreadable(errors: Sequence[ConfigError], repaired: Config | None, options: Options = Options()) -> Report:
    """The report for a configuration that could not be loaded: each error met while applying the patches of those before.

    `repaired` is the configuration with all patches, where that loads; it is what the other stages look at.
    """
    findings = [_unreadable(error, repaired is not None) for error in errors]
    failed = Stage("load", 0.0, "failed")
    if repaired is None:
        return Report([failed], findings)
    rest = run_preflight(repaired, options)
    return replace(rest, stages=[failed, *rest.stages], findings=[*findings, *rest.findings])


def _unreadable(error: ConfigError, repaired: bool) -> Finding:
    if told := _GOT.fullmatch(str(error)):
        where, got, expected = told["where"], told["got"], told["expected"] or ""
    else:
        (where, _, got), expected = str(error).partition(": "), ""
    if not repaired or not error.patch:
        return Finding("CFG101", "error", where, got, expected)
    fix = "Set the nearest value that is allowed; the other stages looked at the configuration with it."
    return Finding("CFG101", "error", where, got, expected, fix=fix, patch=error.patch, verified=True)


class Pass:
    """The stages run once over one configuration, and what they hand to each other."""

    def __init__(self, config: Config | None, options: Options, before: Pass | None = None) -> None:
        self.config, self.options, self.before = config, options, before
        self.found: dict[str, list[Finding]] = {}
        self.stages: list[Stage] = []
        self.predicted: dict[str, Any] = {}
        self.rehearsal: Any = None
        for name in STAGES if options.only is None else (options.only,):
            self._enter(name)

    @property
    def findings(self) -> list[Finding]:
        """Of all stages, in their order."""
        return [finding for stage in self.found.values() for finding in stage]

    @property
    def ignore(self) -> Sequence[str]:
        """Codes that the configuration wants left out."""
        return self.config.preflight.ignore if self.config else []

    @property
    def kept(self) -> list[Finding]:
        """Findings that are not ignored."""
        return [finding for finding in self.findings if finding.code not in self.ignore]

    def report(self) -> Report:
        """What this pass shows."""
        ignored = [finding for finding in self.findings if finding.code in self.ignore]
        return Report(self.stages, self.kept, ignored, axes=_axes(self.config), predicted=self.predicted)

    def _enter(self, name: str) -> None:
        started = time.perf_counter()
        try:
            found = self._check(name)
        except Exception as error:  # one check that breaks must not take the others' findings along
            traceback.print_exception(error, file=sys.stderr)
            found = [_broken(name, error)]
        failed = any(finding.severity == "error" and finding.code not in self.ignore for finding in found or ())
        status = "skipped" if found is None else "failed" if failed else "ok"
        self.found[name] = found or []
        self.stages.append(Stage(name, round(time.perf_counter() - started, 3), status))
        if self.options.on_stage and self.before is None:
            self.options.on_stage(self.stages[-1])

    def _check(self, name: str) -> list[Finding] | None:
        """Findings of one stage; None when it cannot start."""
        if name == "env":
            from svdtune.guards.environment import check_environment

            return check_environment(self.config, for_a_card=self.options.device_bytes is not None)
        if self.config is None:
            raise ValueError(f"stage {name} needs a configuration")
        return getattr(self, f"_{name}")(self.config)

    def _config(self, config: Config) -> list[Finding]:
        from svdtune.guards.settings import check_settings

        return check_settings(config)

    def _checkpoint(self, config: Config) -> list[Finding]:
        from svdtune.guards.weights import check_weights

        return check_weights(config)

    def _data(self, config: Config) -> list[Finding]:
        before = self.before
        if before and before.config and "data" in before.found and _of_data(before.config) == _of_data(config):
            return before.found["data"]  # a patch changed nothing it reads
        from svdtune.guards.clips import check_clips

        return check_clips(config, exhaustive=self.options.exhaustive)

    def _shapes(self, config: Config) -> list[Finding] | None:
        from svdtune.guards.table import check_table

        found = check_table(config)
        if found is None and self.options.only:
            return self._checkpoint(config)
        unbuilt = any(f.code in ("CKP201", "CKP216") and f.where.endswith(".json") for f in self.findings)
        if found is None or unbuilt or any(finding.code == "CFG105" for finding in self.findings):
            return None  # an earlier stage says what is wrong with the model's configs or the targets
        if any(finding.severity == "error" for finding in found):
            # A bridge would be made for a number that the weights deny.
            denied = any(f.code in ("CKP211", "CKP215") and "image_encoder" in f.where for f in self.findings)
            return [replace(finding, patch=()) for finding in found] if denied else found
        self.rehearsal = self._rehearsed(config)
        known = {f.code for f in self.findings if f.severity == "error"} & {"CFG108", "CKP201"}
        return [*found, *(finding for finding in self.rehearsal.findings if finding.code not in known)]

    def _rehearsed(self, config: Config) -> Any:
        """The step at this configuration's sizes; that of the pass before where a patch changed nothing it reads."""
        before = self.before
        if before and before.config and before.rehearsal and _of_step(before.config) == _of_step(config):
            return before.rehearsal
        from svdtune.guards.shapes import rehearse

        return rehearse(config)

    def _memory(self, config: Config) -> list[Finding] | None:
        found = self._shapes(config) if self.options.only else []
        needed = self.rehearsal.needed if self.rehearsal else None
        if needed is None:
            return found or None
        from svdtune.guards.memory import check_disk, check_memory, device_bytes

        self.predicted = needed.as_json(device_bytes(self.options.device_bytes))
        return [
            *check_memory(config, needed, self.options.device_bytes),
            *check_disk(config, needed.trained_parameters),
        ]


def _broken(stage: str, error: Exception) -> Finding:
    """ENV014: not even the check could be made."""
    text = str(error).strip().splitlines()
    told = f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
    if isinstance(error, OSError):
        why, fix = (
            "The stage ended there; what it would have found is not known.",
            "Make it readable, or point elsewhere.",
        )
    else:
        why = "Nobody foresaw this; the traceback is on stderr. What the stage would have found is not known."
        fix = "If you changed svdtune's code, the line is named; otherwise please report it with `svdtune preflight --only env`."
    return Finding("ENV014", "error", place_of(error) or f"stage {stage}", told, "a check that ends", why, fix)


def merged(patches: Sequence[Sequence[str]]) -> list[str]:
    """One value for each key: the last one counts, as it was proved with those before it."""
    last = {override.partition("=")[0]: override for patch in patches for override in patch}
    return list(last.values())


def _of_data(config: Config) -> tuple[Any, ...]:
    """What the stage data reads of a configuration, and more."""
    sections = config.data, config.validation, config.model, config.conditioning, config.objective
    return *sections, config.run.seed, config.train.batch_size, config.train.precision


def _of_step(config: Config) -> tuple[Any, ...]:
    """What the rehearsal reads of a configuration, and more."""
    data = config.data
    sections = (
        config.run,
        config.model,
        config.conditioning,
        config.adapt,
        config.train,
        config.memory,
        config.validation,
    )
    return *sections, data.num_frames, data.height, data.width, data.latents is None


def _proved(first: Pass) -> Report:
    """The report with each patch marked verified, or dropped; those that hold are applied before the next is tried."""
    applied: list[str] = []
    now, findings = first, []
    for finding in first.kept:
        if finding.patch:
            finding, change, now = _tried(first, now, finding, applied)
            applied = merged([applied, change])
        findings.append(finding)
    left = [] if now is first else [f for f in now.kept if f.severity == "error"]
    return replace(first.report(), findings=findings, left=left)


def _tried(first: Pass, now: Pass, finding: Finding, applied: Sequence[str]) -> tuple[Finding, Sequence[str], Pass]:
    """The finding with what is proved of its patch, the change that holds, and the pass after it."""
    there = _again(finding, now)
    if there is None:
        return replace(finding, patch=(), fix=f"{finding.fix} It is gone with the changes above.".strip()), (), now
    change, fixes = list(there.patch), [there.fix]
    for _ in range(_MORE):
        after = _with(first.config, [*applied, *change], now)
        if after is None or _spoiled(first, now, after):
            break
        still = _again(finding, after)
        if still is None:
            return replace(finding, fix=" ".join(fixes), patch=tuple(change), verified=True), change, after
        fixes.append(still.fix)
        if not set(still.patch) - set(change):
            break  # the last of its fixes is not one of the configuration
        change = merged([change, still.patch])
    return replace(finding, patch=(), fix=fixes[-1]), (), now


def _with(config: Config | None, overrides: Sequence[str], before: Pass) -> Pass | None:
    """The stages run again with `overrides`; None when the configuration is refused."""
    assert config is not None  # without one nothing offers a change
    try:
        return Pass(with_overrides(config, overrides), before.options, before)
    except SvdtuneError:
        return None


def _again(finding: Finding, seen: Pass) -> Finding | None:
    """The finding of the same rule at the same place, if it is still there."""
    return next((f for f in seen.kept if (f.code, f.where) == (finding.code, finding.where)), None)


def _spoiled(first: Pass, now: Pass, after: Pass) -> bool:
    """Whether the change brings back what one before it mended, or an error to a stage that was reached without it.

    A stage that is reached for the first time may find what it finds.
    """
    had, wanted = ({(f.code, f.where, f.severity) for f in seen.findings} for seen in (now, first))
    reached = {stage.name for stage in now.stages if stage.status != "skipped"}
    new = [(name, (f.code, f.where, f.severity)) for name, found in after.found.items() for f in found]
    return any(known in wanted or (known[-1] == "error" and name in reached) for name, known in new if known not in had)


def _axes(config: Config | None) -> dict[str, int]:
    from svdtune.guards.table import facts_of

    facts = facts_of(config) if config else None
    if config is None or facts is None:
        return {}
    data = config.data
    return facts.axes(b=config.train.batch_size, t=data.num_frames, h=data.height, w=data.width)
