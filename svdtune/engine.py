"""How the processes of a run share the network: a copy each (DDP), or a part each (FSDP2), as an accelerate config asks for. No torch.

`accelerate launch` hands its config on in environment variables; they are read here and nowhere else.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass

BLOCKS = ("SpatioTemporalResBlock", "BasicTransformerBlock", "TemporalBasicTransformerBlock")
"""The repeated blocks of diffusers' SVD UNet, which names none itself: each is gathered when it computes, and let go after."""

_FSDP = "ACCELERATE_USE_FSDP"
_OTHERS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
_WHOLE_LOADING = "FSDP_CPU_RAM_EFFICIENT_LOADING"
_FIX = "configs/accelerate/fsdp2.yaml and configs/accelerate/multi_gpu.yaml are configs that work"


@dataclass(frozen=True)
class Sharding:
    """FSDP2, as the accelerate config has it."""

    reshard_after_forward: bool = True
    """Blocks are let go between forward and backward: less memory, one more gathering each."""


@dataclass(frozen=True)
class Unfit:
    """What svdtune cannot train with."""

    variable: str
    value: str
    expected: str
    why: str
    fix: str

    def __str__(self) -> str:
        return f"{self.variable}={self.value}: expected {self.expected}. {self.why} {self.fix}"


def sharding(environ: Mapping[str, str] = os.environ) -> Sharding | None:
    """FSDP2 where it is asked for."""
    if not _on(environ, _FSDP):
        return None
    return Sharding(reshard_after_forward=environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false")


def unfit(environ: Mapping[str, str] = os.environ) -> Unfit | None:
    """The first thing asked for that svdtune does not do, or None."""
    for variable, engine in _OTHERS.items():
        if _on(environ, variable):
            why = f"svdtune trains with one process, DDP or FSDP2; {engine} wraps the network in ways that its checkpoints do not know."
            fix = f"Run `unset {variable}`, or take {engine} out of the accelerate config: {_FIX}."
            return Unfit(variable, environ[variable], "not set", why, fix)
    return _unfit_fsdp(environ) if _on(environ, _FSDP) else None


@contextmanager
def set_aside(environ: MutableMapping[str, str] = os.environ) -> Iterator[None]:
    """While it lasts accelerate sees nothing of FSDP and brings plain processes up; what shards is svdtune.

    For good off is loading on the first rank alone: transformers would give the others empty weights.
    """
    asked = environ.pop(_FSDP, None)
    if asked is not None:
        environ[_WHOLE_LOADING] = "false"
    try:
        yield
    finally:
        if asked is not None:
            environ[_FSDP] = asked


def _unfit_fsdp(environ: Mapping[str, str]) -> Unfit | None:
    version = environ.get("FSDP_VERSION", "1")
    if version != "2":
        why = "FSDP1 flattens parameters of several layers into one, so none has its name or dtype any more."
        return Unfit("FSDP_VERSION", version, "2", why, _in_config("fsdp_version: 2"))
    if _on(environ, "FSDP_OFFLOAD_PARAMS"):
        why = "Sharded parameters stay on the device that trains them."
        return Unfit("FSDP_OFFLOAD_PARAMS", "true", "false", why, _in_config("fsdp_offload_params: false"))
    if _on(environ, "FSDP_ACTIVATION_CHECKPOINTING"):
        why = "svdtune recomputes activations itself, by memory.checkpointing of its own config."
        fix = _in_config("fsdp_activation_checkpointing: false")
        return Unfit("FSDP_ACTIVATION_CHECKPOINTING", "true", "false", why, fix)
    if (ignored := environ.get("FSDP_IGNORED_MODULES", "None")) not in ("", "None"):
        why = "Every parameter is sharded, and what is saved is put together from the shards."
        return Unfit("FSDP_IGNORED_MODULES", ignored, "not set", why, "Take fsdp_ignored_modules out of fsdp_config.")
    return _unfit_wrapping(environ)


def _unfit_wrapping(environ: Mapping[str, str]) -> Unfit | None:
    why = "svdtune knows the blocks of the UNet and shards them one by one."
    fix = f"Take fsdp_auto_wrap_policy and fsdp_transformer_layer_cls_to_wrap out of fsdp_config: {_FIX}."
    policy = environ.get("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    if policy.upper() != "TRANSFORMER_BASED_WRAP":
        return Unfit("FSDP_AUTO_WRAP_POLICY", policy, "not set, or TRANSFORMER_BASED_WRAP", why, fix)
    named = environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "")
    if named and {name.strip() for name in named.split(",")} != set(BLOCKS):
        return Unfit("FSDP_TRANSFORMER_CLS_TO_WRAP", named, f"not set, or {','.join(BLOCKS)}", why, fix)
    return None


def _in_config(line: str) -> str:
    return f"Write `{line}` under fsdp_config of the accelerate config: {_FIX}."


def _on(environ: Mapping[str, str], variable: str) -> bool:
    return environ.get(variable, "").lower() in ("1", "true", "yes", "on")
