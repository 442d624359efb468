"""LoRA: run, peft's folder and ComfyUI's file into one another, and merged.

What ComfyUI does with such a file (comfy/lora.py and its LoRA adapter, read, not copied): it walks over the keys of the loaded
UNet, `diffusion_model.<module>.weight`, which are the original's names whatever the model. For each it asks the file for
`diffusion_model.<module>.lora_up.weight`, and with it `.lora_down.weight` and `.alpha`. Both matrices are flattened behind their
first axis and multiplied; the product gets the weight's shape, is scaled by `strength * alpha / rank`, where the rank is the
first axis of `lora_down` (without an alpha the scale is `strength`), and is added to the weight. Names that it does not ask for are
skipped with a line in its log. `in_comfyui` below does the same.
"""

from __future__ import annotations

import gzip
import json
import math

import pytest
import torch
from convert_models import (
    MODEL_DTYPES,
    bits,
    change_part,
    differing,
    export,
    folder_tensors,
    make_file,
    make_folder,
    make_run,
    metadata_of,
    notes_of,
    off_by,
    output,
    save,
)
from diffusers import UNetSpatioTemporalConditionModel
from peft import PeftModel
from safetensors.torch import load_file, save_file

from svdtune.checkpoint.lora import Adapted, Lora, comfy_tensors, peft_files, put_lora, read_lora
from svdtune.checkpoint.notes import notes_in_file
from svdtune.convert.cli import convert
from svdtune.errors import CheckpointError, ModelError, UsageError
from svdtune.model.adapt import lora_modules
from svdtune.model.facts import PACKAGE, SHIPPED
from svdtune.model.original import rename, rules
from svdtune.model.source import read_configs, weights_hash
from svdtune.sample.run import open_checkpoint, trained_model

XT = read_configs(SHIPPED["stabilityai/stable-video-diffusion-img2vid-xt"]).unet
UNET = "model.diffusion_model."
ATTENTION = None
EXTRA = [
    "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "ff_in.net.0.proj", "conv1", "conv2", "time_emb_proj", "time_pos_embed.linear_1",
    "time_pos_embed.linear_2", "add_embedding.linear_1", "time_embedding.linear_2", "conv_in", "conv_out", "conv_shortcut",
    "downsamplers.0.conv", "upsamplers.0.conv",
]  # fmt: skip


def in_comfyui(model, lora, strength=1.0):
    """The model's tensors after ComfyUI's LoRA loader, and the names of the file that it did not ask for."""
    left, made = set(lora), {}
    for key, weight in model.items():
        module = key.removeprefix("model.").removesuffix(".weight")
        up = lora.get(f"{module}.lora_up.weight")
        if not key.startswith(UNET) or not key.endswith(".weight") or up is None:
            made[key] = weight
            continue
        down, alpha = lora[f"{module}.lora_down.weight"], lora.get(f"{module}.alpha")
        left -= {f"{module}.{end}" for end in ("lora_up.weight", "lora_down.weight", "alpha")}
        scale = strength * (1.0 if alpha is None else alpha.item() / down.shape[0])
        added = up.float().flatten(1) @ down.float().flatten(1)
        made[key] = weight + scale * added.reshape(weight.shape)
    return made, left


def on_meta(config):
    with torch.device("meta"):
        return UNetSpatioTemporalConditionModel.from_config(dict(config))


def adapter(unet, names, *, rank=2, alpha=3.0, seed=0, dtype=torch.float32):
    """A LoRA on the named layers, rank and alpha of each by its place where they are callables."""
    generator, layers = torch.Generator().manual_seed(seed), {}
    for place, name in enumerate(names):
        weight = unet.get_submodule(name).weight
        r = rank(place) if callable(rank) else rank
        up = torch.randn(weight.shape[0], r, *[1] * (weight.dim() - 2), generator=generator) * 0.2
        down = torch.randn(r, *weight.shape[1:], generator=generator) * 0.2
        layers[name] = Adapted(down.to(dtype), up.to(dtype), float(alpha(place) if callable(alpha) else alpha))
    return layers


