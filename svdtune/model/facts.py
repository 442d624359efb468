"""Architecture facts from a model's own JSON files. Needs no weights and no torch.

The JSON of SVD and SVD-XT ships in the package (`facts/`), so nothing about shape needs a download.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svdtune.contracts import ModelFacts, UNetInput, specs
from svdtune.errors import ModelError

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
CLASSES = {
    "unet": "UNetSpatioTemporalConditionModel",
    "vae": "AutoencoderKLTemporalDecoder",
    "image_encoder": "CLIPVisionModelWithProjection",
    "scheduler": "EulerDiscreteScheduler",
}


@dataclass(frozen=True)
class ModelConfigs:
    """The JSON of all five parts of an SVD pipeline, and the folder they were read from."""

    folder: Path
    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    image_encoder: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    feature_extractor: Mapping[str, Any]


def local_folder(pretrained: str) -> Path | None:
    """The folder `model.pretrained` names on this machine, or None when it is a hub id."""
    if pretrained == "tiny":
        return TINY
    path = Path(pretrained).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"model.pretrained: {pretrained} is a file. Give a diffusers folder, a hub id or 'tiny'.")
    if len(path.parts) != 2 or pretrained.startswith((".", "/", "~")):
        raise ModelError(
            f"model.pretrained: no such folder: {path}. Give a diffusers folder that exists, a hub id (owner/name) or 'tiny'."
        )
    return None


def read_configs(folder: Path) -> ModelConfigs:
    """The five JSON files under a diffusers folder.

    Raises ModelError naming a missing file, broken JSON, or a class that is not SVD's.
    """
    parts = {name: _read_json(folder, file) for name, file in FILES.items()}
    for name, wanted in CLASSES.items():
        got = parts[name].get("_class_name") or (parts[name].get("architectures") or [wanted])[0]
        if got != wanted:
            raise ModelError(
                f"{folder / FILES[name]}: class is {got}, expected {wanted}. This is not a Stable Video Diffusion model."
            )
    return ModelConfigs(folder, **parts)


def model_facts(configs: ModelConfigs) -> ModelFacts:
    """The numbers that shapes follow from. Raises ModelError when the parts contradict each other."""
    unet, vae, clip = configs.unet, configs.vae, configs.image_encoder
    embedded, width = unet["projection_class_embeddings_input_dim"], unet["addition_time_embed_dim"]
    columns = specs(UNetInput)["added_time_ids"].columns
    contradictions = [
        (embedded != len(columns) * width, f"the UNet's add_embedding takes {embedded} = {embedded / width:g} x {width} "
         f"numbers, SVD gives it {len(columns)} ids ({', '.join(columns)}) of addition_time_embed_dim {width}"),
        (clip["projection_dim"] != unet["cross_attention_dim"], f"the image encoder gives embeddings of width "
         f"{clip['projection_dim']}, the UNet's cross_attention_dim is {unet['cross_attention_dim']}"),
        (unet["in_channels"] != 2 * vae["latent_channels"], f"the UNet takes {unet['in_channels']} channels, noisy plus "
         f"conditioning latents have 2 x {vae['latent_channels']}"),
        (unet["out_channels"] != vae["latent_channels"], f"the UNet gives {unet['out_channels']} channels, the VAE's "
         f"latents have {vae['latent_channels']}"),
    ]  # fmt: skip
    if told := [sentence for wrong, sentence in contradictions if wrong]:
        raise ModelError(
            f"{configs.folder}: {'; '.join(told)}. These parts do not belong together; take all from one SVD release."
        )
    return ModelFacts(
        c=vae["in_channels"],
        z=vae["latent_channels"],
        f=2 ** (len(vae["block_out_channels"]) - 1),
        d=clip["projection_dim"],
        m=len(columns),
        num_frames=unet["num_frames"],
        clip_size=clip["image_size"],
        scaling_factor=vae["scaling_factor"],
    )


def _read_json(folder: Path, file: str) -> dict[str, Any]:
    path = folder / file
    if not path.is_file():
        raise ModelError(
            f"{path} is missing. A diffusers SVD folder has {', '.join(FILES.values())}; without its config a part would be "
            "built from class defaults that are not SVD's. Copy the whole folder of the release."
        )
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}. Download it again.") from error
