"""What a network mount answers when it is unwell or knows a call not: told in a sentence, survived, nothing good deleted."""

from __future__ import annotations

import builtins
import errno
import fcntl
import json
import logging
import os
import shutil
from pathlib import Path

import pytest

from svdtune.checkpoint import files, store
from svdtune.checkpoint.store import find_latest, publish, tidy
from svdtune.errors import CheckpointError
from svdtune.trainer.lock import held
from svdtune.trainer.run_folder import RunFolder


def failure(name: str) -> OSError:
    code = getattr(errno, name)
    return OSError(code, os.strerror(code))


def publish_step(checkpoints: Path, step: int, keep: int = 1) -> Path:
    def write(folder: Path) -> None:
        (folder / "unet.safetensors").write_text(f"weights of {step} " * 9)
        (folder / "trainer.json").write_text("{}")

    return publish(checkpoints, step, write, conventions={}, config_hash="abc", keep=keep)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", ["EIO", "ESTALE"])
def test_a_checkpoint_that_cannot_be_read_is_skipped_with_a_sentence(tmp_path, monkeypatch, name):
    older, newer = publish_step(tmp_path, 1), publish_step(tmp_path, 2, keep=2)
    real = store.file_facts

    def facts(path):
        if path.parent == newer:
            raise failure(name)
        return real(path)

    monkeypatch.setattr(store, "file_facts", facts)
    latest = find_latest(tmp_path)
    assert latest.folder == older
    assert latest.skipped == (
        f"step-00000002: {newer / 'trainer.json'}: it could not be read ({failure(name).strerror}). That is the disk or "
        "mount; the file itself may be whole. Try again when the mount is well.",
    )


def test_a_checkpoint_that_vanishes_in_mid_check_is_skipped_with_a_sentence(tmp_path, monkeypatch):
    older, newer = publish_step(tmp_path, 1), publish_step(tmp_path, 2, keep=2)
    real = store.file_facts

    def facts(path):
        if path.parent == newer:
            shutil.rmtree(newer)
        return real(path)

    monkeypatch.setattr(store, "file_facts", facts)
    latest = find_latest(tmp_path)
    assert latest.folder == older
    assert f"{newer / 'trainer.json'}: it vanished while it was read: another process" in latest.skipped[0]


@pytest.mark.parametrize("method", ["is_dir", "is_file", "iterdir"])
def test_a_mount_that_is_gone_is_an_error_and_no_empty_run(tmp_path, monkeypatch, method):
    publish_step(tmp_path, 1)

    def gone(self):
        raise failure("ENOTCONN")

    monkeypatch.setattr(Path, method, gone)
    if method == "is_file":
        latest = find_latest(tmp_path)
        assert latest.folder is None
        assert "Transport endpoint is not connected" in latest.skipped[0]
    else:
        with pytest.raises(CheckpointError, match=r"it could not be read \(Transport endpoint is not connected\)"):
            find_latest(tmp_path)


def test_nothing_is_deleted_that_could_not_be_read(tmp_path, monkeypatch):
    named = publish_step(tmp_path, 2)
    hidden = files.partial_name(named)
    shutil.copytree(named, hidden)
    real = Path.is_file

    def is_file(self):
        if self.parent == named:
            raise failure("EIO")
        return real(self)

    monkeypatch.setattr(Path, "is_file", is_file)
    tidy(tmp_path)
    monkeypatch.undo()
    assert names(tmp_path) == [hidden.name, named.name]
    assert names(named) == ["MANIFEST.json", "trainer.json", "unet.safetensors"]
    tidy(tmp_path)
    assert names(tmp_path) == [named.name]


def test_the_only_whole_one_gets_its_name_back_before_anything_else(tmp_path):
    named = publish_step(tmp_path, 2)
    shutil.copytree(named, files.partial_name(named))
    (named / "unet.safetensors").unlink()
    assert find_latest(tmp_path) == store.Latest(files.partial_name(named), ())
    tidy(tmp_path)
    assert names(tmp_path) == [named.name]
    assert find_latest(tmp_path) == store.Latest(named, ())


@pytest.mark.parametrize("name", ["EINVAL", "ENOTSUP", "ENOSYS"])
def test_a_mount_that_knows_no_fsync_is_accepted(tmp_path, monkeypatch, name):
    def refuse(descriptor):
        raise failure(name)

    monkeypatch.setattr(os, "fsync", refuse)
    assert find_latest(tmp_path) == store.Latest(None, ())
    assert publish_step(tmp_path, 1) == find_latest(tmp_path).folder


@pytest.mark.parametrize("name", ["EIO", "ESTALE"])
def test_a_disk_that_fails_at_fsync_is_told_and_the_older_one_stays(tmp_path, monkeypatch, name):
    older = publish_step(tmp_path, 1)

    def fail(descriptor):
        raise failure(name)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointError, match=r"step-00000002: the checkpoint could not be written: .*\[Errno"):
        publish_step(tmp_path, 2)
    assert names(tmp_path) == [older.name]


def test_a_rename_that_fails_leaves_the_finished_checkpoint_to_the_next_start(tmp_path, monkeypatch):
    publish_step(tmp_path, 1)

    def fail(source, target):
        raise failure("EIO")

    monkeypatch.setattr(store, "swap_in", fail)
    with pytest.raises(CheckpointError, match=r"the checkpoint could not be written: .*Input/output error"):
        publish_step(tmp_path, 2)
    assert find_latest(tmp_path).folder == tmp_path / ".step-00000002.partial"
    monkeypatch.undo()
    publish_step(tmp_path, 3)
    assert names(tmp_path) == ["step-00000003"]


def lose_a_file(partial: Path, folder: Path) -> None:
    files.swap_in(partial, folder)
    (folder / "unet.safetensors").rename(folder.parent / "late")


