"""`svdtune preflight` with its live stages: where they run, and what is said where they do not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from svdtune.cli import app
from svdtune.guards.live.here import LIGHT_GIB, objection

pytestmark = pytest.mark.usefixtures("fresh")


def test_why_the_run_is_not_built_here(small, monkeypatch):
    assert objection(small(), 0.2) == ""
    assert objection(small(), LIGHT_GIB + 1).startswith("no GPU is visible")
    assert objection(small("model.pretrained=someone/video-model"), 0.2) == "the weights are not on this machine"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert objection(small(), LIGHT_GIB + 1) == ""


def overrides(small, svd_folder, clips, tmp_path) -> list[str]:
    config = Path(__file__).parents[3] / "configs" / "tiny.yaml"
    where = [f"model.pretrained={svd_folder}", "model.variant=null", f"data.root={clips}", f"run.dir={tmp_path}"]
    what = [
        "run.threads=1",
        "data.num_frames=3",
        "data.workers=0",
        "train.batch_size=2",
        "adapt.method=lora",
        "adapt.rank=2",
    ]
    return [str(config), *where, *what, "preflight.ignore=[CFG104]"]


def test_a_light_run_is_proved_by_preflight_itself(small, svd_folder, clips, tmp_path):
    done = CliRunner().invoke(app, ["preflight", *overrides(small, svd_folder, clips, tmp_path), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert [stage["name"] for stage in told["stages"]][-2:] == ["meaning", "gradients"]
    assert told["measured"]["seconds_per_step"] > 0
    assert not list(tmp_path.glob("*/checkpoints"))


def test_another_cards_memory_is_no_question_for_this_machine(small, svd_folder, clips, tmp_path):
    command = ["preflight", *overrides(small, svd_folder, clips, tmp_path), "--gpu", "24GiB", "--json"]
    done = CliRunner().invoke(app, command)
    assert [stage["name"] for stage in json.loads(done.stdout)["stages"]][-1] == "memory"
