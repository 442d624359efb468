"""The convention probe on the embedded base, which moves shapes to the right and was told fps and motion bucket truly.

Measured on 8 right-moving demo clips of the size and rate it knows, 4 sigmas each (loss with the convention broken over
ours, 95 % interval over clips): ids swapped x12.6 (9.6 to 16.5), fps halved x3.8 (3.1 to 4.7), fps doubled x3.6 (3.1 to 4.2),
condition scaled x4.8 (3.1 to 7.6), BGR x18 (11 to 30), frames reversed x24 (19 to 32), frames shuffled x17 (13 to 22),
sigma per frame x3.9 (3.6 to 4.4). So this base tells all of them on the footage it knows.

On footage it does not know it tells less: of clips that move down only "frames shuffled" (+12 %) and "sigma per frame"
(+20 %), and "condition scaled" comes out 7 % better by accident (0.0 to 13.9 %). Clips that move left are reversed right-moving ones to
it (-96 %), and "fps halved" and "frames shuffled" come out 4 % better beside that.
"""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from svdtune.config.load import load_config
from svdtune.contracts import VideoBatch
from svdtune.data.catalog import scan
from svdtune.data.demo import write_demo
from svdtune.data.held_out import held_out_batches
from svdtune.guards.live import probe
from svdtune.guards.live.probe import ProbeRow, Variant, as_findings, render_rows
from svdtune.model.load import load_model
from svdtune.trainer.build import clip_pixels
from svdtune.trainer.step import Parts
from tests.guards.conftest import CONFIGS

BY_NAME = {variant.name: variant for variant in probe.VARIANTS}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("right")
    write_demo(folder, clips=3, motion="right", seed=5, height=64, width=96)
    return load_config(CONFIGS / "tiny.yaml", [f"data.root={folder}", "data.holdout=0"])


@pytest.fixture(scope="module")
def footage(config) -> list[VideoBatch]:
    """Three clips, one per batch."""
    return list(held_out_batches(config.data, scan(config.data).train, clips=3, seed=0, batch_size=1))


@pytest.fixture(scope="module")
def base(config) -> Parts:
    model = load_model(config.model)
    return Parts(model.unet.eval(), model.vae, model.image_encoder, clip_pixels(model), model.facts, torch.float32, 8)


@pytest.fixture(scope="module")
def probed(config, footage, base):
    """The rows, and the state of weights and global random numbers before and after."""
    before = state(base)
    return probe.probe(base, footage, config, draws=2), before, state(base)


def state(base):
    weights = [
        w.clone() for network in (base.unet, base.vae, base.image_encoder) for w in network.state_dict().values()
    ]
    numbers = (random.getstate(), str(np.random.get_state()), torch.get_rng_state())
    return weights, numbers, [w.grad for w in base.unet.parameters()]


def only(monkeypatch, *variants: Variant | str):
    chosen = tuple(BY_NAME[v] if isinstance(v, str) else v for v in variants)
    monkeypatch.setattr(probe, "VARIANTS", chosen)


@pytest.mark.parametrize("name", BY_NAME)
def test_the_base_tells_each_convention_on_the_footage_it_knows(probed, name):
    row = {row.name: row for row in probed[0]}[name]
    assert row.verdict == "ours is better"
    assert 0 < row.low < row.difference < row.high
    assert row.ours < 0.05 < row.broken
    assert row.pairs == 6


def test_no_finding_there(probed):
    assert as_findings(probed[0]) == []


def test_weights_and_random_numbers_are_left_alone(probed):
    (weights, numbers, _), (weights_after, numbers_after, grads) = probed[1:]
    assert all(map(torch.equal, weights, weights_after))
    assert numbers[:2] == numbers_after[:2]
    assert torch.equal(numbers[2], numbers_after[2])
    assert grads == [None] * len(grads)


