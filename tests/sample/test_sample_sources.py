"""Every kind of SOURCE: the same model gives the same frames, and what is no model is told as what it is."""

from __future__ import annotations

import gc
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from sample_runs import export, pngs_of, save, single_file, write_config
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from svdtune.checkpoint.lora import comfy_tensors, read_lora
from svdtune.checkpoint.notes import as_metadata, notes_in_folder, write_notes
from svdtune.errors import CheckpointError, ModelError, UsageError
from svdtune.model.facts import TINY
from svdtune.model.load import load_part
from svdtune.model.source import read_configs, weights_hash
from svdtune.sample import cli
from svdtune.sample.cli import Request, sample, sample_run
from svdtune.sample.shot import Asked, plan_shot
from svdtune.sample.sources import Choice, open_subjects

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written by mistake goes to samples/ there."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def frames(tmp_path: Path, image: Path):
    """A function: the exact frames of a source."""
    count = iter(range(99))

    def of(source: object, *, asked: Asked | None = None, **choice) -> np.ndarray:
        out = tmp_path / f"out{next(count)}"
        choice, asked = {"source": str(source), **choice}, asked or Asked()
        assert plan_shot(open_subjects(Choice(**choice))[-1], asked).width <= 96  # full size would take an hour
        paths = list(sample(Request(Choice(**choice), image, out, asked=asked, frames=True)))
        assert len(paths) == 2
        return pngs_of(paths[1])

    return of


@pytest.fixture
def lora_run(run: Path) -> Path:
    save(run, 1, shift=0.3)
    return run


def whole_run(run: Path, base: Path) -> Path:
    write_config(run, base, "adapt.method=full")
    return save(run, 1, shift=0.05)


def message(kind: type[Exception], source: object, image: Path, **choice) -> str:
    with pytest.raises(kind) as error:
        list(sample(Request(Choice(str(source), **choice), image)))
    return str(error.value)


def test_a_run_its_export_and_its_single_file_are_one_model(
    run: Path, model_folder: Path, frames, tmp_path: Path
) -> None:
    """Notes carry the conventions: num_frames, fps, size and guidance are those of the run, not of a base."""
    checkpoint = whole_run(run, model_folder)
    expected = frames(run)
    assert expected.shape == (4, 16, 24, 3)
    assert np.abs(expected - frames(model_folder, asked=asked_as_trained(run))).mean() > 1
    np.testing.assert_array_equal(frames(checkpoint), expected)
    folder = export(checkpoint, tmp_path / "export")
    np.testing.assert_array_equal(frames(folder), expected)
    file = single_file(folder, tmp_path / "shapes.safetensors", notes_in_folder(folder))
    off = np.abs(frames(file) - expected)
    assert (off.max(), off.mean() < 0.01) <= (1, True)  # quant_conv is folded into conv_out


def asked_as_trained(run: Path) -> Asked:
    shot = plan_shot(open_subjects(Choice(str(run)))[0], Asked())
    s = shot.settings
    return Asked(s.num_frames, s.fps, s.motion_bucket_id, s.noise_aug_strength, s.num_inference_steps, s.min_guidance_scale,
                 s.max_guidance_scale, shot.height, shot.width)  # fmt: skip


def test_a_lora_run_its_adapter_folder_and_its_comfy_file_are_one_model(
    lora_run: Path, model_folder: Path, frames, tmp_path: Path
) -> None:
    expected, base = frames(lora_run), frames(model_folder, asked=asked_as_trained(lora_run))
    assert np.abs(expected - base).mean() > 3
    adapter = export(lora_run / "checkpoints" / "step-00000001", tmp_path / "export")
    np.testing.assert_array_equal(frames(model_folder, lora=adapter), expected)
    read = read_lora(adapter, read_configs(model_folder).unet)
    comfy = tmp_path / "comfy.safetensors"
    save_file(comfy_tensors(read, read_configs(model_folder).unet, torch.float32), comfy, as_metadata(read.notes))
    np.testing.assert_array_equal(frames(model_folder, lora=comfy), expected)


