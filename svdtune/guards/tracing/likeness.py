"""`--like`: the output is not what it should equal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import permutations
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from svdtune.guards.findings import Finding
from svdtune.guards.tracing.layers import CONVS, TRANSPOSED, bridge, bridge_text, can_be_rebuilt, rebuilt
from svdtune.guards.tracing.records import Remedy, Shape
from svdtune.guards.tracing.repairs import Candidate, Search, attempts
from svdtune.guards.tracing.running import Change, Run, count


def unlike(module: nn.Module, inputs: Sequence[Any], done: Run, like: Shape) -> tuple[list[Finding], list[Remedy]]:
    """SHP453 and what would mend it; nothing when any output has the shape `like`."""
    if like in done.shapes:
        return [], []
    if not done.shapes:
        return [Finding("SHP453", "error", type(module).__name__, "no tensor in what it returns", str(like),
                        "There is nothing to compare with the target.", "Return the tensor.")], []  # fmt: skip
    out = done.shapes[0]

    def accept(after: Run, _changes: Sequence[Change]) -> bool:
        return after.shapes[:1] == (like,)

    search = Search(attempts(module, inputs, real=not done.fake), accept, inputs, count(module))
    tried = (search.verified(candidate, done) for candidate in _candidates(done, out, like))
    found = list({one.change: one for one in tried if one}.values())
    last = next((call.path for call in reversed(done.calls) if call.path and call.output_shapes[:1] == [out]), "")
    fix = found[0].change if found else ""
    return [Finding("SHP453", "error", last or type(module).__name__, f"the output is {out}", f"{like}", _loss(out, like), fix,
                    verified=bool(found))], found  # fmt: skip


def _loss(out: Shape, like: Shape) -> str:
    try:
        both = tuple(torch.broadcast_shapes(out, like))
    except RuntimeError:
        return "Nothing raises in forward; a loss between the two would, as their axes do not fit."
    return (
        f"A loss such as mse_loss runs on {out} and {like} all the same: both are broadcast to {both}, every number is compared "
        f"with numbers that are not its own, and training learns something else."
    )


def _candidates(done: Run, out: Shape, like: Shape) -> Iterator[Candidate]:
    axes = [i for i in range(len(out)) if len(out) == len(like) and out[i] != like[i]]
    if axes and axes in ([1], [len(out) - 1]):
        yield from _restructured(done, out, like, axes[0])
        yield from _bridged(done, out, like, axes[0])
    if axes == [1] and out[1] > like[1]:
        yield _after(
            f"keep the first {like[1]} channels: x[:, :{like[1]}]",
            "The others are thrown away.",
            lambda x: x[:, : like[1]],
        )
    if axes and min(axes) > 1:
        text = f"F.interpolate(x, size={like[2:]})"
        yield _after(
            f"resize the output: {text}", "Stretched by nearest neighbour.", lambda x: F.interpolate(x, size=like[2:])
        )
    if len(out) == len(like) and sorted(out) == sorted(like):
        yield from _permuted(out, like)
    for i in range(1, len(out)):
        if out[i] == 1 and out[:i] + out[i + 1 :] == like:
            yield _after(f"x.squeeze({i})", f"Axis {i} of length 1 goes.", lambda x, i=i: x.squeeze(i))
    for i in range(1, len(like)):
        if like[i] == 1 and like[:i] + like[i + 1 :] == out:
            yield _after(f"x.unsqueeze({i})", f"A new axis {i} of length 1.", lambda x, i=i: x.unsqueeze(i))
    if out[:1] == like[:1] and abs(len(out) - len(like)) > 1 < len(like) and prod(out) == prod(like):
        text = f"x.reshape(-1, {', '.join(map(str, like[1:]))})"
        yield _after(text, "The same numbers in other axes.", lambda x: x.reshape(like))


def _permuted(out: Shape, like: Shape) -> Iterator[Candidate]:
    for order in permutations(range(1, len(out))):
        if tuple(out[i] for i in (0, *order)) == like:
            text = f"x.permute(0, {', '.join(map(str, order))})"
            yield _after(
                text, "The same numbers, the axes in another order.", lambda x, order=order: x.permute(0, *order)
            )


def _after(change: str, meaning: str, made: Callable[[torch.Tensor], torch.Tensor]) -> Candidate:
    return Candidate(f"on the output: {change}", meaning, (Change("after", "", lambda: made),))


def _restructured(done: Run, out: Shape, like: Shape, axis: int) -> Iterator[Candidate]:
    """The last layer with outputs of its own made for another number; what comes after it follows."""
    layers = [call for call in done.calls if isinstance(call.module, (nn.Linear, *CONVS, *TRANSPOSED)) and call.path]
    if not layers or not can_be_rebuilt(layers[-1].module):
        return
    last = layers[-1]
    keyword = "out_features" if isinstance(last.module, nn.Linear) else "out_channels"
    had = getattr(last.module, keyword)
    if had * like[axis] % out[axis] == 0:
        wanted = had * like[axis] // out[axis]
        yield Candidate(
            f"give {last.path} {keyword}={wanted} instead of {had}",
            f"The layer is made anew: weights trained for {had} do not fit it any more.",
            (Change("swap", last.path, lambda old: rebuilt(old, **{keyword: wanted})),),
        )


def _bridged(done: Run, out: Shape, like: Shape, axis: int) -> Iterator[Candidate]:
    came, wanted = out[axis], like[axis]
    if len(out) in (2, 3) and axis == len(out) - 1:
        kind = "Linear"
    elif axis == 1 and len(out) in (3, 4, 5):
        kind = f"Conv{len(out) - 2}d"
    else:
        return
    yield Candidate(
        f"put a bridge {bridge_text(kind, came, wanted, done.module)} behind the output",
        "The module stays as it is; the bridge is one more layer that has to be trained.",
        (Change("after", "", lambda: bridge(kind, came, wanted, done.module)),),
    )
