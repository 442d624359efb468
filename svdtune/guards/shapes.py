"""The real `train_step`, forward and backward, on fake tensors: no weights, no GPU, seconds.

It runs twice: at the user's sizes, and at sizes that are all different, where swapped axes cannot hide.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from diffusers.models.attention import TemporalBasicTransformerBlock
from diffusers.models.resnet import AlphaBlender, TemporalResnetBlock
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from svdtune.config.schema import Config
from svdtune.contracts import Axes, Batch, Draws, LatentBatch, ModelFacts, VideoBatch, require, specs
from svdtune.engine import sharding
from svdtune.errors import ConfigError, ModelError
from svdtune.guards.findings import Finding
from svdtune.guards.memory import Estimate, estimate
from svdtune.guards.place import place_of
from svdtune.guards.plan_record import ASKS_DEVICE
from svdtune.guards.plan_rules import cuda_rules
from svdtune.guards.plan_step import Rehearsed
from svdtune.guards.resume import check_resume
from svdtune.guards.settings import check_targets
from svdtune.guards.told import plain, told, told_arguments
from svdtune.launch import world_size
from svdtune.model.bridge import WEIGHT
from svdtune.model.fake import fake_tensors
from svdtune.model.load import ModelParts, fake_model, known_configs
from svdtune.model.recompute import kept
from svdtune.trainer.build import DTYPES, TRAINED, clip_pixels, prepare_networks
from svdtune.trainer.optimizer import make_learning
from svdtune.trainer.step import Parts, train_step

Record = TypeVar("Record")

_CHUNKS = 8
_ODD_CHUNK = 7
"""Frames per VAE chunk in the probe: it divides no batch there, so the last chunk is a short one."""


@dataclass(frozen=True)
class Rehearsal:
    """What running the step on shapes showed."""

    findings: Sequence[Finding]
    needed: Estimate | None = None
    """None when the step at the user's sizes failed."""


def rehearse(config: Config) -> Rehearsal:
    """Build, adapt and step exactly as training does; whatever it raises becomes a finding."""
    try:
        model = _fake(config)
        if missed := check_targets(config, _layers(model.unet)):
            return Rehearsal(missed)
        with stage(config, model) as built:
            return _run_both(config, built)
    except ConfigError as error:
        return Rehearsal([Finding("CFG117", "error", "adapt", str(error), patch=error.patch)])
    except ModelError as error:
        return Rehearsal([Finding("CKP201", "error", "model.pretrained", str(error))])
    except Exception as error:  # whatever building raises here it would raise when training begins
        got = f"the networks cannot be built: {plain(error)}"
        return Rehearsal([Finding("SHP401", "error", place_of(error) or "model", got)])


@dataclass(frozen=True)
class Built:
    """Networks on fake tensors, ready for a step."""

    parts: Parts
    trained: dict[str, nn.Parameter]
    copies: tuple[str, ...]
    """Names handed over as trained whose parameter is not the network's own."""
    batch: type[Batch]
    """What the loader will give."""
    expected: frozenset[str] | None
    """What adapt.method names in this network; None for LoRA, whose layers the targets choose."""


@contextmanager
def stage(config: Config, model: ModelParts) -> Iterator[Built]:
    """Everything `trainer/build.py` makes that the step needs, from the meta `model` to fake tensors."""
    dtype = DTYPES[config.train.precision]
    named = expected_trained(model.unet, config.adapt.method)
    trained = prepare_networks(model, config, on_accelerator=True)
    own = dict(model.unet.named_parameters())
    copies = tuple(name for name, parameter in trained.items() if own.get(name) is not parameter)
    with fake_tensors(model.unet, model.vae, model.image_encoder), _quiet():
        # The parameters were replaced by fake ones of the same names.
        trained = {name: parameter for name, parameter in model.unet.named_parameters() if name in trained}
        yield Built(_parts(model, config, dtype), trained, copies, batch_of(config), named)


def user_axes(config: Config, facts: ModelFacts) -> dict[str, int]:
    """Named sizes of the configuration."""
    data = config.data
    return facts.axes(b=config.train.batch_size, t=data.num_frames, h=data.height, w=data.width)


