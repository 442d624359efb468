"""How much memory a run needs, from the recorded step (`plan_step.py`), and whether the device has it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from svdtune.config.schema import Config
from svdtune.guards.findings import Finding
from svdtune.trainer.optimizer import state_bytes

if TYPE_CHECKING:
    from svdtune.guards.plan_step import Recording

GIB = 2**30
CONTEXT = GIB // 2
"""What the driver keeps of a card for a process, before any tensor."""
_PARAMETER_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Estimate:
    """Bytes that one process needs on its device."""

    weights: int
    """UNet, VAE and CLIP tower in the dtypes of training."""
    optimizer: int
    """Optimizer state and moving average."""
    step: int
    """What the peak has beside them: activations, gradients and everything else a step or a sample video makes."""
    trained_parameters: int
    held: int = 0
    """The peak with what the caching allocator takes and does not use; 0: not known."""
    where: str = ""
    """What runs at the peak: `recompute in unet.up_blocks.3.resnets.0`."""
    recording: Recording | None = None
    """What it was read from, where one process has all of it."""

    @property
    def peak(self) -> int:
        """Allocated at the most."""
        return self.weights + self.optimizer + self.step

    @property
    def reserved(self) -> int:
        """What `nvidia-smi` would show, the context aside."""
        return max(self.peak, self.held)

    def fits(self, device: int) -> bool:
        """Whether a device of so many bytes is enough, beside the context: the allocator gives unused blocks back before it fails."""
        room = device - CONTEXT
        return self.reserved <= room or (self.recording is not None and self.peak <= room and self.recording.fits(room))

    def as_json(self, device: int | None = None) -> dict[str, Any]:
        """What `--json` and preflight.json show as `predicted`; `device` is the memory it was held against."""
        shown = {
            "peak": self.peak,
            "reserved": self.reserved,
            "weights": self.weights,
            "optimizer": self.optimizer,
            "step": self.step,
        }
        gib = {f"{name}_gib": round(value / GIB, 3) for name, value in shown.items()}
        against = {} if device is None else {"device_gib": round(device / GIB, 3)}
        return {**gib, **against, "where": self.where, "trained_parameters": self.trained_parameters}


def estimate(recording: Recording, *, shards: int = 1) -> Estimate:
    """What was recorded of one process that has everything.

    With FSDP2 the UNet is divided into `shards`, and so are gradients and optimizer state, all of which `recording` has whole.
    """
    phase, peak = recording.top
    step = peak.bytes - recording.weights - recording.optimizer
    where = f"{phase} in {peak.where}" if peak.where else phase
    if shards == 1:
        return Estimate(
            recording.weights,
            recording.optimizer,
            step,
            recording.trained_parameters,
            recording.reserved,
            where,
            recording,
        )
    weights = recording.weights - recording.unet + recording.unet // shards + recording.gathered
    step -= recording.gradients * (shards - 1) // shards
    return Estimate(weights, recording.optimizer // shards, max(0, step), recording.trained_parameters, 0, where)


def device_bytes(given: int | None) -> int | None:
    """Memory of the device that the run is for: as given, else of this machine's GPU, else unknown."""
    return _gpu_bytes() if given is None else given


def check_memory(config: Config, needed: Estimate, given: int | None) -> list[Finding]:
    """MEM701: the step does not fit into the device (see `device_bytes`). MEM702: no GPU, and not into this machine."""
    available = device_bytes(given)
    if available is None:
        return _on_cpu(needed)
    if needed.fits(available):
        return []
    fix, patch = smaller(config, needed.where)
    at = f" at the peak, in {needed.where}" if needed.where else ""
    return [
        Finding(
            "MEM701", "error", "memory", f"{_gib(needed.peak)} in one process, {_gib(needed.reserved)} with what the allocator keeps: "
            f"{_gib(needed.weights)} of weights, {_gib(needed.optimizer)} of optimizer state, {_gib(needed.step)} beside them{at}",
            f"at most {_gib(available - CONTEXT)}: the device's {_gib(available)} without the driver's {_gib(CONTEXT)}",
            "Training would stop with an out-of-memory error in its first steps. Most of the step is activations, which "
            "grow with batch x frames x height x width.",
            fix, patch,
        )
    ]  # fmt: skip


