"""All ranks stop at the same micro-step: before each one they ask each other whether somebody wants to."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from svdtune.trainer.signals import StopWish

_REFUSED = 1000
"""More than any signal's number: what watches the run goes before."""


class Halt(Exception):
    """Every rank stops here. `name` of the signal or the finding, `refused` when it was no signal."""

    def __init__(self, name: str, *, refused: bool) -> None:
        super().__init__(name)
        self.name, self.refused = name, refused


@dataclass(frozen=True)
class Agreement:
    """This rank's wish, and the group of all ranks; None for a single process."""

    wish: StopWish = field(default_factory=StopWish)
    group: Any = None

    def check(self) -> None:
        """Called by every rank at the same places. Raises Halt in all of them when one of them wants to stop."""
        wanted = _number(self.wish)
        if self.group is not None:
            highest = torch.tensor(wanted)
            distributed.all_reduce(highest, distributed.ReduceOp.MAX, group=self.group)
            wanted = int(highest)
        if not wanted:
            return
        self.wish.served = True
        refused = wanted == _REFUSED
        other = "another rank" if refused else signal.Signals(wanted).name
        raise Halt(self.wish.name or other, refused=refused)

    def glance(self) -> None:
        """Raises Halt when this rank wants to stop, for work that others wait for: all of them `check` afterwards."""
        if self.wish.name is not None:
            raise Halt(self.wish.name, refused=self.wish.refused)


def agree(wish: StopWish, world_size: int, patience: timedelta) -> Agreement:
    """On the CPU whatever the run computes on: numbers of the GPU would have to be waited for."""
    group = distributed.new_group(backend="gloo", timeout=patience) if world_size > 1 else None
    return Agreement(wish, group)


def _number(wish: StopWish) -> int:
    if wish.name is None:
        return 0
    return _REFUSED if wish.refused else int(signal.Signals[wish.name])