def distinct_axes(facts: ModelFacts) -> dict[str, int]:
    """Small sizes of which no two are equal, nor equal to a size that the model fixes."""
    taken = {facts.c, facts.z, 2 * facts.z, facts.d, facts.m, facts.f}
    free = (size for size in range(2, 64) if size not in taken)
    b, t = next(free), next(size for size in free if size >= 5)
    h, w = next(size for size in free if size >= 9), next(size for size in free if size >= 16)
    return facts.axes(b=b, t=t, h=facts.f * h, w=facts.f * w)


def batch_of(config: Config) -> type[Batch]:
    """What the loader of this configuration gives: decoded clips, or cached ones."""
    return LatentBatch if config.data.latents else VideoBatch


def fake_record(record: type[Record], axes: Axes) -> Record:
    """A record with tensors of the right shapes and dtypes; what is in them does not matter under fake tensors."""
    made: dict[str, Any] = {
        name: torch.empty(spec.shape(axes), dtype=getattr(torch, spec.dtype, torch.float32))
        for name, spec in specs(record).items()
    }
    return record(**made)


def _fake(config: Config) -> ModelParts:
    return fake_model(known_configs(config.model), bridge=config.conditioning.bridge is not None)


def _layers(unet: nn.Module) -> list[str]:
    return [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d)]


def _run_both(config: Config, built: Built) -> Rehearsal:
    findings = [
        *_precision(config, built.trained),
        *(_trained_set(built) or _of_method(config, built)),
        *_learning(config, built),
        *check_resume(config, built.trained),
    ]
    facts = built.parts.facts
    rehearsed = Rehearsed(config, built.parts, built.trained)
    with cuda_rules():
        rehearsed.before()
        with rehearsed.step(), Strict():
            failed = _attempt(replace(built, parts=rehearsed.parts), user_axes(config, facts))
        if failed:
            return Rehearsal([*findings, *failed])
        findings += _without_gradient(built.trained)
        recording = rehearsed.after()
    needed = estimate(recording, shards=world_size() if sharding() else 1)
    # Recomputing the blocks again would show nothing new and take a quarter of the time.
    with kept(built.parts.unet):
        return Rehearsal([*findings, *_hidden(built)], needed)


def _hidden(built: Built) -> list[Finding]:
    """SHP405: what fails only where all sizes differ. SHP401: what fails only with a short last chunk of frames."""
    axes = distinct_axes(built.parts.facts)
    failed = _attempt(replace(built, parts=replace(built.parts, vae_chunk=_ODD_CHUNK)), axes)
    if failed and not _attempt(built, axes):
        why = "The VAE takes frames in chunks (memory.vae_chunk), and where they do not divide the last chunk is a short one."
        return [replace(finding, code="SHP401", why=f"{why} {finding.why}".strip()) for finding in failed]
    return [replace(finding, code="SHP405", why=f"{_HIDDEN} {finding.why}".strip()) for finding in failed]


_HIDDEN = "At the sizes of the configuration the step passes: two axes that are equally long there are mixed up."


def _attempt(built: Built, axes: Axes) -> list[Finding]:
    """One step; on failure the same step again, watched, to say where it failed."""
    given: list[Finding] = []
    hook = built.parts.unet.register_forward_pre_hook(
        lambda _module, args, kwargs: given.extend(told_arguments(args, kwargs, axes)), prepend=True, with_kwargs=True
    )
    try:
        _step(built, axes)
    except Exception as error:  # whatever the step raises here it would raise on the GPU
        return told(error, built.parts, axes, lambda: _step(built, axes, backward=False))
    finally:
        hook.remove()
    return given[:1]


def _step(built: Built, axes: Axes, *, backward: bool = True) -> None:
    batch, draws = fake_record(built.batch, axes), fake_record(Draws, axes)  # the loop has them until the step is over
    result = train_step(built.parts, batch, draws)
    # The step checks its own records; a check that was taken out must not take the proof along.
    for record in (result.encoded, result.unet_input, result.prediction, result):
        require(record, axes)
    if backward:
        result.loss.backward()


