"""Pictures of a file to pixels of a clip."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Resize = Literal["cover", "pad", "squash"]


def to_pixels(
    frames: np.ndarray, *, height: int, width: int, resize: Resize, flip: bool = False, pixel_aspect: float = 1.0
) -> Tensor:
    """uint8 RGB (t, h, w, 3) to float32 (t, 3, height, width) in [-1, 1], contiguous.

    Antialiased bicubic; its overshoot is clamped. `pixel_aspect` is width over height of a stored pixel. Frame by frame: 25
    frames of a 4K file are 2.5 GB in float32.
    """
    size = _scaled(frames.shape[1], frames.shape[2], height, width, resize, pixel_aspect)
    pixels = torch.empty(len(frames), 3, height, width)
    for frame, made in zip(frames, pixels, strict=True):
        whole = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None].float().div_(127.5).sub_(1.0)
        if size != tuple(whole.shape[2:]):  # with channels last in memory: the same numbers, sooner
            whole = F.interpolate(whole, size=size, mode="bicubic", align_corners=False, antialias=True)
        fitted = _fit(whole, height, width)[0]
        torch.clamp(fitted.flip(-1) if flip else fitted, -1.0, 1.0, out=made)
    return pixels


def _scaled(h: int, w: int, height: int, width: int, resize: Resize, pixel_aspect: float) -> tuple[int, int]:
    """Size after scaling, before cropping or padding."""
    if resize == "squash":
        return height, width
    scale_y, scale_x = height / h, width / (w * pixel_aspect)
    scale = max(scale_y, scale_x) if resize == "cover" else min(scale_y, scale_x)
    bound = max if resize == "cover" else min
    scaled_h = max(1, bound(height, round(h * scale)))
    scaled_w = max(1, bound(width, round(w * pixel_aspect * scale)))
    return scaled_h, scaled_w


def _fit(pixels: Tensor, height: int, width: int) -> Tensor:
    """Crop the centre, or add black borders, to (height, width)."""
    top, left = (height - pixels.shape[2]) // 2, (width - pixels.shape[3]) // 2
    bottom, right = height - pixels.shape[2] - top, width - pixels.shape[3] - left
    if top == left == bottom == right == 0:
        return pixels
    return F.pad(pixels, (left, right, top, bottom), value=-1.0)
