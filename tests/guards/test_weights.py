"""Stage `checkpoint`: silent on sound folders; each kind of broken folder gets its code, its cause and its fix."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from svdtune.config.load import load_config
from svdtune.guards.catalog import RULES
from svdtune.guards.model_json import check_json, read_jsons
from svdtune.guards.weights import check_weights
from svdtune.model.facts import SHIPPED, STEMS

TINY_YAML = Path(__file__).parents[2] / "configs" / "tiny.yaml"
UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
CLIP = "image_encoder/model.safetensors"
FILES = (UNET, VAE, CLIP)


@pytest.fixture
def folder(svd_folder, tmp_path):
    shutil.copytree(svd_folder, tmp_path / "svd")
    return tmp_path / "svd"


def check(path, *overrides):
    base = [f"model.pretrained={path}", "model.variant=null", *overrides]
    found = check_weights(load_config(TINY_YAML, base))
    assert all(finding.code in RULES for finding in found)
    return found


def only(path, *overrides):
    found = check(path, *overrides)
    assert len(found) == 1, [(f.code, f.where, f.got) for f in found]
    return found[0]


def edit(path, remove=(), **changes):
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if key not in remove}))


def rewrite(path, change):
    tensors = {name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}
    save_file(tensors, path, {"format": "pt"})


def without_temporal(tensors):
    marks = ("temporal_", "time_pos_embed", "time_mixer")
    return {n: t for n, t in tensors.items() if not any(mark in n for mark in marks)}


def as_image_unet(tensors):
    kept = without_temporal(tensors)
    kept = {n.replace(".spatial_res_block.", "."): t for n, t in kept.items() if not n.startswith("add_embedding")}
    return {**kept, "conv_in.weight": kept["conv_in.weight"][:, :4]}


def test_sound_folders_have_no_findings(folder):
    assert check(folder) == []
    assert check("tiny", "model.variant=fp16") == []


def test_the_shipped_configs_have_no_findings():
    for path in SHIPPED.values():
        parts, findings = read_jsons(path)
        assert (findings, check_json(path, parts)) == ([], [])


def test_paths_that_are_no_model(tmp_path):
    found = only(tmp_path / "gone")
    assert (found.code, found.got) == ("CKP201", f"no such folder or file: {tmp_path / 'gone'}")
    shutil.copy(Path(SHIPPED["stabilityai/stable-video-diffusion-img2vid"]) / "unet/config.json", tmp_path)
    found = only(tmp_path)
    assert found.code == "CKP201"
    assert "it is the folder of one part (it holds a config.json)" in found.got


@pytest.mark.parametrize("name", ["foo bar/baz", "a/b:c"])
def test_names_that_can_be_no_model(name):
    assert only(name).code == "CKP201"


def test_dead_links_and_the_root_of_a_hub_cache(folder, tmp_path):
    (folder / UNET).unlink()
    (folder / UNET).symlink_to(tmp_path / "blob")
    assert only(folder).got == "there: diffusion_pytorch_model.safetensors, a link that leads nowhere"
    (tmp_path / "models--a--b" / "snapshots").mkdir(parents=True)
    assert only(tmp_path / "models--a--b").got.endswith("its states are in snapshots/COMMIT")


def test_a_variant_given_as_a_revision():
    found = only("stabilityai/stable-video-diffusion-img2vid-xt", "model.revision=fp16")
    assert (found.code, found.severity, found.where) == ("CKP222", "error", "model.revision")
    assert found.patch == ("model.revision=null", "model.variant=fp16")


def test_a_mistyped_folder_is_no_hub_id(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    found = only("models/svdd")
    assert (found.code, found.got) == ("CKP201", "no such folder or file: models/svdd")


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("unet", {"block_out_channels": None}),
        ("unet", {"num_attention_heads": "5"}),
        ("image_encoder", {"architectures": -1, "hidden_size": -1}),
        ("image_encoder", {"attention_dropout": "x"}),
        ("vae", {"down_block_types": [0]}),
    ],
)
def test_json_of_another_kind_is_a_finding_and_no_crash(folder, part, changes):
    edit(folder / part / "config.json", **changes)
    assert {finding.severity for finding in check(folder)} == {"error"}


def test_a_file_that_is_not_the_parts_is_not_read(folder):
    shutil.copy(folder / "image_encoder" / "model.safetensors", folder / "unet" / "pytorch_lora_weights.safetensors")
    assert check(folder) == []


@pytest.mark.parametrize(
    "shard", ["{stem}.fp16-0000{n}-of-00002.safetensors", "{stem}-0000{n}-of-00002.fp16.safetensors"]
)
def test_shards_of_a_variant_are_found_by_preflight_and_training_alike(folder, shard):
    """Two spellings of diffusers, the present and a former one."""
    from svdtune.config.schema import Model
    from svdtune.model.load import load_model

    for part, stem in STEMS.items():
        whole = folder / part / f"{stem}.safetensors"
        tensors, index = load_file(whole), {}
        names = sorted(tensors)
        for n, some in enumerate((names[::2], names[1::2]), 1):
            name = shard.format(stem=stem, n=n)
            save_file({key: tensors[key] for key in some}, folder / part / name, {"format": "pt"})
            index |= dict.fromkeys(some, name)
        whole.unlink()
        listed = {"metadata": {"total_size": 1}, "weight_map": index}
        (folder / part / f"{stem}.safetensors.index.fp16.json").write_text(json.dumps(listed))
    assert check(folder, "model.variant=fp16") == []
    assert load_model(Model(pretrained=str(folder), variant="fp16")).unet is not None


def test_a_hub_id_that_is_not_here(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    found = only("someone/svd")
    assert (found.code, found.severity) == ("CKP203", "warning")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    offline = only("someone/svd")
    assert (offline.severity, offline.fix) == ("error", "Unset HF_HUB_OFFLINE, or give a local folder.")


def test_a_cached_hub_id_is_checked(folder, monkeypatch, tmp_path):
    import huggingface_hub.constants

    repo = tmp_path / "cache" / "models--someone--svd"
    shutil.copytree(folder, repo / "snapshots" / "abc123")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc123")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert check("someone/svd") == []
    (repo / "snapshots" / "abc123" / UNET).write_bytes(b"")
    assert [f.code for f in check("someone/svd")] == ["CKP205"]


def test_a_single_file_is_named(folder):
    found = only(folder / UNET)
    assert (found.code, found.got) == ("CKP204", "one file: SVD, diffusers naming")
    assert "UNet, VAE, image encoder" in found.expected
    assert "svd_xt.safetensors" in found.fix
    (folder / "x.ckpt").write_bytes(b"\x80\x02}q\x00.")
    assert "a pickle" in only(folder / "x.ckpt").got


@pytest.mark.parametrize("file", FILES)
def test_a_truncated_file(folder, file):
    with (folder / file).open("r+b") as handle:
        handle.truncate((folder / file).stat().st_size - 100)
    found = only(folder)
    assert (found.code, found.where) == ("CKP205", str(folder / file))
    assert "it is cut off" in found.got


def test_a_pointer_a_page_and_a_pickle(folder):
    (folder / UNET).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n")
    (folder / VAE).write_text("<html>login</html>")
    torch.save({"w": torch.zeros(2)}, folder / CLIP)
    found = check(folder)
    assert [f.code for f in found] == ["CKP205"] * 3
    assert [word in f.got for f, word in zip(found, ("git lfs pull", "web page", "torch.save"), strict=True)] == [
        True
    ] * 3


def test_fp16_only_and_the_reverse_carry_the_change(folder):
    found = only(folder, "model.variant=fp16")
    assert (found.code, found.patch) == ("CKP206", ("model.variant=null",))
    for file in FILES:
        (folder / file).rename(folder / file.replace(".safetensors", ".fp16.safetensors"))
    found = only(folder)
    assert (found.code, found.patch) == ("CKP206", ("model.variant=fp16",))
    assert check(folder, "model.variant=fp16") == []


def test_mixed_variants_have_no_change_to_offer(folder):
    (folder / UNET).rename(folder / UNET.replace(".safetensors", ".fp16.safetensors"))
    found = only(folder)
    assert (found.code, found.patch, found.got) == ("CKP206", (), "there: fp16 weights")
    assert "hold different variants" in found.why


def test_pickles_only_are_refused(folder):
    (folder / UNET).rename(folder / "unet/diffusion_pytorch_model.bin")
    found = only(folder)
    assert (found.code, found.got) == ("CKP206", "there: diffusion_pytorch_model.bin")
    assert "a pickle can run code" in found.why


def shard(folder):
    tensors = load_file(folder / UNET)
    (folder / UNET).unlink()
    names = sorted(tensors)
    files = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    halves = (names[::2], names[1::2])
    for file, half in zip(files, halves, strict=True):
        save_file({name: tensors[name] for name in half}, folder / "unet" / file)
    index = {"weight_map": {name: file for file, half in zip(files, halves, strict=True) for name in half}}
    (folder / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return files


@pytest.mark.parametrize(
    ("remove", "changes", "got", "why"),
    [
        ((), {"image_mean": [0.485, 0.456, 0.406]}, "[0.485, 0.456, 0.406]", "shifted colours"),
        ((), {"image_std": [0.5]}, "[0.5]", "without three numbers each nothing can be normalised"),
        (("image_mean",), {}, "missing", "without three numbers each"),
    ],
)
def test_picture_statistics_that_are_not_clips(folder, remove, changes, got, why):
    edit(folder / "feature_extractor" / "preprocessor_config.json", remove, **changes)
    found = only(folder)
    assert (found.code, found.severity, found.got) == ("CKP220", "error", got)
    assert why in found.why


def test_shards(folder):
    files = shard(folder)
    assert check(folder) == []
    (folder / "unet" / files[1]).unlink()
    found = only(folder)
    assert (found.code, found.got) == ("CKP209", f"1 of 2 shards are missing: {files[1]}")


def test_svd_without_its_temporal_layers(folder):
    rewrite(folder / UNET, without_temporal)
    found = only(folder)
    assert found.code == "CKP209"
    assert "weights of the temporal layers are missing" in found.got
    assert "no setting leaves a weight random" in found.why
    assert found.patch == ()


def test_an_image_unet_is_offered_the_widening(folder):
    rewrite(folder / UNET, as_image_unet)
    assert only(folder).patch == ("model.on_mismatch=adapt",)
    found = only(folder, "adapt.method=lora", "adapt.dora=true", "adapt.alpha=4")
    assert (found.code, found.patch[:2]) == ("CKP207", ("model.on_mismatch=adapt", "adapt.method=full"))
    assert found.patch[2:] == ("adapt.alpha=null", "adapt.dora=false")
    assert "weights" in found.got
    adapted = only(folder, "model.on_mismatch=adapt", "adapt.method=full")
    assert (adapted.code, adapted.severity) == ("CKP218", "warning")
    assert "the 4 for the conditioning latents start at zero" in adapted.why
    assert "the file is an image model" in adapted.why


def test_widening_under_a_method_that_does_not_train_it(folder):
    rewrite(folder / UNET, as_image_unet)
    found = only(folder, "model.on_mismatch=adapt", "adapt.method=temporal")
    assert (found.code, found.severity, found.patch) == ("CKP218", "error", ("adapt.method=full",))
    assert "adapt.method=temporal does not train what starts at zero" in found.why


def test_adapt_does_not_hide_other_differences(folder):
    rewrite(folder / UNET, lambda t: {n: v for n, v in t.items() if n != "conv_out.weight"})
    found = only(folder, "model.on_mismatch=adapt")
    assert (found.code, found.severity) == ("CKP209", "error")
    assert "1 weights are missing: conv_out (1)" in found.got


@pytest.mark.parametrize("prefix", ["module.", "unet.", "_orig_mod.module."])
def test_a_wrapper_prefix(folder, prefix):
    rewrite(folder / UNET, lambda t: {prefix + n: v for n, v in t.items()})
    found = only(folder)
    assert (found.code, found.got) == ("CKP208", f"every name begins with {prefix!r}")


def test_a_mask_trained_derivative(folder):
    rewrite(folder / UNET, lambda t: {**t, "conv_in.weight": torch.zeros(64, 9, 3, 3)})
    found = only(folder)
    assert (found.code, found.got) == ("CKP207", "SVD derivative (9 channels), diffusers naming")
    assert "conv_in takes 9 channels (SVD's channels and a mask), SVD's 8" in found.why


def test_sv3d_in_the_place_of_svd(folder):
    rewrite(folder / UNET, lambda t: {**t, "add_embedding.linear_1.weight": torch.zeros(256, 256)})
    found = only(folder)
    assert found.code == "CKP207"
    assert "256 = 1 x 256: one id" in found.why


def test_a_unet_made_for_another_encoder(folder):
    def narrow(tensors):
        return {
            n: torch.zeros(v.shape[0], 20) if "attn2.to_k." in n or "attn2.to_v." in n else v
            for n, v in tensors.items()
        }

    rewrite(folder / UNET, narrow)
    found = only(folder)
    assert (found.code, found.expected) == ("CKP211", "[64, 24]")
    assert "Another cross-attention width" in found.why


def test_a_lora_in_the_place_of_the_unet(folder):
    name = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight"
    save_file({name: torch.zeros(4, 24)}, folder / UNET)
    found = only(folder)
    assert (found.code, found.got) == ("CKP207", "LoRA, peft naming")


def test_adapters_left_among_the_weights(folder):
    rewrite(folder / UNET, lambda t: {**t, "mid_block.attentions.0.lora_A.weight": torch.zeros(2)})
    found = only(folder)
    assert (found.code, "merge them into the base" in found.why) == ("CKP210", True)


def test_the_vae_of_an_image_model(folder):
    rewrite(folder / VAE, lambda t: {n: v for n, v in t.items() if not any(m in n for m in ("temporal_", "time_"))})
    found = only(folder)
    assert (found.code, "weights of the temporal layers are missing" in found.got) == ("CKP209", True)
    rewrite(folder / VAE, lambda t: {n.replace(".spatial_res_block.", "."): v for n, v in t.items()})
    found = only(folder)
    assert found.code == "CKP207"
    assert found.got.startswith("VAE")


def test_quantised_weights(folder):
    rewrite(folder / UNET, lambda t: {n: v.to(torch.int8) if v.ndim == 2 else v for n, v in t.items()})
    found = only(folder)
    assert (found.code, found.got) == ("CKP212", "I8")


def test_position_ids_of_old_transformers_are_harmless(folder):
    rewrite(folder / CLIP, lambda t: {**t, "vision_model.embeddings.position_ids": torch.arange(2)[None]})
    assert check(folder) == []


@pytest.mark.parametrize(
    ("file", "code", "sentence"),
    [
        ("image_encoder/config.json", "CKP215", "ViT-B/32"),
        ("feature_extractor/preprocessor_config.json", "CKP219", "mean and standard deviation"),
        ("scheduler/scheduler_config.json", "CKP214", "t = 999...0"),
        ("vae/config.json", "CKP201", "class defaults"),
    ],
)
def test_a_missing_json(folder, file, code, sentence):
    (folder / file).unlink()
    found = only(folder)
    assert (found.code, found.where, sentence in found.why) == (code, str(folder / file), True)


def test_json_that_is_none(folder):
    (folder / "vae/config.json").write_text("{,}")
    assert "not valid JSON" in only(folder).got
    (folder / "vae/config.json").write_text("[1]")
    assert "a JSON list" in only(folder).got


@pytest.mark.parametrize(
    ("changes", "removed", "sentence"),
    [
        ({"prediction_type": "epsilon"}, (), 'prediction_type="epsilon"'),
        ({"timestep_type": "discrete"}, (), 'timestep_type="discrete"'),
        ({"use_karras_sigmas": False}, (), "use_karras_sigmas=false"),
        ({"sigma_max": None}, (), "sigma_max=null"),
        ({"sigma_min": 0.03}, (), "sigma_min=0.03"),
        (
            {},
            ("sigma_max", "timestep_type"),
            'timestep_type="discrete" (missing: class default), sigma_max=null (missing',
        ),
        ({"_class_name": "DDIMScheduler"}, (), "class DDIMScheduler"),
    ],
)
def test_schedulers_that_are_not_svds(folder, changes, removed, sentence):
    edit(folder / "scheduler/scheduler_config.json", removed, **changes)
    found = only(folder)
    assert (found.code, found.severity, sentence in found.got) == ("CKP214", "error", True), found.got


def released(tmp_path, part, remove=(), **changes):
    folder = tmp_path / "xt"
    shutil.copytree(SHIPPED["stabilityai/stable-video-diffusion-img2vid-xt"], folder)
    edit(folder / part / "config.json", remove, **changes)
    parts, findings = read_jsons(folder)
    return findings + check_json(folder, parts)


@pytest.mark.parametrize(
    ("part", "remove", "changes", "code", "sentence"),
    [
        ("unet", (), {"num_attention_heads": [5, 10, 10, 20]}, "CKP213", "Heads would be 64, 64, 128, 64 wide"),
        ("unet", (), {"num_attention_heads": 8}, "CKP213", "Heads would be 40, 80, 160, 160 wide"),
        ("unet", (), {"num_attention_heads": [5, 0, "x", 20]}, "CKP213", ""),
        ("unet", (), {"num_attention_heads": [3, 10, 20, 20]}, "CKP213", "narrower than its level"),
        ("vae", ("scaling_factor",), {}, "CKP216", "which need not be this VAE's"),
        ("image_encoder", (), {"num_attention_heads": 20}, "CKP213", "every first frame is wrong"),
        ("image_encoder", ("hidden_act",), {}, "CKP213", "every first frame is wrong"),
        ("image_encoder", ("projection_dim",), {}, "CKP215", "ViT-B/32"),
        ("vae", (), {"scaling_factor": 0.13025}, "CKP217", "another spread"),
        ("vae", ("block_out_channels",), {}, "CKP216", "(64,)"),
        ("unet", ("num_frames", "addition_time_embed_dim"), {}, "CKP216", "class default"),
    ],
)
def test_what_no_weight_shows(tmp_path, part, remove, changes, code, sentence):
    found = released(tmp_path, part, remove, **changes)
    assert [(f.code, f.severity, sentence in f.why) for f in found] == [(code, "error", True)], found


def test_heads_left_to_the_class_are_right_for_svd_and_wrong_for_others(folder, tmp_path):
    assert released(tmp_path, "unet", ("num_attention_heads",)) == []
    edit(folder / "unet/config.json", ("num_attention_heads",))
    assert "CKP213" in [f.code for f in check(folder)]


def test_a_vae_config_without_its_channels(folder):
    edit(folder / "vae/config.json", ("block_out_channels", "down_block_types"))
    codes = {f.code for f in check(folder)}
    assert "CKP216" in codes


def test_reading_no_tensors(folder, monkeypatch):
    """Only headers: at most the header's bytes are read from each file."""
    import svdtune.model.headers as headers

    sizes = []
    parse = headers._parse
    monkeypatch.setattr(headers, "_parse", lambda path, raw: sizes.append((path, len(raw))) or parse(path, raw))
    check(folder)
    assert len(sizes) == 3
    assert all(length < path.stat().st_size / 2 for path, length in sizes)


def test_heads_of_unequal_width_at_other_sizes_are_a_warning(folder):
    edit(folder / "unet/config.json", num_attention_heads=[2, 4])
    found = only(folder)
    assert (found.code, found.severity, "Heads would be 32, 16 wide" in found.why) == ("CKP213", "warning", True)
