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
from svdtune.guards.live.observe import single_clips
from svdtune.guards.live.probe import as_findings, probe, render_rows
from svdtune.guards.live.prove import prove
from svdtune.trainer.build import Session, build, dismiss, make_accelerator
from svdtune.trainer.run_folder import RunFolder
from svdtune.trainer.state import Position
from svdtune.trainer.validate import inference

Result = TypeVar("Result")
_CLIPS, _DRAWS = 8, 6
"""Clips, and noise levels of each, that the probe asks the base about."""


def proved(config: Config, report: Report) -> Report:
    """`report` and the live stages."""
    return built(config, lambda session: prove(session, Position())).onto(report, config.preflight.ignore)


def probed(config: Config) -> tuple[str, Report]:
    """The table of conventions for a person, and its findings. The base is asked as it is: adapters start at zero."""

    def ask(session: Session) -> Any:
        batches = [move(batch, session.accelerator.device) for batch in single_clips(session, _CLIPS)]
        with inference(session):
            return probe(replace(session.parts, unet=session.model.unet), batches, config, draws=_DRAWS)

    started = time.perf_counter()
    rows = built(with_overrides(config, ["data.latents=null"]), ask)
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
