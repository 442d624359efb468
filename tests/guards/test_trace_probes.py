"""Samples that leak, axes that vanish with one sample, gradients that never come; and the layouts that only look so."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from svdtune.guards.trace import trace
from tests.modules import Made


def line():
    return nn.Linear(8, 8)


LEAKS = {
    "softmax over the batch of (b, t, c)": (lambda s, x: s.l(x).softmax(0), (4, 6, 8), "warning", "dim=-1"),
    "softmax over the batch of (b, c)": (lambda s, x: s.l(x).softmax(0), (4, 8), "error", "dim=-1"),
    "mean over the batch": (lambda s, x: s.l(x) - s.l(x).mean(0), (4, 6, 8), "warning", ""),
    "running sum over the batch": (lambda s, x: s.l(x).cumsum(0), (4, 8), "warning", ""),
    "only the second output": (lambda s, x: (s.l(x), s.l(x).softmax(0)), (4, 8), "error", "dim=-1"),
    "a view that swallows and runs": (
        lambda s, x: s.o(s.l(x).view(-1, 16)),
        (4, 8),
        "error",
        "x.flatten(1) instead of view",
    ),
    "joined along the batch": (lambda s, x: torch.cat([s.l(x), s.l(x)])[:, :3], (4, 8), "error", "dim=1"),
    "(n, 1) - (n,)": (lambda s, x: s.l(x)[:, :1] - x.mean(1), (4, 8), "error", ".unsqueeze(1)"),
}


@pytest.mark.parametrize("name", LEAKS)
def test_a_leak_is_found_and_placed(name):
    forward, shape, severity, fix = LEAKS[name]
    found = trace(Made(forward, l=line(), o=nn.Linear(16, 4)), torch.randn(shape))
    leak = next(finding for finding in found.findings if finding.code == "SHP454")
    assert leak.severity == severity
    assert fix in leak.fix
    assert "test_trace_probes.py" in leak.where
    assert ("Along axis 1 nothing leaks" in leak.why) == (len(shape) == 3)


def test_a_leak_of_the_second_input():
    found = trace(Made(lambda s, x, y: s.l(x) + y.softmax(0), l=line()), torch.randn(4, 8), torch.randn(4, 8))
    assert [(f.code, f.severity) for f in found.findings] == [("SHP454", "error")]


@pytest.mark.parametrize(
    ("layer", "call"),
    [
        (nn.LSTM(8, 8), lambda s, x: s.l(x)[0]),
        (nn.MultiheadAttention(8, 2), lambda s, x: s.l(x, x, x)[0]),
        (
            nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False),
            lambda s, x: s.l(x),
        ),
    ],
    ids=["lstm", "attention", "encoder"],
)
def test_a_layer_that_takes_the_sequence_first_is_noted(layer, call):
    found = trace(Made(call, l=layer), torch.randn(4, 6, 8))
    assert found.findings == ()
    assert any(
        "batch_first=False: axis 1 of the input, 6 long, is taken for the samples" in note for note in found.notes
    )
    pooled = trace(Made(lambda s, x: call(s, x).mean(1), l=layer), torch.randn(4, 6, 8))
    assert "batch_first=True (verified" in pooled.findings[0].fix


def frames_in_the_batch(s, x):
    clips = s.l(x).reshape(2, x.shape[0] // 2, 8)
    return (clips - clips.mean(1, keepdim=True)).reshape(x.shape)


def noisy(s, x):
    return s.l(x) + torch.from_numpy(s.rng.standard_normal(x.shape)).float()


QUIET = {
    "clips and frames folded into axis 0": (frames_in_the_batch, [(6, 8)], "cut into clips and frames"),
    "noise of its own": (noisy, [(4, 8)], ""),
    "a matrix that has as many rows as the batch": (lambda s, x, g: s.l(x) @ g, [(8, 8), (8, 8)], ""),
    "one output for each sample": (lambda s, x: [s.l(row) for row in x], [(4, 8)], "one output for each sample"),
    "every pair of samples": (lambda s, x: s.l(x) @ s.l(x).T, [(4, 8)], ""),
    "an answer in whole numbers": (lambda s, x: (s.l(x), s.l(x).argmax(-1)), [(4, 8)], ""),
    "a state beside the input": (lambda s, x, h: s.c(x, h), [(4, 8), (4, 8)], ""),
}


@pytest.mark.parametrize("name", QUIET)
def test_what_only_looks_like_a_leak(name):
    import numpy as np

    forward, shapes, note = QUIET[name]
    module = Made(forward, l=line(), c=nn.GRUCell(8, 8), rng=np.random.default_rng(0))
    module.c.requires_grad_(forward is QUIET["a state beside the input"][0])
    module.l.requires_grad_(forward is not QUIET["a state beside the input"][0])
    found = trace(module, *(torch.randn(shape) for shape in shapes))
    assert found.findings == (), found
    assert any(note in said for said in found.notes) if note else not found.notes


def test_a_tuple_input_is_cut_with_the_batch():
    module = Made(lambda s, x, state: s.c(x, state), c=nn.LSTMCell(8, 8))
    assert trace(module, torch.randn(4, 8), (torch.randn(4, 8), torch.randn(4, 8))).findings == ()


@pytest.mark.parametrize(
    ("forward", "why", "fix"),
    [
        (lambda s, x: s.l(x).squeeze(0), "squeeze(0) removes the batch axis", "Leave the squeeze out"),
        (lambda s, x: s.l(x)[:, :1].squeeze(), "squeeze() without a dim", "squeeze(1) instead of squeeze()"),
        (lambda s, x: s.l(x)[0] if len(x) == 1 else s.l(x), "the batch axis has length 1, and it is lost", ""),
    ],
)
def test_one_sample(forward, why, fix):
    (found,) = trace(Made(forward, l=line()), torch.randn(4, 8)).findings
    assert (found.code, found.severity) == ("SHP455", "error")
    assert why in found.why
    assert fix in found.fix


def test_a_layer_behind_a_detach_learns_nothing():
    found = trace(Made(lambda s, x: s.b(s.a(x).detach()), a=line(), b=line()), torch.randn(4, 8))
    (cut,) = found.findings
    assert (cut.code, cut.severity, cut.got) == ("SHP452", "warning", "no gradient reaches a")
    assert "`found = trace(Made(lambda s, x: s.b(s.a(x).detach())" in cut.where


def test_an_answer_that_is_no_number_with_a_gradient():
    (found,) = trace(Made(lambda s, x: s.l(x).argmax(-1), l=line()), torch.randn(4, 8)).findings
    assert (found.code, found.severity, found.got) == ("SHP452", "warning", "the output is torch.int64")


def test_a_picture_without_a_batch_axis_behind_a_convolution():
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Flatten(1), nn.Linear(784, 4))
    (found,) = trace(model, torch.randn(1, 28, 28)).findings
    assert (found.code, found.severity) == ("SHP456", "warning")
    assert found.got == "(8, 28, 28) becomes (8, 784): axis 0 is taken for the samples"
    assert "its 8 channels pass for the batch" in found.why
    sound = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Flatten(1), nn.Linear(6272, 4))
    assert trace(sound, torch.randn(2, 1, 28, 28)).findings == ()


def test_broadcasting_on_purpose_is_no_finding():
    pairs = Made(lambda s, x: F.relu(s.l(x)[:, None] - s.l(x)[None]).sum(-1), l=line())
    assert trace(pairs, torch.randn(4, 8)).findings == ()
