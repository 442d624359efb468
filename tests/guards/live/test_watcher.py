"""The watch over a real run: refused before its first update, findings in findings.jsonl and wandb, stopped only when told to."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from svdtune.diffusion import conditioning
from svdtune.errors import Diverged, PreflightError
from svdtune.guards.findings import Finding
from svdtune.guards.live.flight import Flight
from svdtune.guards.live.watcher import Watcher
from svdtune.trainer import loop, run

pytestmark = [
    pytest.mark.usefixtures("fresh"),
    pytest.mark.filterwarnings(
        "ignore:.*lr_scheduler.step.*:UserWarning", "ignore:__array__ implementation:DeprecationWarning"
    ),
]


def folder(config) -> Path:
    return Path(config.run.dir) / config.run.name


def status(config) -> dict:
    return json.loads((folder(config) / "status.json").read_text())


def findings(config) -> list[dict]:
    return [json.loads(line) for line in (folder(config) / "findings.jsonl").read_text().splitlines()]


SPIKE = Finding("SEM540", "warning", "loss", "10", "1", "why", "fix")


def test_a_sound_run_is_proved_and_trained(small, capsys):
    config = small()
    run.train(config, config_text="", watch=Watcher(None))
    report = json.loads((folder(config) / "preflight.json").read_text())
    assert [stage["name"] for stage in report["stages"]] == ["meaning", "gradients"]
    assert report["measured"]["device"] == "CPU"
    assert "step proved on your clips" in capsys.readouterr().err
    assert status(config)["state"] == "done"
    assert not (folder(config) / "findings.jsonl").exists()


def test_the_proof_changes_nothing_of_the_run(small, tmp_path):
    """Losses and weights of a watched run are those of one without, equal to the bit."""
    for name, watch in (("plain", None), ("watched", Watcher(None))):
        run.train(small(f"run.name={name}", "train.ema=true"), config_text="", watch=watch)
    plain, watched = (tmp_path / "runs" / name for name in ("plain", "watched"))
    lines = [
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()] for path in (plain, watched)
    ]
    losses = [[(line["loss"], line["grad_norm"]) for line in each if "loss" in line] for each in lines]
    assert len(losses[0]) == 3
    assert losses[0] == losses[1]
    saved = [(path / "checkpoints" / "step-00000003" / "lora.safetensors").read_bytes() for path in (plain, watched)]
    assert saved[0] == saved[1]


def test_a_broken_step_is_refused_before_the_first_update(small, monkeypatch):
    ids = conditioning.added_time_ids
    monkeypatch.setattr(conditioning, "added_time_ids", lambda *a: ids(*a)[:, [1, 0, 2]])
    config = small()
    with pytest.raises(PreflightError, match="refused before its first update") as error:
        run.train(config, config_text="", watch=Watcher(None))
    assert "SEM502" in str(error.value)
    assert "motion_bucket_id" in str(error.value)
    assert status(config)["exit_code"] == 3
    assert not (folder(config) / "metrics.jsonl").exists()
    assert not (folder(config) / "checkpoints").exists()
    report = json.loads((folder(config) / "preflight.json").read_text())
    assert not report["ok"]
    assert report["stages"][-1] == {**report["stages"][-1], "name": "meaning", "status": "failed"}


def test_an_ignored_code_lets_it_train(small, monkeypatch):
    ids = conditioning.added_time_ids
    monkeypatch.setattr(conditioning, "added_time_ids", lambda *a: ids(*a)[:, [1, 0, 2]])
    config = small("preflight.ignore=[SEM502]")
    run.train(config, config_text="", watch=Watcher(None))
    report = json.loads((folder(config) / "preflight.json").read_text())
    assert {finding["code"] for finding in report["ignored"]} == {"SEM502"}


def test_a_finding_in_flight_is_told_and_the_run_goes_on(small, monkeypatch, capsys):
    monkeypatch.setattr(Flight, "stepped", lambda _, seen: [SPIKE] if seen.step == 2 else [])
    config = small("tracking.backends=[wandb]")
    run.train(config, config_text="", watch=Watcher(None))
    assert [(line["step"], line["code"]) for line in findings(config)] == [(2, "SEM540")]
    assert "step 2: warning  SEM540" in capsys.readouterr().err
    assert status(config)["state"] == "done"
    (recorded,) = (folder(config) / "wandb").glob("**/*.wandb")
    assert b"SEM540 at step 2" in recorded.read_bytes()
    assert b"findings/SEM540" in recorded.read_bytes()


def test_it_stops_the_run_when_told_to(small, monkeypatch):
    monkeypatch.setattr(Flight, "stepped", lambda _, seen: [SPIKE] if seen.step == 1 else [])
    config = small("preflight.stop_on=[SEM540]", "train.steps=9")
    with pytest.raises(PreflightError, match="stopped by SEM540 after step 1; the checkpoint is saved"):
        run.train(config, config_text="", watch=Watcher(None))
    assert (folder(config) / "checkpoints" / "step-00000001" / "MANIFEST.json").exists()
    assert status(config)["exit_code"] == 3


def test_an_ignored_finding_is_not_told(small, monkeypatch):
    monkeypatch.setattr(Flight, "stepped", lambda *_: [SPIKE])
    config = small("preflight.ignore=[SEM540]", "preflight.stop_on=[SEM540]")
    run.train(config, config_text="", watch=Watcher(None))
    assert not (folder(config) / "findings.jsonl").exists()


def test_samples_are_held_against_training_clips(small, monkeypatch):
    seen = []
    sampled = Flight.sampled
    monkeypatch.setattr(Flight, "sampled", lambda *a: seen.append(a[1:]) or sampled(*a))
    run.train(small("validation.samples=1", "validation.inference_steps=2"), config_text="", watch=Watcher(None))
    assert [step for step, *_ in seen] == [0, 3]
    for _, videos, clips in seen:
        shapes = {frames.shape for frames in [*videos.values(), *clips]}
        assert shapes == {(3, 64, 96, 3)}
        assert len(clips) == 4
        assert all(frames.dtype == np.uint8 for frames in clips)


def test_samples_that_stand_still_are_a_finding(small, monkeypatch):
    """The whole way: the sampler gives a still video, the clips move."""
    still = np.repeat(np.random.default_rng(0).integers(0, 255, (1, 64, 96, 3), dtype=np.uint8), 3, axis=0)
    monkeypatch.setattr("svdtune.trainer.validate.sample_video", lambda *_, **__: still)
    config = small("validation.samples=1", "train.steps=1", "train.warmup=0")
    run.train(config, config_text="", watch=Watcher(None))
    assert {line["code"] for line in findings(config)} & {"SEM542", "SEM544"}


def test_a_divergence_names_the_module_where_it_began(small, monkeypatch):
    """A weight becomes infinite after the first update."""
    update, step = loop.update, []

    def damaged(session, *rest, **options):
        step.append(1)
        result = update(session, *rest, **options)
        if len(step) == 3:  # two updates of the trial before
            with torch.no_grad():
                session.model.unet.mid_block.resnets[0].spatial_res_block.conv1.bias[0] = float("inf")
        return result

    monkeypatch.setattr(loop, "update", damaged)
    with pytest.raises(
        Diverged, match=r"step 2: .*in unet\.mid_block\.resnets\.0\.spatial_res_block\.conv1: its output"
    ):
        run.train(small(), config_text="", watch=Watcher(None))


def test_a_resumed_run_is_observed_too(small, capsys):
    config = small("train.steps=2")
    run.train(config, config_text="", watch=Watcher(None))
    run.train(small("train.steps=3"), config_text="", watch=Watcher(None))
    report = json.loads((folder(config) / "preflight.json").read_text())
    assert [stage["status"] for stage in report["stages"]] == ["ok", "ok"]
    assert report["measured"] == {}
    assert status(config)["state"] == "done"
