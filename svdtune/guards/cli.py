"""The verb `preflight`, and the same before training: load, run, show, write preflight.json."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from svdtune.checkpoint.files import move_file
from svdtune.config.load import load_config
from svdtune.config.schema import Config
from svdtune.errors import ConfigError, PreflightError, SvdtuneError, UsageError
from svdtune.guards.findings import Report, Stage
from svdtune.guards.preflight import Options, merged, run_preflight, unreadable
from svdtune.guards.render import render, stage_line, summary
from svdtune.launch import world_size
from svdtune.trainer.run_folder import RunFolder

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(GiB|GB|MiB|MB)?", re.IGNORECASE)
_PATCHES = 8
_UNITS = {"gib": 2**30, "gb": 10**9, "mib": 2**20, "mb": 10**6}


def preflight_verb(
    path: Path | None,
    overrides: Sequence[str],
    *,
    only: str | None,
    exhaustive: bool,
    gpu: str | None,
    fix: Path | None,
    as_json: bool,
) -> int:
    """Run, print, and return the exit code: 0, 2 for a configuration that cannot be read, 3 for errors found."""
    if path is None and only != "env":
        raise UsageError("preflight: no CONFIG; only `svdtune preflight --only env` works without one")
    if fix is not None and path is None:
        raise UsageError("--fix: no CONFIG to repair")
    options = Options(only, exhaustive, None if gpu is None else parse_size(gpu), _progress())
    try:
        config = load_config(path, overrides) if path else None
    except ConfigError as error:
        report, config, code = _unreadable(path, overrides, error, options), None, ConfigError.exit_code
    else:
        if config is not None and config.memory.plan is not None:
            from svdtune.guards.plan import planned

            config, told = planned(config, options.device_bytes)
            print(told, file=sys.stderr)
        report = _checked(config, options, table_to=sys.stderr if as_json else sys.stdout)
        code = 0 if report.ok else PreflightError.exit_code
    _show(report, only=only, as_json=as_json, stages=options.on_stage is None)
    if config is not None and only is None:
        write_report(config, report)
    if fix is not None and path is not None:
        _write_fix(path, fix, overrides, report)
    return code


def _checked(config: Config | None, options: Options, table_to: TextIO) -> Report:
    """The static stages and, where nothing is wrong yet, the live ones; or the one that is asked for."""
    if config is not None and options.only in ("live", "probe"):
        from svdtune.guards.live.verb import probed, proved

        if options.only == "live":
            return proved(config, Report([], []))
        table, report = probed(config)
        print(table, file=table_to, flush=True)
        return report
    report = run_preflight(config, options)
    if config is None or options.only is not None or not report.ok or options.device_bytes is not None:
        return report  # --gpu asks about another machine's card
    from svdtune.guards.live.here import objection

    if reason := objection(config, report.predicted.get("peak_gib")):
        whole = replace(report, stages=[*report.stages, Stage("live", 0.0, "skipped", reason)])
    else:
        from svdtune.guards.live.verb import proved

        whole = proved(config, report)
    for stage in whole.stages[len(report.stages) :]:
        if options.on_stage:
            options.on_stage(stage)
    return whole


def require_preflight(config: Config) -> Report:
    """Before training: raise PreflightError with the whole report when an error was found, else print and return it."""
    options = Options(on_stage=_progress())
    report = run_preflight(config, options)
    write_report(config, report)
    told = render(report, stages=options.on_stage is None)
    if not report.ok:
        _refuse(config, report)
        raise PreflightError(f"preflight found what would spoil this run; nothing was started.\n{told}")
    print(told if report.findings or report.ignored else summary(report), file=sys.stderr)
    return report


def _refuse(config: Config, report: Report) -> None:
    """status.json says so too, for launchers that turn every exit code into 1; not in a folder where a run is going on."""
    errors = [f"{finding.code} {finding.where}" for finding in report.findings if finding.severity == "error"]
    facts = {
        "exit_code": PreflightError.exit_code,
        "reason": f"preflight: {'; '.join(errors)}",
        "world_size": world_size(),
    }
    with suppress(SvdtuneError, OSError):  # said already as a finding, or the folder is somebody else's now
        folder = RunFolder(Path(config.run.dir) / config.run.name)
        with folder.lock():
            folder.write_status(state="failed", **facts)


def write_report(config: Config, report: Report) -> None:
    """`preflight.json` in the run folder, replaced in one step; a folder that cannot be written is a finding already."""
    folder = Path(config.run.dir) / config.run.name
    partial = folder / ".preflight.json.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(report.as_json(), indent=2) + "\n", encoding="utf-8")
        move_file(partial, folder / "preflight.json")
    except OSError as error:
        print(f"preflight.json was not written: {error}", file=sys.stderr)


def parse_size(text: str) -> int:
    """Bytes of `24GiB`, `24` (GiB), `16000MB`. Raises UsageError."""
    match = _SIZE.fullmatch(text.strip())
    if not match or float(match[1]) == 0:
        raise UsageError(f"--gpu: got {text!r}, expected a size such as 24GiB")
    return round(float(match[1]) * _UNITS[(match[2] or "GiB").lower()])


def _unreadable(path: Path | None, overrides: Sequence[str], error: ConfigError, options: Options) -> Report:
    """Patch after patch until it loads, or until an error has none: the loader stops at the first error each time."""
    errors, patches = [error], list(error.patch)
    while path is not None and errors[-1].patch and len(errors) < _PATCHES:
        try:
            return unreadable(errors, load_config(path, [*overrides, *patches]), options)
        except ConfigError as next_error:
            errors.append(next_error)
            patches += next_error.patch
    return unreadable(errors, None, options)


def _progress():
    """Stage lines as they end, for somebody who watches."""
    if not sys.stderr.isatty():
        return None

    def say(stage: Stage) -> None:
        print(stage_line(stage), file=sys.stderr)

    return say


def _show(report: Report, *, only: str | None, as_json: bool, stages: bool) -> None:
    environment = {}
    if only == "env":
        from svdtune.guards.environment import environment_report

        environment = {"environment": dict(environment_report())}
    if as_json:
        print(json.dumps({**report.as_json(), **environment}, indent=2))
        return
    for name, value in environment.get("environment", {}).items():
        print(f"{name:<16} {value}")
    print(render(report, stages=stages))


def _write_fix(source: Path, target: Path, overrides: Sequence[str], report: Report) -> None:
    from svdtune.guards.repair import write_repaired

    changes = merged([finding.patch for finding in report.findings if finding.verified])
    if not changes:
        why = "no finding has a verified change" if report.findings else "there is nothing to repair"
        print(f"{target} was not written: {why}", file=sys.stderr)
        return
    changes = merged([overrides, changes])
    write_repaired(source, target, changes)
    left = f". Not repaired: {', '.join(f'{f.code} {f.where}' for f in report.left)}" if report.left else ""
    print(f"{target}: {source} with {' '.join(changes)}{left}", file=sys.stderr)
