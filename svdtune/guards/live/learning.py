"""Whether gradients reach what learns, and nothing else, and whether it moves: looked at around the updates of the trial."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from svdtune.checkpoint.tensors import local, whole
from svdtune.guards.findings import Finding
from svdtune.guards.live.observe import hooks
from svdtune.trainer.build import Session
from svdtune.trainer.loop import Accumulated
from svdtune.trainer.sharding import gathered
from svdtune.trainer.state import raw_optimizer

STEPS = 2
"""LoRA's second matrix starts at zero: the first has a gradient from the second step on."""
_DEAD = re.compile(r"transformer_blocks\.\d+\.(attn2\.to_[qk]|norm2)\.")
"""SVD's image context is one token: nothing that only makes the query or the key of attn2 has an effect."""
_UNMOVED = 0.5
_SUMMED = 8
"""Parameters that are followed by hand."""


@dataclass(frozen=True)
class Before:
    """Values on the CPU, of shards this rank's part."""

    weights: dict[str, Tensor]
    averages: list[Tensor]


@dataclass(frozen=True)
class _Slope:
    """The gradient that one micro-step sends into the UNet's answer."""

    norm: Tensor
    numel: int


@contextmanager
def slopes(session: Session) -> Iterator[list[_Slope]]:
    """Filled by each micro-step's backward pass."""
    seen: list[_Slope] = []

    def listen(_: nn.Module, __: Any, output: tuple[Tensor, ...]) -> None:
        if output[0].requires_grad:
            output[0].register_hook(lambda slope: seen.append(_Slope(slope.double().norm(), slope.numel())))

    with hooks() as add:
        add(session.model.unet.register_forward_hook(listen))
        yield seen


def scaled(session: Session, slopes: Sequence[_Slope], accumulated: Accumulated) -> Iterator[Finding]:
    """SEM568: |d loss / dF| = 2 sqrt(loss / n) / accumulation in each micro-step, as the mean of squares has it."""
    train, scaler = session.config.train, session.accelerator.scaler
    scale = scaler.get_scale() if scaler is not None else 1.0
    if not bool(accumulated.losses.isfinite().all()):
        return  # said with the module where it began
    losses = accumulated.losses.double().reshape(train.accumulation, -1).mean(1).tolist()
    got = [
        float(slope.norm) / (2 * (loss / slope.numel) ** 0.5) / scale
        for slope, loss in zip(slopes, losses, strict=False)
    ]
    due = 1 / train.accumulation
    if len(got) == train.accumulation and all(abs(weight - due) <= 0.02 * due for weight in got):
        return
    weights = ", ".join(f"{weight:.3g}" for weight in got) or "none: no gradient comes back"
    expected = f"{train.accumulation} of {due:.3g}, the mean over train.accumulation"
    why = "The gradient is not that of the mean loss: the learning rate would mean another step, or clips count unequally."
    fix = "Call accelerator.backward(result.loss / train.accumulation) once for each micro-step."
    yield Finding("SEM568", "error", "accelerator.backward", f"micro-steps weigh {weights}", expected, why, fix)


@contextmanager
def sums(session: Session) -> Iterator[dict[str, Tensor]]:
    """The gradients of all micro-steps added up, of the last trained parameters."""
    sums: dict[str, Tensor] = {}

    def add_to(name: str) -> Any:
        def add(gradient: Tensor) -> None:
            sums[name] = sums[name] + gradient if name in sums else gradient.clone()

        return add

    with hooks() as keep:
        # Of a shard it is the whole parameter, made for the forward pass, that autograd sees.
        with gathered(session.model.unet, session.sharding):
            seen = dict(session.model.unet.named_parameters()) if session.sharding else session.trained
            for name in watched(session):
                keep(seen[name].register_hook(add_to(name)))
        yield sums


