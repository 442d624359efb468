"""A run that reads the latent cache: its step is rehearsed and proved as any other, and a cache that does not fit is a finding."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from svdtune.config.load import with_overrides
from svdtune.data.catalog import scan
from svdtune.diffusion import conditioning
from svdtune.guards import shapes
from svdtune.guards.clips import check_clips
from svdtune.guards.live.prove import prove
from svdtune.guards.shapes import rehearse
from svdtune.trainer import caching
from svdtune.trainer.build import build, make_accelerator
from svdtune.trainer.run_folder import RunFolder
from svdtune.trainer.state import Position


@pytest.fixture
def made(small, tmp_path):
    """A config whose cache is filled; its videos are its own."""
    config = small(
        "memory.checkpointing=units", "train.batch_size=2", "data.windows=1", f"data.latents={tmp_path / 'latents'}"
    )
    shutil.copytree(config.data.root, tmp_path / "videos")
    config = with_overrides(config, [f"data.root={tmp_path / 'videos'}"])
    caching.make_cache(config)
    return config


def proved(config) -> set[str]:
    built = build(config, make_accelerator(config), RunFolder(Path(config.run.dir) / "r"), scan(config.data))
    return {finding.code for finding in prove(built, Position()).findings}


def test_a_sound_cache_is_silent(made, fresh):
    assert check_clips(made) == []
    assert proved(made) == set()


def test_a_cache_that_does_not_fit(made):
    name = sorted(path.name for path in (os.scandir(made.data.root)))[0]
    os.remove(f"{made.data.root}/{name}")
    (found,) = check_clips(made)
    assert (found.code, found.severity) == ("DAT360", "error")
    assert found.got.endswith(f"files of the cache that are gone: {name}")
    (found,) = check_clips(replace(made, data=replace(made.data, fps=7)))
    assert (found.code, found.got.endswith("(data.fps was 8, now 7)")) == ("DAT360", True)
    shutil.rmtree(made.data.root)
    assert check_clips(made) == []  # nothing will open the videos


def test_the_rehearsal_steps_on_cached_clips(made, monkeypatch):
    asked = []
    record = shapes.fake_record
    monkeypatch.setattr(shapes, "fake_record", lambda kind, axes: asked.append(kind.__name__) or record(kind, axes))
    assert not rehearse(made).findings
    assert "LatentBatch" in asked
    assert "VideoBatch" not in asked
    real = conditioning.cached_latents
    monkeypatch.setattr(
        conditioning, "cached_latents", lambda *given, **options: real(*given, **options).transpose(0, 1)
    )
    assert {finding.code for finding in rehearse(made).findings} & {"SHP401", "SHP405"}


@pytest.mark.parametrize(
    ("broken", "code"),
    [
        (lambda batch, draws, scaling_factor: batch.latents_mean.float() + batch.latents_std * draws.posterior_noise, "SEM509"),
        (lambda batch, draws, scaling_factor: scaling_factor * batch.latents_mean.float(), "SEM509"),
        (lambda batch, draws, scaling_factor: scaling_factor
         * (batch.latents_mean.float() + batch.latents_std * draws.posterior_noise).flip(0), "SEM509"),
    ],
    ids=["not scaled", "not sampled", "of another clip"],
)  # fmt: skip
def test_a_step_that_reads_it_wrongly(made, fresh, monkeypatch, broken, code):
    monkeypatch.setattr(conditioning, "cached_latents", broken)
    assert code in proved(made)


def test_a_cache_of_other_latents(made, fresh, monkeypatch):
    """As of another VAE: the first frame through the one of now has another latent."""
    shutil.rmtree(made.data.latents)
    real = caching.posterior
    monkeypatch.setattr(caching, "posterior", lambda *given: (1.5 * real(*given)[0], real(*given)[1]))
    caching.make_cache(made)
    assert proved(made) == {"SEM517"}
