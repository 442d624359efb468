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
    report = _run(config, options)
    if config is None or not any(finding.patch for finding in report.findings):
        return report
    return replace(report, findings=_verified(config, options, report.findings))


def unreadable(error: ConfigError, repaired: Config | None, options: Options = Options()) -> Report:
    """The report for a configuration that could not be loaded; `repaired` is it with `error.patch` applied, where that loads."""
    fix = f"set {' '.join(error.patch)}" if error.patch else ""
    finding = Finding(
        "CFG101", "error", "configuration", str(error), fix=fix, patch=error.patch, verified=repaired is not None
    )
    failed = Stage("load", 0.0, "failed")
    if repaired is None:
        return Report([failed], [replace(finding, patch=())])
    rest = run_preflight(repaired, options)
    return replace(rest, stages=[failed, *rest.stages], findings=[finding, *rest.findings])


def _run(config: Config | None, options: Options) -> Report:
    run = _Run(config, options)
    stages: list[Stage] = []
    for name in STAGES if options.only is None else (options.only,):
        started = time.perf_counter()
        found = run.check(name)
        failed = found is not None and any(finding.severity == "error" for finding in found)
        status = "skipped" if found is None else "failed" if failed else "ok"
        stages.append(Stage(name, round(time.perf_counter() - started, 3), status))
        if options.on_stage:
            options.on_stage(stages[-1])
        run.findings += found or []
    ignore = config.preflight.ignore if config else []
    ignored = [finding for finding in run.findings if finding.code in ignore]
    kept = [finding for finding in run.findings if finding.code not in ignore]
    return Report(stages, kept, ignored, _axes(config), run.predicted)


class _Run:
    """What the stages of one pass hand to each other."""

    def __init__(self, config: Config | None, options: Options) -> None:
        self.config, self.options = config, options
        self.findings: list[Finding] = []
        self.predicted: dict[str, Any] = {}
        self._needed: Any = None

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
        if found is None or any(finding.code == "CFG105" for finding in self.findings):
            return None  # an earlier stage says what is wrong with the model's configs or the targets
        if any(finding.severity == "error" for finding in found):
            return found
        from svdtune.guards.shapes import rehearse

        rehearsal = rehearse(config)
        self._needed = rehearsal.needed
        known = {finding.code for finding in self.findings} & {"CFG108", "CKP201"}
        return [*found, *(finding for finding in rehearsal.findings if finding.code not in known)]

    def _memory(self, config: Config) -> list[Finding] | None:
        if self.options.only:
            self._shapes(config)
        if self._needed is None:
            return None
        from svdtune.guards.environment import check_disk
        from svdtune.guards.memory import check_memory

        self.predicted = self._needed.as_json()
        return [
            *check_memory(config, self._needed, self.options.device_bytes),
            *check_disk(config, self._needed.trained_parameters),
        ]


def _verified(config: Config, options: Options, findings: Sequence[Finding]) -> list[Finding]:
    """Each patch marked verified, or dropped: first all together, then one by one if they spoil each other."""
    options = replace(options, on_stage=None)
    patches = [finding.patch for finding in findings if finding.patch]
    before = {_identity(finding) for finding in findings}
    together = _errors_with(config, options, _merged(patches))
    spoiled = together is None or together - before
    done = []
    for finding in findings:
        if finding.patch:
            left = _errors_with(config, options, finding.patch) if spoiled and len(patches) > 1 else together
            holds = left is not None and _identity(finding) not in left and not left - before
            finding = replace(finding, verified=True) if holds else replace(finding, patch=())
        done.append(finding)
    return done


def _errors_with(config: Config, options: Options, patch: Sequence[str]) -> set[tuple[str, str]] | None:
    """Findings that remain with `patch` applied; None when the configuration is refused."""
    try:
        return {_identity(finding) for finding in _run(with_overrides(config, patch), options).findings}
    except SvdtuneError:
        return None


def _merged(patches: Sequence[Sequence[str]]) -> list[str]:
    """One value for each key: the first finding that asks for it decides."""
    first: dict[str, str] = {}
    for override in (override for patch in patches for override in patch):
        first.setdefault(override.partition("=")[0], override)
    return list(first.values())


def _identity(finding: Finding) -> tuple[str, str]:
    return finding.code, finding.where


def _axes(config: Config | None) -> dict[str, int]:
    from svdtune.guards.table import facts_of

    facts = facts_of(config) if config else None
    if config is None or facts is None:
        return {}
    data = config.data
    return facts.axes(b=config.train.batch_size, t=data.num_frames, h=data.height, w=data.width)
