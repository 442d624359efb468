"""`svdtune cache`: what it writes is what training would have encoded, it goes on where it stands, and it knows what is stale."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file, save_file

from svdtune import cli
from svdtune.config.load import load_config, resolved_yaml, with_overrides
from svdtune.contracts import LatentBatch, VideoBatch, require
from svdtune.data import cached, dataset, latents
from svdtune.data.catalog import Catalog, scan
from svdtune.data.demo import write_demo
from svdtune.data.latents import entry_path, read_index
from svdtune.data.loader import make_loader
from svdtune.diffusion.conditioning import unpacked
from svdtune.diffusion.draws import draws_for
from svdtune.errors import ConfigError, DataError
from svdtune.trainer import caching, loop
from svdtune.trainer import run as running
from svdtune.trainer.build import build, make_accelerator
from svdtune.trainer.run_folder import RunFolder
from svdtune.trainer.signals import StopWish
from svdtune.trainer.staleness import require_cache
from svdtune.trainer.state import Position
from svdtune.trainer.step import train_step
from svdtune.trainer.validate import at_hand, inference
from svdtune.trainer.watch import Watch
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
        base = _base(videos, svd_folder, tmp_path / "latents")
        return load_config(REPO / "configs/tiny.yaml", [*base, f"run.dir={tmp_path}", "run.name=r", *overrides])

    return make


@pytest.fixture
def session(config, tmp_path):
    """A built session; accelerate's process-wide state is reset afterwards."""

    def make(made):
        _reset()
        return build(made, make_accelerator(made), RunFolder(tmp_path / "r"), scan(made.data))

    yield make
    _reset()


def _base(videos: Path, model: Path, latents: Path) -> list[str]:
    return [f"model.pretrained={model}", "model.variant=null", f"data.root={videos}", f"data.latents={latents}",
            *SHORT, "data.num_frames=3", "train.batch_size=2", "train.accumulation=1",
            "adapt.method=lora", "adapt.rank=2", "data.windows=2", "data.flip=true", "validation.clips=3",
            "validation.sigmas=[0.5,5]"]  # fmt: skip


def _reset() -> None:
    for shared in (AcceleratorState, PartialState, GradientState):
        shared._shared_state.clear()


def live(config):
    """The same run without its cache."""
    return replace(config, data=replace(config.data, latents=None))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def batches(config, session, samples: int) -> Iterator[tuple[LatentBatch, VideoBatch]]:
    """Of the cached run and of the live one, as their loaders give them."""
    options = {
        "seed": config.run.seed,
        "rank": 0,
        "world": 1,
        "batch_size": 2,
        "first_sample": 0,
        "last_sample": samples,
    }
    from_cache = make_loader(config.data, read_index(config), **options)
    for one, other in zip(from_cache, make_loader(live(config).data, session.catalog.train, **options), strict=True):
        assert isinstance(one, LatentBatch)
        assert isinstance(other, VideoBatch)
        yield one, other


def test_the_loss_of_cached_clips_is_that_of_the_clips(config, session):
    made = config()
    caching.make_cache(made)
    built, names, flips = session(live(made)), set(), 0
    for from_cache, decoded in batches(made, built, 16):
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
        torch.testing.assert_close(unpacked(from_cache.first_frame), decoded.pixels[:, 0], rtol=0, atol=2e-5)
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


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, videos: Path, svd_folder: Path) -> Path:
    """A finished cache, not to be changed."""
    folder = tmp_path_factory.mktemp("filled") / "latents"
    made = load_config(REPO / "configs/tiny.yaml", _base(videos, svd_folder, folder))
    caching.make_cache(made)
    require_cache(made)
    return folder