def _precision(config: Config, trained: dict[str, nn.Parameter]) -> list[Finding]:
    """NUM601: the planned dtypes."""
    planned = TRAINED[config.memory.parameters]
    others = [name for name, parameter in trained.items() if parameter.dtype != planned]
    if not others:
        return []
    got = f"{len(others)} of {len(trained)} trained parameters are {_short(trained[others[0]].dtype)}"
    return [
        Finding(
            "NUM601", "error", others[0], got, f"{_short(planned)}, from memory.parameters={config.memory.parameters}",
            "Small updates vanish in half precision when they are rounded to nearest, and fp16 gradients cannot be unscaled.",
            "Cast only frozen parameters to the compute dtype (svdtune/model/adapt.py:adapt does).",
        )
    ]  # fmt: skip


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def expected_trained(unet: nn.Module, method: str) -> frozenset[str] | None:
    """What `adapt.method` names in this network, told by the classes of its layers; None for LoRA.

    Cross-attention of one token has no use for queries and keys: they, and the norm before them, learn with no method.
    """
    if method == "lora":
        return None
    names = {name for name, _ in unet.named_parameters() if name != WEIGHT}
    blocks = [name for name, module in unet.named_modules() if getattr(module, "attn2", None) is not None]
    dead = tuple(f"{block}.{part}." for block in blocks for part in ("attn2.to_q", "attn2.to_k", "norm2"))
    over_time = [(name, module) for name, module in unet.named_modules() if isinstance(module, _OVER_TIME)]
    over_time += [(name, module) for name, module in unet.named_modules() if name.endswith("time_pos_embed")]
    attention = [name for name, module in over_time if isinstance(module, TemporalBasicTransformerBlock)]
    temporal = _below(names, [name for name, _ in over_time])
    chosen = {
        "full": names,
        "temporal": temporal,
        "temporal_attention": _below(names, attention),
        "spatial": names - temporal,
    }
    return frozenset(name for name in chosen[method] if not name.startswith(dead))


_OVER_TIME = (TemporalBasicTransformerBlock, TemporalResnetBlock, AlphaBlender)


def _below(names: Iterable[str], modules: Iterable[str]) -> set[str]:
    prefixes = tuple(f"{module}." for module in modules)
    return {name for name in names if name.startswith(prefixes)}


def _of_method(config: Config, built: Built) -> list[Finding]:
    """SHP408: the trained parameters are those that adapt.method names, all of them and no others."""
    method, trained = config.adapt.method, built.trained.keys() - {WEIGHT}
    wanted = {name for name in trained if "lora_" in name} if built.expected is None else built.expected
    strange, missing = sorted(trained - wanted), sorted(wanted - trained)
    if config.conditioning.bridge and WEIGHT not in built.trained:
        missing.append(WEIGHT)
    if built.copies:
        got = f"{len(built.copies)} copies are handed to the optimizer, not the network's own parameters ({built.copies[0]}, ...)"
        return [_wrong_set(built.copies[0], got, "the parameters that the UNet computes with")]
    if not strange and not missing:
        return []
    told = [f"{len(names)} {kind} ({names[0]}{', ...' if len(names) > 1 else ''})"
            for kind, names in (("too many", strange), ("missing", missing)) if names]  # fmt: skip
    return [_wrong_set((strange or missing)[0], " and ".join(told), f"what adapt.method={method} names")]


_OF_METHOD = "Mend svdtune/model/adapt.py: the method and the parameters that it trains disagree."


def _wrong_set(where: str, got: str, expected: str, fix: str = _OF_METHOD) -> Finding:
    why = "The run would train another part of the model than asked for, or nothing at all."
    return Finding("SHP408", "error", where, got, f"only and all of {expected}", why, fix)


