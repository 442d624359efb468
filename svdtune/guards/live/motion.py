"""How much a video moves, and whether it is a picture at all. Videos are uint8 (t, h, w, 3); nothing is read or written.

Everything is measured on pictures of at most `LONG_SIDE` pixels: the same for a laptop's sample and for 576x1024.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

LONG_SIDE = 128
"""Pixels of the longer side that motion is measured on."""
_SHORTEST = 12
"""Pixels of the shorter side of the coarsest level: a window must fit."""
_ROUNDS = 3
_WINDOW = 15
"""Pixels of the window whose motion is taken to be one."""
_FAINT = 1.0
"""Grey levels per pixel: gradients below it are noise, and pull the flow to 0."""
_EXPLAINED = 0.5
"""Motion counts where it takes away this share of the squared difference of two frames; noise and light do not move."""
_THUMBNAIL = 16
"""Pixels of the longer side at which two frames are compared: small shifts do not matter."""


@dataclass(frozen=True)
class Look:
    """What is measured on one video."""

    flow: float
    """`flow_magnitude`: share of the width per frame."""
    similarity: float
    """`first_frame_similarity`: -1 to 1."""
    contrast: float
    """Standard deviation of a frame's pixels in grey levels (of 255), median over frames. One flat colour: 0."""
    coherence: float
    """Correlation of neighbouring frames or of neighbouring pixels, whichever is lower, -1 to 1. Noise: 0."""
    change: float
    """Largest mean difference of a frame from the first one, in grey levels (of 255). Copies: 0."""


def look_at(frames: np.ndarray) -> Look:
    """All measures of uint8 (t, h, w, 3)."""
    grey = _grey(frames)
    return Look(
        flow=_flow(grey),
        similarity=first_frame_similarity(frames),
        contrast=float(grey.std(dim=(1, 2), correction=0).median()),
        coherence=_coherence(grey),
        change=float((grey - grey[0]).abs().mean(dim=(1, 2)).max()),
    )


def flow_magnitude(frames: np.ndarray) -> float:
    """Mean length of the optical flow between following frames of uint8 (t, h, w, 3), as a share of the width per frame.

    0.01 is 10 pixels per frame at a width of 1024. Underestimated: more than 0.07 per frame, and motion fainter than the noise.
    """
    return _flow(_grey(frames))


def first_frame_similarity(frames: np.ndarray) -> float:
    """Correlation (-1 to 1) of the last with the first frame of uint8 (t, h, w, 3), over pixels and colours of thumbnails."""
    return _correlation(*(_small(frame.transpose(2, 0, 1)[None], _THUMBNAIL) for frame in (frames[0], frames[-1])))


def _grey(frames: np.ndarray) -> Tensor:
    """float32 (t, h', w') of at most `LONG_SIDE` pixels: along the colour axis on which the video varies most.

    In grey levels for a grey video. Brightness alone would not see a red disc that crosses a blue ground.
    """
    colours = _small(frames.transpose(0, 3, 1, 2), LONG_SIDE)
    axes = torch.linalg.eigh(torch.cov(colours.transpose(0, 1).flatten(1), correction=0)).eigenvectors
    return torch.einsum("tchw,c->thw", colours, axes[:, -1]) / 3**0.5


