"""CUDA's rules on fake CPU tensors: which operators autocast computes in float32, and which attention kernel runs.

A fake "cuda" tensor on a build without CUDA aborts the process, so the step runs on fake CPU tensors, where autocast leaves normalisation
in half precision and attention has another operator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from svdtune.model import attention

_FLOAT32 = ("group_norm", "layer_norm", "softmax", "log_softmax", "mse_loss", "softplus")
"""Those of torch's list (autocast_mode.h, fp32) that networks like ours call on activations."""
_HOPPER = (9, 0)
aten = torch.ops.aten


@contextmanager
def cuda_rules() -> Iterator[None]:
    """Inside, functions on CPU tensors cast and choose kernels as on this machine's GPU; where there is none, as on an H100.

    The functions themselves are replaced: a function mode is off during a backward pass, and so in what is recomputed there.
    """
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else _HOPPER
    rules: dict[str, Any] = {name: partial(_in_float32, getattr(F, name)) for name in _FLOAT32}
    rules["scaled_dot_product_attention"] = chosen = partial(_of_torch, capability)
    # What lies in the machine's memory is not on the device: here, where all is on a CPU, that is `meta`.
    host = partial(torch.empty_like, device="meta")
    with (
        patch.multiple(F, **rules),
        patch.object(torch, "softmax", partial(_in_float32, torch.softmax)),
        patch.object(attention, "kernel_for", partial(_kernel, attention.kernel_for, capability)),
        patch.object(attention, "compute", partial(_computed, attention.compute, chosen)),
        patch("svdtune.model.offload.host_memory", host),
    ):
        yield


def _kernel(
    kernel_for: Callable[..., attention.Kernel], capability: tuple[int, int], backend: attention.Backend, site: attention.Site
) -> attention.Kernel:  # fmt: skip
    return kernel_for(backend, replace(site, capability=capability))


def _computed(
    compute: Callable[..., Tensor], chosen: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, kernel: attention.Kernel
) -> Tensor:  # fmt: skip
    """Self-attention by the operator of `kernel`. cuDNN counts as flash and xformers as the efficient one: each keeps the same."""
    if kernel == "math":
        return compute(query, key, value, kernel)
    if kernel in ("efficient", "xformers"):
        query, key, value = _cast(query, key, value)
        return _efficient(query, key, value)
    return chosen(query, key, value)


def _of_torch(
    capability: tuple[int, int], query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """(b, heads, t, width) by the operator that torch takes on a GPU: flash in half precision from Ampere on, else the efficient one."""
    query, key, value = _cast(query, key, value)
    if attn_mask is not None:
        return aten._scaled_dot_product_attention_math(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)[
            0
        ]
    if attention.can("flash", attention.Site(False, query.shape[-1], query.dtype, capability), capability):
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    return _efficient(query, key, value, dropout_p, is_causal, scale)


def _efficient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    saves = torch.is_grad_enabled() and query.requires_grad
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, None, saves, dropout_p, is_causal, scale=scale
    )[0]


def _cast(*tensors: Tensor) -> tuple[Tensor, ...]:
    if not torch.is_autocast_enabled("cpu"):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype("cpu")) for tensor in tensors)


def _in_float32(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    if not torch.is_autocast_enabled("cpu"):
        return function(*args, **kwargs)
    with torch.autocast("cpu", enabled=False):
        return function(*map(_float32, args), **{name: _float32(value) for name, value in kwargs.items()})


def _float32(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if half else value
