"""Modules that are right: no finding, no failure, no remedy."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from svdtune.guards.trace import trace


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.a = nn.Sequential(nn.BatchNorm2d(12), nn.ReLU(inplace=True), nn.Conv2d(12, 12, 3, padding=1))
        self.head = nn.Linear(12, 7)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.a(x)
        return self.head(x.mean((2, 3)))


class Skip(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Conv2d(2, 6, 3, padding=1)
        self.down = nn.Conv2d(6, 10, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(10, 6, 2, stride=2)
        self.out = nn.Sequential(nn.GroupNorm(3, 12), nn.Conv2d(12, 2, 1))

    def forward(self, x):
        a = self.inner(x)
        return self.out(torch.cat([a, self.up(self.down(a))], 1))


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(19, 11)
        self.rnn = nn.LSTM(11, 5, batch_first=True, bidirectional=True)
        self.head = nn.Linear(10, 3)

    def forward(self, ids):
        hidden, _ = self.rnn(self.table(ids))
        return self.head(hidden)


class Loss(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(9, 9)

    def forward(self, x):
        return F.mse_loss(self.net(x), x)


@dataclass
class Answer:
    logits: torch.Tensor
    hidden: dict


class Structured(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(6, 4)

    def forward(self, x):
        y = self.net(x)
        return Answer(y.softmax(-1), {"y": y})


class PairedPictures(nn.Module):
    """Every pair of samples has its number, as in CLIP."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 5), nn.Linear(6, 5)

    def forward(self, x, y):
        return self.a(x) @ self.b(y).T


class Frames(nn.Module):
    """Frames folded into the batch on purpose, and out again."""

    def __init__(self):
        super().__init__()
        self.net = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, video):
        frames = self.net(video.flatten(0, 1))
        return frames.unflatten(0, video.shape[:2])


class FramesKeptFolded(Frames):
    def forward(self, video):
        return self.net(video.flatten(0, 1))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, 4, 3).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(b, t, 12))


class Branching(nn.Module):
    """Values decide: fake tensors cannot follow."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 4)

    def forward(self, x):
        return self.net(x) if x.abs().sum() > 0 else self.net(-x)


def pooled_autoencoder():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.ConvTranspose2d(16, 1, 3, stride=2, padding=1, output_padding=1),
    )  # fmt: skip


SOUND = {
    "transformer": (lambda: nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), [(3, 7, 16)]),
    "transformer, sequence first": (lambda: nn.TransformerEncoderLayer(16, 4, 32), [(7, 3, 16)]),
    "lstm tuple": (lambda: nn.LSTM(6, 4, batch_first=True), [(3, 5, 6)]),
    "lstm, sequence first": (lambda: nn.LSTM(6, 4), [(5, 3, 6)]),
    "residual": (Residual, [(4, 3, 10, 14)]),
    "one picture": (Residual, [(1, 3, 10, 14)]),
    "skip": (Skip, [(2, 2, 8, 12)]),
    "embedding": (Tagger, ["ids"]),
    "1-D": (lambda: nn.Sequential(nn.Conv1d(2, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(5, 1)), [(3, 2, 20)]),
    "loss": (Loss, [(4, 9)]),
    "dataclass": (Structured, [(3, 6)]),
    "pairs": (PairedPictures, [(4, 8), (4, 6)]),
    "frames": (Frames, [(2, 5, 3, 6, 9)]),
    "frames kept folded": (FramesKeptFolded, [(2, 5, 3, 6, 9)]),
    "attention": (Attention, [(2, 5, 12)]),
    "branching": (Branching, [(3, 4)]),
    "dropout": (lambda: nn.Sequential(nn.Linear(7, 9), nn.Dropout(0.5), nn.Linear(9, 2)), [(6, 7)]),
    "pooled autoencoder": (pooled_autoencoder, [(10, 1, 28, 28)]),
    "a batch of grey pictures": (lambda: nn.Sequential(nn.Flatten(1), nn.Linear(108, 6)), [(8, 9, 12)]),
    "frozen": (lambda: nn.Linear(3, 2).requires_grad_(False), [(2, 3)]),
    "gru with lazy head": (lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(4)), [(2, 3, 5)]),
}  # fmt: skip


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_module_has_no_findings(name):
    make, shapes = SOUND[name]
    torch.manual_seed(0)
    inputs = [torch.randint(0, 19, (3, 8)) if s == "ids" else torch.randn(s) for s in shapes]
    found = trace(make(), *inputs)
    assert found.findings == ()
    assert (found.failure, found.remedies, found.ok) == (None, (), True)
    assert found.layers[0].outputs == found.outputs


def test_the_output_that_it_should_have_is_no_finding():
    assert trace(pooled_autoencoder(), torch.randn(10, 1, 28, 28), like=(10, 1, 28, 28)).findings == ()


def test_a_diffusers_unet_has_no_findings():
    from diffusers import UNet2DModel

    unet = UNet2DModel(
        sample_size=16, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=4,
    )  # fmt: skip
    found = trace(unet, torch.randn(2, 3, 16, 16), torch.tensor([3, 9]), like=(2, 3, 16, 16))
    assert (found.findings, found.notes) == ((), ())


def test_the_module_and_the_random_state_stay_as_they_are():
    model = Residual()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    trace(model, torch.randn(4, 3, 10, 14, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_huge_module_costs_nothing_and_says_what_was_skipped():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(20_000, 20_000), nn.Linear(20_000, 5))
    found = trace(model, torch.randn(2, 20_000))
    assert found.outputs == ((2, 5),)
    assert found.findings == ()
    assert found.notes == (
        "run on shapes alone, batch probes skipped: 400,120,005 parameters (the limit is 50,000,000)",
    )


def test_one_picture_without_a_batch_axis_in_a_convolution():
    """Convolutions take it; nothing is known of a batch, so nothing is said."""
    module = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(0), nn.Linear(5 * 14 * 14, 2))
    assert trace(module, torch.zeros(3, 16, 16)).findings == ()


def test_an_output_that_is_a_parameter():
    class Prompt(nn.Module):
        def __init__(self):
            super().__init__()
            self.learned = nn.Parameter(torch.ones(7, 4))

        def forward(self, x):
            return self.learned

    assert trace(Prompt(), torch.zeros(2, 3)).findings == ()


def test_a_compiled_part_takes_no_hooks():
    module = nn.Sequential(nn.Linear(6, 5), torch.jit.script(nn.Sequential(nn.Linear(5, 5), nn.ReLU())))
    report = trace(module, torch.zeros(3, 6))
    assert report.findings == ()
    assert report.failure is None
