"""Every option on one page: one dataclass per YAML section, one docstring per field with unit and the meaning of null.

Range checks live in `__post_init__` of the section; checks across sections live in `Config.__post_init__`.
Messages start with `section.key` so that the loader can add the file and line.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Literal

from svdtune.errors import ConfigError

_LONGEST_PATH = 4096


@dataclass
class Run:
    """Where the run lives and what seeds it."""

    name: str = "my-run"
    """Folder of the run under `run.dir`; the same name resumes the same run."""
    dir: str = "runs"
    """Folder that holds all runs; relative to the current directory. Here and in every other path `~` is the home folder."""
    seed: int = 0
    """Seed of everything random. Each draw depends on (seed, global sample number) only."""
    threads: int | None = None
    """CPU threads of torch in each process; null: the machine's cores divided by local processes. Part of exact resume."""

    def __post_init__(self) -> None:
        self.dir = _home("run.dir", self.dir)
        _require(
            self.name.isprintable() and "/" not in self.name and self.name.strip() not in ("", ".", ".."),
            "run.name",
            self.name,
            "a plain folder name",
        )
        _require(0 <= self.seed < 2**32, "run.seed", self.seed, f"a whole number from 0 to {2**32 - 1}")
        _require(self.threads is None or self.threads >= 1, "run.threads", self.threads, ">= 1 or null")


@dataclass
class Model:
    """The base to fine-tune."""

    pretrained: str = "stabilityai/stable-video-diffusion-img2vid-xt"
    """Hub id, path of a diffusers folder or of a single file (svd_xt.safetensors), or `tiny` (the base that ships with svdtune)."""
    variant: str | None = "fp16"
    """Weight file variant (`fp16` reads `*.fp16.safetensors`); null: the plain names. `tiny` has only fp16; a single file has none."""
    revision: str | None = None
    """Commit or tag of the hub repository; null: its main branch."""
    on_mismatch: Literal["error", "adapt"] = "error"
    """When the UNet's weights are not exactly those of its config. error: stop. adapt: do the two widenings that change nothing
    of what the weights compute, and say so: zeros for conv_in's conditioning channels, and an image model's missing temporal
    layers at identity. Any other difference stays an error."""

    def __post_init__(self) -> None:
        self.pretrained = _home("model.pretrained", self.pretrained)
        _require(bool(self.pretrained), "model.pretrained", self.pretrained, "a hub id, a folder, a file or 'tiny'")


@dataclass
class Data:
    """The clips, and how a training clip is cut from them."""

    root: str = "clips/"
    """Folder of video files, searched recursively."""
    num_frames: int = 25
    """Frames per training clip."""
    height: int = 576
    """Pixels; a multiple of the VAE's factor (8)."""
    width: int = 1024
    """Pixels; a multiple of the VAE's factor (8)."""
    fps: float = 7
    """Frames per second of the training clip. Clips are cut by time: a 30 fps file at fps 7 gives every ~4.3rd frame."""
    resize: Literal["cover", "pad", "squash"] = "cover"
    """cover: scale to fill, crop the centre. pad: scale to fit, black borders. squash: scale each side by itself."""
    decoder: Literal["auto", "decord", "pyav"] = "auto"
    """auto: PyAV, which reads every file and costs the least CPU time. decord: refuses files that it would read wrongly."""
    motion_bucket: int = 127
    """motion_bucket_id given to the UNet with every clip."""
    flip: bool = False
    """Mirror half of the clips left to right (keyed by sample number). Leave off when direction matters."""
    on_bad_clip: Literal["error", "skip"] = "skip"
    """What to do with a file that cannot be used: stop, or leave it out and write it to rejected.jsonl."""
    windows: int | None = None
    """Moments a clip may begin at in each file, spread evenly; null: any frame. A latent cache holds a number of them."""
    latents: str | None = None
    """Folder that `svdtune cache` filled with the encoded clips of this config; null: encode during training."""
    holdout: float = 0.1
    """Share of files kept for held-out loss and samples, chosen by file name, so it is stable when files are added. 0: none."""
    workers: int = 4
    """Loader processes per rank; 0 decodes in the training process."""

    def __post_init__(self) -> None:
        self.root = _home("data.root", self.root)
        self.latents = None if self.latents is None else _home("data.latents", self.latents)
        _require(self.windows is None or self.windows >= 1, "data.windows", self.windows, ">= 1 or null")
        _require(
            self.latents is None or self.windows is not None,
            "data.windows",
            self.windows,
            "a number with data.latents: a clip that begins at any frame is in no cache",
            ("data.windows=4",),
        )
        _require(self.num_frames >= 2, "data.num_frames", self.num_frames, ">= 2")
        for key in ("height", "width"):
            size = getattr(self, key)
            nearest = max(16, round(size / 8) * 8)
            _require(
                size >= 16 and size % 8 == 0,
                f"data.{key}",
                size,
                f"a multiple of 8 from 16 up (nearest: {nearest}); the VAE would floor it silently",
                (f"data.{key}={nearest}",) if size >= 16 else (),
            )
        _require(0.001 <= self.fps <= 240, "data.fps", self.fps, "in [0.001, 240]")
        _require(0 <= self.motion_bucket <= 1023, "data.motion_bucket", self.motion_bucket, "in [0, 1023]")
        _require(0 <= self.holdout < 1, "data.holdout", self.holdout, "in [0, 1)")
        _require(self.workers >= 0, "data.workers", self.workers, ">= 0")


