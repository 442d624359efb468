"""Changes that might mend a failed run; `verify` keeps those with which the module really runs, forward and backward."""

from __future__ import annotations

import linecache
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from svdtune.guards.calls import Call, tensors_in
from svdtune.guards.tracing.records import Remedy, Shape
from svdtune.guards.tracing.running import Change, Operation, Run, count, innermost, run
from svdtune.guards.tracing.text import where as place

_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
_RESHAPES = ("view", "reshape", "flatten")
_DEPTH = 3
_MOST_RUNS = 60


@dataclass(frozen=True)
class Candidate:
    """One change to try."""

    change: str
    meaning: str
    changes: tuple[Change, ...]
    follows: bool = False
    """Such a change may also be the second step of another one."""
    parameters: int = 0
    """Of layers that a changed operation brings with it."""


@dataclass
class _Budget:
    left: int = _MOST_RUNS


def remedies(module: nn.Module, inputs: Sequence[Any], failed: Run) -> list[Remedy]:
    """Every candidate for `failed` that was run and found to work, nearest first."""
    base = count(module)
    budget = _Budget()
    found: dict[str, Remedy] = {}
    for candidate in candidates(failed, inputs):
        made = _verify(module, inputs, candidate, base, failed, budget)
        if made and made.change not in found:
            found[made.change] = made
    return list(found.values())


def _verify(
    module: nn.Module, inputs: Sequence[Any], tried: Candidate, base: int, before: Run, budget: _Budget, depth: int = 1
) -> Remedy | None:
    if budget.left <= 0:
        return None
    budget.left -= 1
    again = run(module, inputs, tried.changes)
    if again.ok:
        if not _keeps_samples(again):
            return None
        return Remedy(tried.change, again.parameters - base + tried.parameters, tried.meaning, again.shapes)
    if depth >= _DEPTH or again.stage != "forward" or len(again.operations) <= len(before.operations):
        return None
    for more in candidates(again, inputs):
        if more.follows:
            both = Candidate(
                f"{tried.change}; then {more.change}", f"{tried.meaning} {more.meaning}", tried.changes + more.changes,
                parameters=tried.parameters + more.parameters,
            )  # fmt: skip
            made = _verify(module, inputs, both, base, again, budget, depth + 1)
            if made:
                return made
    return None


def _keeps_samples(after: Run) -> bool:
    """A repair that loses the samples (flattening the batch) is none."""
    rows, out = leading(after), after.shapes[0] if after.shapes else ()
    return rows < 2 or not out or (out[0] != 1 and (len(out) > 1 or out[0] == rows))  # pyright: ignore[reportGeneralTypeIssues]


def candidates(failed: Run, inputs: Sequence[Any]) -> Iterator[Candidate]:
    """What might mend `failed`, nearest first."""
    call = innermost(failed)
    if failed.stage == "backward":
        yield from _inplace(failed)
        return
    if call is not None and call.inputs:
        yield from _of_module(call, failed)
    yield from _of_operation(failed, call)
    yield from _of_path(failed)
    yield from _of_inputs(failed, inputs)


def axis_of_features(module: nn.Module) -> tuple[int, int] | None:
    """(axis of the input, size there) that the module's weights fix; None when it fixes none."""
    if isinstance(module, nn.Linear):
        return -1, module.in_features
    if isinstance(module, CONVS + TRANSPOSED):
        return 1, module.in_channels
    if isinstance(module, NORMS):
        return 1, module.num_features
    if isinstance(module, nn.GroupNorm):
        return 1, module.num_channels
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
        return -1, module.normalized_shape[0]
    if isinstance(module, nn.RNNBase):
        return -1, module.input_size
    if isinstance(module, nn.MultiheadAttention):
        return -1, module.embed_dim
    return None


def _of_module(call: Call, failed: Run) -> Iterator[Candidate]:
    fixed, shape = axis_of_features(call.module), call.inputs[0]
    if isinstance(call.module, nn.Embedding):
        return
    yield from _other_rank(call, shape)
    if fixed is None or not shape or len(shape) <= max(fixed[0], 0) or shape[fixed[0]] == fixed[1]:
        return
    axis, wanted = fixed
    came = shape[axis]
    yield from _flattened(call, failed, shape, wanted)
    yield from _glu(call, failed, came, wanted)
    yield from _restructured(call, came, wanted)
    yield from _bridged(call, shape, axis, wanted)
    yield from _rearranged(call, shape, axis, wanted)


