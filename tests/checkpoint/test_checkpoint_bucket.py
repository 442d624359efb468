"""Checkpoints on a mounted bucket: rename copies and deletes, or is refused; no kill at any change loses a checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoint.bucket import KINDS

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
