"""From a Config to everything the loop needs. Nothing here trains."""

from __future__ import annotations

import gc
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, DistributedType, InitProcessGroupKwargs
from accelerate.utils import GradientAccumulationPlugin
from diffusers.training_utils import EMAModel
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from svdtune.config.schema import Config
from svdtune.diffusion.conditioning import ClipPixels
from svdtune.engine import Sharding, set_aside, sharding, unfit
from svdtune.errors import ConfigError, UsageError
from svdtune.launch import check_world, cores, local_processes
from svdtune.model.adapt import adapt
from svdtune.model.attention import require_attention, use_attention
from svdtune.model.fold import fold
from svdtune.model.load import ModelParts, load_model
from svdtune.model.recompute import recompute
from svdtune.model.regions import compile_blocks, require_compiler
from svdtune.model.source import weights_hash
from svdtune.model.widen import require_learning
from svdtune.trainer.optimizer import make_learning
from svdtune.trainer.run_folder import RunFolder
from svdtune.trainer.sharding import accumulating, require_shardable, shard
from svdtune.trainer.step import Parts

if TYPE_CHECKING:
    from svdtune.data.catalog import Catalog

# How long ranks wait for the main process, which samples videos, saves and exports while they do.
PATIENCE = timedelta(hours=1)
PARALLEL = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}
TRAINED = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""By memory.parameters."""


@dataclass(frozen=True)
class Session:
    """One process of a run, built and ready."""

    config: Config
    accelerator: Accelerator
    folder: RunFolder
    catalog: Catalog
    model: ModelParts
    """The unwrapped networks (`model.unet` is the adapted UNet inside `parts.unet`)."""
    parts: Parts
    trained: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    """Wrapped by accelerate: it owns the gradient scaler."""
    schedule: LRScheduler
    ema: EMAModel | None
    sharding: Sharding | None
    """Where every rank holds a part of each parameter of the UNet."""
    conventions: dict[str, Any]
    """What a sampler must share with this training; goes into every manifest. Empty on other ranks than the main one."""

    @property
    def clips_per_step(self) -> int:
        """Clips that one optimizer step sees, over all ranks."""
        train = self.config.train
        return train.batch_size * train.accumulation * self.accelerator.num_processes

    def unsynced(self) -> AbstractContextManager[Any]:
        """Backward passes inside add to the gradients of this rank, and average nothing."""
        return accumulating(self.model.unet) if self.sharding else self.accelerator.no_sync(self.parts.unet)


def make_accelerator(config: Config) -> Accelerator:
    """The process group, checked against what the launcher promised.

    Raises ConfigError for a precision that this device cannot do, UsageError for a world that is not one run.
    """
    on_cpu = not torch.cuda.is_available()
    if on_cpu and config.train.precision == "fp16":
        raise ConfigError("train.precision: fp16 needs an NVIDIA GPU and none is visible. Use bf16 or no.")
    if not_ours := unfit():
        raise UsageError(str(not_ours))
    if sharding():
        require_shardable(config)
    patience = InitProcessGroupKwargs(timeout=PATIENCE)
    with set_aside():
        accelerator = Accelerator(
            kwargs_handlers=[patience],
            # Without it a variable of the environment would divide the loss a second time.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            cpu=on_cpu, mixed_precision=config.train.precision, log_with=list(config.tracking.backends) or None,
            project_dir=str(Path(config.run.dir) / config.run.name),
        )  # fmt: skip
    check_world(accelerator.num_processes)
    if accelerator.distributed_type not in PARALLEL:
        raise UsageError(
            f"the launcher asks for {accelerator.distributed_type.value}: svdtune trains with one process, DDP or FSDP2. "
            "configs/accelerate/multi_gpu.yaml is a config that works."
        )
    # Kernels round differently with another thread count, so it is set here and not left to the launcher.
    torch.set_num_threads(config.run.threads or max(1, cores() // local_processes()))
    return accelerator


def build(config: Config, accelerator: Accelerator, folder: RunFolder, catalog: Catalog) -> Session:
    """Load, adapt and wrap. Each error is the user's, from the module that found it."""
    dtype = DTYPES[config.train.precision]
    require_attention(config.memory.attention, accelerator.device, dtype)
    if config.train.compile:
        require_compiler(accelerator.device)
    bridge = config.conditioning.bridge is not None
    model = load_model(config.model, bridge=bridge, seed=config.run.seed, only=networks_of(config))
    on_accelerator = accelerator.device.type != "cpu"
    trained = prepare_networks(model, config, on_accelerator=on_accelerator, compiled=config.train.compile)
    if model.widening:
        require_learning(model.widening, trained, config.adapt.method)
        if accelerator.is_main_process:
            print(*model.widening.said, sep="\n", file=sys.stderr)
    later = for_samples_alone(model, config)
    for part in (*model.vae.children(), model.image_encoder):
        if part not in later:
            part.to(accelerator.device)
    shards = sharding() if torch.distributed.is_initialized() else None
    if shards:  # parts go to the device, the whole never does
        trained = shard(model.unet, trained, shards, accelerator.device)
    else:
        model.unet.to(accelerator.device)  # pyright: ignore[reportArgumentType]
    learning = make_learning(config, trained, accelerator.device)
    unet = model.unet if shards else accelerator.prepare(model.unet)
    wrapped: Any = accelerator.prepare(learning.optimizer)
    return Session(
        config=config,
        accelerator=accelerator,
        folder=folder,
        catalog=catalog,
        model=model,
        parts=Parts(
            unet, model.vae, model.image_encoder, clip_pixels(model), model.facts, dtype, config.memory.vae_chunk
        ),
        trained=trained,
        optimizer=wrapped,
        schedule=learning.schedule,
        ema=learning.ema,
        sharding=shards,
        # Hashing the base reads gigabytes, and only the main process writes manifests.
        conventions=conventions(config, model) if accelerator.is_main_process else {},
    )


