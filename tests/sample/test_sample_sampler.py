"""Sampling: what reaches the UNet, what it depends on, and what it leaves behind."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableVideoDiffusionPipeline
from PIL import Image
from random_svd import FEATURE_EXTRACTOR, SCHEDULER
from transformers import CLIPImageProcessor

from svdtune.config.schema import Adapt, Config, Data, Memory, Train, Validation
from svdtune.errors import ModelError, UsageError
from svdtune.model.adapt import adapt
from svdtune.sample.sampler import SampleSettings, build_pipeline, sample_video

# diffusers' scheduler hands a torch tensor to numpy 2 the old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SETTINGS = SampleSettings(
    num_frames=5,
    fps=7.5,
    motion_bucket_id=300,
    noise_aug_strength=0.02,
    num_inference_steps=3,
    min_guidance_scale=1.0,
    max_guidance_scale=2.0,
    decode_chunk_size=5,
)
HEIGHT, WIDTH = 16, 24


@pytest.fixture
def image() -> torch.Tensor:
    """A picture whose values are exactly those of 8 bits."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, HEIGHT, WIDTH))
    return torch.from_numpy(pixels).float() / 127.5 - 1


def make(model):
    return build_pipeline(model.unet, model.vae, model.image_encoder, SCHEDULER, FEATURE_EXTRACTOR)


def calls_of(module: torch.nn.Module) -> list[tuple[tuple, dict]]:
    calls = []
    module.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    return calls


def test_settings_from_config() -> None:
    config = Config(
        data=Data(num_frames=9, fps=6, motion_bucket=99),
        memory=Memory(vae_chunk=3),
        validation=Validation(inference_steps=11, guidance=(1.5, 2.5), noise_aug_strength=0.1),
        train=Train(precision="fp16"),
    )
    assert SampleSettings.from_config(config) == SampleSettings(9, 6, 99, 0.1, 11, 1.5, 2.5, 3, "fp16")


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("num_frames", 1, "num_frames: got 1, expected >= 2"),
        ("num_inference_steps", 0, "num_inference_steps: got 0, expected >= 1"),
        ("fps", 0.0009, "fps: got 0.0009, expected in [0.001, 240]"),
        ("motion_bucket_id", 2000, "motion_bucket_id: got 2000, expected in [0, 1023]"),
        ("max_guidance_scale", -1.0, "max_guidance_scale: got -1.0, expected >= 0 and finite"),
        ("noise_aug_strength", float("inf"), "noise_aug_strength: got inf, expected >= 0 and finite"),
        (
            "min_guidance_scale",
            2.5,
            "min_guidance_scale: got 2.5, expected at most max_guidance_scale = 2.0: "
            "guidance rises from the first frame to the last",
        ),
    ],
)
def test_settings_out_of_range(key: str, value: float, sentence: str) -> None:
    with pytest.raises(UsageError) as error:
        replace(SETTINGS, **{key: value})
    assert str(error.value) == sentence


