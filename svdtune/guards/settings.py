"""What the types of the configuration cannot say. Reads the model's JSON and the run folder; imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from difflib import get_close_matches
from math import erf, exp, log, sqrt
from pathlib import Path
from typing import Any

from svdtune.config.schema import Config
from svdtune.errors import CheckpointError, DataError
from svdtune.guards.catalog import IN_FLIGHT, RULES, only_explained
from svdtune.guards.findings import Finding
from svdtune.guards.table import local_configs
from svdtune.model.facts import SHIPPED, ModelConfigs

_DEAD = re.compile(r"(^|\.)attn2\.to_[qk]$")
_WIDE = 320
"""Channels of SVD's first level; a narrower UNet stands other learning rates, and was not trained as SVD was."""
_FULL_LR, _LORA_LR, _ANY_LR = 1e-3, 1e-2, 0.1
_DROWNED, _LARGEST = 20.0, 80.0
"""A strength of noise that no clip should meet, and ln of one that float32 cannot square and sum."""
_FPS, _MOTION = (5, 30), (1, 255)
"""What SVD was trained with (sgm's sampling script and paper)."""
_FEW_CODES = 10
"""So many are listed; of more the report is the list."""


def check_settings(config: Config) -> list[Finding]:
    """CFG102 and following. Rules that need the model's JSON are silent where it is not on this machine, or broken."""
    configs = local_configs(config)
    found = [
        *_dead_targets(config), *_repeated_clips(config), *_resume(config), *_null_branch(config), *_noise_aug(config),
        *_unknown_codes(config), *_nothing_to_validate(config), *_run_among_clips(config), *_mostly_held_out(config),
    ]  # fmt: skip
    if configs is not None:
        of_model = (_sizes, _frames, _learning_rate, _noise_levels, _micro_conditions)
        found = [*(finding for check in of_model for finding in check(config, configs)), *found]
    return found


def vae_factor(configs: ModelConfigs) -> int | None:
    """How many pixels one latent is wide; None where the VAE's JSON does not say."""
    blocks = configs.vae.get("block_out_channels")
    return 2 ** (len(blocks) - 1) if isinstance(blocks, list) and blocks else None


def check_targets(config: Config, layers: Iterable[str]) -> list[Finding]:
    """CFG106: an entry of adapt.targets is the ending of no layer. `layers`: names of linear and convolution layers.

    CFG105 is said for what matches dead layers only.
    """
    names = list(layers)
    found = []
    for target in config.adapt.targets or ():
        if _DEAD.search(target) or any(name == target or name.endswith(f".{target}") for name in names):
            continue
        endings = sorted({".".join(name.split(".")[-n:]) for name in names for n in (1, 2, 3)})
        near = get_close_matches(target, [e for e in endings if not e.isdigit()], n=1, cutoff=0.6)
        patch = _targets_patch([near[0] if t == target else t for t in config.adapt.targets or ()]) if near else ()
        found.append(
            Finding(
                "CFG106", "error", "adapt.targets", repr(target), "the ending of a linear or convolution layer's name",
                "No layer of this UNet has a name that ends so, and no adapter would be trained there.",
                f"Did you mean {near[0]!r}?" if near else "Take an ending from `svdtune trace`, or null for the default.", patch,
            )
        )  # fmt: skip
    return found


def _sizes(config: Config, configs: ModelConfigs) -> list[Finding]:
    factor = vae_factor(configs)
    step = max(factor or 1, _size_step())
    found = []
    for key in ("height", "width"):
        size = getattr(config.data, key)
        if size % step == 0:
            continue
        nearest = max(step, round(size / step) * step)
        code, why = ("CFG102", (
            f"This VAE makes one latent of {factor} x {factor} pixels. It floors {size} to {size // step * step} without a word, "
            "and pictures and latents no longer cover the same area."
        )) if step == factor else ("CFG103", (
            "This diffusers' SVD UNet halves the latents three times and joins them again without minding a rest; "
            "from 0.32 on it does."
        ))  # fmt: skip
        found.append(
            Finding(code, "error", f"data.{key}", str(size), f"a multiple of {step}", why,
                    f"Set data.{key}={nearest}.", (f"data.{key}={nearest}",))
        )  # fmt: skip
    return found


