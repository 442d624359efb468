"""How much memory a run needs: the peak of all storages alive in the rehearsed step, beside what stays for the whole run.

A first estimate: fake tensors have the sizes of real ones, the allocator's rounding and the kernels' workspaces are not seen.
"""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from svdtune.config.schema import Config
from svdtune.engine import BLOCKS
from svdtune.guards.findings import Finding

GIB = 2**30
_STATE_BYTES = {"adamw": 8, "adamw8bit": 2, "adafactor": 0}
"""Bytes of optimizer state per trained parameter; adafactor keeps a row and a column per matrix, next to nothing."""


ASKS_DEVICE = torch.ops.prim.device.default
"""Autograd and autocast ask it of every fake tensor, twice as often as they compute: answered at once, it costs nothing."""


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of all storages that operators made and that are still alive; `peak` is the most there ever was."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is ASKS_DEVICE:
            return args[0].device
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if (key := storage._cdata) in self._seen:
            return
        self.live += (size := storage.nbytes())
        self.peak = max(self.peak, self.live)
        self._seen[key] = weakref.ref(storage, lambda _gone: self._free(key, size))

    def _free(self, key: int, size: int) -> None:
        del self._seen[key]
        self.live -= size


@dataclass(frozen=True)
class Estimate:
    """Bytes that one process needs on its device."""

    weights: int
    """UNet, VAE and CLIP tower in the dtypes of training."""
    optimizer: int
    """Optimizer state and moving average."""
    step: int
    """Peak of activations, gradients and everything else the step makes."""
    trained_parameters: int

    @property
    def peak(self) -> int:
        return self.weights + self.optimizer + self.step

    def as_json(self, device: int | None = None) -> dict[str, Any]:
        """What `--json` and preflight.json show as `predicted`; `device` is the memory it was held against."""
        shown = {"peak": self.peak, "weights": self.weights, "optimizer": self.optimizer, "step": self.step}
        gib = {f"{name}_gib": round(value / GIB, 3) for name, value in shown.items()}
        against = {} if device is None else {"device_gib": round(device / GIB, 3)}
        return {**gib, **against, "trained_parameters": self.trained_parameters}


def estimate(
    config: Config, networks: Sequence[nn.Module], trained: Iterable[Tensor], step: int, *, shards: int = 1
) -> Estimate:
    """The rehearsed step's peak in bytes, and what is resident around it, in one process.

    With FSDP2 the first network, the UNet, is divided into `shards`, and so are its gradients, which `step` has whole.
    """
    weights = [sum(t.nbytes for t in (*network.parameters(), *network.buffers())) for network in networks]
    parameters = list(trained)
    count = sum(parameter.numel() for parameter in parameters)
    state = _STATE_BYTES[config.train.optimizer] + (4 if config.train.ema else 0)
    if shards > 1:
        weights[0] = weights[0] // shards + _gathered(networks[0])
        step -= sum(parameter.nbytes for parameter in parameters) * (shards - 1) // shards
    return Estimate(sum(weights), count * state // shards, max(0, step), count)


def _gathered(unet: nn.Module) -> int:
    """What is whole at once: all that is in no block, and two blocks, of which one computes and the next is on its way."""
    blocks = [module for module in unet.modules() if type(module).__name__ in BLOCKS]
    sizes = [sum(parameter.nbytes for parameter in block.parameters()) for block in blocks]
    rest = sum(parameter.nbytes for parameter in unet.parameters()) - sum(sizes)
    return rest + sum(sorted(sizes)[-2:])


def device_bytes(given: int | None) -> int | None:
    """Memory of the device that the run is for: as given, else of this machine's GPU, else unknown."""
    return _gpu_bytes() if given is None else given


def check_memory(config: Config, needed: Estimate, given: int | None) -> list[Finding]:
    """MEM701: the step does not fit into the device (see `device_bytes`). MEM702: no GPU, and not into this machine."""
    available = device_bytes(given)
    if available is None:
        return _on_cpu(needed)
    if needed.peak <= available:
        return []
    fix, patch = smaller(config)
    return [
        Finding(
            "MEM701", "error", "memory", f"about {_gib(needed.peak)} in one process: {_gib(needed.weights)} of weights, "
            f"{_gib(needed.optimizer)} of optimizer state, {_gib(needed.step)} for the step at its peak",
            f"at most {_gib(available)}, the device's memory",
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
    each = trained_parameters * (4 + _STATE_BYTES[train.optimizer] + (4 if train.ema else 0))
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


def smaller(config: Config) -> tuple[str, tuple[str, ...]]:
    """The first change that keeps what is learned."""
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
