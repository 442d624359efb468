"""A random SVD in memory and as a diffusers folder, a run on it, and a picture."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from PIL import Image
from random_svd import CLIP, FEATURE_EXTRACTOR, SCHEDULER, UNET, VAE, Model
from sample_runs import write_config
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


@pytest.fixture
def run(tmp_path: Path, model_folder: Path) -> Path:
    """A run folder whose resolved config is all there is yet."""
    folder = tmp_path / "runs" / "shapes"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("run: {name: shapes}\n")
    write_config(folder, model_folder)
    return folder


@pytest.fixture
def image(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "first.png")
    return tmp_path / "first.png"
