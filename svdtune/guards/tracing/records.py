"""What a trace says, as data and for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from svdtune.guards.findings import Finding

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """One call of one module."""

    path: str
    """Name in its network; the class name for the network itself."""
    type: str
    inputs: Sequence[Shape]
    outputs: Sequence[Shape]
    parameters: int
    """Its own and those below it."""
    failed: bool = False


@dataclass(frozen=True)
class Failure:
    """Where and why the module raised."""

    stage: Literal["forward", "backward"]
    module: str
    type: str
    source: str
    """File and line of the user's source, where there is one."""
    message: str
    """In the wording of real tensors."""
    got: str
    expected: str
    why: str


@dataclass(frozen=True)
class Remedy:
    """One change that makes the whole module run, forward and backward: it was run."""

    change: str
    added_parameters: int
    """More (or fewer) parameters than before."""
    meaning: str
    """What else the change changes."""
    outputs: Sequence[Shape]
    """Shapes that the module gives with the change."""
    verified: bool = True


@dataclass(frozen=True)
class TraceReport:
    """Layers in order of their calls, the failure if there is one, what would mend it, and all findings."""

    name: str
    layers: Sequence[Layer]
    outputs: Sequence[Shape]
    failure: Failure | None = None
    remedies: Sequence[Remedy] = ()
    findings: Sequence[Finding] = ()
    notes: Sequence[str] = ()
    """Checks that were skipped, and why; what else is good to know."""

    @property
    def ok(self) -> bool:
        """No error was found."""
        return not any(finding.severity == "error" for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return {"ok": self.ok, **asdict(self)}

    def render(self) -> str:
        """The report for a terminal."""
        return _render(self)

    def __str__(self) -> str:
        return self.render()


def _render(report: TraceReport) -> str:
    """The table of layers, then the failure, the remedies, the findings and the notes."""
    rows = [("layer", "type", "input", "output", "parameters")]
    for layer in report.layers:
        given = "FAILED" if layer.failed else _shapes(layer.outputs)
        rows.append((layer.path, layer.type, _shapes(layer.inputs), given, f"{layer.parameters:,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for finding in report.findings:
        lines += ["", f"{finding.severity} {finding.code}  {finding.where}: {finding.got}"]
        told = (("expected", finding.expected), ("why", finding.why), ("fix", finding.fix))
        lines += [f"  {name}: {text}" for name, text in told if text]
    if report.remedies:
        lines += ["", "Remedies, each run forward and backward with the change:"]
        for i, remedy in enumerate(report.remedies, 1):
            lines.append(
                f"  {i}. {remedy.change}   ({remedy.added_parameters:+,} parameters, gives {_shapes(remedy.outputs)})"
            )
            lines.append(f"     {remedy.meaning}")
    if not report.findings:
        lines += ["", "no findings"]
    lines += ["", *[f"note: {note}" for note in report.notes]] if report.notes else []
    return "\n".join(lines)


def _shapes(shapes: Sequence[Shape]) -> str:
    return ", ".join(str(tuple(shape)) for shape in shapes) or "-"
