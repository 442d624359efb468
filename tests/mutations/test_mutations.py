"""Every broken case is caught with a code of its topic; every sound one passes without an error."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from svdtune.config.load import load_config
from svdtune.errors import ConfigError
from tests.mutations.checkpoint_cases import CHECKPOINT, NEEDS_WEIGHTS
from tests.mutations.code_cases import CODE
from tests.mutations.configuration_cases import CONFIGURATION
from tests.mutations.data_cases import DATA
from tests.mutations.fresh_cases import FRESH, FRESH_SOUND
from tests.mutations.sandbox import Mutation, Sandbox, Sound, base_overrides
from tests.mutations.share import SHARES, share, turn
from tests.mutations.sound_cases import SOUND
from tests.mutations.value_cases import VALUE_MUTATIONS as VALUES

CONFIGS = Path(__file__).parents[2] / "configs"
GROUPS = {"configuration": CONFIGURATION, "checkpoint": CHECKPOINT, "data": DATA, "code": CODE, "fresh": FRESH}
MUTATIONS = [mutation for group in GROUPS.values() for mutation in group]
ALL_SOUND = [*SOUND, *FRESH_SOUND]
SHIPPED = [case for case in ALL_SOUND if case.base == "shipped"]
"""Always run: what everybody starts from."""
OTHER_SOUND = [case for case in ALL_SOUND if case.base != "shipped"]
VALUE_MUTATIONS = [*VALUES, *NEEDS_WEIGHTS]
"""Seen by values alone: not run here."""
TABLE = Path(__file__).with_name("expected_codes.tsv")
EXPECTED = dict(line.split("\t") for line in TABLE.read_text().splitlines()) if TABLE.exists() else {}
"""Mutation to the code that must be among the findings. SVDTUNE_WRITE_CODES=FILE SVDTUNE_MUTATIONS=all appends what was found."""


def name(case: Mutation | Sound) -> str:
    return case.name.replace(" ", "-")


@pytest.mark.parametrize("mutation", share(MUTATIONS), ids=name)
def test_mutation_is_caught(mutation: Mutation, box: Sandbox, rehearsed_once: Callable[[], None]) -> None:
    mutation.apply(box)
    if mutation in [*CONFIGURATION, *CHECKPOINT, *DATA]:
        rehearsed_once()
    findings = _findings(box, mutation in [*CONFIGURATION, *FRESH])
    wanted = ("error", "warning") if mutation.warning_is_enough else ("error",)
    codes = [finding.code for finding in findings if finding.severity in wanted]
    told = "\n".join(f"{finding.severity} {finding.code} {finding.where}" for finding in findings)
    fitting = [code for code in codes if code.startswith(mutation.topic)]
    assert fitting, f"wanted {wanted} of {mutation.topic}, got:\n{told or 'nothing'}"
    if target := os.environ.get("SVDTUNE_WRITE_CODES"):
        with open(target, "a") as file:
            file.write(f"{mutation.name}\t{' '.join(fitting)}\n")
        return
    assert EXPECTED[mutation.name] in fitting, told


@pytest.mark.parametrize("sound", [*SHIPPED, *share(OTHER_SOUND)], ids=name)
def test_sound_run_has_no_error(sound: Sound, box: Sandbox) -> None:
    overrides = _sound_overrides(sound, box)
    if sound.apply is not None:
        sound.apply(box)
    findings = _preflight(load_config(CONFIGS / sound.config, [*overrides, *box.overrides, *sound.overrides]))
    errors = [f"{f.code} {f.where}: {f.why}" for f in findings if f.severity == "error" and not _excused(f.code, sound)]
    assert not errors, "\n".join(errors)


def test_totals() -> None:
    """What the suite holds; that each is caught is a test of its own."""
    assert len({mutation.name for mutation in [*MUTATIONS, *VALUE_MUTATIONS]}) == len(MUTATIONS) + len(VALUE_MUTATIONS)
    kinds = Counter(mutation.kind for mutation in MUTATIONS)
    print(dict(kinds), {group: len(cases) for group, cases in GROUPS.items()}, len(SOUND))
    assert EXPECTED.keys() == {mutation.name for mutation in MUTATIONS}
    assert len(MUTATIONS) >= 115
    assert len(SOUND) >= 45
    assert min(kinds.values()) >= 30, kinds


def test_every_case_is_in_one_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SVDTUNE_MUTATIONS", raising=False)
    taken = []
    for number in range(SHARES):
        monkeypatch.setattr("tests.mutations.share._commit", lambda number=number: f"{number:x}")
        taken += share(MUTATIONS)
    assert sorted(map(name, taken)) == sorted(map(name, MUTATIONS))
    assert {turn(commit) for commit in ("", "a0", "a1", "a2")} == {0, 1, 2}
    monkeypatch.setenv("SVDTUNE_MUTATIONS", "all")
    assert share(MUTATIONS) == MUTATIONS


def _findings(box: Sandbox, configuration: bool) -> Any:
    """What preflight says; a config that does not even load counts as caught for configuration cases."""
    try:
        config = load_config(CONFIGS / box.config, [*base_overrides(box), *box.overrides])
    except ConfigError as error:
        if not configuration:
            raise
        return [_Loading("CFG101", "error", str(error))]
    return _preflight(config)


class _Loading:
    """load_config's own refusal, in the place of a finding."""

    def __init__(self, code: str, severity: str, where: str) -> None:
        self.code, self.severity, self.where = code, severity, where


def _preflight(config: Any) -> Any:
    from svdtune.guards.preflight import run_preflight

    return run_preflight(config).findings


def _sound_overrides(sound: Sound, box: Sandbox) -> list[str]:
    if sound.base == "svd":
        return base_overrides(box)
    # That the clips are small is told with a smaller frame, and proved: a second pass of a minute at full size.
    return [f"data.root={box.clips}", f"run.dir={box.work / 'runs'}", "run.threads=1", "preflight.ignore=[DAT307]"]


def _excused(code: str, sound: Sound) -> bool:
    return bool(sound.unless) and code.startswith(sound.unless)
