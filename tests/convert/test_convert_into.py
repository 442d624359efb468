"""`--into base.safetensors`: what was trained takes the place of the base's, and every other byte stays."""

from __future__ import annotations

import json

import pytest
import torch
from convert_models import (
    bits,
    differing,
    jsons_of,
    make_file,
    make_folder,
    make_run,
    metadata_of,
    notes_of,
    originals,
    save,
)
from safetensors.torch import load_file, save_file

from svdtune.convert.cli import convert
from svdtune.errors import ModelError, UsageError
from svdtune.model.headers import read_header

UNET = "model.diffusion_model."
CLIP = "conditioner.embedders.0.open_clip.model."


def raw(path):
    """(name, dtype, shape, bytes) in the order in which they lie in the file."""
    content, tensors = path.read_bytes(), read_header(path).tensors
    order = sorted(tensors, key=lambda name: tensors[name].extent)
    return {name: (tensors[name].dtype, tensors[name].shape, content[slice(*tensors[name].extent)]) for name in order}


def beside():
    """What a release holds beside the model, in dtypes and shapes of their own."""
    return {
        "model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7, dtype=torch.int32),
        "model_ema.diffusion_modelinput_blocks00weight": torch.randn(4, 3), "denoiser.sigmas": torch.randn(5).double(),
        "conditioner.embedders.3.encoder.encoder.conv_in.weight": torch.randn(4, 3, 3, 3).half(),
        f"{CLIP}transformer.resblocks.0.attn.in_proj_bias": torch.randn(9).bfloat16(),
        f"{CLIP}attn_mask": torch.ones(3, 3, dtype=torch.bool),
        f"{CLIP}token_embedding.weight": torch.randn(6, 2), f"{CLIP}logit_scale": torch.tensor(4.6),
    }  # fmt: skip


def test_only_what_was_trained_is_replaced(tmp_path, runs, folder):
    base = make_file(tmp_path / "svd_xt.safetensors", folder, changed=beside())
    told = convert(str(runs["temporal"]), tmp_path / "new.safetensors", into=base)
    before, after = raw(base), raw(tmp_path / "new.safetensors")
    assert list(after) == list(before)
    changed = {name for name in before if before[name] != after[name]}
    trained = load_file(runs["temporal"] / "checkpoints/step-00000002/unet.safetensors")
    assert len(changed) == len(trained)
    assert all(name.startswith(UNET) and ("time_" in name or "mix_factor" in name) for name in changed)
    mixing = after[f"{UNET}input_blocks.1.0.time_mixer.mix_factor"]
    assert mixing[2] == bits(trained["down_blocks.0.resnets.0.time_mixer.mix_factor"])[2]
    assert {entry[:2] for entry in before.values()} == {entry[:2] for entry in after.values()}
    assert told == [
        f"{tmp_path / 'new.safetensors'}: {len(changed)} of {len(before)} tensors of {base} replaced, {len(before) - len(changed)} copied "
        "byte for byte, read back equal, forward equal"
    ]


@pytest.mark.parametrize("name", ["full", "lora", "dora", "ema"])
def test_the_new_file_is_the_model_that_is_written_without_into(tmp_path, runs, file, name):
    convert(str(runs[name]), tmp_path / "into.safetensors", into=file)
    convert(str(runs[name]), tmp_path / "whole.safetensors", merge=name in ("lora", "dora"))
    assert differing(load_file(tmp_path / "into.safetensors"), load_file(tmp_path / "whole.safetensors")) == set()
    assert differing(load_file(tmp_path / "into.safetensors"), load_file(file)) != set()


