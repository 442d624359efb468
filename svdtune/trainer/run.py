"""A run from its Config to its results: lock the folder, build, resume, loop, export, and tell the truth in status.json."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import set_seed

from svdtune.checkpoint.export import Base, export_run
from svdtune.config.load import resolved_yaml
from svdtune.config.schema import Config
from svdtune.data.catalog import scan
from svdtune.errors import Diverged, Stopped, SvdtuneError
from svdtune.trainer import state, tracking
from svdtune.trainer.build import Session, build, make_accelerator
from svdtune.trainer.loop import run_loop
from svdtune.trainer.run_folder import RunFolder, State
from svdtune.trainer.signals import listen
from svdtune.trainer.validate import inference


def train(config: Config, *, config_text: str) -> None:
    """Start the run of `config`, or go on where it stands; the same command does both.

    `config_text` is the YAML as written. Raises SvdtuneError subclasses, each with the exit code of its kind.
    """
    accelerator = make_accelerator(config)
    folder = RunFolder(Path(config.run.dir) / config.run.name)
    main = accelerator.is_main_process
    with folder.lock() if main else nullcontext(), _status(folder, accelerator):
        resolved = resolved_yaml(config)
        if main:
            folder.write_config(config_text, resolved)
        set_seed(config.run.seed)
        session = build(config, accelerator, folder, _scan(config, folder, main=main))
        _run(session, resolved)


def _run(session: Session, resolved: str) -> None:
    position, said = state.resume(session)
    main = session.accelerator.is_main_process
    if main:
        session.folder.truncate_metrics(position.step)
        print(*said, sep="\n" if said else "", end="\n" if said else "", file=sys.stderr)
    session.accelerator.wait_for_everyone()
    tracking.start(session, resolved)
    with listen() as wish:
        run_loop(session, position, resolved, wish)
    if main:
        _export(session)
    session.accelerator.wait_for_everyone()
    session.accelerator.end_training()


def _scan(config: Config, folder: RunFolder, *, main: bool):
    catalog = scan(config.data)
    if main:
        folder.reject([rejected.reason for rejected in catalog.rejected])
        left_out = f", {len(catalog.rejected)} left out (rejected.jsonl says why)" if catalog.rejected else ""
        print(f"clips: {len(catalog.train)} to train on, {len(catalog.held_out)} held out{left_out}", file=sys.stderr)
    return catalog


def _export(session: Session) -> None:
    model, base = session.config.model, session.model.configs.folder
    with inference(session):
        export_run(
            session.folder.export,
            base=Base(model.pretrained, base, model.variant),
            unet=session.model.unet,
            lora=session.config.adapt.method == "lora",
            half=model.variant == "fp16",
        )


@contextmanager
def _status(folder: RunFolder, accelerator: Accelerator) -> Iterator[None]:
    """status.json follows what happens: the launcher turns every exit code into 1, so the truth is kept here."""
    world = accelerator.num_processes

    def write(name: State, code: int | None, reason: str | None) -> None:
        if accelerator.is_main_process:
            folder.write_status(state=name, world_size=world, exit_code=code, reason=reason)

    write("starting", None, None)
    try:
        yield
    except SvdtuneError as error:
        name: State = {Diverged: "diverged", Stopped: "stopped"}.get(type(error), "failed")  # pyright: ignore[reportAssignmentType]
        write(name, error.exit_code, str(error))
        raise
    except BaseException as error:
        write("failed", 1, f"{type(error).__name__}: {error}")
        raise
    write("done", 0, None)
