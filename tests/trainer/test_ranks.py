"""Two processes are one run: same weights, other clips; and as many clips in one process give the same losses."""

import sys
from pathlib import Path

import pytest
import torch

from tests.trainer.conftest import REPO, SHORT, losses, metrics, start

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def one_step(tmp_path, clips, ranks, *overrides):
    launcher = TORCHRUN if ranks == 2 else []
    script = [sys.executable, *launcher, str(Path(__file__).with_name("two_ranks.py")), str(tmp_path)]
    config = [str(REPO / "configs/tiny.yaml"), f"data.root={clips}", *SHORT, "train.steps=1", "train.accumulation=2"]
    process = start([*script, *config, *overrides])
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-3000:]
    return [torch.load(tmp_path / f"rank-{r}-of-{ranks}.pt") for r in range(ranks)]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_gradients_and_weights_equal_to_the_bit_samples_and_noise_different(tmp_path, clips, method):
    first, second = one_step(tmp_path, clips, 2, f"adapt.method={method}", "train.batch_size=1")
    for name in first:
        if name.startswith(("grad/", "weight/")):
            assert torch.equal(first[name], second[name]), name
    assert sum(name.startswith("grad/") for name in first) > 10
    assert any(bool(first[name].any()) for name in first if name.startswith("grad/"))
    assert not set(first["samples"].tolist()) & set(second["samples"].tolist())
    assert not torch.equal(first["noise"], second["noise"])
    assert not torch.equal(first["pixels"], second["pixels"])

    (alone,) = one_step(tmp_path, clips, 1, f"adapt.method={method}", "train.batch_size=2")
    assert sorted([*first["samples"].tolist(), *second["samples"].tolist()]) == sorted(alone["samples"].tolist())
    for name in first:
        if name.startswith("grad/"):
            torch.testing.assert_close(first[name], alone[name], rtol=1e-3, atol=1e-6)


def test_what_one_rank_sees_holds_for_all(tmp_path, clips):
    """A NaN on the second rank stops the update on both."""
    (tmp_path / "poison").touch()
    ranks = one_step(tmp_path, clips, 2, "train.batch_size=1", "train.lr=0.1")
    for seen in ranks:
        assert seen["loss"].isnan()
        for name, before in seen.items():
            if name.startswith("before/"):
                assert torch.equal(before, seen[name.replace("before/", "weight/")])


def test_two_ranks_in_bf16_with_frozen_and_trained_dtypes_stay_equal(tmp_path, clips):
    first, second = one_step(tmp_path, clips, 2, "adapt.method=temporal", "train.batch_size=1", "train.precision=bf16")
    assert all(torch.equal(first[name], second[name]) for name in first if name.startswith("weight/"))


def test_two_ranks_of_batch_two_lose_what_one_rank_of_batch_four_loses(train):
    common = ["train.steps=4", "train.accumulation=2", "train.lr=1e-3", "validation.clips=3", "data.holdout=0.3",
              "validation.samples=1", "validation.inference_steps=2", "validation.sigmas=[0.5,5]"]  # fmt: skip
    two = train("two", *common, "train.batch_size=2", launcher=TORCHRUN)
    one = train("one", *common, "train.batch_size=4")
    assert losses(two).keys() == losses(one).keys() == {1, 2, 3, 4}
    for step, loss in losses(one).items():
        assert losses(two)[step] == pytest.approx(loss, abs=1e-5)
    held = [[line["held_out_loss"] for line in metrics(run) if "held_out_loss" in line] for run in (one, two)]
    assert len(held[0]) == 2
    assert held[1] == pytest.approx(held[0], abs=1e-5)
    assert len(list((two / "samples" / "step-000004").glob("*.mp4"))) == 1


def test_a_run_resumes_on_another_number_of_ranks(train):
    whole = train("whole", "train.steps=4", "train.batch_size=2")
    train("moved", "train.steps=2", "train.batch_size=2")
    moved = train("moved", "train.steps=4", "train.batch_size=1", launcher=TORCHRUN)
    assert losses(moved).keys() == losses(whole).keys()
    for step, loss in losses(whole).items():
        assert losses(moved)[step] == pytest.approx(loss, abs=1e-5)