def _small(planes: np.ndarray, long_side: int) -> Tensor:
    """uint8 (n, c, h, w) as float32 (n, c, h', w') of at most `long_side` pixels, each the mean of those it covers."""
    height, width = planes.shape[-2:]
    # Four values a side are enough for a mean; reading all 64 of a block would take most of the time.
    stride = max(1, max(height, width) // (4 * long_side))
    values = torch.from_numpy(planes[..., ::stride, ::stride].astype(np.float32))
    scale = min(1.0, long_side / max(height, width))
    return F.interpolate(values, (max(2, round(height * scale)), max(2, round(width * scale))), mode="area")


def _correlation(one: Tensor, other: Tensor) -> float:
    """Pearson's, over all values; 1 where both are flat."""
    one, other = one - one.mean(), other - other.mean()
    # One grey level of noise in each, so that two flat pictures are alike.
    noise = float(one.numel())
    product, lengths = (
        (one * other).sum() + noise,
        ((one.square().sum() + noise) * (other.square().sum() + noise)).sqrt(),
    )
    return float(product / lengths)


def _coherence(grey: Tensor) -> float:
    """Of (t, h, w)."""
    if len(grey) < 2:
        return 1.0
    thumbnails = F.interpolate(grey[None], scale_factor=min(1.0, _THUMBNAIL / max(grey.shape[1:])), mode="area")[0]
    following = [_correlation(one, other) for one, other in pairwise(thumbnails)]
    beside = [_correlation(frame[:, 1:], frame[:, :-1]) for frame in grey]
    return min(float(np.median(following)), float(np.median(beside)))


@torch.no_grad()
def _flow(grey: Tensor) -> float:
    """Of (t, h, w): iterated Lucas-Kanade from coarse to fine (Bouguet 2000), for all pairs of frames at once."""
    if len(grey) < 2:
        return 0.0
    # Smoothed once, or the smoothing by interpolation in `_warped` would look like motion that explains noise.
    pyramid = [_mean(_without_light(grey)[:, None], 3)]
    while min(pyramid[-1].shape[2:]) >= 2 * _SHORTEST:
        pyramid.append(F.avg_pool2d(pyramid[-1], 2))
    flow = torch.zeros(len(grey) - 1, 2, *pyramid[-1].shape[2:])
    for level in reversed(pyramid):
        flow = _enlarged(flow, level)
        for _ in range(_ROUNDS):
            flow = _refined(level[:-1], level[1:], flow)
    first, second = pyramid[0][:-1], pyramid[0][1:]
    before, after = _mean((second - first).square()), _mean((_warped(second, flow) - first).square())
    length = flow.square().sum(1, keepdim=True).sqrt()
    return float(torch.where(after < (1 - _EXPLAINED) * before, length, 0).mean() / grey.shape[2])


def _without_light(grey: Tensor) -> Tensor:
    """(t, h, w) without slow changes over the picture, each frame with the contrast of all: light that changes is no motion."""
    wide = 2 * (min(grey.shape[1:]) // 8) + 1
    detail = grey - _mean(grey[:, None], wide)[:, 0]
    contrast = detail.std(dim=(1, 2), keepdim=True, correction=0)
    return detail * (contrast.median() + _FAINT) / (contrast + _FAINT)


def _enlarged(flow: Tensor, level: Tensor) -> Tensor:
    """Flow (n, 2, h, w) of a coarser level, in pixels of `level`."""
    height, width = level.shape[2:]
    factor = torch.tensor([width / flow.shape[3], height / flow.shape[2]])[:, None, None]
    return F.interpolate(flow, (height, width), mode="bilinear") * factor


def _refined(first: Tensor, second: Tensor, flow: Tensor) -> Tensor:
    """One Gauss-Newton step of the flow (n, 2, h, w; x and y in pixels) that carries first (n, 1, h, w) to second."""
    warped = _warped(second, flow)
    change, middle = warped - first, (warped + first) / 2
    y, x = torch.gradient(middle, dim=(2, 3))
    xx, xy, yy, xt, yt = _mean(torch.cat([x * x, x * y, y * y, x * change, y * change], dim=1)).split(1, dim=1)
    xx, yy = xx + _FAINT**2, yy + _FAINT**2
    step = torch.cat([xy * yt - yy * xt, xy * xt - xx * yt], dim=1) / (xx * yy - xy * xy)
    # Further than a pixel the picture is not linear: the next round goes on from there.
    return _mean(flow + step.clamp(-1, 1), 3)


def _warped(frames: Tensor, flow: Tensor) -> Tensor:
    """frames (n, 1, h, w) as seen where `flow` (n, 2, h, w) leads."""
    height, width = frames.shape[2:]
    x = (2 * (torch.arange(width) + flow[:, 0]) + 1) / width - 1
    y = (2 * (torch.arange(height)[:, None] + flow[:, 1]) + 1) / height - 1
    return F.grid_sample(frames, torch.stack([x, y], dim=-1), padding_mode="border", align_corners=False)


def _mean(values: Tensor, size: int = _WINDOW) -> Tensor:
    """Of the window around each pixel of (n, c, h, w)."""
    for kernel in ((1, size), (size, 1)):
        padding = (kernel[0] // 2, kernel[1] // 2)
        values = F.avg_pool2d(values, kernel, stride=1, padding=padding, count_include_pad=False)
    return values
