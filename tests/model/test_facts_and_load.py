"""Where a model comes from: facts of the shipped architectures, strict loading, and each error's sentence."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from svdtune.config.schema import Model
from svdtune.errors import ModelError
from svdtune.model.facts import SHIPPED, contradictions, model_facts
from svdtune.model.load import fake_model, load_model
from svdtune.model.source import local_source, read_configs, weights_hash

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(svd_folder, tmp_path):
    shutil.copytree(svd_folder, tmp_path / "svd")
    return tmp_path / "svd"


def load(folder, variant=None):
    return load_model(Model(pretrained=str(folder), variant=variant))


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_facts_of_svd_and_xt_differ_in_frames_only():
    svd, xt = (
        model_facts(read_configs(SHIPPED[f"stabilityai/stable-video-diffusion-img2vid{x}"])) for x in ("", "-xt")
    )
    assert (svd.num_frames, xt.num_frames) == (14, 25)
    assert (xt.c, xt.z, xt.f, xt.d, xt.m, xt.clip_size, xt.scaling_factor) == (3, 4, 8, 1024, 3, 224, 0.18215)
    assert svd.axes(b=1, t=1, h=8, w=8) == xt.axes(b=1, t=1, h=8, w=8)


def test_shipped_architecture_has_the_parameters_of_the_released_model():
    parts = fake_model(read_configs(SHIPPED["stabilityai/stable-video-diffusion-img2vid-xt"]))
    counts = [sum(p.numel() for p in network.parameters()) for network in (parts.unet, parts.vae, parts.image_encoder)]
    assert counts == [1_524_623_082, 97_742_847, 632_076_800]
    assert all(p.device.type == "meta" for p in parts.unet.parameters())


def test_loads_what_diffusers_saved_frozen_and_in_eval_mode(svd_folder):
    parts = load(svd_folder)
    saved = load_file(svd_folder / UNET)
    for name, parameter in parts.unet.named_parameters():
        assert torch.equal(parameter, saved[name])
        assert not parameter.requires_grad
    assert not parts.unet.training
    assert parts.facts.f == 4
    assert parts.facts.d == 24


def test_a_missing_weight_is_an_error_not_a_random_layer(folder):
    tensors = load_file(folder / UNET)
    removed = [k for k in tensors if "temporal_transformer_blocks" in k]
    save_file({k: v for k, v in tensors.items() if k not in removed}, folder / UNET, {"format": "pt"})
    with pytest.raises(
        ModelError, match=rf"unet: .*{len(removed)} missing \(.*temporal_transformer_blocks.*train from random values"
    ):
        load(folder)


def test_an_unexpected_weight_is_an_error(folder):
    save_file({**load_file(folder / UNET), "motion.weight": torch.zeros(2)}, folder / UNET, {"format": "pt"})
    with pytest.raises(ModelError, match=r"1 unexpected \(motion\.weight\)"):
        load(folder)


def test_a_misshapen_weight_is_an_error(folder):
    tensors = load_file(folder / UNET)
    tensors["conv_in.weight"] = tensors["conv_in.weight"][:, :4].contiguous()
    save_file(tensors, folder / UNET, {"format": "pt"})
    with pytest.raises(ModelError, match=r"unet: .*conv_in\.weight.*do not fit the config"):
        load(folder)


def test_variant_that_is_not_there_names_the_change_that_fixes_it(folder):
    with pytest.raises(ModelError, match=r"no \*\.fp16\.safetensors with model\.variant=fp16.*Set model\.variant=null"):
        load(folder, "fp16")
    for part, name in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("image_encoder", "model"),
    ):
        (folder / part / f"{name}.safetensors").rename(folder / part / f"{name}.fp16.safetensors")
    with pytest.raises(ModelError, match=r"model\.variant=null; there: .*fp16.*Set model\.variant=fp16"):
        load(folder)
    assert load(folder, "fp16").facts.f == 4


def test_pickled_weights_are_refused(folder):
    (folder / UNET).unlink()
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ModelError, match=r"there: diffusion_pytorch_model\.bin\. svdtune reads safetensors only"):
        load(folder)


def test_missing_config_names_the_file(folder):
    (folder / "image_encoder/config.json").unlink()
    with pytest.raises(ModelError, match=r"image_encoder/config\.json is missing.*class defaults that are not SVD's"):
        load(folder)


def test_broken_json_names_the_file(folder):
    (folder / "vae/config.json").write_text("{,}")
    with pytest.raises(ModelError, match=r"vae/config\.json is not valid JSON"):
        load(folder)


def test_another_kind_of_unet_is_named(folder):
    edit(folder / "unet/config.json", _class_name="UNet2DConditionModel")
    with pytest.raises(ModelError, match="class is UNet2DConditionModel, expected UNetSpatioTemporalConditionModel"):
        load(folder)


@pytest.mark.parametrize(
    ("file", "change", "sentence"),
    [
        ("unet", {"projection_class_embeddings_input_dim": 16}, r"add_embedding takes 16 = 1 x 16 numbers, SVD gives it 3 ids \(fps - 1, "),
        ("image_encoder", {"projection_dim": 20}, r"embeddings of width 20, the UNet's cross_attention_dim is 24"),
        ("unet", {"in_channels": 4}, r"the UNet takes 4 channels, noisy plus conditioning latents have 2 x 4"),
        ("unet", {"out_channels": 3}, r"the UNet gives 3 channels, the VAE's latents have 4"),
    ],
)  # fmt: skip
def test_parts_that_do_not_belong_together(folder, file, change, sentence):
    edit(folder / file / "config.json", **change)
    with pytest.raises(ModelError, match=sentence):
        model_facts(read_configs(folder))


def test_what_pretrained_may_be(tmp_path):
    assert local_source("tiny").name == "tiny"
    assert local_source("owner/name") is None
    with pytest.raises(ModelError, match=r"no such folder or file: .*nowhere.*hub id \(owner/name\) or 'tiny'"):
        local_source(str(tmp_path / "nowhere"))
    (tmp_path / "svd_xt.safetensors").touch()
    assert local_source(str(tmp_path / "svd_xt.safetensors")) == tmp_path / "svd_xt.safetensors"
    with pytest.raises(ModelError, match=r"no such folder or file: models/svd\.safetensors"):
        local_source("models/svd.safetensors")


def test_hub_id_without_a_network_says_what_to_do(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        ModelError,
        match=r"no folder someone/nothing here, and it could not be got from the hub .*give its path; 'tiny' ships",
    ):
        load_model(Model(pretrained="someone/nothing"))


def test_hash_follows_the_weights(folder):
    before = weights_hash(folder, "unet", None)
    tensors = load_file(folder / UNET)
    tensors["conv_out.bias"] = tensors["conv_out.bias"] + 1
    save_file(tensors, folder / UNET, {"format": "pt"})
    assert weights_hash(folder, "unet", None) != before


def test_a_hub_id_is_loaded_from_the_cache(svd_folder, tmp_path, monkeypatch):
    """The layout that the hub's client leaves on disk: refs/main names a snapshot folder."""
    import huggingface_hub.constants

    repo = tmp_path / "models--someone--svd"
    shutil.copytree(svd_folder, repo / "snapshots" / "abc123")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc123")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    parts = load_model(Model(pretrained="someone/svd", variant=None))
    assert parts.configs.source == repo / "snapshots" / "abc123"
    assert parts.facts.d == 24


