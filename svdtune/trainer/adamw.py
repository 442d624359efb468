"""AdamW over bfloat16 parameters: half the memory of float32, and small updates are not lost.

Between 0.0156 and 0.0312 bfloat16 has 128 numbers: an update of 1e-5 is a twelfth of their spacing, and rounded to nearest it is
nothing, step after step. Here every number is computed in float32 and rounded up or down by chance, in proportion to how near the
two neighbours are, so that it is right on average (Zamirai et al., arXiv 2010.06192). The state is rounded so too: exp_avg_sq
shrinks by a thousandth a step, which to nearest is also nothing. In 8 bits it is companded in groups, as in FlashOptim (arXiv
2602.23349), and codes are drawn in the same way.

Chance is a function of (seed, optimizer step, place among the parameters): a resumed run rounds as one that never stopped, and all
ranks round alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from svdtune.checkpoint.tensors import local

GROUP = 32
"""Numbers of 8-bit state that share a scale."""
CHUNK = 2**23
"""Numbers moved at once: about 0.3 GiB of float32 in passing, and few kernels for 1,400 tensors."""
_SIGNED, _UNSIGNED = 127, 255
"""Largest codes of exp_avg and exp_avg_sq in 8 bits."""


class RoundingAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) whose parameters and state are bfloat16, rounded by chance. `step` never waits for the device.

    State by parameter: `step` (int), `exp_avg` and `exp_avg_sq` in the parameter's shape.
    """

    spans: ClassVar[dict[str, int]] = {"exp_avg": 1, "exp_avg_sq": 1}
    """Numbers of the parameter that one number of the state is for."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, lr: float, betas: tuple[float, float], weight_decay: float,
        eps: float = 1e-8, seed: int = 0, compiled: bool = False,
    ) -> None:  # fmt: skip
        """`compiled`: the arithmetic as one kernel (torch.compile). Raises ValueError for parameters that are not bfloat16."""
        super().__init__(parameters, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        self.seed, self.compiled = seed, compiled
        kinds = {parameter.dtype for group in self.param_groups for parameter in group["params"]}
        if kinds != {torch.bfloat16}:
            raise ValueError(
                f"{type(self).__name__} moves bfloat16 parameters, got {', '.join(sorted(map(str, kinds)))}"
            )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every parameter that has a gradient."""
        for index, group in enumerate(self.param_groups):
            for number, bucket in enumerate(self._buckets(group["params"])):
                self._move(bucket, group, (index, number))

    def fresh(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state of a parameter before its first update."""
        return {key: torch.zeros_like(parameter, memory_format=torch.contiguous_format) for key in self.spans}

    def arithmetic(self) -> Callable[..., tuple[Tensor, ...]]:
        """From float32 in passing to what is kept."""
        return _in_bf16

    def _buckets(self, parameters: Sequence[nn.Parameter]) -> Iterator[list[_Piece]]:
        """Pieces of CHUNK numbers together, all at the same step."""
        bucket: list[_Piece] = []
        for parameter in parameters:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state.update(step=0, **self.fresh(parameter))
            state["step"] += 1
            for piece in _pieces(parameter, state, self.spans):
                full = sum(len(other.tensors[0]) for other in bucket) + len(piece.tensors[0]) > CHUNK
                if bucket and (full or piece.step != bucket[0].step):
                    yield bucket
                    bucket = []
                bucket.append(piece)
        if bucket:
            yield bucket

    def _move(self, bucket: list[_Piece], group: dict[str, Any], place: tuple[int, int]) -> None:
        step, (beta1, beta2), device = bucket[0].step, group["betas"], bucket[0].tensors[0].device
        # Made on the device: as Python numbers they would have the kernel compiled anew whenever the rate changes.
        shrink = torch.full((), 1 - group["lr"] * group["weight_decay"], device=device)
        rate = torch.full((), group["lr"] / (1 - beta1**step), device=device)
        root = torch.full((), (1 - beta2**step) ** 0.5, device=device)
        spans = (1, 1, *self.spans.values())
        columns = [[piece.tensors[i] for piece in bucket] for i in range(len(spans))]
        sizes = [_up(len(weights)) for weights in columns[0]]
        weights, gradients, *state = [_join(column, sizes, span) for column, span in zip(columns, spans, strict=True)]
        generator = torch.Generator(device).manual_seed(_key(self.seed, step, *place))
        chance = torch.empty(len(weights), dtype=torch.int32, device=device).random_(
            -(2**31), 2**31, generator=generator
        )
        arithmetic = _compiled(self.arithmetic()) if self.compiled else self.arithmetic()
        kept = arithmetic(weights, gradients, *state, chance, shrink, rate, root, beta1, beta2, group["eps"])
        for flat, column, span in zip(kept, (columns[0], *columns[2:]), (1, *spans[2:]), strict=True):
            torch._foreach_copy_(column, _views(flat, column, sizes, span))
        for piece in bucket:
            if piece.copied is not None:
                to, flat = piece.copied
                to.copy_(flat.view(to.shape))


class RoundingAdamW8bit(RoundingAdamW):
    """The same with 2.1 bytes of state a number, on any device.

    State by parameter of n numbers: `step` (int), `exp_avg` int8 and `exp_avg_sq` uint8 (ceil(n / 32), 32), and a bfloat16 scale
    for each row.
    """

    spans: ClassVar[dict[str, int]] = {"exp_avg": 1, "exp_avg_scale": GROUP, "exp_avg_sq": 1, "exp_avg_sq_scale": GROUP}

    def fresh(self, parameter: Tensor) -> dict[str, Tensor]:
        """Codes and scales of nothing."""
        groups, device = _up(parameter.numel()) // GROUP, parameter.device
        codes = {"exp_avg": torch.int8, "exp_avg_sq": torch.uint8}
        return {
            key: torch.zeros(groups, dtype=torch.bfloat16, device=device)
            if span == GROUP
            else torch.zeros(groups, GROUP, dtype=codes[key], device=device)
            for key, span in self.spans.items()
        }

    def arithmetic(self) -> Callable[..., tuple[Tensor, ...]]:
        """As above."""
        return _in_8bit


def round_by_chance(x: Tensor, chance: Tensor) -> Tensor:
    """float32 to bfloat16: to a neighbour, so that the mean over `chance`, int32 uniform in [0, 65536), is x itself.

    The bits that bfloat16 has no room for are a fraction of the spacing: adding a random one carries as often as the fraction is
    large. Zero, infinity and NaN stay what they are.
    """
    bits = x.view(torch.int32).add(chance).bitwise_and_(-0x10000)
    return torch.where(x.isnan(), x, bits.view(torch.float32)).to(torch.bfloat16)


def encode(
    x: Tensor, decode: Callable[[Tensor], Tensor], code: Callable[[Tensor], Tensor], chance: Tensor
) -> tuple[Tensor, Tensor]:
    """Codes (as float32) and the bfloat16 scale of each row of x (groups, 32), drawn so that their mean decodes to x.

    `code` and `decode` lead from [-1, 1] to codes and back; `chance` is int32 uniform in [0, 65536).
    """
    # Rounded up: the largest of a row must not be cut.
    scale = round_by_chance(x.abs().amax(1), torch.full((), 0xFFFF, dtype=torch.int32, device=x.device))
    share = x / scale.float().clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    below = code(share).floor()
    low, high = decode(below), decode(below + 1)
    return below + ((share - low) * 65536 > chance * (high - low)), scale


def signed(code: Tensor) -> Tensor:
    """What a code of exp_avg in [-127, 127] is of its row's largest: finer near zero (softsign's inverse)."""
    z = code.float() / _SIGNED
    return z / (2 - z.abs())


def unsigned(code: Tensor) -> Tensor:
    """What a code of exp_avg_sq in [0, 255] is of its row's largest: a square, so that what divides the update is even."""
    return (code.float() / _UNSIGNED).square()


