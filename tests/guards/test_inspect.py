"""The verb `inspect`: what a file or folder is, and in what it differs."""

import gzip
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from svdtune.errors import UsageError
from svdtune.guards import inspecting
from svdtune.guards.headers import Entry
from svdtune.guards.inspecting import inspect_path, render_inspection
from svdtune.model.facts import TINY

ASSETS = Path(__file__).parents[1] / "assets"
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(svd_folder, tmp_path):
    shutil.copytree(svd_folder, tmp_path / "svd")
    return tmp_path / "svd"


def test_a_folder(folder):
    found = inspect_path(folder)
    assert found.ok
    assert [(part.name, part.family, part.dtypes.keys()) for part in found.parts] == [
        ("unet", "SVD", {"F32"}),
        ("vae", "SVD VAE (temporal decoder)", {"F32"}),
        ("image_encoder", "CLIP vision tower", {"F32"}),
    ]
    assert json.loads(json.dumps(found.as_json()))["ok"] is True
    text = render_inspection(found)
    assert "  unet: SVD, diffusers naming" in text
    assert "cross_attention_dim 24" in text


def test_the_same_and_another(folder):
    assert inspect_path(TINY, "tiny").ok
    assert "no difference from tiny in names and shapes" in render_inspection(inspect_path(TINY, "tiny"))
    found = inspect_path(folder, str(TINY))
    assert not found.ok
    assert {finding.where for finding in found.differences} == {"unet", "vae", "image_encoder"}


def test_one_part_is_compared_with_that_part(folder):
    assert inspect_path(folder / "unet", str(folder)).ok
    tensors = load_file(folder / UNET)
    save_file({n: t for n, t in tensors.items() if "temporal_" not in n and "time_" not in n.partition("_embedding")[0]},
              folder.parent / "cut.safetensors")  # fmt: skip
    found = inspect_path(folder.parent / "cut.safetensors", str(folder))
    assert {finding.where for finding in found.differences} == {"unet"}
    assert "weights" in found.differences[0].got


def test_a_folder_without_a_part(folder):
    shutil.rmtree(folder / "vae")
    found = inspect_path(folder, str(TINY))
    assert ("vae", "not there") in [(finding.where, finding.got) for finding in found.differences]


def test_a_damaged_file(folder):
    (folder / UNET).write_text("<html>")
    found = inspect_path(folder / UNET)
    assert not found.ok
    assert "a web page" in render_inspection(found)


def released(tmp_path, monkeypatch, **changes):
    with gzip.open(ASSETS / "svd_xt_original_keys.json.gz", "rt") as file:
        shapes = {**json.load(file), **changes}
    path = tmp_path / "anything.safetensors"
    path.touch()
    table = {path.name: {name: Entry("F16", tuple(shape)) for name, shape in shapes.items()}}
    monkeypatch.setattr(inspecting, "_files", lambda _: (table, []))
    return path


def test_the_released_single_file_against_the_shipped_architecture(tmp_path, monkeypatch):
    found = inspect_path(released(tmp_path, monkeypatch), "svd-xt")
    assert found.differences == []
    assert "no difference from svd-xt in what families and numbers show" in render_inspection(found)
    assert [(part.family, part.parameters) for part in found.parts] == [("SVD", 2_254_442_657)]


def test_a_derivative_of_it(tmp_path, monkeypatch):
    changed = {"model.diffusion_model.input_blocks.0.0.weight": [320, 12, 3, 3]}
    found = inspect_path(released(tmp_path, monkeypatch, **changed), "svd-xt")
    assert [(item.where, item.got, item.expected) for item in found.differences][:2] == [
        ("family", "SVD derivative (12 channels)", "SVD"),
        ("UNet in_channels", "12", "8"),
    ]


def test_paths_that_do_not_exist(tmp_path):
    with pytest.raises(UsageError, match="inspect: no such file or folder"):
        inspect_path(tmp_path / "gone")
    with pytest.raises(UsageError, match="--against: got nothing, expected svd, svd-xt"):
        inspect_path(TINY, "nothing")


def test_the_verb(folder):
    from typer.testing import CliRunner

    from svdtune.cli import app

    done = CliRunner().invoke(app, ["inspect", str(folder), "--json"])
    assert (done.exit_code, json.loads(done.output)["ok"]) == (0, True)
    done = CliRunner().invoke(app, ["inspect", str(folder), "--against", "tiny"])
    assert done.exit_code == 3
    assert "differs from tiny: unet" in done.output
