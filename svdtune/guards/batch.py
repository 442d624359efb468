"""One real batch: the user's first clips through the loader and the draws that training uses, against the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch

from svdtune.config.schema import Config
from svdtune.contracts import Draws, Mismatch, ModelFacts, VideoBatch, check
from svdtune.data.index import VideoIndex
from svdtune.errors import DataError
from svdtune.guards.findings import Finding
from svdtune.guards.footage import check_footage
from svdtune.guards.place import place_of
from svdtune.guards.samplers import check_samplers

_BYTES = 2**28
"""Two clips are read where they fit into this, one where they do not: a laptop must stay under a GiB."""
_STILL = 0.25
"""A share of pictures from which on standing still is no accident."""
_EDGE = 1e-3
"""Rounding of the resize beyond [-1, 1]."""


def check_batch(config: Config, facts: ModelFacts, files: Sequence[VideoIndex]) -> list[Finding]:
    """DAT311: the loader's batch is not what `train_step` takes. SHP407: what is drawn for it is not."""
    from svdtune.data.loader import make_loader
    from svdtune.diffusion.draws import draws_for

    data = config.data
    clip_bytes = 4 * facts.c * data.num_frames * data.height * data.width
    b = 2 if config.train.batch_size > 1 and 2 * clip_bytes <= _BYTES else 1
    axes = facts.axes(b=b, t=data.num_frames, h=data.height, w=data.width)
    loader = make_loader(
        replace(data, workers=0),
        files,
        seed=config.run.seed,
        rank=0,
        world=1,
        batch_size=b,
        first_sample=0,
        last_sample=b,
    )
    try:
        batch = next(loader)
        assert isinstance(batch, VideoBatch)
        if wrong := [_record("DAT311", mismatch) for mismatch in check(batch, axes)]:
            return wrong
        draws = draws_for(batch, facts, config)
    except DataError as error:
        return [Finding("DAT302", "error", "data.root", str(error), "clips that can be decoded",
                        "It is read by training's own loader, which would stop here.", "Mend or remove the file.")]  # fmt: skip
    except Exception as error:  # whatever loader, transform or draws raise here they would raise in the first step
        got = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        return [Finding("DAT311", "error", place_of(error), got, "a batch", "Training's own loader and draws were run on the first clips.",
                        "Mend the line that is named.")]  # fmt: skip
    wrong = [*(_record("SHP407", mismatch) for mismatch in check(draws, axes)), *_finite(draws), *_same(draws)]
    return [
        *(_values(batch) or check_footage(data, files, config.run.seed, batch)),
        *_still(batch),
        *(wrong or check_samplers(config, facts)),
    ]


def _record(code: str, mismatch: Mismatch) -> Finding:
    why = "It is made by the training's own loader and draws; `train_step` would refuse it in the first step."
    return Finding(
        code, "error", mismatch.where, mismatch.got, f"{mismatch.expected}, {mismatch.meaning}", why, mismatch.hint
    )


def _values(batch: VideoBatch) -> list[Finding]:
    low, high = float(batch.pixels.min()), float(batch.pixels.max())
    if low >= -1 - _EDGE and high <= 1 + _EDGE:  # also false for NaN
        return []
    return [
        Finding(
            "DAT311", "error", "VideoBatch.pixels", f"values from {low:g} to {high:g} in {', '.join(batch.names)}",
            "values in [-1, 1]", "The VAE was trained on pixels from -1 to 1; others give latents that mean nothing.",
            "Scale bytes by pixels / 127.5 - 1 (svdtune/data/transform.py does).",
        )
    ]  # fmt: skip


def _still(batch: VideoBatch) -> list[Finding]:
    """DAT314: pictures that follow on themselves in a clip as it is sampled."""
    found = []
    for name, clip in zip(batch.names, batch.pixels, strict=True):
        pairs = len(clip) - 1
        same = sum(torch.equal(one, next_one) for one, next_one in pairwise(clip))
        if same < max(2, _STILL * pairs):
            continue
        every = same == pairs
        got = f"{same} of the {pairs} pictures that follow another in a clip of it are that one again"
        found.append(Finding(
            "DAT314", "warning", name, got, "a new picture for each frame",
            "A clip in which nothing moves teaches the model to give still videos." if every
            else "The file holds fewer pictures than its frame rate says (a converted GIF, animation, a recording with pauses): the model "
            "would learn to stand still and jump.",
            "Leave such files out." if every else "Sample slower (data.fps), or leave such files out."))  # fmt: skip
    return found


def _same(draws: Draws) -> list[Finding]:
    """Noise that two clips share, or that one clip has twice; a strength may well be the same for all."""
    pairs = [
        (f"Draws.{name}", value[0], value[1])
        for name, value in vars(draws).items()
        if "noise" in name and len(value) > 1 and value.dim() > 1
    ]
    pairs.append(("Draws.noise and Draws.posterior_noise", draws.noise, draws.posterior_noise))
    why = "Each clip has noise of its own, drawn from (seed, sample number): shared noise makes the gradients of a batch alike."
    return [
        Finding("SHP407", "error", where, "the same numbers twice", "independent draws", why)
        for where, one, other in pairs if one.shape == other.shape and bool((one == other).all())
    ]  # fmt: skip


def _finite(draws: Draws) -> list[Finding]:
    return [
        Finding("SHP407", "error", f"Draws.{name}", "values that are not finite", "finite numbers",
                "Loss and gradients would be NaN in the first step.")
        for name, value in vars(draws).items() if not bool(value.isfinite().all())
    ]  # fmt: skip
