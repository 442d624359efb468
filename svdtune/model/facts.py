"""Architecture facts from a model's own JSON files. Needs no weights and no torch.

The JSON of SVD and SVD-XT ships in the package (`facts/`), so nothing about shape needs a download.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from svdtune.contracts import ModelFacts, UNetInput, specs
from svdtune.errors import ConfigError, ModelError

PACKAGE = Path(__file__).parent
TINY = PACKAGE / "tiny"
SHIPPED = {
    "stabilityai/stable-video-diffusion-img2vid": PACKAGE / "facts" / "svd",
    "stabilityai/stable-video-diffusion-img2vid-xt": PACKAGE / "facts" / "svd-xt",
    "stabilityai/stable-video-diffusion-img2vid-xt-1-1": PACKAGE / "facts" / "svd-xt",
}
FILES = {
    "unet": "unet/config.json",
    "vae": "vae/config.json",
    "image_encoder": "image_encoder/config.json",
    "scheduler": "scheduler/scheduler_config.json",
    "feature_extractor": "feature_extractor/preprocessor_config.json",
}
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "image_encoder": "model"}
"""How diffusers and transformers call the weights of each part; other files in a folder are not theirs."""
IMAGE_DECODER = "AutoencoderKL"
"""The VAE of an `image_decoder` release, which decodes each frame for itself."""
CLASSES = {
    "unet": "UNetSpatioTemporalConditionModel",
    "vae": "AutoencoderKLTemporalDecoder",
    "image_encoder": "CLIPVisionModelWithProjection",
    "scheduler": "EulerDiscreteScheduler",
}
HARMLESS = {"vision_model.embeddings.position_ids"}
"""Saved by old transformers, computed by new ones: carries no information."""
IMAGE_UNET = "UNet2DConditionModel"


@dataclass(frozen=True)
class ModelConfigs:
    """The JSON of all five parts of an SVD pipeline, and where they were read from."""

    source: Path
    """The diffusers folder, or the single file."""
    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    image_encoder: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    feature_extractor: Mapping[str, Any]

    def where(self, part: str) -> str:
        """What a message calls the JSON of `part`."""
        return f"{self.source} ({part})" if self.source.is_file() else str(self.source / FILES[part])


def read_folder_configs(folder: Path) -> ModelConfigs:
    """The five JSON files under a diffusers folder.

    Raises ModelError naming a missing file, broken JSON, or a class that is not SVD's.
    """
    parts = {name: _read_json(folder, file) for name, file in FILES.items()}
    for name, wanted in CLASSES.items():
        got = class_name(parts[name]) or wanted
        if name == "unet" and got == IMAGE_UNET:
            raise ModelError(
                f"{folder / FILES[name]}: class is {got}, expected {wanted}: this is the config of an image model. To train video "
                "layers on such weights, put the unet/config.json of an SVD release here, with layer sizes equal to the image "
                "model's (stabilityai/stable-video-diffusion-img2vid fits Stable Diffusion 2.x; for 1.x set cross_attention_dim "
                "to 768 and num_attention_heads to [8, 8, 8, 8]), keep the image model's weights beside it and set model.on_mismatch=adapt."
            )
        if got != wanted and (name, got) != ("vae", IMAGE_DECODER):
            raise ModelError(
                f"{folder / FILES[name]}: class is {got}, expected {wanted}. This is not a Stable Video Diffusion model."
            )
    return ModelConfigs(folder, **parts)


@dataclass(frozen=True)
class Contradiction:
    """Two parts of a model that cannot work together."""

    kind: Literal["time_ids", "clip_width", "in_channels", "out_channels", "picture_channels"]
    where: str
    """File and key of the number that is out of line."""
    got: str
    expected: str
    why: str


def contradictions(configs: ModelConfigs, *, bridge: bool = False) -> list[Contradiction]:
    """What the parts' own files say against each other, worst first; [] for a sound model.

    With `bridge` (conditioning.bridge) the CLIP tower may have another width than the UNet's cross-attention.
    Raises ModelError when a number that shapes follow from is missing, or is not a number.
    """
    unet, clip, z = (
        _Part(configs, "unet"),
        _Part(configs, "image_encoder"),
        _Part(configs, "vae").integer("latent_channels"),
    )
    embedded, width = unet.integer("projection_class_embeddings_input_dim"), unet.integer("addition_time_embed_dim")
    columns = specs(UNetInput)["added_time_ids"].columns
    d_clip, d_unet = clip.integer("projection_dim"), unet.integer("cross_attention_dim")
    takes, gives = unet.integer("in_channels"), unet.integer("out_channels")
    pixels, colours = (
        _Part(configs, "vae").integer("in_channels"),
        _Part(configs, "feature_extractor").length("image_mean"),
    )
    checks = [
        (embedded == len(columns) * width, Contradiction(
            "time_ids", unet.at("projection_class_embeddings_input_dim"), str(embedded), str(len(columns) * width),
            f"the UNet's add_embedding takes {embedded} = {embedded / width:g} x {width} "
            f"numbers, SVD gives it {len(columns)} ids ({', '.join(columns)}) of addition_time_embed_dim {width}")),
        (d_clip == d_unet or bridge, Contradiction(
            "clip_width", clip.at("projection_dim"), str(d_clip), str(d_unet),
            f"the image encoder gives embeddings of width {d_clip}, the UNet's cross_attention_dim is {d_unet}")),
        (takes == 2 * z, Contradiction(
            "in_channels", unet.at("in_channels"), str(takes), str(2 * z),
            f"the UNet takes {takes} channels, noisy plus conditioning latents have 2 x {z}")),
        (gives == z, Contradiction(
            "out_channels", unet.at("out_channels"), str(gives), str(z),
            f"the UNet gives {gives} channels, the VAE's latents have {z}")),
        (pixels == colours, Contradiction(
            "picture_channels", _Part(configs, "vae").at("in_channels"), str(pixels), str(colours),
            f"the VAE takes pictures of {pixels} channels, frames and the CLIP tower's pictures have {colours}")),
    ]  # fmt: skip
    return [wrong for right, wrong in checks if not right]


def class_name(part: Mapping[str, Any]) -> str | None:
    """The class that a part's JSON names, as diffusers or as transformers writes it."""
    names = part.get("architectures")
    return part.get("_class_name") or (names[0] if isinstance(names, list) and names else None)