def _size_step() -> int:
    """64 with a diffusers whose UNet cannot pad odd latents, 1 otherwise."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        major, minor = (int(part) for part in version("diffusers").split(".")[:2])
    except (PackageNotFoundError, ValueError):
        return 1
    return 64 if (major, minor) < (0, 32) else 1


def _frames(config: Config, configs: ModelConfigs) -> list[Finding]:
    wanted, got = configs.unet.get("num_frames"), config.data.num_frames
    if not isinstance(wanted, int) or wanted < 2 or wanted == got:
        return []
    return [
        Finding(
            "CFG104", "warning", "data.num_frames", str(got), f"{wanted}, as the base was trained",
            "The UNet runs with any number of frames (its positions are computed on the fly), but its temporal layers have "
            f"seen only {wanted}.",
            f"Set data.num_frames={wanted}, or train long enough to teach it {got}.", (f"data.num_frames={wanted}",),
        )
    ]  # fmt: skip


def _dead_targets(config: Config) -> list[Finding]:
    targets = config.adapt.targets or []
    dead = [target for target in targets if _DEAD.search(target)]
    if not dead:
        return []
    alive = [target for target in targets if target not in dead]
    patch = _targets_patch(alive) if alive else ("adapt.targets=[attn2.to_v]",)
    return [
        Finding(
            "CFG105", "error", "adapt.targets", ", ".join(dead), "layers that affect the output",
            "SVD's image context is one token. Softmax over one token is 1 whatever queries and keys are, so these layers get "
            "no gradient and an adapter there trains nothing.",
            f"Set {patch[0]}.", patch,
        )
    ]  # fmt: skip


def _targets_patch(targets: Sequence[str]) -> tuple[str, ...]:
    return (f"adapt.targets=[{','.join(targets)}]",)


def _repeated_clips(config: Config) -> list[Finding]:
    from svdtune.data.catalog import find_videos, split
    from svdtune.launch import world_size

    train, world = config.train, world_size()
    clips = train.batch_size * train.accumulation * world
    try:
        names = [path.relative_to(config.data.root).as_posix() for path in find_videos(config.data.root)]
    except DataError:
        return []  # said by the data stage
    files = len(split(names, config.data.holdout)[0])
    if clips <= files:
        return []
    factors = [f"batch_size {train.batch_size:,}", f"accumulation {train.accumulation:,}"]
    factors += [f"{world} processes"] if world > 1 else []
    lower = [f"train.{key}" for key in ("accumulation", "batch_size") if getattr(train, key) > 1]
    return [
        Finding(
            "CFG107", "warning", "train.batch_size", f"{' x '.join(factors)} = {clips:,} clips per update",
            f"at most {files:,}, the files to train on",
            "Each update sees the same files more than once (in other windows): its gradient is of fewer clips than its size "
            "says, and every update costs as much as several.",
            f"Lower {' or '.join(lower)}, or add clips." if lower else "Add clips, or use fewer processes.",
        )
    ]  # fmt: skip


def _resume(config: Config) -> list[Finding]:
    """The newest checkpoint of this run, from its YAML alone: was it made by a run that trained the same parameters?"""
    import yaml

    folder = _newest(Path(config.run.dir) / config.run.name / "checkpoints")
    if folder is None:
        return []
    try:
        before = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return []  # resume itself says what is wrong with a broken checkpoint
    if not isinstance(before, dict) or not all(isinstance(section, dict) for section in before.values()):
        return []
    now: dict[str, Any] = asdict(config)
    changed = [key for key in _identity_keys(config, before) if _value(before, key) != _value(now, key)]
    if not changed:
        return []
    was = ", ".join(f"{key}={_plain(_value(before, key))}" for key in changed)
    this = ", ".join(f"{key}={_plain(_value(now, key))}" for key in changed)
    moved = changed == ["model.pretrained"] and not _both_named(before, now)
    free = _free_name(Path(config.run.dir), config.run.name)
    return [
        Finding(
            "CFG108", "warning" if moved else "error", "run.name", f"this config: {this}", f"as {folder} was trained: {was}",
            "The same run.name resumes the run. Its checkpoint holds the trained parameters and the optimizer state of that run, "
            "which are of another model, number or shape"
            + (", unless the two paths hold the same weights." if moved else "."),
            f"Set run.name={free} to start a new run, or restore {was}.", (f"run.name={free}",),
        )
    ]  # fmt: skip


def _identity_keys(config: Config, before: Mapping[str, Any]) -> list[str]:
    """Options that decide which parameters are trained; of LoRA's only where both runs use it."""
    keys = ["model.pretrained", "adapt.method", "conditioning.bridge", "train.optimizer"]
    old = before.get("adapt") or {}
    if config.adapt.method == old.get("method") == "lora":
        keys += ["adapt.rank", "adapt.dora"]
        # null is a list too, which only the UNet can spell out: there resume compares name by name.
        keys += ["adapt.targets"] if None not in (config.adapt.targets, old.get("targets")) else []
    return keys


