"""Explain on errors that are really raised: eager and fake tensors, the real SVD architecture, the real loaders."""

from __future__ import annotations

import json
import shutil
import traceback

import pytest
import torch
from diffusers import UNetSpatioTemporalConditionModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from svdtune.config.load import load_config
from svdtune.guards.explain.numbers import numbers_of
from svdtune.guards.explain.report import explain, explain_exception
from svdtune.model.source import read_configs

# The network is real in both modes, its inputs are made inside the mode.
MODES = ("eager", "fake")


@pytest.fixture(scope="module")
def unet(svd_folder):
    return UNetSpatioTemporalConditionModel.from_pretrained(svd_folder / "unet").eval()


@pytest.fixture(scope="module")
def numbers(svd_folder):
    return numbers_of(read_configs(svd_folder), source="the run's model")


def raised(call, mode) -> str:
    try:
        if mode == "fake":
            with FakeTensorMode(allow_non_fake_inputs=True):
                call()
        else:
            call()
    except Exception:
        return traceback.format_exc()
    raise AssertionError("nothing was raised")


def text_of(unet, mode, *, sample=(2, 3, 8, 6, 10), context=(2, 1, 24), ids=(2, 3), timestep=(2,)) -> str:
    return raised(lambda: unet(torch.ones(sample), torch.ones(timestep), torch.ones(context), torch.ones(ids)), mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("wrong", "code", "said"),
    [
        ({"ids": (2, 1)}, "SHP402", "added_time_ids was (2, 1), expected (2, 3)"),
        ({"ids": (2, 2)}, "SHP402", "added_time_ids was (2, 2), expected (2, 3)"),
        ({"ids": (2, 4)}, "SHP402", "added_time_ids was (2, 4), expected (2, 3)"),
        ({"ids": (1, 3)}, "SHP414", "added_time_ids was (1, 3), complete, for 1 clip;"),
        ({"context": (2, 1, 32)}, "SHP403", "takes 24 and gives 64, encoder_hidden_states came with 32"),
        ({"context": (6, 1, 24)}, "SHP414", "6 rows for 2 clips"),
        ({"context": (4, 1, 24)}, "SHP414", "4 rows for 2 clips"),
        ({"context": (1, 1, 24)}, "SHP414", "72 = 1 x 3 frames x 24"),
        ({"context": (2, 24)}, "SHP415", "2 axes is taken apart into 3"),
        ({"sample": (2, 8, 6, 10)}, "SHP415", "16 = 2 x 8"),
        ({"sample": (2, 8, 3, 6, 10)}, "SHP405", "(batch, 8, 3, ...)"),
        ({"sample": (2, 3, 4, 6, 10)}, "SHP404", "conv_in takes 8"),
        ({"timestep": (2, 1)}, "SHP414", "[2, 1] to [2]"),
    ],
)  # fmt: skip
def test_mistakes_in_svd(unet, numbers, mode, wrong, code, said):
    found = explain(text_of(unet, mode, **wrong), numbers)
    assert [one.code for one in found][:1] == [code]
    assert said in found[0].evidence
    assert len(found) == 1


@pytest.mark.parametrize("mode", MODES)
def test_without_the_models_numbers_no_confident_count(unet, mode):
    (one,) = explain(text_of(unet, mode, ids=(2, 1)))
    assert one.confidence == "medium"
    assert "that it takes three ids is assumed" in one.reason


class Net(nn.Module):
    """A network that has nothing to do with SVD."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 5, 3), nn.Flatten())
        self.head = nn.Linear(77, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("call", "codes"),
    [
        (lambda: Net()(torch.ones(2, 1, 9, 9)), ["SHP410"]),
        (lambda: torch.ones(2, 4, 5) + torch.ones(2, 3, 5), ["SHP410"]),
        (lambda: torch.cat([torch.ones(2, 4, 18, 7), torch.ones(2, 3, 12, 7)], 1), ["SHP410"]),
        (lambda: torch.ones(10, 3).reshape(4, -1, 7), ["SHP410"]),
        (lambda: nn.Conv2d(8, 21, 3)(torch.ones(2, 4, 9, 9)), ["SHP412"]),
        (lambda: torch.stack([torch.ones(3, 61, 8, 9), torch.ones(3, 60, 8, 9)]), ["DAT350"]),
        (lambda: nn.GroupNorm(4, 16)(torch.ones(2, 32, 3, 3)), ["SHP412"]),
        (lambda: torch.ones(3, 5)[:, 7], []),
    ],
)  # fmt: skip
def test_networks_that_are_not_svd(call, codes, mode):
    found = explain(raised(call, mode))
    assert [one.code for one in found] == codes
    assert all("SVD" not in one.title for one in found)
    assert all(one.confidence == "low" for one in found if one.code == "SHP410")


@pytest.mark.parametrize("mode", MODES)
def test_skip_sizes(mode):
    text = raised(lambda: torch.cat([torch.ones(2, 4, 18, 32), torch.ones(2, 4, 17, 32)], 1), mode)
    (one,) = explain(text)
    assert one.code == "SHP411"
    assert "544 pixels" in one.evidence


def test_types_meet(unet, numbers):
    half = torch.ones(2, 3, 8, 6, 10, dtype=torch.bfloat16)
    text = raised(lambda: unet(half, torch.ones(2), torch.ones(2, 1, 24), torch.ones(2, 3)), "eager")
    assert [one.code for one in explain(text, numbers)] == ["NUM650"]
    assert "bfloat16" in explain(text)[0].title


def test_loaders(svd_folder, tmp_path, numbers):
    folder = tmp_path / "unet"
    shutil.copytree(svd_folder / "unet", folder)
    config = json.loads((folder / "config.json").read_text())
    weights = folder / "diffusion_pytorch_model.safetensors"

    def told(**options) -> tuple[str, str]:
        found = explain(
            raised(lambda: UNetSpatioTemporalConditionModel.from_pretrained(folder, **options), "eager"), numbers
        )
        return found[0].code, found[0].title + found[0].fix

    (folder / "config.json").write_text(json.dumps(config | {"in_channels": 4}))
    for low in (True, False):
        code, said = told(low_cpu_mem_usage=low)
        assert code == "CKP250"
        assert "an SVD checkpoint is opened as an image model" in said
    (folder / "config.json").write_text(json.dumps(config))
    whole = weights.read_bytes()
    for content, code in (
        (whole[: len(whole) // 2], "CKP252"),
        (b"<html>no</html>" * 40, "CKP252"),
        (b"", "CKP252"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 5\n", "CKP254"),
    ):
        weights.write_bytes(content)
        assert told()[0] == code
    weights.unlink()
    assert told() == ("CKP253", told()[1])
    assert "variant='fp16'" in told()[1]


def test_an_uncaught_exception_of_a_run(svd_folder, unet, tmp_path):
    yaml = tmp_path / "run.yaml"
    yaml.write_text(f"model:\n  pretrained: {svd_folder}\n")
    config = load_config(yaml)
    with pytest.raises(RuntimeError) as caught:
        unet(torch.ones(2, 3, 8, 6, 10), torch.ones(2), torch.ones(2, 1, 24), torch.ones(2, 1))
    told = explain_exception(caught.value, config)
    assert told is not None
    assert told.startswith("SHP402  1 time id for each clip instead of 3\n  confidence high")
    assert explain_exception(ValueError("my own"), config) is None
    with pytest.raises(RuntimeError) as plain:
        Net()(torch.ones(2, 1, 9, 9))
    assert explain_exception(plain.value, config) is None
