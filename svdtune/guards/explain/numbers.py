"""The numbers of a model that an error text can be compared with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from svdtune.contracts import UNetInput, specs
from svdtune.errors import SvdtuneError
from svdtune.model.facts import SHIPPED, ModelConfigs, local_folder, read_configs


@dataclass(frozen=True)
class Numbers:
    """Widths and counts of one SVD-like model, and where they come from."""

    source: str
    own: bool
    """True: read from the configs of the run that failed. False: SVD-XT's, a hypothesis."""
    in_channels: int
    out_channels: int
    latent_channels: int
    id_width: int
    """addition_time_embed_dim: numbers that one micro-condition becomes."""
    ids_width: int
    """projection_class_embeddings_input_dim: what add_embedding takes."""
    context: int
    """cross_attention_dim: what attn2.to_k and to_v take."""
    channels: tuple[int, ...]
    """block_out_channels of the UNet, first level first."""
    factor: int
    """Pixels per latent."""
    clip_hidden: int
    clip_width: int
    """projection_dim of the image encoder."""
    clip_size: int
    num_frames: int
    height: int | None = None
    """data.height of the run, where a config was given."""
    width: int | None = None
    batch: int | None = None

    @property
    def time_width(self) -> int:
        """Width of the time embedding: four times the first level."""
        return 4 * self.channels[0]

    @property
    def ids(self) -> int | None:
        """Micro-conditions of one clip; None where the config's widths do not divide."""
        return self.ids_width // self.id_width if self.ids_width % self.id_width == 0 else None

    @property
    def multiple(self) -> int:
        """Pixels that height and width must be a multiple of for every halving to come out even."""
        return self.factor * 2 ** (len(self.channels) - 1)

    @property
    def whose(self) -> str:
        """How to speak of these numbers."""
        return f"{self.source}" if self.own else f"{self.source} (assumed: give --config CONFIG for your own model)"


def id_names(count: int | None) -> str:
    """What SVD's micro-conditions mean, when `count` of them are SVD's."""
    columns = specs(UNetInput)["added_time_ids"].columns
    return f" = [{', '.join(columns)}]" if count == len(columns) else ""


def numbers_of(configs: ModelConfigs, *, source: str, own: bool = True) -> Numbers:
    """The numbers in a model's own JSON; they may contradict each other, which is often the cause that is looked for."""
    unet, vae, clip = configs.unet, configs.vae, configs.image_encoder
    return Numbers(
        source=source,
        own=own,
        in_channels=unet["in_channels"],
        out_channels=unet["out_channels"],
        latent_channels=vae["latent_channels"],
        id_width=unet["addition_time_embed_dim"],
        ids_width=unet["projection_class_embeddings_input_dim"],
        context=unet["cross_attention_dim"],
        channels=tuple(unet["block_out_channels"]),
        factor=2 ** (len(vae["block_out_channels"]) - 1),
        clip_hidden=clip["hidden_size"],
        clip_width=clip["projection_dim"],
        clip_size=clip["image_size"],
        num_frames=unet["num_frames"],
    )


def shipped_numbers() -> Numbers:
    """Those of SVD-XT, whose JSON ships in the package; SVD's differ in the number of frames only."""
    folder = SHIPPED["stabilityai/stable-video-diffusion-img2vid-xt"]
    return numbers_of(read_configs(folder), source="SVD-XT", own=False)


def run_numbers(config: Any) -> tuple[Numbers | None, str]:
    """The numbers of a `Config`'s model and sizes; else None and why they are not known (a hub id is not downloaded)."""
    pretrained = config.model.pretrained
    try:
        folder = local_folder(pretrained) or SHIPPED.get(pretrained)
        if folder is None:
            return None, f"{pretrained} is not on this machine and not one whose numbers are shipped"
        numbers = numbers_of(read_configs(folder), source=pretrained)
    except (SvdtuneError, KeyError) as error:
        return None, f"the configs of {pretrained} cannot be read: {error}"
    data, train = config.data, config.train
    return replace(
        numbers, height=data.height, width=data.width, num_frames=data.num_frames, batch=train.batch_size
    ), ""
