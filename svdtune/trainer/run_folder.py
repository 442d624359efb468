"""The folder of one run: lock, config, status, metrics, rejected clips. It tells the truth after any crash. No torch."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from svdtune.checkpoint.files import save_json, write_text
from svdtune.errors import UsageError

State = Literal["starting", "training", "done", "failed", "stopped", "diverged"]
ENDED = ("done", "failed", "stopped", "diverged")
_STATUS_SECONDS = 5
"""A status that another process writes takes milliseconds."""


@dataclass(frozen=True)
class RunFolder:
    """`runs/<name>/`, created and known to be writable. Only the main process writes here, except rejected clips and failures."""

    path: Path

    def __post_init__(self) -> None:
        """Raises UsageError when the folder cannot be made or written."""
        probe = self.path / f".writable-{os.getpid()}"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink(missing_ok=True)  # ranks on other hosts may share the pid
        except OSError as error:
            raise UsageError(
                f"{self.path}: expected a writable run folder, got: {error.strerror}. "
                "Set run.dir to a folder that you may write to, or correct the owner and permissions of this one."
            ) from None

    @property
    def checkpoints(self) -> Path:
        """Holds step-00001000/."""
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        """Holds step-000500/*.mp4."""
        return self.path / "samples"

    @property
    def export(self) -> Path:
        """The finished model."""
        return self.path / "export"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run folder. The kernel frees the lock when its process dies, so a stale lock file is harmless.

        Raises UsageError naming process and host of the owner.
        """
        # filelock 4 lets go of the lock in forked children; otherwise loader workers would hold it after a kill
        lock, owner = FileLock(self.path / ".lock", timeout=0), self.path / ".lock.json"
        try:
            lock.acquire()
        except Timeout:
            raise UsageError(_in_use(self.path, _read_object(owner))) from None
        try:
            save_json(owner, {"pid": os.getpid(), "host": socket.gethostname(), "since": now()})
            yield
        finally:
            owner.unlink(missing_ok=True)
            lock.release()

    def write_config(self, text: str, resolved: str) -> None:
        """Write config.yaml as the person wrote it, and config.resolved.yaml with defaults and overrides."""
        write_text(self.path / "config.yaml", text)
        write_text(self.path / "config.resolved.yaml", resolved)

    def write_status(self, *, state: State | None = None, **facts: Any) -> None:
        """Update status.json atomically: state, step, world_size, exit_code, reason, checkpoint and so on.

        Facts not named keep their value; state `starting` forgets those of an earlier process. How a run ended is said
        once: ranks that fail because one stopped, or a main thread that goes on a little, do not take its place.
        """
        # Any rank may tell its end, and so may the thread that hears signals.
        with FileLock(self.path / ".status.lock", timeout=_STATUS_SECONDS):
            known = {} if state == "starting" else self.status()
            if known.get("state") in ENDED:
                return
            named = {"state": state, **facts} if state else facts
            save_json(self.path / "status.json", {**known, **named, "updated": now()})

    def status(self) -> dict[str, Any]:
        """What status.json says."""
        return _read_object(self.path / "status.json")

    def append_metrics(self, values: dict[str, Any]) -> None:
        """Add one line to metrics.jsonl and hand it to the system. Lines with a `step` can be taken back by step."""
        _append(self.path / "metrics.jsonl", [json.dumps(values)])

    def append_finding(self, finding: dict[str, Any]) -> None:
        """Add one line to findings.jsonl: what was noticed in flight."""
        _append(self.path / "findings.jsonl", [json.dumps(finding, ensure_ascii=False)])

    def beat(self) -> None:
        """Touch the heartbeat file: its age tells a watcher how long ago a step, a sampler step or a held-out clip ended."""
        (self.path / "heartbeat").touch()

    def truncate_metrics(self, step: int) -> None:
        """Drop lines after `step` (they will be written again) and a line that a kill cut short."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return
        kept = [line for line in _lines(path) if (values := _parse(line)) is not None and values.get("step", 0) <= step]
        write_text(path, "".join(f"{line}\n" for line in kept))

    def reject(self, lines: Iterable[str]) -> None:
        """Add clips that could not be used to rejected.jsonl as `{"rejected": line}`, each line once in the life of the run."""
        path = self.path / "rejected.jsonl"
        known = set(_lines(path)) if path.exists() else set()
        new = [json.dumps({"rejected": line}, ensure_ascii=False) for line in dict.fromkeys(lines)]
        _append(path, [line for line in new if line not in known])


def _append(path: Path, lines: list[str]) -> None:
    if not lines:
        return
    with open(path, "a+b") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            lines = lines if file.read(1) == b"\n" else ["", *lines]  # a kill cut the last line: do not join it
        file.write("".join(f"{line}\n" for line in lines).encode())


def _lines(path: Path) -> list[str]:
    """Lines without their end; split at newlines only, since JSON may hold other separators."""
    return path.read_text(encoding="utf-8", errors="replace").split("\n")


def _parse(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; empty when there is none, since this file only informs."""
    try:
        return _parse(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        return {}


def _in_use(path: Path, owner: dict[str, Any]) -> str:
    who = f"process {owner['pid']} on {owner['host']} since {owner['since']}" if "pid" in owner else "another process"
    return (
        f"{path}: the run folder is in use by {who}. Two trainings would overwrite each other's checkpoints: "
        "wait for it, stop it, or set another run.name."
    )


def now() -> str:
    """As all files of a run write it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
