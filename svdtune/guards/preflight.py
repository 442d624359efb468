"""Prove the run before it starts: six stages, all findings collected, each offered change proved by running again with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from svdtune.config.load import with_overrides
from svdtune.config.schema import Config
from svdtune.errors import ConfigError, SvdtuneError
from svdtune.guards.findings import Finding, Report, Stage

STAGES = ("env", "config", "checkpoint", "data", "shapes", "memory")


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

    `config` may be None for the stage `env` alone. Patches of findings are applied together, everything is run again,
    and a patch that does not make its finding go away is dropped.
    """
    first = _Run(config, options)
    report = first.report()
    if config is None or not any(finding.patch for finding in report.findings):
        return report
    return replace(report, findings=_verified(config, first, report))


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
    where, _, got = str(error).partition(": ")
    if not repaired or not error.patch:
        return Finding("CFG101", "error", where, got)
    fix = "Set the nearest value that is allowed; the other stages looked at the configuration with it."
    return Finding("CFG101", "error", where, got, fix=fix, patch=error.patch, verified=True)


class _Run:
    """One pass over the stages, and what they hand to each other."""

    def __init__(self, config: Config | None, options: Options, before: _Run | None = None) -> None:
        self.config, self.options, self.before = config, options, before
        self.findings: list[Finding] = []
        self.predicted: dict[str, Any] = {}
        self.rehearsal: Any = None

    def report(self) -> Report:
        """All stages, or the one that was asked for."""
        stages: list[Stage] = []
        for name in STAGES if self.options.only is None else (self.options.only,):
            started = time.perf_counter()
            found = self.check(name)
            failed = found is not None and any(finding.severity == "error" for finding in found)
            status = "skipped" if found is None else "failed" if failed else "ok"
            stages.append(Stage(name, round(time.perf_counter() - started, 3), status))
            if self.options.on_stage and self.before is None:
                self.options.on_stage(stages[-1])
            self.findings += found or []
        ignore = self.config.preflight.ignore if self.config else []
        ignored = [finding for finding in self.findings if finding.code in ignore]
        kept = [finding for finding in self.findings if finding.code not in ignore]
        return Report(stages, kept, ignored, _axes(self.config), self.predicted)

    def check(self, name: str) -> list[Finding] | None:
        """Findings of one stage; None when it cannot start."""
        if name == "env":
            from svdtune.guards.environment import check_environment

            return check_environment(self.config)
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
        from svdtune.guards.clips import check_clips

        return check_clips(config, exhaustive=self.options.exhaustive)

    def _shapes(self, config: Config) -> list[Finding] | None:
        from svdtune.guards.table import check_table

        found = check_table(config)
        if found is None and self.options.only:
            return self._checkpoint(config)
        if found is None or any(finding.code == "CFG105" for finding in self.findings):
            return None  # an earlier stage says what is wrong with the model's configs or the targets
        if any(finding.severity == "error" for finding in found):
            return found
        self.rehearsal = self._rehearsed(config)
        known = {finding.code for finding in self.findings} & {"CFG108", "CKP201"}
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
        from svdtune.guards.environment import check_disk
        from svdtune.guards.memory import check_memory, device_bytes

        self.predicted = needed.as_json(device_bytes(self.options.device_bytes))
        return [
            *check_memory(config, needed, self.options.device_bytes),
            *check_disk(config, needed.trained_parameters),
        ]


def merged(patches: Sequence[Sequence[str]]) -> list[str]:
    """One value for each key: the first finding that asks for it decides."""
    first: dict[str, str] = {}
    for override in (override for patch in patches for override in patch):
        first.setdefault(override.partition("=")[0], override)
    return list(first.values())


def _of_step(config: Config) -> tuple[Any, ...]:
    """What the rehearsal reads of a configuration, and more."""
    data = config.data
    sections = config.run, config.model, config.conditioning, config.adapt, config.train, config.memory
    return *sections, data.num_frames, data.height, data.width


def _verified(config: Config, first: _Run, report: Report) -> list[Finding]:
    """Each patch marked verified, or dropped: all together where they agree, else one by one."""
    patches = [finding.patch for finding in report.findings if finding.patch]
    together = merged(patches)
    after = _errors_with(config, first, together)
    agree = after is not None and not _spoiled(report, after)
    done = []
    for finding in report.findings:
        if finding.patch:
            alone = len(patches) > 1 and not (agree and set(finding.patch) <= set(together))
            seen = _errors_with(config, first, finding.patch) if alone else after
            holds = (
                seen is not None
                and _identity(finding) not in map(_identity, seen.findings)
                and not _spoiled(report, seen)
            )
            finding = replace(finding, verified=True) if holds else replace(finding, patch=())
        done.append(finding)
    return done


def _errors_with(config: Config, first: _Run, patch: Sequence[str]) -> Report | None:
    """What is found with `patch` applied; None when the configuration is refused."""
    try:
        return _Run(with_overrides(config, patch), first.options, first).report()
    except SvdtuneError:
        return None


def _spoiled(before: Report, after: Report) -> bool:
    """Whether a stage that passed before fails now; one that is reached for the first time may find what was hidden."""
    was = {stage.name: stage.status for stage in before.stages}
    return any(stage.status == "failed" and was[stage.name] == "ok" for stage in after.stages)


def _identity(finding: Finding) -> tuple[str, str]:
    return finding.code, finding.where


def _axes(config: Config | None) -> dict[str, int]:
    from svdtune.guards.table import facts_of

    facts = facts_of(config) if config else None
    if config is None or facts is None:
        return {}
    data = config.data
    return facts.axes(b=config.train.batch_size, t=data.num_frames, h=data.height, w=data.width)
