"""The result opens in diffusers and peft, and is the trained model."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLTemporalDecoder, EulerDiscreteScheduler, StableVideoDiffusionPipeline
from peft import PeftModel
from safetensors.torch import load_file
from small_training import inject_lora, tiny_unet, trained, unet_input
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from svdtune.checkpoint import export
from svdtune.checkpoint.export import Base, export_run
from svdtune.errors import CheckpointError, ModelError

PREPROCESSOR = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 16}, "crop_size": 16}


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory) -> Path:
    """A random SVD in fp16 as the hub lays it out: variant file names, no plain ones."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), layers_per_block=1, down_block_types=("DownEncoderBlock2D",) * 2
    )
    clip = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, projection_dim=24, num_hidden_layers=1, num_attention_heads=2,
        image_size=16, patch_size=8,
    )  # fmt: skip
    vae.register_to_config(_name_or_path="/home/somebody/models/svd")
    parts = {"unet": tiny_unet(), "vae": vae, "image_encoder": CLIPVisionModelWithProjection(clip)}
    for part, network in parts.items():
        network.half().save_pretrained(folder / part, variant="fp16")
    EulerDiscreteScheduler(prediction_type="v_prediction", use_karras_sigmas=True).save_pretrained(folder / "scheduler")
    (folder / "feature_extractor").mkdir()
    (folder / "feature_extractor/preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return folder


@pytest.fixture
def base(base_folder) -> Base:
    return Base("somebody/svd", base_folder, "fp16")


def temporal_unet(folder: Path):
    """The base after some training of its temporal blocks, its frozen weights in bf16 as the trainer holds them."""
    unet = tiny_unet()
    unet.load_state_dict(load_file(folder / "unet/diffusion_pytorch_model.fp16.safetensors"))
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_("temporal" in name)
        parameter.data = parameter.data + 0.01 if parameter.requires_grad else parameter.data.bfloat16()
    return unet


def test_a_full_export_opens_as_a_pipeline_and_is_the_trained_model(tmp_path, base):
    unet = temporal_unet(base.source)
    export_run(tmp_path / "export", base=base, unet=unet, lora=False, half=False)
    assert not any("_name_or_path" in path.read_text() for path in (tmp_path / "export").rglob("*.json"))
    pipeline = StableVideoDiffusionPipeline.from_pretrained(tmp_path / "export")
    exported, before = (
        pipeline.unet.state_dict(),
        load_file(base.source / "unet/diffusion_pytorch_model.fp16.safetensors"),
    )
    assert len(trained(unet)) > 20
    for name, parameter in unet.named_parameters():
        assert torch.equal(exported[name], parameter if parameter.requires_grad else before[name].float()), name
    vae = load_file(base.source / "vae/diffusion_pytorch_model.fp16.safetensors")
    assert all(torch.equal(value, vae[name].float()) for name, value in pipeline.vae.state_dict().items())
    assert pipeline.scheduler.config.use_karras_sigmas
    assert pipeline.feature_extractor.crop_size["height"] == 16
    assert {p.suffix for p in (tmp_path / "export").rglob("*") if p.is_file()} == {".json", ".safetensors"}
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


def test_a_half_export_is_float16_with_plain_names(tmp_path, base):
    unet = temporal_unet(base.source)
    export_run(tmp_path / "export", base=base, unet=unet, lora=False, half=True)
    for part in ("unet", "vae"):
        weights = load_file(tmp_path / f"export/{part}/diffusion_pytorch_model.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
        frozen = load_file(base.source / f"{part}/diffusion_pytorch_model.fp16.safetensors")
        assert all(torch.equal(weights[n], frozen[n]) for n in weights if part == "vae" or n not in trained(unet))
    pipeline = StableVideoDiffusionPipeline.from_pretrained(tmp_path / "export", torch_dtype=torch.float16)
    assert pipeline.unet.dtype == torch.float16


@pytest.mark.parametrize("dora", [False, True])
def test_a_lora_export_opens_in_peft_and_computes_the_same(tmp_path, base, dora):
    unet = tiny_unet().eval()
    with torch.no_grad():
        plain = unet(**unet_input()).sample
        inject_lora(unet, dora=dora)
        expected = unet.eval()(**unet_input()).sample
    export_run(tmp_path / "export", base=base, unet=unet, lora=True, half=False)
    model = PeftModel.from_pretrained(tiny_unet(), tmp_path / "export").eval()
    with torch.no_grad():
        got = model(**unet_input()).sample
    assert (got - expected).abs().max() <= 1e-6
    assert (plain - expected).abs().max() > 1e-3, "the adapter does nothing, so the test would see nothing"
    assert sorted(p.name for p in (tmp_path / "export").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((tmp_path / "export/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["peft_type"], config["r"]) == ("somebody/svd", "LORA", 4)
    assert unet.peft_config["default"].base_model_name_or_path != "somebody/svd", "the export changed the live config"


def test_a_second_export_replaces_the_first(tmp_path, base):
    unet = tiny_unet()
    inject_lora(unet)
    (tmp_path / ".export.partial").mkdir()
    export_run(tmp_path / "export", base=base, unet=unet, lora=True, half=False)
    export_run(tmp_path / "export", base=base, unet=unet, lora=True, half=True)
    weights = load_file(tmp_path / "export/adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


def test_an_export_that_fails_leaves_the_earlier_one(tmp_path, base, monkeypatch):
    unet = tiny_unet()
    inject_lora(unet)
    export_run(tmp_path / "export", base=base, unet=unet, lora=True, half=False)

    def full(*_arguments, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export, "save_tensors", full)
    with pytest.raises(
        CheckpointError, match=r"the disk is full, available are .* checkpoints of the run are untouched"
    ):
        export_run(tmp_path / "export", base=base, unet=unet, lora=True, half=False)
    assert len(list((tmp_path / "export").iterdir())) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


def test_values_beyond_float16_are_refused(tmp_path, base):
    unet = tiny_unet()
    with torch.no_grad():
        unet.conv_in.weight[0, 0, 0, 0] = 7e4
    with pytest.raises(
        CheckpointError, match=r"unet: conv_in.weight has values that float16 cannot hold .*7e\+04.* float32"
    ):
        export_run(tmp_path / "export", base=base, unet=unet, lora=False, half=True)


def test_a_base_without_a_part_is_named(tmp_path, base_folder):
    unet = tiny_unet()
    with pytest.raises(ModelError, match=r"no \*\.safetensors with model\.variant=null; there: fp16 weights"):
        export_run(tmp_path / "export", base=Base("b", base_folder, None), unet=unet, lora=False, half=True)
    copy = tmp_path / "copy"
    shutil.copytree(base_folder, copy)
    shutil.rmtree(copy / "scheduler")
    with pytest.raises(ModelError, match=r"scheduler_config\.json is missing"):
        export_run(tmp_path / "export", base=Base("b", copy, "fp16"), unet=unet, lora=False, half=True)


def test_a_base_of_another_shape_is_named(tmp_path, base):
    unet = torch.nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="missing in the checkpoint: bias, weight"):
        export_run(tmp_path / "export", base=base, unet=unet, lora=False, half=True)
    with pytest.raises(ValueError, match="nothing was trained"):
        export_run(tmp_path / "export", base=base, unet=unet.requires_grad_(False), lora=False, half=True)
