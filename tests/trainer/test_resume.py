"""Kill a run in the middle, run the same command again: nothing shows that it was interrupted."""

import json
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from tests.trainer.conftest import losses, start

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
    # Frames of the usual size: with less work in a step the run might end before it is killed.
    common = [f"adapt.method={method}", f"train.steps={STEPS}", "checkpoint.interval=3", "train.batch_size=2",
              "train.accumulation=2", "train.schedule=cosine", "train.ema=true", "data.flip=true",
              "data.height=64", "data.width=96"]  # fmt: skip
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


def test_another_trainable_set_cannot_resume(train, command, worker):
    train("one", "train.steps=1", "adapt.method=lora", "adapt.rank=2")
    arguments = command("one", "train.steps=2", "adapt.method=lora", "adapt.rank=3")
    code, err = worker.run(arguments[arguments.index("train") :])
    assert code == 3
    assert "run.name" in err
    assert "Traceback" not in err