def peft_folder(folder, layers, **settings):
    """As peft itself lays an adapter out; settings of peft."""
    folder.mkdir()
    tensors = {}
    for name, layer in layers.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = layer.down.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = layer.up.contiguous()
        if layer.magnitude is not None:
            tensors[f"base_model.model.{name}.lora_magnitude_vector"] = layer.magnitude
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    content = {"peft_type": "LORA", "r": 2, "lora_alpha": 3.0, "target_modules": sorted(layers), **settings}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


def unet_of(folder):
    return UNetSpatioTemporalConditionModel.from_pretrained(folder / "unet").eval()


def scales_of(unet):
    return {
        name: module.scaling["default"]
        for name, module in unet.named_modules()
        if "default" in getattr(module, "scaling", {})
    }


# Names, at full size.


@pytest.mark.parametrize("targets", [ATTENTION, EXTRA, ["attn1.to_q", "attn2.to_v"]], ids=["default", "extra", "two"])
def test_every_name_reaches_a_tensor_of_the_released_file(targets):
    with gzip.open(PACKAGE / "facts/original/svd_xt.json.gz") as file:
        ledger = json.load(file)
    unet = on_meta(XT)
    names = lora_modules(unet, targets)
    layers = {}
    for name in names:
        weight = unet.get_submodule(name).weight
        up = torch.zeros(weight.shape[0], 1, *[1] * (weight.dim() - 2))
        layers[name] = Adapted(torch.zeros(1, *weight.shape[1:]), up, 1.0)
    tensors = comfy_tensors(Lora(PACKAGE, layers), XT, torch.float32)
    assert len(tensors) == 3 * len(names)
    reached = set()
    for key, up in tensors.items():
        if key.endswith(".lora_up.weight"):
            module = key.removesuffix(".lora_up.weight")
            weight, down = ledger[f"model.{module}.weight"], tensors[f"{module}.lora_down.weight"]
            assert math.prod(weight) == up.flatten(1).shape[0] * down.flatten(1).shape[1]
            assert weight[0] == up.shape[0]
            assert weight[1] == down.shape[1]
            reached.add(module)
    assert len(reached) == len(names)
    assert any("time_stack" in module for module in reached)
    if targets is ATTENTION:
        assert len(names) == 192


# ComfyUI's arithmetic is the merged file.


def merged_and_comfy(tmp_path, source, base_file, **options):
    convert(str(source), tmp_path / "lora.safetensors", **options)
    convert(str(source), tmp_path / "merged.safetensors", merge=True, **options)
    return load_file(tmp_path / "lora.safetensors"), load_file(tmp_path / "merged.safetensors"), load_file(base_file)


def test_a_run_in_comfyui_is_the_merged_model(tmp_path, runs, file):
    lora, merged, base = merged_and_comfy(tmp_path, runs["lora"], file)
    made, left = in_comfyui(base, lora)
    assert left == set()
    assert made.keys() == merged.keys()
    changed = {key for key in base if not torch.equal(made[key], base[key])}
    assert len(changed) == len(lora) // 3
    for key in made:
        assert off_by(made[key], merged[key]) < 1e-5, key
    assert {alpha.item() for key, alpha in lora.items() if key.endswith(".alpha")} == {6.0}


def test_convolutions_and_every_other_kind_of_layer_too(tmp_path, folder, file):
    """Linear, Conv2d and Conv3d, spatial and temporal, with a rank and an alpha of their own."""
    unet = unet_of(folder)
    names = lora_modules(unet, [*EXTRA, "attn1.to_out.0"])
    kinds = {type(unet.get_submodule(name)).__name__ for name in names}
    assert {"Linear", "Conv2d", "Conv3d"} <= {kind.removeprefix("LoRACompatible") for kind in kinds}
    layers = adapter(unet, names, rank=lambda place: 1 + place % 3, alpha=lambda place: 0.5 + place % 5)
    source = peft_folder(
        tmp_path / "adapter", layers, alpha_pattern={name: layer.alpha for name, layer in layers.items()},
        rank_pattern={name: layer.rank for name, layer in layers.items()},
    )  # fmt: skip
    lora, merged, base = merged_and_comfy(tmp_path, source, file, base=str(folder))
    made, left = in_comfyui(base, lora)
    assert left == set()
    assert sum(not torch.equal(made[key], base[key]) for key in base) == len(names)
    for key in made:
        assert off_by(made[key], merged[key]) < 1e-5, key


