"""Numbers that must agree between the parts of a model, and the honest offers where they do not."""

from __future__ import annotations

import json

import pytest

from svdtune.config.load import with_overrides
from svdtune.guards.preflight import Options, run_preflight
from svdtune.guards.table import check_table, facts_of
from svdtune.model.facts import SHIPPED

XT = SHIPPED["stabilityai/stable-video-diffusion-img2vid-xt"]


@pytest.fixture
def edited(tiny, tmp_path):
    """SVD-XT's own JSON, without weights, with keys changed."""
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(XT, folder)

    def edit(part, **changes):
        path = folder / part / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return tiny(f"model.pretrained={folder}")

    return edit


def test_a_release_agrees_with_itself(tiny):
    config = tiny(f"model.pretrained={XT}")
    assert check_table(config) == []
    assert facts_of(config).d == 1024


@pytest.mark.parametrize(
    ("part", "changes", "code", "where", "got", "expected"),
    [
        (
            "unet",
            {"projection_class_embeddings_input_dim": 256},
            "SHP402",
            "projection_class_embeddings_input_dim",
            "256",
            "768",
        ),
        ("unet", {"addition_time_embed_dim": 512}, "SHP402", "projection_class_embeddings_input_dim", "768", "1536"),
        ("image_encoder", {"projection_dim": 768}, "SHP403", "projection_dim", "768", "1024"),
        ("unet", {"in_channels": 9}, "SHP404", "in_channels", "9", "8"),
        ("unet", {"out_channels": 8}, "SHP404", "out_channels", "8", "4"),
        ("vae", {"in_channels": 4}, "SHP412", "in_channels", "4", "3"),
    ],
)
def test_each_number_that_does_not_fit(edited, part, changes, code, where, got, expected):
    config = edited(part, **changes)
    [found] = check_table(config)
    assert (found.code, found.got, found.expected) == (code, got, expected)
    assert found.where.endswith(f"{part}/config.json: {where}")
    assert facts_of(config) is None


def test_another_image_encoder_gets_both_offers_and_the_bridge_is_proved(edited):
    config = edited("image_encoder", projection_dim=768)
    [found] = run_preflight(config, Options(only="shapes")).findings
    assert "put the image_encoder folder of the UNet's own release in place" in found.fix
    assert "train a projection from this tower to the UNet (conditioning.bridge=linear)" in found.fix
    assert (found.patch, found.verified) == (("conditioning.bridge=linear",), True)
    assert check_table(with_overrides(config, found.patch)) == []


def test_a_bridge_where_none_is_needed(tiny):
    [found] = run_preflight(tiny("conditioning.bridge=linear"), Options(only="shapes")).findings
    assert (found.code, found.where) == ("CFG115", "conditioning.bridge")
    assert (found.patch, found.verified) == (("conditioning.bridge=null",), True)


def test_json_that_cannot_be_read_is_left_to_the_checkpoint_stage(edited, tmp_path):
    config = edited("unet")
    (tmp_path / "model" / "unet" / "config.json").write_text("{")
    assert check_table(config) is None
    assert facts_of(config) is None
