"""Kill a run in the middle, run the same command again: nothing shows that it was interrupted."""

import json
import os
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from tests.trainer.conftest import losses, metrics, start

STEPS = 9


def final_tensors(run, file):
    return load_file(run / "checkpoints" / f"step-{STEPS:08d}" / file)


def kill_after(step, arguments, run):
    """SIGKILL as soon as `step` is in the metrics: between checkpoints, in the middle of an epoch."""
    process = start(arguments)
    try:
        while process.poll() is None:
            if (run / "metrics.jsonl").exists() and len(metrics_so_far(run)) >= step:
                break
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (run / "checkpoints" / f"step-{STEPS:08d}").exists()


def metrics_so_far(run):
    return [line for line in (run / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]


@pytest.mark.parametrize(
    ("method", "before", "after"),
    [("lora", 0, 0), ("lora", 2, 0), ("temporal", 0, 2)],
    ids=["lora", "lora-2-then-0-workers", "temporal-0-then-2-workers"],
)
def test_killed_and_resumed_equals_uninterrupted(train, command, tmp_path, method, before, after):
    common = [f"adapt.method={method}", f"train.steps={STEPS}", "checkpoint.interval=3", "train.batch_size=2",
              "train.accumulation=2", "train.schedule=cosine", "train.ema=true", "data.flip=true"]  # fmt: skip
    whole = train("whole", *common)
    kill_after(5, command("killed", *common, f"data.workers={before}"), tmp_path / "killed")
    resumed = train("killed", *common, f"data.workers={after}")

    assert losses(resumed) == losses(whole)
    assert list(losses(resumed)) == list(range(1, STEPS + 1))
    assert len({*losses(whole).values()}) == STEPS
    for file in (
        "lora.safetensors" if method == "lora" else "unet.safetensors",
        "ema.safetensors",
        "optimizer.safetensors",
    ):
        ours, theirs = final_tensors(resumed, file), final_tensors(whole, file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), file


def test_finished_run_is_left_alone_and_a_longer_one_goes_on(train):
    run = train("short", "train.steps=2")
    first = losses(run)
    again = train("short", "train.steps=2")
    assert losses(again) == first
    longer = train("short", "train.steps=4")
    assert losses(longer).keys() == {1, 2, 3, 4}
    assert {step: loss for step, loss in losses(longer).items() if step <= 2} == first
    status = json.loads((longer / "status.json").read_text())
    assert (status["state"], status["step"], status["exit_code"], status["world_size"]) == ("done", 4, 0, 1)


def test_sigterm_saves_and_exits_143_and_the_next_start_goes_on(train, command, tmp_path):
    common = ["train.steps=200", "checkpoint.interval=1000", "adapt.method=lora", "adapt.rank=2"]
    process, run = start(command("stopped", *common)), tmp_path / "stopped"
    while process.poll() is None and not (run / "metrics.jsonl").exists():
        time.sleep(0.01)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err[-2000:]
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("stopped", 143)
    assert "stopped by SIGTERM after step" in err
    reached = status["step"]
    assert len(metrics(run)) == reached
    longer = train("stopped", f"train.steps={reached + 1}", *common[1:])
    assert list(losses(longer)) == list(range(1, reached + 2))


def test_a_signal_to_the_whole_group_stops_in_order_with_workers(command, tmp_path):
    """torchrun and terminals signal process groups: loader workers must outlive that, or they look like a bad clip."""
    arguments = command("group", "train.steps=500", "data.workers=2", "adapt.method=lora", "train.accumulation=4")
    process = start(arguments, start_new_session=True)
    run = tmp_path / "group"
    while process.poll() is None and not (run / "metrics.jsonl").exists():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err[-2000:]
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"
    assert "loader workers failed" not in err
    assert list((run / "checkpoints").glob("step-*"))


def test_another_trainable_set_cannot_resume(train, command):
    train("one", "train.steps=1", "adapt.method=lora", "adapt.rank=2")
    process = start(command("one", "train.steps=2", "adapt.method=lora", "adapt.rank=3"))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 3
    assert "run.name" in err
    assert "Traceback" not in err
