"""Batches are a function of (seed, global sample number), whatever the workers, ranks and starting point."""

from __future__ import annotations

import multiprocessing
import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from svdtune.config.schema import Data
from svdtune.contracts import ModelFacts, VideoBatch, require
from svdtune.data import loader
from svdtune.data.catalog import scan
from svdtune.data.dataset import ClipDataset
from svdtune.data.held_out import held_out_batches
from svdtune.data.index import VideoIndex, index_video
from svdtune.data.loader import make_loader
from svdtune.errors import DataError

ASSETS = Path(__file__).parents[1] / "assets" / "video"
DATA = Data(root=str(ASSETS), num_frames=4, fps=7, height=32, width=48, flip=True, workers=0)
FACTS = ModelFacts(c=3, z=4, f=8, d=1024, m=3, num_frames=4, clip_size=224, scaling_factor=0.18215)


@pytest.fixture(scope="module")
def files() -> tuple[VideoIndex, ...]:
    return tuple(index_video(ASSETS / name) for name in ("closed.mp4", "mkv.mkv", "ts.ts", "vp9.webm", "opengop.mp4"))


def load(
    files: tuple[VideoIndex, ...],
    *,
    data: Data = DATA,
    seed: int = 3,
    rank: int = 0,
    world: int = 1,
    batch_size: int = 2,
    first: int = 0,
    last: int = 12,
) -> list[VideoBatch]:
    return list(
        make_loader(
            data,
            files,
            seed=seed,
            rank=rank,
            world=world,
            batch_size=batch_size,
            first_sample=first,
            last_sample=last,
        )
    )


def equal(a: list[VideoBatch], b: list[VideoBatch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.pixels, y.pixels)
        and x.pixels.stride() == y.pixels.stride()
        and x.sample.tolist() == y.sample.tolist()
        and x.names == y.names
        for x, y in zip(a, b, strict=True)
    )


def by_sample(batches: list[VideoBatch]) -> dict[int, tuple[str, torch.Tensor]]:
    return {
        sample: (name, pixels)
        for batch in batches
        for sample, name, pixels in zip(batch.sample.tolist(), batch.names, batch.pixels, strict=True)
    }


def test_batches_keep_the_contract(files: tuple[VideoIndex, ...]) -> None:
    batch = load(files, last=2)[0]
    require(batch, batch.axes(FACTS))
    assert batch.pixels.shape == (2, 4, 3, 32, 48)
    assert batch.pixels.is_contiguous()
    assert (batch.fps.tolist(), batch.motion_bucket.tolist()) == ([7, 7], [127, 127])
    assert batch.pixels.amin() >= -1
    assert batch.pixels.amax() <= 1
    assert batch.pixels.std() > 0.1


def test_two_passes_and_any_number_of_workers_are_equal(files: tuple[VideoIndex, ...]) -> None:
    first = load(files)
    assert len(first) == 6
    assert equal(first, load(files))
    assert equal(first, load(files, data=replace(DATA, workers=2)))
    assert not equal(first, load(files, seed=4))


def test_two_ranks_see_together_what_one_sees(files: tuple[VideoIndex, ...]) -> None:
    one = by_sample(load(files, batch_size=4))
    ranks = [by_sample(load(files, rank=rank, world=2)) for rank in (0, 1)]
    assert not ranks[0].keys() & ranks[1].keys()
    both = ranks[0] | ranks[1]
    assert both.keys() == one.keys() == set(range(12))
    assert all(both[k][0] == one[k][0] and torch.equal(both[k][1], one[k][1]) for k in one)


def test_resume_in_the_middle_gives_the_tail(files: tuple[VideoIndex, ...]) -> None:
    assert equal(load(files)[3:], load(files, first=6))


def test_all_ranks_get_the_same_number_of_batches(files: tuple[VideoIndex, ...]) -> None:
    assert [len(load(files, rank=rank, world=2, last=6)) for rank in (0, 1)] == [2, 2]
    assert load(files, first=12, last=12) == []


