"""What the two processes of test_ranks.py run: one session, put wrong in one way after the other; the findings saved per rank."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import patch

import diffusers
import torch
from accelerate import Accelerator

from svdtune.config.load import load_config
from svdtune.config.schema import Config
from svdtune.contracts import VideoBatch
from svdtune.data.catalog import scan
from svdtune.data.loader import make_loader
from svdtune.guards.findings import Finding
from svdtune.guards.live import ranks
from svdtune.trainer import loop
from svdtune.trainer.build import Session, build, dismiss, make_accelerator
from svdtune.trainer.metrics import StepReport
from svdtune.trainer.run_folder import RunFolder
from svdtune.trainer.state import Position
from svdtune.trainer.watch import Seen


def main() -> None:
    out, config_path, *overrides = sys.argv[1:]
    config = load_config(Path(config_path), overrides)
    accelerator = make_accelerator(config)
    found = cases(accelerator, config, out)
    (Path(out) / f"rank-{accelerator.process_index}.json").write_text(json.dumps(found))
    accelerator.wait_for_everyone()
    dismiss(accelerator)


def cases(accelerator: Accelerator, config: Config, out: str) -> dict[str, list[dict]]:
    session = build(config, accelerator, RunFolder(Path(out)), scan(config.data))
    second = accelerator.process_index == 1
    *_, trained = (name for name, p in session.trained.items() if p.dim() == 4)
    unwrapped = replace(session, parts=replace(session.parts, unet=session.model.unet))
    fewer = replace(session, trained={n: p for n, p in session.trained.items() if not second or n != trained})
    found = {
        "sound": check(session),
        "bypassed": check(unwrapped),
        "same clips": check(session, patch.object(loop, "make_loader", loader_of_the_first)),
        "same noise": check(session, patch.object(loop, "draws_for", draws_by_micro_step)),
        "same tensor": check(session, patch.object(loop, "draws_for", one_noise_alike)),
        "other set": check(fewer),
        "other version": check(session, patch.object(diffusers, "__version__", "0.0.1" if second else "0.35.0")),
    }
    found["agree"] = ranks.parameters_agree(session, 200)
    mine, noise = accelerator.process_index, torch.full((1, 4), float(accelerator.process_index))
    found["step"] = ranks.step_agrees(session, seen_of([mine], noise, 1.0))
    found["clips of a step"] = ranks.step_agrees(session, seen_of([7], noise, 1.0))
    found["noise of a step"] = ranks.step_agrees(session, seen_of([mine], noise * 0, 1.0))
    found["norm of a step"] = ranks.step_agrees(session, seen_of([mine], noise, 1.0 + 1e-12 * mine))
    vae, clip = session.model.vae, session.model.image_encoder
    tensors = {
        "trained": session.trained[trained].data,
        "frozen": next(vae.parameters()).data,
        "buffer": next(clip.buffers()),
    }
    for name, tensor in tensors.items():
        before = tensor.clone()
        if second:
            change(tensor.view(-1))
        found[f"{name} at the start"] = check(session)
        found[f"{name} in training"] = ranks.parameters_agree(session, 200)
        tensor.copy_(before)
    found["sound again"] = [*check(session), *ranks.parameters_agree(session, 201)]
    return {name: [asdict(finding) for finding in findings] for name, findings in found.items()}


def seen_of(samples: list[int], noise: torch.Tensor, norm: float) -> Seen:
    report = StepReport(1.0, norm, {})
    return Seen(200, report, norm, 1.0, 0.0, torch.tensor(samples), noise, tuple(f"{sample}.mp4" for sample in samples))


def check(session: Session, *patches) -> list[Finding]:
    """The micro-steps of one update by the trainer's own functions, and what the ranks make of them."""
    seen, draws = [], []
    with ExitStack() as stack:
        for each in patches:
            stack.enter_context(each)
        draw = loop.draws_for
        stack.enter_context(patch.object(loop, "draws_for", lambda *a: draws.append(draw(*a)) or draws[-1]))
        done = loop.accumulate(session, keep(loop.loader_from(session, Position()), seen))
        noise = [word for each in draws for word in ranks.noise_of(each)]
        samples = [sample for batch in seen for sample in batch.sample.tolist()]
        facts = ranks.facts_of_rank(session, samples, done.names, noise, done.sigmas.tolist())
        found = ranks.check_ranks(facts)
    session.optimizer.zero_grad()
    return found


def keep(batches: Iterator[VideoBatch], seen: list[VideoBatch]) -> Iterator[VideoBatch]:
    for batch in batches:
        seen.append(batch)
        yield batch


def loader_of_the_first(*args, **options):
    return make_loader(*args, **{**options, "rank": 0})


draws_for: Callable = loop.draws_for


def draws_by_micro_step(batch: VideoBatch, *rest):
    """As a generator that every rank seeds alike would draw: two ranks with one clip each count samples by twos."""
    return draws_for(replace(batch, sample=batch.sample // 2), *rest)


def one_noise_alike(batch: VideoBatch, *rest):
    drawn = draws_for(batch, *rest)
    return replace(drawn, pixel_noise=draws_by_micro_step(batch, *rest).pixel_noise)


def change(flat: torch.Tensor) -> None:
    """One number, to the next one that its dtype has."""
    flat[3] = torch.nextafter(flat[3], flat.new_tensor(float("inf"))) if flat.is_floating_point() else flat[3] + 1


if __name__ == "__main__":
    main()
