"""Stage checkpoint on one file in the place of a folder: a whole SVD model is silent, all else is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from svdtune.config.load import load_config
from svdtune.guards.preflight import run_preflight
from svdtune.guards.weights import check_weights
from svdtune.model.facts import FILES, TINY
from svdtune.model.single_file import NOTES
from svdtune.model.source import PARTS, part_weights, read_configs
from svdtune.model.weights import original_weights

YAML = Path(__file__).parents[2] / "configs" / "tiny.yaml"
NET, VAE, CLIP = "model.diffusion_model.", "first_stage_model.", "conditioner.embedders.0.open_clip.model.visual."


@pytest.fixture(scope="module")
def tiny():
    """The embedded base under the original's names, and what no tensor says of it."""
    configs = {part: getattr(read_configs(TINY), part) for part in FILES}
    tensors = dict(original_weights(configs, {part: part_weights(TINY, part, "fp16") for part in PARTS}).items())
    return tensors, {NOTES: json.dumps({"configs": configs})}


@pytest.fixture
def findings(tiny, tmp_path):
    """What the stage finds in the base's file after `change`."""

    def check(change=lambda tensors: tensors, *, notes=True):
        tensors, metadata = tiny
        path = tmp_path / "svd.safetensors"
        save_file({n: t.contiguous() for n, t in change(dict(tensors)).items()}, path, metadata if notes else None)
        return check_weights(load_config(YAML, [f"model.pretrained={path}"]))

    return check


def test_a_whole_model_is_silent(findings):
    assert findings() == []


def test_leftovers_of_a_release_are_no_finding(findings):
    left = {
        "model_ema.decay": torch.zeros(1),
        "conditioner.embedders.3.encoder.conv_in.weight": torch.zeros(2, 3, 3, 3),
    }
    assert findings(lambda tensors: {**tensors, **left}) == []


def test_a_tower_that_is_not_there(findings):
    [found] = findings(lambda tensors: {n: t for n, t in tensors.items() if not n.startswith(CLIP)})
    assert (found.code, found.severity) == ("CKP209", "error")
    assert found.got.startswith(f"it holds no CLIP image encoder (no weight's name begins with {CLIP})")


def test_a_head_count_that_no_shape_shows(findings):
    """Without svdtune's notes the embedded base's tower has a width that no release has."""
    [found] = findings(notes=False)
    assert found.code == "CKP209"
    assert "the tower's width is 64, expected one of open_clip's" in found.got


@pytest.mark.parametrize(
    ("change", "code", "where", "got"),
    [
        (
            lambda t: {n: x for n, x in t.items() if "middle_block.1" not in n},
            "CKP209",
            "(unet)",
            "57 weights are missing: mid_block (57)",
        ),
        (
            lambda t: {**t, f"{NET}motion.weight": torch.zeros(2)},
            "CKP210",
            "(unet)",
            "1 that SVD has no place for (motion.weight)",
        ),
        (lambda t: {**t, f"{VAE}encoder.conv_out.bias": torch.zeros(6)}, "CKP211", "(vae)", "[6]"),
        (lambda t: {**t, f"{CLIP}ln_pre.bias": torch.zeros(3)}, "CKP211", "(image_encoder)", "[3]"),
        (lambda t: {n: x for n, x in t.items() if n != f"{VAE}decoder.norm_out.bias"}, "CKP209", "(vae)", "missing"),
        (lambda t: {**t, f"{NET}out.2.bias": torch.zeros(4, dtype=torch.float8_e4m3fn)}, "CKP212", "", "F8_E4M3"),
    ],
)
def test_what_is_missing_strange_or_misshapen(findings, change, code, where, got):
    [found] = [f for f in findings(change) if f.code == code]
    assert found.severity == "error"
    assert found.where.endswith(f"svd.safetensors {where}".strip()) or where in found.where
    assert got in found.got


def test_another_model_and_a_lora(findings):
    def as_image(tensors):
        return {
            n: t for n, t in tensors.items() if not any(mark in n for mark in ("time_stack", "time_mixer", "time_pos"))
        }

    [found] = findings(as_image)
    assert found.code == "CKP204"
    lora = {f"diffusion_model.{name}.weight": torch.zeros(4, 4) for name in ("a.lora_up", "a.lora_down")}
    [found] = findings(lambda _: lora)
    assert (found.code, found.got) == ("CKP204", "one file: LoRA, kohya naming")


def test_preflight_of_a_single_file_is_that_of_its_folder(tiny, tmp_path):
    """Shapes and memory are told from the header, and nothing is found."""
    path = tmp_path / "svd.safetensors"
    save_file({n: t.contiguous() for n, t in tiny[0].items()}, path, tiny[1])
    shutil.copytree(Path(__file__).parents[1] / "assets" / "video", tmp_path / "clips")
    options = [f"data.root={tmp_path / 'clips'}", f"run.dir={tmp_path}", "data.holdout=0"]
    reports = [run_preflight(load_config(YAML, [f"model.pretrained={base}", *options])) for base in ("tiny", str(path))]
    one, other = ([(f.code, f.severity) for f in report.findings] for report in reports)
    assert one == other
    assert reports[0].predicted == reports[1].predicted
    assert reports[0].axes == reports[1].axes is not None


def test_the_names_in_the_file_are_those_of_the_stored_tensors(tiny):
    stored = load_file(TINY / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert torch.equal(tiny[0][f"{NET}input_blocks.0.0.weight"], stored["conv_in.weight"])
