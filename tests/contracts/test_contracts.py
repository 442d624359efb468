"""The table, the check that reads it, and its sentences."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from svdtune.contracts import ModelFacts, TensorSpec, UNetInput, VideoBatch, check, move, require, specs
from svdtune.errors import ContractError

FACTS = ModelFacts(c=3, z=4, f=8, d=1024, m=3, num_frames=25, clip_size=224, scaling_factor=0.18215)
AXES = FACTS.axes(b=2, t=5, h=72, w=128)


def unet_input(**changes):
    tensors = {name: torch.zeros(spec.shape(AXES)) for name, spec in specs(UNetInput).items()}
    return UNetInput(**{**tensors, **changes})


def test_axes_multiply_and_divide():
    assert specs(UNetInput)["sample"].shape(AXES) == (2, 5, 8, 9, 16)
    assert TensorSpec("", "scalar").shape(AXES) == ()


def test_inexact_division_and_unknown_names_are_errors():
    with pytest.raises(
        ContractError, match=r"axis 'h/f': 580 is not divisible by f=8. The VAE would floor it silently"
    ):
        TensorSpec("h/f", "latent height").shape({"h": 580, "f": 8})
    with pytest.raises(ContractError, match="no size named 'q'; known: f, h"):
        TensorSpec("q", "nothing").shape({"h": 1, "f": 8})


def test_right_record_passes():
    assert check(unet_input(), AXES) == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"encoder_hidden_states": torch.zeros(2, 1024)},
            r"UNetInput\.encoder_hidden_states: got \(2, 1024\), expected \(b 1 d\) = \(2, 1, 1024\)\. CLIP image embedding as "
            r"one token\. An axis of size 1 is missing: \.unsqueeze\(1\) would match\.",
        ),
        (
            {"added_time_ids": torch.zeros(2, 1)},
            r"UNetInput\.added_time_ids: got \(2, 1\), expected \(b m\) = \(2, 3\)",
        ),
        ({"added_time_ids": torch.zeros(3, 2)}, r"Axes are swapped: \.permute\(1, 0\) would match"),
        ({"sample": torch.zeros(2, 8, 5, 9, 16)}, r"UNetInput\.sample: .*\.permute\(0, 2, 1, 3, 4\) would match"),
        ({"sample": torch.zeros(2, 8, 9, 16)}, "It has 4 axes instead of 5"),
        ({"timestep": torch.zeros(2, dtype=torch.float16)}, r"UNetInput\.timestep: got float16, expected float32"),
        ({"added_time_ids": torch.zeros(2, 3, dtype=torch.int64)}, "got int64, expected float"),
    ],
)
def test_each_mistake_has_its_sentence(changes, sentence):
    with pytest.raises(ContractError, match=sentence):
        require(unet_input(**changes), AXES)


def test_all_mistakes_are_told_at_once():
    wrong = unet_input(encoder_hidden_states=torch.zeros(2, 1024), timestep=torch.zeros(2, 1))
    assert [m.where for m in check(wrong, AXES)] == ["UNetInput.timestep", "UNetInput.encoder_hidden_states"]


def test_move_keeps_names_and_values():
    batch = VideoBatch(
        torch.ones(1, 2, 3, 8, 8), torch.ones(1), torch.ones(1), torch.ones(1, dtype=torch.int64), ("a.mp4",)
    )
    moved = move(batch, torch.device("cpu"))
    assert moved.names == ("a.mp4",)
    assert torch.equal(moved.pixels, batch.pixels)


def test_the_table_loads_without_torch():
    code = "import sys, svdtune.contracts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_page_in_docs_is_the_table():
    folder = Path(__file__).parents[2]
    script = runpy.run_path(str(folder / "scripts" / "render_contracts.py"))
    assert (folder / "docs" / "contracts.md").read_text() == script["render"](), (
        "run python scripts/render_contracts.py"
    )
