"""A scheduler takes the machine away: by whatever road its signal comes, the last update is saved, and status.json says so."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from svdtune.checkpoint.store import find_latest
from tests.trainer.conftest import losses, metrics, start

PYTHON = sys.executable
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
ACCELERATE = ["-m", "accelerate.commands.launch"]
SECONDS = 25 if os.environ.get("SVDTUNE_QUIET_MACHINE") else 120
"""What is promised, and what is asked of a machine that others use too."""
PATIENCE = 300


@dataclass(frozen=True)
class Ended:
    """A run after its signal."""

    run: Path
    status: dict[str, Any]
    err: str
    code: int
    """Of what was started, which may be a launcher."""
    seconds: float
    """From the signal to the end of the last process."""


def wait_for(met, process, what):
    deadline = time.monotonic() + PATIENCE
    while not met():
        if process.poll() is not None:
            raise AssertionError(f"ended before {what}: {process.communicate()[1][-3000:]}")
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def stop(arguments, run, send, **options) -> Ended:
    """Start, `send(process, pids)` once an update is made, and wait until every process is gone."""
    process, everyone = start(arguments, start_new_session=True, **options), []
    try:
        wait_for(lambda: (run / "metrics.jsonl").exists() and metrics(run), process, "its first update")
        everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        sent = time.monotonic()
        send(process, everyone)
        _, err = process.communicate(timeout=PATIENCE)  # first: psutil would take the exit code away
        _, alive = psutil.wait_procs(everyone[1:], timeout=PATIENCE)
        seconds = time.monotonic() - sent
        assert not alive, alive
    finally:
        for one in everyone:  # a launcher that ended may have left its processes behind
            if one.is_running():
                one.kill()
        process.kill()
    return Ended(run, json.loads((run / "status.json").read_text()), err, process.returncode, seconds)


def to_launcher(number):
    return lambda process, _everyone: process.send_signal(number)


def to_group(number):
    return lambda process, _everyone: os.killpg(process.pid, number)


def to_everyone(number):
    """As SLURM does it: every process of the step, whatever its group."""

    def send(_process, everyone):
        for one in everyone:
            one.send_signal(number)

    return send


def to_second_rank(number):
    def send(_process, everyone):
        (second,) = [
            one for one in everyone if one.environ().get("RANK") == "1" and "svdtune" in " ".join(one.cmdline())
        ][:1]
        second.send_signal(number)

    return send


SPELLINGS = {
    "svdtune, SIGTERM": ([], to_launcher, signal.SIGTERM, 1),
    "svdtune, SIGUSR1": ([], to_launcher, signal.SIGUSR1, 1),
    "accelerate, SIGTERM to the launcher": (ACCELERATE, to_launcher, signal.SIGTERM, 1),
    "accelerate, SIGUSR1 to the group": (ACCELERATE, to_group, signal.SIGUSR1, 1),
    "torchrun, SIGTERM to the agent": (TORCHRUN, to_launcher, signal.SIGTERM, 2),
    "torchrun, SIGUSR1 to the agent": (TORCHRUN, to_launcher, signal.SIGUSR1, 2),
    "torchrun, SIGUSR1 to one rank": (TORCHRUN, to_second_rank, signal.SIGUSR1, 2),
    "accelerate --cpu 2, SIGTERM to the launcher": (
        [*ACCELERATE, "--cpu", "--num_processes=2"],
        to_launcher,
        signal.SIGTERM,
        2,
    ),
    "accelerate --cpu 2, SIGUSR1 to everyone": (
        [*ACCELERATE, "--cpu", "--num_processes=2"],
        to_everyone,
        signal.SIGUSR1,
        2,
    ),
}
SMALL = ["data.num_frames=2", "adapt.method=lora", "adapt.rank=2", "train.batch_size=1"]
LONG = ["train.steps=2000", "checkpoint.interval=2000", *SMALL]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_last_update_is_saved_and_told(command, tmp_path, spelling):
    launcher, send, number, ranks = SPELLINGS[spelling]
    ended = stop(command("r", *LONG, "train.accumulation=2", launcher=launcher), tmp_path / "r", send(number))
    print(f"\n{spelling}: {ended.seconds:.1f} s from the signal to the end")
    assert ended.seconds < SECONDS
    status = ended.status
    assert (status["state"], status["exit_code"]) == ("stopped", 143), ended.err[-3000:]
    # A launcher that a SIGUSR1 kills has its processes told by the kernel, and that says SIGTERM.
    assert status["signal"] in {number.name, "SIGTERM"}
    assert f"stopped by {status['signal']} after step {status['step']}; the checkpoint is saved" in status["reason"]
    assert (status["steps"], status["world_size"]) == (2000, ranks)
    assert len(metrics(ended.run)) == status["step"]
    saved = find_latest(ended.run / "checkpoints")
    assert (saved.folder, saved.skipped) == (Path(status["checkpoint"]), ())
    assert saved.folder.name == f"step-{status['step']:08d}"
    assert status["checkpoint_seconds"] < ended.seconds
    assert "loader workers failed" not in ended.err
    if not launcher:
        assert ended.code == 143


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=lambda number: number.name)
def test_nothing_of_the_workers_is_heard(command, tmp_path, number):
    """Signals to the whole group, as a terminal sends them: workers and multiprocessing's own helper live on, and then end."""
    ended = stop(command("r", *LONG, "data.workers=2"), tmp_path / "r", to_group(number))
    assert (ended.code, ended.status["state"], ended.status["signal"]) == (143, "stopped", number.name), ended.err[
        -3000:
    ]
    assert "loader workers failed" not in ended.err
    assert list((ended.run / "checkpoints").glob("step-*"))
    assert "Traceback" not in ended.err
    assert "resource_tracker" not in ended.err


