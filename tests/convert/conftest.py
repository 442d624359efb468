"""Models that no test changes, made once; a test that changes one copies it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from convert_models import MODEL_DTYPES, PLAIN_CLIP, make_file, make_folder, make_run, save


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shelf(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def folders(shelf) -> dict[str, Path]:
    """The same model in each dtype."""
    return {name: make_folder(shelf / f"svd-{name}", dtype) for name, dtype in MODEL_DTYPES.items()}


@pytest.fixture(scope="session")
def folder(folders) -> Path:
    return folders["fp32"]


@pytest.fixture(scope="session")
def file(shelf, folder) -> Path:
    """The float32 model in one file."""
    return make_file(shelf / "svd_xt.safetensors", folder)


@pytest.fixture(scope="session")
def plain_file(shelf) -> Path:
    """A model in one file as the authors release it: without notes."""
    made = make_folder(shelf / "plain", image_encoder=PLAIN_CLIP)
    return make_file(shelf / "svd_xt_plain.safetensors", made, notes={})


@pytest.fixture(scope="session")
def runs(shelf, folder) -> dict[str, Path]:
    """A finished run of each kind on the float32 model at step 2, of some at step 1 too; `ema` keeps averages."""
    made = {}
    for name, options in {
        "full": ["adapt.method=full"],
        "temporal": ["adapt.method=temporal"],
        "ema": ["adapt.method=full", "train.ema=true"],
        "lora": ["adapt.method=lora", "adapt.alpha=6"],
        "lora-ema": ["adapt.method=lora", "train.ema=true"],
        "dora": ["adapt.method=lora", "adapt.dora=true"],
    }.items():
        made[name] = make_run(shelf / "runs" / name, folder, *options)
        for step in (1, 2) if name in ("full", "lora") else (2,):
            save(made[name], step, ema="ema" in name)
    return made


@pytest.fixture
def own(tmp_path):
    """Copies a folder of the session for this test alone."""

    def copied(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / f"own-{folder.name}"))

    return copied
