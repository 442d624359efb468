"""A report for a person: a line per stage, a block per finding."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from svdtune.guards.catalog import RULES
from svdtune.guards.findings import Finding, Report, Stage

_WIDTH = 110
_INDENT = " " * 12


def render(report: Report, *, stages: bool = True) -> str:
    """The whole report as text; without `stages` for somebody who saw them end."""
    lines = [*map(stage_line, report.stages)] if stages else []
    return "\n".join([*lines, *_findings(report), *_left(report), summary(report)])


def stage_line(stage: Stage) -> str:
    """`shapes       ok        9.1 s`."""
    return f"{stage.name:<12} {stage.status:<8} {stage.seconds:6.1f} s{'  ' if stage.note else ''}{stage.note}"


def summary(report: Report) -> str:
    """The last line: how many findings, and what the run will need."""
    counts = {kind: sum(f.severity == kind for f in report.findings) for kind in ("error", "warning")}
    told = [f"{count} {kind}{'s' * (count > 1)}" for kind, count in counts.items() if count]
    peak = report.predicted.get("peak_gib")
    device = report.predicted.get("device_gib")
    of = f", of {device:.1f} GiB" if device is not None else ""
    needs = f"; needs about {peak:.1f} GiB of device memory in each process{of}" if peak is not None else ""
    return f"preflight: {', '.join(told) or 'nothing found'}{needs}"


def summary_of_proof(stages: Sequence[Stage], measured: Mapping[str, Any]) -> str:
    """`step proved on your clips in 3.1 s (meaning, gradients, ranks); 0.84 s a step, 0.5 hours for all, peak 31.2 GiB`."""
    told = [f"{measured['seconds_per_step']:.3g} s a step, {measured['hours']:.2g} hours for all"] if measured else []
    told += [f"peak {measured['peak_gib']:.1f} GiB"] if "peak_gib" in measured else []
    names = ", ".join(stage.name for stage in stages)
    seconds = sum(stage.seconds for stage in stages)
    return f"step proved on your clips in {seconds:.1f} s ({names}){'; ' if told else ''}{', '.join(told)}"


def _findings(report: Report) -> Iterator[str]:
    for finding in report.findings:
        yield from ("", block(finding))
    if report.findings:
        yield ""
    for finding in report.ignored:
        yield f"ignored      {finding.code} {finding.where} (preflight.ignore)"


def _left(report: Report) -> Iterator[str]:
    """What the verified changes do together."""
    if not any(finding.verified for finding in report.findings):
        return
    left = ", ".join(f"{finding.code} {finding.where}" for finding in report.left)
    yield f"with all changes above: {f'still {left}' if left else 'no error left'}"


def block(finding: Finding) -> str:
    """One finding: what, expected, why, fix; the overrides of a fix only when they were proved."""
    rule = RULES.get(finding.code)
    head = f"{finding.severity:<8} {finding.code}  {rule.title if rule else ''}".rstrip()
    rows = [
        ("where", finding.where),
        ("got", finding.got),
        ("expected", finding.expected),
        ("why", finding.why),
        ("fix", finding.fix),
    ]
    lines = [head, *(_row(name, text) for name, text in rows if text)]
    if finding.patch:
        proof = "verified: with it this finding is gone" if finding.verified else "not verified"
        lines.append(_row("set", f"{' '.join(finding.patch)}   ({proof})"))
    return "\n".join(lines)


def _row(name: str, text: str) -> str:
    paragraphs = text.splitlines() or [""]
    wrapped = [line for part in paragraphs for line in _wrap(part)]
    return "\n".join([f"  {name:<9} {wrapped[0]}", *(f"{_INDENT}{line}" for line in wrapped[1:])])


def _wrap(text: str) -> Sequence[str]:
    return textwrap.wrap(text, _WIDTH - len(_INDENT), break_long_words=False, break_on_hyphens=False) or [""]
