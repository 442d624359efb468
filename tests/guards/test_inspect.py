"""The verb `inspect`: what a file or folder is, and in what it differs."""

import gzip
import json
import math
import os
import shutil
import struct
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from svdtune.errors import UsageError
from svdtune.guards.inspecting import inspect_path, render_inspection
from svdtune.model.facts import PACKAGE, TINY
from svdtune.model.headers import BYTES

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
    assert "no difference from tiny in the names and shapes of unet, vae, image_encoder" in render_inspection(
        inspect_path(TINY, "tiny")
    )
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


def sparse(path: Path, shapes: dict[str, list[int]], dtype: str = "F16") -> Path:
    """A whole safetensors file of any size that takes no room: a header, and a hole for the numbers."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = math.prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    os.truncate(path, 8 + len(raw) + end)
    return path


@pytest.fixture(scope="module")
def ledger() -> dict[str, list[int]]:
    with gzip.open(PACKAGE / "facts" / "original" / "svd_xt.json.gz", "rt") as file:
        return json.load(file)


def test_the_released_single_file_against_the_shipped_architecture(tmp_path, ledger):
    more = {"conditioner.embedders.3.encoder.conv_in.weight": [128, 3, 3, 3], "model_ema.decay": [1]}
    found = inspect_path(sparse(tmp_path / "anything.safetensors", {**ledger, **more}), "svd-xt")
    assert found.ok
    assert [(part.family, part.naming) for part in found.parts] == [("SVD", "original")]
    assert found.parts[0].parameters == 2_254_442_657 + 3457
    assert "2 weights beside the model (averages, text tower, a second encoder) are not used" in render_inspection(
        found
    )
    assert "no difference from svd-xt in the names and shapes of anything.safetensors" in render_inspection(found)


FFN = "conditioner.embedders.0.open_clip.model.visual.transformer.resblocks.3.mlp.c_fc.weight"


CHANGED = [
    (lambda s: {n: v for n, v in s.items() if ".decoder.up" not in n}, "214 are missing: first_stage_model.decoder.up"),
    (lambda s: {n: v for n, v in s.items() if "resblocks.30" not in n}, "12 are missing: conditioner.embedders.0"),
    (lambda s: {**s, FFN: [17, 1280]}, "[17, 1280]"),
    (
        lambda s: {n.replace(".time_embed.2", ".time_embed.3"): v for n, v in s.items()},
        "2 are missing: model.diffusion_model.time_embed",
    ),
    (
        lambda s: {**s, "model.diffusion_model.extra.weight": [3]},
        "1 that the model has no place for: model.diffusion_model",
    ),
]


@pytest.mark.parametrize(("change", "got"), CHANGED)
def test_a_weight_of_the_single_file_that_differs(tmp_path, ledger, change, got):
    found = inspect_path(sparse(tmp_path / "svd_xt.safetensors", change(ledger)), "svd-xt")
    assert any(item.got.startswith(got) for item in found.differences), found.differences


def test_a_derivative_of_it(tmp_path, ledger):
    changed = {**ledger, "model.diffusion_model.input_blocks.0.0.weight": [320, 12, 3, 3]}
    found = inspect_path(sparse(tmp_path / "a.safetensors", changed), "svd-xt")
    assert [(item.where, item.got) for item in found.differences][:2] == [
        ("family", "SVD derivative (12 channels), original naming"),
        ("UNet in_channels", "12"),
    ]
    assert found.differences[1].expected == "8"


def test_two_files_are_compared_whatever_their_names(folder, tmp_path):
    unet = load_file(folder / UNET)
    save_file(unet, tmp_path / "mine.safetensors")
    assert inspect_path(tmp_path / "mine.safetensors", str(folder / UNET)).ok
    save_file({**unet, "conv_in.weight": unet["conv_in.weight"][:, :4].contiguous()}, tmp_path / "other.safetensors")
    assert not inspect_path(tmp_path / "other.safetensors", str(folder / UNET)).ok
    vae = inspect_path(folder / "vae", str(folder / UNET))
    assert not vae.ok
    sparse(tmp_path / "a.safetensors", {"x": [3]})
    lone = inspect_path(tmp_path / "a.safetensors", str(folder))
    assert [item.got for item in lone.differences] == [
        "nothing of it can be compared: here are a.safetensors, there unet, vae, image_encoder"
    ]


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("lone", [False, True])
def test_a_config_is_held_against_its_own_weights(folder, lone):
    edit(folder / "unet" / "config.json", in_channels=4)
    found = inspect_path(folder / "unet" if lone else folder)
    assert "CKP211" in {item.code for item in found.problems}


def test_numbers_that_no_weight_shows(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    edit(folder / "unet" / "config.json", num_attention_heads=[2, 4], num_frames=9)
    edit(folder / "scheduler" / "scheduler_config.json", sigma_max=80.0)
    found = inspect_path(folder, str(tmp_path / "copy"))
    assert {item.where for item in found.differences} == {
        "unet/config.json: num_attention_heads", "unet/config.json: num_frames", "scheduler/scheduler_config.json: sigma_max",
    }  # fmt: skip
    assert "CKP214" in {item.code for item in found.problems}
    alone = inspect_path(folder / "unet", str(tmp_path / "copy" / "unet"))
    assert {item.where.partition(": ")[2] for item in alone.differences} == {"num_attention_heads", "num_frames"}


def test_a_folder_of_one_variant_says_how_to_load_it(folder):
    for path in folder.glob("*/*.safetensors"):
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    found = inspect_path(folder)
    assert found.ok
    assert "Only *.fp16.safetensors are here: set model.variant=fp16." in render_inspection(found)


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


def test_a_wrapped_shard_of_a_unet_is_told_from_its_names(folder, tmp_path):
    tensors = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    half = {f"module.{name}": tensors[name] for name in sorted(tensors) if not name.startswith("conv_out")}
    path = tmp_path / "unet-00002-of-00003.safetensors"
    save_file(half, path)
    [part] = inspect_path(path).parts
    told = " ".join(part.notes)
    assert "By its name it is shard 2 of 3" in told
    assert "Every name begins with 'module.'" in told
    assert "so it is not whole" in told
