"""What may look on while a run trains. The trainer calls; what is looked for, and what is made of it, is not its business."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from svdtune.trainer.build import Session
from svdtune.trainer.metrics import StepReport
from svdtune.trainer.state import Position


@dataclass(frozen=True)
class Seen:
    """One optimizer step as it ended on this rank."""

    step: int
    """Counted from 1."""
    report: StepReport
    grad_norm: float
    """Before clipping, of this rank; equal on all ranks when gradients are averaged."""
    seconds: float
    """The whole step."""
    waited: float
    """Seconds of it in which the loader had no clip ready."""
    samples: Tensor
    """(clips,): global sample numbers of this rank."""
    noise: Tensor
    """(clips, 4): the first numbers of each clip's noise, on the device."""
    names: tuple[str, ...]
    """Files of the clips."""


class Watch:
    """Looks at nothing; `guards` passes one that does. Every method is called on every rank."""

    def before(self, session: Session, position: Position) -> None:
        """Everything is built and resumed, no update is made yet. Raises PreflightError to refuse the run."""

    def stepped(self, session: Session, seen: Seen) -> str:
        """An optimizer step ended. A reason to stop after it, or nothing; may raise SvdtuneError to stop at once."""
        return ""

    def sampled(self, session: Session, step: int, videos: Mapping[str, Path]) -> str:
        """Sample videos were written, by name of their subject (none on other ranks than the main one). As `stepped`."""
        return ""

    def diverged(self, session: Session, position: Position) -> str:
        """Loss or gradient of the step after `position` is not finite. A sentence that says where it began, or nothing."""
        return ""
