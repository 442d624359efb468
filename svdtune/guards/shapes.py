"""The real `train_step`, forward and backward, on fake tensors: no weights, no GPU, seconds.

It runs twice: at the user's sizes, and at sizes that are all different, where swapped axes cannot hide.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from svdtune.config.schema import Config
from svdtune.contracts import Axes, Draws, ModelFacts, VideoBatch, specs
from svdtune.errors import ConfigError, ModelError
from svdtune.guards.findings import Finding
from svdtune.guards.memory import ASKS_DEVICE, Estimate, LiveStorages, estimate
from svdtune.guards.resume import check_resume
from svdtune.guards.settings import check_targets
from svdtune.guards.told import plain, told, told_arguments
from svdtune.model.bridge import WEIGHT
from svdtune.model.fake import fake_tensors
from svdtune.model.load import ModelParts, fake_model, known_configs
from svdtune.trainer.build import DTYPES, clip_pixels, prepare_networks
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
        building = stage(config, model)
        built = building.__enter__()
    except ConfigError as error:
        return Rehearsal([Finding("CFG117", "error", "adapt", str(error), patch=error.patch)])
    except ModelError as error:
        return Rehearsal([Finding("CKP201", "error", "model.pretrained", str(error))])
    except Exception as error:  # whatever building raises here it would raise when training begins
        return Rehearsal([Finding("SHP401", "error", "model", f"the networks cannot be built: {plain(error)}")])
    with ExitStack() as leave:
        leave.push(building.__exit__)
        return _run_both(config, built)


@dataclass(frozen=True)
class Built:
    """Networks on fake tensors, ready for a step."""

    parts: Parts
    trained: dict[str, nn.Parameter]


@contextmanager
def stage(config: Config, model: ModelParts) -> Iterator[Built]:
    """Everything `trainer/build.py` makes that the step needs, from the meta `model` to fake tensors."""
    dtype = DTYPES[config.train.precision]
    trained = prepare_networks(model, config, recompute=True)
    with fake_tensors(model.unet, model.vae, model.image_encoder), _quiet():
        # The parameters were replaced by fake ones of the same names.
        trained = {name: parameter for name, parameter in model.unet.named_parameters() if name in trained}
        yield Built(_parts(model, config, dtype), trained)


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
        *_precision(built.trained),
        *_trained_set(built),
        *_of_method(config, built),
        *check_resume(config, built.trained),
    ]
    facts = built.parts.facts
    with LiveStorages() as storages, Strict():
        failed = _attempt(built, user_axes(config, facts))
    if failed:
        return Rehearsal([*findings, *failed])
    findings += _without_gradient(built.trained)
    networks = (built.parts.unet, built.parts.vae, built.parts.image_encoder)
    needed = estimate(config, networks, built.trained.values(), storages.peak)
    # Recomputing the blocks again would show nothing new and take a quarter of the time.
    built.parts.unet.disable_gradient_checkpointing()
    hidden = _attempt(replace(built, parts=replace(built.parts, vae_chunk=_ODD_CHUNK)), distinct_axes(facts))
    findings += [replace(finding, code="SHP405", why=f"{_HIDDEN} {finding.why}".strip()) for finding in hidden]
    return Rehearsal(findings, needed)


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
    result = train_step(built.parts, fake_record(VideoBatch, axes), fake_record(Draws, axes))
    if backward:
        result.loss.backward()


def _precision(trained: dict[str, nn.Parameter]) -> list[Finding]:
    """NUM601: the planned dtypes."""
    half = [name for name, parameter in trained.items() if parameter.dtype != torch.float32]
    if not half:
        return []
    got = f"{len(half)} of {len(trained)} trained parameters are {str(trained[half[0]].dtype).removeprefix('torch.')}"
    return [
        Finding(
            "NUM601", "error", half[0], got, "float32",
            "Small updates vanish in half precision, and fp16 gradients cannot be unscaled.",
            "Cast only frozen parameters to the compute dtype (svdtune/model/adapt.py:adapt does).",
        )
    ]  # fmt: skip


def _of_method(config: Config, built: Built) -> list[Finding]:
    """SHP408: the trained parameters are of the kind that adapt.method names."""
    parts, wanted = _KINDS.get(config.adapt.method, ((), True))
    strange = (
        [n for n in built.trained if n != WEIGHT and any(part in n for part in parts) is not wanted] if parts else []
    )
    if not strange:
        return []
    more = ", ..." if len(strange) > 1 else ""
    return [
        Finding(
            "SHP408", "error", strange[0], f"{len(strange)} of {len(built.trained)} trained parameters ({strange[0]}{more})",
            f"only what adapt.method={config.adapt.method} names", "The run would train another part of the model than asked for.",
            "Mend svdtune/model/adapt.py: the method and the names it trains disagree.",
        )
    ]  # fmt: skip


_TIME = ("temporal", "time_pos_embed", "mix_factor")
_KINDS = {
    "temporal": (_TIME, True),
    "temporal_attention": (_TIME[:1], True),
    "spatial": (_TIME, False),
    "lora": (("lora_",), True),
}


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
