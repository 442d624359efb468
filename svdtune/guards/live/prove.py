"""The built run, proved before its first update: one observed step, two updates that are taken back, all ranks compared."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from accelerate.utils import gather_object

from svdtune.contracts import move
from svdtune.diffusion.draws import draws_for
from svdtune.errors import PreflightError, SvdtuneError
from svdtune.guards.findings import Finding, Report, Stage
from svdtune.guards.live.observe import aside, observe
from svdtune.guards.live.oom import out_of_memory
from svdtune.guards.live.pictures import numbers, of_encoding, of_networks
from svdtune.guards.live.precision import check_precision, first_not_finite, not_finite
from svdtune.guards.live.ranks import RankFacts, check_ranks, facts_of_rank, words_of
from svdtune.guards.live.recipe import of_other_draws, of_records
from svdtune.guards.live.relations import broken
from svdtune.guards.live.trial import make_trial, one_backward
from svdtune.guards.place import place_of
from svdtune.guards.render import block
from svdtune.trainer import loop
from svdtune.trainer.build import Session
from svdtune.trainer.loop import Accumulated
from svdtune.trainer.sharding import gathered
from svdtune.trainer.state import Position

_CLIPS = 3
"""Clips in the observed step, where train.batch_size has them: with one nothing can be mixed up, with two not all."""


@dataclass
class Proof:
    """What was found, the same on every rank."""

    stages: list[Stage] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    measured: dict[str, Any] = field(default_factory=dict)

    def kept(self, ignore: Sequence[str]) -> list[Finding]:
        """Findings that are not ignored."""
        return [finding for finding in self.findings if finding.code not in ignore]

    def onto(self, report: Report, ignore: Sequence[str]) -> Report:
        """`report` with these stages and findings behind its own; those of `ignore` among the ignored ones."""
        ignored = [finding for finding in self.findings if finding.code in ignore]
        return replace(
            report,
            stages=[*report.stages, *self.stages],
            findings=[*report.findings, *self.kept(ignore)],
            ignored=[*report.ignored, *ignored],
            measured=self.measured,
        )


def prove(session: Session, position: Position) -> Proof:
    """All live stages. Called on every rank; leaves the session as it was, equal to the bit.

    A resumed run is observed and its ranks are compared; its two updates were proved when it began.
    """
    proof, facts, device = Proof(), _Facts(session), session.accelerator.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        _stage(session, proof, "meaning", lambda: check_meaning(session, position))
        if not _failed(proof):
            _stage(session, proof, "gradients", lambda: _gradients(session, position, proof, facts))
        if facts.taken is not None:
            taken = facts.taken
            _stage(session, proof, "ranks", lambda: check_ranks(taken), everywhere=True)
    return proof


def check_meaning(session: Session, position: Position) -> Iterator[Finding]:
    """SEM5xx and NUM6xx of one observed step on the first clips. Called on every rank."""
    with gathered(session.model.unet, session.sharding):
        yield from _meaning(session, position)


def _meaning(session: Session, position: Position) -> Iterator[Finding]:
    parts = replace(session.parts, unet=session.model.unet)
    config, device = session.config, session.accelerator.device
    few = aside(session, f"train.batch_size={min(config.train.batch_size, _CLIPS)}")
    batch = next(loop.loader_from(few, position))
    draws = draws_for(batch, parts.facts, config)
    batch, draws = move(batch, device), move(draws, device)
    seen = observe(parts, batch, draws)
    if not bool(seen.result.loss.isfinite()):
        yield not_finite(first_not_finite(parts, batch, draws), batch.names)
        return
    own = numbers(session.model)
    yield from broken(
        chain(
            of_records(seen, parts, config),
            of_other_draws(seen, parts),
            of_networks(seen, own),
            of_encoding(parts, batch, draws, own),
        )
    )
    yield from check_precision(seen, parts)


class _Facts:
    """What one rank knows where the gradients of the first trial update are there."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.taken: RankFacts | None = None

    def take(self, accumulated: Accumulated) -> None:
        if self.session.accelerator.num_processes == 1:
            return
        samples, noise = accumulated.samples.tolist(), words_of(accumulated.noise)
        self.taken = facts_of_rank(self.session, samples, accumulated.names, noise, accumulated.sigmas.tolist())


def _gradients(session: Session, position: Position, proof: Proof, facts: _Facts) -> Iterator[Finding]:
    trial = (
        make_trial(session, position, facts.take) if position.step == 0 else one_backward(session, position, facts.take)
    )
    if trial.measured is not None:
        proof.measured = trial.measured.as_json(session, position)
    yield from trial.findings


def _stage(session: Session, proof: Proof, name: str, check: Callable[[], Any], *, everywhere: bool = False) -> None:
    """Run `check`; the findings of all ranks, each once. `everywhere`: the check gives every rank the same already.

    Raises PreflightError where the step itself raised on one of several ranks: the others may be waiting inside it.
    """
    started = time.perf_counter()
    try:
        found = list(check())
    except Exception as error:  # whatever the step raises here it would raise in the run
        found = [_raised(session, name, error)]
        if session.accelerator.num_processes > 1:
            raise PreflightError(f"rank {session.accelerator.process_index}: {block(found[0])}") from error
    everyone = found if everywhere else _gathered(session, found)
    failed = any(
        finding.severity == "error" and finding.code not in session.config.preflight.ignore for finding in everyone
    )
    proof.findings += everyone
    proof.stages.append(Stage(name, round(time.perf_counter() - started, 3), "failed" if failed else "ok"))


def _raised(session: Session, name: str, error: Exception) -> Finding:
    if isinstance(error, torch.OutOfMemoryError):
        return out_of_memory(session.config, error, session.accelerator.device)
    where, why = place_of(error) or f"stage {name}", "It is the real step of training on your clips."
    if isinstance(error, SvdtuneError):
        return Finding("SHP401", "error", where, str(error), "a step that passes", why)
    traceback.print_exception(error, file=sys.stderr)
    return Finding("SHP401", "error", where, f"{type(error).__name__}: {error}", "a step that passes", why)


def _gathered(session: Session, found: Sequence[Finding]) -> list[Finding]:
    if session.accelerator.num_processes == 1:
        return list(found)
    everyone: list[tuple[int, Finding]] = gather_object(
        [(session.accelerator.process_index, finding) for finding in found]
    )
    first: dict[tuple[str, str], Finding] = {}
    for rank, finding in everyone:
        first.setdefault(
            (finding.code, finding.where), replace(finding, got=f"rank {rank}: {finding.got}") if rank else finding
        )
    return list(first.values())


def _failed(proof: Proof) -> bool:
    return any(stage.status == "failed" for stage in proof.stages)