def test_how_much_a_lora_acts(lora_run: Path, model_folder: Path, frames, tmp_path: Path) -> None:
    adapter = export(lora_run / "checkpoints" / "step-00000001", tmp_path / "export")
    base, full = frames(model_folder, asked=asked_as_trained(lora_run)), frames(lora_run)
    half = frames(lora_run, lora_scale=0.5)
    np.testing.assert_array_equal(frames(lora_run, lora_scale=0), base)
    np.testing.assert_array_equal(frames(lora_run, lora_scale=1), full)
    np.testing.assert_array_equal(frames(model_folder, lora=adapter, lora_scale=0.0), base)
    np.testing.assert_array_equal(frames(model_folder, lora=adapter, lora_scale=0.5), half)
    assert np.abs(half - base).mean() > 1
    assert np.abs(half - full).mean() > 1


def test_a_lora_on_a_lora_run_acts_beside_it(lora_run: Path, model_folder: Path, frames, tmp_path: Path) -> None:
    adapter = export(lora_run / "checkpoints" / "step-00000001", tmp_path / "export")
    once, twice = frames(lora_run), frames(lora_run, lora=adapter)
    doubled = frames(model_folder, lora=adapter, lora_scale=2.0)
    assert np.abs(twice - once).mean() > 3
    assert np.abs(twice - doubled).max() <= 2  # merged into the weights: rounded elsewhere
    assert np.abs(frames(lora_run, lora=adapter, lora_scale=0.0) - once).max() <= 2


def test_an_image_decoder_model(model_folder: Path, run: Path, frames, tmp_path: Path) -> None:
    """Its VAE takes no num_frames, and decodes each frame for itself: chunks do not show."""
    torch.manual_seed(0)
    shutil.rmtree(model_folder / "vae")
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(32, 32),
        layers_per_block=1, latent_channels=4,
    )  # fmt: skip
    vae.save_pretrained(model_folder / "vae")
    checkpoint = whole_run(run, model_folder)
    chunks = [frames(run, asked=Asked(decode_chunk=chunk)) for chunk in (1, 3)]
    assert chunks[0].std() > 5
    assert np.abs(chunks[0] - chunks[1]).max() <= 1
    folder = export(checkpoint, tmp_path / "export")
    assert json.loads((folder / "vae/config.json").read_text())["_class_name"] == "AutoencoderKL"
    np.testing.assert_array_equal(frames(folder, asked=Asked(decode_chunk=1)), chunks[0])
    file = single_file(folder, tmp_path / "image_decoder.safetensors", notes_in_folder(folder))
    assert np.abs(frames(file, asked=Asked(decode_chunk=1)) - chunks[0]).max() <= 1


def test_chunks_of_a_temporal_decoder(lora_run: Path, frames) -> None:
    """It sees the frames of its chunk: all at once differs from one by one."""
    whole, one = frames(lora_run, asked=Asked(decode_chunk=4)), frames(lora_run, asked=Asked(decode_chunk=1))
    np.testing.assert_array_equal(frames(lora_run, asked=Asked(decode_chunk=9)), whole)
    assert np.abs(whole - one).max() > 0


def test_an_adapter_with_a_tower_of_its_own(model_folder: Path, run: Path, frames, tmp_path: Path) -> None:
    """conditioning.bridge: the base's tower alone does not fit the UNet, the adapter's folded one does."""
    torch.manual_seed(1)
    clip = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=224, patch_size=56,
        projection_dim=20,
    )  # fmt: skip
    shutil.rmtree(model_folder / "image_encoder")
    CLIPVisionModelWithProjection(clip).save_pretrained(model_folder / "image_encoder")
    write_config(run, model_folder, "conditioning.bridge=linear")
    checkpoint = save(run, 1, shift=0.2)
    adapter = export(checkpoint, tmp_path / "export")
    off = np.abs(frames(model_folder, lora=adapter) - frames(run))
    assert (off.max() <= 2, off.mean() < 0.05) == (True, True)
    image = tmp_path / "first.png"
    assert "width 20, the UNet's cross_attention_dim is 24" in message(ModelError, model_folder, image)
    text = message(ModelError, model_folder, image, lora=adapter, compare=True)
    assert "width 20, the UNet's cross_attention_dim is 24" in text
    assert not list((tmp_path / "here").iterdir())
    assert "has an image encoder of its own" in message(UsageError, run, image, lora=adapter)


def test_tiny_and_its_size(frames) -> None:
    (subject,) = open_subjects(Choice("tiny"))
    shot = plan_shot(subject, Asked())
    assert (shot.settings.num_frames, shot.height, shot.width, shot.resize) == (8, 64, 96, "cover")
    s = shot.settings
    assert (s.fps, s.motion_bucket_id, s.noise_aug_strength, s.num_inference_steps) == (7, 127, 0.02, 25)
    assert (s.min_guidance_scale, s.max_guidance_scale, s.decode_chunk_size) == (1.0, 3.0, 4)
    assert frames("tiny", asked=Asked(steps=1, num_frames=2)).shape == (2, 64, 96, 3)