@pytest.fixture
def own(filled: Path, videos: Path, tmp_path: Path, config):
    """A finished cache and its videos, to be spoiled."""
    shutil.copytree(filled, tmp_path / "own")
    shutil.copytree(videos, tmp_path / "videos")  # keeps times
    return config(f"data.latents={tmp_path / 'own'}", f"data.root={tmp_path / 'videos'}")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("data.height=48", "data.height was 32, now 48"),
        ("data.fps=6", "data.fps was 8, now 6"),
        ("data.num_frames=4", "data.num_frames was 3, now 4"),
        ("data.resize=squash", "data.resize was cover, now squash"),
        ("data.decoder=pyav", "data.decoder was auto, now pyav"),
        ("data.windows=3", "data.windows was 2, now 3"),
        ("data.flip=false", "data.flip was true, now false"),
        ("data.holdout=0.5", "data.holdout was 0.2, now 0.5"),
        ("train.precision=bf16", "train.precision was no, now bf16"),
        ("validation.clips=1", "validation.clips was 3, now 1"),
        ("run.seed=1", "run.seed was 0, now 1"),
    ],
)
def test_other_settings_are_told(config, filled, change, said):
    with pytest.raises(DataError) as told:
        require_cache(config(f"data.latents={filled}", change))
    assert f"was made for another configuration ({said}). Run `svdtune cache` with this configuration" in str(
        told.value
    )


def test_a_touched_file_is_read_and_taken_for_the_same(own, monkeypatch):
    hashed = []
    monkeypatch.setattr(cached, "content_hash", lambda path: hashed.append(path) or latents.content_hash(path))
    require_cache(own)
    assert hashed == []
    touched = Path(own.data.root) / read_index(own).train[0].name
    os.utime(touched)
    require_cache(own)
    assert hashed == [touched]


@pytest.mark.parametrize("kind", ["content", "size", "gone", "new"])
def test_changed_files_are_told_and_encoded_again(own, kind, monkeypatch):
    root = Path(own.data.root)
    name = read_index(own).train[0].name
    path = root / name
    if kind == "content":  # another video of the same length in bytes
        data = bytearray(path.read_bytes())
        data[data.index(b"mdat") + 100] ^= 1
        path.write_bytes(data)
    elif kind == "size":
        path.write_bytes(path.read_bytes() + b"\0\0\0\x08free")
    elif kind == "gone":
        path.unlink()
    else:
        shutil.copy(path, root / "zz-demo.mp4")
    said = {"content": f"1 training files changed since: {name}", "size": f"1 training files changed since: {name}",
            "gone": f"1 training files of the cache that are gone: {name}",
            "new": "1 new training files, not in the cache: zz-demo.mp4"}  # fmt: skip
    with pytest.raises(DataError, match=re.escape(said[kind])):
        require_cache(own)
    written, store = [], caching._store
    monkeypatch.setattr(caching, "_store", lambda *given: written.append(given[1]) or store(*given))
    caching.make_cache(own)
    require_cache(own)
    assert (
        len(written) == {"content": 4, "size": 4, "gone": 0, "new": 0}[kind]
    )  # two windows, both ways round; a copy is known


@pytest.mark.parametrize("part", ["vae", "image_encoder"])
def test_other_networks_are_told(config, filled, svd_folder, tmp_path, part):
    shutil.copytree(svd_folder, tmp_path / "svd")
    path = tmp_path / "svd" / part / ("diffusion_pytorch_model.safetensors" if part == "vae" else "model.safetensors")
    tensors = load_file(path)
    name = min(tensors)
    save_file({**tensors, name: tensors[name] + 1e-3}, path, {"format": "pt"})
    made = config(f"data.latents={filled}", f"model.pretrained={tmp_path / 'svd'}")
    with pytest.raises(
        DataError, match=rf"does not fit \(sha256 of the weights: {part} was \w{{12}}, now \w{{12}}\)\. Run"
    ):
        require_cache(made)
    require_cache(made, hashes=False)


def test_what_a_kill_left_is_gone_on_with(config, filled, tmp_path, monkeypatch):
    made, moved = config(), []
    move = caching.move_file

    def killed(source: Path, target: Path) -> None:
        moved.append(target)
        if len(moved) == 7:
            raise KeyboardInterrupt
        move(source, target)

    monkeypatch.setattr(caching, "move_file", killed)
    with pytest.raises(KeyboardInterrupt):
        caching.make_cache(made)
    with pytest.raises(DataError, match=r"was begun for this configuration and is not finished\. Run"):
        require_cache(made)
    assert list((tmp_path / "latents").glob("clips/*/.*.partial"))
    caching.make_cache(made)
    total = len(content(filled)) - 6  # five records and the index
    assert len(moved) == total + 1  # nothing twice but the one that was cut short
    assert content(tmp_path / "latents") == content(filled)


