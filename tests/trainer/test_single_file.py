"""`model.pretrained: x.safetensors` trains as its folder does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from svdtune.convert.cli import convert
from tests.trainer.conftest import losses


def test_a_run_on_a_single_file_is_the_run_on_its_folder(train: Callable[..., Path], tmp_path: Path) -> None:
    """The same losses; the export has the dtype of the base's weights, whatever model.variant says."""
    file = tmp_path / "svd.safetensors"
    convert("tiny", file, dtype="fp32")
    folder = train("folder", "train.steps=2", "adapt.method=lora")
    single = train("single", "train.steps=2", "adapt.method=lora", f"model.pretrained={file}")
    assert len(losses(folder)) == 2
    assert losses(single) == pytest.approx(losses(folder), rel=1e-5)  # its quant_conv is folded: other roundings
    dtypes, variants = [], []
    for run in (folder, single):
        notes = json.loads((run / "export" / "svdtune.json").read_text())
        assert notes["step"] == 2
        assert str(tmp_path) not in json.dumps(notes)
        variants.append(notes["conventions"]["base"]["variant"])
        with safe_open(run / "export" / "adapter_model.safetensors", "pt") as opened:
            dtypes.append({opened.get_tensor(name).dtype for name in opened.keys()})  # noqa: SIM118
    assert dtypes == [{torch.float16}, {torch.float32}]
    assert variants == ["fp16", None]
    # The same command again finds its base, and nothing to do.
    train("single", "train.steps=2", "adapt.method=lora", f"model.pretrained={file}")
