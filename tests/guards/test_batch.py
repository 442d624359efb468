"""One real batch through the training's own loader and draws: silent on sound code, each difference told by its field."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from svdtune.data import loader
from svdtune.diffusion import draws
from svdtune.guards.clips import check_clips

_record, _draw_one = loader._record, draws._draw_one


def test_sound_clips_give_a_sound_batch(tiny):
    assert check_clips(tiny("train.batch_size=2")) == []


@pytest.mark.parametrize(
    ("change", "where", "got"),
    [
        ({"pixels": lambda x: x.permute(0, 2, 1, 3, 4).contiguous()}, "VideoBatch.pixels", "(1, 3, 8, 64, 96)"),
        ({"pixels": lambda x: ((x + 1) * 127.5).byte()}, "VideoBatch.pixels", "uint8"),
        ({"fps": lambda x: x.long()}, "VideoBatch.fps", "int64"),
        ({"pixels": lambda x: (x + 1) * 127.5}, "VideoBatch.pixels", "values from "),
        ({"pixels": lambda x: x * float("nan")}, "VideoBatch.pixels", "values from nan to nan in demo-"),
    ],
)
def test_a_loader_that_gives_something_else(tiny, monkeypatch, change, where, got):
    def broken(*args):
        batch = _record(*args)
        return replace(batch, **{name: make(getattr(batch, name)) for name, make in change.items()})

    monkeypatch.setattr(loader, "_record", broken)
    [found] = check_clips(tiny())
    assert (found.code, found.where) == ("DAT311", where)
    assert found.got.startswith(got)


@pytest.mark.parametrize(
    ("pictures", "same", "why"),
    [([0, 1, 2, 3, 4, 5, 6, 6], 0, ""), ([0, 0, 1, 1, 2, 3, 4, 5], 2, "fewer pictures"), ([0] * 8, 7, "nothing moves")],
)
def test_pictures_that_are_shown_again(tiny, monkeypatch, pictures, same, why):
    def held(*args):
        batch = _record(*args)
        return replace(batch, pixels=batch.pixels[:, pictures])

    monkeypatch.setattr(loader, "_record", held)
    # The file itself shows each picture once, which is another finding.
    found = [finding for finding in check_clips(tiny()) if finding.code != "SEM521"]
    if not same:
        assert found == []
        return
    assert (found[0].code, found[0].severity, why in found[0].why) == ("DAT314", "warning", True)
    assert found[0].got.startswith(f"{same} of the 7 pictures")


@pytest.mark.parametrize(
    ("name", "change", "got"),
    [
        ("sigma", lambda x: x.expand(8), "(1, 8)"),
        ("noise", lambda x: x.transpose(0, 1), "(1, 4, 8, 8, 12)"),
        ("keep_image_embeds", lambda x: x.bool(), "bool"),
        ("sigma", lambda x: x * float("inf"), "values that are not finite"),
    ],
)
def test_draws_that_are_something_else(tiny, monkeypatch, name, change, got):
    def broken(*args):
        row = _draw_one(*args)
        return row | {name: change(row[name])}

    monkeypatch.setattr(draws, "_draw_one", broken)
    [found] = check_clips(tiny())
    assert (found.code, found.where, found.got) == ("SHP407", f"Draws.{name}", got)


def test_noise_that_two_clips_share(tiny, monkeypatch):
    first = draws.generator(0, 1)
    monkeypatch.setattr(draws, "generator", lambda *_: first.clone_state())
    found = check_clips(tiny("train.batch_size=2"))
    assert {f.code for f in found} == {"SHP407"}
    assert found[0].where == "Draws.noise"
    assert found[0].got == "the same numbers twice"


def test_the_training_uses_the_same_functions():
    """The batch is made by the loop's own loader and draws: nothing is built a second time."""
    from svdtune.trainer import loop

    assert loop.make_loader is loader.make_loader
    assert loop.draws_for is draws.draws_for
    assert torch.is_tensor(_draw_one(draws.generator(0, 1), {"b": 1, "t": 2, "z": 4, "h": 8, "w": 8, "f": 8, "c": 3, "d": 1, "m": 3},
                                     *_sections())["noise"])  # fmt: skip


def _sections():
    from svdtune.config.schema import Conditioning, Objective

    return Objective(), Conditioning()