# Merged.


@pytest.mark.parametrize("name", ["lora", "lora-ema", "dora"])
def test_merged_computes_what_the_adapted_model_does(tmp_path, runs, folder, name):
    adapted = trained_model(open_checkpoint(runs[name] / "checkpoints/step-00000002"), torch.float32).unet
    convert(str(runs[name]), tmp_path / "merged", merge=True)
    got, expected = output(unet_of(tmp_path / "merged")), output(adapted)
    assert off_by(got, expected) < 1e-5
    assert off_by(output(unet_of(folder)), expected) > 1e-2, "the adapter does nothing, so the test would see nothing"
    made, base = folder_tensors(tmp_path / "merged"), folder_tensors(folder)
    targets = lora_modules(unet_of(folder), None)
    assert differing(made, base) == {f"unet/{target}.weight" for target in targets}
    assert (tmp_path / "merged/README.md").read_text().startswith("---\n")


def test_averages_are_preferred(tmp_path, runs):
    convert(str(runs["lora-ema"]), tmp_path / "adapter")
    averages = load_file(runs["lora-ema"] / "checkpoints/step-00000002/ema.safetensors")
    made = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert len(made) == len(averages)
    for key, tensor in averages.items():
        assert bits(made[f"base_model.model.{key.replace('.default.', '.')}"]) == bits(tensor)


# peft's folder.


@pytest.mark.parametrize("name", ["lora", "lora-ema", "dora"])
def test_a_run_becomes_the_adapter_that_it_exports(tmp_path, runs, folder, name):
    exported = export(runs[name] / "checkpoints/step-00000002", tmp_path / "made/export")
    (tmp_path / "again").mkdir()
    convert(str(runs[name]), tmp_path / "again/export")
    made = tmp_path / "again/export"
    files = {path.name for path in exported.iterdir()}
    assert {path.name for path in made.iterdir()} == files
    assert (
        differing(load_file(made / "adapter_model.safetensors"), load_file(exported / "adapter_model.safetensors"))
        == set()
    )
    for file in ("README.md", "svdtune.json"):
        assert (made / file).read_text() == (exported / file).read_text()
    ours, theirs = (json.loads((place / "adapter_config.json").read_text()) for place in (made, exported))
    for key in ("r", "lora_alpha", "use_dora", "base_model_name_or_path", "peft_type"):
        assert ours[key] == theirs[key], key
    opened = [output(PeftModel.from_pretrained(unet_of(folder), place)) for place in (made, exported)]
    assert torch.equal(*opened)


@pytest.mark.parametrize(
    ("settings", "alpha", "dtype"),
    [
        ({"lora_alpha": 16}, 16.0, "fp32"),
        ({"lora_alpha": 5.3}, 5.3, "fp16"),
        ({"lora_alpha": 8, "use_rslora": True}, 8 * math.sqrt(2), "bf16"),
        ({"lora_alpha": 8, "alpha_pattern": {"to_q": 5}}, None, "fp32"),
    ],
    ids=["whole", "fraction", "rslora", "pattern"],
)  # fmt: skip
def test_folder_to_comfyui_to_folder_is_equal_to_the_bit(tmp_path, folder, settings, alpha, dtype):
    unet = on_meta(read_configs(folder).unet)
    layers = adapter(unet, lora_modules(unet, None)[:7], dtype=MODEL_DTYPES[dtype])
    first = peft_folder(tmp_path / "first", layers, **settings)
    convert(str(first), tmp_path / "lora.safetensors", base=str(folder))
    convert(str(tmp_path / "lora.safetensors"), tmp_path / "again", base=str(folder))
    convert(str(tmp_path / "again"), tmp_path / "lora2.safetensors", base=str(folder))
    weights = [load_file(place / "adapter_model.safetensors") for place in (first, tmp_path / "again")]
    assert differing(*weights) == set()
    files = [load_file(tmp_path / f"{name}.safetensors") for name in ("lora", "lora2")]
    assert differing(*files) == set()
    config = read_configs(folder).unet
    one, two = (read_lora(place, config).layers for place in (first, tmp_path / "again"))
    for name in layers:
        wanted = alpha if alpha is not None else 5.0 if name.endswith("to_q") else 8.0
        assert one[name].alpha == two[name].alpha == wanted


