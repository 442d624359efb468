"""Silent over sound runs, each trouble told once; loss and gradient of simulated runs, samples of textures of known speed."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from svdtune.guards.catalog import RULES
from svdtune.guards.live.flight import Flight, _stopped
from svdtune.guards.live.motion import Look
from svdtune.trainer.metrics import BANDS, StepReport
from svdtune.trainer.watch import Seen
from tests.guards.live.test_motion import texture, video

NOTHING = torch.zeros(0)


def sound(steps, *, seed=0, spread=1.0, clips=1):
    """Seen of a sound run: losses that depend on sigma, fall, and are log-normal with `spread`; gradients likewise."""
    random = np.random.default_rng(seed)
    for step in range(1, steps + 1):
        bands = random.integers(0, 4, clips)
        losses = (
            np.array([0.1, 0.3, 0.5, 0.9])[bands]
            * (1 + 2 * np.exp(-step / 1000))
            * np.exp(spread * random.standard_normal(clips))
        )
        by_sigma = {BANDS[band]: float(losses[bands == band].mean()) for band in set(bands.tolist())}
        norm = float(np.exp(random.standard_normal()))
        seconds = 2 * float(np.exp(0.1 * random.standard_normal()))
        report = StepReport(float(losses.mean()), norm, by_sigma)
        yield Seen(step, report, norm, seconds, 0.05, NOTHING, NOTHING, ())


def scaled(seen, *, loss=1.0, norm=1.0, work=1.0, waited=0.0):
    report = seen.report
    by_sigma = {band: loss * value for band, value in report.loss_by_sigma.items()}
    report = replace(report, loss=loss * report.loss, loss_by_sigma=by_sigma)
    seconds = work * (seen.seconds - seen.waited) + seen.waited + waited
    return replace(seen, report=report, grad_norm=norm * seen.grad_norm, seconds=seconds, waited=seen.waited + waited)


def fly(run, flight=None):
    """(step, finding) of all that is told."""
    flight = flight or Flight()
    return [(seen.step, finding) for seen in run for finding in flight.stepped(seen)]


@pytest.mark.parametrize(("spread", "clips"), [(0.3, 1), (0.7, 1), (1.2, 1), (1.2, 4)])
def test_sound_training_is_silent(spread, clips):
    for seed in range(4):
        assert fly(sound(5000, seed=seed, spread=spread, clips=clips)) == []


@pytest.mark.parametrize(
    ("change", "code", "where"), [({"loss": 10}, "SEM540", "loss"), ({"norm": 10}, "SEM541", "gradient norm")]
)
@pytest.mark.parametrize("seed", range(5))
def test_a_jump_that_stays_is_told_once_within_20_steps(change, code, where, seed):
    run = (scaled(seen, **change) if seen.step >= 600 else seen for seen in sound(800, seed=seed))
    [(step, found)] = fly(run)
    assert 600 <= step < 620
    assert (found.code, found.severity, found.where) == (code, "warning", where)
    assert "over 16 steps" in found.got
    assert "train.lr" in found.fix


@pytest.mark.parametrize("change", [{"loss": 10}, {"norm": 10}, {"loss": 0.05}])
def test_a_jump_of_two_steps_is_nothing(change):
    assert fly(scaled(seen, **change) if seen.step in (600, 601) else seen for seen in sound(800)) == []


def test_one_extreme_step_is_told():
    run = (scaled(seen, loss=1e5) if seen.step == 600 else seen for seen in sound(800, spread=0.5))
    [(step, found)] = fly(run)
    assert (step, found.code) == (600, "SEM540")
    assert "in step 600" in found.got


def test_a_second_jump_is_told_after_the_first_was_over():
    run = (
        scaled(seen, loss=10) if 600 <= seen.step < 640 or 1000 <= seen.step < 1040 else seen
        for seen in sound(1300, spread=0.5)
    )
    assert [(step // 20 * 20, found.code) for step, found in fly(run)] == [(600, "SEM540"), (1000, "SEM540")]


def test_a_band_is_compared_with_itself():
    """Only rare high noise levels, ten times the loss of the others, for 30 steps: that is no jump."""
    run = []
    for seen in sound(1000, spread=0.3):
        band = BANDS[3] if seen.step % 5 == 0 or seen.step >= 970 else BANDS[0]
        loss = seen.report.loss_by_sigma[min(seen.report.loss_by_sigma)] and (10.0 if band == BANDS[3] else 1.0)
        run.append(replace(seen, report=replace(seen.report, loss=loss, loss_by_sigma={band: loss})))
    assert fly(run) == []


def test_steady_losses_that_wander_a_little_are_no_jump():
    run = (
        replace(seen, report=replace(seen.report, loss_by_sigma={BANDS[1]: 1.0 + 0.4 * (seen.step >= 600)}))
        for seen in sound(800)
    )
    assert fly(run) == []


def test_skipped_updates_of_fp16_are_not_its_business():
    run = (
        replace(seen, grad_norm=float(["inf", "nan"][seen.step % 2])) if seen.step % 50 < 2 else seen
        for seen in sound(500)
    )
    assert fly(run) == []


def test_a_loader_that_cannot_keep_up_is_told_once():
    [(step, found)] = fly(scaled(seen, waited=3.0) if seen.step >= 200 else seen for seen in sound(900))
    assert 200 <= step < 250
    assert (found.code, found.severity, found.where) == ("DAT340", "warning", "data.workers")
    assert found.got.startswith("5")
    assert "data.workers" in found.fix
    assert "data.decoder" in found.fix


def test_a_loader_that_died_for_a_while_is_told_and_again_later():
    run = (scaled(seen, waited=300.0) if seen.step in (200, 500) else seen for seen in sound(700))
    told = fly(run)
    assert [(step, found.code) for step, found in told] == [(200, "DAT340"), (500, "DAT340")]
    assert "300 s at most" in told[0][1].got


def test_waiting_in_the_first_steps_and_a_little_later_is_nothing():
    assert fly(scaled(seen, waited=100.0 if seen.step <= 5 else 1.0) for seen in sound(500)) == []


def test_slow_first_steps_are_nothing():
    assert fly(scaled(seen, work=50.0) if seen.step <= 5 else seen for seen in sound(500)) == []


def test_steps_that_became_slow_are_told_once_and_again_after_they_recovered():
    run = (scaled(seen, work=2.0) if 300 <= seen.step < 500 or seen.step >= 800 else seen for seen in sound(1000))
    told = fly(run)
    assert [found.code for _, found in told] == ["ENV040", "ENV040"]
    assert 300 <= told[0][0] < 350
    assert 800 <= told[1][0] < 850
    assert "times the best pace" in told[0][1].got
    assert "memory.vae_chunk" in told[0][1].fix


def test_steps_that_become_slower_bit_by_bit_are_told():
    [(_, found)] = fly(scaled(seen, work=1 + seen.step / 2000) for seen in sound(3000))
    assert found.code == "ENV040"


def test_one_step_that_stalls_is_told_but_not_if_it_waited_for_clips():
    [(step, found)] = fly(scaled(seen, work=15.0) if seen.step == 300 else seen for seen in sound(400))
    assert (step, found.code) == (300, "ENV040")
    assert found.got.startswith("step 300 took ")
    assert fly(scaled(seen, waited=30.0) if seen.step == 300 else seen for seen in sound(400)) == []


def test_a_noisy_machine_is_not_called_slow():
    random = np.random.default_rng(0)
    assert fly(scaled(seen, work=float(np.exp(0.25 * random.standard_normal()))) for seen in sound(5000)) == []


def test_a_step_costs_microseconds():
    """Measured 25 microseconds with losses in all four bands; CPU time, so that neighbours do not matter."""
    run, flight = list(sound(3000, clips=8)), Flight()
    began = time.thread_time()
    for seen in run:
        flight.stepped(seen)
    assert (time.thread_time() - began) / len(run) < 200e-6


CLIPS = [video(texture(speed, seed=seed)) for seed, speed in enumerate((0.6, 0.8, 1))]
MOVES = video(texture(0.8, seed=7))
FROZEN = video(texture(0.1, seed=7))
NEARLY = video(texture(0.4, seed=7))
COPIES = video(texture(0, seed=7))
STILL = [video(texture(0.04, seed=seed)) for seed in range(3)]
OTHERS = video(np.concatenate([texture(0.8, seed=7), texture(0.8, seed=8)]))
NOISE = np.random.default_rng(0).integers(0, 256, MOVES.shape, dtype=np.uint8)
BLACK = np.zeros_like(MOVES)


def watched(videos, clips=CLIPS, first=0):
    """Codes told at each of the calls, 100 steps apart."""
    flight = Flight()
    return [
        "".join(found.code for found in flight.sampled(first + 100 * i, {"a": frames}, clips)) for i, frames in enumerate(videos)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("videos", "told"),
    [
        ([MOVES, MOVES, NEARLY], ["", "", ""]),
        ([MOVES, FROZEN, FROZEN, MOVES, FROZEN], ["", "SEM542", "", "", "SEM542"]),
        ([MOVES, COPIES], ["", "SEM542"]),
        ([COPIES, COPIES], ["SEM542", ""]),
        ([FROZEN, FROZEN], ["", ""]),
        ([MOVES, OTHERS, OTHERS, MOVES, OTHERS], ["", "SEM543", "", "", "SEM543"]),
        ([OTHERS, OTHERS], ["", ""]),
        ([MOVES, NOISE, NOISE, MOVES, BLACK], ["", "SEM544", "", "", "SEM544"]),
        ([NOISE, MOVES, BLACK], ["SEM544", "", "SEM544"]),
    ],
)
def test_samples_that_fall_apart_are_told_once(videos, told):
    assert watched(videos) == told


def test_the_base_and_the_clips_are_what_samples_are_compared_with():
    assert watched([MOVES, COPIES], clips=STILL) == ["", ""], "training on still clips may stop them"
    assert watched([FROZEN], first=1000) == ["SEM542"], "a resumed run has only the clips"
    assert watched([OTHERS], first=1000) == ["SEM543"]


def test_the_figures_are_told():
    flight = Flight()
    assert flight.sampled(0, {"a": MOVES}, CLIPS) == []
    [stopped] = flight.sampled(1000, {"a": FROZEN}, CLIPS)
    assert (stopped.severity, stopped.where) == ("warning", "samples")
    assert (
        stopped.got == "median flow 0.08% of the width per frame at step 1000; 0.62% at step 0, 0.62% in training clips"
    )
    assert "conditioning.noise_aug" in stopped.fix
    [left] = flight.sampled(2000, {"a": OTHERS}, CLIPS)
    assert "at step 2000; 0." in left.got
    assert "at step 0" in left.got
    [noise] = flight.sampled(3000, {"a": MOVES, "b": BLACK, "c": NOISE}, CLIPS)
    assert noise.where == "b, c"
    assert "b is one flat colour" in noise.got
    assert "c is noise" in noise.got
    assert "train.lr" in noise.fix


def test_the_median_counts():
    """One clip of five that stands still, or one sample of three, changes nothing."""
    flight = Flight()
    three = {"a": MOVES, "b": MOVES, "c": MOVES}
    clips = [*CLIPS, CLIPS[0], STILL[0]]
    assert flight.sampled(0, three, clips) == []
    assert flight.sampled(100, {**three, "b": FROZEN}, clips) == []
    assert [found.code for found in flight.sampled(200, {**three, "b": FROZEN, "c": FROZEN}, clips)] == ["SEM542"]


def test_samples_so_fast_that_no_flow_is_found_have_not_stopped():
    """What has no flow and is not alike either is something else than a still."""
    clip = Look(flow=0.02, similarity=0.5, contrast=40, coherence=0.9, change=20)
    assert _stopped(100, [replace(clip, flow=0.001, similarity=0.1)], [clip], [clip]) == []
    assert len(_stopped(100, [replace(clip, flow=0.001, similarity=0.45)], [clip], [clip])) == 1


def test_nothing_to_compare_is_nothing():
    flight = Flight()
    assert flight.sampled(0, {}, CLIPS) == []
    assert flight.sampled(0, {"a": MOVES}, []) == []


def test_the_rules_are_in_the_catalog():
    codes = ["SEM540", "SEM541", "SEM542", "SEM543", "SEM544", "DAT340", "ENV040"]
    assert Counter(code in RULES for code in codes) == {True: 7}
