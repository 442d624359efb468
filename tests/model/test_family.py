"""Which model a table of names and shapes is: by structure and arithmetic, also at sizes nobody released; unknown is not guessed."""

import gzip
import json
from pathlib import Path

import pytest

from svdtune.model.facts import PACKAGE, TINY
from svdtune.model.family import recognise
from svdtune.model.headers import read_header

ASSETS = Path(__file__).parents[1] / "assets"


@pytest.fixture(scope="module")
def released():
    """All names and shapes of the authors' single SVD-XT file."""
    with gzip.open(PACKAGE / "facts" / "original" / "svd_xt.json.gz", "rt") as file:
        return {name: tuple(shape) for name, shape in json.load(file).items()}


def image_unet(width=320, cross=768, channels=4, linear=False, ids=None, out=4):
    """The names by which a UNet2DConditionModel is known."""
    proj = (width, width) if linear else (width, width, 1, 1)
    shapes = {
        "conv_in.weight": (width, channels, 3, 3),
        "time_embedding.linear_1.weight": (4 * width, width),
        "down_blocks.0.resnets.0.conv1.weight": (width, width, 3, 3),
        "down_blocks.1.attentions.0.proj_in.weight": proj,
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight": (width, cross),
        "conv_out.weight": (out, width, 3, 3),
    }
    return shapes | ({"add_embedding.linear_1.weight": (4 * width, ids)} if ids else {})


def original(shapes):
    """The same in the authors' naming."""
    names = {
        "conv_in.": "input_blocks.0.0.", "time_embedding.linear_1": "time_embed.0", "add_embedding.linear_1": "label_emb.0.0",
        "conv_out": "out.2", "down_blocks.0.resnets.0.conv1": "input_blocks.1.0.in_layers.2",
        "down_blocks.1.attentions.0": "input_blocks.4.1",
    }  # fmt: skip
    renamed = {}
    for name, shape in shapes.items():
        for old, new in names.items():
            name = name.replace(old, new)
        renamed[f"model.diffusion_model.{name}"] = shape
    return renamed


def video_unet(ids=768, channels=8, width=320, cross=1024, out=4):
    shapes = image_unet(width, cross, channels, True, ids, out)
    return shapes | {"down_blocks.0.attentions.0.temporal_transformer_blocks.0.norm_in.weight": (width,)}


def test_the_released_single_file(released):
    family = recognise(released)
    assert (family.name, family.naming, family.is_svd) == ("SVD", "original", True)
    assert family.parts == ("unet", "vae", "image_encoder")
    assert (family.facts["in_channels"], family.facts["time_ids_width"], family.facts["cross_attention_dim"]) == (
        8,
        768,
        1024,
    )
    assert "no header tells them apart" in family.notes[0]


def test_an_image_decoder_variant_has_no_temporal_layers_in_its_decoder(released):
    plain = {
        n: s for n, s in released.items() if not (n.startswith("first_stage") and ("time_" in n or "mix_factor" in n))
    }
    family = recognise(plain)
    assert (family.name, family.is_svd) == ("SVD image_decoder", True)
    assert "decodes each frame for itself" in family.notes[-1]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"label_emb.0.0.weight": (1280, 256)}, "SV3D-u"),
        ({"label_emb.0.0.weight": (1280, 1280)}, "SV3D-p"),
        ({"input_blocks.0.0.weight": (320, 9, 3, 3)}, "SVD derivative (9 channels)"),
        ({"input_blocks.0.0.weight": (320, 12, 3, 3)}, "SVD derivative (12 channels)"),
    ],
)
def test_what_was_made_of_the_released_file(released, changes, name):
    changed = released | {f"model.diffusion_model.{key}": shape for key, shape in changes.items()}
    family = recognise(changed)
    assert (family.name, family.is_svd) == (name, False)


def test_the_shipped_base():
    def of(part, file):
        return recognise({n: e.shape for n, e in read_header(TINY / part / file).tensors.items()})

    assert of("unet", "diffusion_pytorch_model.fp16.safetensors").name == "SVD"
    assert of("vae", "diffusion_pytorch_model.fp16.safetensors").name == "SVD VAE (temporal decoder)"
    assert of("image_encoder", "model.fp16.safetensors").name == "CLIP vision tower"