@pytest.mark.parametrize(
    ("name", "change", "where", "says"),
    [
        ("BGR", lambda b: {"pixels": b.pixels.flip(2)}, "data.root", "blue and red swapped"),
        ("frames reversed", lambda b: {"pixels": b.pixels.flip(1)}, "data.root", "played backwards"),
        ("fps halved", lambda b: {"fps": b.fps * 2}, "data.fps", "more happens than the base expects"),
        ("fps doubled", lambda b: {"fps": b.fps / 2}, "data.fps", "less happens than the base expects"),
        ("ids swapped", lambda b: {"fps": b.motion_bucket + 1, "motion_bucket": b.fps - 1}, "UNetInput.added_time_ids", "another order"),
    ],
)  # fmt: skip
def test_footage_that_breaks_a_convention_is_named(config, footage, base, monkeypatch, name, change, where, says):
    only(monkeypatch, name)
    rows = probe.probe(base, [replace(batch, **change(batch)) for batch in footage], config, draws=2)
    assert [row.verdict for row in rows] == ["broken is better"]
    assert -1 < rows[0].low < rows[0].difference < rows[0].high < 0
    assert rows[0].broken < 0.05 < rows[0].ours
    [finding] = as_findings(rows)
    assert (finding.code, finding.severity, finding.where) == ("SEM590", "warning", where)
    assert finding.got.startswith(f"with {name} the untouched base has ")
    assert says in finding.why
    assert finding.why.startswith("Informative")


def test_a_base_trained_with_a_scaled_condition_is_named(config, footage, base, monkeypatch):
    z, factor = base.facts.z, base.facts.scaling_factor

    def unet(sample, *args, **kwargs):
        return base.unet(torch.cat([sample[:, :, :z], sample[:, :, z:] / factor], dim=2), *args, **kwargs)

    only(monkeypatch, "condition scaled")
    [finding] = as_findings(probe.probe(replace(base, unet=unet), footage, config, draws=2))
    assert (finding.code, finding.where) == ("SEM590", "UNetInput.sample")


def test_nothing_broken_is_no_difference(config, footage, base, monkeypatch):
    only(monkeypatch, replace(BY_NAME["BGR"], name="nothing", losses=probe.Case.losses))
    [row] = probe.probe(base, footage[:2], config, draws=2)
    assert (row.difference, row.low, row.high, row.verdict) == (0, 0, 0, "cannot tell")
    assert row.ours == row.broken


def test_a_network_that_listens_to_nothing_cannot_tell(config, footage, base, monkeypatch):
    """Also what the frames of other draws are for: alone, each has the loss it has among its own."""

    def deaf(sample, *_, **__):
        return (torch.zeros_like(sample[:, :, : base.facts.z]),)

    only(monkeypatch, "ids swapped", "fps halved", "fps doubled", "condition scaled", "sigma per frame")
    *told, per_frame = probe.probe(replace(base, unet=deaf), footage, config, draws=3)
    assert [(row.difference, row.verdict) for row in told] == [(0, "cannot tell")] * 4
    assert max(map(abs, (per_frame.difference, per_frame.low, per_frame.high))) < 1e-6


def test_each_frame_has_its_own_sigma_and_the_network_hears_their_mean(config, footage, base, monkeypatch):
    heard = []

    def unet(sample, timestep, *, encoder_hidden_states, added_time_ids, return_dict):
        heard.append((sample, timestep, encoder_hidden_states, added_time_ids))
        return (torch.zeros_like(sample[:, :, : base.facts.z]),)

    only(monkeypatch, "sigma per frame")
    probe.probe(replace(base, unet=unet), [two_clips(footage)], config, draws=2)
    ours, broken = heard[:2], heard[2:]
    assert [[x.shape for x in call] for call in broken] == [[x.shape for x in call] for call in ours]
    for ours_too, theirs in zip(ours[0][2:], broken[0][2:], strict=True):
        assert torch.equal(ours_too, theirs)
    whose = [[torch.equal(broken[0][0][1, i], call[0][1, i]) for call in ours] for i in range(8)]
    assert {sum(w) for w in whose} == {1}
    from_second = sum(w[1] for w in whose)
    assert 0 < from_second < 8
    first, second = ours[0][1], ours[1][1]
    assert broken[0][1] == pytest.approx((first * (8 - from_second) + second * from_second) / 8)


def test_the_same_sigma_in_every_frame_is_the_loss_of_the_clip(config, footage, base):
    [case] = probe._cases(base, [two_clips(footage)], config, 2)
    case = replace(case, draws=(case.draws[0], case.draws[0]))
    with torch.no_grad():
        assert torch.allclose(probe._sigma_per_frame(case), case.losses(), rtol=1e-4)