def test_same_as_diffusers_pipeline(model, image) -> None:
    """The same frames as somebody gets who opens the export with diffusers and gives it the same picture and seed."""
    plain = StableVideoDiffusionPipeline(
        model.vae,
        model.image_encoder,
        model.unet,
        EulerDiscreteScheduler.from_config(SCHEDULER),
        CLIPImageProcessor.from_dict(FEATURE_EXTRACTOR),
    )
    plain.set_progress_bar_config(disable=True)
    picture = Image.fromarray(((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())
    expected = plain(
        picture,
        height=HEIGHT,
        width=WIDTH,
        num_frames=5,
        num_inference_steps=3,
        max_guidance_scale=2.0,
        fps=7.5,
        motion_bucket_id=300,
        generator=torch.Generator().manual_seed(4),
        output_type="np",
    ).frames[0]
    video = sample_video(make(model), image, SETTINGS, seed=4)
    assert video.shape == (5, HEIGHT, WIDTH, 3)
    assert video.dtype == np.uint8
    np.testing.assert_array_equal(video, (expected * 255).round().astype(np.uint8))
    assert video.std() > 5  # a grey video would equal anything


def test_a_seed_is_a_video(model, image) -> None:
    pipeline = make(model)
    first = sample_video(pipeline, image, SETTINGS, seed=1)
    torch.manual_seed(99)  # the global stream has no part in it
    np.testing.assert_array_equal(first, sample_video(pipeline, image, SETTINGS, seed=1))
    assert (first != sample_video(pipeline, image, SETTINGS, seed=2)).mean() > 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_time_ids_arrive_whole(model, image, dtype: torch.dtype) -> None:
    """fps - 1 with its fraction; motion bucket 301 would be 302 in bf16."""
    model.image_encoder.to(dtype)
    calls = calls_of(model.unet)
    sample_video(make(model), image, replace(SETTINGS, motion_bucket_id=301), seed=0)
    ids = calls[0][1]["added_time_ids"]
    assert ids.shape == (2, 3)  # both halves of guidance
    torch.testing.assert_close(ids[1], torch.tensor([6.5, 301.0, 0.02]), rtol=0, atol=0)
    assert len(calls) == 3
    assert all(args[0].dtype == torch.float32 for args, _ in calls)


def test_decodes_in_chunks_in_float32(model, image) -> None:
    model.vae.to(torch.float16)
    chunks = []
    decode = model.vae.decode

    def watched(latents, **kwargs):
        chunks.append(
            (len(latents), kwargs["num_frames"], latents.dtype, model.vae.dtype, torch.is_autocast_enabled("cpu"))
        )
        return decode(latents, **kwargs)

    model.vae.decode = watched
    with torch.autocast("cpu", torch.bfloat16):
        sample_video(make(model), image, replace(SETTINGS, decode_chunk_size=2), seed=0)
    assert chunks == [(n, n, torch.float32, torch.float32, False) for n in (2, 2, 1)]
    assert model.vae.dtype == torch.float16


@pytest.mark.parametrize("method", ["lora", "temporal_attention"])
def test_mixed_dtypes(model, image, method: str) -> None:
    """Frozen bf16 beside trained float32, as in training; the video stays that of float32 within bf16's rounding."""
    expected = sample_video(make(model), image, SETTINGS, seed=0)
    trained = adapt(model.unet, Adapt(method=method, rank=2), dtype=torch.bfloat16, seed=0)
    assert {p.dtype for p in model.unet.parameters()} == {torch.float32, torch.bfloat16}
    video = sample_video(make(model), image, replace(SETTINGS, precision="bf16"), seed=0)
    difference = np.abs(video.astype(float) - expected)
    assert 0 < difference.mean() < 3
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.3)
    moved = sample_video(make(model), image, replace(SETTINGS, precision="bf16"), seed=0)
    assert np.abs(moved.astype(float) - expected).mean() > 2 * difference.mean()


def test_everything_is_as_before(model, image) -> None:
    """Modes per module, gradients, dtypes, an earlier forward (accelerate makes one): also after an error."""
    model.unet.train()
    model.unet.conv_in.eval()
    model.unet.requires_grad_(True)
    plain = model.unet.forward
    model.unet.forward = lambda *args, **kwargs: plain(*args, **kwargs)
    earlier = model.unet.forward
    modes = [module.training for module in model.unet.modules()]
    scheduler = EulerDiscreteScheduler.from_config(SCHEDULER)
    sigmas = scheduler.sigmas.clone()
    pipeline = build_pipeline(model.unet, model.vae, model.image_encoder, scheduler.config, FEATURE_EXTRACTOR)

    seen = []
    hook = model.unet.conv_in.register_forward_hook(
        lambda *_: seen.append((model.unet.training, torch.is_grad_enabled()))
    )
    sample_video(pipeline, image, SETTINGS, seed=0)
    hook.remove()
    assert set(seen) == {(False, False)}
    model.vae.decode = lambda *_, **__: 1 / 0
    with pytest.raises(ZeroDivisionError):
        sample_video(pipeline, image, SETTINGS, seed=0)

    assert [module.training for module in model.unet.modules()] == modes
    assert model.unet.forward is earlier
    assert "forward" not in vars(model.image_encoder)
    assert all(p.requires_grad and p.grad is None for p in model.unet.parameters())
    assert torch.is_grad_enabled()
    assert pipeline.scheduler is not scheduler
    assert torch.equal(scheduler.sigmas, sigmas)


def test_not_finite(model, image) -> None:
    with torch.no_grad():
        model.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(ModelError) as error:
        sample_video(make(model), image, SETTINGS, seed=0)
    assert str(error.value) == (
        "sampling with precision no: 100% of the pixels are not finite. The weights are damaged or overflow; "
        "try train.precision=bf16, or an earlier checkpoint."
    )