@pytest.mark.parametrize(
    ("shapes", "name"),
    [
        (image_unet(), "SD 1.x"),
        (image_unet(cross=1024, linear=True), "SD 2.x"),
        (image_unet(width=48, cross=40), "SD 1.x"),
        (image_unet(width=48, cross=40, linear=True), "SD 2.x"),
        (image_unet(cross=2048, linear=True, ids=2816), "SDXL"),
        (image_unet(cross=1280, linear=True, ids=2560), "SDXL refiner"),
        (image_unet(channels=9), "SD 1.x inpainting (9 channels)"),
        (image_unet(cross=1024, linear=True, channels=9), "SD 2.x inpainting (9 channels)"),
        (image_unet(cross=1024, linear=True, channels=5), "SD 2.x depth (5 channels)"),
        (image_unet(cross=640), "image UNet"),
        (video_unet(), "SVD"),
        (video_unet(ids=36, width=24, cross=20, channels=6, out=3), "SVD"),
        (video_unet(ids=256), "SV3D-u"),
        (video_unet(ids=1280), "SV3D-p"),
        (video_unet(channels=9), "SVD derivative (9 channels)"),
        (video_unet(channels=12), "SVD derivative (12 channels)"),
        (video_unet(channels=7, out=3, ids=36), "SVD derivative (7 channels)"),
        (video_unet(ids=512), "video UNet"),
        ({**image_unet(), "controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3)}, "ControlNet"),
        ({**image_unet(), "down_blocks.0.motion_modules.0.temporal_transformer.norm.weight": (320,)}, "AnimateDiff UNet"),
        ({**image_unet(), "down_blocks.0.temp_convs.0.conv1.0.weight": (320,)}, "text-to-video UNet (ModelScope)"),
    ],
)  # fmt: skip
def test_unets(shapes, name):
    assert recognise(shapes).name == name
    assert recognise({f"module.{key}": shape for key, shape in shapes.items()}).name == name


@pytest.mark.parametrize(
    ("shapes", "name"),
    [
        (image_unet(), "SD 1.x"),
        (image_unet(cross=1024, linear=True), "SD 2.x"),
        (image_unet(channels=9), "SD 1.x inpainting (9 channels)"),
        (image_unet(cross=2048, linear=True, ids=2816), "SDXL"),
    ],
)
def test_image_models_in_the_authors_naming(shapes, name):
    family = recognise(original(shapes))
    assert (family.name, family.naming, family.prefixes["unet"]) == (name, "original", "model.diffusion_model.")


def test_an_original_controlnet():
    shapes = {f"control_model.{n.removeprefix('model.diffusion_model.')}": s for n, s in original(image_unet()).items()}
    assert recognise({**shapes, "control_model.input_hint_block.0.weight": (16, 3, 3, 3)}).name == "ControlNet"


@pytest.mark.parametrize(
    ("shapes", "naming", "base"),
    [
        ({"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight": (8, 768),
          "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.alpha": ()}, "kohya", "SD 1.x"),
        ({"base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v.lora_A.weight": (4, 2048)}, "peft", "SDXL"),
        ({"unet.down_blocks.0.attentions.0.processor.attn2.to_k_lora.down.weight": (4, 1024)}, "diffusers",
         "SD 2.x, or SVD's spatial layers"),
        ({"unet.mid_block.attentions.0.temporal_transformer_blocks.0.attn1.to_q.lora_A.weight": (16, 1280)}, "peft",
         "SVD (it adapts temporal layers)"),
        ({"diffusion_model.middle_block.1.time_stack.0.attn1.to_q.lora_down.weight": (8, 1280)}, "kohya",
         "SVD (it adapts temporal layers)"),
        ({"lora_unet_mid_block_attentions_0_attn2_to_k.lora_down.weight": (8, 88)}, "kohya", "a base with cross-attention 88"),
        ({"unet.mid_block.attentions.0.attn1.to_q.lora_A.weight": (16, 88)}, "peft",
         "unknown (no adapter of the cross-attention keys shows a width)"),
    ],
)  # fmt: skip
def test_loras(shapes, naming, base):
    family = recognise(shapes)
    assert (family.name, family.naming, family.facts["base"]) == ("LoRA", naming, base)


def test_parts_alone():
    assert (
        recognise({"down_blocks.0.motion_modules.0.temporal_transformer.norm.weight": (320,)}).name
        == "AnimateDiff motion module"
    )
    vae = {"encoder.conv_in.weight": (24, 3, 3, 3), "encoder.down_blocks.0.resnets.0.norm1.weight": (24,)}
    assert recognise(vae).name == "VAE"
    assert recognise({**vae, "decoder.time_conv_out.weight": (3, 3, 3, 1, 1)}).name == "SVD VAE (temporal decoder)"
    clip = {
        "vision_model.embeddings.patch_embedding.weight": (24, 3, 8, 8),
        "vision_model.embeddings.class_embedding": (24,),
    }
    assert recognise(clip).name == "CLIP vision tower"


@pytest.mark.parametrize(
    "shapes",
    [
        {},
        {"fc.weight": (10, 20), "fc.bias": (10,)},
        {"model.layers.0.self_attn.q_proj.weight": (64, 64), "model.embed_tokens.weight": (1000, 64)},
        {"conv_in.weight": (8, 3, 3, 3), "conv_out.weight": (3, 8, 3, 3)},
        {"encoder.conv_in.weight": (8, 3, 3, 3)},
        {"transformer_blocks.0.attn.to_q.weight": (64, 64), "pos_embed.proj.weight": (64, 16, 2, 2)},
    ],
)
def test_what_it_does_not_know_it_says_it_does_not_know(shapes):
    assert recognise(shapes).name == "unknown"


def test_a_stripped_svd_is_not_taken_for_an_image_model():
    shapes = image_unet(width=64, ids=48) | {"down_blocks.0.resnets.0.spatial_res_block.conv1.weight": (64, 64, 3, 3)}
    assert recognise(shapes).name == "SVD UNet without temporal layers"
