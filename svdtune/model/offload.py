"""`memory.offload`: what recomputed units keep, their inputs, waits in the machine's memory until the backward pass wants it.

torch's checkpoint saves inputs through saved-tensor hooks, so hooks around its call see exactly them: what is saved inside a unit
is the checkpoint's own business. On a CPU the same happens with plain memory and gains nothing.
"""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

LEAST_BYTES = 2**20
"""Smaller tensors stay: embeddings and the context, which all units share."""


class Offload:
    """Moves the inputs of one network's units. Copies run beside the computation, on a stream of their own."""

    def __init__(self) -> None:
        self._stream: Any = None
        self._leaving: Parked | None = None
        self._newest: weakref.ref[Parked] | None = None

    def around_a_unit(self) -> AbstractContextManager[Any]:
        """For the call of a checkpoint; what it saves is moved."""
        return saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Tensor | Parked:
        if tensor.nbytes < LEAST_BYTES or isinstance(tensor, nn.Parameter):
            return tensor
        self._arrived()
        self._leaving = parked = Parked(tensor, self._side(tensor.device), self._newest)
        self._newest = weakref.ref(parked)
        return parked

    def _unpack(self, kept: Tensor | Parked) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        self._arrived()
        tensor = kept.take()
        if before := kept.before and kept.before():
            before.fetch()  # the unit whose turn is next
        return tensor

    def _arrived(self) -> None:
        """Let the GPU forget the tensor whose copy was begun last: from here on it waits for that copy, a unit's time old."""
        if self._leaving is not None:
            self._leaving.leave()
            self._leaving = None

    def _side(self, device: torch.device) -> Any:
        if device.type == "cuda" and self._stream is None:
            self._stream = torch.cuda.Stream(device)
        return self._stream if device.type == "cuda" else None


class Parked:
    """One tensor in the machine's memory. Belongs to the graph that saved it, and goes with it."""

    def __init__(self, tensor: Tensor, stream: Any, before: weakref.ref[Parked] | None) -> None:
        self.before = before
        """What was parked before it, and is wanted after it."""
        self.device, self.stream = tensor.device, stream
        self.here: Tensor | None = tensor.detach()
        """On the device: not gone yet, or back already."""
        self.host = host_memory(tensor)
        self._copy(self.host, self.here)

    def leave(self) -> None:
        """The copy is done before anything else may use the device's memory of it."""
        self._wait()
        self.here = None

    def fetch(self) -> None:
        """Begin to bring it back."""
        if self.here is None:
            self.here = torch.empty_like(self.host, device=self.device, pin_memory=False)
            self._copy(self.here, self.host)

    def take(self) -> Tensor:
        """It, on the device."""
        self.fetch()
        self._wait()
        tensor, self.here = self.here, None
        assert tensor is not None
        return tensor

    def _copy(self, to: Tensor, source: Tensor) -> None:
        if self.stream is None:
            to.copy_(source)
            return
        # What computes the source, or still reads memory that `to` got, was asked of the current stream before.
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            to.copy_(source, non_blocking=True)

    def _wait(self) -> None:
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)


def host_memory(tensor: Tensor) -> Tensor:
    """Room for `tensor` in the machine's memory; pinned for a GPU, where torch hands the same room out again in the next step."""
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type == "cuda")