def test_patterns_of_peft_mean_what_they_mean_to_peft(tmp_path, folder):
    """peft tries each key of alpha_pattern as a regular expression on the end of a layer's name."""
    layers = adapter(on_meta(read_configs(folder).unet), lora_modules(unet_of(folder), None))
    patterns = {r"attn1\.to_[qk]": 5, "temporal_transformer_blocks.0.attn2.to_v": 7, "to_v": 9}
    first = peft_folder(tmp_path / "first", layers, alpha_pattern=patterns)
    theirs = scales_of(PeftModel.from_pretrained(unet_of(folder), first))
    ours = read_lora(first, read_configs(folder).unet).layers
    assert {f"base_model.model.{name}": layer.alpha / layer.rank for name, layer in ours.items()} == theirs
    assert len(set(theirs.values())) == 4


def test_ranks_and_alphas_of_their_own_open_in_plain_peft(tmp_path, folder):
    unet = on_meta(read_configs(folder).unet)
    layers = adapter(
        unet, lora_modules(unet, None), rank=lambda place: 1 + place % 4, alpha=lambda place: 1.5 + place % 3
    )
    tensors = comfy_tensors(Lora(tmp_path, layers), read_configs(folder).unet, torch.float32)
    save_file(tensors, tmp_path / "lora.safetensors")
    convert(str(tmp_path / "lora.safetensors"), tmp_path / "adapter", base=str(folder))
    theirs = PeftModel.from_pretrained(unet_of(folder), tmp_path / "adapter")
    assert scales_of(theirs) == {f"base_model.model.{name}": layer.alpha / layer.rank for name, layer in layers.items()}
    ours = unet_of(folder)
    put_lora(ours, Lora(tmp_path, layers))
    assert off_by(output(theirs), output(ours)) < 1e-6


def test_dora_comes_back_with_its_lengths(tmp_path, runs):
    convert(str(runs["dora"]), tmp_path / "one")
    convert(
        str(tmp_path / "one"),
        tmp_path / "two",
        base=str(open_checkpoint(runs["dora"] / "checkpoints/step-00000002").config.model.pretrained),
    )
    weights = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two")]
    assert differing(*weights) == set()
    assert sum(key.endswith("lora_magnitude_vector") for key in weights[0]) * 3 == len(weights[0])


def test_dora_has_no_comfyui_file(tmp_path, runs):
    with pytest.raises(ModelError) as caught:
        convert(str(runs["dora"]), tmp_path / "lora.safetensors")
    assert str(caught.value) == (
        f"{runs['dora']}/checkpoints/step-00000002: it is a DoRA, which ComfyUI normalises in another way than peft, so it would look "
        "different there. Add --merge to write the whole model with the DoRA in its weights."
    )
    assert list(tmp_path.iterdir()) == []


def test_a_mixture_of_dora_and_lora_is_refused(tmp_path, runs, folder):
    convert(str(runs["dora"]), tmp_path / "one")
    path = tmp_path / "one/adapter_model.safetensors"
    tensors = load_file(path)
    gone = next(name for name in tensors if name.endswith("lora_magnitude_vector"))
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, path, {"format": "pt"})
    with pytest.raises(ModelError, match=r"1 of its \d+ layers are plain LoRA \(.*the others DoRA"):
        convert(str(tmp_path / "one"), tmp_path / "two.safetensors", base=str(folder), merge=True)


