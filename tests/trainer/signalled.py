"""`svdtune` with a signal that comes, or a main thread that stays away, at a place which no clock would hit: for test_preemption.py."""

import functools
import os
import signal
import sys
import time

from svdtune import cli
from svdtune.trainer import loop, run, validate
from svdtune.trainer.signals import listen

STUCK_SECONDS = 120


def after(calls, function, then):
    """`function`, which does `then` before its call number `calls`."""
    seen = []

    @functools.wraps(function)
    def counted(*arguments, **options):
        seen.append(None)
        if len(seen) == calls:
            then()
        return function(*arguments, **options)

    return counted


def signalled(number=signal.SIGTERM):
    signal.raise_signal(number)


def signalled_and_stuck():
    signal.raise_signal(signal.SIGTERM)
    time.sleep(STUCK_SECONDS)


def signalled_twice():
    signal.raise_signal(signal.SIGTERM)
    time.sleep(1)
    signal.raise_signal(signal.SIGUSR1)
    time.sleep(STUCK_SECONDS)


def interrupted():
    signal.raise_signal(signal.SIGINT)


def in_sampling():
    step = validate.Validator._on_step
    validate.Validator._on_step = after(8, step, signalled)


PLACES = {
    "mid-accumulation": lambda: setattr(loop, "train_step", after(12, loop.train_step, signalled)),
    "first micro-step": lambda: setattr(loop, "train_step", after(1, loop.train_step, signalled)),
    "stuck": lambda: setattr(loop, "train_step", after(12, loop.train_step, signalled_and_stuck)),
    "twice": lambda: setattr(loop, "train_step", after(12, loop.train_step, signalled_twice)),
    "sampling": in_sampling,
    "checks": lambda: setattr(cli, "_require_preflight", after(1, cli._require_preflight, signalled_and_stuck)),
    "loading": lambda: setattr(run, "build", after(1, run.build, signalled_and_stuck)),
    "loading, Ctrl-C": lambda: setattr(run, "build", after(1, run.build, interrupted)),
    "export": lambda: setattr(run, "_export", after(1, run._export, signalled_and_stuck)),
}


def run_at(place, arguments):
    """`svdtune` with these arguments and what happens at `place` ("": nothing, None: not even shorter times); patches are taken back."""
    homes = ((run, "listen"), (loop, "train_step"), (validate.Validator, "_on_step"), (cli, "_require_preflight"), (run, "build"),
             (run, "_export"))  # fmt: skip
    before = [(home, name, vars(home)[name]) for home, name in homes]
    argv = sys.argv
    # Where the tests run in the background of a shell, Ctrl-C is ignored from the start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if place is not None:
            run.listen = functools.partial(listen, grace=2.0 if place == "stuck" else 60.0, echo=0.5)
        if place:
            PLACES[place]()
        sys.argv = ["svdtune", *arguments]
        cli.main()
    finally:
        sys.argv = argv
        for home, name, value in before:
            setattr(home, name, value)


if __name__ == "__main__":
    run_at(os.environ.get("SIGNALLED_AT", ""), sys.argv[1:])
