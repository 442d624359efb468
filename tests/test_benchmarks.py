"""The benchmark that measures the full size runs here on the tiny architecture, by the same path."""

import json
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).parents[1]


def reported(command: list[str], work: Path) -> dict:
    """The JSON object that a benchmark prints."""
    done = subprocess.run(
        [sys.executable, *command, "--work", str(work)], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_full_size_benchmark_reports_what_it_saw(tmp_path):
    command = ["benchmarks/full_size.py", "configs/tiny.yaml", "train.steps=7", "train.batch_size=1", "--base", "tiny"]
    seen = reported(command, tmp_path)
    assert seen["steps"] == len(seen["losses"]) == 7
    assert 0 < seen["seconds_per_step_median"] < 60
    assert seen["peak_memory_gib"] > 0.1
    assert "svdtune train configs/tiny.yaml" in seen["command"]


def test_device_dry_run_reports_predicted_and_measured(tmp_path):
    command = ["benchmarks/device.py", "configs/tiny.yaml", "train.batch_size=1", "run.threads=1", "--base", "tiny"]
    seen = reported(command, tmp_path)
    assert seen["predicted"]["peak_gib"] > 0
    assert 0 < seen["measured"]["seconds_per_step"] < 60
    assert [(stage["name"], stage["status"]) for stage in seen["stages"]] == [("meaning", "ok"), ("gradients", "ok")]
    assert seen["findings"] == []