def test_a_lora_of_the_fp32_release_merges_into_the_fp16_one(tmp_path, runs, folders):
    """Its notes know the base in half the bits too; another model is still refused."""
    convert(str(runs["lora"]), tmp_path / "lora.safetensors")
    convert(str(tmp_path / "lora.safetensors"), tmp_path / "merged", base=str(folders["fp16"]), merge=True)
    notes = notes_in_file(tmp_path / "lora.safetensors")["conventions"]["base"]
    assert notes["unet_fp16_sha256"] == weights_hash(folders["fp16"], "unet", None)
    assert notes["unet_sha256"] == weights_hash(folders["fp32"], "unet", None)


def test_peft_settings_name_the_base_where_notes_do_not(tmp_path, runs, folder):
    convert(str(runs["lora"]), tmp_path / "adapter")
    (tmp_path / "adapter/svdtune.json").unlink()
    settings = tmp_path / "adapter/adapter_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "base_model_name_or_path": str(folder)}))
    convert(str(tmp_path / "adapter"), tmp_path / "merged", merge=True)
    assert (tmp_path / "merged/unet").is_dir()


# Files of other writers.


@pytest.mark.parametrize(
    ("spelling", "ends"),
    [
        ("diffusion_model.{original}", ("lora_up.weight", "lora_down.weight")),
        ("lora_unet_{original_}", ("lora_up.weight", "lora_down.weight")),
        ("lora_unet_{diffusers_}", ("lora_up.weight", "lora_down.weight")),
        ("unet.{diffusers}", ("lora.up.weight", "lora.down.weight")),
        ("unet.{diffusers}", ("lora_B.weight", "lora_A.weight")),
        ("diffusion_model.{original}", ("lora_B.weight", "lora_A.weight")),
    ],
)
def test_spellings_of_other_writers(tmp_path, folder, spelling, ends):
    config = read_configs(folder).unet
    unet = on_meta(config)
    names = lora_modules(unet, ["attn1.to_q", "conv1", "proj_in", "time_pos_embed.linear_1"])
    layers = adapter(unet, names, rank=lambda place: 1 + place % 3, alpha=lambda place: 1 + place % 4)
    tensors = {}
    for name, layer in layers.items():
        original = rename(rules("unet", config), name, "original")
        key = spelling.format(
            original=original, original_=original.replace(".", "_"), diffusers=name, diffusers_=name.replace(".", "_")
        )
        tensors |= {
            f"{key}.{ends[0]}": layer.up,
            f"{key}.{ends[1]}": layer.down,
            f"{key}.alpha": torch.tensor(layer.alpha),
        }
    save_file(tensors, tmp_path / "lora.safetensors")
    convert(str(tmp_path / "lora.safetensors"), tmp_path / "adapter", base=str(folder))
    got = read_lora(tmp_path / "adapter", config).layers
    assert got.keys() == layers.keys()
    for name, layer in layers.items():
        assert (bits(got[name].up), bits(got[name].down), got[name].alpha) == (
            bits(layer.up),
            bits(layer.down),
            layer.alpha,
        )


def test_a_layer_without_alpha_acts_as_trained(tmp_path, folder):
    unet = on_meta(read_configs(folder).unet)
    tensors = comfy_tensors(
        Lora(tmp_path, adapter(unet, lora_modules(unet, None)[:2])), read_configs(folder).unet, torch.float32
    )
    save_file(
        {key: tensor for key, tensor in tensors.items() if not key.endswith("alpha")}, tmp_path / "lora.safetensors"
    )
    layers = read_lora(tmp_path / "lora.safetensors", read_configs(folder).unet).layers
    assert [layer.alpha for layer in layers.values()] == [2.0, 2.0]


