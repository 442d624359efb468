"""Checkpoints on a mounted bucket: rename copies and deletes, or is refused; no kill at any change loses a checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoint.bucket import KILLED, KINDS

BUCKET = Path(__file__).with_name("bucket.py")
ROOT = BUCKET.parents[2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_kill_before_any_change_leaves_the_old_or_the_new_one_and_the_next_start_cleans_up(tmp_path, kind):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(BUCKET), "publish", kind, str(tmp_path / "bucket")],
        capture_output=True, text=True, env=environment, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for scenario, result in json.loads(done.stdout).items():
        assert result["bad"] == [], scenario
        assert result["kills"] >= 25
        assert result["twice"] >= 15


def train(kind: str, runs: Path, clips: Path, *, name: str = "run", killed_before: str = "") -> None:
    """`svdtune train configs/tiny.yaml` with its run folder on the bucket, to the end or to a kill."""
    overrides = [f"run.dir={runs}", f"run.name={name}", f"data.root={clips}", "preflight.enabled=false", *QUICK]
    done = subprocess.run(
        [sys.executable, str(BUCKET), "svdtune", kind, str(runs), killed_before, "train", "configs/tiny.yaml", *overrides],
        capture_output=True, text=True, timeout=900, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == (KILLED if killed_before else 0), f"{killed_before}: {done.stderr[-3000:]}"
    assert ("this file system has no locks" in done.stderr) == bool(KINDS[kind].flock)


QUICK = ["train.steps=3", "checkpoint.interval=1", "checkpoint.keep=1", "train.batch_size=1", "train.warmup=0",
         "adapt.method=lora", "adapt.rank=2", "data.num_frames=2", "data.height=32", "data.width=48", "data.workers=0", "run.threads=1",
         "validation.samples=0", "validation.clips=0"]  # fmt: skip
KILLS = {
    "gcsfuse": [
        "copy run/checkpoints/step-00000001/optimizer.safetensors",  # the first checkpoint ever is torn
        "copy run/checkpoints/step-00000002/lora.safetensors",
        "copy run/checkpoints/.step-00000001.partial/optimizer.json",  # the old one is torn while it goes
        "copy run/export/adapter_model.safetensors",
    ],
    "goofys": ["unlink run/checkpoints/.step-00000002.partial/lora.safetensors", "copy run/status.json"],
    "mountpoint-s3": ["write run/checkpoints/step-00000003/optimizer.safetensors", "write run/metrics.jsonl"],
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from svdtune.data.demo import write_demo

    folder = tmp_path_factory.mktemp("clips")
    write_demo(folder, clips=6, motion="down", seed=0)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("uninterrupted")
    train("gcsfuse", runs, clips)
    return runs / "run"


@pytest.mark.parametrize("kind", KILLS)
def test_a_run_on_a_bucket_that_is_killed_again_and_again_ends_as_one_that_was_not(
    tmp_path, clips, uninterrupted, kind
):
    for killed_before in KILLS[kind]:
        train(kind, tmp_path, clips, killed_before=killed_before)
    train(kind, tmp_path, clips)
    run = tmp_path / "run"
    assert losses(run) == losses(uninterrupted)
    assert list(losses(run)) == [1, 2, 3]
    assert not [path.name for path in run.glob("checkpoints/.*")]
    for file in ("lora.safetensors", "optimizer.safetensors"):
        path = Path("checkpoints/step-00000003") / file
        assert (run / path).read_bytes() == (uninterrupted / path).read_bytes()
    adapter = Path("export/adapter_model.safetensors")
    assert (run / adapter).read_bytes() == (uninterrupted / adapter).read_bytes()
    assert not [path.name for path in run.glob(".export*")]
    assert json.loads((run / "status.json").read_text())["state"] == "done"


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}
