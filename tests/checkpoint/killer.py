"""Run as a script without torch: kill or crash a child that publishes, then read what is left. Prints one JSON object.

python killer.py kill FOLDER TRIALS SEED      python killer.py crash FOLDER
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from svdtune.checkpoint.store import find_latest, publish, verify


def publish_step(checkpoints: Path, step: int, *, keep: int, num_bytes: int = 300_000) -> None:
    def write(folder: Path) -> None:
        for name in ("unet.safetensors", "optimizer.safetensors", "trainer.json"):
            descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT)
            for _ in range(3):
                os.write(descriptor, os.urandom(num_bytes // 9))
            os.close(descriptor)

    publish(checkpoints, step, write, conventions={}, config_hash="abc", keep=keep)


def in_child(work) -> int:
    """Fork, run `work` there, return the pid."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    return pid


def kill(checkpoints: Path, trials: int, seed: int) -> dict:
    """SIGKILL at a random moment of back-to-back publishes; the newest published one must be there and whole."""
    chance = random.Random(seed)
    done, survived, mid_publish = 0, 0, 0
    for _ in range(trials):
        reading, writing = os.pipe()

        def work(first=done, writing=writing):
            step = max(first, 1)
            while True:  # the first publish of each trial replaces the newest checkpoint
                publish_step(checkpoints, step, keep=2)
                os.write(writing, f"{step}\n".encode())
                step += 1

        pid = in_child(work)
        os.close(writing)
        time.sleep(chance.uniform(0.0, 0.3))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with os.fdopen(reading) as pipe:
            reported = [int(line) for line in pipe.read().split()]
        done = max([done, *reported])
        mid_publish += any(checkpoints.glob(".step-*"))
        latest = find_latest(checkpoints)
        newest = verify(latest.folder).step if latest.folder else 0
        survived += newest >= done and not latest.skipped
        done = max(done, newest)
    return {"trials": trials, "survived": survived, "mid_publish": mid_publish, "published": done}


def crash(root: Path) -> dict:
    """Exit before the n-th file system call of a publish, for every n, and read what is left."""
    result = {}
    for name, step in (("new", 2), ("replace", 1)):
        points, bad = 0, []
        while True:
            checkpoints = root / f"{name}-{points}"
            publish_step(checkpoints, 1, keep=1, num_bytes=900)
            before = verify(checkpoints / "step-00000001").files
            calls = crash_in_child(checkpoints, step, points)
            latest = find_latest(checkpoints)
            files = verify(latest.folder).files if latest.folder else None
            whole = files == before or (files is not None and verify(latest.folder).step == step)
            publish_step(checkpoints, 3, keep=1, num_bytes=900)  # the next run cleans up and goes on
            left = sorted(p.name for p in checkpoints.iterdir())
            if not whole or latest.skipped or left != ["step-00000003"]:
                bad.append([points, str(latest), left])
            if calls == 0:
                break
            points += 1
            shutil.rmtree(checkpoints)
        result[name] = {"points": points, "bad": bad}
    return result


def crash_in_child(checkpoints: Path, step: int, point: int) -> int:
    """Publish in a child that exits at call number `point`. Returns the exit code: 9 when it was reached, 0 when not."""
    calls = 0

    def stop_before(function):
        def wrapped(*args, **kwargs):
            nonlocal calls
            if calls == point:
                if function is write:
                    write(args[0], args[1][: len(args[1]) // 2])  # torn
                os._exit(9)
            calls += 1
            return function(*args, **kwargs)

        return wrapped

    write = os.write

    def work():
        for name in ("replace", "fsync", "write", "unlink", "rmdir", "mkdir", "open"):
            setattr(os, name, stop_before(getattr(os, name)))
        publish_step(checkpoints, step, keep=1, num_bytes=900)

    _, status = os.waitpid(in_child(work), 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, 9):
        raise SystemExit(f"publish failed at point {point}")
    return code


if __name__ == "__main__":
    if sys.argv[1] == "kill":
        print(json.dumps(kill(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))))
    else:
        print(json.dumps(crash(Path(sys.argv[2]))))
