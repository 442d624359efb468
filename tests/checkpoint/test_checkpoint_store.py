"""Promises R1, R2, R3 and R5: whole or absent, pruned after, disk full survived, damage named."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from svdtune.checkpoint import files, store
from svdtune.checkpoint.store import Latest, find_latest, publish, verify
from svdtune.errors import CheckpointError

KILLER = Path(__file__).with_name("killer.py")


def write_three(folder: Path) -> None:
    (folder / "unet.safetensors").write_bytes(b"weights " * 100)
    (folder / "optimizer.safetensors").write_bytes(b"moments " * 100)
    (folder / "trainer.json").write_text("{}")


def publish_step(checkpoints: Path, step: int, keep: int = 3, write=write_three) -> Path:
    return publish(checkpoints, step, write, conventions={"fps_id": "fps - 1"}, config_hash="abc", keep=keep)


def names(checkpoints: Path) -> list[str]:
    return sorted(path.name for path in checkpoints.iterdir())


def run_killer(*arguments: str) -> dict:
    environment = {**os.environ, "PYTHONPATH": str(KILLER.parents[2])}
    done = subprocess.run(
        [sys.executable, str(KILLER), *arguments], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_sigkill_at_random_moments_never_loses_a_published_checkpoint(tmp_path):
    result = run_killer("kill", str(tmp_path), "80", "1")
    assert result["survived"] == result["trials"] == 80
    assert result["mid_publish"] >= 20, "the kills did not fall into publishes"


def test_every_prefix_of_file_system_calls_leaves_a_latest(tmp_path):
    result = run_killer("crash", str(tmp_path))
    assert result["new"]["bad"] == []
    assert result["replace"]["bad"] == []
    assert min(result["new"]["points"], result["replace"]["points"]) >= 25


def test_publish_returns_a_verified_folder_with_its_manifest(tmp_path):
    folder = publish_step(tmp_path, 1000)
    assert folder == tmp_path / "step-00001000"
    assert names(folder) == ["MANIFEST.json", "optimizer.safetensors", "trainer.json", "unet.safetensors"]
    manifest = verify(folder)
    assert (manifest.step, manifest.config_hash) == (1000, "abc")
    assert manifest.conventions == {"fps_id": "fps - 1"}
    assert manifest.files["unet.safetensors"].size == 800
    assert {"svdtune", "torch", "diffusers"} <= manifest.versions.keys()
    assert find_latest(tmp_path) == Latest(folder, ())


def test_data_is_durable_before_the_manifest_and_both_before_the_name(tmp_path, monkeypatch):
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def watch_fsync(descriptor):
        events.append("sync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def watch_replace(source, target):
        events.append(f"name {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(os, "replace", watch_replace)
    publish_step(tmp_path, 5)
    order = [
        "sync unet.safetensors",
        "sync .MANIFEST.json.tmp",
        "name MANIFEST.json",
        "sync .step-00000005.partial",
        "name step-00000005",
        f"sync {tmp_path.name}",
    ]
    assert [events.index(event) for event in order] == sorted(events.index(event) for event in order)
    assert events.index("sync optimizer.safetensors") < events.index("sync .MANIFEST.json.tmp")


def test_older_checkpoints_are_pruned_only_after_the_new_one_is_published(tmp_path, monkeypatch):
    publish_step(tmp_path, 1)
    publish_step(tmp_path, 2)
    seen = []
    prune = store._prune
    monkeypatch.setattr(store, "_prune", lambda *a: (seen.append(names(tmp_path)), prune(*a)))
    publish_step(tmp_path, 3, keep=2)
    assert seen == [["step-00000001", "step-00000002", "step-00000003"]]
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


def test_prune_never_deletes_the_new_one_nor_newer_nor_foreign_folders(tmp_path):
    publish_step(tmp_path, 1)
    damaged = publish_step(tmp_path, 9)
    (damaged / "unet.safetensors").unlink()
    (tmp_path / "step-00000002").mkdir()
    (tmp_path / "notes").mkdir()
    publish_step(tmp_path, 5, keep=1)
    assert names(tmp_path) == ["notes", "step-00000002", "step-00000005", "step-00000009"]


def test_a_damaged_checkpoint_does_not_count_as_kept(tmp_path):
    publish_step(tmp_path, 1)
    (publish_step(tmp_path, 2) / "unet.safetensors").unlink()
    publish_step(tmp_path, 3, keep=2)
    assert names(tmp_path) == ["step-00000001", "step-00000002", "step-00000003"]


@pytest.mark.parametrize("broken", ["replace", "rmtree"])
def test_a_delete_that_fails_is_a_warning(tmp_path, monkeypatch, caplog, broken):
    publish_step(tmp_path, 1)
    module = os if broken == "replace" else shutil
    function = getattr(module, broken)

    def refuse(source, *rest, **options):
        if "step-00000001" in str(source) and not str(source).endswith(".replaced"):
            raise OSError(errno.EBUSY, "Device or resource busy")
        return function(source, *rest, **options)

    monkeypatch.setattr(module, broken, refuse)
    with caplog.at_level(logging.WARNING):
        folder = publish_step(tmp_path, 2, keep=1)
    assert "could not delete" in caplog.text
    assert "Training goes on" in caplog.text
    assert find_latest(tmp_path).folder == folder
    monkeypatch.undo()
    publish_step(tmp_path, 3, keep=1)
    assert names(tmp_path) == ["step-00000003"]


def test_publishing_a_step_again_replaces_it(tmp_path):
    publish_step(tmp_path, 7)
    publish_step(tmp_path, 7, write=lambda folder: (folder / "new.json").write_text("{}"))
    assert list(verify(tmp_path / "step-00000007").files) == ["new.json"]
    assert names(tmp_path) == ["step-00000007"]


def test_what_a_killed_run_left_is_removed_by_the_next_publish(tmp_path):
    left = tmp_path / ".step-00000004.partial"
    left.mkdir()
    (left / "unet.safetensors").write_bytes(b"half")
    publish_step(tmp_path, 5)
    assert names(tmp_path) == ["step-00000005"]


def test_a_crash_between_parking_and_renaming_is_read_and_repaired(tmp_path):
    folder = publish_step(tmp_path, 7)
    parked = files.replaced_name(folder)
    folder.rename(parked)
    assert find_latest(tmp_path) == Latest(parked, ())
    publish_step(tmp_path, 8)
    assert names(tmp_path) == ["step-00000007", "step-00000008"]


def test_an_error_while_writing_leaves_no_partial_folder(tmp_path):
    def write(folder):
        write_three(folder)
        raise RuntimeError("the optimizer is on fire")

    with pytest.raises(RuntimeError, match="on fire"):
        publish_step(tmp_path, 1, write=write)
    assert names(tmp_path) == []


FULL = {
    "errno": OSError(errno.ENOSPC, "No space left on device"),
    "quota": OSError(errno.EDQUOT, "Disk quota exceeded"),
    "safetensors": RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
}


@pytest.mark.parametrize("kind", FULL)
def test_a_full_disk_is_explained_and_survived(tmp_path, kind):
    before = publish_step(tmp_path, 1)

    def write(folder):
        write_three(folder)
        raise FULL[kind]

    with pytest.raises(CheckpointError) as caught:
        publish_step(tmp_path, 2, write=write)
    message = str(caught.value)
    assert re.fullmatch(
        re.escape(f"{tmp_path / 'step-00000002'}: the disk or quota was full after 0.00 MiB of this checkpoint ")
        + r"\(the one before needed 0\.00 MiB\)\. The partial folder was removed, available are now [\d.]+ [GM]iB; .*",
        message,
    )
    assert "Free space, lower checkpoint.keep, or set run.dir to a larger disk" in message
    assert names(tmp_path) == ["step-00000001"]
    assert find_latest(tmp_path).folder == before
    assert caught.value.exit_code == 3


def test_a_disk_that_fills_up_at_the_manifest_is_the_same_error(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"full after 0\.00 MiB of this checkpoint\. The partial"):
        publish_step(tmp_path, 1)
    assert names(tmp_path) == []


def test_other_errors_of_the_disk_are_not_called_full(tmp_path):
    def write(folder):
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(CheckpointError) as caught:
        publish_step(tmp_path, 1, write=write)
    assert str(caught.value) == (
        f"{tmp_path / 'step-00000001'}: the checkpoint could not be written: [Errno 5] Input/output error. Earlier checkpoints "
        "are untouched. See to the disk or mount of run.dir; the same command then resumes from the newest whole one."
    )


def flip_a_bit(folder: Path) -> None:
    path = folder / "optimizer.safetensors"
    content = bytearray(path.read_bytes())
    content[400] ^= 1
    path.write_bytes(content)


def edit_manifest(folder: Path, **changes) -> None:
    path = folder / "MANIFEST.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


DAMAGE = {
    "flipped bit": (flip_a_bit, r"optimizer\.safetensors: expected sha256 \w{16}…, got \w{16}…: its content changed"),
    "truncated": (
        lambda f: (f / "unet.safetensors").write_bytes(b"weights " * 99),
        r"unet\.safetensors: expected 800 bytes, got 792: the file was cut",
    ),
    "missing file": (
        lambda f: (f / "trainer.json").unlink(),
        r"trainer\.json: expected 2 bytes, got no file",
    ),
    "no manifest": (
        lambda f: (f / "MANIFEST.json").unlink(),
        r"MANIFEST\.json: expected the list .* got none: the folder is unfinished or was not written by svdtune",
    ),
    "manifest cut": (
        lambda f: (f / "MANIFEST.json").write_text('{"format": 1, "st'),
        r"MANIFEST\.json: expected JSON, got text that does not parse",
    ),
    "manifest of another program": (
        lambda f: (f / "MANIFEST.json").write_text('{"version": 3}'),
        r"MANIFEST\.json: got a manifest with missing or wrong fields",
    ),
    "manifest is a list": (lambda f: (f / "MANIFEST.json").write_text("[1]"), r"missing or wrong fields"),
    "newer format": (
        lambda f: edit_manifest(f, format=2),
        r"got format 2, this svdtune reads up to 1: update svdtune",
    ),
    "path in manifest": (
        lambda f: edit_manifest(f, files={"../../secret": {"size": 1, "sha256": "0"}}),
        r"'\.\./\.\./secret' is no plain file name",
    ),
    "another step": (
        lambda f: edit_manifest(f, step=3),
        r"the name says step 2, its manifest says step 3: .* Rename it to step-00000003",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_latest_falls_back(tmp_path, kind):
    whole = publish_step(tmp_path, 1)
    damaged = publish_step(tmp_path, 2)
    damage, sentence = DAMAGE[kind]
    damage(damaged)
    with pytest.raises(CheckpointError, match=sentence):
        verify(damaged)
    latest = find_latest(tmp_path)
    assert latest.folder == whole
    assert len(latest.skipped) == 1
    assert latest.skipped[0].startswith("step-00000002: ")


def test_a_named_checkpoint_that_is_missing_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="step-00000004: expected a checkpoint folder, got nothing"):
        verify(tmp_path / "step-00000004")
    (tmp_path / "step-00000004").write_text("")
    with pytest.raises(CheckpointError, match="expected a checkpoint folder, got a file"):
        verify(tmp_path / "step-00000004")


def test_latest_of_nothing_is_none(tmp_path):
    assert find_latest(tmp_path / "absent") == Latest(None, ())
    (tmp_path / ".step-00000001.partial").mkdir()
    (tmp_path / "step-1").mkdir()
    assert find_latest(tmp_path) == Latest(None, ())


def test_steps_beyond_eight_digits_sort_by_number(tmp_path):
    publish_step(tmp_path, 99_999_999)
    newest = publish_step(tmp_path, 100_000_000)
    assert find_latest(tmp_path).folder == newest


def test_a_copy_under_another_name_verifies(tmp_path):
    shutil.copytree(publish_step(tmp_path, 3), tmp_path / "best")
    assert verify(tmp_path / "best").step == 3


def test_programming_errors_are_plain(tmp_path):
    with pytest.raises(ValueError, match="keep must be at least 1"):
        publish_step(tmp_path, 1, keep=0)
    with pytest.raises(ValueError, match="plain files only, got nested"):
        publish_step(tmp_path, 1, write=lambda folder: (folder / "nested").mkdir())


def test_a_folder_that_cannot_be_synced_is_accepted(tmp_path, monkeypatch):
    fsync = os.fsync

    def refuse_folders(descriptor):
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).is_dir():
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    publish_step(tmp_path, 1)
    assert find_latest(tmp_path).folder is not None


def test_the_store_needs_no_torch():
    code = "import svdtune.checkpoint.store, svdtune.trainer.run_folder, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=KILLER.parents[2]).returncode == 0
