"""Flow of textures of known speed; light, noise and compression do not move."""

from __future__ import annotations

import io
import time

import numpy as np
import pytest
import torch
from PIL import Image

from svdtune.data.demo import draw_scene, render_frame
from svdtune.guards.live import motion
from svdtune.guards.live.motion import first_frame_similarity, flow_magnitude, look_at

ANGLES = (0.3, 1.6, 4.0)


def texture(speed, *, angle=0.3, frames=6, height=72, width=128, seed=0):
    """Grey levels (t, h, w): a texture of all scales that moves `speed` pixels per frame, exactly (by Fourier's shift)."""
    pad = int(speed * frames) + 8
    size = (height + 2 * pad, width + 2 * pad)
    y, x = np.fft.fftfreq(size[0])[:, None], np.fft.fftfreq(size[1])[None]
    scale = width / 128
    radius = np.hypot(x, y) * scale
    waves = (
        np.fft.fft2(np.random.default_rng(seed).standard_normal(size))
        / (radius + 0.02)
        * np.exp(-((radius / 0.15) ** 2))
    )
    waves[0, 0] = 0
    step = speed * (x * np.cos(angle) + y * np.sin(angle))
    moved = [np.fft.ifft2(waves * np.exp(-2j * np.pi * step * i)).real for i in range(frames)]
    values = np.stack(moved)[:, pad : pad + height, pad : pad + width]
    return 128 + 40 * values / values.std()


def video(grey):
    return np.repeat(np.clip(np.round(grey), 0, 255).astype(np.uint8)[..., None], 3, axis=-1)


def percent(frames):
    return 100 * flow_magnitude(frames)


@pytest.mark.parametrize("angle", ANGLES)
@pytest.mark.parametrize("speed", [0.5, 1, 3, 6])
def test_textures_move_as_fast_as_they_do(speed, angle):
    assert flow_magnitude(video(texture(speed, angle=angle))) == pytest.approx(speed / 128, rel=0.1)


@pytest.mark.parametrize(("height", "width"), [(64, 96), (320, 576), (576, 320)])
@pytest.mark.parametrize("share", [0.005, 0.03])
def test_the_size_does_not_matter(height, width, share):
    frames = video(texture(share * width, height=height, width=width, frames=4))
    assert flow_magnitude(frames) == pytest.approx(share, rel=0.1)


def test_what_stands_still_has_no_flow():
    still = video(texture(0))
    assert (flow_magnitude(still), flow_magnitude(still[:1]), flow_magnitude(still * 0)) == (0, 0, 0)


@pytest.mark.parametrize(
    "light",
    [
        lambda x, i: 0.6 * x + 40 + 6 * i,
        lambda x, i: 0.6 * x * (1 + 0.06 * i),
        lambda x, i: x * (1 - i / 8),
        lambda x, i: 0.6 * x + 50 + 30 * np.sin(np.linspace(-2, 2, 128) + i / 2),
    ],
    ids=["brighter", "more contrast", "fade", "a light that passes"],
)
def test_light_is_no_motion(light):
    assert percent(video(light(texture(0), np.arange(6)[:, None, None]))) < 0.05


@pytest.mark.parametrize("sigma", [1, 3, 6, 12])
def test_noise_is_no_motion(sigma):
    still = texture(0)
    noise = np.random.default_rng(0).normal(0, sigma, still.shape)
    assert percent(video(still + noise)) < 0.03
    assert percent(video(128 + noise)) < 0.2


def test_compression_is_no_motion():
    still = video(texture(0, height=288, width=512)[:1])[0]
    frames = []
    for quality in (20, 35, 50, 65, 30):
        file = io.BytesIO()
        Image.fromarray(still).save(file, "JPEG", quality=quality)
        frames.append(np.asarray(Image.open(file)))
    assert percent(np.stack(frames)) < 0.03


def test_noise_does_not_hide_motion():
    moving = texture(3)
    noise = np.random.default_rng(0).normal(0, 4, moving.shape)
    assert flow_magnitude(video(moving + noise)) == pytest.approx(3 / 128, rel=0.1)


