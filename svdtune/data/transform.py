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

    Antialiased bicubic; its overshoot is clamped. `pixel_aspect` is width over height of a stored pixel.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
    size = _scaled(pixels.shape[2], pixels.shape[3], height, width, resize, pixel_aspect)
    if size != tuple(pixels.shape[2:]):
        pixels = F.interpolate(pixels.contiguous(), size=size, mode="bicubic", align_corners=False, antialias=True)
    pixels = _fit(pixels, height, width).clamp(-1.0, 1.0)
    return (pixels.flip(-1) if flip else pixels).contiguous()


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