def added(session: Session, sums: dict[str, Tensor]) -> list[Finding]:
    """SEM568: what the optimizer will see is the sum over micro-steps, averaged over ranks."""
    last = {name: session.trained[name] for name in watched(session)}
    device = session.accelerator.device
    mine = torch.cat(
        [sums.get(name, torch.zeros(p.shape, device=device)).flatten().float() for name, p in last.items()]
    )
    mean: Any = session.accelerator.reduce(mine, reduction="mean")  # one for all: no rank may leave between two
    there = torch.cat(
        [whole(p.grad if p.grad is not None else torch.zeros_like(p)).flatten().float() for p in last.values()]
    ).to(mean.device)
    if not bool(mean.isfinite().all()):
        return []  # said with the module where it began
    if session.accelerator.num_processes > 1 and torch.equal(there, mine):
        return []  # not averaged: the comparison of ranks says it better
    if float((there - mean).norm()) <= 0.02 * float(mean.norm()) + 1e-12:
        return []
    got = f"the gradient of the last {len(last)} parameters has norm {float(there.norm()):.3g}"
    expected = (
        f"{float(mean.norm()):.3g}, the sum over {session.config.train.accumulation} micro-steps, averaged over ranks"
    )
    why = "Some of the clips of an update would not count."
    return [Finding("SEM568", "error", next(iter(last)), got, expected, why, "Clear gradients after the update alone.")]


def watched(session: Session) -> list[str]:
    """Names of the parameters whose gradients and updates are followed number by number."""
    return list(session.trained)[-_SUMMED:]


def reached(session: Session) -> set[str]:
    """Trained parameters whose gradient is not all zero."""
    gradients = local_gradients(session)
    nothing = torch.zeros((), dtype=torch.bool, device=session.accelerator.device)
    flags: Any = torch.stack([nothing if g is None else (g != 0).any() for g in gradients.values()])
    if session.sharding:  # each rank sees a part
        flags = session.accelerator.reduce(flags.float(), reduction="sum")
    return {name for name, flag in zip(gradients, flags.tolist(), strict=True) if flag}


def local_gradients(session: Session) -> dict[str, Tensor | None]:
    """By trained parameter, of shards this rank's part."""
    return {name: None if p.grad is None else local(p.grad) for name, p in session.trained.items()}


def strangers(session: Session) -> list[Finding]:
    """SEM562: frozen parameters with a gradient."""
    own = {id(parameter) for parameter in session.trained.values()}
    model = session.model
    networks: dict[str, Any] = {"unet": model.unet, "vae": model.vae, "image_encoder": model.image_encoder}
    pairs = [(f"{part}.{name}", p) for part, network in networks.items() for name, p in network.named_parameters()]
    strange = [name for name, parameter in pairs if parameter.grad is not None and id(parameter) not in own]
    why = "They cost memory, count in the gradient norm that clips the others, and an optimizer may move them."
    return of_set("SEM562", strange, "frozen parameters have a gradient", "gradients of trained parameters alone", why)


def without(session: Session, reached: set[str]) -> list[Finding]:
    """SEM561: trained parameters without a gradient after two updates."""
    lost = [name for name in session.trained if name not in reached and not _DEAD.search(name)]
    got = f"of {len(session.trained)} trained parameters have no gradient after {STEPS} steps"
    why = (
        "They would stay as they are for the whole run. Reentrant checkpointing with frozen inputs, a detach or a branch "
        "that is never taken do that."
    )
    return of_set("SEM561", lost, got, "a gradient for each", why)


def left_over(session: Session) -> list[Finding]:
    """SEM565: an update must leave no gradient behind."""
    there = local_gradients(session)
    names = [name for name, gradient in there.items() if gradient is not None and bool((gradient != 0).any())]
    why = "The next update would add to them: old gradients count again and again, and the run drifts."
    return of_set("SEM565", names, "trained parameters keep their gradient after the update", "none", why)