def test_older_ones_stay_when_the_new_one_is_not_whole_under_its_name(tmp_path, monkeypatch):
    publish_step(tmp_path, 1)
    monkeypatch.setattr(store, "swap_in", lose_a_file)
    monkeypatch.setattr(store, "_PAUSES", (0.0,))
    with pytest.raises(CheckpointError) as caught:
        publish_step(tmp_path, 2)
    message = str(caught.value)
    assert "it was written and renamed without an error, yet it is not whole: " in message
    assert "got no file" in message
    assert "Older checkpoints were kept. The disk or mount of run.dir loses files" in message
    assert "step-00000001" in names(tmp_path)
    assert find_latest(tmp_path).folder == tmp_path / "step-00000001"


def test_a_listing_that_is_late_is_waited_for(tmp_path, monkeypatch):
    publish_step(tmp_path, 1)
    monkeypatch.setattr(store, "swap_in", lose_a_file)

    def sleep(seconds):
        (tmp_path / "late").rename(tmp_path / "step-00000002" / "unet.safetensors")

    monkeypatch.setattr(store.time, "sleep", sleep)
    publish_step(tmp_path, 2)
    assert names(tmp_path) == ["step-00000002"]


@pytest.mark.parametrize("name", ["ENOSYS", "ENOTSUP", "ENOLCK"])
def test_a_mount_without_locks_is_a_warning_and_a_dead_owner_is_not_in_the_way(tmp_path, monkeypatch, caplog, name):
    run = RunFolder(tmp_path / "run")
    (run.path / ".lock").touch()
    (run.path / ".lock.json").write_text('{"pid": 7, "host": "gone", "since": "noon"}')

    def refuse(descriptor, operation):
        raise failure(name)

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level(logging.WARNING), run.lock():
        assert json.loads((run.path / ".lock.json").read_text())["pid"] == os.getpid()
    assert [record.getMessage() for record in caplog.records] == [
        f"{run.path}: this file system has no locks, as mounted buckets often have none, so nothing stops a second training "
        "in this folder: start one at a time. The last one was process 7 on gone since noon, which may have ended without a word."
    ]
    caplog.clear()
    with run.lock():
        pass
    assert "The last one" not in caplog.text


def test_a_lock_that_fails_for_another_reason_is_an_error(tmp_path, monkeypatch):
    def fail(descriptor, operation):
        raise failure("EIO")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match="Input/output"), held(tmp_path / ".lock", timeout=0):
        pass


@pytest.mark.parametrize("name", ["EPERM", "EINVAL", "ENOTSUP"])
def test_metrics_are_rewritten_where_a_file_cannot_be_appended_to(tmp_path, monkeypatch, name):
    run = RunFolder(tmp_path)
    run.append_metrics({"step": 1})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')  # a kill
    real = builtins.open

    def refuse(path, mode="r", *arguments, **options):
        if mode.startswith("a"):
            raise failure(name)
        return real(path, mode, *arguments, **options)

    monkeypatch.setattr(builtins, "open", refuse)
    run.append_metrics({"step": 3})
    run.append_metrics({"step": 4})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2, "lo\n{"step": 3}\n{"step": 4}\n'


def test_a_full_disk_is_no_reason_to_rewrite_the_metrics(tmp_path, monkeypatch):
    def full(path, mode="r", *arguments, **options):
        raise failure("ENOSPC")

    monkeypatch.setattr(builtins, "open", full)
    with pytest.raises(OSError, match="No space"):
        RunFolder(tmp_path).append_metrics({"step": 1})


@pytest.mark.parametrize("content", [b'{"state": "trai', b"", b"\xff\xfe", b"[1]"])
def test_half_a_status_is_not_taken_for_the_truth(tmp_path, content):
    run = RunFolder(tmp_path)
    (tmp_path / "status.json").write_bytes(content)
    run.write_status(state="training", step=3)
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["step"]) == ("training", 3)


def test_the_heartbeat_has_new_content_since_a_bucket_sets_no_times(tmp_path):
    run = RunFolder(tmp_path)
    run.beat()
    os.utime(tmp_path / "heartbeat", (0, 0))
    run.beat()
    assert (tmp_path / "heartbeat").stat().st_mtime > 0
    assert (tmp_path / "heartbeat").read_text()


def test_where_folders_cannot_be_renamed_the_manifest_is_copied_last(tmp_path, monkeypatch):
    copied = []
    replace, copyfile = os.replace, shutil.copyfile

    def refuse_folders(source, target):
        if Path(source).is_dir():
            raise failure("ENOSYS")
        replace(source, target)

    def watch(source, target):
        copied.append(Path(target).name)
        copyfile(source, target)

    monkeypatch.setattr(os, "replace", refuse_folders)
    monkeypatch.setattr(shutil, "copyfile", watch)
    publish_step(tmp_path, 1)
    assert sorted(copied[:2]) == ["trainer.json", "unet.safetensors"]
    assert copied[2:] == ["MANIFEST.json"]
    assert names(tmp_path) == ["step-00000001"]


def test_where_folders_cannot_be_renamed_a_delete_is_marked_by_a_file_before_it_begins(tmp_path, monkeypatch):
    older = publish_step(tmp_path, 1)
    marked = []
    real, delete = os.replace, store._delete

    def refuse(source, target):
        if Path(source) == older:
            raise failure("EMFILE")
        real(source, target)

    def watch(folder):
        if folder == older:
            marked.append(names(files.partial_name(older)))  # a bucket has no empty folders
        delete(folder)

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(store, "_delete", watch)
    publish_step(tmp_path, 2)
    assert marked == [["deleted"]]
    assert names(tmp_path) == ["step-00000002"]
