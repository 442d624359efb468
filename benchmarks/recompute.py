"""`memory.checkpointing` one level after another: peak memory and seconds of one update, with random weights, in one run.

    python benchmarks/recompute.py configs/svd_xt_lora.yaml
    python benchmarks/recompute.py configs/svd_xt_full.yaml --policies diffusers units nested train.ema=false
    python benchmarks/recompute.py configs/tiny.yaml --steps 5                                  # the same path on a CPU

An update is `train_step`, its backward pass and the optimizer's step, on one clip of the configuration's size. Networks are made on
the device with random numbers, the clip too: fine for time and memory. A level that does not fit says so and the next one follows.
Prints one JSON object. On a CPU no memory is measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from svdtune.config.load import load_config
from svdtune.config.schema import Config
from svdtune.contracts import Draws, VideoBatch, specs
from svdtune.model.load import fake_model, known_configs
from svdtune.trainer.build import DTYPES, clip_pixels, prepare_networks
from svdtune.trainer.optimizer import make_learning
from svdtune.trainer.step import Parts, train_step

POLICIES = ["none", "level0", "units", "nested", "diffusers"]
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=POLICIES)
    parser.add_argument("--steps", type=int, default=4, help="updates timed, after two that are not")
    arguments = parser.parse_intermixed_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = load_config(Path(arguments.config), arguments.overrides)
    rows = {policy: measured(config, policy, device, arguments.steps) for policy in arguments.policies}
    print(json.dumps({
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "command": " ".join(["python", "benchmarks/recompute.py", *sys.argv[1:]]),
        "rows": rows,
    }, indent=2))  # fmt: skip


def measured(config: Config, policy: Any, device: torch.device, steps: int) -> dict[str, Any]:
    """One row: GiB allocated and reserved at the peak, median seconds of an update."""
    config = replace(config, memory=replace(config.memory, checkpointing=policy))
    try:
        seconds = updates(config, device, steps)
    except torch.OutOfMemoryError as error:
        return {
            "out_of_memory": str(error).split(". ")[0],
            "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2),
        }
    finally:
        gc.collect()
    memory = {}
    if device.type == "cuda":
        memory = {
            "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2),
            "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 2),
        }
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return {"seconds": round(median(seconds[2:]), 4), **memory}


def updates(config: Config, device: torch.device, steps: int) -> list[float]:
    """Seconds of each update, the first two with the allocator's and the kernels' first times."""
    torch.manual_seed(0)
    model = fake_model(known_configs(config.model))
    for network in (model.unet, model.vae, model.image_encoder):
        network.to_empty(device=device)
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.is_floating_point():
                tensor.data.normal_(0, 0.02)
            else:
                tensor.zero_()
    trained = prepare_networks(model, config, on_accelerator=True)
    model.unet.to(device)
    learning = make_learning(config, trained, device)
    parts = Parts(model.unet, model.vae, model.image_encoder, clip_pixels(model), model.facts, DTYPES[config.train.precision],
                  config.memory.vae_chunk)  # fmt: skip
    data = config.data
    axes = model.facts.axes(b=1, t=data.num_frames, h=data.height, w=data.width)
    batch, draws = record(VideoBatch, axes, device), record(Draws, axes, device)
    seconds = []
    for _ in range(steps + 2):
        synchronize(device)
        began = time.perf_counter()
        train_step(parts, batch, draws).loss.backward()
        learning.optimizer.step()
        learning.optimizer.zero_grad(set_to_none=True)
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return seconds


def record(kind: Any, axes: Any, device: torch.device) -> Any:
    """A batch or its draws: noise where there are many numbers, ones where there is one for each clip."""

    def tensor(spec: Any) -> torch.Tensor:
        shape, dtype = spec.shape(axes), getattr(torch, spec.dtype)
        return (
            torch.randn(shape, device=device).to(dtype)
            if len(shape) > 1
            else torch.ones(shape, device=device, dtype=dtype)
        )

    return kind(**{name: tensor(spec) for name, spec in specs(kind).items()})


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
