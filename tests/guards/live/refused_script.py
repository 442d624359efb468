"""What the processes of test_two_ranks.py run: `train`, watched, put wrong in the way that the first argument names."""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState

from svdtune.config.load import load_config
from svdtune.errors import PreflightError
from svdtune.guards.live.watcher import Watcher
from svdtune.trainer import loop, run
from svdtune.trainer.build import build

make_loader, accumulate = loop.make_loader, loop.accumulate


def bypassed(*arguments):
    """As the script that everybody copies does: forward through `unet.module` after `prepare`."""
    session = build(*arguments)
    return replace(session, parts=replace(session.parts, unet=session.parts.unet.module))


def changed(*arguments):
    """One weight of one rank is the next number that float32 has."""
    session = build(*arguments)
    if session.accelerator.process_index == 1:
        first = next(session.model.vae.parameters()).data.view(-1)
        first[0] = torch.nextafter(first[0], first.new_tensor(float("inf")))
    return session


def same_clips(*arguments, **options):
    return make_loader(*arguments, **{**options, "rank": 0})


def fails_on_one(session, batches):
    """As an out-of-memory error of one card: the other rank waits in the all-reduce of the backward pass."""
    if PartialState().process_index == 1:
        raise RuntimeError("no room on this card")
    return accumulate(session, batches)


if __name__ == "__main__":
    case, config_path, *overrides = sys.argv[1:]
    if case in ("bypassed", "changed"):
        run.build = {"bypassed": bypassed, "changed": changed}[case]
    elif case == "same clips":
        loop.make_loader = same_clips
    else:
        loop.accumulate = fails_on_one
    try:
        run.train(load_config(Path(config_path), overrides), config_text="", watch=Watcher(None))
    except PreflightError as error:
        print(error)
        sys.exit(PreflightError.exit_code)
