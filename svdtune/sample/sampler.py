"""First frame to video, by diffusers' own pipeline: what is sampled here is what the exported folder gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from svdtune.config.schema import Config
from svdtune.errors import ModelError, UsageError

if TYPE_CHECKING:
    import torch
    from diffusers import StableVideoDiffusionPipeline
    from PIL import Image
    from torch import Tensor, nn


@dataclass(frozen=True)
class SampleSettings:
    """How a video is sampled; names as diffusers spells them. Raises UsageError for a value out of range."""

    num_frames: int
    fps: float
    """Frames per second of the clip, as in `data.fps`; the UNet is given fps - 1."""
    motion_bucket_id: float
    noise_aug_strength: float
    """Sigma of the noise on the first frame, in pixels from -1 to 1; also the third time id."""
    num_inference_steps: int
    min_guidance_scale: float
    """Guidance of the first frame."""
    max_guidance_scale: float
    """Guidance of the last frame; linear between. Up to 1: no guidance, and half the work."""
    decode_chunk_size: int
    """Frames the VAE decodes at once."""
    precision: Literal["bf16", "fp16", "no"] = "no"
    """Compute dtype of the UNet, as in `train.precision`. Sampler and VAE are float32."""

    def __post_init__(self) -> None:
        _require(self.num_frames >= 2, "num_frames", self.num_frames, ">= 2")
        for key in ("num_inference_steps", "decode_chunk_size"):
            _require(getattr(self, key) >= 1, key, getattr(self, key), ">= 1")
        _require(0.001 <= self.fps <= 240, "fps", self.fps, "in [0.001, 240]")
        _require(0 <= self.motion_bucket_id <= 1023, "motion_bucket_id", self.motion_bucket_id, "in [0, 1023]")
        for key in ("noise_aug_strength", "min_guidance_scale", "max_guidance_scale"):
            value = getattr(self, key)
            _require(value >= 0 and isfinite(value), key, value, ">= 0 and finite")
        _require(
            self.min_guidance_scale <= self.max_guidance_scale,
            "min_guidance_scale",
            self.min_guidance_scale,
            f"at most max_guidance_scale = {self.max_guidance_scale}: guidance rises from the first frame to the last",
        )

    @classmethod
    def from_config(cls, config: Config) -> SampleSettings:
        """What the run trains for (`data`), sampled as `validation` says."""
        data, validation = config.data, config.validation
        return cls(
            num_frames=data.num_frames,
            fps=data.fps,
            motion_bucket_id=data.motion_bucket,
            noise_aug_strength=validation.noise_aug_strength,
            num_inference_steps=validation.inference_steps,
            min_guidance_scale=validation.guidance[0],
            max_guidance_scale=validation.guidance[1],
            decode_chunk_size=config.memory.vae_chunk,
            precision=config.train.precision,
        )


def build_pipeline(
    unet: nn.Module,
    vae: nn.Module,
    image_encoder: nn.Module,
    scheduler: Mapping[str, Any],
    feature_extractor: Mapping[str, Any],
) -> StableVideoDiffusionPipeline:
    """diffusers' pipeline around networks in memory (unwrapped, on one device); the two mappings are their JSON.

    Nothing is copied: weights that training moves on are the weights that are sampled. The scheduler is a new object.
    """
    from diffusers import EulerDiscreteScheduler, StableVideoDiffusionPipeline
    from transformers import CLIPImageProcessor

    pipeline = StableVideoDiffusionPipeline(
        vae=vae,  # pyright: ignore[reportArgumentType]
        image_encoder=image_encoder,  # pyright: ignore[reportArgumentType]
        unet=unet,  # pyright: ignore[reportArgumentType]
        scheduler=EulerDiscreteScheduler.from_config(dict(scheduler)),  # pyright: ignore[reportArgumentType]
        feature_extractor=CLIPImageProcessor.from_dict(dict(feature_extractor)),  # pyright: ignore[reportArgumentType]
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample_video(
    pipeline: StableVideoDiffusionPipeline,
    image: Tensor,
    settings: SampleSettings,
    *,
    seed: int,
    on_step: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """The video that starts at `image` (3, h, w) in [-1, 1]: uint8 RGB, (num_frames, h, w, 3).

    The noise is drawn on the CPU from `seed`, so it is the same on every device. The image is rounded to 8 bits, as
    diffusers' pipeline takes it. Train and eval modes, dtypes and forwards are as before afterwards. `on_step` is called
    after each sampler step.
    Raises ModelError when the result is not finite.
    """
    import torch

    with _ready(pipeline, settings.precision):
        frames = pipeline(
            image=_to_pil(image),
            height=image.shape[1],
            width=image.shape[2],
            num_frames=settings.num_frames,
            # The pipeline subtracts 1 and puts all three into a float tensor: fractions arrive whole.
            fps=settings.fps,  # pyright: ignore[reportArgumentType]
            motion_bucket_id=settings.motion_bucket_id,  # pyright: ignore[reportArgumentType]
            noise_aug_strength=settings.noise_aug_strength,
            num_inference_steps=settings.num_inference_steps,
            min_guidance_scale=settings.min_guidance_scale,
            max_guidance_scale=settings.max_guidance_scale,
            decode_chunk_size=settings.decode_chunk_size,
            generator=torch.Generator("cpu").manual_seed(seed),
            callback_on_step_end=lambda *_: on_step() or {},  # pyright: ignore[reportArgumentType]
            output_type="np",
            return_dict=False,
        )
    video: np.ndarray = frames[0]  # pyright: ignore[reportAssignmentType]
    if not np.isfinite(video).all():
        raise ModelError(
            f"sampling with precision {settings.precision}: {np.mean(~np.isfinite(video)):.0%} of the pixels are not "
            "finite. The weights are damaged or overflow; try train.precision=bf16, or an earlier checkpoint."
        )
    return (video * 255.0).round().astype(np.uint8)


@contextmanager
def _ready(pipeline: StableVideoDiffusionPipeline, precision: str) -> Iterator[None]:
    """Eval mode, VAE in float32, autocast in the UNet and nowhere else; all of it undone at the end."""
    import torch

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}[precision]
    unet, vae, image_encoder = pipeline.unet, pipeline.vae, pipeline.image_encoder
    modes = {module: module.training for network in (unet, vae, image_encoder) for module in network.modules()}
    vae_dtype = vae.dtype
    device_type = pipeline.device.type
    with ExitStack() as undo:
        undo.callback(_restore_modes, modes)
        for network in (unet, vae, image_encoder):
            network.eval()
        if vae_dtype != torch.float32:
            # An fp16 VAE gives NaN, and diffusers upcasts it for encoding only.
            undo.callback(vae.to, dtype=vae_dtype)
            vae.to(dtype=torch.float32)
        # The pipeline keeps its latents in the dtype of the image embedding: in bf16 they would be rounded at every step.
        undo.enter_context(_forward_replaced(image_encoder, _float_embeds))
        undo.enter_context(_forward_replaced(unet, lambda forward: _autocast_forward(forward, device_type, dtype)))
        undo.enter_context(torch.autocast(device_type, enabled=False))
        yield


@contextmanager
def _forward_replaced(module: nn.Module, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """`module.forward` is `wrap(module.forward)`; an earlier replacement (accelerate makes one) is put back."""
    replaced_before = "forward" in vars(module)
    forward = module.forward
    module.forward = wrap(forward)
    try:
        yield
    finally:
        if replaced_before:
            module.forward = forward
        else:
            del module.forward


def _autocast_forward(forward: Callable[..., Any], device_type: str, dtype: torch.dtype) -> Callable[..., Any]:
    """The UNet in `dtype`, whatever mixture its weights are, from and to float32."""
    import torch

    def compute(*args: Any, **kwargs: Any) -> tuple[Tensor]:
        with torch.autocast(device_type, dtype=dtype, enabled=dtype != torch.float32):
            return (forward(*args, **kwargs)[0].float(),)

    return compute


def _float_embeds(forward: Callable[..., Any]) -> Callable[..., Any]:
    def compute(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.image_embeds = output.image_embeds.float()
        return output

    return compute


def _restore_modes(modes: Mapping[nn.Module, bool]) -> None:
    for module, training in modes.items():
        module.training = training


def _to_pil(image: Tensor) -> Image.Image:
    from PIL import Image

    pixels = (image.detach().float().cpu().clamp(-1, 1) + 1.0) * 127.5
    return Image.fromarray(pixels.round().byte().permute(1, 2, 0).contiguous().numpy())


def _require(ok: bool, key: str, value: Any, expected: str) -> None:
    if not ok:
        raise UsageError(f"{key}: got {value!r}, expected {expected}")