@pytest.mark.parametrize(
    ("sample_size", "size"), [(96, (576, 1024)), (None, (576, 1024)), (12, (24, 24)), ([8, 12], (16, 24))]
)
def test_the_size_of_a_base_is_in_its_json(model_folder: Path, sample_size: object, size: tuple[int, int]) -> None:
    path = model_folder / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sample_size": sample_size}))
    shot = plan_shot(open_subjects(Choice(str(model_folder)))[0], Asked())
    assert (shot.height, shot.width, shot.settings.num_frames) == (*size, 3)


def renamed(folder: Path, variant: str, *, keep: bool = False) -> None:
    for path in [*folder.rglob("*.safetensors")]:
        if path.name.count(".") == 1:
            (shutil.copy if keep else shutil.move)(path, path.with_name(f"{path.stem}.{variant}.safetensors"))


def test_the_variant_that_is_there(model_folder: Path) -> None:
    def variant(**choice) -> str | None:
        return open_subjects(Choice(str(model_folder), **choice))[0].base.model.variant

    renamed(model_folder, "fp16", keep=True)
    assert variant() is None
    for path in [*model_folder.rglob("*.safetensors")]:
        if path.name.count(".") == 1:
            path.unlink()
    assert variant() == "fp16"
    (model_folder / "vae" / "diffusion_pytorch_model.fp16.safetensors").rename(model_folder / "vae" / "vae.bin")
    with pytest.raises(ModelError) as error:
        variant()
    assert str(error.value).startswith(
        f"{model_folder}: no weights that all three networks have, got unet: fp16 weights; vae: vae.bin; image_encoder: fp16 weights."
    )


def test_the_variant_that_a_lora_was_trained_on(lora_run: Path, model_folder: Path, tmp_path: Path) -> None:
    """Both lie there, as after a full download."""
    renamed(model_folder, "fp16", keep=True)
    write_config(lora_run, model_folder, "model.variant=fp16")
    adapter = export(save(lora_run, 2), tmp_path / "export")
    assert open_subjects(Choice(str(model_folder), lora=adapter))[0].base.model.variant == "fp16"