def moved(
    session: Session, before: Before, gradients: dict[str, Tensor | None], from_first: set[str]
) -> Iterator[Finding]:
    """NUM605: numbers with a gradient that two updates leave where they are. `from_first`: parameters with one in both.

    Rounded by chance (memory.parameters=bf16), as many should move as the update is parts of their spacing.
    """
    lr, by_chance = session.config.train.lr, session.config.memory.parameters == "bf16"
    due, went, worst = 0.0, 0.0, []
    for name, parameter in session.trained.items():
        gradient = gradients[name]
        if gradient is None or name not in from_first or _DEAD.search(name):
            continue
        pulled, old = gradient != 0, before.weights[name].to(parameter.device)
        wanted = float(_likely(old, lr)[pulled].sum() if by_chance else pulled.sum())
        moved = float((pulled & (local(parameter) != old)).sum())
        due, went = due + wanted, went + moved
        worst += [name] if moved * 2 < wanted else []
    if not due or 1 - went / due < (_UNMOVED if by_chance else _UNMOVED / 10):
        return
    share, some = 1 - went / due, next(iter(session.trained.values()))
    got = f"{share:.0%} of the numbers with a gradient stay where they are in {STEPS} updates at train.lr={lr:g}"
    why = (
        f"An update smaller than the spacing of {str(some.dtype).removeprefix('torch.')} around the weight is rounded away "
        "(0.02 - 1e-5 is 0.02 in bfloat16), or the optimizer does not hold them."
    )
    severity, where = "error" if share >= _UNMOVED else "warning", (worst or [next(iter(session.trained))])[0]
    expected = "as many move as chance rounds away from where they are" if by_chance else "all of them move"
    fix = "Keep trained parameters in float32, or raise train.lr."
    yield Finding("NUM605", severity, where, got, expected, why, fix)


def _likely(weights: Tensor, lr: float) -> Tensor:
    """How likely an update of lr, which is Adam's, moves each number when it is rounded by chance."""
    spacing = torch.finfo(weights.dtype).eps * (torch.frexp(weights.float()).exponent.float() - 1).exp2()
    return (lr / spacing).clamp(max=1)


def averaged(session: Session, before: Before) -> Iterator[Finding]:
    """SEM564: averages that stay while the weights move."""
    if session.ema is None:
        return
    still = [
        torch.equal(local(average).cpu(), old)
        for average, old in zip(session.ema.shadow_params, before.averages, strict=True)
    ]
    if all(still):
        got = f"none of the {len(still)} averages moved in {STEPS} updates"
        why = "The averages are what is sampled and exported: the result would be the untouched base."
        fix = "Call ema.step after each update with the parameters that the optimizer moves."
        yield Finding("SEM564", "error", "train.ema", got, "averages that follow the weights", why, fix)


def held(session: Session) -> Iterator[Finding]:
    """SEM563: the optimizer holds exactly the trained parameters, which are the network's own, and at train.lr."""
    schedule: Any = session.schedule
    lr, rates = session.config.train.lr, [float(rate) for rate in schedule.base_lrs]
    if any(rate != lr for rate in rates):
        got, why = (
            f"a peak of {', '.join(f'{rate:g}' for rate in rates)}",
            "The run would train at another rate than asked for.",
        )
        yield Finding("SEM563", "error", "train.lr", got, f"{lr:g}", why, "Hand train.lr to the optimizer as it is.")
    in_optimizer = {id(parameter) for group in raw_optimizer(session).param_groups for parameter in group["params"]}
    own = {id(parameter): name for name, parameter in session.trained.items()}
    open_ = {
        id(parameter): name for name, parameter in session.model.unet.named_parameters() if parameter.requires_grad
    }
    if in_optimizer == own.keys() == open_.keys():
        return
    everywhere = in_optimizer & own.keys() & open_.keys()
    missing = [name for key, name in {**own, **open_}.items() if key not in everywhere]
    got = f"the optimizer holds {len(in_optimizer)} parameters, {len(own)} are trained, {len(open_)} of the UNet require a gradient"
    why = "What is not in all three gets gradients and never moves, or moves and is not saved."
    fix = "Build the optimizer from what svdtune/model/adapt.py:adapt returns, after the UNet is on its device."
    yield Finding(
        "SEM563", "error", missing[0] if missing else "train.optimizer", got, "one and the same set", why, fix
    )


def of_set(code: str, names: Sequence[str], got: str, expected: str, why: str) -> list[Finding]:
    """One finding about `names`, or none where there are none."""
    if not names:
        return []
    got = f"{len(names)} {got}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
    return [
        Finding(code, "error", names[0], got, expected, why, "Mend what lies between these parameters and the loss.")
    ]
