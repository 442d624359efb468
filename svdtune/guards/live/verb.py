"""The live stages without a training: the run is built as `train` builds it, proved or probed, and let go."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

from accelerate.utils import set_seed

from svdtune.config.load import with_overrides
from svdtune.config.schema import Config
from svdtune.contracts import move
from svdtune.data.catalog import scan
from svdtune.errors import PreflightError
from svdtune.guards.findings import Report, Stage
from svdtune.guards.live.probe import as_findings, probe, render_rows
from svdtune.guards.live.prove import prove
from svdtune.trainer import loop
from svdtune.trainer.build import Session, build, dismiss, make_accelerator
from svdtune.trainer.run_folder import RunFolder
from svdtune.trainer.state import Position
from svdtune.trainer.validate import inference

Result = TypeVar("Result")
_CLIPS, _DRAWS = 8, 6
"""Clips, and noise levels of each, that the probe asks the base about."""


def proved(config: Config, report: Report) -> Report:
    """`report` and the live stages."""
    proof = built(config, lambda session: prove(session, Position()))
    kept = [finding for finding in proof.findings if finding.code not in config.preflight.ignore]
    ignored = [finding for finding in proof.findings if finding.code in config.preflight.ignore]
    return replace(
        report, stages=[*report.stages, *proof.stages], findings=[*report.findings, *kept], ignored=[*report.ignored, *ignored],
        measured=proof.measured
    )  # fmt: skip


def probed(config: Config) -> tuple[str, Report]:
    """The table of conventions for a person, and its findings. The base is asked as it is: adapters start at zero."""

    def ask(session: Session) -> Any:
        quiet = replace(
            session,
            config=with_overrides(
                config, ["data.workers=0", "train.batch_size=1", f"train.steps={config.train.steps + _CLIPS}"]
            ),
        )
        batches = [batch for batch, _ in zip(loop.loader_from(quiet, Position()), range(_CLIPS), strict=False)]
        device = session.accelerator.device
        with inference(session):
            parts = replace(session.parts, unet=session.model.unet)
            return probe(parts, [move(batch, device) for batch in batches], config, draws=_DRAWS)

    started = time.perf_counter()
    rows = built(config, ask)
    stage = Stage("probe", round(time.perf_counter() - started, 3), "ok")
    return render_rows(rows), Report([stage], as_findings(rows), measured={"probe": [asdict(row) for row in rows]})


def built(config: Config, use: Callable[[Session], Result]) -> Result:
    """What `use` makes of the built run; its folder is a temporary one."""
    with tempfile.TemporaryDirectory(prefix="svdtune-preflight-") as work:
        elsewhere = with_overrides(config, [f"run.dir={work}", "tracking.backends=[]"])
        accelerator = make_accelerator(elsewhere)
        if accelerator.num_processes > 1:
            raise PreflightError(
                "`svdtune preflight` looks with one process; `svdtune train` compares the ranks before its first update."
            )
        set_seed(config.run.seed)
        session = build(elsewhere, accelerator, RunFolder(Path(work) / "run"), scan(config.data))
        result = use(session)
        del session
        dismiss(accelerator)
    return result
