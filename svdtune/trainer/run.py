"""A run from its Config to its results: lock the folder, build, resume, loop, export, and tell the truth in status.json."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from svdtune.checkpoint.beside import write_beside
from svdtune.checkpoint.export import Base, export_run
from svdtune.checkpoint.files import is_unfinished
from svdtune.checkpoint.store import folder_name
from svdtune.checkpoint.training import public_name
from svdtune.config.load import resolved_yaml
from svdtune.config.schema import Config
from svdtune.data.catalog import scan
from svdtune.errors import Diverged, Stopped, SvdtuneError
from svdtune.model.source import part_weights
from svdtune.trainer import state, tracking
from svdtune.trainer.build import Session, build, dismiss, make_accelerator
from svdtune.trainer.loop import run_loop
from svdtune.trainer.run_folder import RunFolder, State
from svdtune.trainer.signals import StopWish, listen
from svdtune.trainer.state import Position
from svdtune.trainer.validate import inference
from svdtune.trainer.watch import Watch


def train(config: Config, *, config_text: str, watch: Watch | None = None) -> None:
    """Start the run of `config`, or go on where it stands; the same command does both.

    `config_text` is the YAML as written; `watch` looks on and may refuse.
    Raises SvdtuneError subclasses, each with the exit code of its kind.
    """
    accelerator = make_accelerator(config)
    folder = RunFolder(Path(config.run.dir) / config.run.name)
    main = accelerator.is_main_process
    with folder.lock() if main else nullcontext(), _status(folder, accelerator), listen() as wish:
        resolved = resolved_yaml(config)
        set_seed(config.run.seed)
        session = build(config, accelerator, folder, _scan(config, folder, main=main))
        position, said = state.resume(session, resolved)
        # Only now: a config that cannot go on with this run must not take the place of its own.
        if main:
            folder.write_config(config_text, resolved)
            folder.truncate_metrics(position.step or -1)
            _say(*said)
        accelerator.wait_for_everyone()
        _run(session, position, resolved, wish, watch or Watch())
        del session
        dismiss(accelerator)


def _run(session: Session, position: Position, resolved: str, wish: StopWish, watch: Watch) -> None:
    main, steps, folder = session.accelerator.is_main_process, session.config.train.steps, session.folder
    trains = position.step < steps
    if trains:
        watch.before(session, position)
        tracking.start(session, resolved)
        position = run_loop(session, position, resolved, wish, watch)
    elif main:
        _say(f"nothing to train: the run is at step {position.step} of train.steps={steps}; raise it to go on")
    if main:
        if trains or not folder.export.exists() or is_unfinished(folder.export):
            _export(session, position)
        made = {"result": folder.export, "sheet": folder.path / "contact_sheet.png", "videos": folder.samples}
        _say(*(f"{name}: {path}" for name, path in made.items() if path.exists()))
    session.accelerator.wait_for_everyone()


def _say(*lines: str) -> None:
    for line in lines:
        print(line, file=sys.stderr)


def _scan(config: Config, folder: RunFolder, *, main: bool):
    catalog = scan(config.data)
    if main:
        folder.reject([rejected.reason for rejected in catalog.rejected])
        left_out = f", {len(catalog.rejected)} left out (rejected.jsonl says why)" if catalog.rejected else ""
        _say(f"clips: {len(catalog.train)} to train on, {len(catalog.held_out)} held out{left_out}")
    return catalog


def _export(session: Session, position: Position) -> None:
    model, source = session.config.model, session.model.configs.source
    checkpoint = session.folder.checkpoints / folder_name(position.step)
    name = public_name(model.pretrained, source) or source.name
    kind = "lora" if session.config.adapt.method == "lora" else "pipeline"
    dtypes = {form.dtype for form in part_weights(source, "unet", model.variant).forms.values()}
    with inference(session):
        export_run(
            session.folder.export,
            base=Base(name, source, model.variant, widened=session.model.widening is not None),
            unet=session.model.unet,
            lora=kind == "lora",
            half=torch.float16 in dtypes,
            beside=partial(
                write_beside, checkpoint=checkpoint, source=source, kind=kind, name=session.folder.export.name
            ),
        )


@contextmanager
def _status(folder: RunFolder, accelerator: Accelerator) -> Iterator[None]:
    """status.json follows what happens: the launcher turns every exit code into 1, so the truth is kept here."""
    world = accelerator.num_processes

    def write(name: State, code: int | None, reason: str | None) -> None:
        rank = accelerator.process_index
        if rank == 0 or name == "failed":
            reason = f"rank {rank}: {reason}" if rank else reason
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
