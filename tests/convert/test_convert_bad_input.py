"""What is no model, half a model or another model: one sentence, and nothing is left."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from convert_models import change_part, folder_tensors, make_file, make_run, originals, save, tree
from safetensors.torch import load_file, save_file

from svdtune.convert.cli import convert
from svdtune.errors import CheckpointError, ModelError, UsageError

UNET = "model.diffusion_model."
BIAS = "time_embedding.linear_2.bias"


@pytest.fixture
def refused(tmp_path):
    """What is said of a source, the same for both kinds of DST; nothing new lies anywhere."""

    def refused(kind, source, names=("new.safetensors", "new"), **options):
        before, said = tree(tmp_path), set()
        for name in names:
            with pytest.raises(kind) as caught:
                convert(str(source), tmp_path / name, **options)
            assert type(caught.value) is kind or issubclass(type(caught.value), kind)
            said.add(str(caught.value))
        assert tree(tmp_path) == before
        assert len(said) == 1
        return said.pop()

    return refused


# Files.


def test_a_model_of_another_family(tmp_path, refused):
    sdxl = {
        f"{UNET}input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3), f"{UNET}out.2.weight": torch.zeros(4, 320, 3, 3),
        f"{UNET}label_emb.0.0.weight": torch.zeros(16, 2816), f"{UNET}time_embed.0.weight": torch.zeros(16, 320),
        f"{UNET}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(8, 2048),
    }  # fmt: skip
    save_file(sdxl, tmp_path / "sdxl.safetensors")
    text = refused(ModelError, tmp_path / "sdxl.safetensors")
    assert text.startswith(f"{tmp_path}/sdxl.safetensors: one file: SDXL, original naming; expected a whole SVD model.")


def test_a_cut_download(tmp_path, file, refused):
    content = file.read_bytes()
    for length in (5, 1000, len(content) - 7):
        (tmp_path / "cut.safetensors").write_bytes(content[:length])
        assert " cut off" in refused(ModelError, tmp_path / "cut.safetensors")


def test_pickles_under_any_name(tmp_path, refused):
    for name in ("svd.ckpt", "svd.pt", "svd.bin", "svd.safetensors", "svd"):
        torch.save({"a": torch.ones(2)}, tmp_path / name)
        text = refused(ModelError, tmp_path / name)
        assert text.startswith(f"{tmp_path / name}: ")
        assert "can run code when it is opened; svdtune reads safetensors only" in text
        (tmp_path / name).unlink()
    (tmp_path / "old.safetensors").write_bytes(pickle.dumps({"a": 1}))
    assert "a pickle, as torch.save and others write" in refused(ModelError, tmp_path / "old.safetensors")


@pytest.mark.parametrize("part", ["VAE", "CLIP image encoder"])
def test_a_file_without_a_part(tmp_path, folder, refused, part):
    prefix = {"VAE": "first_stage_model.", "CLIP image encoder": "conditioner."}[part]
    without = {name: None for name in originals(folder) if name.startswith(prefix)}
    source = make_file(tmp_path / "part.safetensors", folder, changed=without)
    assert refused(ModelError, source).startswith(
        f"{source}: it holds no {part} (no weight's name begins with {prefix}"
    )


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_quantised_weights(tmp_path, folder, refused, dtype):
    names = [name for name, tensor in originals(folder).items() if name.endswith("to_q.weight")]
    source = make_file(
        tmp_path / "small.safetensors", folder, changed={name: originals(folder)[name].to(dtype) for name in names}
    )
    text = refused(ModelError, source)
    assert text.endswith(
        "expected F32, F16 or BF16. Quantised weights cannot be trained or converted: take the fp16 or fp32 file."
    )
    assert {"float8_e4m3fn": "F8_E4M3", "int8": "I8", "uint8": "U8"}[str(dtype).removeprefix("torch.")] in text


def test_a_file_with_a_missing_an_extra_or_a_misshapen_weight(tmp_path, folder, refused):
    name = f"{UNET}time_embed.2.bias"
    for change, told in (
        ({name: None}, f"1 missing ({BIAS})"),
        ({f"{UNET}motion.weight": torch.ones(2)}, "1 unexpected (motion.weight)"),
        ({name: torch.ones(3)}, f"1 misshapen ({BIAS})"),
    ):
        source = make_file(tmp_path / "odd.safetensors", folder, changed=change)
        text = refused(ModelError, source)
        assert text.startswith(f"{source}: unet: the weights are not the network of config.json: {told}.")


# Folders.


def test_a_folder_with_a_missing_an_extra_or_a_misshapen_weight(folder, own, refused):
    source = own(folder)
    for change, told in (
        ({BIAS: None}, f"1 missing ({BIAS})"),
        ({BIAS: torch.ones(3)}, f"1 misshapen ({BIAS})"),
    ):
        change_part(source, "unet", change)
        text = refused(ModelError, source)
        assert text.startswith(f"{source}: unet: the weights are not the network of config.json: {told}.")
    change_part(source, "unet", {BIAS: folder_tensors(folder)[f"unet/{BIAS}"], "motion.weight": torch.ones(2)})
    assert "1 unexpected (motion.weight)" in refused(ModelError, source, ["new"])
    assert "unet: 1 weights have no name in the original (motion.weight)" in refused(
        ModelError, source, ["new.safetensors"]
    )


@pytest.mark.parametrize(
    ("part", "change", "told"),
    [
        ("unet", {"layers_per_block": 2}, "unet: the weights are not the network of config.json: "),
        ("unet", {"block_out_channels": [64, 64]}, "unet: the weights are not the network of config.json: "),
        ("vae", {"latent_channels": 8}, "vae: the weights are not the network of config.json: "),
        ("image_encoder", {"hidden_size": 64}, "image_encoder: the weights are not the network of config.json: "),
    ],
)
def test_a_config_of_another_model(folder, own, refused, part, change, told):
    source = own(folder)
    path = source / part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert f"{source}: {told}" in refused(ModelError, source)


def test_a_missing_shard_is_named(folder, own, refused):
    source = own(folder)
    whole = source / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    names = sorted(tensors)
    shard = "diffusion_pytorch_model-0000{}-of-00002.safetensors".format
    save_file({name: tensors[name] for name in names[::2]}, source / "unet" / shard(1))
    index = {"weight_map": {name: shard(1 + place % 2) for place, name in enumerate(names)}}
    (source / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert refused(ModelError, source) == (
        f"{source}/unet: 1 of its 2 shards are not there ({shard(2)}). Download them again."
    )


def test_folders_that_are_no_model(tmp_path, folder, own, refused):
    (tmp_path / "empty").mkdir()
    assert refused(ModelError, tmp_path / "empty") == (
        f"{tmp_path}/empty: it is no run (it has no checkpoints/), no diffusers folder (no unet/) and no LoRA (no adapter_config.json). "
        "Give one of these, a .safetensors file, or a hub id."
    )
    source = own(folder)
    assert refused(ModelError, source / "unet") == (
        f"{source}/unet: it is one part of a model. Give the folder above it, {source}."
    )
    (source / "vae/diffusion_pytorch_model.safetensors").rename(source / "vae/diffusion_pytorch_model.bin")
    text = refused(ModelError, source)
    assert text.startswith(f"{source}: no weights that all three networks have, got ")
    assert "svdtune reads safetensors only" in text
    (source / "unet/config.json").unlink()
    assert f"{source}/unet/config.json is missing" in refused(ModelError, source)
    source = Path(shutil.copytree(folder, tmp_path / "other"))
    shutil.rmtree(source / "scheduler")
    assert f"{source}/scheduler/scheduler_config.json is missing" in refused(ModelError, source)


def test_a_file_of_one_part_is_sent_to_the_folder_above(folder, refused):
    text = refused(ModelError, folder / "unet/diffusion_pytorch_model.safetensors")
    assert "These are the weights of unet in diffusers' names: give the folder above them." in text


# Values.


@pytest.mark.parametrize(
    ("part", "value"),
    [("unet", float("nan")), ("unet", float("inf")), ("vae", float("nan")), ("image_encoder", float("inf"))],
)
def test_weights_that_are_not_finite(folder, own, refused, part, value):
    source = own(folder)
    name = {"unet": "conv_in.bias", "vae": "encoder.conv_in.bias", "image_encoder": "visual_projection.weight"}[part]
    broken = folder_tensors(source)[f"{part}/{name}"].clone()
    broken.view(-1)[0] = value
    change_part(source, part, {name: broken})
    for name, options in (("new", {}), ("new.safetensors", {"dtype": "fp16"})):
        text = refused(ModelError, source, [name], **options)
        assert text.startswith(f"{source}: its {part} gives values that are not finite for a small random input.")


def test_values_that_fp16_cannot_hold(folder, own, refused):
    source = own(folder)
    change_part(source, "unet", {"conv_in.bias": folder_tensors(source)["unet/conv_in.bias"] * 0 + 7e4})
    assert refused(ModelError, source, dtype="fp16") == (
        "conv_in.bias has values that float16 cannot hold (largest magnitude 7e+04). Use --dtype bf16 or fp32."
    )


# Options that do not go together.


def test_options_that_do_not_fit_the_source(tmp_path, folder, file, runs, refused):
    assert refused(UsageError, folder, merge=True) == (
        f"--merge: {folder} is a whole model, not a LoRA: there is nothing to merge."
    )
    assert refused(UsageError, runs["full"], merge=True).startswith("--merge: ")
    assert refused(UsageError, runs["lora"], base=str(folder)) == (
        f"--base: got {folder}, but a run knows its base ({folder})."
    )
    assert refused(UsageError, file, base=str(folder)) == (
        f"--base: got {folder}, but {file} is a whole model, not a LoRA."
    )
    assert refused(UsageError, folder, checkpoint="1") == (
        f"--checkpoint: got 1, but {folder} is no run folder, and only a run has checkpoints."
    )
    assert refused(UsageError, runs["full"], ["new"], into=file) == (
        f"--into: {tmp_path}/new is to be a folder, expected a name that ends in .safetensors."
    )
    assert refused(UsageError, runs["full"], ["new.safetensors"], into=file, dtype="fp16") == (
        f"--dtype: got fp16, but --into keeps every dtype of {file}."
    )


def test_sources_that_are_not_there(tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for source in (
        tmp_path / "nothing", tmp_path / "svd.safetensors", "svd.safetensors", "nothing", "./a/b", "~/models/svd", "a/b/c", "models/svd",
        "owner/svd.safetensors",
    ):  # fmt: skip
        text = refused(UsageError, source)
        assert text.startswith(
            f"{source}: no such run, folder or file. Give a run, a diffusers folder, a .safetensors file, "
        )
    for source in ("owner/svd-xt", "owner/svd-xt-1.1"):
        text = refused(ModelError, source)
        assert text.startswith(f"{source}: there is no folder {source} here, and it could not be got from the hub")


# Runs.


def test_checkpoints_that_are_not_there(tmp_path, folder, runs, refused):
    assert refused(UsageError, runs["full"], checkpoint="7") == (
        f"checkpoint 7: no such checkpoint in {runs['full']}/checkpoints; there: step-00000001, step-00000002."
    )
    run = make_run(tmp_path / "runs/new", folder)
    assert refused(UsageError, run).startswith(f"run {run} has no checkpoint yet.")


def test_a_damaged_checkpoint_is_told_however_it_is_given(tmp_path, folder, refused):
    run = make_run(tmp_path / "runs/x", folder, "adapt.method=temporal")
    weights = save(run, 1) / "unet.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    for source, options in ((run, {}), (run, {"checkpoint": "1"}), (weights.parent, {})):
        assert "its content changed after it was written" in refused(CheckpointError, source, **options)


def test_a_run_whose_base_was_changed(tmp_path, folder, own, refused):
    base = own(folder)
    for method in ("temporal", "lora"):
        save(make_run(tmp_path / "runs" / method, base, f"adapt.method={method}"), 1)
    change_part(base, "unet", {BIAS: folder_tensors(folder)[f"unet/{BIAS}"] + 1})
    for method in ("temporal", "lora"):
        text = refused(ModelError, tmp_path / "runs" / method)
        assert "Trained weights act only on their own base" in text