def test_metadata_and_order_of_another_writer_are_kept(tmp_path, runs, folder):
    tensors = originals(folder)
    order = sorted(tensors, key=lambda name: name[::-1])
    at, header = 0, {"__metadata__": {"author": "somebody", "svdtune": "{}"}}
    for name in order:
        size = tensors[name].nbytes
        header[name] = {"dtype": "F32", "shape": list(tensors[name].shape), "data_offsets": [at, at + size]}
        at += size
    header["__metadata__"]["svdtune"] = json.dumps({"configs": jsons_of(folder)})
    text = json.dumps(header).encode()
    base = tmp_path / "base.safetensors"
    base.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(bits(tensors[name])[2] for name in order))
    convert(str(runs["temporal"]), tmp_path / "new.safetensors", into=base)
    assert list(raw(tmp_path / "new.safetensors")) == order
    assert metadata_of(tmp_path / "new.safetensors")["author"] == "somebody"
    notes = notes_of(tmp_path / "new.safetensors")
    assert notes["conventions"]["adapt"] == "temporal"
    assert notes["configs"]["unet"]["num_frames"] == 25


def test_frames_of_a_file_without_notes_are_not_lost_with_its_name(tmp_path, plain_file):
    run = make_run(tmp_path / "runs/plain", plain_file, "adapt.method=temporal")
    save(run, 1)
    convert(str(run), tmp_path / "new.safetensors", into=plain_file)
    convert(str(tmp_path / "new.safetensors"), tmp_path / "made")
    assert json.loads((tmp_path / "made/unet/config.json").read_text())["num_frames"] == 25


@pytest.fixture(scope="module")
def half_run(tmp_path_factory, folders):
    """A run on the fp16 release of the model; its fp32 release rounds to it."""
    run = make_run(tmp_path_factory.mktemp("half") / "runs/half", folders["fp16"], "adapt.method=temporal")
    save(run, 1)
    return run


def test_the_base_may_be_the_same_release_in_another_dtype(tmp_path, half_run, folder):
    base = make_file(tmp_path / "fp32.safetensors", folder)
    convert(str(half_run), tmp_path / "new.safetensors", into=base)
    before, after = load_file(base), load_file(tmp_path / "new.safetensors")
    trained = load_file(half_run / "checkpoints/step-00000001/unet.safetensors")
    changed = differing(before, after)
    assert len(changed) == len(trained)
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    mixing = f"{UNET}input_blocks.1.0.time_mixer.mix_factor"
    assert bits(after[mixing]) == bits(trained["down_blocks.0.resnets.0.time_mixer.mix_factor"])


def test_trained_weights_take_the_dtype_that_the_base_has_them_in(tmp_path, runs, folder):
    mixed = {name: tensor.half() if "time_stack" in name else tensor for name, tensor in originals(folder).items()}
    base = make_file(tmp_path / "mixed.safetensors", folder, changed=mixed)
    convert(str(runs["full"]), tmp_path / "new.safetensors", into=base)
    assert [entry[:2] for entry in raw(base).values()] == [
        entry[:2] for entry in raw(tmp_path / "new.safetensors").values()
    ]


def test_a_lora_file_needs_no_base_but_the_file(tmp_path, runs, file):
    convert(str(runs["lora"]), tmp_path / "lora.safetensors")
    convert(str(tmp_path / "lora.safetensors"), tmp_path / "new.safetensors", into=file)
    convert(str(runs["lora"]), tmp_path / "whole.safetensors", merge=True)
    assert differing(load_file(tmp_path / "new.safetensors"), load_file(tmp_path / "whole.safetensors")) == set()


def test_a_fine_tuned_folder_goes_into_its_base_too(tmp_path, runs, folder, file):
    convert(str(runs["temporal"]), tmp_path / "tuned")
    convert(str(tmp_path / "tuned"), tmp_path / "new.safetensors", into=file)
    trained = load_file(runs["temporal"] / "checkpoints/step-00000002/unet.safetensors")
    assert len(differing(load_file(tmp_path / "new.safetensors"), load_file(file))) == len(trained)


# What is no base.


def refused(tmp_path, source, base):
    with pytest.raises(ModelError) as caught:
        convert(str(source), tmp_path / "new.safetensors", into=base)
    assert not (tmp_path / "new.safetensors").exists()
    assert not list(tmp_path.glob(".*"))
    return str(caught.value)


