"""A whole model: single file to diffusers folder and back, and runs to both, equal to the bit."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from convert_models import (
    MODEL_DTYPES,
    PARTS,
    bits,
    change_part,
    differing,
    everything_said,
    export,
    folder_tensors,
    jsons_of,
    make_file,
    make_folder,
    make_run,
    metadata_of,
    notes_of,
    originals,
    save,
    tree,
)
from diffusers import StableVideoDiffusionPipeline
from safetensors.torch import load_file, save_file

from svdtune.convert.cli import convert
from svdtune.errors import UsageError
from svdtune.model.facts import FILES
from svdtune.model.original import PREFIXES
from svdtune.model.weights import cast, in_memory


def same_json(got, expected, *, dtype_aside=False):
    for part in FILES:
        one, two = dict(got[part]), dict(expected[part])
        if part == "image_encoder" and dtype_aside:
            for side in (one, two):  # the folder's says float32, so that diffusers opens all parts alike
                for key in ("dtype", "torch_dtype"):
                    side.pop(key, None)
        assert one == two, part


# Single file to folder.


@pytest.mark.parametrize("dtype", MODEL_DTYPES)
def test_folder_to_file_to_folder_to_file_is_equal_to_the_bit(tmp_path, folders, dtype):
    convert(str(folders[dtype]), tmp_path / "svd.safetensors")
    assert differing(load_file(tmp_path / "svd.safetensors"), originals(folders[dtype])) == set()
    assert metadata_of(tmp_path / "svd.safetensors")["format"] == "pt"
    expected = folder_tensors(folders[dtype])
    told = convert(str(tmp_path / "svd.safetensors"), tmp_path / "made")
    assert told == [f"{tmp_path / 'made'}: diffusers folder, {len(expected)} tensors, read back equal, forward equal"]
    assert differing(folder_tensors(tmp_path / "made"), expected) == set()
    same_json(jsons_of(tmp_path / "made"), jsons_of(folders[dtype]), dtype_aside=True)
    convert(str(tmp_path / "made"), tmp_path / "again.safetensors")
    assert differing(load_file(tmp_path / "again.safetensors"), load_file(tmp_path / "svd.safetensors")) == set()
    same_json(notes_of(tmp_path / "again.safetensors")["configs"], jsons_of(folders[dtype]), dtype_aside=True)


def test_a_folder_made_from_a_file_opens_in_plain_diffusers(tmp_path, folders):
    file = make_file(tmp_path / "svd_xt.safetensors", folders["fp16"])
    convert(str(file), tmp_path / "made")
    pipeline = StableVideoDiffusionPipeline.from_pretrained(tmp_path / "made")
    weights = folder_tensors(folders["fp16"])
    for part in PARTS:
        got = getattr(pipeline, part).state_dict()
        assert differing({n: t.float() for n, t in got.items()}, {
            name.removeprefix(f"{part}/"): tensor.float() for name, tensor in weights.items() if name.startswith(f"{part}/")
        }) == set()  # fmt: skip
    assert pipeline.scheduler.config.sigma_max == 600.0
    assert pipeline.feature_extractor.crop_size["height"] == 48
    assert pipeline.vae.config.scaling_factor == 0.2
    half = StableVideoDiffusionPipeline.from_pretrained(tmp_path / "made", torch_dtype=torch.float16)
    assert half.unet.dtype == half.image_encoder.dtype == torch.float16


def test_a_file_without_notes_gets_the_configs_that_its_shapes_say(tmp_path, plain_file):
    convert(str(plain_file), tmp_path / "made")
    made = jsons_of(tmp_path / "made")
    assert (made["unet"]["num_frames"], made["unet"]["num_attention_heads"]) == (25, [1, 2])
    StableVideoDiffusionPipeline.from_pretrained(tmp_path / "made")
    convert(str(tmp_path / "made"), tmp_path / "again.safetensors")
    assert differing(load_file(tmp_path / "again.safetensors"), load_file(plain_file)) == set()


def test_what_a_release_holds_beside_the_model_is_left_out(tmp_path, folder):
    beside = {
        "model_ema.decay": torch.tensor(0.5),
        "conditioner.embedders.3.encoder.encoder.conv_in.bias": torch.ones(3),
    }
    told = convert(str(make_file(tmp_path / "a.safetensors", folder, changed=beside)), tmp_path / "b.safetensors")
    assert differing(load_file(tmp_path / "b.safetensors"), originals(folder)) == set()
    assert told[0].endswith(
        "; left out: 2 tensors beside the model (conditioner.embedders.3.encoder.encoder.conv_in.bias, ...), which --into keeps"
    )


@pytest.mark.parametrize("dtype", MODEL_DTYPES)
def test_a_vae_whose_quant_conv_does_something_is_folded(tmp_path, dtype):
    """The original has no `quant_conv`; the verification compares both encoders' outputs."""
    base = make_folder(tmp_path / "base", MODEL_DTYPES[dtype], quant=True)
    convert(str(base), tmp_path / "svd.safetensors")
    made, before = load_file(tmp_path / "svd.safetensors"), originals(base)
    assert differing(made, before) == {f"{PREFIXES['vae']}encoder.conv_out.{end}" for end in ("weight", "bias")}


