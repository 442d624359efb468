"""What the UNet is told in training is what diffusers' pipeline tells it for the same picture."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableVideoDiffusionPipeline
from PIL import Image
from transformers import CLIPImageProcessor

from svdtune.config.schema import Conditioning, Model, Objective
from svdtune.contracts import Encoded, VideoBatch
from svdtune.diffusion import conditioning
from svdtune.diffusion.draws import make_draws
from svdtune.model.load import load_model
from svdtune.trainer.build import clip_pixels

pytestmark = pytest.mark.filterwarnings("ignore:.*CLIPImageProcessor.*")
T, H, W = 3, 40, 56


@pytest.fixture(scope="module")
def model(svd_folder):
    return load_model(Model(pretrained=str(svd_folder), variant=None))


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(3)
    smooth = torch.nn.functional.interpolate(
        torch.rand(2 * T, 3, 6, 7, generator=g), size=(H, W), mode="bicubic"
    ).clamp(0, 1)
    pixels = ((smooth * 255).round() / 127.5 - 1).reshape(2, T, 3, H, W)
    return VideoBatch(pixels, torch.tensor([7.0, 12.0]), torch.tensor([127.0, 40.0]), torch.tensor([11, 12]))


@pytest.fixture
def draws(model, batch):
    return make_draws(
        [11, 12], batch.axes(model.facts), seed=0, objective=Objective(), conditioning=Conditioning(dropout=0)
    )


def what_the_pipeline_gives(model, batch, noise, guidance):
    """The arguments of the UNet's first call, for the first clip's first frame."""
    pipeline = StableVideoDiffusionPipeline(
        unet=model.unet, vae=model.vae, image_encoder=model.image_encoder,
        scheduler=EulerDiscreteScheduler.from_config(dict(model.configs.scheduler)),
        feature_extractor=CLIPImageProcessor.from_dict(dict(model.configs.feature_extractor)),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    calls = []
    hook = model.unet.register_forward_pre_hook(lambda _m, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    picture = ((batch.pixels[0, 0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    pipeline(
        Image.fromarray(picture), height=H, width=W, num_frames=T, fps=7, motion_bucket_id=127, noise_aug_strength=0,
        num_inference_steps=2, max_guidance_scale=guidance, latents=noise[:1].clone(), output_type="latent",
    )  # fmt: skip
    hook.remove()
    (sample, timestep), kwargs = calls[0]
    return sample, timestep, kwargs["encoder_hidden_states"], kwargs["added_time_ids"]


def encode(model, batch, draws):
    first = batch.pixels[:, 0]
    with torch.no_grad():
        latents = conditioning.target_latents(
            model.vae, batch, draws, scaling_factor=model.facts.scaling_factor, chunk=4
        )
        image_latents = conditioning.image_latents(model.vae, first, draws, chunk=4)
        return Encoded(
            latents, image_latents, conditioning.image_embeds(model.image_encoder, first, clip_pixels(model))
        )


def test_unet_input_equals_the_pipelines_ids_included(model, batch, draws):
    sigma = torch.full((2,), 700.0)
    draws = replace(draws, sigma=sigma, noise_aug_strength=torch.zeros(2))
    encoded = encode(model, batch, draws)
    ours = conditioning.unet_input(replace(encoded, latents=torch.zeros_like(encoded.latents)), batch, draws)
    sample, timestep, token, ids = what_the_pipeline_gives(model, batch, draws.noise, guidance=1.0)
    torch.testing.assert_close(ours.sample[:1], sample, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.timestep[0], timestep, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.encoder_hidden_states[:1], token, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.added_time_ids[:1], ids, rtol=0, atol=0)


def test_dropping_both_is_the_pipelines_null_branch(model, batch, draws):
    zero = torch.zeros(2)
    draws = replace(draws, keep_image_embeds=zero, keep_image_latents=zero, noise_aug_strength=zero)
    ours = conditioning.unet_input(encode(model, batch, draws), batch, draws)
    sample, _, token, ids = what_the_pipeline_gives(model, batch, draws.noise, guidance=3.0)
    null = sample[:1]  # the pipeline puts the unconditional half first
    z = model.facts.z
    assert torch.equal(ours.sample[:1, :, z:], null[:, :, z:])
    assert torch.equal(ours.encoder_hidden_states[:1], token[:1])
    assert torch.equal(ours.added_time_ids[:1], ids[:1])
    assert bool((sample[1:, :, z:] != 0).any())


def test_clip_sees_the_clean_frame_and_the_latent_the_noisy_one(model, batch, draws):
    louder = replace(draws, noise_aug_strength=torch.full((2,), 0.5))
    quiet, loud = encode(model, batch, draws), encode(model, batch, louder)
    assert torch.equal(quiet.image_embeds, loud.image_embeds)
    assert torch.equal(quiet.latents, loud.latents)
    assert float((quiet.image_latents - loud.image_latents).abs().mean()) > 1e-3


def test_target_is_scaled_and_condition_is_not(model, batch, draws):
    """Without posterior and pixel noise the first target frame is exactly scaling_factor times the conditioning latent."""
    still = replace(draws, posterior_noise=torch.zeros_like(draws.posterior_noise), noise_aug_strength=torch.zeros(2))
    encoded = encode(model, batch, still)
    torch.testing.assert_close(encoded.latents[:, 0], encoded.image_latents * 0.2, rtol=1e-5, atol=1e-5)
    sampled = encode(model, batch, draws)
    assert not torch.allclose(sampled.latents[:, 0], encoded.latents[:, 0], atol=1e-3)


def test_third_id_is_the_noise_augmentation_of_its_own_clip(model, batch, draws):
    ids = conditioning.added_time_ids(batch, draws)
    np.testing.assert_allclose(ids[:, 0], [6, 11])
    np.testing.assert_allclose(ids[:, 1], [127, 40])
    assert torch.equal(ids[:, 2], draws.noise_aug_strength)
    assert draws.noise_aug_strength[0] != draws.noise_aug_strength[1]


def test_dropout_is_per_clip(model, batch, draws):
    mixed = replace(draws, keep_image_embeds=torch.tensor([0.0, 1]), keep_image_latents=torch.tensor([1.0, 0]))
    ours = conditioning.unet_input(encode(model, batch, mixed), batch, mixed)
    z = model.facts.z
    assert not ours.encoder_hidden_states[0].any()
    assert ours.encoder_hidden_states[1].any()
    assert ours.sample[0, :, z:].any()
    assert not ours.sample[1, :, z:].any()


def test_vae_chunks_and_autocast_change_nothing(model, batch, draws):
    pixels = batch.pixels.flatten(0, 1)
    with torch.no_grad():
        whole, _ = conditioning.posterior(model.vae, pixels, chunk=len(pixels))
        chunked, _ = conditioning.posterior(model.vae, pixels, chunk=4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside, _ = conditioning.posterior(model.vae, pixels, chunk=4)
    torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-5)
    assert torch.equal(inside, chunked)
    assert inside.dtype == torch.float32


@pytest.mark.parametrize(("height", "width"), [(576, 1024), (64, 96), (224, 224), (100, 700)])
def test_resize_is_the_pipelines_to_the_bit(height, width):
    from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import _resize_with_antialiasing

    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(
        conditioning.resize_with_antialiasing(images, 224), _resize_with_antialiasing(images, (224, 224))
    )
