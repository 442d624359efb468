"""Windows that a cache can hold, and the names of its entries."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from svdtune.config.load import load_config, with_overrides
from svdtune.config.schema import Data
from svdtune.data.clips import start_frames
from svdtune.data.dataset import ClipDataset, window_starts
from svdtune.data.index import VideoIndex, index_video
from svdtune.data.latents import entry_key, settings_of, view

ROOT = Path(__file__).parents[2]
DATA = Data(root="clips", num_frames=4, fps=7, height=32, width=48, flip=True, workers=0)


@pytest.fixture(scope="module")
def video() -> VideoIndex:
    return index_video(ROOT / "tests" / "assets" / "video" / "closed.mp4")


def test_windows_are_spread_evenly_and_all_are_drawn(video):
    starts = start_frames(video, num_frames=4, fps=7)
    assert list(window_starts(DATA, video)) == list(range(starts))
    four = window_starts(replace(DATA, windows=4), video)
    assert list(four) == [starts * odd // 8 for odd in (1, 3, 5, 7)]
    assert list(window_starts(replace(DATA, windows=1), video)) == [starts // 2]
    assert list(window_starts(replace(DATA, windows=10 * starts), video)) == list(range(starts))  # each frame once
    dataset = ClipDataset(replace(DATA, windows=4), (video,), seed=3)
    drawn = [dataset.window_of(video, sample) for sample in range(100)]
    assert {start for start, _ in drawn} == set(four)
    assert {flip for _, flip in drawn} == {False, True}
    assert drawn == [dataset.window_of(video, sample) for sample in range(100)]


CHANGES = ["data.num_frames=9", "data.height=128", "data.width=128", "data.fps=9", "data.resize=pad", "data.decoder=pyav",
           "train.precision=bf16"]  # fmt: skip
NETWORKS = {"vae": "v", "image_encoder": "i"}


def config(*overrides):
    return load_config(ROOT / "configs" / "tiny.yaml", ["data.latents=latents", "data.windows=2", *overrides])


def key(made, file="f", frames=(0, 3), flip=False, **networks):
    return entry_key({**settings_of(made), **NETWORKS, **networks}, file, frames, flip)


def test_an_entry_has_another_name_when_anything_it_is_made_from_differs():
    made = config()
    keys = [key(made), key(made, file="g"), key(made, frames=(0, 4)), key(made, flip=True), key(made, vae="w"),
            key(made, image_encoder="j"), *(key(with_overrides(made, [change])) for change in CHANGES)]  # fmt: skip
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    "change",
    ["data.windows=3", "data.flip=true", "data.holdout=0.5", "validation.clips=3", "run.seed=5", "data.workers=0"],
)
def test_what_chooses_clips_does_not_change_them(change):
    assert key(config(change)) == key(config())


@pytest.mark.parametrize(("change", "same"), [("data.windows=3", False), ("run.seed=5", False), ("train.lr=1e-5", True),
                                              ("data.root=elsewhere", True), ("data.workers=0", True)])  # fmt: skip
def test_a_view_belongs_to_what_chooses_clips(change, same):
    folder = Path("latents")
    assert (view(folder, config(change)) == view(folder, config())) is same
