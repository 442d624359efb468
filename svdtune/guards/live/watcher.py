"""What `train` is watched by: the proof before the first update, and findings of the run in findings.jsonl, the log and wandb."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from accelerate.utils import gather_object

from svdtune.errors import PreflightError
from svdtune.guards.cli import write_report
from svdtune.guards.findings import Finding, Report
from svdtune.guards.live.flight import Flight
from svdtune.guards.live.observe import single_clips
from svdtune.guards.live.precision import culprit_of
from svdtune.guards.live.prove import prove
from svdtune.guards.live.ranks import step_agrees
from svdtune.guards.render import block, summary_of_proof
from svdtune.trainer import tracking
from svdtune.trainer.build import Session
from svdtune.trainer.state import Position
from svdtune.trainer.validate import load_frames, sample_folder, to_uint8
from svdtune.trainer.watch import Seen, Watch

RANKS_EVERY = 100
"""Optimizer steps between two comparisons of the weights of all ranks."""
_CLIPS = 4
"""Training clips that samples are held against."""


class Watcher(Watch):
    """`report` is that of the static stages, on the main process; its findings and those of the proof lie in preflight.json."""

    def __init__(self, report: Report | None) -> None:
        self.report = report
        self.flight = Flight()
        self.clips: list[np.ndarray] = []
        self.faulty = False

    def before(self, session: Session, position: Position) -> None:
        """Raises PreflightError when the proof fails."""
        proof = prove(session, position)
        ignore = session.config.preflight.ignore
        if session.accelerator.is_main_process:
            write_report(session.config, proof.onto(self.report or Report([], []), ignore))
        kept = proof.kept(ignore)
        text = "\n\n".join(block(finding) for finding in kept)
        if any(finding.severity == "error" for finding in kept):
            raise PreflightError(
                f"the built run was refused before its first update; the weights are as they were.\n\n{text}"
            )
        if session.accelerator.is_main_process:
            print(*([text] if text else []), summary_of_proof(proof.stages, proof.measured), sep="\n", file=sys.stderr)

    def stepped(self, session: Session, seen: Seen) -> str:
        """Raises PreflightError when the ranks have come apart. Returns why to stop, when preflight.stop_on says so."""
        if seen.step % RANKS_EVERY == 0 and (apart := step_agrees(session, seen)):
            self._tell(session, seen.step, apart)
            raise PreflightError("\n\n".join(block(finding) for finding in apart))
        return self._tell(session, seen.step, self._noticed(lambda: self.flight.stepped(seen)))

    def sampled(self, session: Session, step: int, videos: Mapping[str, Path]) -> str:
        """Samples against training clips of the same size."""
        return self._tell(session, step, self._noticed(lambda: self._look(session, step, videos))) if videos else ""

    def _look(self, session: Session, step: int, videos: Mapping[str, Path]) -> list[Finding]:
        self.clips = self.clips or _training_clips(session)
        if step and not self.flight.base:  # a resumed run: the samples of its base lie in the run folder
            base = {name: sample_folder(session, 0) / path.name for name, path in videos.items()}
            self.flight.sampled(0, _frames(base), self.clips)
        return self.flight.sampled(step, _frames(videos), self.clips)

    def _noticed(self, look: Callable[[], list[Finding]]) -> list[Finding]:
        """What `look` finds; a fault of the watch is told once and must not stop a run."""
        try:
            return look()
        except Exception as error:
            if not self.faulty:
                traceback.print_exception(error, file=sys.stderr)
                print("The watch over the running training is faulty (above); the training goes on.", file=sys.stderr)
            self.faulty = True
            return []

    def diverged(self, session: Session, position: Position) -> str:
        """The module where the first value stopped being finite, on the first rank that has one."""
        try:
            culprit = culprit_of(session, position)
            here = [str(culprit)] if culprit else []
        except Exception as error:  # the run ends anyway, and the other ranks wait for this one's answer
            here = [f"Where it began could not be found: {type(error).__name__}: {error}."]
        return next(iter(gather_object(here)), "")

    def _tell(self, session: Session, step: int, findings: Sequence[Finding]) -> str:
        """findings.jsonl, the terminal, the trackers; why to stop, when preflight.stop_on names one. By the main process."""
        preflight = session.config.preflight
        told = [finding for finding in findings if finding.code not in preflight.ignore]
        if not session.accelerator.is_main_process:
            return ""
        for finding in told:
            session.folder.append_finding({"step": step, **asdict(finding)})
            print(f"\nstep {step}: {block(finding)}", file=sys.stderr)
            tracking.log_finding(session, finding.code, block(finding), step)
        return next((finding.code for finding in told if finding.code in preflight.stop_on), "")


def _frames(videos: Mapping[str, Path]) -> dict[str, np.ndarray]:
    loaded = {name: load_frames(path) for name, path in videos.items()}
    return {name: frames for name, frames in loaded.items() if frames is not None}


def _training_clips(session: Session) -> list[np.ndarray]:
    return [to_uint8(batch.pixels[0]) for batch in single_clips(session, _CLIPS)]
