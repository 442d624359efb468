"""A training script as people write them: what comes after the classes breaks."""

from __future__ import annotations

from dataclasses import dataclass

import no_such_package_for_sure
import torch
from torch import nn


@dataclass
class Sizes:
    width: int = 6


class Small(nn.Module):
    def __init__(self, hidden=4):
        super().__init__()
        self.first = nn.Linear(Sizes().width, hidden)
        self.last = nn.Linear(5, 2)

    def forward(self, x):
        print("forward")
        return self.last(helper(self.first(x)))


def make_small(hidden):
    return Small(hidden)


print("loading")
data = no_such_package_for_sure.load("pictures")
ready = Small(5)
for _ in range(10**12):
    torch.zeros(1)
raise RuntimeError("no pictures here")


def helper(x):
    return x.relu()