@dataclass
class Conditioning:
    """What the UNet is told about the first frame."""

    dropout: float = 0.15
    """Probability of dropping the CLIP token, and independently the conditioning latent, so that guidance works."""
    noise_aug: tuple[float, float] = (-3.0, 0.5)
    """Mean and standard deviation of ln(noise_aug_strength), the noise on the conditioning frame in [-1, 1] pixels."""
    bridge: Literal["linear"] | None = None
    """linear: a trained projection for a CLIP tower of another width than the UNet's cross_attention_dim, saved in checkpoints
    and folded into the exported tower; null: the widths must be equal."""

    def __post_init__(self) -> None:
        _require(0 <= self.dropout < 1, "conditioning.dropout", self.dropout, "in [0, 1)")
        _require(
            self.noise_aug[1] >= 0, "conditioning.noise_aug", tuple(self.noise_aug), "[mean, standard deviation >= 0]"
        )


@dataclass
class Adapt:
    """Which parameters learn."""

    method: Literal["full", "temporal", "temporal_attention", "spatial", "lora"] = "lora"
    """full: the UNet. temporal: temporal blocks and mixing. temporal_attention: temporal transformer blocks only.
    spatial: the rest. lora: low-rank adapters."""
    rank: int = 16
    """LoRA rank (only with method lora)."""
    alpha: float | None = None
    """LoRA alpha, the update is scaled by alpha / rank; null: equal to rank."""
    dora: bool = False
    """Weight-decomposed LoRA (DoRA)."""
    targets: list[str] | None = None
    """Module name endings that get an adapter; null: spatial and temporal attention without the dead attn2.to_q/to_k."""

    def __post_init__(self) -> None:
        _require(self.rank >= 1, "adapt.rank", self.rank, ">= 1")
        _require(self.alpha is None or self.alpha > 0, "adapt.alpha", self.alpha, "> 0 or null")
        _require(
            self.targets is None or len(self.targets) > 0,
            "adapt.targets",
            self.targets,
            "a list of module name endings, or null for the default",
        )


@dataclass
class Objective:
    """Noise levels of training: ln(sigma) ~ N(p_mean, p_std^2), one per clip."""

    p_mean: float = 1.0
    """Mean of ln(sigma). 0.7 for SVD (14 frames), 1.0 for SVD-XT (25)."""
    p_std: float = 1.6
    """Standard deviation of ln(sigma)."""

    def __post_init__(self) -> None:
        _require(self.p_std > 0, "objective.p_std", self.p_std, "> 0")


