"""The latent cache: how fast entries are read, and a training step with and without it, in one run.

    python benchmarks/cache.py configs/svd_xt_lora.yaml
    python benchmarks/cache.py configs/svd_xt_lora.yaml --entries 64 --workers 2 data.height=320 data.width=512
    python benchmarks/cache.py configs/tiny.yaml --steps 3                                      # the same path on a CPU

Reading: entries of the configuration's size, random numbers, through training's own loader; they lie in memory after they were
written, so it is the reader that is measured and not the disk. Steps: `train_step`, its backward pass and the optimizer's step on
one clip; networks have the random weights that their classes begin with: fine for time and memory. `loss_difference` is that of
the cached clip from the live one. Prints one JSON object. On a CPU no memory is measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from svdtune.checkpoint.tensors import save_tensors
from svdtune.config.load import load_config
from svdtune.config.schema import Config
from svdtune.contracts import Batch, LatentBatch, VideoBatch, move
from svdtune.data.latents import CachedFile, Entry, Index, checksum, entry_path
from svdtune.data.loader import make_loader
from svdtune.diffusion.conditioning import image_embeds, packed, posterior
from svdtune.diffusion.draws import draws_for
from svdtune.model.load import ModelParts, build_part, fake_model, known_configs
from svdtune.trainer.build import DTYPES, clip_pixels, prepare_networks
from svdtune.trainer.optimizer import make_learning
from svdtune.trainer.step import Parts, train_step

GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--steps", type=int, default=4, help="updates timed, after two that are not; 0: reading alone")
    parser.add_argument("--entries", type=int, default=32, help="clips read")
    parser.add_argument("--workers", type=int, default=0, help="loader processes; 0: this one")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_intermixed_args()
    device = torch.device(arguments.device)
    config = load_config(Path(arguments.config), arguments.overrides)
    reading = read(config, arguments.entries, arguments.workers)
    print(json.dumps({
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "command": " ".join(["python", "benchmarks/cache.py", *sys.argv[1:]]),
        "reading": reading,
        "steps": steps(config, device, arguments.steps) if arguments.steps else {},
    }, indent=2))  # fmt: skip


def read(config: Config, count: int, workers: int) -> dict[str, Any]:
    """MB/s and clips/s of the loader over `count` entries, each read once before."""
    with tempfile.TemporaryDirectory(prefix="svdtune-cache-") as folder:
        data = replace(config.data, latents=folder, windows=1, workers=workers, flip=False)
        index = written(config, Path(folder), count)
        size = entry_path(Path(folder), index.train[0].entries[0].key).stat().st_size
        for first in (0, count):
            loader = make_loader(
                data, index, seed=0, rank=0, world=1, batch_size=1, first_sample=first, last_sample=first + count
            )
            next(loader)
            began = time.perf_counter()  # without the start of the workers
            for _ in loader:
                pass
            seconds = time.perf_counter() - began
    rate = (count - 1) / seconds
    return {
        "workers": workers,
        "mb_per_clip": round(size / 1e6, 2),
        "clips_per_second": round(rate, 1),
        "mb_per_second": round(rate * size / 1e6, 1),
    }


def written(config: Config, folder: Path, count: int) -> Index:
    """Entries of random numbers, and their index."""
    data, facts = config.data, fake_model(known_configs(config.model)).facts
    shape = (data.num_frames, facts.z, data.height // facts.f, data.width // facts.f)
    files = []
    for number in range(count):
        tensors = {
            "first_frame": packed(torch.rand(facts.c, data.height, data.width) * 2 - 1),
            "image_embeds": torch.randn(facts.d),
            "latents_mean": torch.randn(shape).half(),
            "latents_std": torch.rand(shape).half(),
        }
        key = f"{number:064x}"[::-1]
        path = entry_path(folder, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(path, tensors, {"crc32": checksum(tensors)})
        files.append(CachedFile(f"{number}.mp4", 0, 0, "", (Entry(0, False, key),)))
    return Index({}, tuple(files), ((0,),) * count, (), (), ())


def steps(config: Config, device: torch.device, count: int) -> dict[str, Any]:
    """Seconds and GiB of an update on a clip that is encoded in it, and on the same clip from the cache."""
    model = with_random_weights(config, device)
    trained = prepare_networks(model, config, on_accelerator=device.type != "cpu")
    model.unet.to(device)  # pyright: ignore[reportArgumentType]
    learning = make_learning(config.train, trained, device)
    parts = Parts(model.unet, model.vae, model.image_encoder, clip_pixels(model), model.facts, DTYPES[config.train.precision],
                  config.memory.vae_chunk)  # fmt: skip
    pixels = torch.rand(1, config.data.num_frames, 3, config.data.height, config.data.width) * 2 - 1
    told = (
        torch.full((1,), config.data.fps),
        torch.full((1,), float(config.data.motion_bucket)),
        torch.zeros(1, dtype=torch.int64),
    )
    live = VideoBatch(pixels, *told)
    cached = from_pixels(parts, move(live, device))
    with torch.no_grad():
        losses = [float(train_step(parts, *on_device(batch, parts, config, device)).loss) for batch in (live, cached)]
    rows = {"live": timed(parts, live, config, learning.optimizer, device, count)}
    parts.image_encoder.to("meta")  # training with a cache does not have it on the device
    rows["cached"] = timed(parts, cached, config, learning.optimizer, device, count)
    return {**rows, "loss_difference": abs(losses[1] - losses[0]) / losses[0],
            "speed_up": round(rows["live"]["seconds"] / rows["cached"]["seconds"], 3)}  # fmt: skip


def with_random_weights(config: Config, device: torch.device) -> ModelParts:
    torch.manual_seed(0)
    model = fake_model(known_configs(config.model))
    with torch.device(device):
        parts = {part: build_part(part, getattr(model.configs, part)) for part in ("unet", "vae", "image_encoder")}
    return replace(model, **{part: network.to(device).requires_grad_(False).eval() for part, network in parts.items()})


def from_pixels(parts: Parts, live: VideoBatch) -> LatentBatch:
    """What `svdtune cache` would have written of the clip."""
    with torch.no_grad():
        mean, std = (moment.half()[None].cpu() for moment in posterior(parts.vae, live.pixels[0], parts.vae_chunk))
        embeds = image_embeds(parts.image_encoder, live.pixels[:, 0], parts.clip).cpu()
    return LatentBatch(
        mean, std, embeds, packed(live.pixels[:, 0]).cpu(), live.fps.cpu(), live.motion_bucket.cpu(), live.sample.cpu()
    )


def on_device(batch: Batch, parts: Parts, config: Config, device: torch.device) -> tuple[Batch, Any]:
    """As the loop does it, from the CPU."""
    draws = draws_for(batch, parts.facts, config)
    return move(batch, device), move(draws, device)


def timed(
    parts: Parts, batch: Batch, config: Config, optimizer: torch.optim.Optimizer, device: torch.device, count: int
) -> dict[str, Any]:
    """Median seconds of an update, and GiB allocated at its peak."""
    given, seconds = on_device(batch, parts, config, device), []
    with peak(device) as memory:
        for _ in range(count + 2):
            synchronize(device)
            began = time.perf_counter()
            train_step(parts, *given).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            synchronize(device)
            seconds.append(time.perf_counter() - began)
    return {"seconds": round(median(seconds[2:]), 4), **memory}


@contextmanager
def peak(device: torch.device) -> Iterator[dict[str, float]]:
    """Filled at the end."""
    found: dict[str, float] = {}
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    yield found
    if device.type == "cuda":
        found["peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