def test_two_processes_share_the_work(config, filled, tmp_path):
    made = config()
    assert "other processes still encode their share" in caching.make_cache(made, rank=0, world=2)
    half = len(content(tmp_path / "latents"))
    with pytest.raises(DataError, match="is not finished"):
        require_cache(made)
    assert "holds all" in caching.make_cache(made, rank=1, world=2)
    assert 4 < half < len(content(filled)) - 4
    assert content(tmp_path / "latents") == content(filled)


def test_two_configurations_share_a_folder_and_what_is_alike(own, config, monkeypatch):
    other = config(
        f"data.latents={own.data.latents}", f"data.root={own.data.root}", "data.flip=false", "validation.clips=1"
    )
    monkeypatch.setattr(caching, "Encoder", lambda *_: None)  # so nothing can be encoded
    assert caching.make_cache(other).startswith("encoded 0 clips")
    require_cache(other)
    require_cache(own)


@pytest.mark.parametrize("kind", ["missing", "cut", "changed", "other"])
def test_a_damaged_entry_is_told_with_its_clip(own, kind):
    file, entry = cached.LatentDataset(own.data, read_index(own), own.run.seed).entry_of(0)
    path = entry_path(Path(own.data.latents), entry.key)
    whole = path.read_bytes()
    if kind == "missing":
        path.unlink()
        with pytest.raises(DataError, match=f"1 encoded clips are missing: {file.name} from frame {entry.start}"):
            require_cache(own)
    elif kind == "other":
        save_file({"latents": torch.zeros(3)}, path)
    else:
        path.write_bytes(whole[:-10] if kind == "cut" else whole[:-10] + bytes(10))
    loader = make_loader(
        own.data, read_index(own), seed=0, rank=0, world=1, batch_size=2, first_sample=0, last_sample=2
    )
    said = "is missing" if kind == "missing" else "is damaged"
    with pytest.raises(
        DataError,
        match=rf"{path}: the cached clip of {file.name} from frame {entry.start} {said}.* Run `svdtune cache`",
    ):
        next(loader)
    path.unlink(missing_ok=True)
    caching.make_cache(own)
    assert path.read_bytes() == whole


def test_a_clip_that_cannot_be_decoded_is_replaced_as_in_training(config, session, monkeypatch):
    made = config()
    bad = scan(made.data).train[1].path
    read = dataset.read_clip

    def broken(data, index, **options):
        if index.path == bad:
            raise DataError(f"{bad}: a frame cannot be decoded")
        return read(data, index, **options)

    for module in (dataset, caching):
        monkeypatch.setattr(module, "read_clip", broken)
    assert "2 windows cannot be decoded" in caching.make_cache(made)
    built, rejected = session(live(made)), []
    for from_cache, decoded in batches(made, built, 8):
        assert from_cache.names == decoded.names
        assert from_cache.rejected == decoded.rejected
        torch.testing.assert_close(unpacked(from_cache.first_frame), decoded.pixels[:, 0], rtol=0, atol=2e-5)
        rejected += decoded.rejected
    assert rejected
    strict = replace(made, data=replace(made.data, on_bad_clip="error"))
    with pytest.raises(DataError, match="a frame cannot be decoded"):
        caching.make_cache(strict)


def test_training_reads_the_cache_and_opens_no_video(own, session, tmp_path):
    """The same losses as live, held out too; then without videos and without a CLIP tower."""
    steps = ("train.steps=3", "train.lr=1e-3")
    made = with_overrides(own, steps)
    expected = trained(session, live(made), tmp_path / "live")
    shutil.rmtree(own.data.root)
    found = trained(session, made, tmp_path / "cached")
    assert found == pytest.approx(expected, rel=WITHIN)
    assert len(found) == 3 + 2  # of each step, and held out at the first and the last


