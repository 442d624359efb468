"""docker/smoke.sh by itself, on this machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def smoke(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "SMOKE_DIR": str(folder), "ACCELERATE_USE_CPU": "true"}
    command = [ROOT / "docker/smoke.sh", *overrides]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)


@pytest.mark.timeout(1600)
def test_smoke_makes_a_checkpoint_an_export_and_a_video(tmp_path):
    done = smoke(tmp_path, "run.threads=1", "preflight.enabled=false")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("smoke: ok\n")
    assert (tmp_path / "runs/smoke/checkpoints/step-00000003/MANIFEST.json").exists()
    assert (tmp_path / "sample.mp4").stat().st_size > 1000


def test_smoke_ends_at_the_first_that_fails(tmp_path):
    done = smoke(tmp_path, "train.lr=fast")
    assert done.returncode == 2
    assert "train.lr" in done.stdout
    assert "smoke: ok" not in done.stdout
    assert not (tmp_path / "runs").exists()
