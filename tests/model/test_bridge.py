"""conditioning.bridge: a CLIP tower of another width learns to speak to the UNet, and is exported as if it always had."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableVideoDiffusionPipeline
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from svdtune.checkpoint.export import Base, export_run
from svdtune.checkpoint.state import load_trained, save_trained
from svdtune.config.schema import Adapt, Model, Train
from svdtune.contracts import Draws, VideoBatch, specs
from svdtune.errors import CheckpointError, ConfigError, ModelError
from svdtune.model.adapt import adapt
from svdtune.model.bridge import WEIGHT
from svdtune.model.fake import fake_tensors
from svdtune.model.load import fake_model, load_model
from svdtune.sample.cli import load_pipeline, sample_run
from svdtune.sample.run import open_checkpoint
from svdtune.sample.sampler import SampleSettings, build_pipeline, sample_video
from svdtune.trainer.build import clip_pixels
from svdtune.trainer.optimizer import make_ema
from svdtune.trainer.step import Parts, train_step

REPO = Path(__file__).parents[2]
D = 20
METHODS = ("full", "temporal", "temporal_attention", "spatial", "lora")
SETTINGS = SampleSettings(3, 7, 127, 0.02, 2, 1.0, 3.0, 4)


@pytest.fixture(scope="module")
def folder(svd_folder, tmp_path_factory) -> Path:
    """The random SVD of conftest with a CLIP tower of width 20 where the UNet takes 24."""
    path = tmp_path_factory.mktemp("other") / "svd"
    shutil.copytree(svd_folder, path)
    config = json.loads((path / "image_encoder/config.json").read_text())
    torch.manual_seed(1)
    CLIPVisionModelWithProjection(CLIPVisionConfig(**{**config, "projection_dim": D})).save_pretrained(
        path / "image_encoder"
    )
    return path


def load(folder: Path, seed: int = 0):
    return load_model(Model(pretrained=str(folder), variant=None), bridge=True, seed=seed)


def tuned(folder: Path, method: str = "temporal", move: float = 0.0):
    """Model and trained parameters, all of them moved as training would."""
    model = load(folder)
    trained = adapt(model.unet, Adapt(method=method, rank=2), dtype=torch.float32, seed=0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trained.values():
            parameter += move * torch.randn(parameter.shape, generator=generator)
    return model, trained


def records(facts, keep: float = 1.0):
    axes = facts.axes(b=2, t=3, h=32, w=48)
    generator = torch.Generator().manual_seed(0)

    def make(record):
        return {
            name: torch.rand(spec.shape(axes), generator=generator).to(getattr(torch, spec.dtype))
            for name, spec in specs(record).items()
        }

    kept = torch.full((2,), keep)
    return VideoBatch(**make(VideoBatch)), Draws(**{**make(Draws), "keep_image_embeds": kept, "sigma": torch.ones(2)})


def parts_of(model) -> Parts:
    return Parts(model.unet, model.vae, model.image_encoder, clip_pixels(model), model.facts, torch.float32, 4)


def pipeline_of(model) -> StableVideoDiffusionPipeline:
    return build_pipeline(
        model.unet, model.vae, model.image_encoder, model.configs.scheduler, model.configs.feature_extractor
    )


def tokens_seen(unet, run) -> list[torch.Tensor]:
    """What the first cross-attention is given while `run` runs."""
    seen: list[torch.Tensor] = []
    layer = next(module for name, module in unet.named_modules() if name.endswith("attn2.to_v"))
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    run()
    handle.remove()
    return seen


@pytest.mark.parametrize("method", METHODS)
def test_a_training_step_moves_the_bridge_with_every_method(folder, method):
    model, trained = tuned(folder, method)
    assert trained[WEIGHT].shape == (24, D)
    assert trained[WEIGHT].dtype == torch.float32
    result = train_step(parts_of(model), *records(model.facts))
    assert result.unet_input.encoder_hidden_states.shape == (2, 1, D)
    result.loss.backward()
    assert trained[WEIGHT].grad.abs().max() > 0
    before = trained[WEIGHT].detach().clone()
    torch.optim.AdamW(trained.values(), lr=1e-3).step()
    assert not torch.equal(trained[WEIGHT], before)


def test_a_dropped_token_is_zero_after_the_bridge(folder):
    model, _ = tuned(folder)
    kept, dropped = (
        tokens_seen(model.unet, lambda keep=keep: train_step(parts_of(model), *records(model.facts, keep)))[0]
        for keep in (1.0, 0.0)
    )
    assert kept.shape[-1] == dropped.shape[-1] == 24
    assert kept.abs().min() > 0
    assert not dropped.any()


def test_under_half_precision_with_checkpointing(folder):
    model = load(folder)
    trained = adapt(model.unet, Adapt(method="lora", rank=2), dtype=torch.bfloat16, seed=0)
    model.unet.enable_gradient_checkpointing()
    model.unet.train()
    parts = Parts(model.unet, model.vae, model.image_encoder, clip_pixels(model), model.facts, torch.bfloat16, 4)
    train_step(parts, *records(model.facts)).loss.backward()
    assert trained[WEIGHT].dtype == torch.float32
    assert trained[WEIGHT].grad.abs().max() > 0


def test_works_under_fake_tensors(folder):
    configs = load(folder).configs
    model = fake_model(configs, bridge=True)
    names = adapt(model.unet, Adapt(method="lora", rank=2), dtype=torch.float32, seed=0).keys()
    with fake_tensors(model.unet, model.vae, model.image_encoder):
        result = train_step(parts_of(model), *records_empty(model.facts))
        result.loss.backward()
        grads = {name: parameter.grad for name, parameter in model.unet.named_parameters() if name in names}
        assert grads[WEIGHT] is not None
        assert grads[WEIGHT].shape == (24, D)


def records_empty(facts):
    axes = facts.axes(b=2, t=3, h=32, w=48)
    return tuple(
        record(**{n: torch.empty(s.shape(axes), dtype=getattr(torch, s.dtype)) for n, s in specs(record).items()})
        for record in (VideoBatch, Draws)
    )


def test_start_values_depend_on_the_seed_alone(folder):
    torch.manual_seed(8)
    first = load(folder, 1).unet.get_parameter(WEIGHT)
    torch.manual_seed(9)
    assert torch.equal(load(folder, 1).unet.get_parameter(WEIGHT), first)
    assert not torch.equal(load(folder, 2).unet.get_parameter(WEIGHT), first)


def test_widths_that_differ_need_it_and_equal_ones_refuse_it(folder, svd_folder):
    with pytest.raises(ModelError, match=r"embeddings of width 20, the UNet's cross_attention_dim is 24"):
        load_model(Model(pretrained=str(folder), variant=None))
    with pytest.raises(
        ConfigError, match=r"conditioning\.bridge: got linear, expected null: .* width 24 and .* is 24\."
    ) as error:
        load(svd_folder)
    assert error.value.patch == ("conditioning.bridge=null",)


def test_checkpoints_hold_it_and_refuse_runs_without(folder, svd_folder, tmp_path):
    _, trained = tuned(folder, "lora", move=0.1)
    (tmp_path / "with").mkdir()
    save_trained(tmp_path / "with", trained, lora=True)
    _, fresh = tuned(folder, "lora")
    assert not torch.equal(fresh[WEIGHT], trained[WEIGHT])
    load_trained(tmp_path / "with", fresh)
    assert all(torch.equal(fresh[name], trained[name]) for name in trained)
    average = make_ema(Train(ema=True), trained.values())
    assert average is not None
    assert len(average.shadow_params) == len(trained)
    plain = load_model(Model(pretrained=str(svd_folder), variant=None))
    without = adapt(plain.unet, Adapt(method="lora", rank=2), dtype=torch.float32, seed=0)
    (tmp_path / "without").mkdir()
    save_trained(tmp_path / "without", without, lora=True)
    with pytest.raises(CheckpointError, match=r"missing in the checkpoint: image_bridge\.weight"):
        load_trained(tmp_path / "without", fresh)
    with pytest.raises(CheckpointError, match=r"unexpected in the checkpoint: image_bridge\.weight"):
        load_trained(tmp_path / "with", without)


def test_the_exported_pipeline_gives_the_same_video_in_plain_diffusers(folder, tmp_path):
    model, _ = tuned(folder, "temporal", move=0.05)
    export_run(tmp_path / "export", base=Base("x", folder, None), unet=model.unet, lora=False, half=False)
    exported = StableVideoDiffusionPipeline.from_pretrained(tmp_path / "export")
    exported.set_progress_bar_config(disable=True)
    assert exported.image_encoder.config.projection_dim == 24
    assert WEIGHT not in exported.unet.state_dict()
    image = torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ours, theirs = pipeline_of(model), exported
    tokens = [tokens_seen(p.unet, lambda p=p: sample_video(p, image, SETTINGS, seed=0)) for p in (ours, theirs)]
    assert len(tokens[0]) == len(tokens[1]) == 2
    for one, other in zip(*tokens, strict=True):
        assert one.abs().max() > 0.01
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    videos = [sample_video(p, image, SETTINGS, seed=0).astype(int) for p in (ours, theirs)]
    assert videos[0].std() > 1
    assert np.abs(videos[0] - videos[1]).max() <= 1


def test_a_lora_export_has_the_folded_tower_beside_an_adapter_without_stray_keys(folder, tmp_path):
    model, trained = tuned(folder, "lora", move=0.05)
    export_run(tmp_path / "export", base=Base("x", folder, None), unet=model.unet, lora=True, half=False)
    adapter = load_file(tmp_path / "export/adapter_model.safetensors")
    assert len(adapter) == len(trained) - 1
    assert not [name for name in adapter if "bridge" in name]
    plain = load_model(Model(pretrained=str(folder), variant=None), bridge=True).unet
    del plain.image_bridge
    plain._forward_pre_hooks.clear()
    opened = PeftModel.from_pretrained(plain, tmp_path / "export")
    tower = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "export", subfolder="image_encoder")
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    sample = torch.randn(2, 3, 8, 8, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        outputs = [
            unet(
                sample, 0.5, encoder_hidden_states=clip(pixels).image_embeds[:, None], added_time_ids=torch.ones(2, 3)
            ).sample
            for unet, clip in ((model.unet, model.image_encoder), (opened, tower))
        ]
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-4)


def test_a_run_trains_resumes_samples_and_exports(folder, tmp_path):
    from svdtune.data.demo import write_demo

    write_demo(tmp_path / "clips", clips=4, motion="down", seed=0)
    options = [f"data.root={tmp_path / 'clips'}", f"run.dir={tmp_path}", "run.name=bridge", f"model.pretrained={folder}",
               "model.variant=null", "conditioning.bridge=linear", "preflight.enabled=false", "train.precision=no", "train.ema=true",
               "data.num_frames=3", "data.height=32", "data.width=48", "data.workers=0", "run.threads=1", "train.warmup=0",
               "train.batch_size=1", "validation.samples=0", "validation.clips=0", "validation.inference_steps=1"]  # fmt: skip
    run = tmp_path / "bridge"
    weights = {}
    for steps in (1, 2):
        done = subprocess.run(
            [sys.executable, "-m", "svdtune", "train", str(REPO / "configs/tiny.yaml"), *options, f"train.steps={steps}"],
            capture_output=True, text=True, cwd=REPO, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        weights[steps] = load_file(run / f"checkpoints/step-0000000{steps}/unet.safetensors")[WEIGHT]
    assert "resuming" in done.stderr
    assert 0 < (weights[2] - weights[1]).abs().max() < 0.01
    checkpoint = run / "checkpoints/step-00000002"
    assert json.loads((checkpoint / "MANIFEST.json").read_text())["conventions"]["bridge"] == "linear"
    average = load_file(checkpoint / "ema.safetensors")[WEIGHT]
    sampled = load_pipeline(open_checkpoint(checkpoint), "no", torch.device("cpu"))
    assert torch.equal(sampled.unet.get_parameter(WEIGHT), average)
    Image.fromarray(np.full((32, 48, 3), 90, np.uint8)).save(tmp_path / "first.png")
    assert sample_run(run, tmp_path / "first.png").stat().st_size > 0
    tower = load_file(run / "export/image_encoder/model.safetensors")["visual_projection.weight"]
    assert tower.shape == (24, 32)
    own = load_file(folder / "image_encoder/model.safetensors")["visual_projection.weight"]
    torch.testing.assert_close(tower, average @ own, atol=1e-6, rtol=1e-5)