def _value(tree: Mapping[str, Any], key: str) -> Any:
    """An option; one that did not exist when the YAML was written stands at its default."""
    section, name = key.split(".")
    value = (tree.get(section) or {}).get(name, asdict(Config())[section][name])
    return sorted(value) if isinstance(value, list) else value


def _plain(value: Any) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _both_named(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """True when both bases are hub ids or `tiny`: two names are two models, two paths may be one."""
    names = [str((tree.get("model") or {}).get("pretrained")) for tree in (before, now)]
    return all(name in SHIPPED or name == "tiny" for name in names)


def _newest(checkpoints: Path) -> Path | None:
    from svdtune.checkpoint.manifest import read_manifest

    for folder in sorted(checkpoints.glob("step-*"), reverse=True):
        try:
            read_manifest(folder)
        except CheckpointError:
            continue
        return folder
    return None


def _free_name(runs: Path, name: str) -> str:
    number = 2
    while (runs / f"{name}-{number}").exists():
        number += 1
    return f"{name}-{number}"


def _learning_rate(config: Config, configs: ModelConfigs) -> list[Finding]:
    lora = config.adapt.method == "lora"
    limit, usual = (_LORA_LR, 1e-4) if lora else (_FULL_LR, 1e-5)
    limit, usual = (limit, usual) if _svd_sized(configs) else (_ANY_LR, 1e-3)
    if config.train.lr < limit or config.train.optimizer == "adafactor":
        return []
    return [
        Finding(
            "CFG109", "warning", "train.lr", f"{config.train.lr:g}", f"below {limit:g} with adapt.method={config.adapt.method}",
            "Adam moves every trained number by about the learning rate in each step, and weights of a trained UNet are "
            "around 0.02: a few dozen such steps leave nothing of the base.",
            f"Set train.lr={usual:g}.", (f"train.lr={usual:g}",),
        )
    ]  # fmt: skip


def _null_branch(config: Config) -> list[Finding]:
    if config.conditioning.dropout > 0 or config.validation.guidance[1] <= 1 or not _samples(config):
        return []
    return [
        Finding(
            "CFG110", "warning", "conditioning.dropout", "0", "above 0 with validation.guidance above 1",
            f"Guidance {config.validation.guidance[1]:g} subtracts the prediction without the image from the one with it. With "
            "dropout 0 this run never trains the one without, which drifts away from it.",
            "Set conditioning.dropout=0.15, or validation.guidance=[1.0,1.0].", ("conditioning.dropout=0.15",),
        )
    ]  # fmt: skip


def _samples(config: Config) -> bool:
    return bool(config.validation.images) or config.validation.samples > 0


def _noise_levels(config: Config, configs: ModelConfigs) -> list[Finding]:
    low, high = (configs.scheduler.get(key, 0) for key in ("sigma_min", "sigma_max"))
    if not all(isinstance(sigma, int | float) and sigma > 0 for sigma in (low, high)):
        return []
    mean, std = config.objective.p_mean, config.objective.p_std
    inside = _below((log(high) - mean) / std) - _below((log(low) - mean) / std)
    if inside >= 0.5:
        return []
    return [
        Finding(
            "CFG111", "warning", "objective.p_mean", f"p_mean {mean:g}, p_std {std:g}: {inside:.0%} of the draws are noise levels "
            "that sampling visits", f"most of ln(sigma) in [{log(low):.1f}, {log(high):.1f}]",
            f"Sampling goes from sigma {high:g} to {low:g}; what is trained outside never shows in a video.",
            "Set objective.p_mean=1.0 objective.p_std=1.6 (SVD-XT; SVD: 0.7).", ("objective.p_mean=1.0", "objective.p_std=1.6"),
        )
    ]  # fmt: skip


def _below(z: float) -> float:
    return 0.5 * (1 + erf(z / sqrt(2)))


def _noise_aug(config: Config) -> list[Finding]:
    mean, std = config.conditioning.noise_aug
    usual, rare = exp(min(mean, 50)), exp(min(mean + 4 * std, 300))
    if mean <= 0 and rare <= _DROWNED:
        return []
    overflows = mean + 4 * std > _LARGEST
    got = f"mean {mean:g}, standard deviation {std:g}: a usual strength of {usual:.3g}, and now and then {rare:.3g}"
    why = "The strength is the standard deviation of the noise on the first frame, whose pixels lie in [-1, 1]: above 1 the noise is "
    why += "stronger than the picture, and there is nothing left to continue."
    if overflows:
        why += " Numbers as large as the rare ones are no float32 any more: the loss becomes NaN."
    return [
        Finding(
            "CFG112", "error" if overflows else "warning", "conditioning.noise_aug", got, "ln(strength) of mean -3 and deviation 0.5",
            why, "Set conditioning.noise_aug=[-3.0,0.5].", ("conditioning.noise_aug=[-3.0,0.5]",),
        )
    ]  # fmt: skip


def _micro_conditions(config: Config, configs: ModelConfigs) -> list[Finding]:
    if not _svd_sized(configs):
        return []
    found = []
    for key, (low, high), usual in (("fps", _FPS, 7), ("motion_bucket", _MOTION, 127)):
        value = getattr(config.data, key)
        if low <= value <= high:
            continue
        what = "The number is given to the UNet as a condition" + (" (as fps - 1)" if key == "fps" else "")
        found.append(
            Finding("CFG113", "warning", f"data.{key}", f"{value:g}", f"{low} to {high}",
                    f"{what}, and SVD was trained with {low} to {high}: beyond, it means nothing to the base.",
                    f"Set data.{key}={usual}.", (f"data.{key}={usual}",))
        )  # fmt: skip
    return found


def _nothing_to_validate(config: Config) -> list[Finding]:
    validation = config.validation
    samples = validation.samples > 0 and not validation.images
    if config.data.holdout > 0 or not (samples or validation.clips):
        return []
    lost = [name for name, asked in (("held-out loss", validation.clips), ("sample videos", samples)) if asked]
    off = [*(["validation.clips=0"] if validation.clips else []), *(["validation.samples=0"] if samples else [])]
    return [
        Finding(
            "CFG116", "warning", "data.holdout", "0: no clip is held out", "clips to validate on, or validation switched off",
            f"There is nothing to make {' and '.join(lost)} from, so progress would not be seen.",
            f"Set data.holdout=0.1, or say that you want it so: {' '.join(off)}.", ("data.holdout=0.1",),
        )
    ]  # fmt: skip


def _run_among_clips(config: Config) -> list[Finding]:
    run, root = (Path(path).absolute() for path in (config.run.dir, config.data.root))
    if not run.is_relative_to(root):
        return []
    return [
        Finding(
            "CFG118", "warning", "run.dir", str(config.run.dir), f"a folder outside data.root = {config.data.root}",
            "data.root is searched with all its folders: when the run goes on, its own sample videos would be taken for clips.",
            f"Set run.dir to a folder that is not below {root}, or data.root to the folder that holds only the clips.",
        )
    ]  # fmt: skip


def _mostly_held_out(config: Config) -> list[Finding]:
    if config.data.holdout <= 0.5:
        return []
    return [
        Finding(
            "CFG119", "warning", "data.holdout", f"{config.data.holdout:g}: more files held out than trained on", "at most 0.5",
            "data.holdout is the share kept away from training, not the share to train on.", "Set data.holdout=0.1.",
            ("data.holdout=0.1",),
        )
    ]  # fmt: skip


def _unknown_codes(config: Config) -> list[Finding]:
    """CFG114, in both lists of codes."""
    found = [rule for rule in RULES if not only_explained(rule)]
    ignore = ("preflight.ignore", config.preflight.ignore, found, "that preflight can find", "It silences nothing.")
    stop_on = ("preflight.stop_on", config.preflight.stop_on, IN_FLIGHT, "of the running training", "It stops nothing.")
    return [
        _unknown(where, code, known, expected, why)
        for where, codes, known, expected, why in (ignore, stop_on)
        for code in codes
        if code not in known
    ]


def _unknown(where: str, code: str, known: Sequence[str], expected: str, why: str) -> Finding:
    near = get_close_matches(code.upper(), known, n=1)
    listed = f"One of {', '.join(known)}." if len(known) < _FEW_CODES else "Take a code from the report."
    fix = f"Did you mean {near[0]}?" if near else listed
    return Finding("CFG114", "warning", where, code, f"the code of a rule {expected}", why, fix)


def _svd_sized(configs: ModelConfigs) -> bool:
    blocks = configs.unet.get("block_out_channels")
    return isinstance(blocks, list) and bool(blocks) and isinstance(blocks[0], int) and blocks[0] >= _WIDE