def _restructured(call: Call, came: int, wanted: int) -> Iterator[Candidate]:
    name, module = call.path, call.module
    keyword = keyword_of(module)
    if not name or keyword is None:
        return
    yield Candidate(
        f"give {name} {keyword}={came} instead of {wanted}",
        f"The layer is made anew for {came} features: weights trained for {wanted} do not fit it any more.",
        (Change("swap", name, lambda old: restructure(old, came)),),
        follows=True,
    )


def keyword_of(module: nn.Module) -> str | None:
    """The argument that says how many features come in."""
    kinds = (
        (nn.Linear, "in_features"), (CONVS + TRANSPOSED, "in_channels"), (NORMS, "num_features"),
        (nn.GroupNorm, "num_channels"), (nn.LayerNorm, "normalized_shape"), (nn.RNNBase, "input_size"),
    )  # fmt: skip
    return next((keyword for kind, keyword in kinds if isinstance(module, kind)), None)


def restructure(old: nn.Module, came: int, out: int | None = None) -> nn.Module:
    """The same layer for `came` input features, and `out` output features when given."""
    if isinstance(old, nn.Linear):
        return nn.Linear(came, out or old.out_features, old.bias is not None, dtype=old.weight.dtype)
    if isinstance(old, CONVS + TRANSPOSED):
        more: dict[str, Any] = {"output_padding": old.output_padding} if isinstance(old, TRANSPOSED) else {}
        return type(old)(  # pyright: ignore[reportCallIssue]
            came, out or old.out_channels, old.kernel_size, stride=old.stride, padding=old.padding,  # pyright: ignore[reportArgumentType]
            dilation=old.dilation, groups=old.groups, bias=old.bias is not None, dtype=old.weight.dtype, **more,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
    if isinstance(old, NORMS):
        return type(old)(came, old.eps, old.momentum, old.affine, old.track_running_stats)  # pyright: ignore[reportArgumentType]
    if isinstance(old, nn.GroupNorm):
        return nn.GroupNorm(math.gcd(old.num_groups, came), came, old.eps, old.affine)
    if isinstance(old, nn.LayerNorm):
        return nn.LayerNorm(came, old.eps, old.elementwise_affine)
    if isinstance(old, nn.LSTM):
        return _recurrent(nn.LSTM, old, came)
    if isinstance(old, nn.GRU):
        return _recurrent(nn.GRU, old, came)
    return _recurrent(nn.RNN, old, came)


def _recurrent(kind: Callable[..., nn.Module], old: nn.Module, came: int) -> nn.Module:
    assert isinstance(old, nn.RNNBase)
    return kind(
        came, old.hidden_size, old.num_layers, bias=old.bias, batch_first=old.batch_first, dropout=old.dropout,
        bidirectional=old.bidirectional,
    )  # fmt: skip


def _bridged(call: Call, shape: Shape, axis: int, wanted: int) -> Iterator[Candidate]:
    came, spatial = shape[axis], len(shape) - 2
    if axis == -1:
        text, make = f"nn.Linear({came}, {wanted})", (lambda: nn.Linear(came, wanted))
    elif spatial in (1, 2, 3):
        text, make = f"nn.Conv{spatial}d({came}, {wanted}, 1)", (lambda: CONVS[spatial - 1](came, wanted, 1))
    else:
        return
    yield Candidate(
        f"put a bridge {text} before {call.path}",
        f"{call.path} keeps its weights and its {wanted} features; the bridge is one more layer that has to be trained.",
        (Change("before", call.path, make),),
    )


def _rearranged(call: Call, shape: Shape, axis: int, wanted: int) -> Iterator[Candidate]:
    fitting = [i for i, size in enumerate(shape) if i > 0 and size == wanted and i != axis % len(shape)]
    for i in fitting:
        yield Candidate(
            f"move axis {i} of the input of {call.path} to axis {axis}: x.movedim({i}, {axis})",
            f"Axis {i} has the {wanted} entries that the layer reads; the axes are only read in another order.",
            (Change("before", call.path, lambda i=i: lambda x: x.movedim(i, axis)),),
        )
    came = shape[axis]
    if axis == 1 and came == 1 < wanted <= 4:
        yield Candidate(
            f"repeat the channel before {call.path}: x.expand(-1, {wanted}, {', '.join(['-1'] * (len(shape) - 2))})",
            f"The same picture in all {wanted} channels (grey as colour); nothing new is learned from the copies.",
            (Change("before", call.path, lambda: lambda x: x.expand(-1, wanted, *[-1] * (len(shape) - 2))),),
        )
    if axis == 1 and came > wanted >= 3 and came == wanted + 1:
        yield Candidate(
            f"drop the last channel before {call.path}: x[:, :{wanted}]",
            f"Channel {came} (often alpha) is thrown away.",
            (Change("before", call.path, lambda: lambda x: x[:, :wanted]),),
        )


def _flattened(call: Call, failed: Run, shape: Shape, wanted: int) -> Iterator[Candidate]:
    if len(shape) > 2 and math.prod(shape[1:]) == wanted:
        yield Candidate(
            f"flatten the input of {call.path}: x.flatten(1)",
            f"All {wanted} = {'·'.join(map(str, shape[1:]))} numbers of a sample are read at once, as the layer was built for.",
            (Change("before", call.path, lambda: lambda x: x.flatten(1)),),
        )
    yield from swallowed(failed)
    before = last_picture(failed)
    if before and len(shape) == 2 and before[1] == wanted and math.prod(before[1:]) == shape[1]:
        yield Candidate(
            f"average each channel before {call.path}: x.mean over {'·'.join(map(str, before[2:]))} (nn.AdaptiveAvgPool2d(1))",
            f"Only the mean of each of the {wanted} channels is read, not where in the picture it is; any picture size fits then.",
            (Change("before", call.path, lambda: lambda x: x.unflatten(1, (wanted, -1)).mean(-1)),),
        )


def swallowed(failed: Run) -> Iterator[Candidate]:
    """Reshapes that changed the leading axis: keep it."""
    rows = leading(failed)
    for operation in reversed(failed.operations):
        came = operation.inputs[0] if operation.inputs else ()
        out = operation.output
        if operation.name not in _RESHAPES or len(came) < 2 or came[0] != rows or (out and out[0] == rows):
            continue
        if out and len(out) > 1 and out[1:] == came[2:]:
            continue  # frames folded into the batch on purpose
        where = _where(operation, failed)
        yield Candidate(
            f"keep the batch axis: x.flatten(1) instead of {operation.name} in {where}",
            f"Every sample keeps its own row: {came} -> {(came[0], math.prod(came[1:]))}.",
            (Change("operation", (operation.path, operation.number), lambda _f, a, _k: a[0].flatten(1)),),
        )


def _glu(call: Call, failed: Run, came: int, wanted: int) -> Iterator[Candidate]:
    for other in failed.calls:
        if isinstance(other.module, nn.GLU) and other.done and wanted == 2 * came and other.path:
            yield Candidate(
                f"replace {other.path} (GLU) by nn.SiLU()",
                "An activation that keeps its shape: no gate any more, no parameters changed.",
                (Change("swap", other.path, lambda _old: nn.SiLU()),),
            )


def _other_rank(call: Call, shape: Shape) -> Iterator[Candidate]:
    kinds = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    kind = kinds.get(len(shape))
    if (
        isinstance(call.module, nn.modules.batchnorm._BatchNorm)
        and kind
        and type(call.module) is not kind
        and call.path
    ):
        features = call.module.num_features
        yield Candidate(
            f"make {call.path} an nn.{kind.__name__}({features})",
            f"The same normalisation for inputs with {len(shape)} axes; weights and running means fit as they are.",
            (Change("swap", call.path, lambda _old: kind(features)),),
            follows=True,
        )


def _of_operation(failed: Run, call: Call | None) -> Iterator[Candidate]:
    operation = failed.operations[-1] if failed.operations else None
    if operation is None or operation.outputs is not None or call is None or operation.path != call.path:
        return
    where, at = _where(operation, failed), (operation.path, operation.number)
    shapes = operation.inputs
    if operation.name == "view":
        yield Candidate(
            f"reshape instead of view in {where}",
            "reshape copies where the memory is not contiguous; the numbers and their order are the same.",
            (Change("operation", at, lambda _f, a, k: a[0].reshape(*a[1:], **k)),),
        )
    if operation.name in _RESHAPES and shapes and len(shapes[0]) > 2:
        yield from swallowed(failed)
    if operation.name in ("cat", "concat") and len(shapes) == 2 and len(shapes[0]) == len(shapes[1]) > 2:
        yield from _resized(at, where, shapes, cat=True)
    if (
        operation.name in ("add", "__add__", "__iadd__", "add_", "mul", "__mul__", "sub", "__sub__")
        and len(shapes) == 2
    ):
        yield from _resized(at, where, shapes, cat=False)
        yield from _projected(at, where, shapes)
    if operation.name in ("matmul", "__matmul__", "bmm", "mm") and len(shapes) == 2 and len(shapes[1]) > 1:
        yield Candidate(
            f"transpose the second factor in {where}: b.transpose(-2, -1)",
            f"Products over the {shapes[0][-1]} features that both have; the result is {shapes[0][-2:-1]} x {shapes[1][-2:-1]}.",  # pyright: ignore[reportGeneralTypeIssues]
            (Change("operation", at, lambda f, a, _k: f(a[0], a[1].transpose(-2, -1))),),
        )


def _resized(at: Any, where: str, shapes: list[Shape], *, cat: bool) -> Iterator[Candidate]:
    a, b = shapes
    if len(a) != len(b) or len(a) not in (3, 4, 5) or a[2:] == b[2:] or (not cat and a[:2] != b[:2]):
        return

    def match(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # fit(x, y): x on y's grid, by nearest neighbour
        x, y = tensors_in(args)[:2]
        fitted = F.interpolate(x, size=y.shape[2:])
        return func([fitted, y], *args[1:], **kwargs) if cat else fitted + y

    yield Candidate(
        f"resize the first tensor in {where} to the second: F.interpolate(a, size=b.shape[2:])",
        f"{a[2:]} is stretched to {b[2:]} (nearest): halving an odd size and doubling it again does not give it back.",
        (Change("operation", at, match),),
    )


def _projected(at: Any, where: str, shapes: list[Shape]) -> Iterator[Candidate]:
    a, b = shapes
    if len(a) != len(b) or len(a) not in (2, 4) or a[1] == b[1] or a[:1] + a[2:] != b[:1] + b[2:]:
        return
    text = f"nn.Conv2d({b[1]}, {a[1]}, 1)" if len(a) == 4 else f"nn.Linear({b[1]}, {a[1]})"

    def project(func: Any, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Any:
        layer = nn.Conv2d(b[1], a[1], 1) if len(a) == 4 else nn.Linear(b[1], a[1])
        return func(args[0], layer(args[1]))

    yield Candidate(
        f"put a bridge {text} on the second tensor in {where}",
        f"One more layer ({b[1] * a[1] + a[1]} parameters) brings {b[1]} channels to {a[1]} (a projection shortcut).",
        (Change("operation", at, project),),
        parameters=b[1] * a[1] + a[1],
    )


def _of_path(failed: Run) -> Iterator[Candidate]:
    """Without one of the poolings before the failure."""
    for call in failed.calls:
        if isinstance(call.module, _POOLS) and call.done and call.path:
            yield Candidate(
                f"remove the pooling {call.path}",
                f"Later layers see {call.inputs[0][2:]} instead of {call.output_shapes[0][2:]}: finer, and more work.",
                (Change("swap", call.path, lambda _old: nn.Identity()),),
            )


def _of_inputs(failed: Run, inputs: Sequence[Any]) -> Iterator[Candidate]:
    for i, value in enumerate(inputs):
        if not isinstance(value, torch.Tensor):
            continue
        name = "the input" if len(inputs) == 1 else f"input {i}"
        if value.is_floating_point() and any(isinstance(c.module, nn.Embedding) and not c.done for c in failed.calls):
            yield Candidate(
                f"give {name} as integers: x.long()", "An embedding looks rows up by number; it cannot read fractions.",
                (Change("input", i, lambda x: x.long()),), follows=True,
            )  # fmt: skip
        if not value.is_floating_point() and any(
            isinstance(c.module, (nn.Linear, *CONVS)) and not c.done for c in failed.calls
        ):
            yield Candidate(
                f"give {name} as floats: x.float()", "Weights are floats; integers are not converted by themselves.",
                (Change("input", i, lambda x: x.float()),), follows=True,
            )  # fmt: skip
        yield from _of_axes(i, name, value)


def _of_axes(i: int, name: str, value: torch.Tensor) -> Iterator[Candidate]:
    shape = tuple(value.shape)
    if len(shape) in (2, 3):
        yield Candidate(
            f"add a channel axis to {name}: x.unsqueeze(1)",
            f"{shape} is read as {shape[0]} samples of one channel each: {(shape[0], 1, *shape[1:])}.",
            (Change("input", i, lambda x: x.unsqueeze(1)),),
        )
    if len(shape) in (1, 3):
        yield Candidate(
            f"add the batch axis to {name}: x.unsqueeze(0)",
            f"{shape} is read as one sample: {(1, *shape)}.",
            (Change("input", i, lambda x: x.unsqueeze(0)),),
        )
    if len(shape) == 4 and shape[-1] <= 4 < shape[1]:
        yield Candidate(
            f"put the channels of {name} first: x.permute(0, 3, 1, 2)",
            f"{shape} has its {shape[-1]} channels last, as PIL and numpy give pictures; torch's layers read them from axis 1.",
            (Change("input", i, lambda x: x.permute(0, 3, 1, 2)),),
        )
    if len(shape) == 3:
        yield Candidate(
            f"swap the last two axes of {name}: x.transpose(1, 2)",
            f"{shape} becomes {(shape[0], shape[2], shape[1])}: features where this module reads them.",
            (Change("input", i, lambda x: x.transpose(1, 2)),),
        )


def _inplace(failed: Run) -> Iterator[Candidate]:
    """Without writing into a tensor that the backward pass still needs."""
    for call in failed.calls:
        if getattr(call.module, "inplace", False) and call.path:
            yield Candidate(
                f"make {call.path} not write in place: inplace=False",
                "The same numbers; one more tensor is kept for the backward pass.",
                (Change("swap", call.path, _not_inplace),),
            )
    for operation in failed.operations:
        # Of `x.add_(1)` alone the result may be dropped: only `x += 1` becomes `x = x + 1`.
        sign = _SIGN.get(operation.name)
        if sign and f"{sign}=" in linecache.getline(operation.file, operation.line):
            yield Candidate(
                f"a new tensor instead of writing in place in {_where(operation, failed)}: x = x {sign} ...",
                "The same numbers; one more tensor is kept for the backward pass.",
                (Change("operation", (operation.path, operation.number), _out_of_place(operation.name)),),
            )


_SIGN = {"__iadd__": "+", "__isub__": "-", "__imul__": "*", "__itruediv__": "/", "__idiv__": "/",
         "add_": "+", "sub_": "-", "mul_": "*", "div_": "/"}  # fmt: skip


def _not_inplace(old: nn.Module) -> nn.Module:
    vars(old)["inplace"] = False  # a plain attribute
    return old


def _out_of_place(name: str) -> Callable[..., Any]:
    plain = {"+": torch.add, "-": torch.sub, "*": torch.mul, "/": torch.div}[_SIGN[name]]
    return lambda _f, args, _k: plain(args[0], args[1])


def leading(the_run: Run) -> int:
    """Length of the first axis of the first input: the samples."""
    shapes = the_run.calls[0].inputs if the_run.calls else []
    return shapes[0][0] if shapes and shapes[0] else 0


def last_picture(the_run: Run) -> Shape | None:
    """The last shape with at least three axes before the failure."""
    return next((o.output for o in reversed(the_run.operations) if o.output and len(o.output) > 2), None)


def _where(operation: Operation, the_run: Run) -> str:
    return place(operation.path, operation.file, operation.line, the_run)
