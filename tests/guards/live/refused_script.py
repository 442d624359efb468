"""What the processes of test_two_ranks.py run: `train`, watched, with gradients that no rank averages."""

import sys
from dataclasses import replace
from pathlib import Path

from svdtune.config.load import load_config
from svdtune.errors import PreflightError
from svdtune.guards.live.watcher import Watcher
from svdtune.trainer import run
from svdtune.trainer.build import build


def bypassed(*arguments):
    """As the script that everybody copies does: forward through `unet.module` after `prepare`."""
    session = build(*arguments)
    return replace(session, parts=replace(session.parts, unet=session.parts.unet.module))


if __name__ == "__main__":
    config_path, *overrides = sys.argv[1:]
    run.build = bypassed
    try:
        run.train(load_config(Path(config_path), overrides), config_text="", watch=Watcher(None))
    except PreflightError as error:
        print(error)
        sys.exit(PreflightError.exit_code)
