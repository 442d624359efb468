"""Resize modes against known values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from svdtune.data.transform import to_pixels


def bars(height: int = 8, width: int = 16) -> np.ndarray:
    """Left half black, right half white; (2, h, w, 3)."""
    frames = np.zeros((2, height, width, 3), np.uint8)
    frames[:, :, width // 2 :] = 255
    return frames


def test_same_size_only_rescales_values() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 6, 10, 3), dtype=np.uint8)
    pixels = to_pixels(frames, height=6, width=10, resize="cover")
    assert pixels.shape == (3, 3, 6, 10)
    assert pixels.dtype == torch.float32
    assert pixels.is_contiguous()
    expected = torch.from_numpy(frames).permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(pixels, expected, atol=1e-6, rtol=0)
    assert (pixels.min(), pixels.max()) == (-1, 1)


def test_cover_crops_the_centre() -> None:
    frames = np.zeros((1, 8, 16, 3), np.uint8)
    frames[:, :, 4:12] = 255  # the centre square
    assert to_pixels(frames, height=8, width=8, resize="cover").min() == 1


def test_pad_adds_black_borders() -> None:
    pixels = to_pixels(np.full((1, 8, 16, 3), 255, np.uint8), height=16, width=16, resize="pad")
    assert (pixels[:, :, :4] == -1).all()
    assert (pixels[:, :, 4:12] == 1).all()
    assert (pixels[:, :, 12:] == -1).all()


def test_squash_keeps_everything() -> None:
    pixels = to_pixels(bars(), height=8, width=8, resize="squash")
    assert (pixels[..., 0] == -1).all()
    assert (pixels[..., -1] == 1).all()


def test_overshoot_of_bicubic_is_clamped() -> None:
    pixels = to_pixels(bars(), height=16, width=32, resize="cover")
    assert (pixels.min(), pixels.max()) == (-1, 1)


def test_shrinking_is_antialiased() -> None:
    stripes = np.zeros((1, 24, 24, 3), np.uint8)
    stripes[:, :, ::2] = 255
    pixels = to_pixels(stripes, height=8, width=8, resize="cover")
    assert pixels[..., 1:-1].abs().max() < 0.2  # grey; every third pixel, taken alone, is black or white


def test_flip_mirrors_left_to_right() -> None:
    plain, flipped = (to_pixels(bars(), height=8, width=16, resize="cover", flip=flip) for flip in (False, True))
    torch.testing.assert_close(flipped, torch.from_numpy(plain.numpy()[..., ::-1].copy()))
    assert flipped.is_contiguous()
    assert not torch.equal(plain, flipped)


def test_rgb_order_is_kept() -> None:
    red = np.zeros((1, 8, 8, 3), np.uint8)
    red[..., 0] = 255
    assert to_pixels(red, height=16, width=16, resize="cover")[0, :, 5, 5].tolist() == [1, -1, -1]


@pytest.mark.parametrize("size", [(47, 63), (1, 999), (999, 1), (17, 5)])
@pytest.mark.parametrize("resize", ["cover", "pad", "squash"])
def test_any_source_size_gives_the_wanted_one(size: tuple[int, int], resize: str) -> None:
    pixels = to_pixels(np.zeros((1, *size, 3), np.uint8), height=16, width=24, resize=resize)
    assert pixels.shape == (1, 3, 16, 24)


def test_anamorphic_pixels_are_widened() -> None:
    pixels = to_pixels(np.full((1, 16, 16, 3), 255, np.uint8), height=16, width=32, resize="pad", pixel_aspect=2.0)
    assert pixels.min() > 0.999
