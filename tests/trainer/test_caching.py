"""`svdtune cache`: what it writes is what training would have encoded, it goes on where it stands, and it knows what is stale."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file, save_file

from svdtune import cli
from svdtune.config.load import load_config
from svdtune.contracts import LatentBatch, VideoBatch, require
from svdtune.data import cached, readers
from svdtune.data.catalog import scan
from svdtune.data.demo import write_demo
from svdtune.data.latents import entry_path, read_index
from svdtune.data.loader import make_loader
from svdtune.diffusion.draws import draws_for
from svdtune.errors import ConfigError, DataError
from svdtune.trainer import caching, loop
from svdtune.trainer import run as running
from svdtune.trainer.build import build, make_accelerator
from svdtune.trainer.run_folder import RunFolder
from svdtune.trainer.staleness import require_cache
from svdtune.trainer.step import encode, train_step
from tests.trainer.conftest import REPO, SHORT, metrics

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning", "ignore:.*lr_scheduler.step.*:UserWarning"
)
WITHIN = 1e-4


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    write_demo(folder, clips=5, motion="down", seed=0)
    return folder


@pytest.fixture
def config(videos: Path, svd_folder: Path, tmp_path: Path):
    """A random model on 3 frames of 32 x 48, two windows of each of five files, both ways round, one file held out."""

    def make(*overrides: str):
        return load_config(
            REPO / "configs/tiny.yaml",
            [f"model.pretrained={svd_folder}", "model.variant=null", f"data.root={videos}", f"run.dir={tmp_path}", "run.name=r",
             *SHORT, "data.num_frames=3", "data.height=32", "data.width=48", "train.batch_size=2", "train.accumulation=1",
             "adapt.method=lora", "adapt.rank=2", "data.windows=2", "data.flip=true", f"data.latents={tmp_path / 'latents'}",
             "validation.clips=3", "validation.sigmas=[0.5,5]", *overrides],
        )  # fmt: skip

    return make


@pytest.fixture
def session(config, tmp_path):
    """A built session; accelerate's process-wide state is reset afterwards."""

    def make(made):
        _reset()
        return build(made, make_accelerator(made), RunFolder(tmp_path / "r"), scan(made.data))

    yield make
    _reset()


def _reset() -> None:
    for shared in (AcceleratorState, PartialState, GradientState):
        shared._shared_state.clear()


def live(config):
    """The same run without its cache."""
    return replace(config, data=replace(config.data, latents=None))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def batches(config, session, samples: int):
    """Of the cached run and of the live one, as their loaders give them."""
    options = {
        "seed": config.run.seed,
        "rank": 0,
        "world": 1,
        "batch_size": 2,
        "first_sample": 0,
        "last_sample": samples,
    }
    index = read_index(config)
    return zip(
        make_loader(config.data, index, **options),
        make_loader(live(config).data, session.catalog.train, **options),
        strict=True,
    )


def test_the_loss_of_cached_clips_is_that_of_the_clips(config, session):
    made = config()
    caching.make_cache(made)
    built, names, flips = session(live(made)), set(), 0
    for from_cache, decoded in batches(made, built, 16):
        assert isinstance(from_cache, LatentBatch)
        assert isinstance(decoded, VideoBatch)
        require(from_cache, from_cache.axes(built.parts.facts))
        assert from_cache.names == decoded.names
        assert from_cache.sample.tolist() == decoded.sample.tolist()
        draws = draws_for(decoded, built.parts.facts, made)
        assert all(
            torch.equal(value, getattr(draws, name))
            for name, value in vars(draws_for(from_cache, built.parts.facts, made)).items()
        )
        with torch.no_grad():
            one, other = train_step(built.parts, from_cache, draws), train_step(built.parts, decoded, draws)
        torch.testing.assert_close(one.loss_per_clip, other.loss_per_clip, rtol=WITHIN, atol=0)
        torch.testing.assert_close(one.encoded.image_embeds, other.encoded.image_embeds)
        torch.testing.assert_close(one.encoded.latents, other.encoded.latents, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(from_cache.first_frame.float(), decoded.pixels[:, 0], rtol=0, atol=5e-4)
        names |= set(from_cache.names)
        dataset = cached.LatentDataset(made.data, read_index(made), made.run.seed)
        flips += sum(dataset.entry_of(sample)[1].flip for sample in from_cache.sample.tolist())
    assert len(names) == 4
    assert 0 < flips < 16


def test_the_held_out_loss_is_the_same(config, session):
    made = config()
    caching.make_cache(made)
    built = session(live(made))
    expected = loop.Validator(built).held_out_loss()
    assert len(expected) == 3
    found = loop.Validator(replace(built, config=made)).held_out_loss()
    assert found == pytest.approx(expected, rel=WITHIN)
    assert found != expected  # the cache was read
