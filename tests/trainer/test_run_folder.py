"""Promise R12: the run folder tells the truth."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from svdtune.errors import UsageError
from svdtune.trainer.run_folder import RunFolder

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path) -> RunFolder:
    return RunFolder(tmp_path / "runs" / "mine")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@contextmanager
def holder(path: Path, body: str) -> Iterator[subprocess.Popen]:
    """A process that runs `body` (with `run`, `os`, `time`) and prints a line when it holds the lock; killed at the end."""
    code = (
        "import os, time\nfrom pathlib import Path\nfrom svdtune.trainer.run_folder import RunFolder\n"
        f"run = RunFolder(Path({str(path)!r}))\n{body}"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


HOLD = """
with run.lock():
    print('held', flush=True)
    time.sleep(60)
"""
HOLD_WITH_WORKER = """
with run.lock():
    if os.fork() == 0:  # the child says that both are up
        Path(run.path / 'worker').write_text(str(os.getpid()))
        print('held', flush=True)
    time.sleep(60)
"""


def test_the_folder_is_made_and_left_empty(run):
    assert run.path.is_dir()
    assert list(run.path.iterdir()) == []
    assert (run.checkpoints.name, run.samples.name, run.export.name) == ("checkpoints", "samples", "export")
    RunFolder(run.path)


def test_a_path_below_a_file_is_explained(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(UsageError) as caught:
        RunFolder(tmp_path / "runs" / "mine")
    assert str(caught.value) == (
        f"{tmp_path / 'runs' / 'mine'}: expected a writable run folder, got: Not a directory. "
        "Set run.dir to a folder that you may write to, or correct the owner and permissions of this one."
    )


def test_an_unwritable_folder_is_explained(tmp_path):
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    tmp_path.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # the superuser may write everywhere
    try:
        with pytest.raises(UsageError, match=r"expected a writable run folder, got: Permission denied\. Set run\.dir"):
            RunFolder(tmp_path / "mine")
    finally:
        os.seteuid(user)
        tmp_path.chmod(0o755)


def test_a_second_trainer_is_told_who_has_the_folder(run):
    with holder(run.path, HOLD) as process:
        start = time.monotonic()
        with pytest.raises(UsageError) as caught, run.lock():
            pass
        assert time.monotonic() - start < 2
        message = str(caught.value)
        assert f"in use by process {process.pid} on {socket.gethostname()} since 20" in message
        assert "set another run.name" in message
        assert json.loads((run.path / ".lock.json").read_text())["pid"] == process.pid, "the loser touched the lock"
    with run.lock():
        pass


def test_the_lock_is_free_after_use_and_after_an_error(run):
    with pytest.raises(RuntimeError), run.lock():
        raise RuntimeError
    with run.lock(), pytest.raises(UsageError, match=f"process {os.getpid()}"), run.lock():
        pass
    with run.lock():
        pass
    assert not (run.path / ".lock.json").exists()


def test_workers_that_outlive_a_killed_trainer_do_not_hold_the_folder(run):
    with holder(run.path, HOLD_WITH_WORKER) as process:
        worker = int((run.path / "worker").read_text())
    assert process.returncode < 0
    os.kill(worker, 0)  # still there
    with run.lock():
        os.kill(worker, signal.SIGKILL)


def test_an_unreadable_owner_does_not_hide_the_lock(run):
    with run.lock():
        (run.path / ".lock.json").write_text("{")
        with pytest.raises(UsageError, match="in use by another process"), run.lock():
            pass
        (run.path / ".lock.json").write_text('{"pid": 1, "host": "elsewhere", "since": "now"}')
        with pytest.raises(UsageError, match="process 1 on elsewhere since now"), run.lock():
            pass


def test_config_is_kept_as_written(run):
    run.write_config("run: {name: mine}  # as typed\n", "run:\n  name: mine\n  seed: 0\n")
    assert (run.path / "config.yaml").read_text() == "run: {name: mine}  # as typed\n"
    assert "seed: 0" in (run.path / "config.resolved.yaml").read_text()


def test_status_accumulates_and_starts_anew(run):
    run.write_status(state="starting", world_size=2)
    run.write_status(state="training", step=10)
    run.write_status(step=20, checkpoint="step-00000020")
    run.write_status(state="diverged", exit_code=4, reason="loss is nan")
    status = json.loads((run.path / "status.json").read_text())
    updated = status.pop("updated")
    assert updated.endswith("+00:00")
    assert status == {
        "state": "diverged", "world_size": 2, "step": 20, "checkpoint": "step-00000020", "exit_code": 4, "reason": "loss is nan",
    }  # fmt: skip
    run.write_status(state="starting", world_size=1)
    assert json.loads((run.path / "status.json").read_text()).keys() == {"state", "world_size", "updated"}


def test_status_is_never_half_written(run, monkeypatch):
    run.write_status(state="training", step=1)

    def crash(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        run.write_status(step=2)
    assert json.loads((run.path / "status.json").read_text())["step"] == 1


def test_metrics_are_cut_at_the_resumed_step(run):
    for step in range(1, 6):
        run.append_metrics({"step": step, "loss": step / 3})
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    run.truncate_metrics(3)
    assert lines(run.path / "metrics.jsonl") == [{"step": step, "loss": step / 3} for step in (1, 2, 3)]
    run.append_metrics({"step": 4})
    assert [line["step"] for line in lines(run.path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_line_is_never_joined_to_a_broken_one(run):
    (run.path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    run.append_metrics({"step": 2})
    run.truncate_metrics(9)
    assert [line["step"] for line in lines(run.path / "metrics.jsonl")] == [1, 2]


def test_truncating_nothing_is_nothing(run):
    run.truncate_metrics(0)
    assert list(run.path.iterdir()) == []


def test_a_metric_line_reaches_the_system_at_once(run):
    with holder(run.path, "run.append_metrics({'step': 1})\nprint('held', flush=True)\ntime.sleep(60)"):
        pass
    assert lines(run.path / "metrics.jsonl") == [{"step": 1}]


def test_rejected_clips_are_listed_once(run):
    run.reject(["a.mp4: cut", "b.mp4: no frames", "a.mp4: cut"])
    run.reject(["b.mp4: no frames", "ü.mp4: \u2028 odd"])
    run.reject([])
    rejected = [
        json.loads(line)["rejected"] for line in (run.path / "rejected.jsonl").read_text().rstrip("\n").split("\n")
    ]
    assert rejected == ["a.mp4: cut", "b.mp4: no frames", "ü.mp4: \u2028 odd"]
