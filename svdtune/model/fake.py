"""The full-size model under fake tensors: the real code runs on shapes alone, without weights or memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode


@contextmanager
def fake_tensors(*networks: nn.Module) -> Iterator[FakeTensorMode]:
    """FakeTensorMode with every parameter and buffer of the meta networks replaced by an empty fake CPU tensor.

    Build, cast and inject adapters on `meta` first: doing that inside the mode fails (torch 2.13).
    """
    with _Mode(allow_non_fake_inputs=False) as mode:
        for network in networks:
            for module in network.modules():
                _replace(module)
        yield mode


class _Mode(FakeTensorMode):
    """torch's, whose cache of what operators return is asked in a third of the time.

    torch makes the cache's key of seventeen facts of each tensor, most of them about sparse, quantised and symbolic ones.
    """

    def _prep_args_for_hash(self, result: list[object], args: Any, *rest: Any, **named: Any) -> None:
        if type(args) is dict:
            args = tuple(args.items())
        result.append(len(args))
        for arg in args:
            kind = type(arg)
            if kind is FakeTensor and arg.fake_mode is self and arg.constant is None and arg.layout is torch.strided:
                result += (arg.dtype, arg.shape, arg.stride(), arg.storage_offset(), arg.fake_device, arg.requires_grad,
                           arg.is_inference(), arg.is_conj(), arg.is_neg(), arg.untyped_storage().nbytes())  # fmt: skip
            elif kind in _PLAIN:
                result += (kind, arg)
            elif kind in (tuple, list, dict):
                self._prep_args_for_hash(result, arg, *rest, **named)
            else:
                super()._prep_args_for_hash(result, (arg,), *rest, **named)


_PLAIN = {int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format}


def _replace(module: nn.Module) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        fake = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
        setattr(module, name, nn.Parameter(fake, requires_grad=parameter.requires_grad))
    for name, buffer in list(module.named_buffers(recurse=False)):
        # Buffers made from numbers (CLIP's position ids) may be real: only their shape counts here.
        module.register_buffer(name, torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu"), persistent=False)
