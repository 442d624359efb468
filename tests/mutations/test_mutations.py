"""Every broken case is caught with a code of its topic; every sound one passes without an error."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from svdtune.config.load import load_config
from svdtune.errors import ConfigError
from tests.mutations.checkpoint_cases import CHECKPOINT, NEEDS_WEIGHTS
from tests.mutations.code_cases import CODE
from tests.mutations.configuration_cases import CONFIGURATION
from tests.mutations.data_cases import DATA
from tests.mutations.sandbox import Mutation, Sandbox, Sound, base_overrides
from tests.mutations.sound_cases import SOUND
from tests.mutations.value_cases import VALUE_MUTATIONS as VALUES

CONFIGS = Path(__file__).parents[2] / "configs"
GROUPS = {"configuration": CONFIGURATION, "checkpoint": CHECKPOINT, "data": DATA, "code": CODE}
MUTATIONS = [mutation for group in GROUPS.values() for mutation in group]
VALUE_MUTATIONS = [*VALUES, *NEEDS_WEIGHTS]
"""Seen by values alone: not run here."""
outcome: dict[str, bool] = {}
"""Whether each case that ran was caught; read by the last test."""


def name(case: Mutation | Sound) -> str:
    return case.name.replace(" ", "-")


@pytest.mark.parametrize("mutation", MUTATIONS, ids=name)
def test_mutation_is_caught(mutation: Mutation, box: Sandbox) -> None:
    outcome[mutation.name] = False
    mutation.apply(box)
    findings = _findings(box, mutation in CONFIGURATION)
    wanted = ("error", "warning") if mutation.warning_is_enough else ("error",)
    codes = [finding.code for finding in findings if finding.severity in wanted]
    outcome[mutation.name] = any(code.startswith(mutation.topic) for code in codes)
    told = "\n".join(f"{finding.severity} {finding.code} {finding.where}" for finding in findings)
    assert outcome[mutation.name], f"wanted {wanted} of {mutation.topic}, got:\n{told or 'nothing'}"


@pytest.mark.parametrize("sound", SOUND, ids=name)
def test_sound_run_has_no_error(sound: Sound, box: Sandbox) -> None:
    overrides = _sound_overrides(sound, box)
    if sound.apply is not None:
        sound.apply(box)
    findings = _preflight(load_config(CONFIGS / sound.config, [*overrides, *box.overrides, *sound.overrides]))
    errors = [f"{f.code} {f.where}: {f.why}" for f in findings if f.severity == "error" and not _excused(f.code, sound)]
    assert not errors, "\n".join(errors)


def test_totals() -> None:
    """Counts per kind and group; when all cases ran, how many of each were caught."""
    assert len({mutation.name for mutation in [*MUTATIONS, *VALUE_MUTATIONS]}) == len(MUTATIONS) + len(VALUE_MUTATIONS)
    kinds = Counter(mutation.kind for mutation in MUTATIONS)
    assert len(MUTATIONS) >= 115
    assert len(SOUND) >= 45
    assert len(VALUE_MUTATIONS) >= 15
    assert min(kinds.values()) >= 30, kinds
    caught = [mutation for mutation in MUTATIONS if outcome.get(mutation.name)]
    for kind, count in sorted(kinds.items()):
        print(f"{kind}: {sum(mutation.kind == kind for mutation in caught)} of {count} caught")
    for group, cases in GROUPS.items():
        print(f"{group}: {sum(mutation in caught for mutation in cases)} of {len(cases)} caught")
    if len(outcome) == len(MUTATIONS):  # not when a part of this file was chosen
        assert len(caught) >= 100


def _findings(box: Sandbox, configuration: bool) -> Any:
    """What preflight says; a config that does not even load counts as caught for configuration cases."""
    try:
        config = load_config(CONFIGS / box.config, [*base_overrides(box), *box.overrides])
    except ConfigError as error:
        if not configuration:
            raise
        return [_Loading("CFG", "error", str(error))]
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
    here = [f"data.root={box.clips}", f"run.dir={box.work / 'runs'}"]
    return [*here, "run.threads=1"]


def _excused(code: str, sound: Sound) -> bool:
    return bool(sound.unless) and code.startswith(sound.unless)
