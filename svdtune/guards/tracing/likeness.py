"""`--like`: the output is not what it should equal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from svdtune.guards.findings import Finding
from svdtune.guards.tracing.records import Remedy, Shape
from svdtune.guards.tracing.repairs import CONVS, TRANSPOSED, Candidate, restructure
from svdtune.guards.tracing.running import Change, Run, count, run


def unlike(module: nn.Module, inputs: Sequence[Any], done: Run, like: Shape) -> tuple[list[Finding], list[Remedy]]:
    """SHP453 and what would mend it; nothing when any output has the shape `like`."""
    if not done.shapes or like in done.shapes:
        return [], []
    out = done.shapes[0]
    base, found = count(module), []
    for candidate in _candidates(done, out, like):
        again = run(module, inputs, candidate.changes)
        if again.ok and again.shapes and again.shapes[0] == like:
            found.append(Remedy(candidate.change, again.parameters - base, candidate.meaning, again.shapes))
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
    if axes in ([1], [len(out) - 1]):
        yield from _restructured(done, out, like, axes[0])
        yield from _bridged(out, like, axes[0])
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
    if sorted(out) == sorted(like) and len(out) == len(like) == 4 and out != like:
        yield _after("x.permute(0, 2, 3, 1)", "Channels last.", lambda x: x.permute(0, 2, 3, 1))
        yield _after("x.permute(0, 3, 1, 2)", "Channels first.", lambda x: x.permute(0, 3, 1, 2))
    for i in range(1, len(out)):
        if out[i] == 1 and out[:i] + out[i + 1 :] == like:
            yield _after(f"x.squeeze({i})", f"Axis {i} of length 1 goes.", lambda x, i=i: x.squeeze(i))
    for i in range(1, len(like)):
        if like[i] == 1 and like[:i] + like[i + 1 :] == out:
            yield _after(f"x.unsqueeze({i})", f"A new axis {i} of length 1.", lambda x, i=i: x.unsqueeze(i))
    if (
        out[0] == like[0]
        and abs(len(out) - len(like)) > 1 < len(like)
        and torch.Size(out).numel() == torch.Size(like).numel()
    ):
        yield _after(
            f"x.reshape(-1, {', '.join(map(str, like[1:]))})",
            "The same numbers in other axes.",
            lambda x: x.reshape(like),
        )


def _after(change: str, meaning: str, made: Any) -> Candidate:
    return Candidate(f"on the output: {change}", meaning, (Change("after", "", lambda: made),))


def _restructured(done: Run, out: Shape, like: Shape, axis: int) -> Iterator[Candidate]:
    layers = [call for call in done.calls if isinstance(call.module, (nn.Linear, *CONVS, *TRANSPOSED)) and call.path]
    if not layers:
        return
    last = layers[-1]
    keyword = "out_features" if isinstance(last.module, nn.Linear) else "out_channels"
    had = getattr(last.module, keyword)
    wanted = had * like[axis] // out[axis]
    if had * like[axis] % out[axis] == 0:
        yield Candidate(
            f"give {last.path} {keyword}={wanted} instead of {had}",
            f"The layer is made anew: weights trained for {had} do not fit it any more.",
            (Change("swap", last.path, lambda old: restructure(old, _came(old), wanted)),),
        )


def _came(old: nn.Module) -> int:
    return old.in_features if isinstance(old, nn.Linear) else old.in_channels  # pyright: ignore[reportReturnType]


def _bridged(out: Shape, like: Shape, axis: int) -> Iterator[Candidate]:
    came, wanted = out[axis], like[axis]
    meaning = "The module stays as it is; the bridge is one more layer that has to be trained."
    if len(out) in (2, 3) and axis == len(out) - 1:
        yield Candidate(f"put a bridge nn.Linear({came}, {wanted}) behind the output", meaning,
                        (Change("after", "", lambda: nn.Linear(came, wanted)),))  # fmt: skip
    elif axis == 1 and len(out) in (3, 4, 5):
        kind = CONVS[len(out) - 3]
        yield Candidate(f"put a bridge nn.{kind.__name__}({came}, {wanted}, 1) behind the output", meaning,
                        (Change("after", "", lambda: kind(came, wanted, 1)),))  # fmt: skip
