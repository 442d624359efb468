"""docker/entry as the image runs it, with stand-ins for the programs."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENTRY = ROOT / "docker/entry"
LONG = 60
"""Seconds that nothing here takes, even on a slow machine."""
pytestmark = pytest.mark.timeout(3 * LONG)

# Dies of SIGTERM without a word to its child, as accelerate's launcher of one process does. The child notices and saves.
LAUNCHER = """
import ctypes, os, signal, sys, time
if os.fork():
    signal.pause()
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
def save(*_):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    print("saving", flush=True)
    time.sleep({seconds})
    open(sys.argv[1], "w").close()
    os._exit(143)
signal.signal(signal.SIGTERM, save)
print("training", flush=True)
while True:
    signal.pause()
"""

TRAINER = """
import signal, sys
def save(number, _):
    print(signal.Signals(number).name, flush=True)
    sys.exit(143)
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, save)
print("training", flush=True)
while True:
    signal.pause()
"""


@pytest.fixture
def programs(tmp_path: Path) -> dict[str, str]:
    """An environment with a `svdtune` that says its arguments, and little else."""
    stand_in = tmp_path / "svdtune"
    stand_in.write_text('#!/bin/sh\necho "svdtune: $*"\nexit 7\n')
    stand_in.chmod(0o755)
    return {**os.environ, "PATH": f"{tmp_path}:{Path(sys.executable).parent}:/usr/bin:/bin"}


@contextmanager
def running(*arguments: str, **options) -> Iterator[subprocess.Popen[str]]:
    """docker/entry in a process group of its own, that nothing of it outlives the test."""
    process = subprocess.Popen(
        [sys.executable, ENTRY, *arguments], stdout=subprocess.PIPE, text=True, start_new_session=True, **options
    )
    try:
        yield process
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            assert process.poll() is not None
        process.communicate()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "svdtune: --help"),
        (["--version"], "svdtune: --version"),
        (["train", "cfg.yaml", "data.root=a b"], "svdtune: train cfg.yaml data.root=a b"),
        (["svdtune", "train", "cfg.yaml"], "svdtune: train cfg.yaml"),
        (["trian"], "svdtune: trian"),
    ],
)
def test_svdtune_is_meant_where_no_program_is(programs, arguments, said):
    done = subprocess.run([ENTRY, *arguments], env=programs, capture_output=True, text=True, timeout=LONG)
    assert (done.stdout.strip(), done.returncode) == (said, 7)


def test_programs_of_the_image_run_as_they_are(programs):
    done = subprocess.run(
        [ENTRY, "sh", "-c", "echo $0 $1; exit 3", "a", "b"], env=programs, capture_output=True, text=True
    )
    assert (done.stdout, done.returncode) == ("a b\n", 3)


def test_image_without_svdtune_says_so():
    done = subprocess.run(
        [sys.executable, ENTRY], env={"PATH": "/nowhere"}, capture_output=True, text=True, timeout=LONG
    )
    assert done.returncode == 1
    assert done.stderr == "error: svdtune: cannot be started: No such file or directory\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_reaches_the_trainer_and_its_exit_code_comes_back(number):
    with running(sys.executable, "-c", TRAINER) as process:
        assert line(process) == "training"
        process.send_signal(number)
        assert line(process) == number.name
        assert process.wait(LONG) == 143


def test_signals_are_not_blocked_in_the_command():
    code = "import signal; print(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])))"
    with running(sys.executable, "-c", code) as process:
        assert line(process) == "[]"


def test_stays_until_the_trainer_of_a_killed_launcher_has_saved(tmp_path):
    saved = tmp_path / "saved"
    with running(sys.executable, "-c", LAUNCHER.format(seconds=2), str(saved)) as process:
        assert line(process) == "training"
        process.send_signal(signal.SIGTERM)
        assert process.wait(LONG) == 143
        assert saved.exists()


def test_stays_also_when_the_launcher_dies_of_something_else(tmp_path):
    saved = tmp_path / "saved"
    with running(sys.executable, "-c", LAUNCHER.format(seconds=2), str(saved)) as process:
        assert line(process) == "training"
        (launcher,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(launcher), signal.SIGKILL)
        assert process.wait(LONG) == 137
        assert saved.exists()


def test_second_signal_ends_it_while_the_trainer_saves():
    with running(sys.executable, "-c", LAUNCHER.format(seconds=LONG), os.devnull) as process:
        assert [line(process)] == ["training"]
        process.send_signal(signal.SIGTERM)
        assert line(process) == "saving"
        started = time.monotonic()
        while process.poll() is None and time.monotonic() - started < LONG / 2:
            process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
        assert process.poll() == 143


def test_program_that_ends_by_itself_is_the_end():
    """What a command leaves in the background on purpose ends with the container, as everywhere."""
    with running("sh", "-c", f"sleep {2 * LONG} & exit 5") as process:
        assert process.wait(LONG) == 5
