"""A folder that behaves like a bucket mount, for one process, with a kill before its n-th change. Runs as a script too.

python bucket.py publish KIND FOLDER      python bucket.py svdtune KIND FOLDER KILLED_BEFORE ARGUMENTS...

A bucket knows objects alone: they appear whole when they are closed or copied, a folder is the common start of their names
and vanishes with the last of them. What the mounts make of rename differs, see `KINDS`.
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Kind:
    """What a mount does with rename, fsync, flock and append."""

    folder_rename: str
    """`each`: copy and delete one by one; `copies`: all copies, then all deletes; else the errno that refuses."""
    backwards: bool = False
    """Whether objects are moved in the reverse order of their names: the manifest last instead of first."""
    file_rename: bool = True
    """By copy and delete; False: refused as well."""
    append: bool = True
    """Whether existing files can be opened without truncating them."""
    fsync: bool = True
    """Whether folders can be synced."""
    flock: str = ""
    """The errno that refuses a lock."""


KINDS = {
    "gcsfuse": Kind("each"),
    "gcsfuse-backwards": Kind("each", backwards=True),
    "gcsfuse-without-rename-dir-limit": Kind("EMFILE"),
    "s3fs": Kind("copies", fsync=False, flock="ENOLCK"),
    "goofys": Kind("copies", backwards=True, append=False, flock="ENOTSUP"),
    "mountpoint-s3": Kind("ENOSYS", file_rename=False, append=False, fsync=False, flock="ENOSYS"),
    "refuses-with-EPERM": Kind("EPERM", file_rename=False, append=False, fsync=False, flock="ENOSYS"),
}
KILLED = 9
STRIDE = 37
"""Every change is a place for the first kill; every so-many-th for the second."""


class Bucket:
    """The patched calls: those below `root` act like `kind`, and the process ends before one change.

    `kill_at` is its number, or what it does: `copy run/checkpoints/step-00000002/trainer.json`.
    """

    def __init__(self, root: Path, kind: Kind, kill_at: int | str | None) -> None:
        self.root, self.kind, self.kill_at = str(root.resolve()) + "/", kind, kill_at
        self.changes = 0

    def mount(self) -> None:
        for name in ("unlink", "remove", "rmdir", "mkdir"):
            setattr(os, name, self._counted(getattr(os, name)))
        self.copyfile, self.replace_for_real = shutil.copyfile, os.rename
        os.rename = os.replace = self._rename
        os.fsync = self._fsync_over(os.fsync)
        fcntl.flock = self._flock_over(fcntl.flock)
        builtins.open = io.open = self._open_over(io.open)
        os.open = self._os_open_over(os.open)
        shutil.copyfile = self._copyfile

    def change(self, what: str, path: Any, dir_fd: int | None = None) -> None:
        told = f"{what} {self.inside(path, dir_fd).removeprefix(self.root)}"
        if self.kill_at in (self.changes, told):
            os._exit(KILLED)
        self.changes += 1

    def inside(self, path: Any, dir_fd: int | None = None) -> str:
        """The absolute path when it is in the bucket, else nothing."""
        if isinstance(path, int):
            full = os.readlink(f"/proc/self/fd/{path}")
        else:
            start = os.getcwd() if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
            full = os.path.normpath(os.path.join(start, os.fspath(path)))
        return full if full.startswith(self.root) else ""

    def refuse(self, name: str, path: str) -> None:
        code = getattr(errno, name)
        raise OSError(code, os.strerror(code), path)

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(path: Any, *arguments: Any, dir_fd: int | None = None, **options: Any) -> Any:
            if self.inside(path, dir_fd):
                self.change(function.__name__, path, dir_fd)
            return function(path, *arguments, dir_fd=dir_fd, **options)

        return wrapped

    def _rename(self, source: Any, target: Any, **options: Any) -> None:
        if not self.inside(source):
            self.replace_for_real(source, target, **options)
        elif not os.path.isdir(source):
            if not self.kind.file_rename:
                self.refuse("EPERM" if self.kind.folder_rename == "EPERM" else "ENOSYS", source)
            self._copy_object(source, target)
            os.unlink(source)
        elif self.kind.folder_rename not in ("each", "copies"):
            self.refuse(self.kind.folder_rename, source)
        elif os.path.isdir(target) and os.listdir(target):
            self.refuse("ENOTEMPTY", target)
        else:
            self._rename_folder(Path(source), Path(target))

    def _rename_folder(self, source: Path, target: Path) -> None:
        paths = sorted((path for path in source.rglob("*") if path.is_file()), reverse=self.kind.backwards)
        each = self.kind.folder_rename == "each"
        target.mkdir(exist_ok=True)
        for path in paths:
            (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            self._copy_object(path, target / path.relative_to(source))
            if each:
                path.unlink()
        shutil.rmtree(source)

    def _copy_object(self, source: Any, target: Any) -> None:
        """A copy in the bucket: it is there whole or not at all."""
        self.change("copy", target)
        hidden = Path(self.root.rstrip("/") + ".upload")
        hidden.write_bytes(Path(source).read_bytes())
        self.replace_for_real(hidden, target)

    def _copyfile(self, source: Any, target: Any, **options: Any) -> Any:
        """A copy by the program. Some mounts keep what was written of a file whose writer was killed."""
        if not self.inside(target):
            return self.copyfile(source, target, **options)
        content = Path(source).read_bytes()
        self.change("write", target)
        Path(target).write_bytes(content[: len(content) // 2])
        self.change("copy", target)
        Path(target).write_bytes(content)
        return target

    def _fsync_over(self, fsync: Callable[[int], None]) -> Callable[[int], None]:
        def wrapped(descriptor: int) -> None:
            path = self.inside(descriptor)
            if path:
                self.change("fsync", path)
                if not self.kind.fsync and os.path.isdir(path):
                    self.refuse("EINVAL", path)
            else:
                fsync(descriptor)

        return wrapped

    def _flock_over(self, flock: Callable[[int, int], None]) -> Callable[[int, int], None]:
        def wrapped(descriptor: Any, operation: int) -> None:
            number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
            if self.kind.flock and self.inside(number):
                self.refuse(self.kind.flock, self.inside(number))
            flock(descriptor, operation)

        return wrapped

    def _open_over(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(path: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if not isinstance(path, int) and self.inside(path) and mode.strip("bt") != "r":
                self.change("open", path)
                if not self.kind.append and mode.startswith(("a", "r")) and os.path.exists(path):
                    self.refuse("EPERM", path)
            return real(path, mode, *arguments, **options)

        return wrapped

    def _os_open_over(self, real: Callable[..., int]) -> Callable[..., int]:
        def wrapped(path: Any, flags: int, *arguments: Any, dir_fd: int | None = None, **options: Any) -> int:
            writes = flags & (os.O_WRONLY | os.O_RDWR) and not flags & os.O_TRUNC
            full = self.inside(path, dir_fd)
            if full and writes and not self.kind.append and os.path.exists(full):
                self.refuse("EPERM", full)
            return real(path, flags, *arguments, dir_fd=dir_fd, **options)

        return wrapped


def forget_empty_folders(root: Path) -> None:
    """What a new machine does not see of the bucket: folders without an object."""
    for path in sorted((path for path in root.rglob("*") if path.is_dir()), reverse=True):
        if not any(path.iterdir()):
            path.rmdir()


FILES = ("ema.safetensors", "optimizer.json", "unet.safetensors")


def publish_step(checkpoints: Path, step: int, content: str, keep: int) -> None:
    from svdtune.checkpoint import manifest
    from svdtune.checkpoint.store import publish

    manifest._versions = dict  # reading them takes longer than all else here

    def write(folder: Path) -> None:
        for name in FILES:
            (folder / name).write_text(f"{content} {name} " * 9)

    publish(checkpoints, step, write, conventions={}, config_hash="abc", keep=keep)


def killed(kind: Kind, checkpoints: Path, kill_at: int | None, step: int, content: str, keep: int) -> bool:
    """Publish in a child on a new mount of the bucket; whether it was killed before the end."""
    forget_empty_folders(checkpoints.parent)
    child = os.fork()
    if child == 0:
        try:
            Bucket(checkpoints.parent, kind, kill_at).mount()
            publish_step(checkpoints, step, content, keep)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, KILLED):
        raise SystemExit(f"publish failed at change {kill_at}")
    forget_empty_folders(checkpoints.parent)
    return code == KILLED


def state(checkpoints: Path) -> tuple[str | None, tuple[str, ...]]:
    """What the next start would go on from (`2 new`), or None, and what it would complain about."""
    from svdtune.checkpoint.store import find_latest, verify

    latest = find_latest(checkpoints)
    if latest.folder is None:
        return None, latest.skipped
    content = {(latest.folder / name).read_text().split()[0] for name in FILES}
    return f"{verify(latest.folder).step} {'+'.join(sorted(content))}", latest.skipped


SCENARIOS = {
    "first": ([], (1, "new"), [None, "1 new"]),
    "next": ([(1, "old")], (2, "new"), ["1 old", "2 new"]),
    "again": ([(1, "old")], (1, "new"), ["1 old", "1 new"]),
}
"""What is published before, what is published when the kill comes, and what may be found after it."""


def at_every_change(kind: Kind, root: Path) -> dict[str, Any]:
    """Kill one publish before each of its changes, then the next start's as well; what was lost, and how many kills."""
    result: dict[str, Any] = {}
    for name, (before, (step, content), allowed) in SCENARIOS.items():
        kills, twice, bad = 0, 0, []
        while True:
            run = root / f"{name}-{kills}"
            checkpoints = run / "checkpoints"
            run.mkdir(parents=True)
            for earlier in before:
                killed(kind, checkpoints, None, *earlier, 1)
            if not killed(kind, checkpoints, kills, step, content, 1):
                break
            bad += judge(checkpoints, allowed, [kills])
            found, _ = state(checkpoints)
            for second in range(kills % STRIDE, 1000, STRIDE):
                copy = root / f"{name}-{kills}-{second}"
                shutil.copytree(run, copy)
                if not killed(kind, copy / "checkpoints", second, 3, "third", 1):
                    if (left := sorted(path.name for path in (copy / "checkpoints").iterdir())) != ["step-00000003"]:
                        bad.append([[kills], f"left over: {left}"])
                    shutil.rmtree(copy)
                    break
                twice += 1
                bad += judge(copy / "checkpoints", [found, "3 third"], [kills, second])
                shutil.rmtree(copy)
            shutil.rmtree(run)
            kills += 1
        result[name] = {"kills": kills, "twice": twice, "bad": bad}
    return result


def judge(checkpoints: Path, allowed: list[str | None], kills: list[int]) -> list[Any]:
    found, skipped = state(checkpoints)
    left = sorted(str(path.relative_to(checkpoints)) for path in checkpoints.rglob("*") if path.is_file())
    return [] if found in allowed and not skipped else [[kills, found, skipped, left]]


def run_svdtune(kind: Kind, root: Path, kill_at: str | None, arguments: list[str]) -> None:
    from svdtune.cli import main

    forget_empty_folders(root)
    Bucket(root, kind, kill_at).mount()
    sys.argv = ["svdtune", *arguments]
    main()


if __name__ == "__main__":
    verb, name, folder, *rest = sys.argv[1:]
    if verb == "publish":
        print(json.dumps(at_every_change(KINDS[name], Path(folder))))
    else:
        run_svdtune(KINDS[name], Path(folder), rest[0] or None, rest[1:])