def model_facts(configs: ModelConfigs, *, bridge: bool = False) -> ModelFacts:
    """The numbers that shapes follow from; `d` is the CLIP tower's width, with or without a bridge.

    Raises ModelError when the parts contradict each other (see `contradictions`) or a number is missing.
    """
    if found := contradictions(configs, bridge=bridge):
        told = "; ".join(wrong.why for wrong in found)
        raise ModelError(
            f"{configs.source}: {told}. These parts do not belong together; take all from one SVD release."
        )
    unet, vae, clip = (_Part(configs, part) for part in ("unet", "vae", "image_encoder"))
    return ModelFacts(
        c=vae.integer("in_channels"),
        z=vae.integer("latent_channels"),
        f=2 ** (vae.length("block_out_channels") - 1),
        d=clip.integer("projection_dim"),
        m=len(specs(UNetInput)["added_time_ids"].columns),
        num_frames=unet.integer("num_frames"),
        clip_size=clip.integer("image_size"),
        scaling_factor=vae.number("scaling_factor"),
    )


def require_useful_bridge(configs: ModelConfigs) -> None:
    """Raise ConfigError when conditioning.bridge is set for a CLIP tower that fits the UNet without one."""
    clip, unet = (
        _Part(configs, "image_encoder").integer("projection_dim"),
        _Part(configs, "unet").integer("cross_attention_dim"),
    )
    if clip == unet:
        raise ConfigError(
            f"conditioning.bridge: got linear, expected null: the image encoder of {configs.source} gives embeddings of width "
            f"{clip} and the UNet's cross_attention_dim is {unet}. They fit as they are, and a new projection between them "
            "would have to be learned from nothing.",
            ("conditioning.bridge=null",),
        )


@dataclass(frozen=True)
class _Part:
    """The JSON of one part; every read says which file and key is wrong."""

    configs: ModelConfigs
    name: str

    def at(self, key: str) -> str:
        return f"{self.configs.where(self.name)}: {key}"

    def integer(self, key: str) -> int:
        value = self._value(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self._wrong(key, value, "a whole number from 1 up")
        return value

    def number(self, key: str) -> float:
        value = self._value(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise self._wrong(key, value, "a number above 0")
        return value

    def length(self, key: str) -> int:
        value = self._value(key)
        if not isinstance(value, list) or not value:
            raise self._wrong(key, value, "a list of whole numbers")
        return len(value)

    def _value(self, key: str) -> Any:
        part = getattr(self.configs, self.name)
        if key not in part:
            raise ModelError(
                f"{self.at(key)} is missing, and its class's default need not be this model's. "
                "Copy the file from the model's release."
            )
        return part[key]

    def _wrong(self, key: str, value: Any, expected: str) -> ModelError:
        return ModelError(
            f"{self.at(key)}: got {value!r}, expected {expected}. Copy the file from the model's release."
        )


def _read_json(folder: Path, file: str) -> dict[str, Any]:
    path = folder / file
    if not path.is_file():
        raise ModelError(
            f"{path} is missing. A diffusers SVD folder has {', '.join(FILES.values())}; without its config a part would be "
            "built from class defaults that are not SVD's. Copy the whole folder of the release."
        )
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}. Download it again.") from error
    if not isinstance(content, dict):
        raise ModelError(
            f"{path}: got a JSON {type(content).__name__}, expected an object of settings. Download it again."
        )
    return content