def test_an_epoch_visits_every_file_once_and_the_next_in_another_order(files: tuple[VideoIndex, ...]) -> None:
    dataset = ClipDataset(DATA, files, 3)
    epochs = [[dataset.file_of(epoch * 5 + i).path.name for i in range(5)] for epoch in range(4)]
    assert all(sorted(epoch) == sorted(i.path.name for i in files) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_windows_and_flips_differ_between_samples(files: tuple[VideoIndex, ...]) -> None:
    dataset = ClipDataset(DATA, files[:1], 3)
    clips = [dataset[sample].pixels for sample in range(6)]
    assert all(not torch.equal(a, b) for i, a in enumerate(clips) for b in clips[:i])


def broken(tmp_path: Path, video: Callable[..., Path]) -> tuple[Data, tuple[VideoIndex, ...]]:
    """Three good files and one that was replaced after it was indexed."""
    paths = [video(f"{i}.mp4", frames=20) for i in range(4)]
    files = tuple(index_video(path) for path in paths)
    paths[2].write_text("gone")
    return replace(DATA, root=str(tmp_path)), files


@pytest.mark.parametrize("workers", [0, 1])
def test_undecodable_clip_is_replaced_and_named(tmp_path: Path, video: Callable[..., Path], workers: int) -> None:
    data, files = broken(tmp_path, video)
    batches = load(files, data=replace(data, workers=workers), last=4)
    reasons = [reason for batch in batches for reason in batch.rejected]
    assert reasons
    assert set(reasons) == {f"{tmp_path / '2.mp4'}: is a text file, not a video (it starts with 'gone')"}
    assert "2.mp4" not in {name for batch in batches for name in batch.names}
    assert [s for batch in batches for s in batch.sample.tolist()] == [0, 1, 2, 3]
    assert equal(batches, load(files, data=data, last=4))


@pytest.mark.parametrize("workers", [0, 1])
def test_undecodable_clip_stops_when_asked(tmp_path: Path, video: Callable[..., Path], workers: int) -> None:
    data, files = broken(tmp_path, video)
    with pytest.raises(DataError) as caught:
        load(files, data=replace(data, workers=workers, on_bad_clip="error"), last=4)
    assert str(caught.value) == f"{tmp_path / '2.mp4'}: is a text file, not a video (it starts with 'gone')"


def test_nothing_decodable_ends_with_the_reasons(tmp_path: Path, video: Callable[..., Path]) -> None:
    data, files = broken(tmp_path, video)
    with pytest.raises(DataError) as caught:
        load(files[2:3], data=data, last=2)
    assert str(caught.value) == (
        "sample 0: none of 8 files could be decoded; check data.root:\n"
        f"  {tmp_path / '2.mp4'}: is a text file, not a video (it starts with 'gone')"
    )


def test_too_little_shared_memory_is_said_before_the_kernel_kills(
    files: tuple[VideoIndex, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 64 * 2**20})
    monkeypatch.setattr(loader.shutil, "disk_usage", lambda path: usage)
    data = replace(DATA, num_frames=25, height=576, width=1024, workers=4)
    with pytest.raises(DataError) as caught:
        load(files, data=data)
    assert str(caught.value) == (
        "data.workers=4: up to 2,700 MB of clips wait in /dev/shm, which has 64 MB free. "
        "Lower data.workers (0 needs none), or give the container more: --shm-size"
    )


def test_a_dying_worker_names_the_files(files: tuple[VideoIndex, ...]) -> None:
    batches = make_loader(
        replace(DATA, workers=1), files, seed=3, rank=0, world=1, batch_size=1, first_sample=0, last_sample=1000
    )
    next(batches)
    for child in multiprocessing.active_children():
        child.kill()
    with pytest.raises(DataError, match=r"loader workers failed at samples \d+ to \d+ \(.*exited unexpectedly"):
        list(batches)


def test_a_hanging_worker_names_the_files(
    tmp_path: Path, video: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    index = index_video(video("pipe.mp4", frames=20))
    index.path.unlink()
    os.mkfifo(index.path)  # opening it waits for a writer that never comes
    monkeypatch.setattr(loader, "_SECONDS", 3)
    monkeypatch.setattr(loader, "_CHECK_SECONDS", 1)
    with pytest.raises(DataError) as caught:
        load((index,), data=replace(DATA, root=str(tmp_path), workers=1), batch_size=1, last=1)
    assert str(caught.value) == (
        f"loader workers failed at samples 0 to 0 ({index.path}): no answer in 3 s. "
        "If one file does it each time, remove it; data.workers=0 decodes in the training process"
    )


def test_held_out_clips_are_the_same_every_time(files: tuple[VideoIndex, ...]) -> None:
    batches, again = (list(held_out_batches(DATA, files, clips=3, seed=0, batch_size=2)) for _ in range(2))
    assert equal(batches, again)
    assert [batch.sample.tolist() for batch in batches] == [[0, 1], [2]]
    assert len({name for batch in batches for name in batch.names}) == 3


def test_held_out_gives_several_windows_of_few_files(files: tuple[VideoIndex, ...]) -> None:
    (batch,) = held_out_batches(DATA, files[:1], clips=3, seed=0, batch_size=8)
    assert batch.sample.tolist() == [0, 1, 2]
    assert not torch.equal(batch.pixels[0], batch.pixels[1])


def test_held_out_passes_over_a_broken_file_or_stops(tmp_path: Path, video: Callable[..., Path]) -> None:
    data, files = broken(tmp_path, video)
    batches = list(held_out_batches(data, files, clips=4, seed=0, batch_size=4))
    assert sorted(batches[0].names) == ["0.mp4", "1.mp4", "3.mp4"]
    with pytest.raises(DataError, match=r"2\.mp4: is a text file"):
        list(held_out_batches(replace(data, on_bad_clip="error"), files, clips=4, seed=0, batch_size=4))
    with pytest.raises(DataError, match="no held-out clip can be decoded"):
        list(held_out_batches(data, files[2:3], clips=4, seed=0, batch_size=4))


def test_scan_to_loader(tmp_path: Path, video: Callable[..., Path]) -> None:
    for i in range(5):
        video(f"sub/{i}.mp4", frames=20)
    data = replace(DATA, root=str(tmp_path))
    catalog = scan(data)
    batches = load(catalog.train, data=data, last=2)
    assert all(name.startswith("sub/") for name in batches[0].names)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("decoder", ["auto", "pyav"])
def test_memory_of_a_worker_is_flat_over_1000_clips(decoder: str, video: Callable[..., Path]) -> None:
    path = video(frames=120, fps=25, height=192, width=320, options={"g": "12", "bf": "0"})
    data = replace(DATA, root=str(path.parent), fps=25, workers=1, decoder=decoder)
    index = index_video(path)
    batches = make_loader(data, (index,), seed=0, rank=0, world=1, batch_size=4, first_sample=0, last_sample=1000)
    megabytes = []
    for batch in batches:
        assert not batch.rejected
        (worker,) = multiprocessing.active_children()
        # RssAnon: what the worker owns; plain RSS also counts tensors in shared memory that wait to be taken.
        status = Path(f"/proc/{worker.pid}/status").read_text()
        megabytes.append(int(re.search(r"RssAnon:\s+(\d+)", status)[1]) / 1024)
    assert len(megabytes) == 250
    # The allocator keeps or returns whole arenas, up to 60 MB from one batch to the next; a reader left open costs gigabytes.
    assert np.median(megabytes[200:]) - np.median(megabytes[25:75]) < 64, megabytes[::10]