def test_a_shape_on_a_plain_ground_moves():
    """Mean over the picture: what moves is small, and twice as fast is about twice as much."""
    flows = []
    for pixels in (0, 1, 2):
        scene = draw_scene(np.random.default_rng(3), motion="right", distance=16)
        x, y = scene.start
        flows.append(
            percent(np.stack([render_frame(scene, (x + pixels * i, y), height=64, width=96) for i in range(8)]))
        )
    assert flows[0] == 0
    assert 0.1 < flows[1] < 1
    assert flows[2] == pytest.approx(2 * flows[1], rel=0.1)


def test_colours_of_one_brightness_move():
    grey = texture(2)
    frames = np.clip(np.round(np.stack([grey, 0 * grey + 100, 256 - grey], axis=-1)), 0, 255).astype(np.uint8)
    assert flow_magnitude(frames) == pytest.approx(2 / 128, rel=0.1)


def test_first_frame_similarity_falls_with_what_changes():
    still, drift = texture(0, frames=8), texture(6, frames=8)
    noise = np.random.default_rng(0).normal(0, 6, still.shape)
    assert first_frame_similarity(video(still)) == pytest.approx(1, abs=1e-4)
    assert first_frame_similarity(video(still + noise)) > 0.95
    assert first_frame_similarity(video(0.5 * still * (1 + np.arange(8) / 16)[:, None, None])) > 0.99
    assert first_frame_similarity(video(drift)) < 0.6
    other = video(np.concatenate([still[:1], texture(0, seed=1)[:1]]))
    assert abs(first_frame_similarity(other)) < 0.3


def test_only_the_last_frame_is_compared_and_colours_count():
    frames = video(texture(0))
    there_and_back = frames.copy()
    there_and_back[3] = 0
    assert first_frame_similarity(there_and_back) == pytest.approx(1, abs=1e-4)
    red, blue = np.zeros((64, 96, 3), np.uint8), np.zeros((64, 96, 3), np.uint8)
    red[..., 0], blue[..., 2] = 255, 255
    assert first_frame_similarity(np.stack([red, red])) > 0.99
    assert first_frame_similarity(np.stack([red, blue])) < 0


def test_the_look_of_pictures_flat_colours_and_noise():
    moving = look_at(video(texture(2)))
    assert moving.flow == pytest.approx(2 / 128, rel=0.1)
    assert moving.contrast == pytest.approx(40, rel=0.1)
    assert moving.coherence > 0.8
    assert moving.change > 5
    flat = look_at(np.full((6, 72, 128, 3), 7, np.uint8))
    assert (flat.contrast, flat.flow, flat.change) == (0, 0, 0)
    random = np.random.default_rng(0)
    grains = random.integers(0, 256, (6, 9, 16, 3), dtype=np.uint8).repeat(8, axis=1).repeat(8, axis=2)
    pixels = random.integers(0, 256, (1, 72, 128, 3), dtype=np.uint8).repeat(6, axis=0)
    assert look_at(grains).coherence < 0.3, "another picture in each frame, of blobs as latents give"
    assert look_at(pixels).coherence < 0.3, "a still, but no picture"


def test_videos_that_may_not_be_written_to_are_left_alone():
    frames = video(texture(1))
    before = frames.copy()
    frames.flags.writeable = False
    look_at(frames)
    np.testing.assert_array_equal(frames, before)


def test_a_full_size_video_costs_little():
    """Measured 0.25 s; CPU time of one thread, so that neighbours do not matter."""
    frames = np.random.default_rng(0).integers(0, 256, (25, 576, 1024, 3), dtype=np.uint8)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        flow_magnitude(frames[:2])
        began = time.thread_time()
        flow_magnitude(frames)
        assert time.thread_time() - began < 1.0
    finally:
        torch.set_num_threads(threads)
    assert motion.LONG_SIDE == 128