def test_matrices_that_were_written_as_convolutions(tmp_path, folder, file):
    """Some write the two matrices of a linear layer as 1x1 convolutions."""
    unet = on_meta(read_configs(folder).unet)
    tensors = comfy_tensors(
        Lora(tmp_path, adapter(unet, lora_modules(unet, ["proj_in"]))), read_configs(folder).unet, torch.float32
    )
    save_file(
        {key: t[:, :, None, None].contiguous() if t.dim() == 2 else t for key, t in tensors.items()},
        tmp_path / "lora.safetensors",
    )
    convert(str(tmp_path / "lora.safetensors"), tmp_path / "merged.safetensors", merge=True, base=str(folder))
    made, _ = in_comfyui(load_file(file), tensors)
    merged = load_file(tmp_path / "merged.safetensors")
    assert all(off_by(merged[key], made[key]) < 1e-5 for key in made)


def test_dtype_of_a_lora(tmp_path, runs):
    told = convert(str(runs["lora"]), tmp_path / "half.safetensors", dtype="fp16")
    layers = len(load_file(tmp_path / "half.safetensors")) // 3
    assert told == [f"{tmp_path / 'half.safetensors'}: LoRA of {layers} layers, ComfyUI's names, read back equal"]
    kinds = {
        key.rpartition("lora_")[2] or "alpha": t.dtype for key, t in load_file(tmp_path / "half.safetensors").items()
    }
    assert {t for key, t in kinds.items() if "weight" in key} == {torch.float16}
    told = convert(str(runs["lora"]), tmp_path / "bf16", dtype="bf16")
    assert told == [f"{tmp_path / 'bf16'}: peft adapter of {layers} layers, read back equal"]
    assert {t.dtype for t in load_file(tmp_path / "bf16/adapter_model.safetensors").values()} == {torch.bfloat16}


# Notes.


def test_conventions_and_base_are_in_the_header(tmp_path, runs, folder):
    convert(str(runs["lora"]), tmp_path / "lora.safetensors")
    notes = notes_of(tmp_path / "lora.safetensors")
    manifest = json.loads((runs["lora"] / "checkpoints/step-00000002/MANIFEST.json").read_text())
    assert notes["conventions"]["base"]["unet_sha256"] == manifest["conventions"]["base"]["unet_sha256"]
    assert notes["conventions"]["base"]["pretrained"] == folder.name
    assert (notes["conventions"]["fps"], notes["step"]) == (7.5, 2)
    assert metadata_of(tmp_path / "lora.safetensors")["format"] == "pt"
    convert(str(tmp_path / "lora.safetensors"), tmp_path / "adapter", base=str(folder))
    assert json.loads((tmp_path / "adapter/svdtune.json").read_text()) == notes


# What is refused.


def refused(kind, tmp_path, source, name="new.safetensors", **options):
    with pytest.raises(kind) as caught:
        convert(str(source), tmp_path / name, **options)
    assert not (tmp_path / name).exists()
    assert not list(tmp_path.glob(".*"))
    return str(caught.value)


def test_the_lora_of_another_base_is_not_merged(tmp_path, runs, folder):
    convert(str(runs["lora"]), tmp_path / "lora.safetensors")
    other = make_folder(tmp_path / "other", seed=1)
    text = refused(ModelError, tmp_path, tmp_path / "lora.safetensors", merge=True, base=str(other))
    assert text.startswith(f"{tmp_path / 'lora.safetensors'}: this LoRA was trained on {folder.name} (UNet ")
    assert text.endswith("A LoRA acts only on its own base: give that one with --base.")


def test_its_own_base_in_another_dtype_is_its_base(tmp_path, folders, folder):
    """The fp32 release rounds to the fp16 release, on which the LoRA was trained."""
    run = make_run(tmp_path / "runs/half", folders["fp16"], "adapt.method=lora")
    save(run, 1)
    convert(str(run), tmp_path / "lora.safetensors")
    convert(str(tmp_path / "lora.safetensors"), tmp_path / "merged", merge=True, base=str(folder))
    assert {tensor.dtype for tensor in folder_tensors(tmp_path / "merged").values()} == {torch.float32}
    assert "this LoRA was trained on" in refused(
        ModelError,
        tmp_path,
        tmp_path / "lora.safetensors",
        merge=True,
        base=str(make_folder(tmp_path / "other", seed=1)),
    )


