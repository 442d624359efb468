"""SVD's data flow on one page: every tensor that crosses a seam, one line each.

b batch · t frames · c rgb · h w pixels · f VAE downsampling · z latent channels · d CLIP width · m micro-conditions
h, w, t and b come from the configuration; c, f, z, d and m are read from the model's own config.json (`ModelFacts`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from svdtune.contracts.spec import Axes, tensor

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ModelFacts:
    """What the model's own config files say; nothing here is a choice."""

    c: int
    """Picture channels the VAE takes (rgb)."""
    z: int
    """Latent channels of the VAE."""
    f: int
    """Pixels per latent along height and width: 2 ** (VAE levels - 1)."""
    d: int
    """Width of the CLIP image embedding, equal to the UNet's cross-attention width."""
    m: int
    """Micro-conditions the UNet embeds: projection_class_embeddings_input_dim / addition_time_embed_dim."""
    num_frames: int
    """Frames the base was trained with (stored in the UNet's config, read by no layer)."""
    clip_size: int
    """Pixels a side that the CLIP tower takes."""
    scaling_factor: float
    """Latents are multiplied by this before noise is added; the conditioning latent is not."""

    def axes(self, *, b: int, t: int, h: int, w: int) -> dict[str, int]:
        """All named sizes, for `require` and `TensorSpec.shape`."""
        sizes = {name: value for name, value in asdict(self).items() if name in "czfdm"}
        return {**sizes, "b": b, "t": t, "h": h, "w": w}


@dataclass(frozen=True)
class VideoBatch:
    """Clips as the loader gives them."""

    pixels: Tensor = tensor("b t c h w", "frames in [-1, 1], RGB, in time order", dtype="float32")
    fps: Tensor = tensor("b", "frames per second of the sampled clip (not of the file)", dtype="float32")
    motion_bucket: Tensor = tensor("b", "motion_bucket_id, about how much moves", dtype="float32")
    sample: Tensor = tensor("b", "global sample number: the key of everything random", dtype="int64")
    names: tuple[str, ...] = ()
    """Files the clips come from, relative to data.root."""
    rejected: tuple[str, ...] = ()
    """One line for each clip that was replaced because it could not be decoded."""

    def axes(self, facts: ModelFacts) -> Axes:
        """Named sizes of this batch; the frame, height and width of `pixels` bind t, h and w."""
        b, t, _, h, w = self.pixels.shape
        return facts.axes(b=b, t=t, h=h, w=w)


@dataclass(frozen=True)
class LatentBatch:
    """Clips as `svdtune cache` left them: what the frozen networks make of a clip, before anything random."""

    latents_mean: Tensor = tensor(
        "b t z h/f w/f", "mean of the VAE posterior of every frame, unscaled", dtype="float16"
    )
    latents_std: Tensor = tensor("b t z h/f w/f", "its standard deviation", dtype="float16")
    image_embeds: Tensor = tensor("b d", "CLIP embedding of the clean first frame", dtype="float32")
    first_frame: Tensor = tensor("b c h w", "RGB, round(32767 * pixels); its noise differs in each step", dtype="int16")
    fps: Tensor = tensor("b", "frames per second of the sampled clip (not of the file)", dtype="float32")
    motion_bucket: Tensor = tensor("b", "motion_bucket_id, about how much moves", dtype="float32")
    sample: Tensor = tensor("b", "global sample number: the key of everything random", dtype="int64")
    names: tuple[str, ...] = ()
    """Files the clips come from, relative to data.root."""
    rejected: tuple[str, ...] = ()
    """One line for each clip that was replaced because it could not be decoded."""

    def axes(self, facts: ModelFacts) -> Axes:
        """Named sizes of this batch; frames are bound by the latents, height and width by the first frame."""
        return facts.axes(b=len(self.sample), t=self.latents_mean.shape[1], h=self.first_frame.shape[2],
                          w=self.first_frame.shape[3])  # fmt: skip


Batch = VideoBatch | LatentBatch
"""What a step begins with."""


@dataclass(frozen=True)
class Draws:
    """Everything random of one step, drawn per sample from (seed, global sample number)."""

    sigma: Tensor = tensor("b", "noise level, one per clip", dtype="float32")
    noise: Tensor = tensor("b t z h/f w/f", "n ~ N(0, 1), added as sigma * n", dtype="float32")
    posterior_noise: Tensor = tensor("b t z h/f w/f", "N(0, 1) that samples the VAE posterior", dtype="float32")
    pixel_noise: Tensor = tensor("b c h w", "N(0, 1) for the conditioning frame, independent of noise", dtype="float32")
    noise_aug_strength: Tensor = tensor("b", "sigma of the conditioning frame's noise", dtype="float32")
    keep_image_embeds: Tensor = tensor("b", "1 keeps the CLIP token, 0 drops it", dtype="float32")
    keep_image_latents: Tensor = tensor("b", "1 keeps the conditioning latent, 0 drops it", dtype="float32")


@dataclass(frozen=True)
class UNetInput:
    """The four tensors the UNet is called with."""

    sample: Tensor = tensor("b t 2*z h/f w/f", "c_in * noisy latents, then the unscaled conditioning latents")
    timestep: Tensor = tensor("b", "c_noise = ln(sigma) / 4, Karras et al. 2022, table 1", dtype="float32")
    encoder_hidden_states: Tensor = tensor("b 1 d", "CLIP image embedding as one token")
    added_time_ids: Tensor = tensor(
        "b m", "micro-conditions, never dropped", columns=("fps - 1", "motion_bucket_id", "noise_aug_strength")
    )


@dataclass(frozen=True)
class Prediction:
    """What the UNet answers, and what it should have answered."""

    model_output: Tensor = tensor("b t z h/f w/f", "F, the v-prediction", dtype="float32")
    target: Tensor = tensor("b t z h/f w/f", "v = (n - sigma * x0) / sqrt(1 + sigma^2)", dtype="float32")


@dataclass(frozen=True)
class Encoded:
    """A clip after the frozen networks, for one step."""

    latents: Tensor = tensor("b t z h/f w/f", "x0 = scaling_factor * posterior sample", dtype="float32")
    image_latents: Tensor = tensor("b z h/f w/f", "posterior mode of the noised first frame, unscaled", dtype="float32")
    image_embeds: Tensor = tensor("b d", "CLIP embedding of the clean first frame", dtype="float32")


@dataclass(frozen=True)
class StepResult:
    """One step: the loss to differentiate, and the records it came from."""

    encoded: Encoded
    unet_input: UNetInput
    prediction: Prediction
    loss: Tensor = tensor("", "mean over clips", dtype="float32")
    loss_per_clip: Tensor = tensor("b", "mean over everything but the clip axis", dtype="float32")
