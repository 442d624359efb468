"""The whole way on two processes: a run whose gradients are not averaged ends before its first update."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def test_gradients_that_are_not_averaged_are_refused(small, clips, svd_folder, tmp_path):
    config = small()
    overrides = [f"model.pretrained={svd_folder}", "model.variant=null", f"data.root={clips}", f"run.dir={tmp_path / 'runs'}", "run.name=r",
                 "run.threads=1", "data.num_frames=3", "data.workers=0", "train.batch_size=1", "train.steps=2", "train.warmup=0",
                 "adapt.method=lora", "adapt.rank=2", "validation.clips=0", "validation.samples=0"]  # fmt: skip
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = Path(__file__).with_name("refused_script.py")
    done = subprocess.run(
        [*launcher, str(script), str(Path(__file__).parents[3] / "configs" / "tiny.yaml"), *overrides],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr[-2000:]
    assert "DST810" in done.stdout
    assert "`.module`" in done.stdout
    folder = Path(config.run.dir) / "r"
    assert json.loads((folder / "status.json").read_text())["exit_code"] == 3
    assert not (folder / "checkpoints").exists()
