"""Twenty real steps of `svdtune train` with random weights: does the full size fit, how much memory, how long a step.

    python benchmarks/full_size.py configs/svd_xt_lora.yaml train.steps=20
    python benchmarks/full_size.py configs/svd_xt_full.yaml train.steps=20 --base tiny     # the same path on a CPU

Writes a diffusers folder of the architecture with random fp16 weights and demo clips (both kept in --work), runs the
shipped command on them, and prints one JSON object: device, versions, command, loss, seconds per step, peak memory.
Random weights are fine for time and memory; the losses mean nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median

import torch
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from svdtune.data.demo import write_demo
from svdtune.model.facts import FILES, SHIPPED, TINY
from svdtune.model.source import read_configs


def main() -> None:
    arguments, model = prepared(__doc__)
    run = arguments.work / "runs" / Path(arguments.config).stem
    shutil.rmtree(run, ignore_errors=True)
    command = [
        sys.executable, "-m", "svdtune", "train", arguments.config, f"model.pretrained={model}", "model.variant=fp16",
        f"data.root={arguments.work / 'clips'}", f"run.dir={run.parent}", f"run.name={run.name}", "preflight.enabled=false",
        "validation.samples=0", "validation.clips=0", "tracking.backends=[]", "train.warmup=0", "train.log_interval=1",
        *arguments.overrides,
    ]  # fmt: skip
    subprocess.run(command, check=True)
    print(json.dumps(summary(run, command), indent=2))


def prepared(description: str | None) -> tuple[argparse.Namespace, Path]:
    """The command line of a benchmark at full size, and the model that it asks for; clips lie beside it."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--base", default="stabilityai/stable-video-diffusion-img2vid-xt", choices=[*SHIPPED, "tiny"])
    parser.add_argument("--work", type=Path, default=Path("/tmp/svdtune-full-size"))
    arguments = parser.parse_intermixed_args()
    write_clips(arguments.work / "clips")
    facts = TINY if arguments.base == "tiny" else SHIPPED[arguments.base]
    return arguments, write_random_model(facts, arguments.work / "model")


def write_clips(folder: Path) -> None:
    """Eight clips of four seconds, long enough for 25 frames at 7 fps."""
    write_demo(folder, clips=8, motion="down", seed=0, num_frames=100, fps=24, motion_bucket=12)


def write_random_model(facts: Path, folder: Path) -> Path:
    """A diffusers folder of this architecture with small random fp16 weights; an existing one is kept."""
    if (folder / "model_index.json").exists():
        return folder
    torch.manual_seed(0)
    configs = read_configs(facts)
    unet = UNetSpatioTemporalConditionModel.from_config(dict(configs.unet))
    vae = AutoencoderKLTemporalDecoder.from_config(dict(configs.vae))
    clip = CLIPVisionModelWithProjection(CLIPVisionConfig.from_dict(dict(configs.image_encoder)))
    for network, part in ((unet, "unet"), (vae, "vae"), (clip, "image_encoder")):
        network.half().save_pretrained(folder / part, variant="fp16")
    for part in ("scheduler", "feature_extractor"):
        (folder / part).mkdir(exist_ok=True)
        shutil.copy(facts / FILES[part], folder / part)
    shutil.copy(facts / "model_index.json", folder)
    return folder


def summary(run: Path, command: list[str]) -> dict[str, object]:
    """What was seen; seconds per step leave out the first five steps."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = [line["seconds"] for line in lines[5:] if "seconds" in line]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": gpu or f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "command": " ".join(command[1:]),
        "steps": lines[-1]["step"],
        "seconds_per_step_median": median(seconds) if seconds else None,
        "peak_memory_gib": lines[-1]["memory_gib"],
        "memory_is": "torch.cuda.max_memory_allocated" if gpu else "resident set",
        "losses": [line["loss"] for line in lines],
    }


if __name__ == "__main__":
    main()
