"""Modules that are wrong: the module named, what came, what was expected, and remedies that were run."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from svdtune.guards.trace import trace
from tests.modules import Made


class Digits(nn.Module):
    """Two convolutions with pooling, then a Linear of the wrong width; forward returns (output, x)."""

    def __init__(self, features=1050):
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2))
        self.conv2 = nn.Sequential(nn.Conv2d(16, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2))
        self.out = nn.Linear(features, 10)

    def forward(self, x):
        x = self.conv2(self.conv1(x))
        x = x.view(x.size(0), -1)
        return self.out(x), x


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, *gradients):
        return gradients[0][:, :2]


def inplace(self, x):
    y = torch.sigmoid(self.a(x))
    y += 1
    return self.b(y)


def flattened(self, x):
    return self.head(self.conv(x).flatten())


def swapped(self, x):
    y = self.a(x)
    return self.b(y.view(y.shape[1], y.shape[0], y.shape[2]).mean(0))


def squeezed(self, x):
    return self.head(x).squeeze()


def gated(self, x):
    return self.b(F.glu(self.a(x), dim=1))


def detached(self, x):
    return self.b(self.a(x)).detach()


def viewed(self, x):
    return self.b(self.a(x).transpose(1, 2).view(x.shape[0], -1))


def joined(self, x):
    return torch.cat([self.up(self.down(x)), x], 1)


def added(self, x):
    return self.a(x) + x


def over_batch(self, x):
    return torch.softmax(self.a(x), 0)


def custom(self, x):
    return self.b(WrongGradient.apply(self.a(x)))


def grown(self, x):
    return self.head(x.view(-1, 91)).relu()


def changes(found):
    return {remedy.change: remedy.added_parameters for remedy in found.remedies}


def only(found):
    assert len(found.findings) == 1, found
    return found.findings[0]


def test_the_case_of_1568():
    found = trace(Digits(), torch.randn(2, 1, 28, 28))
    failure = found.failure
    assert (failure.module, failure.type, failure.stage) == ("out", "Linear", "forward")
    assert failure.message == "RuntimeError: mat1 and mat2 shapes cannot be multiplied (2x1568 and 1050x10)"
    assert "1568 = 32·7·7: channels × height × width" in failure.why
    assert "1050 is no multiple of 32 channels" in failure.why
    assert changes(found)["give out in_features=1568 instead of 1050"] == (1568 - 1050) * 10
    assert changes(found)["put a bridge nn.Linear(1568, 1050) before out"] == 1568 * 1050 + 1050
    assert len(found.remedies) == 2, "what did not run is no remedy"
    assert found.remedies[0].outputs == ((2, 10), (2, 1568))
    assert [layer.failed for layer in found.layers if layer.path == "out"] == [True]
    assert not found.ok


def test_another_width_that_another_picture_would_fit():
    found = trace(Digits(2048), torch.randn(3, 1, 20, 20))
    assert "800 = 32·5·5" in found.failure.why
    assert "2048 = 32·8·8 would be a map of 8×8" in found.failure.why
    assert "give out in_features=800 instead of 2048" in changes(found)


def test_a_pool_that_should_not_be_there():
    found = trace(Digits(32 * 14 * 14), torch.randn(2, 1, 28, 28))
    assert changes(found)["remove the pooling conv1.2"] == 0


def test_fake_wording_is_that_of_real_tensors():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8_000, 8_000), nn.Linear(7_000, 3))
    found = trace(model, torch.randn(5, 8_000))
    assert found.failure.message == "RuntimeError: mat1 and mat2 shapes cannot be multiplied (5x8000 and 7000x3)"
    assert "give 1 in_features=8000 instead of 7000" in changes(found)


CASES = {
    "conv channels": (nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(9, 4, 3)), (2, 3, 12, 15), "1",
                      {"give 1 in_channels=8 instead of 9": -36, "put a bridge nn.Conv2d(8, 9, 1) before 1": 81}),
    "channels last": (nn.Sequential(nn.Conv2d(3, 8, 3)), (2, 12, 15, 3), "0",
                      {"give the axes before 0 another order: x.permute(0, 3, 1, 2)": 0}),
    "grey for colour": (nn.Sequential(nn.Conv2d(3, 8, 3)), (2, 1, 12, 15), "0",
                        {"repeat the channel before 0: x.expand(-1, 3, -1, -1)": 0}),
    "alpha": (nn.Sequential(nn.Conv2d(3, 8, 3)), (2, 4, 12, 15), "0", {"drop the last channel before 0: x[:, :3]": 0}),
    "batch norm": (nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(6)), (2, 3, 12, 15), "1",
                   {"give 1 num_features=8 instead of 6": 4}),
    "norm of another rank": (nn.Sequential(nn.Linear(5, 6), nn.BatchNorm2d(6)), (4, 5), "1",
                             {"make 1 an nn.BatchNorm1d(6)": 0}),
    "lstm width": (nn.Sequential(nn.LSTM(7, 4, batch_first=True)), (2, 5, 9), "0",
                   {"give 0 input_size=9 instead of 7": 4 * 4 * 2, "put a bridge nn.Linear(9, 7) before 0": 70}),
    "lstm transposed": (nn.Sequential(nn.LSTM(7, 4, batch_first=True)), (2, 7, 9), "0",
                        {"give the axes before 0 another order: x.permute(0, 2, 1)": 0}),
    "not flattened": (nn.Sequential(nn.Linear(180, 6)), (2, 12, 15), "0", {"flatten the input of 0: x.flatten(1)": 0}),
    "glu module": (nn.Sequential(nn.Conv1d(2, 12, 3), nn.GLU(1), nn.Conv1d(12, 3, 3)), (2, 2, 20), "2",
                   {"give 2 in_channels=6 instead of 12": -54, "replace 1 (GLU) by nn.SiLU()": 0}),
    "no channel axis": (nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(8 * 10 * 13, 2)), (4, 12, 15), "0",
                        {"add a channel axis to the input: x.unsqueeze(1)": 0}),
    "no batch axis": (nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 10 * 13, 2)), (3, 12, 15), "2",
                      {"add the batch axis to the input: x.unsqueeze(0)": 0}),
    "layer norm": (nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(7)), (2, 3, 5), "1", {"give 1 normalized_shape=6 instead of 7": -2}),
    "view": (Made(viewed, a=nn.Conv1d(3, 4, 1), b=nn.Linear(36, 2)), (2, 3, 9), "Made", None),
    "cat": (Made(joined, down=nn.Conv2d(3, 5, 3, 2, 1), up=nn.ConvTranspose2d(5, 5, 2, 2)), (2, 3, 9, 11), "Made", None),
    "add": (Made(added, a=nn.Conv2d(3, 8, 1)), (2, 3, 9, 11), "Made", None),
    "functional glu": (Made(gated, a=nn.Conv1d(2, 10, 1), b=nn.Conv1d(10, 3, 1)), (2, 2, 6), "b",
                       {"give b in_channels=5 instead of 10": -15}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_module_and_a_remedy(name):
    module, shape, where, remedies = CASES[name]
    found = trace(module, torch.randn(shape))
    assert found.failure.module == where
    assert changes(found), found
    if remedies is not None:
        assert remedies.items() <= changes(found).items(), changes(found)
    assert only(found).code == "SHP450"
    assert only(found).verified


def test_integers_for_an_embedding():
    found = trace(nn.Sequential(nn.Embedding(17, 5), nn.Linear(5, 2)), torch.randn(2, 6))
    assert found.failure.module == "0"
    assert "give the input as row numbers from 0 to 16 (int64)" in changes(found)


def test_an_operation_in_a_forward_is_named_by_its_line():
    found = trace(Made(viewed, a=nn.Conv1d(3, 4, 1), b=nn.Linear(36, 2)), torch.randn(2, 3, 9))
    assert "`return self.b(self.a(x).transpose(1, 2).view(x.shape[0], -1))`" in found.failure.why
    assert found.failure.source.startswith("test_trace_broken.py:")
    assert next(iter(changes(found))).startswith("reshape instead of view in Made (test_trace_broken.py:")


def test_a_glu_is_named_as_the_cause():
    found = trace(nn.Sequential(nn.Conv1d(2, 12, 3), nn.GLU(1), nn.Conv1d(12, 3, 3)), torch.randn(2, 2, 20))
    assert "1 (GLU) turns (2, 12, 18) into (2, 6, 18). It halves the channels" in found.failure.why
    found = trace(Made(gated, a=nn.Conv1d(2, 10, 1), b=nn.Conv1d(10, 3, 1)), torch.randn(2, 2, 6))
    assert "F.glu in Made" in found.failure.why
    assert "(2, 10, 6) into (2, 5, 6)" in found.failure.why


def test_a_swallowed_batch():
    model = Made(flattened, conv=nn.Conv2d(2, 3, 3), head=nn.Linear(3 * 5 * 7, 4))
    found = trace(model, torch.randn(2, 2, 7, 9))
    assert "The batch was flattened too" in found.failure.why
    assert any(change.startswith("keep the batch axis: x.flatten(1) instead of flatten") for change in changes(found))
    assert all(remedy.outputs[0] == (2, 4) for remedy in found.remedies)


def test_backward_in_place_names_the_line_and_a_remedy():
    found = trace(Made(inplace, a=nn.Linear(5, 6), b=nn.Linear(6, 2)), torch.randn(3, 5))
    assert (only(found).code, found.failure.stage, found.failure.module) == ("SHP451", "backward", "Made")
    assert "`y = torch.sigmoid(self.a(x))`" in found.failure.why
    assert any("`y += 1`" in change for change in changes(found))


def test_backward_of_an_inplace_layer():
    model = nn.Sequential(nn.Linear(5, 6), nn.Sigmoid(), nn.LeakyReLU(inplace=True), nn.Linear(6, 2))
    found = trace(model, torch.randn(3, 5))
    assert (only(found).code, found.failure.module) == ("SHP451", "1")
    assert changes(found) == {"make 2 not write in place: inplace=False": 0}


def test_backward_of_a_custom_function():
    found = trace(Made(custom, a=nn.Linear(5, 6), b=nn.Linear(6, 2)), torch.randn(3, 5))
    assert (only(found).code, found.failure.module) == ("SHP451", "Made")
    assert "WrongGradient" in found.failure.message
    assert found.remedies == ()


def test_a_detached_output():
    found = trace(Made(detached, a=nn.Linear(5, 6), b=nn.Linear(6, 2)), torch.randn(3, 5))
    assert (only(found).code, only(found).severity) == ("SHP452", "error")
    assert "after detach nothing requires a gradient" in only(found).got


def test_view_where_permute_was_meant():
    model = Made(swapped, a=nn.Linear(4, 4), b=nn.Linear(4, 2))
    found = trace(model, torch.randn(3, 5, 4))
    assert (only(found).code, only(found).severity) == ("SHP454", "error")
    assert "changing one of 3 samples changes the outputs of others" in only(found).got
    assert only(found).fix.startswith("x.permute(1, 0, 2) where view stands")
    assert "`return self.b(y.view(" in only(found).where


def test_softmax_over_the_batch():
    found = trace(Made(over_batch, a=nn.Linear(4, 3)), torch.randn(6, 4))
    assert (only(found).code, only(found).severity) == ("SHP454", "error")
    assert "softmax over the last axis (dim=-1)" in only(found).fix


def test_a_view_that_makes_rows_of_channels():
    found = trace(Made(grown, head=nn.Linear(91, 3)), torch.randn(2, 3, 7, 13))
    assert only(found).code == "SHP454"
    assert "2 samples go in, the output (6, 3) has no row for each of them" in only(found).got


@pytest.mark.parametrize("rows", [1, 4])
def test_a_squeeze_that_eats_the_batch(rows):
    found = trace(Made(squeezed, head=nn.Linear(5, 1)), torch.randn(rows, 5))
    assert only(found).code == "SHP455"
    assert only(found).fix == "squeeze(1) instead of squeeze() (verified with one sample)"
    assert "`return self.head(x).squeeze()`" in only(found).where


@pytest.mark.parametrize("channels", [1, 3])
def test_one_picture_without_batch_axis(channels):
    code = nn.Sequential(nn.Flatten(1), nn.Linear(216, 9), nn.ReLU(), nn.Linear(9, 216))
    found = trace(code, torch.randn(channels, 12, 18))
    assert (only(found).code, only(found).severity, found.ok) == ("SHP456", "warning", True)
    assert f"({channels}, 12, 18) becomes ({channels}, 216)" in only(found).got
    assert f"one picture (channels, height, width), its {channels} channel" in only(found).why


def test_a_decoder_with_one_channel_too_many():
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1), nn.Sigmoid())
    found = trace(model, torch.randn(2, 3, 10, 14), like=(2, 3, 10, 14))
    assert (only(found).code, only(found).where) == ("SHP453", "3")
    assert only(found).got == "the output is (2, 4, 10, 14)"
    assert changes(found) == {
        "give 2 out_channels=3 instead of 4": -55,
        "put a bridge nn.Conv2d(4, 3, 1) behind the output": 15,
        "on the output: keep the first 3 channels: x[:, :3]": 0,
    }


def test_a_loss_that_would_broadcast():
    found = trace(nn.Linear(5, 1), torch.randn(7, 5), like=torch.zeros(7))
    assert only(found).code == "SHP453"
    assert "mse_loss runs on (7, 1) and (7,) all the same: both are broadcast to (7, 7)" in only(found).why
    assert changes(found) == {"on the output: x.squeeze(1)": 0}


def test_a_forward_that_returns_nothing():
    report = trace(Made(lambda self, x: self.head(x) and None, head=nn.Linear(4, 1)), torch.zeros(1, 4))
    [found] = report.findings
    assert (found.code, found.severity, found.got) == ("SHP452", "error", "forward returns NoneType")
