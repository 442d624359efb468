"""`memory.attention`: which kernel computes the UNet's self-attention, layer by layer and shape by shape.

Spatial layers see a frame: few rows (clips x frames), up to 9,216 tokens. Temporal layers see one position over time: 14 to 25
tokens, and a row for every latent position of every clip (9,216 a clip at 576 x 1024).
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

import torch
from diffusers.models.attention import BasicTransformerBlock, TemporalBasicTransformerBlock
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from svdtune.errors import ConfigError

Backend = Literal["auto", "sdpa", "flash", "cudnn", "xformers", "math"]
Kernel = Literal["sdpa", "flash", "cudnn", "efficient", "xformers", "math"]

MOST_ROWS = 65_535
"""Kernels put rows on an axis of the CUDA grid that ends here ("invalid configuration argument"): more are computed in parts."""

SPATIAL: dict[int, Kernel] = {9: "cudnn"}
"""What auto takes in spatial layers, by the major number of the GPU's compute capability; others: flash.

On an H200 cuDNN takes 0.64 of flash's time there, and in temporal layers the memory-efficient kernel 0.32 (benchmarks/attention.py)."""
TEMPORAL: Kernel = "efficient"
"""What every choice but sdpa and math takes in temporal layers."""

_OF_TORCH = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_OTHERWISE = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_HALF = (torch.bfloat16, torch.float16)
_AMPERE = (8, 0)
_WIDEST_HEAD = {"flash": 256, "cudnn": 128, "xformers": 256}


@dataclass(frozen=True)
class Site:
    """What the choice of a kernel depends on."""

    temporal: bool
    head_dim: int
    dtype: torch.dtype
    """It is computed in, after autocast."""
    capability: tuple[int, int] | None
    """Of the GPU; None on a CPU."""


def kernel_for(backend: Backend, site: Site) -> Kernel:
    """The kernel that computes attention there; sdpa, where torch chooses, for what the wanted one cannot do."""
    if backend in ("sdpa", "math"):
        return backend
    if site.capability is None:
        return "sdpa"
    spatial = SPATIAL.get(site.capability[0], "flash") if backend == "auto" else backend
    wanted = TEMPORAL if site.temporal else spatial
    return wanted if can(wanted, site, site.capability) else "sdpa"


def use_attention(unet: nn.Module, backend: Backend) -> None:
    """Every self-attention of `unet` is computed by what `backend` means on this machine's GPU, or by torch's own on a CPU."""
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    for block in unet.modules():
        if isinstance(block, BasicTransformerBlock | TemporalBasicTransformerBlock):
            temporal = isinstance(block, TemporalBasicTransformerBlock)
            block.attn1.set_processor(SelfAttention(backend, temporal, capability))  # pyright: ignore[reportArgumentType]


def require_attention(backend: Backend, device: torch.device, dtype: torch.dtype) -> None:
    """Raises ConfigError when `memory.attention` names a kernel that cannot be used on this device, or not in this compute dtype."""
    if reason := unavailable(backend, device, dtype):
        raise ConfigError(
            f"memory.attention: {backend} cannot be used here ({reason}). Use memory.attention=sdpa.",
            ("memory.attention=sdpa",),
        )


def unavailable(backend: Backend, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a backend asked for by name cannot be used; None when it can. xformers is called and not only found."""
    if backend in ("auto", "sdpa", "math"):
        return None
    if backend == "xformers" and importlib.util.find_spec("xformers") is None:
        return "it is not installed"
    if device.type != "cuda":
        return "no NVIDIA GPU is visible, and it has no CPU kernel"
    if backend != "xformers" and (reason := _too_little(device, dtype)):
        return reason
    token = torch.zeros(1, 1, 8, 64, device=device, dtype=dtype)
    try:
        _forced(token, token, token, backend)
    except (ImportError, RuntimeError, ValueError, NotImplementedError, OSError) as error:
        return str(error).strip().split("\n")[0]
    return None


@dataclass(frozen=True)
class SelfAttention:
    """The processor of one self-attention."""

    backend: Backend
    temporal: bool
    capability: tuple[int, int] | None

    def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """(rows, tokens, channels) to the same."""
        layers: tuple[Any, ...] = (attn.to_q, attn.to_k, attn.to_v)
        query, key, value = (layer(hidden_states).unflatten(2, (attn.heads, -1)).transpose(1, 2) for layer in layers)
        kernel = kernel_for(self.backend, self._site(query))
        return attn.to_out[0](attend(query, key, value, kernel).transpose(1, 2).flatten(2))

    def _site(self, query: Tensor) -> Site:
        device = query.device.type
        cast = device != "meta" and torch.is_autocast_enabled(device)  # which meta does not have
        dtype = torch.get_autocast_dtype(device) if cast else query.dtype
        return Site(self.temporal, query.shape[3], dtype, self.capability if device == "cuda" else None)


def attend(query: Tensor, key: Tensor, value: Tensor, kernel: Kernel) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v, all (rows, heads, tokens, head_dim); more rows than MOST_ROWS in equal parts."""
    parts = ceil(query.shape[0] / MOST_ROWS)
    if parts == 1 or kernel == "math":
        return compute(query, key, value, kernel)
    split = zip(*(tensor.chunk(parts) for tensor in (query, key, value)), strict=True)
    return torch.cat([compute(q, k, v, kernel) for q, k, v in split])


def compute(query: Tensor, key: Tensor, value: Tensor, kernel: Kernel) -> Tensor:
    """The one place that all attention of the UNet comes through, on at most MOST_ROWS rows (math: on any number)."""
    if kernel == "math":
        weights = torch.softmax(query @ key.transpose(2, 3) * query.shape[3] ** -0.5, dim=3)
        return weights.to(value.dtype) @ value
    if kernel == "xformers":
        return _xformers(query, key, value)
    if kernel == "sdpa":
        return scaled_dot_product_attention(query, key, value)
    with sdpa_kernel([_OF_TORCH[kernel], *_OTHERWISE], set_priority=True):
        return scaled_dot_product_attention(query, key, value)


def can(kernel: Kernel, site: Site, capability: tuple[int, int]) -> bool:
    """Whether a kernel computes that head width in that dtype on a GPU of that capability."""
    if kernel == "xformers":
        return site.head_dim <= _WIDEST_HEAD[kernel]
    if kernel in ("flash", "cudnn"):
        fits = site.head_dim % 8 == 0 and site.head_dim <= _WIDEST_HEAD[kernel]
        return fits and site.dtype in _HALF and capability >= _AMPERE
    return True


def _xformers(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]

    # It takes (rows, tokens, heads, head_dim), and knows nothing of autocast.
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    swapped = (tensor.to(dtype).transpose(1, 2) for tensor in (query, key, value))
    return memory_efficient_attention(*swapped).transpose(1, 2)


def _too_little(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype not in _HALF:
        return "it computes in bf16 or fp16, and train.precision=no is float32"
    capability = torch.cuda.get_device_capability(device)
    if capability < _AMPERE:
        return f"it needs compute capability 8.0 (Ampere), this GPU has {capability[0]}.{capability[1]}"
    return None


def _forced(query: Tensor, key: Tensor, value: Tensor, backend: Backend) -> Tensor:
    """That kernel or an error."""
    if backend == "xformers":
        return _xformers(query, key, value)
    with sdpa_kernel(_OF_TORCH[backend]):
        return scaled_dot_product_attention(query, key, value)
