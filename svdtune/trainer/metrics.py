"""What one optimizer step reports, gathered over ranks in one reduction and one host synchronisation."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

# Edges of the loss-per-sigma bands: about the quartiles of SVD-XT's sigma distribution, fixed so that runs compare.
BAND_EDGES = (0.0, 1.0, 3.0, 8.0, float("inf"))
BANDS = tuple(f"{low:g}-{high:g}" for low, high in pairwise(BAND_EDGES))


@dataclass(frozen=True)
class StepReport:
    """Over all ranks: mean loss, gradient norm, mean loss by sigma band (bands without a clip left out)."""

    loss: float
    grad_norm: float
    loss_by_sigma: dict[str, float]


def reduce_step(
    accelerator: Accelerator, losses: Tensor, sigmas: Tensor, grad_norm: Tensor
) -> tuple[float, StepReport]:
    """losses and sigmas (clips,) of this rank's clips, grad_norm (). The only place of a step that waits for the device.

    Returns this rank's own gradient norm and the report.

    A NaN or infinity on any rank makes the sum over ranks non-finite, so every rank sees it.
    """
    band = torch.stack([(low <= sigmas) & (sigmas < high) for low, high in pairwise(BAND_EDGES)], dim=1)
    # NaN must stay out of the other bands: 0 * NaN is NaN.
    in_band = torch.where(band, losses[:, None], 0).sum(0)
    means = torch.stack([losses.mean(), grad_norm.float()])
    summed: Any = accelerator.reduce(torch.cat([means, in_band, band.sum(0).float()]), reduction="sum")
    own, *values = torch.cat([grad_norm.float()[None], summed]).tolist()
    n, world = len(BANDS), accelerator.num_processes
    sums, counts = values[2 : 2 + n], values[2 + n :]
    report = StepReport(
        loss=values[0] / world,
        grad_norm=values[1] / world,
        loss_by_sigma={name: s / c for name, s, c in zip(BANDS, sums, counts, strict=True) if c},
    )
    return own, report