def test_merging_needs_a_base(tmp_path, runs):
    convert(str(runs["lora"]), tmp_path / "lora.safetensors")
    text = refused(ModelError, tmp_path, tmp_path / "lora.safetensors", merge=True)
    assert text.endswith("No base was given, so it was taken to be for SVD as released: give another base with --base.")
    released = on_meta(XT)
    layers = {}
    for name in lora_modules(released, ["attn1.to_q"]):
        out, into = released.get_submodule(name).weight.shape
        layers[name] = Adapted(torch.zeros(1, into), torch.zeros(out, 1), 1.0)
    save_file(comfy_tensors(Lora(tmp_path, layers), XT, torch.float32), tmp_path / "xt.safetensors")
    assert refused(UsageError, tmp_path, tmp_path / "xt.safetensors", merge=True) == (
        f"--base: got none, expected the model that {tmp_path / 'xt.safetensors'} was trained on: to merge, its weights are needed. Give a "
        "diffusers folder, a single file or a hub id."
    )
    convert(str(tmp_path / "xt.safetensors"), tmp_path / "adapter")
    assert read_lora(tmp_path / "adapter", XT).layers.keys() == layers.keys()


def test_a_lora_of_another_model_is_refused(tmp_path, folder):
    """Layer names of SDXL, and SVD's own names at another width."""
    sdxl = {
        f"lora_unet_input_blocks_4_1_transformer_blocks_{n}_attn1_to_q.lora_{end}.weight": torch.ones(2, 2)
        for n in range(10) for end in ("up", "down")
    }  # fmt: skip
    save_file(sdxl, tmp_path / "sdxl.safetensors")
    text = refused(ModelError, tmp_path, tmp_path / "sdxl.safetensors", base=str(folder))
    assert text.startswith(
        f"{tmp_path / 'sdxl.safetensors'}: 20 of 20 weights belong to no layer of this UNet (lora_unet_input_blocks_4_1_"
    )
    assert text.endswith("The LoRA is for another model, or of a kind that is not plain LoRA.")
    small = on_meta({**read_configs(folder).unet, "block_out_channels": [96, 128], "num_attention_heads": [3, 2]})
    names = lora_modules(small, ["attn1.to_q"])
    lora = Lora(tmp_path, adapter(small, names))
    save_file(comfy_tensors(lora, read_configs(folder).unet, torch.float32), tmp_path / "wide.safetensors")
    for options in ({"merge": True}, {}, {"name": "adapter"}):
        text = refused(ModelError, tmp_path, tmp_path / "wide.safetensors", base=str(folder), **options)
        assert (
            "takes 96 and gives 96 numbers, the UNet's layer takes 64 and gives 64. The LoRA is for another model"
            in text
        )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: {k: v for k, v in t.items() if "lora_up" not in k or "to_k" not in k}, "have only one of up and down"),
        (lambda t: {k: v.T.contiguous() if "lora_up" in k else v for k, v in t.items()}, r"expected \(rank, in, \.\.\.\) and \("),
        (lambda t: {**t, "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(1.0)}, "1 of .* belong to no layer"),
        (lambda t: {k: v.to(torch.float8_e4m3fn) if v.dim() > 1 else v for k, v in t.items()}, "F8_E4M3, expected F32, F16 or BF16"),
        (lambda t: {k: v.to(torch.int8) if v.dim() > 1 else v for k, v in t.items()}, "I8, expected F32, F16 or BF16"),
    ],
    ids=["half a pair", "transposed", "text encoder", "float8", "int8"],
)  # fmt: skip
def test_a_broken_lora_is_refused(tmp_path, folder, change, told):
    unet = on_meta(read_configs(folder).unet)
    tensors = comfy_tensors(
        Lora(tmp_path, adapter(unet, lora_modules(unet, None))), read_configs(folder).unet, torch.float32
    )
    save_file(change(tensors), tmp_path / "lora.safetensors")
    for name in ("new.safetensors", "adapter"):
        with pytest.raises(ModelError, match=told):
            convert(str(tmp_path / "lora.safetensors"), tmp_path / name, base=str(folder))
    assert {path.name for path in tmp_path.iterdir()} == {"lora.safetensors"}