def _in_bf16(p: Tensor, g: Tensor, m: Tensor, v: Tensor, chance: Tensor, *rates: Any) -> tuple[Tensor, ...]:
    p, m, v = _moved(p.float(), g.float(), m.float(), v.float(), *rates)
    one, other = _halves(chance)
    return round_by_chance(p, one), round_by_chance(m, other), round_by_chance(v, other)


def _in_8bit(
    p: Tensor, g: Tensor, m: Tensor, m_scale: Tensor, v: Tensor, v_scale: Tensor, chance: Tensor, *rates: Any
) -> tuple[Tensor, ...]:
    m = (signed(m).view(-1, GROUP) * m_scale.float()[:, None]).flatten()
    v = (unsigned(v).view(-1, GROUP) * v_scale.float()[:, None]).flatten()
    p, m, v = _moved(p.float(), g.float(), m, v, *rates)
    one, other = _halves(chance)
    m, m_scale = encode(m.view(-1, GROUP), signed, lambda x: 2 * x / (1 + x.abs()) * _SIGNED, other.view(-1, GROUP))
    v, v_scale = encode(v.view(-1, GROUP), unsigned, lambda x: x.sqrt() * _UNSIGNED, other.view(-1, GROUP))
    # At least one: divided by nothing, the next update could be of any size.
    codes = m.clamp(-_SIGNED, _SIGNED).to(torch.int8), v.clamp(1, _UNSIGNED).to(torch.uint8)
    return round_by_chance(p, one), codes[0].flatten(), m_scale, codes[1].flatten(), v_scale


