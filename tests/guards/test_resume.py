"""A checkpoint of this run that would not fit, or is damaged, is told before the run starts; a sound one is silent."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from svdtune.errors import CheckpointError
from svdtune.guards.preflight import Options, run_preflight
from svdtune.guards.resume import check_resume
from svdtune.model.facts import TINY
from svdtune.trainer.run import train

QUICK = (
    "train.steps=1",
    "train.warmup=0",
    "validation.clips=0",
    "validation.samples=0",
    "adapt.method=lora",
    "adapt.rank=4",
)


@pytest.fixture
def trained(tiny):
    """A run of one step, and the same configuration with other options."""
    train(tiny(*QUICK), config_text="")
    return lambda *overrides: tiny(*QUICK, "train.steps=2", *overrides)


def checkpoint(config) -> Path:
    return Path(config.run.dir) / config.run.name / "checkpoints" / "step-00000001"


def findings(config):
    return [f for f in run_preflight(config, Options(only="shapes")).findings]


def test_a_run_that_goes_on_is_silent_and_other_memory_parameters_are_told(trained):
    assert run_preflight(trained("train.lr=2e-4")).findings == []
    config = trained("train.precision=bf16", "memory.parameters=bf16")
    [found] = check_resume(config, load_file(checkpoint(config) / "lora.safetensors"))
    assert (found.code, found.where, found.got) == ("CFG108", "memory.parameters", "bf16")
    assert found.patch == ("memory.parameters=fp32",)
    assert found.expected.startswith("fp32, in which")


def test_other_targets_are_told_by_counting(trained):
    config = trained("adapt.targets=[attn1.to_q]")
    [found] = findings(config)
    assert (found.code, found.severity, found.where) == ("CFG108", "error", "run.name")
    assert "of them not as saved" in found.got
    assert found.expected.endswith("lora.safetensors")
    with pytest.raises(CheckpointError):
        train(config, config_text="")


def test_a_cut_checkpoint_is_told(trained):
    path = checkpoint(trained()) / "lora.safetensors"
    whole = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-100])
    [found] = findings(trained())
    assert (found.code, found.severity) == ("CKP221", "error")
    assert found.got == f"{path}: {whole - 100} bytes, its manifest says {whole} bytes"
    assert "No checkpoint of this run is left" in found.why


def test_half_of_a_rename_that_a_kill_cut_short_is_no_damage_where_the_other_name_is_whole(trained):
    folder = checkpoint(trained())
    shutil.copytree(folder, folder.with_name(f".{folder.name}.partial"))
    (folder / "lora.safetensors").unlink()
    assert findings(trained()) == []


def test_a_finished_run_is_told(trained):
    [found] = findings(trained("train.steps=1"))
    assert (found.code, found.severity) == ("CFG120", "warning")
    assert "nothing would be trained" in found.why


def test_another_base_is_told_and_refused(trained):
    config = trained()
    path = checkpoint(config) / "MANIFEST.json"
    manifest = json.loads(path.read_text())
    manifest["conventions"]["base"]["unet_sha256"] = "0" * 64
    path.write_text(json.dumps(manifest))
    [found] = findings(config)
    assert (found.code, found.where) == ("CFG108", "model.pretrained")
    assert found.expected.startswith("0000000000000000…, which ")
    with pytest.raises(CheckpointError, match="Trained weights act only on their own base"):
        train(config, config_text="")


def test_another_base_at_another_path_is_an_error_and_not_only_a_doubt(trained, tmp_path):
    moved = tmp_path / "base"
    shutil.copytree(TINY, moved)
    [doubt] = run_preflight(trained(f"model.pretrained={moved}")).findings
    assert (doubt.code, doubt.severity) == ("CFG108", "warning")
    [path] = (moved / "unet").glob("*.safetensors")
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    found = run_preflight(trained(f"model.pretrained={moved}")).findings
    assert ("CFG108", "error", "model.pretrained") in [(f.code, f.severity, f.where) for f in found]
