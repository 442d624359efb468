"""What a signal sets in motion, in this process: the wish and its clock, who serves it, and what status.json says at the end."""

from __future__ import annotations

import json
import math
import signal
import time

import pytest

from svdtune.config.load import load_config
from svdtune.errors import CheckpointError, Diverged, Stopped
from svdtune.trainer.agreement import Agreement, Halt
from svdtune.trainer.run_folder import RunFolder
from svdtune.trainer.signals import NOTED, StopWish, ends_at_once, listen
from svdtune.trainer.status import Status, told
from tests.trainer.conftest import REPO


def until(met):
    deadline = time.monotonic() + 60
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def no_end(*arguments):
    raise AssertionError(arguments)


def test_a_signal_in_the_loop_is_a_wish_and_the_handlers_come_back(capfd):
    before = {number: signal.getsignal(number) for number in NOTED}
    with listen(no_end) as wish:
        signal.raise_signal(signal.SIGUSR1)
        until(lambda: wish.name)
        with pytest.raises(Halt, match="SIGUSR1"):
            Agreement(wish).check()
    assert (wish.name, wish.refused, wish.served) == ("SIGUSR1", False, True)
    assert {number: signal.getsignal(number) for number in NOTED} == before
    assert "SIGUSR1: saving a checkpoint after this micro-step; once more ends at once" in capfd.readouterr().err


def test_the_same_signal_passed_on_by_a_launcher_is_one_and_a_second_is_another():
    wish = StopWish(echo=0.05)
    assert not wish.hear("SIGTERM")
    assert not wish.hear("SIGTERM")
    time.sleep(0.1)
    assert wish.hear("SIGINT")
    assert wish.name == "SIGTERM"


def test_the_clock_runs_from_the_signal_but_not_in_a_save_and_not_in_a_long_micro_step():
    wish = StopWish(grace=0.05, patience=0.05)
    assert not wish.overdue
    wish.hear("SIGTERM")
    with wish.waiting():
        time.sleep(0.1)
        assert not wish.overdue
    assert not wish.overdue, "the save had ended this moment"
    until(lambda: wish.overdue)
    wish.allow(60)
    assert not wish.overdue
    wish.allow(0)
    assert wish.overdue
    wish.served = True
    assert not wish.overdue


def test_who_is_overdue_is_ended_and_told_where_the_main_thread_is():
    ends = []
    with listen(lambda *said: ends.append(said), grace=0.05) as wish:
        signal.raise_signal(signal.SIGTERM)
        until(lambda: ends)
        wish.served = True
    name, why = ends[0]
    assert name == "SIGTERM"
    assert "s after SIGTERM still in until (" in why


def test_a_signal_after_the_last_look_goes_to_who_is_next():
    ends = []
    with ends_at_once(ends.append):
        with listen(no_end) as wish:
            signal.raise_signal(signal.SIGTERM)
            until(lambda: wish.name)
        until(lambda: ends)
    assert ends == ["SIGTERM"]


def test_a_refusal_goes_before_a_signal_only_when_it_came_first():
    wish = StopWish()
    Agreement(wish).check()
    wish.ask("")
    assert wish.name is None
    wish.ask("SEM540")
    with pytest.raises(Halt, match="SEM540") as halt:
        Agreement(wish).check()
    assert halt.value.refused
    wish = StopWish()
    wish.hear("SIGINT")
    wish.ask("SEM540")
    with pytest.raises(Halt, match="SIGINT") as halt:
        Agreement(wish).glance()
    assert not halt.value.refused
    assert not wish.served, "the others do not know of it yet"


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "r")


def in_file(folder):
    return json.loads((folder.path / "status.json").read_text())


def started(folder, rank=0):
    status = Status(folder, rank)
    status.starting(load_config(REPO / "configs/tiny.yaml"), 2)
    return status


def test_what_a_scheduler_reads(folder):
    started(folder)
    says = in_file(folder)
    assert (says["state"], says["steps"], says["world_size"], says["exit_code"]) == ("starting", 150, 2, None)
    assert {
        "step",
        "reason",
        "signal",
        "checkpoint",
        "checkpoint_seconds",
        "pid",
        "host",
        "started",
        "updated",
    } < says.keys()
    assert (folder.path / "heartbeat").exists()


@pytest.mark.parametrize(
    ("error", "state", "code"),
    [
        (Stopped("stopped by SIGTERM", "SIGTERM"), "stopped", 143),
        (Diverged("loss nan"), "diverged", 4),
        (CheckpointError("disk full"), "failed", 3),
        (RuntimeError("torn"), "failed", 1),
        (KeyboardInterrupt(), "stopped", 130),
    ],
    ids=["stopped", "diverged", "failed", "unforeseen", "interrupted"],
)
def test_every_end_is_told(folder, error, state, code):
    with pytest.raises(type(error)), told(started(folder)):
        raise error
    says = in_file(folder)
    assert (says["state"], says["exit_code"]) == (state, code)
    assert says["signal"] == {"stopped": "SIGTERM" if code == 143 else "SIGINT"}.get(state)
    assert str(error) in says["reason"]


def test_ranks_that_fail_because_one_stopped_do_not_take_its_place(folder):
    first, second = started(folder), Status(folder, rank=1)
    with pytest.raises(Stopped), told(first):
        raise Stopped("stopped by SIGTERM", "SIGTERM")
    with pytest.raises(RuntimeError), told(second):
        raise RuntimeError("Connection closed by peer")
    folder.write_status(step=9)
    assert (in_file(folder)["state"], in_file(folder)["reason"], in_file(folder)["step"]) == (
        "stopped",
        "stopped by SIGTERM",
        None,
    )
    started(folder)
    with pytest.raises(RuntimeError), told(second):
        raise RuntimeError("cut")
    assert in_file(folder)["reason"] == "rank 1: RuntimeError: cut"


def test_no_clock_before_a_signal():
    assert StopWish().heard == math.inf
    assert not StopWish(patience=0).overdue
