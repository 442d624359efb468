"""The full-size model under fake tensors: the real code runs on shapes alone, without weights or memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode


@contextmanager
def fake_tensors(*networks: nn.Module) -> Iterator[FakeTensorMode]:
    """FakeTensorMode with every parameter and buffer of the meta networks replaced by an empty fake CPU tensor.

    Build, cast and inject adapters on `meta` first: doing that inside the mode fails (torch 2.13).
    """
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        for network in networks:
            for module in network.modules():
                _replace(module)
        yield mode


def _replace(module: nn.Module) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        fake = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
        setattr(module, name, nn.Parameter(fake, requires_grad=parameter.requires_grad))
    for name, buffer in list(module.named_buffers(recurse=False)):
        # Buffers made from numbers (CLIP's position ids) may be real: only their shape counts here.
        module.register_buffer(name, torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu"), persistent=False)
