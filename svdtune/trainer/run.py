"""A run from its Config to its results: lock the folder, build, resume, loop, export, and tell the truth in status.json."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list, set_seed

from svdtune.checkpoint.beside import write_beside
from svdtune.checkpoint.export import Base, export_run
from svdtune.checkpoint.files import is_unfinished
from svdtune.checkpoint.store import folder_name
from svdtune.checkpoint.training import public_name
from svdtune.config.load import resolved_yaml
from svdtune.config.schema import Config
from svdtune.data.catalog import Catalog, scan
from svdtune.errors import Refused, Stopped, SvdtuneError
from svdtune.model.source import part_weights
from svdtune.trainer import state, tracking
from svdtune.trainer.build import Session, build, dismiss, make_accelerator
from svdtune.trainer.early import early
from svdtune.trainer.loop import run_loop
from svdtune.trainer.run_folder import RunFolder
from svdtune.trainer.signals import ends_at_once, listen
from svdtune.trainer.staleness import require_cache
from svdtune.trainer.state import Position
from svdtune.trainer.status import Status, tell, told
from svdtune.trainer.validate import inference
from svdtune.trainer.watch import Watch


def train(config: Config, *, config_text: str, watch: Watch | None = None) -> None:
    """Start the run of `config`, or go on where it stands; the same command does both.

    `config_text` is the YAML as written; `watch` looks on and may refuse.
    Raises SvdtuneError subclasses, each with the exit code of its kind.
    """
    with early(config):
        accelerator = make_accelerator(config)
        folder = RunFolder(Path(config.run.dir) / config.run.name)
    main = accelerator.is_main_process
    status = Status(folder, accelerator.process_index)
    with folder.lock() if main else nullcontext(), told(status), ends_at_once(status.end):
        if main:
            status.starting(config, accelerator.num_processes)
        accelerator.wait_for_everyone()  # what other ranks tell must not come before
        resolved = resolved_yaml(config)
        set_seed(config.run.seed)
        session = build(config, accelerator, folder, _scan(config, folder, main=main))
        position, said = state.resume(session, resolved)
        # Only now: a config that cannot go on with this run must not take the place of its own.
        if main:
            folder.write_config(config_text, resolved)
            folder.truncate_metrics(position.step or -1)
            _say(*said)
            folder.beat()
        accelerator.wait_for_everyone()
        stopped = _run(session, position, resolved, status, watch or Watch())
        if stopped:
            if main:
                tell(status, stopped)  # closing the trackers may take long
            accelerator.wait_for_everyone()
        del session
        dismiss(accelerator)
        if stopped:
            raise stopped


def _run(session: Session, position: Position, resolved: str, status: Status, watch: Watch) -> SvdtuneError | None:
    """What was asked to stop before the end, and is saved, as the error to end with."""
    main, steps, folder = session.accelerator.is_main_process, session.config.train.steps, session.folder
    if main and position.step:
        folder.write_status(step=position.step, checkpoint=str(folder.checkpoints / folder_name(position.step)))
    trains = position.step < steps
    if trains:
        watch.before(session, position)
        tracking.start(session, resolved)
        if main:
            folder.write_status(state="training")
        try:
            with listen(status.end) as wish:
                position = run_loop(session, position, resolved, wish, watch)
        except (Stopped, Refused) as error:
            return error.with_traceback(None)  # which would keep the networks
    elif main:
        _say(f"nothing to train: the run is at step {position.step} of train.steps={steps}; raise it to go on")
    status.when = "after the last step"
    exports = trains or not folder.export.exists() or is_unfinished(folder.export)
    if broadcast_object_list([exports])[0]:  # the main process's answer
        _export(session, position)
    if main:
        made = {"result": folder.export, "sheet": folder.path / "contact_sheet.png", "videos": folder.samples}
        _say(*(f"{name}: {path}" for name, path in made.items() if path.exists()))
    session.accelerator.wait_for_everyone()
    return None


def _say(*lines: str) -> None:
    for line in lines:
        print(line, file=sys.stderr)


def _scan(config: Config, folder: RunFolder, *, main: bool) -> Catalog:
    if config.data.latents:
        return _cached(config, main=main)
    catalog = scan(config.data)
    if main:
        folder.reject([rejected.reason for rejected in catalog.rejected])
        left_out = f", {len(catalog.rejected)} left out (rejected.jsonl says why)" if catalog.rejected else ""
        _say(f"clips: {len(catalog.train)} to train on, {len(catalog.held_out)} held out{left_out}")
    return catalog


def _cached(config: Config, *, main: bool) -> Catalog:
    """With a cache the videos are wanted only to see that they are still those that were encoded; they may be elsewhere."""
    index, catalog = require_cache(config, hashes=main)
    if main:
        videos = (
            ""
            if catalog
            else f"; there are no videos in data.root={config.data.root}, so the cache is taken at its word"
        )
        _say(
            f"clips: {len(index.train)} to train on, {len(index.held_out)} held out, encoded in {config.data.latents}{videos}"
        )
    return catalog or Catalog((), (), ())


def _export(session: Session, position: Position) -> None:
    model, source = session.config.model, session.model.configs.source
    checkpoint = session.folder.checkpoints / folder_name(position.step)
    name = public_name(model.pretrained, source) or source.name
    kind = "lora" if session.config.adapt.method == "lora" else "pipeline"
    dtypes = {form.dtype for form in part_weights(source, "unet", model.variant).forms.values()}
    with inference(session):
        if not session.accelerator.is_main_process:
            return
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
