"""`svdtune` in one process that stays: importing torch and diffusers takes 7 seconds, a short run 2. For the tests of whole runs.

Reads one request a line from stdin (JSON: arguments, place of signalled.py, files for stdout and stderr) and answers with the exit code.
A run that ends its process, as some must, ends this one: its exit code is then the answer.
"""

from __future__ import annotations

import json
import os
import random
import sys
import traceback
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from tests.trainer import signalled


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        answers.write(f"{served(json.loads(line))}\n")
        answers.flush()


def served(request: dict[str, Any]) -> int:
    """The exit code of one run, which finds nothing of the one before but what a process of its own would not have: other random states."""
    for number, name in enumerate(("out", "err"), start=1):
        with open(request[name], "wb") as file:
            os.dup2(file.fileno(), number)
    for shared in (AcceleratorState, PartialState, GradientState):
        shared._shared_state.clear()
    seed = int.from_bytes(os.urandom(4))
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    environment = dict(os.environ)
    try:
        signalled.run_at(request["place"], request["arguments"])
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:  # as the interpreter would end
        traceback.print_exc()
        return 1
    finally:
        os.environ.clear()
        os.environ.update(environment)
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    main()
