"""SVD-XT at its native size without weights: the real step, forward and backward, on fake tensors."""

from pathlib import Path

import pytest

from svdtune.config.load import load_config
from svdtune.guards.shapes import fake_step

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_configuration_builds_and_steps_at_its_size(path):
    fake_step(load_config(path))


def test_xt_is_stepped_at_25_frames_of_576_by_1024(monkeypatch):
    from svdtune.guards import shapes

    seen = []
    step = shapes.train_step
    monkeypatch.setattr(shapes, "train_step", lambda *a: seen.append(step(*a)) or seen[-1])
    shapes.fake_step(load_config(CONFIGS / "svd_xt_full.yaml"))
    assert tuple(seen[0].unet_input.sample.shape) == (1, 25, 8, 72, 128)
    assert tuple(seen[0].encoded.image_embeds.shape) == (1, 1024)
