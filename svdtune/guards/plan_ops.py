"""One operator as the GPU does it: FLOPs, bytes moved, seconds at the least, and what its kernel allocates for itself.

Formulas are torch's own (`torch.utils.flop_counter`); a kernel's private memory is from the source of the kernel, or measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
_FLASH_BACKWARD = aten._scaled_dot_product_flash_attention_backward
_EFFICIENT_BACKWARD = aten._scaled_dot_product_efficient_attention_backward
_ATTENTION_BACKWARD = {_FLASH_BACKWARD, _EFFICIENT_BACKWARD}
_CONVOLUTION = {aten.convolution, aten.convolution_backward}
_NOTHING = {aten._unsafe_view, aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.lift_fresh}
_ROWS = 128
"""Flash attention's backward pass rounds the number of queries up to its block."""
_LOCK = 16
"""Bytes beside each block of the queries' gradient in the memory-efficient backward pass."""


@dataclass(frozen=True)
class Card:
    """What a GPU reaches at the most."""

    name: str
    half: float
    """FLOP/s of matrix products in bf16 or fp16."""
    tf32: float
    """FLOP/s of float32 convolutions, which cuDNN does in TF32."""
    single: float
    """FLOP/s of float32 matrix products."""
    bandwidth: float
    """Bytes per second of its memory."""


H100 = Card("H100", 800e12, 400e12, 54e12, 3.0e12)


@dataclass
class Cost:
    """A sum over operators."""

    flops: int = 0
    """As executed."""
    model_flops: int = 0
    """Without what flash attention's backward pass computes again."""
    bytes: int = 0
    """Read and written."""
    seconds: float = 0.0
    """Each operator at the speed of arithmetic or of memory, whichever is slower: no kernel is faster."""
    kernels: int = 0

    def add(self, other: Cost) -> None:
        """Count `other` too."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def scale(self, factor: float) -> None:
        """Count all of it so many times."""
        for name, value in vars(self).items():
            setattr(self, name, type(value)(value * factor))

    def since(self, before: Cost) -> Cost:
        """What came on top of `before`."""
        return Cost(**{name: value - getattr(before, name) for name, value in vars(self).items()})


def cost_of(func: Any, args: Any, kwargs: Any, result: Any, card: Card) -> Cost | None:
    """What one operator costs; None for one that computes nothing, such as a view."""
    packet = func.overloadpacket
    if func.is_view or packet in _NOTHING:
        return None
    if packet is aten.copy_ and args[0].device != args[1].device:
        return Cost(kernels=1)  # to the machine's memory and back, beside the computation
    moved = _moved(args, result)
    if packet not in flop_registry:
        return Cost(bytes=moved, seconds=moved / card.bandwidth, kernels=1)
    flops = int(flop_registry[packet](*args, **kwargs, out_val=result))
    # Five products, of which the first is the forward pass again.
    model = flops * 4 // 5 if packet in _ATTENTION_BACKWARD else flops
    return Cost(flops, model, moved, max(flops / _rate(packet, args, card), moved / card.bandwidth), 1)


def _rate(packet: Any, args: Any, card: Card) -> float:
    if next(tensors(args)).dtype in (torch.bfloat16, torch.float16):
        return card.half
    return card.tf32 if packet in _CONVOLUTION else card.single


def tensors(values: Any) -> Iterator[Tensor]:
    """Every tensor among arguments or results, lists opened."""
    for value in values if isinstance(values, list | tuple) else (values,):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors(value)


def _moved(args: Any, result: Any) -> int:
    unique = {(t.untyped_storage()._cdata, t.storage_offset()): t for t in (*tensors(args), *tensors(result))}
    return sum(_distinct(tensor) for tensor in unique.values())


def _distinct(tensor: Tensor) -> int:
    """Bytes in memory: a broadcast axis is one number."""
    if 0 not in tensor.stride():
        return tensor.nbytes
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count * tensor.element_size()


def workspaces(func: Any, args: Any) -> Iterable[int]:
    """Bytes of each block that a CUDA kernel allocates while it runs and that no operator returns."""
    if func.overloadpacket is _FLASH_BACKWARD:
        # torch's flash_api.cpp:mha_bwd: gradient of the queries in float32, and the row sums.
        b, h, s, d = args[1].shape
        rows, width = _up(s, _ROWS), _up(d, 32 if d <= 128 else 64)
        return b * h * rows * width * 4, b * h * rows * 4
    if func.overloadpacket is _EFFICIENT_BACKWARD:
        # torch's attention_backward.cu and kernel_backward.h, of compute capability 8.0 and up: the same, in square blocks.
        b, h, s, d = args[1].shape
        side = 64 if d <= 64 else 128
        blocks = _up(s, side) * _up(d, side) // side**2
        return b * h * blocks * (side * side * 4 + _LOCK), b * h * s * 4
    return ()


def cpu_workspaces(func: Any, args: Any) -> Iterable[int]:
    """The same of a CPU: oneDNN convolves in channels by blocks, and turns what comes in another order."""
    return (args[0].nbytes, args[1].nbytes) if func.overloadpacket is aten.convolution else ()


def _up(size: int, block: int) -> int:
    return -(-size // block) * block
