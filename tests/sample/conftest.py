"""A random SVD in memory and as a diffusers folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from random_svd import CLIP, FEATURE_EXTRACTOR, SCHEDULER, UNET, VAE, Model
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def model() -> Model:
    """Random weights, the same every time; output layers are not zero, so everything that goes in shows in the video."""
    torch.manual_seed(0)
    return Model(
        UNetSpatioTemporalConditionModel(**UNET).eval(),
        AutoencoderKLTemporalDecoder(**VAE).eval(),
        CLIPVisionModelWithProjection(CLIPVisionConfig(**CLIP)).eval(),
    )


@pytest.fixture
def model_folder(model: Model, tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    for name in ("unet", "vae", "image_encoder"):
        getattr(model, name).save_pretrained(folder / name)
    for file, content in (
        ("scheduler/scheduler_config.json", SCHEDULER),
        ("feature_extractor/preprocessor_config.json", FEATURE_EXTRACTOR),
    ):
        (folder / file).parent.mkdir()
        (folder / file).write_text(json.dumps(content))
    return folder