def test_a_quant_conv_that_does_nothing_costs_no_bit(tmp_path, folder, own):
    """Not even the sign of a zero, which folding the identity would lose."""
    source = own(folder)
    tensors = folder_tensors(source)
    zeros = {
        f"encoder.conv_out.{end}": -0.0 * tensors[f"vae/encoder.conv_out.{end}"].abs() for end in ("weight", "bias")
    }
    change_part(source, "vae", zeros)
    convert(str(source), tmp_path / "svd.safetensors")
    convert(str(tmp_path / "svd.safetensors"), tmp_path / "again")
    assert differing(folder_tensors(tmp_path / "again"), folder_tensors(source)) == set()


def test_integers_are_not_cast(folder):
    ids = torch.arange(10)[None]
    made = cast(in_memory({"ids": ids, "mask": ids > 3, "weight": ids.double()}), torch.float16)
    assert {name: tensor.dtype for name, tensor in made.items()} == {
        name: form.dtype for name, form in made.forms.items()
    } == {"ids": torch.int64, "mask": torch.bool, "weight": torch.float16}  # fmt: skip


def test_shards_and_a_variant_are_read(tmp_path, folder, folders, own):
    cut = own(folder)
    whole = cut / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(whole)
    names = sorted(tensors)
    whole.unlink()
    halves = {f"diffusion_pytorch_model-0000{n}-of-00002.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    for name, keys in halves.items():
        save_file({key: tensors[key] for key in keys}, cut / "unet" / name)
    index = {"weight_map": {key: name for name, keys in halves.items() for key in keys}}
    (cut / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    convert(str(cut), tmp_path / "a.safetensors")
    assert differing(load_file(tmp_path / "a.safetensors"), originals(folder)) == set()

    variant = make_folder(tmp_path / "variant", torch.float16, variant="fp16")
    convert(str(variant), tmp_path / "b.safetensors")
    assert differing(load_file(tmp_path / "b.safetensors"), originals(folders["fp16"])) == set()


def test_ids_that_old_transformers_saved_are_no_obstacle(tmp_path, folder, own):
    """`position_ids` is an integer that carries nothing; the original has no name for it."""
    old = own(folder)
    change_part(old, "image_encoder", {"vision_model.embeddings.position_ids": torch.arange(10)[None]})
    convert(str(old), tmp_path / "a.safetensors", dtype="fp16")
    assert (
        differing(load_file(tmp_path / "a.safetensors"), {n: t.half() for n, t in originals(folder).items()}) == set()
    )
    convert(str(old), tmp_path / "made", dtype="fp16")
    ids = load_file(tmp_path / "made/image_encoder/model.safetensors").get("vision_model.embeddings.position_ids")
    assert ids is None or bits(ids) == bits(torch.arange(10)[None])


@pytest.mark.parametrize("dtype", MODEL_DTYPES)
def test_dtype_is_that_which_was_asked_for(tmp_path, folder, dtype):
    told = convert(str(folder), tmp_path / "a.safetensors", dtype=dtype)
    expected = {name: tensor.to(MODEL_DTYPES[dtype]) for name, tensor in originals(folder).items()}
    assert differing(load_file(tmp_path / "a.safetensors"), expected) == set()
    assert f"{len(expected)} tensors, " in told[0]
    assert {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[dtype] in told[0]
    convert(str(tmp_path / "a.safetensors"), tmp_path / "b", dtype="fp32")
    assert {tensor.dtype for tensor in folder_tensors(tmp_path / "b").values()} == {torch.float32}


def test_an_image_decoder_release_keeps_its_frame_wise_vae(tmp_path, folder, own):
    from diffusers import AutoencoderKL

    made = own(folder)
    shutil.rmtree(made / "vae")
    torch.manual_seed(1)
    AutoencoderKL(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=0.2,
    ).save_pretrained(made / "vae")  # fmt: skip
    convert(str(made), tmp_path / "a.safetensors")
    convert(str(tmp_path / "a.safetensors"), tmp_path / "again")
    assert differing(folder_tensors(tmp_path / "again"), folder_tensors(made)) == set()
    assert json.loads((tmp_path / "again/model_index.json").read_text())["vae"] == ["diffusers", "AutoencoderKL"]


# Runs.


@pytest.mark.parametrize("name", ["full", "temporal", "ema"])
def test_a_run_becomes_what_it_exports(tmp_path, runs, name):
    exported = export(runs[name] / "checkpoints/step-00000002", tmp_path / "export")
    convert(str(runs[name]), tmp_path / "made" if (tmp_path / "made").mkdir() else tmp_path / "made/export")
    made = tmp_path / "made/export"
    assert differing(folder_tensors(made), folder_tensors(exported)) == set()
    assert tree(made) == tree(exported)
    for file in sorted(tree(exported)):
        if (exported / file).suffix in (".json", ".md"):
            assert (made / file).read_text() == (exported / file).read_text(), file
    convert(str(runs[name]), tmp_path / "run.safetensors")
    assert differing(load_file(tmp_path / "run.safetensors"), originals(exported)) == set()


def test_averages_are_preferred(tmp_path, runs):
    checkpoint = runs["ema"] / "checkpoints/step-00000002"
    convert(str(runs["ema"]), tmp_path / "made")
    made, averages = folder_tensors(tmp_path / "made"), load_file(checkpoint / "ema.safetensors")
    assert differing({name: made[f"unet/{name}"] for name in averages}, averages) == set()
    raw = load_file(checkpoint / "unet.safetensors")
    assert not torch.equal(raw["conv_in.weight"], averages["conv_in.weight"])


def test_a_checkpoint_may_be_named_or_given_itself(tmp_path, runs):
    trained = load_file(runs["full"] / "checkpoints/step-00000001/unet.safetensors")
    convert(str(runs["full"]), tmp_path / "a", checkpoint="1")
    convert(str(runs["full"]), tmp_path / "b", checkpoint="step-00000001")
    convert(str(runs["full"] / "checkpoints/step-00000001"), tmp_path / "c")
    for name in "abc":
        made = folder_tensors(tmp_path / name)
        assert differing({key: made[f"unet/{key}"] for key in trained}, trained) == set()
        assert json.loads((tmp_path / name / "svdtune.json").read_text())["step"] == 1


def test_a_run_on_fp16_files_is_written_in_fp16_unless_told_otherwise(tmp_path, folder):
    base = make_folder(tmp_path / "base", torch.float16, variant="fp16")
    run = make_run(tmp_path / "runs/half", base, "adapt.method=temporal", "model.variant=fp16")
    exported = export(save(run, 1), tmp_path / "export")
    convert(str(run), tmp_path / "half")
    assert differing(folder_tensors(tmp_path / "half"), folder_tensors(exported)) == set()
    convert(str(run), tmp_path / "whole.safetensors", dtype="fp32")
    trained = load_file(run / "checkpoints/step-00000001/unet.safetensors")
    made = load_file(tmp_path / "whole.safetensors")
    mixing = f"{PREFIXES['unet']}input_blocks.1.0.time_mixer.mix_factor"
    assert bits(made[mixing]) == bits(trained["down_blocks.0.resnets.0.time_mixer.mix_factor"])
    assert {tensor.dtype for tensor in made.values()} == {torch.float32}


def test_untrained_weights_of_a_run_keep_the_dtype_that_each_has(tmp_path, folders, own):
    """A base of several dtypes: nothing that was not trained is rounded."""
    mixed = own(folders["fp16"])
    shutil.copy(folders["fp32"] / "unet/diffusion_pytorch_model.safetensors", mixed / "unet")
    base = folder_tensors(mixed)
    run = make_run(tmp_path / "runs/mixed", mixed, "adapt.method=temporal")
    trained = load_file(save(run, 1) / "unet.safetensors")
    convert(str(run), tmp_path / "made")
    made = folder_tensors(tmp_path / "made")
    assert differing(made, base) == {f"unet/{name}" for name in trained}
    assert differing({name: made[f"unet/{name}"] for name in trained}, trained) == set()


def test_a_run_on_a_single_file(tmp_path, file, folder):
    run = make_run(tmp_path / "runs/on-file", file, "adapt.method=temporal")
    trained = load_file(save(run, 1) / "unet.safetensors")
    convert(str(run), tmp_path / "made")
    made = folder_tensors(tmp_path / "made")
    assert differing(made, folder_tensors(folder)) == {f"unet/{name}" for name in trained}


@pytest.fixture(scope="module")
def bridged(tmp_path_factory):
    """Runs on a model whose CLIP tower has another width, for which a bridge is trained."""
    shelf = tmp_path_factory.mktemp("bridged")
    base = make_folder(shelf / "base", image_encoder={"projection_dim": 40})
    made = {}
    for method in ("temporal", "lora"):
        made[method] = make_run(shelf / "runs" / method, base, f"adapt.method={method}", "conditioning.bridge=linear")
        save(made[method], 1)
    return made


def test_a_bridge_is_folded_into_the_tower(tmp_path, bridged):
    run = bridged["temporal"]
    exported = export(run / "checkpoints/step-00000001", tmp_path / "export")
    convert(str(run), tmp_path / "made")
    assert differing(folder_tensors(tmp_path / "made"), folder_tensors(exported)) == set()
    assert json.loads((tmp_path / "made/image_encoder/config.json").read_text())["projection_dim"] == 24
    convert(str(run), tmp_path / "a.safetensors")
    assert differing(load_file(tmp_path / "a.safetensors"), originals(exported)) == set()
    StableVideoDiffusionPipeline.from_pretrained(tmp_path / "made")


def test_a_lora_with_a_bridge_is_merged_whole(tmp_path, bridged):
    """No LoRA file can hold a bridge, but a whole model does."""
    convert(str(bridged["lora"]), tmp_path / "made", merge=True)
    exported = export(bridged["lora"] / "checkpoints/step-00000001", tmp_path / "export")
    tower = load_file(tmp_path / "made/image_encoder/model.safetensors")
    assert differing(tower, load_file(exported / "image_encoder/model.safetensors")) == set()
    StableVideoDiffusionPipeline.from_pretrained(tmp_path / "made")


# Notes.


def test_conventions_of_a_training_come_along(tmp_path, runs):
    convert(str(runs["full"]), tmp_path / "a.safetensors")
    convert(str(tmp_path / "a.safetensors"), tmp_path / "b")
    convert(str(tmp_path / "b"), tmp_path / "c.safetensors")
    kept = [notes_of(tmp_path / "a.safetensors"), json.loads((tmp_path / "b/svdtune.json").read_text()),
            notes_of(tmp_path / "c.safetensors")]  # fmt: skip
    manifest = json.loads((runs["full"] / "checkpoints/step-00000002/MANIFEST.json").read_text())
    for notes in kept:
        told = dict(notes["conventions"])
        assert told.pop("base")["unet_sha256"] == manifest["conventions"]["base"]["unet_sha256"]
        assert told == {key: value for key, value in manifest["conventions"].items() if key != "base"}
        assert (notes["step"], notes["weights"]) == (2, manifest["files"]["unet.safetensors"]["sha256"])
    assert "configs" not in kept[1]
    assert not (tmp_path / "b/README.md").exists()


def test_a_folder_made_from_a_run_has_a_card(tmp_path, runs):
    convert(str(runs["full"]), tmp_path / "my model")
    card = (tmp_path / "my model/README.md").read_text()
    assert card.startswith("---\n")
    assert 'StableVideoDiffusionPipeline.from_pretrained("my model"' in card


def test_nothing_that_is_published_says_where_the_base_lies(tmp_path, folder, file, own):
    base = own(folder)
    for part in PARTS:  # as save_pretrained of a model that was opened from a path once wrote
        path = base / FILES[part]
        path.write_text(json.dumps({**json.loads(path.read_text()), "_name_or_path": str(base / part)}))
    for method in ("full", "lora"):
        run = make_run(tmp_path / "runs" / method, base, f"adapt.method={method}")
        save(run, 1)
    full, lora = tmp_path / "runs/full", tmp_path / "runs/lora"
    made = {
        "full": (full, {}), "full.safetensors": (full, {}), "lora": (lora, {}), "lora.safetensors": (lora, {}),
        "merged": (lora, {"merge": True}), "into.safetensors": (lora, {"into": file}),
    }  # fmt: skip
    for name, (source, options) in made.items():
        convert(str(source), tmp_path / name, **options)
        assert str(tmp_path) not in everything_said(tmp_path / name), name
        assert str(base) not in everything_said(tmp_path / name), name


def test_a_checkpoint_by_a_relative_path_or_a_link_is_that_of_its_run(tmp_path, runs, monkeypatch):
    checkpoint = runs["full"] / "checkpoints/step-00000002"
    (tmp_path / "link").symlink_to(checkpoint)
    convert(str(tmp_path / "link"), tmp_path / "one")
    monkeypatch.chdir(checkpoint.parent)
    convert(checkpoint.name, tmp_path / "two")
    assert differing(folder_tensors(tmp_path / "one"), folder_tensors(tmp_path / "two")) == set()
    assert (tmp_path / "two/README.md").is_file()


def test_a_run_of_which_only_the_export_is_left(tmp_path, runs):
    run = tmp_path / "run"
    shutil.copytree(runs["full"], run)
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    (run / "export").mkdir(exist_ok=True)
    with pytest.raises(UsageError, match=rf"run {run} has no checkpoint any more, but its result: give {run}/export\."):
        convert(str(run), tmp_path / "made")
