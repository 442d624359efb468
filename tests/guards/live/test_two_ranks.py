"""The whole way on two processes: a run that is no run of two ends before its first update."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("case", "code", "told"),
    [
        ("bypassed", "DST810", "`.module`"),
        ("same clips", "DST811", "demo-"),
        ("changed", "DST813", "vae."),
        ("fails on one", "SHP401", "rank 1: error"),
    ],
)
def test_it_is_refused(case, code, told, small, clips, svd_folder, tmp_path):
    config = small()
    overrides = [f"model.pretrained={svd_folder}", "model.variant=null", f"data.root={clips}", f"run.dir={tmp_path / 'runs'}", "run.name=r",
                 "run.threads=1", "data.num_frames=3", "data.workers=0", "train.batch_size=1", "train.steps=2", "train.warmup=0",
                 "adapt.method=lora", "adapt.rank=2", "validation.clips=0", "validation.samples=0"]  # fmt: skip
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = Path(__file__).with_name("refused_script.py")
    done = subprocess.run(
        [*launcher, str(script), case, str(Path(__file__).parents[3] / "configs" / "tiny.yaml"), *overrides],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr[-2000:]
    assert code in done.stdout, done.stdout + done.stderr[-2000:]
    assert told in done.stdout
    folder = Path(config.run.dir) / "r"
    assert json.loads((folder / "status.json").read_text())["exit_code"] == 3
    assert not (folder / "checkpoints").exists()
