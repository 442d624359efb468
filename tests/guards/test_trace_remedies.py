"""Each remedy is what a person would do by hand, gives what it says, and is not offered where it would not help."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from svdtune.guards.trace import trace
from svdtune.guards.tracing.layers import rebuilt
from tests.modules import Made


def chain(*layers):
    return nn.Sequential(*layers)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


REBUILT = [
    (
        chain(nn.Linear(5, 9), nn.LSTM(7, 4, 2, bidirectional=True, proj_size=3, batch_first=True)),
        (2, 6, 5),
        {"input_size": 9},
    ),
    (chain(nn.Linear(5, 9), nn.LayerNorm(7, bias=False)), (2, 5), {"normalized_shape": 9}),
    (chain(nn.Linear(5, 9), nn.RMSNorm(7)), (2, 5), {"normalized_shape": 9}),
    (chain(nn.Conv2d(3, 8, 1), nn.GroupNorm(4, 12)), (2, 3, 6, 6), {"num_channels": 8}),
    (chain(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(12, affine=False)), (2, 3, 6, 6), {"num_features": 8}),
    (
        chain(nn.Conv2d(3, 8, 1), nn.Conv2d(12, 4, 3, padding=1, padding_mode="circular", groups=4)),
        (2, 3, 6, 6),
        {"in_channels": 8},
    ),
    (chain(nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(12, 4, 3, 2, 1, 1)), (2, 3, 6, 6), {"in_channels": 8}),
    (chain(nn.Conv2d(3, 8, 1), nn.PReLU(12)), (2, 3, 6, 6), {"num_parameters": 8}),
    (chain(nn.Linear(5, 9), nn.GRUCell(7, 4)), (2, 5), {"input_size": 9}),
    (chain(nn.Linear(5, 9), nn.Linear(7, 2)).to(torch.bfloat16), (2, 5), {"in_features": 9}),
]


@pytest.mark.parametrize(
    ("model", "shape", "changed"),
    REBUILT,
    ids=lambda value: type(value[1]).__name__ if isinstance(value, nn.Sequential) else "",
)
def test_a_layer_for_another_size_keeps_its_other_settings(model, shape, changed):
    dtype = next(model.parameters()).dtype
    found = trace(model, torch.randn(shape, dtype=dtype))
    ((keyword, wanted),) = changed.items()
    remedy = next(r for r in found.remedies if f"give 1 {keyword}={wanted}" in r.change)
    by_hand = chain(model[0], rebuilt(model[1], **changed))
    out = by_hand(torch.randn(shape, dtype=dtype))
    out = out[0] if isinstance(out, tuple) else out
    assert remedy.added_parameters == parameters(by_hand) - parameters(model)
    assert remedy.outputs[0] == tuple(out.shape)
    assert "then" not in remedy.change
    was, now = vars(model[1]), vars(by_hand[1])
    same = (
        "proj_size",
        "bidirectional",
        "num_layers",
        "padding_mode",
        "groups",
        "num_groups",
        "affine",
        "output_padding",
    )
    assert all(was[name] == now[name] for name in same if name in was)


def test_groups_that_do_not_divide_are_not_offered():
    for last in (nn.GroupNorm(32, 64), nn.Conv2d(12, 12, 3, groups=12)):
        found = trace(chain(nn.Conv2d(3, 10, 1), last), torch.randn(2, 3, 8, 8))
        assert not any(remedy.change.startswith("give 1 ") for remedy in found.remedies)
        assert any("bridge" in remedy.change for remedy in found.remedies)


def test_a_class_of_its_own_and_a_weight_norm():
    class Mine(nn.Conv2d):
        def __init__(self, i, o):
            super().__init__(i, o, 3, padding=1)

    found = trace(chain(nn.Conv2d(3, 8, 1), Mine(12, 4)), torch.randn(2, 3, 6, 6))
    assert "give 1 in_channels=8 instead of 12" in [remedy.change for remedy in found.remedies]
    normed = chain(nn.Linear(5, 9), nn.utils.parametrizations.weight_norm(nn.Linear(7, 2)))
    assert not any(remedy.change.startswith("give 1 ") for remedy in trace(normed, torch.randn(2, 5)).remedies)


def test_a_tie_that_would_be_cut_is_said():
    table = nn.Embedding(40, 16)
    head = nn.Linear(16, 40, bias=False)
    head.weight = table.weight
    found = trace(
        Made(lambda s, i: s.head(F.pad(s.table(i), (0, 8))), table=table, head=head), torch.randint(0, 40, (2, 5))
    )
    remedy = next(r for r in found.remedies if "in_features=24" in r.change)
    assert "no longer shares its weight with table" in remedy.meaning
    assert remedy.added_parameters == 24 * 40


def table(*shape):
    return nn.Parameter(torch.zeros(shape))


_SHORT = Made(
    lambda s, x: torch.cat([s.u(s.d(x)), x], dim=1), d=nn.Conv2d(3, 4, 3, 2, 1), u=nn.ConvTranspose2d(4, 4, 2, 2)
)
_HEADS = Made(lambda s, x: s.a(*[s.p(x)] * 3)[0], p=nn.Linear(5, 6), a=nn.MultiheadAttention(8, 2, batch_first=True))
_JOINED = Made(lambda s, x: s.o(torch.cat([s.a(x), s.a(x)])), a=nn.Linear(4, 3), o=nn.Linear(6, 2))
_TIMED = Made(lambda s, x: s.c(x) + s.t(x.mean((2, 3))), c=nn.Conv2d(3, 5, 1), t=nn.Linear(3, 5))
_STRIDE = Made(lambda s, x: x + s.c(x), c=nn.Conv2d(3, 5, 3, 2, 1))
_PLACES = Made(lambda s, x: s.l(x) + s.p, l=nn.Linear(4, 6), p=table(1, 12, 6))
_WEIGHT = Made(lambda s, x: F.linear(x, s.w), w=table(6, 3))
_GATED = Made(lambda s, x: s.o(F.glu(s.a(x))), a=nn.Linear(4, 6), o=nn.Linear(6, 2))
FIRST = {
    "frames and channels": (nn.Conv3d(3, 4, 1), (2, 8, 3, 6, 6), "x.permute(0, 2, 1, 3, 4)"),
    "one picture, channels last": (nn.Conv2d(3, 4, 1), (8, 7, 3), "x.permute(2, 0, 1)"),
    "a batch of pictures, channels last": (nn.Conv2d(3, 4, 1), (2, 9, 8, 3), "x.permute(0, 3, 1, 2)"),
    "tokens before features": (chain(nn.Identity(), nn.Conv1d(6, 4, 1)), (2, 9, 6), "x.permute(0, 2, 1)"),
    "time beside a map": (_TIMED, (2, 3, 6, 4), "axes of length 1 behind: x[..., None, None]"),
    "a residual with a stride": (_STRIDE, (2, 3, 16, 12), "nn.Conv2d(3, 5, 1, stride=2) on the first tensor"),
    "positions for a longer sequence": (_PLACES, (2, 7, 4), "take the first 7 positions"),
    "a weight the other way round": (_WEIGHT, (2, 6), "F.linear(x, weight.T)"),
    "attention of another width": (_HEADS, (2, 7, 5), "give p out_features=8 instead of 6"),
    "joined along the batch": (_JOINED, (5, 4), "cat(..., dim=1)"),
}
ALSO = {
    "a skip that is one row short": (_SHORT, (2, 3, 9, 7), "pad the second tensor"),
    "a gate by function": (_GATED, (5, 4), "F.silu instead of F.glu"),
}
CHANGES = FIRST | ALSO


@pytest.mark.parametrize("name", CHANGES)
def test_the_nearest_change_is_first(name):
    module, shape, change = CHANGES[name]
    found = trace(module, torch.randn(shape))
    told = [remedy.change for remedy in found.remedies]
    assert any(change in one for one in (told[:1] if name in FIRST else told)), told
    assert found.findings[0].fix == told[0]


@pytest.mark.parametrize(
    ("given", "wanted"), [(torch.float32, torch.float64), (torch.float16, torch.float32), (torch.int64, torch.float32)]
)
def test_types_are_mended_by_types_alone(given, wanted):
    found = trace(nn.Linear(8, 8).to(wanted), torch.ones(4, 8).to(given))
    assert [remedy.change for remedy in found.remedies] == [f"give the input in the weights' type: x.to({wanted})"]


def test_a_row_that_a_table_does_not_have():
    found = trace(Made(lambda s, i: s.e(i + 10), e=nn.Embedding(10, 4)), torch.randint(0, 10, (2, 5)))
    assert found.remedies == ()
    assert found.failure.expected == "whole numbers from 0 to 9 (num_embeddings=10)"
    assert found.failure.got.startswith("input (2, 5) with numbers from 1")
    assert "add a channel axis" not in found.render()


HELD = {
    "tensors in a list": lambda m: setattr(m, "held", [torch.ones(4)]),
    "tensors in a dict": lambda m: setattr(m, "held", {"a": torch.ones(4)}),
    "a generator": lambda m: setattr(m, "held", torch.Generator()),
    "a lock": lambda m: setattr(m, "held", threading.Lock()),
    "a tensor with a history": lambda m: setattr(m, "held", (torch.ones(4, requires_grad=True) * 2,)),
    "itself": lambda m: vars(m).update(held=[m]),
}


@pytest.mark.parametrize("name", HELD)
@pytest.mark.parametrize("features", [4, 5])
def test_whatever_a_module_holds(name, features):
    module = chain(nn.Linear(4, 4))
    HELD[name](module)
    found = trace(module, torch.randn(3, features))
    assert [finding.code for finding in found.findings] == ([] if features == 4 else ["SHP450"])


def test_a_hook_writes_into_the_copy():
    module = chain(nn.Linear(4, 4), nn.ReLU())
    module.seen = []
    module[0].register_forward_hook(lambda _m, _a, out: module.seen.append(out))
    assert trace(module, torch.randn(3, 4)).findings == ()
    assert module.seen == []


def test_what_cannot_be_looked_into_is_said():
    from svdtune.errors import UsageError

    with pytest.raises(UsageError, match="ScriptModule"):
        trace(torch.jit.script(nn.Linear(2, 2)), torch.randn(1, 2))

    def stops(_s, _x):
        raise SystemExit(5)

    assert "sys.exit(5) was called" in trace(Made(stops), torch.randn(2, 2)).failure.message


def test_an_output_without_the_axis_of_like():
    scalar = trace(Made(lambda s, x: s.l(x).sum(), l=nn.Linear(4, 4)), torch.randn(3, 4), like=(3, 4))
    assert (scalar.findings[0].code, scalar.findings[0].got) == ("SHP453", "the output is ()")
    nothing = trace(Made(lambda s, x: "no", l=nn.Linear(4, 4)), torch.randn(3, 4), like=(3, 4))
    assert nothing.findings[0].got == "no tensor in what it returns"
    moved = trace(nn.Identity(), torch.randn(2, 5, 7), like=(2, 7, 5))
    assert moved.remedies[0].change == "on the output: x.permute(0, 2, 1)"