def _learning(config: Config, built: Built) -> list[Finding]:
    """SHP408: optimizer, schedule and averages are made as training makes them, over exactly the trained parameters."""
    kernels = config.train.optimizer == "adamw8bit" and config.memory.parameters == "fp32"
    if kernels and not torch.cuda.is_available():
        return []  # said by the stage env
    try:
        learning = make_learning(config, built.trained, torch.device("cpu"))
    except ConfigError as error:
        return [Finding("ENV008", "error", "train.optimizer", str(error))]
    except Exception as error:  # whatever it raises here it would raise when training begins
        why = "Optimizer and learning rate schedule are made as training makes them."
        return [Finding("SHP401", "error", place_of(error), plain(error), "an optimizer and its schedule", why)]
    held = [id(parameter) for group in learning.optimizer.param_groups for parameter in group["params"]]
    own, fix = [id(parameter) for parameter in built.trained.values()], "Mend svdtune/trainer/optimizer.py."
    if held != own:
        got = f"the optimizer holds {len(held)} parameters, of which {len(set(held) & set(own))} are among the {len(own)} trained ones"
        return [_wrong_set("train.optimizer", got, "the trained parameters, in their order", fix)]
    averaged = len(learning.ema.shadow_params) if learning.ema else len(own)
    if averaged == len(own):
        return []
    got = f"{averaged} parameters are averaged, {len(own)} are trained"
    return [_wrong_set("train.ema", got, "the trained parameters, in their order", fix)]


def _trained_set(built: Built) -> list[Finding]:
    """SHP408: what requires a gradient is what is handed to the optimizer."""
    learning = {name for name, parameter in built.parts.unet.named_parameters() if parameter.requires_grad}
    if not (different := learning ^ built.trained.keys()):
        return []
    more = ", ..." if len(different) > 1 else ""
    return [
        Finding(
            "SHP408", "error", min(different), f"{len(learning)} parameters require a gradient, {len(built.trained)} are trained: "
            f"{len(different)} are in one set only ({min(different)}{more})", "the same parameters",
            "Those would get gradients and never move, or be saved without having learned.",
            "Let svdtune/model/adapt.py:adapt alone decide which parameters require a gradient.",
        )
    ]  # fmt: skip


class Strict(TorchDispatchMode):
    """What fake tensors let pass raises: products of two dtypes, as real tensors do, and random numbers drawn inside the step."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is ASKS_DEVICE:
            return args[0].device
        if torch.Tag.nondeterministic_seeded in func.tags and "dot_product" not in str(func):
            raise RuntimeError(
                f"{func} draws random numbers inside the step; everything random arrives in Draws, keyed by the sample"
            )
        if func.overloadpacket in _PRODUCTS:
            dtypes = [argument.dtype for argument in args if isinstance(argument, torch.Tensor)]
            if len(set(dtypes)) > 1:
                first, other = dtypes[0], next(dtype for dtype in dtypes if dtype != dtypes[0])
                raise RuntimeError(f"input and weight should have the same dtype, but got {first} and {other}")
        return func(*args, **(kwargs or {}))


_PRODUCTS = {getattr(torch.ops.aten, name) for name in ("convolution", "mm", "addmm", "bmm", "baddbmm")}


def _without_gradient(trained: dict[str, nn.Parameter]) -> list[Finding]:
    """SHP406: a parameter that should learn and has no part in the loss."""
    lost = [name for name, parameter in trained.items() if parameter.grad is None]
    if not lost:
        return []
    more = ", ..." if len(lost) > 1 else ""
    return [
        Finding(
            "SHP406", "error", "train_step", f"{len(lost)} of {len(trained)} trained parameters get no gradient ({lost[0]}{more})",
            "a gradient for each", "They would stay as they are for the whole run, and with several GPUs DDP stops with "
            "\"Expected to have finished reduction in the prior iteration\".",
            "Look for a detach, a no_grad or a module that is not called on the way from these parameters to the loss.",
        )
    ]  # fmt: skip


def _parts(model: ModelParts, config: Config, dtype: torch.dtype) -> Parts:
    # Fake pictures take no memory: a large batch in small chunks would encode for minutes.
    chunk = max(config.memory.vae_chunk, config.train.batch_size * config.data.num_frames // _CHUNKS)
    return Parts(model.unet, model.vae, model.image_encoder, clip_pixels(model), model.facts, dtype, chunk)


@contextmanager
def _quiet() -> Iterator[None]:
    """torch logs each failure of a fake operator as an error of its own; the finding says it better."""
    with ExitStack() as undo:
        for name in ("torch._subclasses.fake_tensor", "torch._subclasses.fake_utils", "torch._subclasses"):
            logger = logging.getLogger(name)
            undo.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)
        yield