@pytest.fixture
def at(command, tmp_path, worker):
    """`at("place", ...)`: a run to its end, signalled at a place of signalled.py."""

    def run(place: str, name: str, *overrides: str) -> Ended:
        arguments = command(name, *overrides)
        began = time.monotonic()
        code, err = worker.run(arguments[arguments.index("train") :], place)
        status = json.loads((tmp_path / name / "status.json").read_text())
        return Ended(tmp_path / name, status, err, code, time.monotonic() - began)

    return run


EIGHT = ["train.steps=3", "train.accumulation=8", "checkpoint.interval=1000", "train.lr=1e-2", *SMALL]


def test_cut_in_mid_accumulation_and_resumed_equals_uninterrupted(at):
    """The signal comes in the fourth of eight micro-steps of the second update: those are made again, to the bit."""
    whole = at("", "whole", *EIGHT)
    assert whole.code == 0, whole.err
    cut = at("mid-accumulation", "cut", *EIGHT)
    assert (cut.code, cut.status["state"], cut.status["step"]) == (143, "stopped", 1), cut.err
    assert list(losses(cut.run)) == [1]
    resumed = at("", "cut", *EIGHT)
    assert (resumed.code, resumed.status["state"], resumed.status["signal"]) == (0, "done", None), resumed.err
    assert losses(resumed.run) == losses(whole.run)
    ours, theirs = (load_file(run.run / "checkpoints/step-00000003/lora.safetensors") for run in (resumed, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_ended_in_loading_the_newest_checkpoint_is_named(at):
    checkpoint = at("", "r", *EIGHT[1:], "train.steps=1").run / "checkpoints" / "step-00000001"
    ended = at("loading", "r", *EIGHT[1:], "train.steps=2")
    assert (ended.code, ended.status["checkpoint"]) == (143, str(checkpoint)), ended.err
    assert f"before training began. The newest checkpoint is {checkpoint}" in ended.status["reason"]


def test_before_the_first_update_there_is_nothing_to_save(at):
    ended = at("first micro-step", "r", *EIGHT)
    assert (ended.code, ended.status["state"], ended.status["exit_code"]) == (143, "stopped", 143), ended.err
    assert "stopped by SIGTERM before the first update: there is nothing to save" in ended.status["reason"]
    assert not list(ended.run.glob("checkpoints/step-*"))
    assert ended.status["checkpoint"] is None


def test_resumed_and_stopped_at_once_writes_no_second_checkpoint(at):
    assert at("", "r", *EIGHT[1:], "train.steps=1").code == 0
    (checkpoint,) = (at("", "r", *EIGHT[1:], "train.steps=1").run / "checkpoints").iterdir()
    before = checkpoint.stat().st_mtime_ns
    ended = at("first micro-step", "r", *EIGHT[1:], "train.steps=2")
    assert (ended.code, ended.status["step"], ended.status["checkpoint"]) == (143, 1, str(checkpoint)), ended.err
    assert "stopped by SIGTERM at step 1, from which it was resumed" in ended.status["reason"]
    assert checkpoint.stat().st_mtime_ns == before


def test_sampling_is_cut_short_and_leaves_no_half_videos(at):
    sampled = ["validation.samples=2", "validation.inference_steps=6", "validation.interval=1", "data.holdout=0.3"]
    ended = at("sampling", "r", *EIGHT, *sampled)  # in the second of the two videos of step 0
    assert (ended.code, ended.status["state"]) == (143, "stopped"), ended.err
    assert "before the first update" in ended.status["reason"]
    assert len(list((ended.run / "samples").rglob("*.mp4"))) == 1
    assert not list((ended.run / "samples").rglob("*.partial"))


def test_the_main_process_is_cut_in_sampling_while_the_other_waits(command, tmp_path):
    held_out = ["data.holdout=0.3", "validation.clips=2", "validation.samples=1", "validation.inference_steps=5000"]
    ended = stop(command("r", *LONG, *held_out, launcher=TORCHRUN), tmp_path / "r", to_launcher(signal.SIGTERM))
    print(f"\nin sampling: {ended.seconds:.1f} s from the signal to the end")
    assert ended.seconds < SECONDS
    assert (ended.status["state"], ended.status["exit_code"]) == ("stopped", 143), ended.err[-3000:]
    assert "stopped by SIGTERM before the first update" in ended.status["reason"]
    assert not list(ended.run.rglob("*.mp4"))


@pytest.mark.parametrize(
    ("place", "overrides"), [("checks", ["preflight.enabled=true"]), ("loading", [])], ids=["checks", "loading"]
)
def test_a_signal_before_training_ends_at_once(at, place, overrides):
    ended = at(place, "r", *EIGHT, *overrides)
    assert (ended.code, ended.status["state"], ended.status["exit_code"]) == (143, "stopped", 143), ended.err
    assert "stopped by SIGTERM before training began" in ended.status["reason"]
    assert (ended.status["signal"], ended.status["steps"]) == ("SIGTERM", 3)


def test_ctrl_c_before_training_is_an_interruption(at):
    ended = at("loading, Ctrl-C", "r", *EIGHT)
    assert (ended.code, ended.status["state"], ended.status["exit_code"]) == (130, "stopped", 130), ended.err
    assert "interrupted" in ended.err
    assert "Traceback" not in ended.err


def test_a_main_thread_that_stays_away_does_not_hold_the_process(at):
    ended = at("stuck", "r", *EIGHT)
    assert (ended.code, ended.status["state"], ended.status["exit_code"]) == (143, "stopped", 143), ended.err
    assert "not saved: " in ended.status["reason"]
    assert "still in signalled_and_stuck (" in ended.status["reason"]
    assert "There is no checkpoint yet" in ended.status["reason"]


def test_a_second_signal_ends_at_once(at):
    ended = at("twice", "r", *EIGHT)
    assert (ended.code, ended.status["state"], ended.status["signal"]) == (143, "stopped", "SIGUSR1"), ended.err
    assert "ended by a second signal, SIGUSR1" in ended.status["reason"]


def test_after_the_last_step_a_signal_ends_at_once_and_the_next_start_makes_the_result(at):
    ended = at("export", "r", *EIGHT[1:], "train.steps=1")
    assert (ended.code, ended.status["state"], ended.status["step"]) == (143, "stopped", 1), ended.err
    assert "stopped by SIGTERM after the last step" in ended.status["reason"]
    assert not (ended.run / "export").exists()
    again = at("", "r", *EIGHT[1:], "train.steps=1")
    assert (again.code, again.status["state"]) == (0, "done"), again.err
    assert (again.run / "export").is_dir()