def test_the_base_of_another_training_is_refused(tmp_path, runs, file):
    convert(str(runs["full"]), tmp_path / "other.safetensors")
    text = refused(tmp_path, runs["temporal"], tmp_path / "other.safetensors")
    assert text.startswith(f"--into: {tmp_path / 'other.safetensors'} is not the base of this training: ")
    assert text.endswith("Trained weights act only on their own base: give that one.")


def test_one_untrained_weight_that_differs_is_named(tmp_path, runs, folder):
    name = f"{UNET}input_blocks.0.0.bias"
    base = make_file(tmp_path / "base.safetensors", folder, changed={name: originals(folder)[name] + 1e-6})
    assert refused(tmp_path, runs["temporal"], base) == (
        f"--into: {base} is not the base of this training: 1 UNet weights that were not trained differ (conv_in.bias). Trained weights "
        "act only on their own base: give that one."
    )


def test_another_image_encoder_is_refused(tmp_path, runs, folder):
    """Of another shape, and of the same shape with other weights."""
    moved = {
        name: t + 0.01 for name, t in originals(folder).items() if ".visual." in name and name.endswith("ln_1.bias")
    }
    assert refused(tmp_path, runs["temporal"], make_file(tmp_path / "moved.safetensors", folder, changed=moved)) == (
        f"--into: {tmp_path / 'moved.safetensors'} has another image encoder than this model: 2 weights differ "
        "(vision_model.encoder.layers.0.layer_norm1.bias, vision_model.encoder.layers.1.layer_norm1.bias). It would stay in the file, and "
        "the UNet was trained on the other's embeddings. Leave --into out: the new file then holds all parts of this model."
    )
    wide = make_folder(tmp_path / "wide", image_encoder={"hidden_size": 64})
    text = refused(tmp_path, runs["temporal"], make_file(tmp_path / "wide.safetensors", wide))
    assert text.startswith(f"--into: {tmp_path / 'wide.safetensors'} has another image encoder than this model: ")


def test_a_bridge_and_its_tower_do_not_go_into_a_base(tmp_path, file):
    """The run's tower has the bridge in it; the base's has another width."""
    base = make_folder(tmp_path / "base", image_encoder={"projection_dim": 40})
    run = make_run(tmp_path / "runs/bridged", base, "adapt.method=temporal", "conditioning.bridge=linear")
    save(run, 1)
    text = refused(tmp_path, run, make_file(tmp_path / "base.safetensors", base))
    assert "has another image encoder than this model: 1 weights differ (visual_projection.weight)." in text


def test_another_unet_is_refused(tmp_path, runs):
    small = make_folder(tmp_path / "small", unet={"block_out_channels": [64, 64], "num_attention_heads": [1, 1]})
    text = refused(tmp_path, runs["temporal"], make_file(tmp_path / "small.safetensors", small))
    assert text.startswith(f"--into: {tmp_path / 'small.safetensors'} has another UNet: ")
    assert text.endswith("Give the base that was trained on, or leave --into out.")


def test_a_base_that_is_no_whole_model_is_refused(tmp_path, runs, folder):
    assert "no such file" in refused(tmp_path, runs["temporal"], tmp_path / "nothing.safetensors")
    assert "expected a whole SVD model" in refused(
        tmp_path, runs["temporal"], folder / "unet/diffusion_pytorch_model.safetensors"
    )
    broken = make_file(tmp_path / "broken.safetensors", folder, changed={f"{UNET}motion.weight": torch.ones(2)})
    assert "1 unexpected (motion.weight)" in refused(tmp_path, runs["temporal"], broken)
    with pytest.raises(UsageError) as caught:
        convert(str(runs["temporal"]), tmp_path / "new.safetensors", into=folder)
    assert str(caught.value) == f"--into: {folder} is a folder, expected the base's single file (svd_xt.safetensors)."


def test_the_base_itself_is_never_written(tmp_path, runs, file):
    before = file.read_bytes()
    with pytest.raises(UsageError, match=r"it is there already, and convert overwrites nothing"):
        convert(str(runs["full"]), file, into=file)
    assert file.read_bytes() == before
    save_file({}, tmp_path / "empty.safetensors")
    assert "holds no tensor" in refused(tmp_path, runs["full"], tmp_path / "empty.safetensors")