def trained(session, config, folder: Path) -> list[float]:
    made = with_overrides(config, [f"run.dir={folder.parent}", f"run.name={folder.name}"])
    _reset()
    accelerator, folder_of_run = make_accelerator(made), RunFolder(folder)
    built = build(made, accelerator, folder_of_run, running._scan(made, folder_of_run, main=True))
    assert next(built.model.image_encoder.parameters()).is_meta == (made.data.latents is not None)
    loop.run_loop(built, Position(), resolved_yaml(made), StopWish(), Watch())
    return [line["loss"] if "loss" in line else line["held_out_loss"] for line in metrics(folder)]


def test_sample_videos_start_from_the_cache(own, session, tmp_path):
    made = with_overrides(own, ["validation.samples=1", "validation.inference_steps=1"])
    caching.make_cache(made)
    with_truth = loop.Validator(session(made)).subjects
    assert with_truth[0].truth is not None
    expected = loop.Validator(session(live(made))).subjects
    assert with_truth[0].name == expected[0].name
    torch.testing.assert_close(with_truth[0].image, expected[0].image, rtol=0, atol=2e-5)
    shutil.rmtree(own.data.root)
    built = build(made, make_accelerator(made), RunFolder(tmp_path / "r"), Catalog((), (), ()))
    validator = loop.Validator(built)
    assert validator.subjects[0].truth is None
    with inference(built):
        assert [path.is_file() for path in validator.sample_videos(0).values()] == [True]


def test_without_a_folder_it_says_which_option_is_missing(config):
    with pytest.raises(ConfigError, match=r"data\.latents: got null, expected a folder"):
        caching.make_cache(live(config()))


def test_a_file_in_the_folders_place_is_told_before_anything_is_loaded(own, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(caching, "scan", lambda *_: pytest.fail("clips were looked at first"))
    with pytest.raises(ConfigError, match=r"data\.latents: .*file cannot be a folder .*Not a directory"):
        caching.make_cache(with_overrides(own, [f"data.latents={tmp_path / 'file'}"]))


def test_the_verb(own, monkeypatch, capsys, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(resolved_yaml(own))
    monkeypatch.setattr(sys, "argv", ["svdtune", "cache", str(path)])
    monkeypatch.setattr(cli.launch, "join_world", lambda _: None)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    out, err = capsys.readouterr()
    assert not stopped.value.code
    assert re.fullmatch(
        r"encoded 0 clips, 0\.0 MB in .* s; .* holds all 19 clips of this configuration, 0\.\d MB\n", out
    ), out
    assert "0 of 19 clips are to be encoded" in err


def test_a_file_counts_only_when_all_its_windows_are_there(own, monkeypatch):
    index, folder, moved = read_index(own), Path(own.data.latents), []
    wanted = caching.wanted_windows(own, scan(own.data))
    assert caching.assemble(own, wanted, index.settings) == index
    for entry in index.train[0].entries:
        entry_path(folder, entry.key).unlink()
    caching._record_path(own, index.train[0].name).unlink()
    move = caching.move_file

    def killed(source: Path, target: Path) -> None:
        moved.append(target)
        if len(moved) == 3:  # of four, two for each window
            raise KeyboardInterrupt
        move(source, target)

    monkeypatch.setattr(caching, "move_file", killed)
    with pytest.raises(KeyboardInterrupt):
        caching.make_cache(own)
    assert caching.assemble(own, wanted, index.settings) is None


class Moved(torch.nn.Module):
    """Notes where it is sent."""

    def __init__(self):
        super().__init__()
        self.places = []

    def to(self, device):
        self.places.append(str(device))
        return self


@pytest.mark.parametrize("latents", ["latents", None])
def test_decoder_and_tower_come_for_sample_videos_alone(latents):
    decoder, tower = Moved(), Moved()
    model = SimpleNamespace(vae=SimpleNamespace(decoder=decoder), image_encoder=tower)
    config = SimpleNamespace(data=SimpleNamespace(latents=latents))
    with at_hand(SimpleNamespace(model=model, config=config, accelerator=SimpleNamespace(device="cuda"))):
        assert decoder.places == tower.places == (["cuda"] if latents else [])
    assert decoder.places == tower.places == (["cuda", "cpu"] if latents else [])