def test_what_the_network_is_told_of_time_and_motion(config, footage, base, monkeypatch):
    """By its ids, since this base takes fps 2 for fps 8: the fastest sine of their embedding repeats every 6.28."""
    told = []

    def unet(sample, *_, added_time_ids, **__):
        told.append(added_time_ids[0, :2].tolist())
        return (torch.zeros_like(sample[:, :, : base.facts.z]),)

    only(monkeypatch, "ids swapped", "fps halved", "fps doubled")
    probe.probe(replace(base, unet=unet), footage[:1], config, draws=1)
    assert told == [[7, 127], [127, 7], [3, 127], [15, 127]]


def test_clips_in_one_batch_are_the_same_pairs(config, footage, base, monkeypatch):
    only(monkeypatch, "frames shuffled", "sigma per frame")
    apart = probe.probe(base, footage[:2], config, draws=2)
    together = probe.probe(base, [two_clips(footage)], config, draws=2)
    for one, other in zip(apart, together, strict=True):
        assert (one.name, one.pairs, one.verdict) == (other.name, other.pairs, other.verdict)
        assert (one.ours, one.broken, one.low) == pytest.approx((other.ours, other.broken, other.low), rel=1e-3)


def two_clips(footage) -> VideoBatch:
    one, other = footage[:2]
    both = {n: torch.cat([getattr(one, n), getattr(other, n)]) for n in ("pixels", "fps", "motion_bucket", "sample")}
    return replace(one, **both)


def test_each_pair_has_noise_of_its_own_and_nothing_is_dropped(config, footage, base):
    draws = [draw for case in probe._cases(base, footage[:2], config, 2) for draw in case.draws]
    assert len({float(draw.noise.sum()) for draw in draws}) == 4
    assert [float(draw.sigma) for draw in draws] == pytest.approx(2 * probe.sigmas(config.objective, 2))
    assert {(float(draw.keep_image_embeds), float(draw.keep_image_latents)) for draw in draws} == {(1.0, 1.0)}


def test_sigmas_lie_at_the_middles_of_equal_parts(config):
    low, middle, high = probe.sigmas(config.objective, 3)
    assert middle == pytest.approx(np.exp(config.objective.p_mean))
    assert (
        np.log(high / middle) == pytest.approx(np.log(middle / low)) == pytest.approx(0.967422 * config.objective.p_std)
    )


@pytest.mark.parametrize(("clips", "units"), [(7, 14), (8, 8)])
def test_the_interval_is_over_clips_where_there_are_enough(clips, units):
    """Student's t by hand: 2.160 for 13 degrees of freedom, 2.365 for 7."""
    change = torch.linspace(-0.2, 0.5, 2 * clips).reshape(2, clips).double()
    row = probe._row("x", torch.ones(2, clips).double(), change.exp())
    each = change.flatten() if units == 14 else change.mean(0)
    half = {14: 2.160, 8: 2.365}[units] * float(each.std()) / units**0.5
    assert np.log1p((row.low, row.high)) == pytest.approx((0.15 - half, 0.15 + half), abs=1e-4)
    assert (row.pairs, row.difference) == (2 * clips, pytest.approx(np.expm1(0.15)))


def test_one_pair_tells_nothing():
    assert probe._row("x", torch.ones(1, 1), torch.full((1, 1), 9.0)).verdict == "cannot tell"


def test_the_strongest_comes_first():
    rows = [
        ProbeRow(name, 0.5, 0.4, d, d - 0.01, d + 0.01, 8, "broken is better")
        for name, d in (("BGR", -0.1), ("fps halved", -0.3))
    ]
    rows.append(ProbeRow("ids swapped", 0.5, 0.4, -0.1, -0.3, 0.1, 8, "cannot tell"))
    assert [finding.where for finding in as_findings(rows)] == ["data.fps", "data.root"]
    assert "has 30.0 % less loss (95 % interval 29.0 % to 31.0 %, 8 pairs)" in as_findings(rows)[0].got


def test_the_table_is_aligned():
    rows = [
        ProbeRow("BGR", 0.0296, 0.5352, 17.08, 9.723, 29.485, 32, "ours is better"),
        ProbeRow("frames reversed", 0.6323, 0.0282, -0.959, -0.970, -0.944, 8, "broken is better"),
    ]
    assert render_rows(rows).split("\n\n")[0].splitlines() == [
        "broken on purpose  loss    broken  change   95 % interval       pairs  verdict",
        "BGR                0.0296  0.5352  +1708 %  +972 % to +2948 %   32     ours is better",
        "frames reversed    0.6323  0.0282  -95.9 %  -97.0 % to -94.4 %  8      broken is better",
    ]
    assert "Informative" in render_rows(rows)
