"""Shared by all tests: a small random SVD as a diffusers folder, made once."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
LONGEST = ("test_mutations.py", "test_preemption.py", "test_engines.py", "test_live.py", "test_checkpoint_bucket.py", "test_whole_job.py",
           "test_train_spellings.py", "test_resume.py", "test_two_ranks.py", "test_shards.py", "test_docker_smoke.py", "test_launch.py",
           "test_ranks.py", "test_shapes.py", "test_preflight.py")  # fmt: skip
"""Files of minutes, first of all: one that begins when the others end keeps one core busy and the rest idle."""
_CACHE = tempfile.TemporaryDirectory(prefix="svdtune-tests-")
os.environ["SVDTUNE_CACHE"] = _CACHE.name  # of this session alone


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`LONGEST` first, the rest as collected."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="session")
def svd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random-weight SVD with real architecture, all axes of different size (z=4, d=24, 3 ids of 16, f=4)."""
    import torch
    from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    from svdtune.model.facts import PACKAGE

    folder = tmp_path_factory.mktemp("svd")
    torch.manual_seed(0)
    unet = json.loads((Path(__file__).parent / "assets" / "unet_config.json").read_text())
    UNetSpatioTemporalConditionModel.from_config(unet).save_pretrained(folder / "unet")
    vae = {"block_out_channels": [32, 32, 64], "down_block_types": ["DownEncoderBlock2D"] * 3, "layers_per_block": 1}
    AutoencoderKLTemporalDecoder(latent_channels=4, scaling_factor=0.2, **vae).save_pretrained(folder / "vae")
    clip = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, patch_size=56, image_size=224,
        projection_dim=unet["cross_attention_dim"],
    )  # fmt: skip
    CLIPVisionModelWithProjection(clip).save_pretrained(folder / "image_encoder")
    for part in ("scheduler", "feature_extractor"):
        shutil.copytree(PACKAGE / "facts" / "svd-xt" / part, folder / part)
    shutil.copy(PACKAGE / "facts" / "svd-xt" / "model_index.json", folder)
    return folder