def for_samples_alone(model: ModelParts | Parts, config: Config) -> tuple[Any, ...]:
    """What training does not ask: with cached clips CLIP tower and VAE decoder, which wait on the CPU for sample videos."""
    return (model.image_encoder, model.vae.decoder) if config.data.latents else ()


def networks_of(config: Config) -> tuple[str, ...]:
    """The networks that a run needs. With cached clips the CLIP tower is for sample videos alone."""
    samples = bool(config.validation.images or config.validation.samples)
    return ("unet", "vae", "image_encoder") if samples or not config.data.latents else ("unet", "vae")


def dismiss(accelerator: Accelerator) -> None:
    """Close the trackers and the process group. The caller has let go of its Session before.

    First the networks, then the group: freed the other way round, DDP's reducer holds the last reference to gloo and joins
    its thread with the GIL in hand, for which that thread may be waiting (about one run in forty never ended).
    """
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()


def prepare_networks(
    model: ModelParts, config: Config, *, on_accelerator: bool, compiled: bool = False
) -> dict[str, nn.Parameter]:
    """Fold, attention, adapters, dtypes, modes and recomputation, as training and its rehearsal need them; returns the trained parameters.

    `on_accelerator` decides what memory.checkpointing=auto means. Blocks are `compiled` for a real step alone.
    """
    dtype = DTYPES[config.train.precision]
    fold(model.unet)
    use_attention(model.unet, config.memory.attention)
    held = TRAINED[config.memory.parameters]
    trained = adapt(model.unet, config.adapt, dtype=dtype, seed=config.run.seed, trained_dtype=held)
    if compiled:
        compile_blocks(model.unet)
    policy = config.memory.checkpointing
    policy = policy if policy != "auto" else "units" if on_accelerator else "none"
    recompute(model.unet, policy, offload=config.memory.offload)
    model.unet.train()
    model.image_encoder.to(dtype)  # pyright: ignore[reportCallIssue, reportArgumentType]
    return trained


def clip_pixels(model: ModelParts) -> ClipPixels:
    """How this model's CLIP tower wants its picture, from its own configs."""
    extractor = model.configs.feature_extractor
    return ClipPixels(model.facts.clip_size, tuple(extractor["image_mean"]), tuple(extractor["image_std"]))


def conventions(config: Config, model: ModelParts) -> dict[str, Any]:
    """The choices that sampling must repeat, and the base they were made on."""
    data = config.data
    return {
        "base": {
            "pretrained": config.model.pretrained,
            "variant": None if model.configs.source.is_file() else config.model.variant,
            "revision": config.model.revision,
            "unet_sha256": weights_hash(model.configs.source, "unet", config.model.variant),
        },
        "adapt": config.adapt.method,
        "bridge": config.conditioning.bridge,
        "widened": list(model.widening.said) if model.widening else [],
        "added_time_ids": ["fps - 1", "motion_bucket_id", "noise_aug_strength"],
        "num_frames": data.num_frames,
        "height": data.height,
        "width": data.width,
        "resize": data.resize,
        "fps": data.fps,
        "motion_bucket": data.motion_bucket,
        "p_mean": config.objective.p_mean,
        "p_std": config.objective.p_std,
        "dropout": config.conditioning.dropout,
        "noise_aug": list(config.conditioning.noise_aug),
        "noise_aug_strength": config.validation.noise_aug_strength,
        "guidance": list(config.validation.guidance),
        "inference_steps": config.validation.inference_steps,
        "vae_chunk": config.memory.vae_chunk,
    }
