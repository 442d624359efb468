"""The embedded base is a real, if tiny, SVD: it reconstructs, listens to its conditions, and moves shapes right."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLTemporalDecoder, StableVideoDiffusionPipeline, UNetSpatioTemporalConditionModel
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import svdtune.model
from svdtune.data.demo import (
    DEMO_MOTION_BUCKET,
    DIRECTIONS,
    MOTIONS,
    Motion,
    measure_displacement,
    render_clip,
    speed_of_bucket,
    write_demo,
)

TINY = Path(svdtune.model.__file__).parent / "tiny"
SPEED = speed_of_bucket(DEMO_MOTION_BUCKET)


def read_video(path: Path, *, height: int, width: int) -> np.ndarray:
    """All frames, uint8 RGB (t, height, width, 3)."""
    with av.open(str(path)) as container:
        return np.stack(
            [
                np.asarray(frame.to_image().resize((width, height), Image.Resampling.BICUBIC))
                for frame in container.decode(video=0)
            ]
        )


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_demo(tmp_path_factory.mktemp("demo"), clips=8, motion="down", seed=3)


@pytest.fixture(scope="module")
def unet() -> UNetSpatioTemporalConditionModel:
    return UNetSpatioTemporalConditionModel.from_pretrained(TINY / "unet", variant="fp16", torch_dtype=torch.float32)


# ---------------------------------------------------------------------------------------------- demo clips


@pytest.mark.parametrize("motion", MOTIONS)
@pytest.mark.parametrize("seed", range(5))
def test_a_rendered_shape_moves_as_told_and_the_measure_sees_it(motion: Motion, seed: int) -> None:
    frames = render_clip(np.random.default_rng(seed), motion=motion, num_frames=8, fps=8, speed=SPEED)
    assert frames.shape == (8, 64, 96, 3)
    assert frames.dtype == np.uint8
    distance = 7 / 8 * SPEED
    expected = [component * distance for component in DIRECTIONS[motion]]
    assert measure_displacement(frames) == pytest.approx(expected, abs=0.5)


def test_a_shape_that_would_leave_the_frame_is_refused() -> None:
    with pytest.raises(ValueError, match=r"moving down by 100\.0 leaves a frame of 64 .*: fewer frames, a lower speed"):
        render_clip(np.random.default_rng(0), motion="down", num_frames=2, fps=1, speed=100)


def test_shapes_are_warm_and_backgrounds_cool() -> None:
    for seed in range(20):
        frame = render_clip(np.random.default_rng(seed), motion="right", num_frames=1, fps=8, speed=0)[0].astype(int)
        redder = frame[..., 0] - frame[..., 2]
        assert redder.max() > 80
        assert np.median(redder) < 15


def test_demo_files_are_h264_that_plays_everywhere(demo: list[Path]) -> None:
    assert [path.name for path in demo] == [f"demo-{i:04d}.mp4" for i in range(8)]
    for path in demo:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert stream.codec_context.name == "h264"
            assert stream.codec_context.pix_fmt == "yuv420p"
            assert (stream.height, stream.width) == (128, 192)
            assert stream.average_rate == Fraction(24)
            assert stream.frames == 30
        head = path.read_bytes()
        assert head.index(b"moov") < head.index(b"mdat"), "the index comes first, so that playback can start at once"


def test_demo_files_are_deterministic_and_safe_to_write_twice(demo: list[Path], tmp_path: Path) -> None:
    again = write_demo(tmp_path, clips=4, motion="down", seed=3)
    first = [path.read_bytes() for path in again]
    assert first == [path.read_bytes() for path in demo[:4]]
    assert [path.read_bytes() for path in write_demo(tmp_path, clips=4, motion="down", seed=3)] == first
    assert sorted(tmp_path.iterdir()) == again, "nothing temporary stays behind"
    assert write_demo(tmp_path, clips=1, motion="down", seed=4)[0].read_bytes() != first[0]


def test_shapes_in_demo_files_move_down(demo: list[Path]) -> None:
    for path in demo:
        dx, dy = measure_displacement(read_video(path, height=64, width=96))
        assert dx == pytest.approx(0, abs=0.7)
        assert dy == pytest.approx(29 / 24 * SPEED, abs=0.7)


# ---------------------------------------------------------------------------------------------- the folder


def test_the_folder_is_small_and_named_like_the_hub() -> None:
    files = [path for path in TINY.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12_000_000
    weights = {str(path.relative_to(TINY)) for path in files if path.suffix == ".safetensors"}
    assert weights == {
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "image_encoder/model.fp16.safetensors",
    }
    for name in weights:
        tensors = load_file(TINY / name)
        assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {torch.float16}
        assert all(bool(t.isfinite().all()) for t in tensors.values())


def test_every_level_of_the_unet_has_64_channels(unet: UNetSpatioTemporalConditionModel) -> None:
    assert min(unet.config["block_out_channels"]) >= 64


@torch.inference_mode()
def test_the_vae_reconstructs_demo_frames(demo: list[Path]) -> None:
    vae = AutoencoderKLTemporalDecoder.from_pretrained(TINY / "vae", variant="fp16", torch_dtype=torch.float32)
    for path in demo[:4]:
        frames = read_video(path, height=64, width=96)[::4]
        pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
        posterior = vae.encode(pixels).latent_dist
        decoded = vae.decode(posterior.sample(), num_frames=len(pixels)).sample.clamp(-1, 1)
        psnr = -10 * ((decoded - pixels) / 2).square().mean().log10()
        assert psnr >= 25, path.name
        scaled = posterior.mean * vae.config["scaling_factor"]
        assert 0.5 < scaled.std() < 2
        assert posterior.std.mean() * vae.config["scaling_factor"] < 0.2


# ---------------------------------------------------------------------------------------------- the UNet


def relative_change(changed: Tensor, reference: Tensor) -> float:
    return float((changed - reference).norm() / reference.norm())


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda t, ids: (t + 0.1, ids), id="timestep-shifted"),
        pytest.param(lambda t, ids: (t, ids[:, [1, 0, 2]]), id="ids-swapped"),
        pytest.param(lambda t, ids: (t, ids * torch.tensor([0.5, 1, 1])), id="fps-halved"),
    ],
)
@torch.inference_mode()
def test_the_unet_listens(
    unet: UNetSpatioTemporalConditionModel, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> None:
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 8, 8, 8, 12, generator=generator)
    token = torch.randn(2, 1, unet.config["cross_attention_dim"], generator=generator)
    timestep = torch.tensor([2.0, 0.5]).log() / 4
    ids = torch.tensor([[7.0, DEMO_MOTION_BUCKET, 0.02]]).repeat(2, 1)
    changed_timestep, changed_ids = change(timestep, ids)
    reference = unet(sample, timestep, token, ids).sample
    changed = unet(sample, changed_timestep, token, changed_ids).sample
    assert relative_change(changed, reference) > 0.01


@torch.inference_mode()
def test_the_base_moves_shapes_right() -> None:
    pipeline = StableVideoDiffusionPipeline.from_pretrained(TINY, variant="fp16", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    first = render_clip(np.random.default_rng(11), motion="right", num_frames=8, fps=8, speed=SPEED)[0]
    frames = pipeline(
        Image.fromarray(first),
        height=64,
        width=96,
        num_frames=8,
        fps=8,
        motion_bucket_id=DEMO_MOTION_BUCKET,
        num_inference_steps=15,
        min_guidance_scale=1.0,
        max_guidance_scale=1.5,
        decode_chunk_size=8,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).frames[0]
    dx, dy = measure_displacement((frames * 255).round().astype(np.uint8))
    assert dx == pytest.approx(7 / 8 * SPEED, abs=8)
    assert abs(dy) < 5
