"""The table of numbers that must agree between the parts of a model. Needs no torch and no weights."""

from __future__ import annotations

from svdtune.config.schema import Config
from svdtune.contracts import ModelFacts
from svdtune.errors import ConfigError, ModelError
from svdtune.guards.findings import Finding
from svdtune.model.facts import (
    SHIPPED,
    Contradiction,
    ModelConfigs,
    contradictions,
    model_facts,
    require_useful_bridge,
)
from svdtune.model.source import local_source, read_configs

_CODES = {
    "time_ids": "SHP402",
    "clip_width": "SHP403",
    "in_channels": "SHP404",
    "out_channels": "SHP404",
    "picture_channels": "SHP412",
}


def local_configs(config: Config) -> ModelConfigs | None:
    """The model's own JSON where it lies on this machine; None when it must be fetched first or cannot be read."""
    try:
        source = local_source(config.model.pretrained) or SHIPPED.get(config.model.pretrained)
        return read_configs(source) if source else None
    except ModelError:
        return None


def facts_of(config: Config) -> ModelFacts | None:
    """The model's numbers, or None where they are unknown or contradict each other."""
    configs = local_configs(config)
    try:
        return model_facts(configs, bridge=config.conditioning.bridge is not None) if configs else None
    except ModelError:
        return None


def check_table(config: Config) -> list[Finding] | None:
    """SHP402-404: parts whose numbers do not fit together. None when the model's configs cannot be read."""
    configs = local_configs(config)
    try:
        found = contradictions(configs, bridge=config.conditioning.bridge is not None) if configs else None
    except ModelError:
        return None
    if found is None or configs is None:
        return None
    return [*map(_finding, found), *(_useless_bridge(configs) if config.conditioning.bridge else [])]


def _useless_bridge(configs: ModelConfigs) -> list[Finding]:
    try:
        require_useful_bridge(configs)
    except ConfigError as error:
        told, _, why = str(error).removeprefix("conditioning.bridge: got ").partition(": ")
        got, _, expected = told.partition(", expected ")
        return [Finding("CFG115", "error", "conditioning.bridge", got, expected, f"{why[:1].upper()}{why[1:]}",
                        "Leave it out.", error.patch)]  # fmt: skip
    return []


def _finding(item: Contradiction) -> Finding:
    fix, patch = _fix(item.kind)
    return Finding(
        _CODES[item.kind],
        "error",
        item.where,
        item.got,
        item.expected,
        f"{item.why[:1].upper()}{item.why[1:]}.",
        fix,
        patch,
    )


def _fix(kind: str) -> tuple[str, tuple[str, ...]]:
    if kind != "clip_width":
        return "Take all parts, weights and config.json, from one SVD release.", ()
    return (
        "Either put the image_encoder folder of the UNet's own release in place (nothing to learn, the better choice), or train a "
        "projection from this tower to the UNet (conditioning.bridge=linear): the UNet has never seen this tower, so expect a "
        "longer training with method full or temporal.",
        ("conditioning.bridge=linear",),
    )
