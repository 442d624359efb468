"""Convention probe: does a trained base do better on the user's clips by our conventions, or by one broken on purpose?

Untouched base, real `encode` and `denoise`; a convention is broken in the records or around the network, never in the step.
Both sides of a pair see the same clip, noise and sigma. It informs and never blocks: on footage unlike what the base was
trained on, a broken convention can be a few percent better by accident.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

from svdtune.config.schema import Config, Objective
from svdtune.contracts import Draws, Encoded, VideoBatch, move
from svdtune.diffusion.draws import fixed_draws, generator
from svdtune.guards.findings import Finding
from svdtune.trainer.step import Parts, denoise, encode

_FEW = 8
"""From so many clips on the interval is over clips: pairs of one clip resemble each other."""

_LEGEND = (
    "Informative. change: how much more loss the untouched base has with the convention broken, geometric mean over pairs "
    "of one clip\nand one draw; its interval is over clips, over pairs where there are fewer than 8 clips."
)

Verdict = Literal["ours is better", "broken is better", "cannot tell"]


@dataclass(frozen=True)
class ProbeRow:
    """One convention: `difference` = geometric mean of broken / ours over all pairs, less 1; above 0 ours is better."""

    name: str
    ours: float
    """Mean loss over all pairs."""
    broken: float
    difference: float
    low: float
    """95 % confidence interval of `difference`: Student's t on the logarithms, over clips where there are 8 or more, else over pairs."""
    high: float
    pairs: int
    """Clips times draws."""
    verdict: Verdict


@dataclass(frozen=True)
class Case:
    """Clips encoded once, and the draws (same clips, other noise and sigma) they are denoised at."""

    parts: Parts
    batch: VideoBatch
    encoded: Encoded
    draws: tuple[Draws, ...]
    seed: int

    def losses(self) -> Tensor:
        """(draws, b) by the real step."""
        return torch.stack([denoise(self.parts, self.encoded, self.batch, draw).loss_per_clip for draw in self.draws])


@dataclass(frozen=True)
class Variant:
    """One convention broken, and what it means when that is better."""

    name: str
    losses: Callable[[Case], Tensor]
    """(draws, b) with the convention broken."""
    where: str
    means: str
    fix: str


@torch.no_grad()
def probe(parts: Parts, batches: Sequence[VideoBatch], config: Config, *, draws: int) -> list[ProbeRow]:
    """A row per convention: 9 * draws UNet forwards and 3 encodings for each batch.

    `batches` lie on the device of the networks; `parts.unet` is unwrapped, in eval mode and untouched (adapters at zero).
    Sigma is held at `draws` quantiles of the training distribution, and nothing is dropped: without its condition the base
    cannot tell.
    """
    ours, broken = [], []
    for case in _cases(parts, batches, config, draws):
        ours.append(case.losses().cpu())
        broken.append(torch.stack([variant.losses(case).cpu() for variant in VARIANTS]))
    left = torch.cat(ours, dim=1).double()
    right = torch.cat(broken, dim=2).double()
    return [_row(variant.name, left, losses) for variant, losses in zip(VARIANTS, right, strict=True)]


def as_findings(rows: Sequence[ProbeRow]) -> list[Finding]:
    """SEM590 for each convention whose broken form the base clearly likes better, the strongest first: others may follow from it."""
    told = {variant.name: variant for variant in VARIANTS}
    better = sorted((row for row in rows if row.verdict == "broken is better"), key=lambda row: row.difference)
    return [_finding(row, told[row.name]) for row in better]