def test_download_asks_for_what_is_needed_and_no_other_variant(monkeypatch, svd_folder):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    released = ["model_index.json", "svd_xt.safetensors", "README.md"] + [
        f"{part}/{name}{variant}.safetensors"
        for part, name in (
            ("unet", "diffusion_pytorch_model"),
            ("vae", "diffusion_pytorch_model"),
            ("image_encoder", "model"),
        )
        for variant in ("", ".fp16")
    ]
    asked = []

    def download(_repo, *, allow_patterns, ignore_patterns, **_):
        asked[:] = filter_repo_objects(released, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        return str(svd_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    load_model(Model(pretrained="someone/svd", variant=None))
    assert sorted(asked) == sorted(f for f in released if f == "model_index.json" or ("/" in f and ".fp16." not in f))
    with pytest.raises(ModelError, match=r"no \*\.fp16\.safetensors"):
        load_model(Model(pretrained="someone/svd", variant="fp16"))
    assert sorted(asked) == sorted(f for f in released if f == "model_index.json" or ".fp16." in f)


@pytest.mark.parametrize(
    ("part", "key"),
    [
        ("unet", "projection_class_embeddings_input_dim"), ("unet", "addition_time_embed_dim"), ("unet", "cross_attention_dim"),
        ("unet", "in_channels"), ("unet", "out_channels"), ("unet", "num_frames"), ("image_encoder", "projection_dim"),
        ("image_encoder", "image_size"), ("vae", "latent_channels"), ("vae", "in_channels"), ("vae", "scaling_factor"),
        ("vae", "block_out_channels"),
    ],
)  # fmt: skip
def test_a_missing_or_wrong_number_names_file_and_key(folder, part, key):
    path = folder / part / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in content.items() if name != key}))
    with pytest.raises(
        ModelError, match=rf"{part}/config\.json: {key} is missing, and its class's default need not be this"
    ):
        model_facts(read_configs(folder))
    for wrong in ("24", None, 0, True, {}):
        path.write_text(json.dumps({**content, key: wrong}))
        with pytest.raises(ModelError, match=rf"{part}/config\.json: {key}: got .*, expected (a|an) "):
            model_facts(read_configs(folder))
    path.write_text(json.dumps({**content, key: [320, 640] if key != "block_out_channels" else 320}))
    with pytest.raises(ModelError, match=rf"{part}/config\.json: {key}: got (\[320, 640\]|320), expected (a|an) "):
        model_facts(read_configs(folder))


def test_json_that_is_no_object_names_the_file(folder):
    (folder / "vae/config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"vae/config\.json: got a JSON list, expected an object"):
        load(folder)


def test_contradictions_are_data_and_a_bridge_takes_one_away(folder):
    edit(folder / "image_encoder/config.json", projection_dim=20)
    edit(folder / "unet/config.json", in_channels=4)
    configs = read_configs(folder)
    found = contradictions(configs)
    assert [(c.kind, c.got, c.expected) for c in found] == [("clip_width", "20", "24"), ("in_channels", "4", "8")]
    assert found[0].where == f"{folder / 'image_encoder/config.json'}: projection_dim"
    assert [c.kind for c in contradictions(configs, bridge=True)] == ["in_channels"]
    edit(folder / "unet/config.json", in_channels=8)
    assert contradictions(read_configs(folder), bridge=True) == []
    assert model_facts(read_configs(folder), bridge=True).d == 20


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_shipped_architectures_contradict_nothing(name):
    assert contradictions(read_configs(SHIPPED[name])) == []