def test_a_hub_id(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the hub's cache, the fp16 files or the plain ones; a mistyped run is not looked for there."""
    from huggingface_hub import constants

    repository = tmp_path / "hub" / "models--somebody--svd"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    shutil.copytree(model_folder, repository / "snapshots" / ("a" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    (subject,) = open_subjects(Choice("somebody/svd"))
    assert (subject.label, subject.base.model.variant) == ("somebody/svd", None)
    renamed(repository / "snapshots" / ("a" * 40), "fp16", keep=True)
    assert open_subjects(Choice("somebody/svd"))[0].base.model.variant == "fp16"
    (tmp_path / "mine").mkdir()
    for mistyped in ("runs/tiny", "mine/tiny"):
        with pytest.raises(UsageError, match=rf"^no such run: {mistyped}\. "):
            open_subjects(Choice(mistyped))


# Messages.


def test_a_lora_as_the_model(lora_run: Path, model_folder: Path, image: Path, tmp_path: Path) -> None:
    adapter = export(lora_run / "checkpoints" / "step-00000001", tmp_path / "my export")
    told = (
        "is a LoRA, which adds to a model and is none. Give the model that it was trained on and the LoRA: "
        f"svdtune sample {model_folder} IMAGE --lora"
    )
    assert message(UsageError, adapter, image) == f"{adapter} {told} '{adapter}'"
    write_notes(adapter, {"conventions": {"base": {"pretrained": "its name"}}})
    assert message(UsageError, adapter, image) == f"{adapter} {told} '{adapter}'"
    (adapter / "svdtune.json").unlink()
    assert message(UsageError, adapter, image) == f"{adapter} {told} '{adapter}'"  # from adapter_config.json
    file = tmp_path / "lora.safetensors"
    shutil.copy(adapter / "adapter_model.safetensors", file)
    assert message(UsageError, file, image).endswith(f"svdtune sample BASE IMAGE --lora {file}")
    tensors = load_file(file)
    save_file(tensors, file, as_metadata({"conventions": {"base": {"pretrained": "its name"}}}))
    text = message(UsageError, file, image)
    assert "and is none (it was trained on its name). Give" in text
    assert text.endswith(f"svdtune sample BASE IMAGE --lora {file}")


def test_a_lora_of_another_base(lora_run: Path, model_folder: Path, image: Path, tmp_path: Path) -> None:
    adapter = export(lora_run / "checkpoints" / "step-00000001", tmp_path / "export")
    was = weights_hash(model_folder, "unet", None)
    network = load_part(read_configs(model_folder), "unet", None)
    network.conv_in.bias.data += 0.5
    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    network.save_pretrained(other / "unet")
    now = weights_hash(other, "unet", None)
    assert message(ModelError, other, image, lora=adapter) == (
        f"--lora: LoRA of another base: {adapter} was trained on {model_folder} (variant None), whose UNet has sha256 {was[:16]}…; "
        f"the UNet of other (variant None) has {now[:16]}…. A LoRA acts only on the weights it was trained on: "
        "give that base as SOURCE."
    )
    # What was trained from that base is fine.
    write_notes(other, {"conventions": {"base": {"unet_sha256": was}}})
    assert open_subjects(Choice(str(other), lora=adapter))[0].lora is not None


def test_a_lora_of_the_same_base_in_half_the_bits(lora_run: Path, model_folder: Path, tmp_path: Path) -> None:
    """Trained on the fp16 files of a release, sampled on its fp32 file."""
    adapter = export(lora_run / "checkpoints" / "step-00000001", tmp_path / "export")
    load_part(read_configs(model_folder), "unet", None).half().save_pretrained(tmp_path / "half" / "unet")
    conventions = {"base": {"pretrained": "x", "unet_sha256": weights_hash(tmp_path / "half", "unet", None)}}
    write_notes(adapter, {"conventions": conventions})
    assert open_subjects(Choice(str(model_folder), lora=adapter))[0].lora is not None


def test_a_lora_that_is_none(lora_run: Path, model_folder: Path, image: Path, tmp_path: Path) -> None:
    def told(path: Path, kind: type[Exception]) -> str:
        return message(kind, model_folder, image, lora=path)

    assert told(tmp_path / "fist.png", UsageError) == (
        f"--lora: no such file or folder: {tmp_path}/fist.png. Did you mean {image}?"
    )
    assert (
        told(lora_run, UsageError)
        == f"--lora: {lora_run} is a run. Give it as SOURCE, or its {lora_run}/export as --lora."
    )
    assert "holds no adapter_model.safetensors" in told(model_folder, ModelError)
    file = model_folder / "unet" / "diffusion_pytorch_model.safetensors"
    assert told(file, ModelError) == f"--lora: {file} is no LoRA but SVD, diffusers naming. Give a model as SOURCE."
    save_file({"lora_unet_nothing.lora_down.weight": torch.ones(2, 3), "lora_unet_nothing.lora_up.weight": torch.ones(3, 2)},
              tmp_path / "x.safetensors")  # fmt: skip
    assert "2 of 2 weights belong to no layer of this UNet" in told(tmp_path / "x.safetensors", ModelError)
    (tmp_path / "x.pt").write_bytes(b"x")
    assert "a .pt file is a pickle" in told(tmp_path / "x.pt", ModelError)


def test_a_lora_that_does_not_fit_leaves_nothing(model_folder: Path, image: Path, tmp_path: Path) -> None:
    """The names are this UNet's, the sizes are not: seen when it is put on, before the base is sampled."""
    name = "base_model.model.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file(
        {f"{name}.lora_A.weight": torch.ones(2, 7), f"{name}.lora_B.weight": torch.ones(7, 2)},
        tmp_path / "x.safetensors",
    )
    choice = Choice(str(model_folder), lora=tmp_path / "x.safetensors", compare=True)
    asked = Asked(height=16, width=24, steps=1)
    with pytest.raises(ModelError, match="takes 7 and gives 7 numbers"):
        list(sample(Request(choice, image, tmp_path / "new" / "out", asked=asked)))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("choice", "told"),
    [
        ({"checkpoints": ("5",)}, "--checkpoint: got 5, but {base} is no run folder, and only a run has checkpoints."),
        ({"lora_scale": 0.5}, "--lora-scale: base has no LoRA (it is a model). Give one with --lora."),
        ({"lora_scale": float("nan")}, "--lora-scale: got nan, expected a finite number; 1 acts as trained, 0 not at all."),
        ({"compare": True}, "--compare: {base} is one model. Give a run, or a LoRA with --lora, to compare it with its base."),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(model_folder: Path, image: Path, choice: dict, told: str) -> None:
    assert message(UsageError, model_folder, image, **choice) == told.format(base=model_folder)


def test_lora_scale_of_a_run_without(run: Path, model_folder: Path, image: Path) -> None:
    whole_run(run, model_folder)
    assert message(UsageError, run, image, lora_scale=0.5) == (
        "--lora-scale: step-00000001 has no LoRA (it was trained with adapt.method=full). Give one with --lora."
    )


def test_sources_that_are_none(lora_run: Path, model_folder: Path, image: Path, tmp_path: Path) -> None:
    assert (
        message(UsageError, image, tmp_path)
        == f"{image} is a picture; the model comes first: svdtune sample SOURCE {image}"
    )
    checkpoints = lora_run / "checkpoints"
    assert (
        message(UsageError, checkpoints, image)
        == f"{checkpoints} holds the checkpoints of a run. Give the run: {lora_run}"
    )
    assert "is one part of a model. Give the folder above it" in message(UsageError, model_folder / "unet", image)
    assert (
        message(UsageError, tmp_path / "bas", image)
        == f"no such file or folder: {tmp_path}/bas. Did you mean {tmp_path}/base?"
    )
    (tmp_path / "x.ckpt").write_bytes(b"\x80\x02")
    assert message(ModelError, tmp_path / "x.ckpt", image).startswith(
        f"{tmp_path}/x.ckpt: a .ckpt file is a pickle, which can run code"
    )
    lone = tmp_path / "download"
    lone.mkdir()
    file = single_file(model_folder, lone / "svd.safetensors", {})
    assert (
        message(UsageError, lone, image)
        == f"{lone} is no diffusers folder (it has no unet/). Give the file in it: {file}"
    )
    file.write_bytes(file.read_bytes()[:-100])
    assert "it is cut off" in message(ModelError, file, image)
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(320, 4, 3, 3),
               "model.diffusion_model.time_embed.0.weight": torch.ones(2, 2)}, file)  # fmt: skip
    assert "expected a whole SVD model" in message(ModelError, file, image)
    damaged = checkpoints / "step-00000001"
    (damaged / "lora.safetensors").write_bytes(b"")
    assert "lora.safetensors: expected " in message(CheckpointError, damaged, image)


def test_notes_that_hold_no_numbers(model_folder: Path, image: Path) -> None:
    write_notes(model_folder, {"conventions": {"num_frames": "many"}})
    assert message(ModelError, model_folder, image).startswith(
        "base: its notes of the training (conventions) hold something else"
    )
    write_notes(model_folder, {"conventions": 3})
    assert open_subjects(Choice(str(model_folder)))[0].conventions == {}


def test_one_unet_in_memory(
    lora_run: Path, model_folder: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each model is loaded once, when the one before it is gone."""
    from diffusers import UNetSpatioTemporalConditionModel as UNet

    save(lora_run, 2)
    alive = []
    load = cli._load

    def watched(*arguments):
        alive.append(sum(type(each) is UNet for each in gc.get_objects()))
        return load(*arguments)

    gc.collect()
    monkeypatch.setattr(cli, "_load", watched)
    before = sum(type(each) is UNet for each in gc.get_objects())
    paths = list(sample(Request(Choice(str(lora_run), compare=True), image, tmp_path / "out", seeds=(0, 1))))
    assert len(paths) == 3 * 2 + 2 * 2
    assert alive == [before] * 3


def test_tiny_is_the_embedded_one_but_a_run_here_is_meant_first(
    lora_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(lora_run.parent)
    assert open_subjects(Choice("tiny"))[0].configs.source == TINY
    lora_run.rename("tiny")
    assert open_subjects(Choice("tiny"))[0].checkpoint is not None


def test_sample_run_gives_the_one_path(lora_run: Path, image: Path) -> None:
    assert sample_run(lora_run, image) == lora_run / "samples" / "first-seed0.mp4"
    assert sample_run(lora_run / "checkpoints" / "step-00000001", image) == lora_run / "samples" / "first-seed0.mp4"


def test_subject_is_what_its_parts_are(lora_run: Path) -> None:
    (subject,) = open_subjects(Choice(str(lora_run)))
    assert (subject.label, subject.source, subject.facts.f) == ("step-00000001", "shapes", 2)
    assert replace(subject, checkpoint=None).origin()["weights"] == subject.conventions["base"]["unet_sha256"]
