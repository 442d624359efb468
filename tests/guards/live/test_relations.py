"""How broken relations and a trial that fails are told; that each is seen is a matter of tests/mutations."""

from __future__ import annotations

import pytest
import torch

from svdtune.diffusion import conditioning, edm
from svdtune.guards.live.prove import check_meaning, prove
from svdtune.guards.live.relations import Relation, broken, distance
from svdtune.trainer import loop
from svdtune.trainer.state import Position

pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning")


def told(session) -> dict[str, str]:
    return {finding.code: finding.got for finding in check_meaning(session, Position())}


def test_a_known_mistake_is_called_by_its_name(session, monkeypatch):
    made = session()
    ids = conditioning.added_time_ids
    monkeypatch.setattr(conditioning, "added_time_ids", lambda *a: ids(*a)[:, [1, 0, 2]])
    assert told(made) == {"SEM502": "motion_bucket_id"} or told(made)["SEM502"] in ("fps - 1", "motion_bucket_id")
    monkeypatch.undo()
    target = edm.v_target
    monkeypatch.setattr(edm, "v_target", lambda *a: -target(*a))
    assert told(made)["SEM503"] == "v with the wrong sign"


def test_the_slope_is_told_in_numbers(session, monkeypatch):
    made = session()
    latents = conditioning.image_latents
    monkeypatch.setattr(
        conditioning, "image_latents", lambda *a, **k: made.parts.facts.scaling_factor * latents(*a, **k)
    )
    found = told(made)
    assert found["SEM510"] == "multiplied by scaling_factor"
    assert found["SEM517"] == "slope 1, 1"


def test_an_unknown_mistake_is_told_by_its_size(session, monkeypatch):
    made = session()
    target = edm.v_target
    monkeypatch.setattr(edm, "v_target", lambda *a: 1.01 * target(*a))
    assert told(made)["SEM503"] == "values off by up to 0.01 of the largest"


def test_values_that_are_not_finite_and_shapes_that_differ_are_said_so():
    one = torch.ones(2, 3)
    nan = torch.full((2, 3), float("nan"))
    relations = [Relation("SEM501", "a", nan, one, "ones", ""), Relation("SEM501", "b", one[:1], one, "ones", "")]
    assert [finding.got for finding in broken(iter(relations))] == [
        "values that are not finite",
        "shape [1, 3], expected [2, 3]",
    ]


def test_a_row_of_small_values_is_not_hidden_by_one_of_large_values():
    expected = torch.tensor([[1e4, 1.0], [1.0, 0.5]])
    assert distance(expected + torch.tensor([[0.0, 0.0], [0.0, 0.1]]), expected) == pytest.approx(0.1)


def test_recomputation_that_computes_something_else(session):
    """A layer whose answer depends on how often it was asked: recomputed, it is another one."""
    made, calls = session("memory.checkpointing=diffusers", "adapt.method=full"), []

    def count(_module, _args, output):
        calls.append(1)
        return output * (1 + len(calls) % 2)

    made.model.unet.mid_block.resnets[0].spatial_res_block.conv2.register_forward_hook(count)
    assert "SEM567" in {finding.code for finding in prove(made, Position()).findings}


def test_what_raises_in_the_trial_is_a_finding_with_its_place(session, monkeypatch):
    made = session()

    def fails(*_, **__):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(loop, "update", fails)
    (found,) = prove(made, Position()).findings
    assert (found.code, found.got) == ("SHP401", "RuntimeError: no such kernel")
