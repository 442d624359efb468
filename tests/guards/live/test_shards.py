"""The proof before the first update, where each of two processes holds a part of the UNet (FSDP2)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.conftest import REPO, SHORT

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.fixture(scope="module")
def found(clips, tmp_path_factory) -> list[dict[str, Any]]:
    """For each of two processes what shard_script.py says of every case."""
    out = tmp_path_factory.mktemp("shards")
    script = [sys.executable, *TORCHRUN, str(Path(__file__).with_name("shard_script.py")), str(out)]
    config = [str(REPO / "configs/tiny.yaml"), f"data.root={clips}", *SHORT, "train.steps=2", "train.accumulation=2", "train.ema=true",
              "train.batch_size=1", "data.num_frames=2", "memory.checkpointing=diffusers"]  # fmt: skip
    fsdp2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*script, *config], capture_output=True, text=True, timeout=600, env={**os.environ, **fsdp2}, cwd=REPO
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


def test_each_process_holds_half_of_what_is_trained_and_of_what_is_not(found):
    assert [part for each in found for part in each["share"]] == pytest.approx([0.5] * 4, abs=0.03)


@pytest.mark.parametrize("case", ["sound", "sound again"])
def test_a_sound_run_is_proved_and_left_as_it_was(found, case):
    assert [each[case] for each in found] == [[], []]
    assert all(each["as before"] and each["no state"] for each in found)


def test_a_parameter_without_a_gradient_is_found(found):
    assert [each["frozen"] for each in found] == [["SEM561", "SEM563"]] * 2


def test_a_checkpoint_that_is_rounded_is_found(found):
    assert [each["rounded"] for each in found] == [["SEM566"]] * 2


def test_one_process_may_look_longer_than_the_other(found):
    """What is not finite is looked for where it is, while the other process has gone on."""
    assert [each["nan on one rank"] for each in found] == [["NUM606"]] * 2
    assert found[0]["culprit"] == "None"
    assert "vae." in found[1]["culprit"]
