"""Does memory.parameters=bf16 hurt? The tiny base learns another motion with each way of keeping parameters and state, on a CPU.

    python benchmarks/precision.py
    python benchmarks/precision.py --seeds 5 --steps 300 train.lr=1e-4

Every variant sees the same clips and draws, so that curves differ by precision alone; other seeds give other clips and draws, and
show how much chance there is in a run. `nearest` is torch's AdamW over bfloat16 parameters, which nobody should use. For each variant
and seed: held-out loss before and after, training loss in the last fifth, the share of numbers that an update moves, and seconds.
Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from svdtune.config.load import load_config
from svdtune.config.schema import Config
from svdtune.contracts import Draws, Encoded, VideoBatch
from svdtune.data.catalog import scan
from svdtune.data.demo import write_demo
from svdtune.data.held_out import held_out_batches
from svdtune.data.loader import make_loader
from svdtune.diffusion.draws import draws_for, fixed_draws
from svdtune.model.load import load_model
from svdtune.trainer.build import DTYPES, clip_pixels, prepare_networks
from svdtune.trainer.optimizer import make_optimizer, make_schedule
from svdtune.trainer.step import Parts, denoise, encode

REPO = Path(__file__).parents[1]
SETTING = ["data.workers=0", "train.precision=bf16", "train.steps=150", "train.batch_size=2", "train.lr=3e-4", "run.threads=1",
           "train.warmup=10", "data.num_frames=6"]  # fmt: skip
VARIANTS = {
    "fp32": ["memory.parameters=fp32"],
    "bf16": ["memory.parameters=bf16"],
    "bf16 8-bit": ["memory.parameters=bf16", "train.optimizer=adamw8bit"],
    "nearest": ["memory.parameters=bf16"],
}


@dataclass(frozen=True)
class Clip:
    """What `denoise` needs, encoded once for all variants."""

    encoded: Encoded
    batch: VideoBatch
    draws: Draws


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    arguments = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    rows: dict[str, list[dict[str, float]]] = {variant: [] for variant in arguments.variants}
    with tempfile.TemporaryDirectory() as folder:
        write_demo(Path(folder), clips=20, motion="down", seed=0)
        for seed in range(arguments.seeds):
            own = [
                f"data.root={folder}",
                *SETTING,
                f"train.steps={arguments.steps}",
                *arguments.overrides,
                f"run.seed={seed}",
            ]
            training, held_out = clips(load_config(REPO / "configs/tiny.yaml", own))
            for variant, rows_of in rows.items():
                config = load_config(REPO / "configs/tiny.yaml", [*own, *VARIANTS[variant]])
                rows_of.append(trained(config, training, held_out, nearest=variant == "nearest"))
                print(f"seed {seed}, {variant}: {rows_of[-1]}", file=sys.stderr)
    print(json.dumps({
        "device": "CPU", "torch": torch.__version__, "command": " ".join(["python", "benchmarks/precision.py", *sys.argv[1:]]),
        "against fp32": {variant: against(rows["fp32"], of) for variant, of in rows.items()} if "fp32" in rows else {},
        "rows": rows,
    }, indent=2))  # fmt: skip


def parts_of(config: Config) -> tuple[Parts, dict[str, torch.nn.Parameter]]:
    model = load_model(config.model)
    trained = prepare_networks(model, config, on_accelerator=False)
    dtype = DTYPES[config.train.precision]
    return Parts(model.unet, model.vae, model.image_encoder, clip_pixels(model), model.facts, dtype, 4), trained


def clips(config: Config) -> tuple[list[Clip], list[Clip]]:
    """The batches of training in their order, and the held-out ones at every sigma of the configuration."""
    parts, _ = parts_of(config)
    catalog, train = scan(config.data), config.train
    loader = make_loader(config.data, catalog.train, seed=config.run.seed, rank=0, world=1, batch_size=train.batch_size,
                         first_sample=0, last_sample=train.steps * train.batch_size)  # fmt: skip
    training = []
    for batch in loader:
        draws = draws_for(batch, parts.facts, config)
        training.append(Clip(encode(parts, batch, draws), batch, draws))
    return training[: train.steps], list(held_out_clips(config, parts, catalog.held_out))


def held_out_clips(config: Config, parts: Parts, files: Any) -> Iterator[Clip]:
    for batch in held_out_batches(config.data, files, clips=8, seed=0, batch_size=4):
        for sigma in config.validation.sigmas:
            axes, sample = batch.axes(parts.facts), batch.sample.tolist()
            draws = fixed_draws(sample, sigma, axes, seed=0, conditioning=config.conditioning)
            yield Clip(encode(parts, batch, draws), batch, draws)


def trained(config: Config, training: list[Clip], held_out: list[Clip], *, nearest: bool) -> dict[str, float]:
    """One run."""
    parts, parameters = parts_of(config)
    optimizer = make_optimizer(config, parameters.values(), torch.device("cpu"))
    if nearest:
        group = optimizer.param_groups[0]
        settings = {key: group[key] for key in ("lr", "betas", "weight_decay")}
        optimizer = torch.optim.AdamW(parameters.values(), **settings)
    schedule = make_schedule(config.train, optimizer)
    before, losses, moved, began = loss_of(parts, held_out), [], [], time.perf_counter()
    for clip in training:
        loss = denoise(parts, clip.encoded, clip.batch, clip.draws).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), config.train.clip_norm or torch.inf)
        old = [parameter.detach().clone() for parameter in parameters.values()]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        changed = [float((new != was).sum()) for new, was in zip(parameters.values(), old, strict=True)]
        moved.append(sum(changed) / sum(was.numel() for was in old))
    seconds = (time.perf_counter() - began) / len(training)
    last = losses[-max(1, len(losses) // 5) :]
    return {"held-out before": before, "held-out after": loss_of(parts, held_out), "training": fmean(last),
            "moved per step": fmean(moved), "seconds per step": seconds}  # fmt: skip


@torch.no_grad()
def loss_of(parts: Parts, held_out: list[Clip]) -> float:
    return fmean(float(denoise(parts, clip.encoded, clip.batch, clip.draws).loss) for clip in held_out)


def against(fp32: list[dict[str, float]], of: list[dict[str, float]]) -> dict[str, float]:
    """Held-out loss after training, on the mean over seeds; the noise is the spread of float32 over seeds."""
    gained = [row["held-out before"] - row["held-out after"] for row in fp32]
    apart = [mine["held-out after"] - theirs["held-out after"] for mine, theirs in zip(of, fp32, strict=True)]
    spread = {"spread of fp32 over seeds": stdev(row["held-out after"] for row in fp32)} if len(fp32) > 1 else {}
    return {
        "mean difference": fmean(apart),
        "largest difference": max(map(abs, apart)),
        "fp32 gained": fmean(gained),
        **spread,
    }


if __name__ == "__main__":
    main()
