"""The numbers of a model that an error text can be compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from svdtune.contracts import UNetInput, specs
from svdtune.errors import SvdtuneError
from svdtune.model.facts import FILES, SHIPPED, ModelConfigs
from svdtune.model.source import local_source, read_configs


@dataclass(frozen=True)
class Numbers:
    """Widths and counts of one SVD-like model, and where they come from."""

    source: str
    own: bool
    """True: read from the configs of the run that failed. False: SVD-XT's, a hypothesis."""
    in_channels: int
    latent_channels: int
    id_width: int
    """addition_time_embed_dim: numbers that one micro-condition becomes."""
    ids_width: int
    """projection_class_embeddings_input_dim: what add_embedding takes."""
    context: int
    """cross_attention_dim: what attn2.to_k and to_v take."""
    channels: tuple[int, ...]
    """block_out_channels of the UNet, first level first."""
    heads: int
    """Attention heads of the first level, where there are most positions."""
    factor: int
    """Pixels per latent."""
    clip_hidden: int
    clip_width: int
    """projection_dim of the image encoder."""
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
        return self.source if self.own else f"{self.source} (assumed; --config CONFIG gives your model's)"


def id_names(count: int | None) -> str:
    """What SVD's micro-conditions mean, when `count` of them are SVD's."""
    columns = specs(UNetInput)["added_time_ids"].columns
    return f" = [{', '.join(columns)}]" if count == len(columns) else ""


def numbers_of(configs: ModelConfigs, *, source: str, own: bool = True) -> Numbers:
    """The numbers in a model's own JSON; they may contradict each other, which is often the cause that is looked for.

    Raises ValueError naming file and key where one is no whole number from 1 up.
    """
    unet, vae, clip = configs.unet, configs.vae, configs.image_encoder
    channels = _widths("unet", unet)
    heads = unet.get("num_attention_heads", 1)
    return Numbers(
        source=source,
        own=own,
        in_channels=_whole("unet", unet, "in_channels"),
        latent_channels=_whole("vae", vae, "latent_channels"),
        id_width=_whole("unet", unet, "addition_time_embed_dim"),
        ids_width=_whole("unet", unet, "projection_class_embeddings_input_dim"),
        context=_whole("unet", unet, "cross_attention_dim"),
        channels=channels,
        heads=heads[0] if isinstance(heads, list) and heads else heads if isinstance(heads, int) else 1,
        factor=2 ** (len(_widths("vae", vae)) - 1),
        clip_hidden=_whole("image_encoder", clip, "hidden_size"),
        clip_width=_whole("image_encoder", clip, "projection_dim"),
    )


def shipped_numbers() -> Numbers:
    """Those of SVD-XT, whose JSON ships in the package; SVD's differ in the number of frames only."""
    folder = SHIPPED["stabilityai/stable-video-diffusion-img2vid-xt"]
    return numbers_of(read_configs(folder), source="SVD-XT", own=False)


def run_numbers(config: Any) -> tuple[Numbers | None, str]:
    """The numbers of a `Config`'s model and sizes; else None and why they are not known (a hub id is not downloaded)."""
    pretrained = config.model.pretrained
    try:
        source = local_source(pretrained) or SHIPPED.get(pretrained)
        if source is None:
            return None, f"{pretrained} is not on this machine and not one whose numbers are shipped"
        numbers = numbers_of(read_configs(source), source=pretrained)
    except (SvdtuneError, ValueError) as error:
        return None, str(error).rstrip(".")
    data = config.data
    return replace(numbers, height=data.height, width=data.width, batch=config.train.batch_size), ""


def _whole(part: str, content: Mapping[str, Any], key: str) -> int:
    value = content.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{FILES[part]}: {key} is {value!r}, expected a whole number from 1 up")
    return value


def _widths(part: str, content: Mapping[str, Any]) -> tuple[int, ...]:
    value = content.get("block_out_channels")
    if not isinstance(value, list) or not value or not all(isinstance(width, int) and width > 0 for width in value):
        raise ValueError(f"{FILES[part]}: block_out_channels is {value!r}, expected whole numbers from 1 up")
    return tuple(value)