def test_values_that_fp16_cannot_hold_are_named(tmp_path, folder):
    unet = on_meta(read_configs(folder).unet)
    layers = adapter(unet, lora_modules(unet, None)[:2])
    next(iter(layers.values())).up[0, 0] = 1e5
    source = peft_folder(tmp_path / "adapter", layers)
    for name in ("new.safetensors", "new"):
        text = refused(ModelError, tmp_path, source, name, dtype="fp16", base=str(folder))
        assert "has values that float16 cannot hold (largest magnitude 1e+05). Use --dtype bf16 or fp32." in text


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("adapter_config.json", "{", "adapter_config.json: expected the JSON object of peft's settings, got something else."),
        ("adapter_config.json", "[1]", "adapter_config.json: expected the JSON object of peft's settings, got something else."),
        ("adapter_model.safetensors", None, "adapter_model.safetensors: no such file."),
        ("adapter_model.safetensors", "<html>", "adapter_model.safetensors: it is no safetensors file but a web page"),
    ],
)  # fmt: skip
def test_a_damaged_adapter_folder_is_told_as_what_it_is(tmp_path, folder, name, content, told):
    unet = on_meta(read_configs(folder).unet)
    source = peft_folder(tmp_path / "adapter", adapter(unet, lora_modules(unet, None)[:1]))
    (source / name).unlink() if content is None else (source / name).write_text(content)
    text = refused(ModelError, tmp_path, source, base=str(folder))
    assert text.startswith(f"{source}/{told}")
    assert "checkpoint" not in text


def test_a_folder_that_only_has_the_bases_name_is_not_its_base(tmp_path, runs, folder, monkeypatch):
    """Notes tell a base on a disk by its name alone; a folder of that name here may be anything."""
    convert(str(runs["lora"]), tmp_path / "lora.safetensors")
    monkeypatch.chdir(tmp_path)
    (tmp_path / folder.name).mkdir()
    text = refused(ModelError, tmp_path, tmp_path / "lora.safetensors", merge=True)
    assert text.endswith("No base was given, so it was taken to be for SVD as released: give another base with --base.")


def test_a_lora_that_does_not_read_back_is_not_kept(tmp_path, runs, monkeypatch):
    from svdtune.convert import cli

    def no_alpha(lora, unet, dtype):
        made = comfy_tensors(lora, unet, dtype)
        return {key: torch.tensor(1.0) if key.endswith("alpha") else tensor for key, tensor in made.items()}

    def other_lengths(lora, base, dtype):
        tensors, settings = peft_files(lora, base, dtype)
        return {key: t + 1 if "magnitude" in key else t for key, t in tensors.items()}, settings

    monkeypatch.setattr(cli, "comfy_tensors", no_alpha)
    monkeypatch.setattr(cli, "peft_files", other_lengths)
    assert "layers do not read back as they were written (" in refused(CheckpointError, tmp_path, runs["lora"])
    assert "layers do not read back as they were written (" in refused(
        CheckpointError, tmp_path, runs["dora"], "adapter"
    )


def test_nothing_of_the_base_is_changed(tmp_path, runs, own, folder):
    before = folder_tensors(folder)
    convert(str(runs["lora"]), tmp_path / "merged", merge=True)
    assert differing(folder_tensors(folder), before) == set()
    changed = own(folder)
    change_part(changed, "unet", {"conv_in.bias": before["unet/conv_in.bias"] + 1})
    assert make_file(tmp_path / "x.safetensors", changed).exists()