def _moved(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor,
    shrink: Tensor, rate: Tensor, root: Tensor, beta1: float, beta2: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Algorithm 2 of arXiv 1711.05101 in float32, written into p, m and v."""
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    p.mul_(shrink).sub_(m.mul(rate).div_(v.sqrt().div_(root).add_(eps)))
    return p, m, v


def _halves(chance: Tensor) -> tuple[Tensor, Tensor]:
    """Two draws of 16 bits from one of 32."""
    return chance & 0xFFFF, (chance >> 16) & 0xFFFF


@dataclass(frozen=True)
class _Piece:
    """Part of a parameter: flat views of weights, gradient and state, written in place."""

    step: int
    tensors: tuple[Tensor, ...]
    copied: tuple[Tensor, Tensor] | None
    """A parameter whose memory is in another order (channels last), and its flat copy, which is what moves."""


def _pieces(parameter: nn.Parameter, state: dict[str, Any], spans: dict[str, int]) -> Iterator[_Piece]:
    weights: Any = local(parameter)
    flat = weights.reshape(-1)
    copied = None if weights.is_contiguous() else (weights, flat)
    gradient = local(parameter.grad).reshape(-1)  # pyright: ignore[reportArgumentType]
    kept = {key: local(state[key]).view(-1) for key in spans}
    for start in range(0, len(flat), CHUNK):
        end = min(start + CHUNK, len(flat))
        own = [tensor[start // spans[key] : _up(end) // spans[key]] for key, tensor in kept.items()]
        yield _Piece(state["step"], (flat[start:end], gradient[start:end], *own), copied)


def _up(count: int) -> int:
    """To whole groups."""
    return -(-count // GROUP) * GROUP


def _join(column: list[Tensor], sizes: Sequence[int], span: int) -> Tensor:
    """One flat tensor, each part filled up with zeros to whole groups."""
    flat = torch.zeros(sum(sizes) // span, dtype=column[0].dtype, device=column[0].device)
    torch._foreach_copy_(_views(flat, column, sizes, span), column)
    return flat


def _views(flat: Tensor, column: Sequence[Tensor], sizes: Sequence[int], span: int) -> list[Tensor]:
    rooms = flat.split([size // span for size in sizes])
    return [room[: len(part)] for room, part in zip(rooms, column, strict=True)]


def _key(seed: int, *place: int) -> int:
    return int(np.random.SeedSequence([seed, *place]).generate_state(1, np.uint64)[0] >> np.uint64(1))


@cache
def _compiled(arithmetic: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    return torch.compile(arithmetic, dynamic=True)
