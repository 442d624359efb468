"""Findings are data: checks return them, one renderer turns them into text or JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Finding:
    """One thing that would make the run crash or train wrongly (error), or deserves a look (warning)."""

    code: str
    """A rule of `guards/catalog.py`."""
    severity: Literal["error", "warning"]
    where: str
    """The key, file, module, record field or clip."""
    got: str
    expected: str = ""
    why: str = ""
    fix: str = ""
    patch: tuple[str, ...] = ()
    """Overrides (`section.key=value`) that make the change, where the fix is one."""
    verified: bool = False
    """True only when the checks were run again with `patch` applied and the finding was gone."""


@dataclass(frozen=True)
class Stage:
    """How one stage went."""

    name: str
    seconds: float
    status: Literal["ok", "failed", "skipped"]
    note: str = ""
    """Why it was skipped, where that is not said by another stage."""


@dataclass(frozen=True)
class Report:
    """All stages and findings of one preflight."""

    stages: Sequence[Stage]
    findings: Sequence[Finding]
    ignored: Sequence[Finding] = ()
    left: Sequence[Finding] = ()
    """Errors that remain with all verified changes applied together."""
    axes: Mapping[str, int] = field(default_factory=dict)
    predicted: Mapping[str, Any] = field(default_factory=dict)
    """What the run will need: see `guards/memory.py`."""
    measured: Mapping[str, Any] = field(default_factory=dict)
    """What the trial updates took: see `guards/live/trial.py`."""

    @property
    def ok(self) -> bool:
        """No error was found."""
        return not any(finding.severity == "error" for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return {
            "ok": self.ok,
            "stages": [asdict(stage) for stage in self.stages],
            "findings": [asdict(finding) for finding in self.findings],
            "ignored": [asdict(finding) for finding in self.ignored],
            "left": [asdict(finding) for finding in self.left],
            "axes": dict(self.axes),
            "predicted": dict(self.predicted),
            "measured": dict(self.measured),
        }