def _on_cpu(needed: Estimate) -> list[Finding]:
    """A laptop that checks a run for a larger machine is told, not refused."""
    import psutil

    host = psutil.virtual_memory().total
    if needed.peak <= host:
        return []
    return [
        Finding(
            "MEM702", "warning", "memory", f"about {_gib(needed.peak)} in one process, and no GPU is visible",
            f"at most {_gib(host)}, this machine's memory", "Started here it would train on the CPU and be killed.",
            "Check against the card that the run is for: svdtune preflight CONFIG --gpu 24GiB.",
        )
    ]  # fmt: skip


def check_disk(config: Config, trained_parameters: int) -> list[Finding]:
    """ENV013: the planned checkpoints do not fit. `trained_parameters`: how many numbers are trained.

    Counts what is certain: float32 weights, optimizer state and averages of each checkpoint, and one more being written;
    checkpoints that this run already has are not asked for twice. The export comes on top and is not counted.
    """
    train, checkpoint = config.train, config.checkpoint
    each = int(
        trained_parameters
        * (_PARAMETER_BYTES[config.memory.parameters] + state_bytes(config) + (4 if train.ema else 0))
    )
    planned = min(checkpoint.keep, -(-train.steps // checkpoint.interval))
    folder = Path(config.run.dir) / config.run.name
    there = _bytes_of(folder / "checkpoints")
    # The oldest is removed only after the newest is published.
    extra = 1 if -(-train.steps // checkpoint.interval) > planned else 0
    needed = each * (planned + extra) - there
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed <= free:
        return []
    keep = int((free + there) // each) - 1 if each else 0
    patch = (f"checkpoint.keep={keep}",) if 1 <= keep < checkpoint.keep else ()
    fix = (
        f"Free space, set {patch[0]}, or set run.dir to a larger disk."
        if patch
        else "Free space, or set run.dir to a larger disk."
    )
    return [Finding("ENV013", "error", "run.dir", f"{_gib(free)} free", f"{_gib(needed)}: {planned + extra} checkpoints of {_gib(each)}",
                    f"Each holds {trained_parameters:,} trained numbers in float32, {train.optimizer}'s state"
                    f"{' and their averages' if train.ema else ''}; an old one goes only after the new one is safe.",
                    fix, patch)]  # fmt: skip


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0


def smaller(config: Config, where: str = "") -> tuple[str, tuple[str, ...]]:
    """The first change that keeps what is learned; `where` is what runs at the peak."""
    if where.startswith(("sample in vae", "encode in vae")) and config.memory.vae_chunk > 1:
        return "Take fewer frames at once through the VAE (memory.vae_chunk).", ("memory.vae_chunk=1",)
    train = config.train
    if config.memory.checkpointing != "nested":
        more = "units" if config.memory.checkpointing == "none" else "nested"
        return "Recompute more activations in the backward pass (memory.checkpointing).", (
            f"memory.checkpointing={more}",
        )
    if train.batch_size > 1:
        steps = train.accumulation * train.batch_size
        return (
            "Take one clip at a time, with as many clips per update (train.batch_size, train.accumulation).",
            ("train.batch_size=1", f"train.accumulation={steps}"),
        )
    if config.adapt.method != "lora":
        return "Train adapters instead of all weights (adapt.method).", ("adapt.method=lora",)
    return "Take fewer frames (data.num_frames) or smaller ones (data.height, data.width).", ()


def _gpu_bytes() -> int | None:
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def _gib(size: int) -> str:
    return f"{size / GIB:,.1f} GiB" if size >= GIB else f"{size / 2**20:,.0f} MiB"
