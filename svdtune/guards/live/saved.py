"""Whether a checkpoint loads back as what it was, and whether recomputation leaves the gradients alone."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svdtune.checkpoint import state as disk
from svdtune.checkpoint.tensors import local, whole
from svdtune.config.load import resolved_yaml
from svdtune.contracts import Batch, Draws, LatentBatch, move
from svdtune.diffusion.draws import draws_for
from svdtune.guards.findings import Finding
from svdtune.guards.live.learning import STEPS, of_set
from svdtune.model.recompute import kept, recomputes
from svdtune.trainer import loop, state
from svdtune.trainer.build import Session
from svdtune.trainer.run_folder import RunFolder
from svdtune.trainer.state import Position, raw_optimizer
from svdtune.trainer.step import train_step

_SAVED = 2**28
"""Bytes of trained parameters up to which the whole state is saved and loaded; of more, the weights of some."""
_APART = 0.02
"""Relative difference of gradients with and without recomputation: the same kernels in the same order differ by nothing."""


def saved(session: Session, position: Position) -> list[Finding]:
    """SEM566: what is written and loaded again is what it was, through the functions of saving and resuming.

    Called on the main process, with shards on every rank: each writes all, and takes its part again.
    """
    total = sum(parameter.nbytes for parameter in session.trained.values())
    before = {name: local(parameter).clone() for name, parameter in _some(session).items()}
    with tempfile.TemporaryDirectory(prefix="svdtune-trial-") as work, torch.no_grad():
        changed = _whole(session, position, Path(work)) if total <= _SAVED else _weights(session, Path(work))
    changed = [name for name, value in before.items() if not torch.equal(local(session.trained[name]), value)] + changed
    why = "A resumed run would go on from other weights than it had."
    expected = "a checkpoint that loads back equal to the bit"
    return of_set("SEM566", changed, "parts of a checkpoint differ after it is loaded", expected, why)


def _whole(session: Session, position: Position, work: Path) -> list[str]:
    """Save everything, spoil it, load it; what has changed beside the weights."""
    raw, ema = raw_optimizer(session), session.ema
    moments = {parameter: copy.deepcopy(values) for parameter, values in raw.state.items()}
    averages = [local(average).clone() for average in ema.shadow_params] if ema else []
    after = Position(position.step + STEPS, position.samples + STEPS * session.clips_per_step)
    held = state.snapshot(session, keep=True)
    folder = state.write(replace(session, folder=RunFolder(work)), held, after, resolved_yaml(session.config))
    _spoil([*session.trained.values(), *(ema.shadow_params if ema else []), *_tensors_of(raw.state)])
    session.schedule.last_epoch = -1
    position_after, _ = state.restore(session, folder)
    stands = position_after == after and session.schedule.last_epoch == after.step
    same = not ema or all(map(torch.equal, map(local, ema.shadow_params), averages))
    return [
        *_different(raw.state, moments),
        *([] if same else ["averages"]),
        *([] if stands else ["step, samples or schedule"]),
    ]


def _weights(session: Session, work: Path) -> list[str]:
    """The same for some of many weights."""
    held = {name: whole(parameter) for name, parameter in _some(session).items()}
    disk.save_trained(work, held, lora=session.config.adapt.method == "lora")
    _spoil(_some(session).values())
    disk.load_trained(work, _some(session))
    return []


def _some(session: Session) -> dict[str, nn.Parameter]:
    """Trained parameters up to the limit, spread over the network."""
    total = sum(parameter.nbytes for parameter in session.trained.values())
    stride = -(-total // _SAVED)
    return dict(list(session.trained.items())[::stride])


def _spoil(tensors: Any) -> None:
    for tensor in tensors:
        local(tensor).add_(1)


def _tensors_of(states: Any) -> list[Tensor]:
    found = [value for values in states.values() for value in values.values() if isinstance(value, Tensor)]
    return [value for value in found if value.is_floating_point()]


def _different(now: Any, before: Any) -> list[str]:
    pairs = [(now[parameter][key], old) for parameter, values in before.items() for key, old in values.items()]
    same = [torch.equal(local(new), local(old)) if isinstance(old, Tensor) else new == old for new, old in pairs]
    return [] if all(same) and now.keys() == before.keys() else ["optimizer state"]


def recomputed(session: Session, position: Position) -> list[Finding]:
    """SEM567: gradients with recomputation are those without, on two small frames."""
    unet = session.model.unet
    if not recomputes(unet):
        return []
    batch = next(loop.loader_from(session, position))
    side = session.parts.facts.f * 2 ** (len(session.model.configs.unet["block_out_channels"]) - 1)
    batch = _corner(batch, side, side // session.parts.facts.f)
    axes = batch.axes(session.parts.facts)
    if axes["h"] != side or axes["w"] != side:
        return []  # smaller than the UNet's deepest level
    draws = draws_for(batch, session.parts.facts, session.config)
    device = session.accelerator.device
    with_it = _norms(session, move(batch, device), move(draws, device))
    with kept(unet):
        without = _norms(session, move(batch, device), move(draws, device))
    apart = {name: abs(with_it.get(name, 0.0) - norm) for name, norm in without.items()}
    scale = max(without.values(), default=0.0)
    wrong = [name for name, difference in apart.items() if difference > _APART * max(without[name], scale * 1e-3)]
    wrong = wrong or sorted(with_it.keys() ^ without.keys())
    got, why = (
        f"of {len(without)} gradients change with memory.checkpointing",
        "Recomputation only saves memory; here it changes what is learned.",
    )
    return of_set("SEM567", wrong, got, "the same gradients", why)


def _corner(batch: Batch, side: int, latent_side: int) -> Batch:
    """Two frames of the first clip, `side` pixels wide and high."""
    one: dict[str, Any] = {name: getattr(batch, name)[:1] for name in ("fps", "motion_bucket", "sample", "names")}
    if not isinstance(batch, LatentBatch):
        return replace(batch, pixels=batch.pixels[:1, :2, :, :side, :side].contiguous(), **one)
    for name in ("latents_mean", "latents_std"):
        one[name] = getattr(batch, name)[:1, :2, :, :latent_side, :latent_side].contiguous()
    first_frame = batch.first_frame[:1, :, :side, :side].contiguous()
    return replace(batch, first_frame=first_frame, image_embeds=batch.image_embeds[:1], **one)


def _norms(session: Session, batch: Batch, draws: Draws) -> dict[str, float]:
    """Norm of each trained parameter's gradient."""
    with torch.random.fork_rng([batch.fps.device] if batch.fps.is_cuda else []):
        torch.manual_seed(0)
        train_step(replace(session.parts, unet=session.model.unet), batch, draws).loss.backward()
    there = {name: parameter.grad for name, parameter in session.trained.items() if parameter.grad is not None}
    norms = torch.stack([local(gradient).float().norm() for gradient in there.values()]).tolist() if there else []
    for parameter in session.trained.values():
        parameter.grad = None
    return dict(zip(there, norms, strict=True))
