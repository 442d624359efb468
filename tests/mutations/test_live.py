"""Mistakes of value, each in the real code of a built run: all are refused before the first update; sound runs pass silently."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from svdtune.config.load import load_config
from svdtune.config.schema import Config
from svdtune.data.catalog import scan
from svdtune.guards.batch import check_batch
from svdtune.guards.findings import Finding
from svdtune.guards.live.prove import check_meaning, prove
from svdtune.trainer.build import Session, build, make_accelerator
from svdtune.trainer.run_folder import RunFolder
from svdtune.trainer.state import Position
from tests.mutations.live_cases import BATCH, FRESH, GRADIENTS, MEANING
from tests.mutations.sandbox import Mutation, Sandbox, Sound, base_overrides
from tests.mutations.share import share
from tests.mutations.value_cases import VALUE_MUTATIONS

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*lr_scheduler.step.*:UserWarning", "ignore:None of the inputs have requires_grad:UserWarning"
)
CONFIGS = Path(__file__).parents[2] / "configs"
WATCHED = [*VALUE_MUTATIONS, *MEANING]
TABLE = Path(__file__).with_name("expected_live_codes.tsv")
EXPECTED = dict(line.split("\t") for line in TABLE.read_text().splitlines())
"""Mutation to the code that must be among the findings. SVDTUNE_WRITE_CODES=FILE SVDTUNE_MUTATIONS=all appends what was found."""


def name(case: Any) -> str:
    return case.name.replace(" ", "-")


def loaded(box: Sandbox, *overrides: str, config: str = "tiny.yaml") -> Config:
    return load_config(
        CONFIGS / config, [*base_overrides(box), "adapt.method=lora", "adapt.rank=2", *box.overrides, *overrides]
    )


def built(config: Config) -> Session:
    for shared in (AcceleratorState, PartialState, GradientState):
        shared._shared_state.clear()
    return build(config, make_accelerator(config), RunFolder(Path(config.run.dir) / "r"), scan(config.data))


@pytest.fixture(scope="module")
def once() -> dict[tuple[str, ...], Session]:
    """Sessions that are alike are built once: a check leaves them as they were, which is a test of its own."""
    return {}


@pytest.fixture
def session(box: Sandbox, once: dict[tuple[str, ...], Session]) -> Callable[[], Session]:
    def make() -> Session:
        key = tuple(box.overrides)
        config = loaded(box)
        if key not in once:
            once[key] = built(config)
        return replace(once[key], config=config, catalog=scan(config.data))

    return make


def refused(findings: list[Finding], mutation: Mutation) -> None:
    codes = [finding.code for finding in findings if finding.severity == "error"]
    told = "\n".join(f"{finding.severity} {finding.code} {finding.where}: {finding.got}" for finding in findings)
    fitting = [code for code in codes if code.startswith(mutation.topic)]
    assert fitting, told or "nothing found"
    if target := os.environ.get("SVDTUNE_WRITE_CODES"):
        with open(target, "a") as file:
            file.write(f"{mutation.name}\t{' '.join(dict.fromkeys(fitting))}\n")
        return
    assert EXPECTED[mutation.name] in codes, told


@pytest.mark.parametrize("mutation", share(WATCHED), ids=name)
def test_a_wrong_value_is_seen_in_the_step(mutation: Mutation, box: Sandbox, session: Callable[[], Session]) -> None:
    made = session()
    mutation.apply(box)
    refused(list(check_meaning(made, Position())), mutation)


@pytest.mark.parametrize("mutation", share(BATCH), ids=name)
def test_a_wrong_batch_or_draw_is_seen(mutation: Mutation, box: Sandbox, session: Callable[[], Session]) -> None:
    facts = session().parts.facts
    mutation.apply(box)
    config = loaded(box)
    refused(check_batch(config, facts, scan(config.data).train), mutation)


@pytest.mark.parametrize("mutation", share(GRADIENTS), ids=name)
def test_a_wrong_update_is_seen(mutation: Mutation, box: Sandbox) -> None:
    mutation.apply(box)
    refused(prove(built(loaded(box)), Position()).findings, mutation)


@pytest.mark.parametrize("mutation", share(FRESH), ids=name)
def test_a_mistake_that_nobody_had_thought_of_is_seen(mutation: Mutation, box: Sandbox) -> None:
    mutation.apply(box)
    config = loaded(box)
    made = built(config)
    refused([*prove(made, Position()).findings, *check_batch(config, made.parts.facts, made.catalog.train)], mutation)


def test_totals() -> None:
    cases = [*WATCHED, *BATCH, *GRADIENTS, *FRESH]
    assert len({case.name for case in cases}) == len(cases) >= 130
    assert EXPECTED.keys() == {case.name for case in cases}
    print(len(WATCHED), len(BATCH), len(GRADIENTS))


SOUND = [
    Sound("lora"),
    Sound("every weight", ("adapt.method=full",)),
    Sound("temporal layers", ("adapt.method=temporal",)),
    Sound("temporal attention in bf16", ("adapt.method=temporal_attention", "train.precision=bf16")),
    Sound("spatial layers", ("adapt.method=spatial",)),
    Sound("dora", ("adapt.dora=true",)),
    Sound("lora in bf16", ("train.precision=bf16",)),
    Sound("every weight in bf16 with averages", ("adapt.method=full", "train.precision=bf16", "train.ema=true")),
    Sound("recomputed", ("memory.checkpointing=diffusers", "adapt.method=full")),
    Sound("recomputed in bf16", ("memory.checkpointing=diffusers", "train.precision=bf16")),
    Sound("accumulated", ("train.accumulation=3", "train.batch_size=1")),
    Sound("one clip, two frames", ("train.batch_size=1", "data.num_frames=2")),
    Sound("adafactor", ("train.optimizer=adafactor",)),
    Sound("nothing dropped", ("conditioning.dropout=0",)),
    Sound("nearly all dropped", ("conditioning.dropout=0.9",)),
    Sound("one strength of noise", ("conditioning.noise_aug=[-3.0,0.0]",)),
    Sound("loud conditioning noise", ("conditioning.noise_aug=[0.5,1.0]",)),
    Sound("low noise levels", ("objective.p_mean=-2.0", "objective.p_std=0.5")),
    Sound("high noise levels", ("objective.p_mean=5.0", "objective.p_std=1.0")),
    Sound("one frame per second", ("data.fps=1", "data.num_frames=3")),
    Sound("every frame of the file", ("data.fps=24", "data.num_frames=9")),
    Sound("mirrored and padded", ("data.flip=true", "data.resize=pad", "data.width=64")),
    Sound("squashed, frame by frame", ("data.resize=squash", "data.height=96", "memory.vae_chunk=1")),
    Sound("small rate, long warm-up, no clipping", ("train.lr=1e-5", "train.warmup=100", "train.clip_norm=null")),
    Sound("another seed, read by PyAV", ("run.seed=1234567", "data.decoder=pyav")),
]


@pytest.mark.parametrize("sound", SOUND, ids=name)
def test_a_sound_run_passes_without_a_word_and_unchanged(sound: Sound, box: Sandbox) -> None:
    box.set(*sound.overrides)
    config = loaded(box)
    made = built(config)
    before = {key: parameter.detach().clone() for key, parameter in made.model.unet.named_parameters()}
    averages = [average.clone() for average in made.ema.shadow_params] if made.ema else []
    random = torch.random.get_rng_state()
    proof = prove(made, Position())
    assert torch.equal(random, torch.random.get_rng_state())
    findings = [*proof.findings, *check_batch(config, made.parts.facts, scan(config.data).train)]
    assert not findings, "\n".join(f"{f.code} {f.where}: {f.got}; expected {f.expected}" for f in findings)
    assert [stage.status for stage in proof.stages] == ["ok", "ok"]
    assert all(
        torch.equal(parameter, before[key]) and parameter.grad is None
        for key, parameter in made.model.unet.named_parameters()
    )
    assert all(map(torch.equal, made.ema.shadow_params if made.ema else [], averages))
    optimizer: Any = made.optimizer
    assert (len(optimizer.optimizer.state), made.schedule.last_epoch, made.schedule.get_last_lr()) == (
        0,
        0,
        [optimizer.param_groups[0]["lr"]],
    )