@dataclass
class Train:
    """The loop."""

    steps: int = 2000
    """Optimizer steps of the whole run."""
    batch_size: int = 1
    """Clips per process and micro-step."""
    accumulation: int = 4
    """Micro-steps per optimizer step. Clips per update = batch_size * accumulation * processes."""
    lr: float = 1e-4
    """Peak learning rate."""
    precision: Literal["bf16", "fp16", "no"] = "bf16"
    """Compute dtype: frozen weights and autocast. Sigma and the loss are always float32, trained parameters as memory.parameters says."""
    optimizer: Literal["adamw", "adamw8bit", "adafactor"] = "adamw"
    """adamw: fused where it exists. adamw8bit: state in 8 bits; needs bitsandbytes and an NVIDIA GPU, with memory.parameters=bf16
    neither. adafactor: next to no state."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates (adamw and adamw8bit)."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """Learning rate after warm-up."""
    warmup: int = 100
    """Optimizer steps of linear warm-up."""
    clip_norm: float | None = 1.0
    """Gradients are scaled down to this global norm; null: no clipping."""
    ema: bool = False
    """Keep an exponential moving average of the trained parameters; it is what is sampled and exported."""
    ema_decay: float = 0.9999
    """Upper bound of the EMA decay; it warms up from 0."""
    compile: bool = False
    """Compile the UNet's repeated blocks where they train, and the optimizer of memory.parameters=bf16 (torch.compile); needs an NVIDIA
    GPU. Minutes at the start, faster steps."""
    log_interval: int = 10
    """Optimizer steps between printed lines where there is no terminal; metrics.jsonl has every step."""

    def __post_init__(self) -> None:
        for key in ("steps", "batch_size", "accumulation", "log_interval"):
            _require(getattr(self, key) >= 1, f"train.{key}", getattr(self, key), ">= 1")
        _require(self.lr > 0, "train.lr", self.lr, "> 0")
        _require(all(0 <= beta < 1 for beta in self.betas), "train.betas", tuple(self.betas), "two numbers in [0, 1)")
        _require(self.weight_decay >= 0, "train.weight_decay", self.weight_decay, ">= 0")
        _require(self.warmup >= 0, "train.warmup", self.warmup, ">= 0")
        _require(self.clip_norm is None or self.clip_norm > 0, "train.clip_norm", self.clip_norm, "> 0 or null")
        _require(0 < self.ema_decay < 1, "train.ema_decay", self.ema_decay, "in (0, 1)")


@dataclass
class Memory:
    """What is given up to fit."""

    plan: Literal["auto"] | None = None
    """auto: `svdtune train` takes the fastest settings of this section that fit the device, as `svdtune plan` finds them, and says
    which; null: the settings as written."""
    checkpointing: Literal["auto", "none", "level0", "units", "nested", "diffusers"] = "auto"
    """Which UNet activations are recomputed in the backward pass. level0: ResNets and transformers of the highest resolution;
    units: of all levels; nested: these and the blocks inside them, which needs least; diffusers: its own flag, for comparison: it
    leaves the temporal blocks out. auto: units on an accelerator, none on a CPU."""
    offload: bool = False
    """Keep the inputs of recomputed units in the machine's memory instead of the GPU's until the backward pass needs them."""
    parameters: Literal["fp32", "bf16"] = "fp32"
    """Trained parameters, their gradients and the optimizer's state. bf16: half the memory; updates are rounded up or down by chance,
    in proportion, so that small ones are not lost. Needs train.precision=bf16."""
    ema_on_cpu: bool = False
    """Keep the moving average (train.ema) in the machine's memory instead of the GPU's."""
    attention: Literal["auto", "sdpa", "flash", "cudnn", "xformers", "math"] = "auto"
    """Kernel of the UNet's attention. auto: for each layer and shape the fastest that can do it; sdpa: torch chooses; flash, cudnn,
    xformers: that one where it can, in spatial layers; math: plain products, for comparison."""
    vae_chunk: int = 4
    """Frames the VAE encodes or decodes at once, in float32."""

    def __post_init__(self) -> None:
        _require(self.vae_chunk >= 1, "memory.vae_chunk", self.vae_chunk, ">= 1")
        _require(
            not self.offload or self.checkpointing in ("auto", "level0", "units", "nested"),
            "memory.offload",
            self.offload,
            f"false with memory.checkpointing={self.checkpointing}, which recomputes no units of ours",
            ("memory.checkpointing=units",),
        )


@dataclass
class Checkpoint:
    """When state goes to disk."""

    interval: int = 500
    """Optimizer steps between checkpoints; the last step always saves one."""
    keep: int = 3
    """Newest checkpoints to keep; older ones are removed after a new one is published."""

    def __post_init__(self) -> None:
        _require(self.interval >= 1, "checkpoint.interval", self.interval, ">= 1")
        _require(self.keep >= 1, "checkpoint.keep", self.keep, ">= 1")


@dataclass
class Validation:
    """How progress is seen."""

    interval: int = 250
    """Optimizer steps between held-out losses and sample videos; also at the first and the last step."""
    images: list[str] = field(default_factory=list)
    """First frames to sample videos from; empty: first frames of held-out clips."""
    samples: int = 1
    """Held-out clips to sample from when `images` is empty; 0: no sample videos."""
    clips: int = 8
    """Held-out clips in the held-out loss; 0: no held-out loss."""
    sigmas: list[float] = field(default_factory=lambda: [0.1, 0.5, 2.0, 10.0, 50.0])
    """Fixed noise levels of the held-out loss; the noise is fixed too."""
    inference_steps: int = 25
    """Sampler steps of a sample video."""
    guidance: tuple[float, float] = (1.0, 3.0)
    """Guidance scale of the first and of the last frame; linear between."""
    noise_aug_strength: float = 0.02
    """Noise on the conditioning frame when sampling."""

    def __post_init__(self) -> None:
        self.images = [_home("validation.images", image) for image in self.images]
        _require(self.interval >= 1, "validation.interval", self.interval, ">= 1")
        _require(self.samples >= 0, "validation.samples", self.samples, ">= 0")
        _require(self.clips >= 0, "validation.clips", self.clips, ">= 0")
        _require(
            len(self.sigmas) > 0 and all(s > 0 for s in self.sigmas),
            "validation.sigmas",
            list(self.sigmas),
            "one or more numbers > 0",
        )
        _require(self.inference_steps >= 1, "validation.inference_steps", self.inference_steps, ">= 1")
        _require(self.noise_aug_strength >= 0, "validation.noise_aug_strength", self.noise_aug_strength, ">= 0")
        low, high = self.guidance
        _require(
            0 <= low <= high,
            "validation.guidance",
            tuple(self.guidance),
            "[first frame, last frame] with 0 <= first <= last",
        )


@dataclass
class Tracking:
    """Where numbers and videos go besides metrics.jsonl, which is always written."""

    backends: list[Literal["wandb", "tensorboard"]] = field(default_factory=list)
    """wandb, tensorboard; [] for none."""
    wandb_mode: Literal["offline", "online", "disabled"] = "offline"
    """offline needs no network and no account; `wandb sync` uploads later."""
    project: str = "svdtune"
    """Project name in the trackers."""


@dataclass
class Preflight:
    """The checks before the run."""

    enabled: bool = True
    """Run preflight before training."""
    ignore: list[str] = field(default_factory=list)
    """Codes of findings to ignore, visibly (DAT305)."""
    stop_on: list[str] = field(default_factory=list)
    """Codes of findings of the running training that stop it with a saved checkpoint (SEM542); others are told only."""


@dataclass
class Config:
    """A whole run."""

    run: Run = field(default_factory=Run)
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    conditioning: Conditioning = field(default_factory=Conditioning)
    adapt: Adapt = field(default_factory=Adapt)
    objective: Objective = field(default_factory=Objective)
    train: Train = field(default_factory=Train)
    memory: Memory = field(default_factory=Memory)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    validation: Validation = field(default_factory=Validation)
    tracking: Tracking = field(default_factory=Tracking)
    preflight: Preflight = field(default_factory=Preflight)

    def __post_init__(self) -> None:
        for name, section in vars(self).items():
            _require_finite(name, section)
        _require(
            self.train.warmup <= self.train.steps,
            "train.warmup",
            self.train.warmup,
            f"at most train.steps = {self.train.steps}: otherwise the peak learning rate is never reached",
        )
        _require(
            self.memory.parameters == "fp32" or self.train.optimizer != "adafactor",
            "train.optimizer",
            self.train.optimizer,
            "adamw or adamw8bit with memory.parameters=bf16: adafactor rounds each update to nearest, and small ones are lost",
            ("train.optimizer=adamw",),
        )
        _require(
            self.memory.parameters == "fp32" or self.train.precision == "bf16",
            "train.precision",
            self.train.precision,
            "bf16 with memory.parameters=bf16, which holds what is trained in no other type",
            ("train.precision=bf16",),
        )
        _require(
            not self.train.compile or self.memory.attention != "xformers",
            "memory.attention",
            self.memory.attention,
            "another than xformers with train.compile, which compiles blocks with their attention",
            ("memory.attention=auto",),
        )
        _require(
            not self.train.compile or not self.adapt.dora,
            "adapt.dora",
            self.adapt.dora,
            "false with train.compile: peft's code for it cannot be compiled",
            ("train.compile=false",),
        )
        if self.adapt.method != "lora":
            for key, off in (("targets", None), ("alpha", None), ("dora", False)):
                value = getattr(self.adapt, key)
                expected = f"{off} with adapt.method {self.adapt.method}: it acts only with method lora"
                _require(value == off, f"adapt.{key}", value, expected.replace("None", "null"))


def _home(key: str, path: str) -> str:
    """`~` as a shell reads it, which leaves it alone behind `section.key=`."""
    expanded = os.path.expanduser(path)
    _require(not expanded.startswith("~") or expanded.startswith("~/"), key, path, "a folder of a user that exists")
    _require(
        len(expanded) < _LONGEST_PATH and "\0" not in expanded, key, f"{path[:40]}...", "a path that a file can have"
    )
    return expanded


def _require_finite(name: str, section: Any) -> None:
    """Ranges with one end let infinity through, and a mean has no range at all."""
    for key, value in vars(section).items():
        if isinstance(value, list | tuple):
            finite = all(isfinite(item) for item in value if isinstance(item, float))
            _require(finite, f"{name}.{key}", value, "finite numbers")
        elif isinstance(value, float):
            _require(isfinite(value), f"{name}.{key}", value, "a finite number")


def _require(ok: bool, key: str, value: Any, expected: str, patch: tuple[str, ...] = ()) -> None:
    if not ok:
        raise ConfigError(f"{key}: got {value!r}, expected {expected}", patch)
