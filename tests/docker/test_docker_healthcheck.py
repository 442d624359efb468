"""docker/healthcheck on run folders as svdtune writes them."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from svdtune.checkpoint.files import save_json
from svdtune.trainer.run_folder import RunFolder

CHECK = Path(__file__).resolve().parents[2] / "docker/healthcheck"


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunFolder]:
    """A run that this process holds and that trains."""
    folder = RunFolder(tmp_path / "runs/one")
    with folder.lock():
        folder.write_status(state="starting")
        folder.write_status(state="training", step=7)
        yield folder


def make_old(run: RunFolder, seconds: float, *, heartbeat: float | None = None) -> None:
    """As if the run had said its last word so long ago."""
    then = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(time.time() - seconds))
    status = run.path / "status.json"
    save_json(status, {**json.loads(status.read_text()), "updated": then})
    run.beat()
    age = time.time() - (seconds if heartbeat is None else heartbeat)
    os.utime(run.path / "heartbeat", (age, age))


def check(run: RunFolder, **environment: str) -> tuple[int, str]:
    """Exit code and what is said, in the folder that holds runs/."""
    done = subprocess.run(
        [sys.executable, CHECK],
        cwd=run.path.parent.parent,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, (done.stdout + done.stderr).strip()


def test_fresh_heartbeat_is_healthy(run):
    make_old(run, 5000, heartbeat=0)
    code, said = check(run)
    assert code == 0
    assert said.startswith("runs/one: last step ")


def test_old_heartbeat_is_not(run):
    make_old(run, 5000)
    code, said = check(run)
    assert code == 1
    assert said.startswith("runs/one: no step for 50")
    assert said.endswith(" s at step 7, expected one each 1800 s")


def test_limit_is_a_variable(run):
    make_old(run, 5000)
    assert check(run, SVDTUNE_HEARTBEAT_SECONDS="9000")[0] == 0


def test_folder_of_runs_is_a_variable(run):
    make_old(run, 5000)
    other = RunFolder(run.path.parent.parent / "elsewhere/nothing")
    assert check(run, SVDTUNE_RUNS=str(other.path.parent)) == (0, "nothing trains here")


def test_first_step_of_a_resumed_run_has_its_time_too(run):
    """The heartbeat of the run's earlier life is old; it trains since a moment ago."""
    make_old(run, 5000)
    run.write_status(state="training")
    assert check(run)[0] == 0


@pytest.mark.parametrize("state", ["starting", "done", "failed", "stopped"])
def test_what_does_not_train_needs_no_heartbeat(run, state):
    run.write_status(state=state)
    make_old(run, 5000)
    assert check(run) == (0, f"runs/one: {state}")


def test_run_without_status_is_starting(run):
    (run.path / "status.json").unlink()
    assert check(run) == (0, "runs/one: starting")


@pytest.mark.parametrize("owner", [{"pid": 2**22 + 1, "host": socket.gethostname()}, {"pid": 1, "host": "another"}])
def test_runs_of_others_and_of_the_dead_are_not_ours(run, owner):
    make_old(run, 5000)
    save_json(run.path / ".lock.json", owner)
    assert check(run) == (0, "nothing trains here")


def test_no_runs_at_all(run):
    assert check(run, SVDTUNE_RUNS="nowhere") == (0, "nothing trains here")


def test_runs_of_several_folders(run, tmp_path):
    """run.dir may be the image's own folder or a volume: the one that trains is found behind one that does not."""
    (tmp_path / "empty").mkdir()
    make_old(run, 5000)
    code, said = check(run, SVDTUNE_RUNS=f"{tmp_path}/empty:{tmp_path}/missing:runs")
    assert code == 1
    assert said.startswith("runs/one: no step for 5")