def render_rows(rows: Sequence[ProbeRow]) -> str:
    """An aligned table, a line per convention, and how to read it."""
    head = ("broken on purpose", "loss", "broken", "change", "95 % interval", "pairs", "verdict")
    lines = [head, *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join([*("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines), "", _LEGEND])


def sigmas(objective: Objective, count: int) -> list[float]:
    """The middles of `count` equally likely parts of the training distribution, ascending."""
    normal = NormalDist(objective.p_mean, objective.p_std)
    return [math.exp(normal.inv_cdf((i + 0.5) / count)) for i in range(count)]


def _cases(parts: Parts, batches: Sequence[VideoBatch], config: Config, count: int) -> Iterator[Case]:
    levels = sigmas(config.objective, count)
    first_clips = accumulate((len(batch.fps) for batch in batches), initial=0)
    for batch, first in zip(batches, first_clips, strict=False):
        numbers = range(first, first + len(batch.fps))
        draws = tuple(
            move(
                fixed_draws([number * count + i for number in numbers], sigma, batch.axes(parts.facts),
                            seed=config.run.seed, conditioning=config.conditioning),
                batch.pixels.device,
            )
            for i, sigma in enumerate(levels)
        )  # fmt: skip
        yield Case(parts, batch, encode(parts, batch, draws[0]), draws, config.run.seed)


def _row(name: str, ours: Tensor, broken: Tensor) -> ProbeRow:
    """From losses (draws, clips) in pairs. Logarithms: losses differ tenfold between sigmas, and no sigma shall decide alone."""
    change = (broken / ours).log()
    units = change.mean(0) if change.shape[1] >= _FEW else change.flatten()
    middle = float(units.mean())
    half = _student(len(units) - 1) * float(units.std()) / math.sqrt(len(units)) if len(units) > 1 else math.inf
    low, high = middle - half, middle + half
    verdict: Verdict = "ours is better" if low > 0 else "broken is better" if high < 0 else "cannot tell"
    difference, low, high = map(math.expm1, (middle, low, high))
    return ProbeRow(
        name, float(ours.mean()), float(broken.mean()), difference, low, high, pairs=change.numel(), verdict=verdict
    )


def _student(degrees: int) -> float:
    """97.5 % quantile of Student's t: with T = sqrt(n) * tan(angle), the density of the angle is cos(angle)^(n - 1)."""
    angle = np.linspace(0, np.pi / 2, 100_001)
    share = np.cumsum(np.cos(angle) ** (degrees - 1))
    return math.sqrt(degrees) * math.tan(angle[np.searchsorted(share, 0.95 * share[-1])])


def _finding(row: ProbeRow, variant: Variant) -> Finding:
    got = (
        f"with {row.name} the untouched base has {_percent(-row.difference)} less loss "
        f"(95 % interval {_percent(-row.high)} to {_percent(-row.low)}, {row.pairs} pairs)"
    )
    why = f"Informative, no proof: {variant.means} Footage unlike what the base knows can do the same by a few percent."
    return Finding("SEM590", "warning", variant.where, got, "less loss by our conventions", why, variant.fix)


def _cells(row: ProbeRow) -> tuple[str, ...]:
    change, low, high = (f"{100 * x:+.{0 if abs(x) >= 1 else 1}f} %" for x in (row.difference, row.low, row.high))
    return row.name, f"{row.ours:.4f}", f"{row.broken:.4f}", change, f"{low} to {high}", str(row.pairs), row.verdict


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


# ---------------------------------------------------------------------------------------------- the conventions


def _ids_swapped(case: Case) -> Tensor:
    def unet(*args: Any, added_time_ids: Tensor, **kwargs: Any) -> Any:
        return case.parts.unet(*args, added_time_ids=added_time_ids[:, [1, 0, 2]], **kwargs)

    return replace(case, parts=replace(case.parts, unet=unet)).losses()


def _fps_times(factor: float) -> Callable[[Case], Tensor]:
    return lambda case: replace(case, batch=replace(case.batch, fps=case.batch.fps * factor)).losses()


def _condition_scaled(case: Case) -> Tensor:
    scaled = case.encoded.image_latents * case.parts.facts.scaling_factor
    return replace(case, encoded=replace(case.encoded, image_latents=scaled)).losses()


def _pixels_flipped(axis: int) -> Callable[[Case], Tensor]:
    def losses(case: Case) -> Tensor:
        batch = replace(case.batch, pixels=case.batch.pixels.flip(axis))
        return replace(case, batch=batch, encoded=encode(case.parts, batch, case.draws[0])).losses()

    return losses


def _frames_shuffled(case: Case) -> Tensor:
    """The first frame stays, and with it the condition; the others change places in one cycle, so that all of them move."""
    latents = case.encoded.latents
    cycle = 1 + torch.randperm(latents.shape[1] - 1, generator=generator(case.seed))
    order = torch.arange(latents.shape[1])
    order[cycle] = cycle.roll(1)
    return replace(case, encoded=replace(case.encoded, latents=latents[:, order.to(latents.device)])).losses()


def _sigma_per_frame(case: Case) -> Tensor:
    """The frames of all draws, each with its noise and sigma, put together anew: only the company of a frame changes.

    The UNet takes one timestep per clip and is told the mean of its frames' ln(sigma) / 4.
    """
    b, t = case.batch.pixels.shape[:2]
    g = generator(case.seed)
    source = torch.stack([torch.randperm(len(case.draws), generator=g) for _ in range(t)], dim=1)
    apart = Case(
        replace(case.parts, unet=_clips_of_frames(case.parts.unet, t)),
        _batch_of_frames(case.batch),
        _encoded_frames(case.encoded),
        tuple(_draws_of_frames(case.draws, frames) for frames in source.tolist()),
        case.seed,
    )
    losses = rearrange(apart.losses().cpu(), "draws (b t) -> draws b t", b=b)
    at_home = torch.empty_like(losses).scatter_(0, repeat(source, "draws t -> draws b t", b=b), losses)
    return at_home.mean(dim=2)


def _clips_of_frames(unet: Any, t: int) -> Callable[..., Any]:
    """A network that is given every frame as a clip of its own, (b*t, 1, ...), and asks `unet` about the clips they make."""

    def joined(
        sample: Tensor, timestep: Tensor, *, encoder_hidden_states: Tensor, added_time_ids: Tensor, return_dict: bool
    ) -> tuple[Tensor]:
        answer = unet(
            rearrange(sample, "(b t) 1 z h w -> b t z h w", t=t),
            reduce(timestep, "(b t) -> b", "mean", t=t),
            encoder_hidden_states=encoder_hidden_states[::t],
            added_time_ids=added_time_ids[::t],
            return_dict=return_dict,
        )[0]
        return (rearrange(answer, "b t z h w -> (b t) 1 z h w"),)

    return joined


def _batch_of_frames(batch: VideoBatch) -> VideoBatch:
    t = batch.pixels.shape[1]
    return replace(
        batch,
        pixels=_frames(batch.pixels),
        fps=_per_frame(batch.fps, t),
        motion_bucket=_per_frame(batch.motion_bucket, t),
        sample=_per_frame(batch.sample, t),
    )


def _encoded_frames(encoded: Encoded) -> Encoded:
    t = encoded.latents.shape[1]
    return Encoded(_frames(encoded.latents), _per_frame(encoded.image_latents, t), _per_frame(encoded.image_embeds, t))


def _draws_of_frames(draws: Sequence[Draws], source: Sequence[int]) -> Draws:
    """Frame i with noise and sigma of draws[source[i]]; what all frames of a clip share is the same in all draws."""
    t, first = len(source), draws[0]
    return replace(
        first,
        sigma=torch.stack([draws[i].sigma for i in source], dim=1).flatten(),
        noise=_frames(torch.stack([draws[i].noise[:, frame] for frame, i in enumerate(source)], dim=1)),
        noise_aug_strength=_per_frame(first.noise_aug_strength, t),
        keep_image_embeds=_per_frame(first.keep_image_embeds, t),
        keep_image_latents=_per_frame(first.keep_image_latents, t),
    )


def _frames(clips: Tensor) -> Tensor:
    return rearrange(clips, "b t ... -> (b t) 1 ...")


def _per_frame(values: Tensor, t: int) -> Tensor:
    return repeat(values, "b ... -> (b t) ...", t=t)


VARIANTS = (
    Variant("ids swapped", _ids_swapped, "UNetInput.added_time_ids",
            "a base of Stability's is told fps - 1 first and the motion bucket second, so this one was trained in another order, or fps "
            "and motion bucket of this footage are far from what it knows.",
            "Look at where the base comes from, and at data.fps and data.motion_bucket."),
    Variant("fps halved", _fps_times(0.5), "data.fps",
            "from one frame to the next more happens than the base expects at this frame rate, as in time-lapse, footage that was sped up "
            "or files whose frame rate is wrong.",
            "Watch a clip at the rate its file gives; lower data.fps only if it plays too fast, else raise data.motion_bucket."),
    Variant("fps doubled", _fps_times(2.0), "data.fps",
            "from one frame to the next less happens than the base expects at this frame rate, as in slow motion, footage that hardly "
            "moves or files whose frame rate is wrong.",
            "Watch a clip at the rate its file gives; raise data.fps only if it plays too slowly, else lower data.motion_bucket."),
    Variant("condition scaled", _condition_scaled, "UNetInput.sample",
            "the base seems to have been trained with conditioning latents multiplied by scaling_factor, which Stability's are not.",
            "Look at how the base was fine-tuned before; start from Stability's own weights."),
    Variant("BGR", _pixels_flipped(2), "data.root",
            "the footage may have blue and red swapped.",
            "Look at a frame; if skin is blue, write the files anew with their channels in order (OpenCV gives and takes BGR)."),
    Variant("frames reversed", _pixels_flipped(1), "data.root",
            "the footage may be played backwards.",
            "Watch a clip; if it runs backwards, write the files anew in order."),
    Variant("frames shuffled", _frames_shuffled, "data.root",
            "the frames of the footage may be out of order, as after sorting file names as text (1, 10, 2).",
            "Watch a clip; if it jumps, write the files anew in order."),
    Variant("sigma per frame", _sigma_per_frame, "Draws.sigma",
            "the base seems to have been trained with a noise level for each frame, as the public loss of sgm draws it; sampling has one.",
            "Look at how the base was fine-tuned before; start from Stability's own weights."),
)  # fmt: skip
"""In the order of the table."""
