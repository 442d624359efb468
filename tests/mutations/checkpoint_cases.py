"""Model folders as people really have them: cut, mixed, renamed, edited."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Callable
from typing import Any

from tests.mutations.sandbox import Kind, Mutation, Sandbox, edit_json, edit_weights, put, weights

CKP = ("CKP",)
PREFIX = "diffusion_pytorch_model"


def _file(name: str, failure: str, apply: Callable[[Sandbox], None], *, kind: Kind = "file",
          topic: tuple[str, ...] = CKP, warning: bool = False) -> Mutation:  # fmt: skip
    return Mutation(name, kind, topic, failure, apply, warning)


def _bytes(part: str, content: Callable[[bytes], bytes]) -> Callable[[Sandbox], None]:
    def apply(box: Sandbox) -> None:
        path = weights(box.model, part)
        put(path, content(path.read_bytes()))

    return apply


def _json(file: str, *remove: str, **changes: Any) -> Callable[[Sandbox], None]:
    return lambda box: edit_json(box.model / file, remove, **changes)


def _tensors(part: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Sandbox], None]:
    return lambda box: edit_weights(box, part, change)


def _without(*fragments: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda tensors: {k: v for k, v in tensors.items() if not any(fragment in k for fragment in fragments)}


def _resized(name_end: str, *shape: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Every weight whose name ends so, with random numbers of another shape (-1 keeps a size)."""

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        import torch

        return {
            k: torch.randn([o if n == -1 else n for n, o in zip(shape, v.shape, strict=True)])
            if k.endswith(name_end)
            else v
            for k, v in tensors.items()
        }

    return change


def _steps(*applied: Callable[[Sandbox], None]) -> Callable[[Sandbox], None]:
    def apply(box: Sandbox) -> None:
        for step in applied:
            step(box)

    return apply


def _set(*overrides: str) -> Callable[[Sandbox], None]:
    return lambda box: box.set(*overrides)


def _remove(file: str) -> Callable[[Sandbox], None]:
    return lambda box: (box.model / file).unlink()


def _rename(old: str, new: str) -> Callable[[Sandbox], None]:
    return lambda box: (box.model / old).rename(box.model / new) and None


def _pickle(_: bytes) -> bytes:
    import torch

    buffer = io.BytesIO()
    torch.save({"conv_in.weight": torch.zeros(64, 8, 3, 3)}, buffer)
    return buffer.getvalue()


def _old_pickle(_: bytes) -> bytes:
    import torch

    buffer = io.BytesIO()
    torch.save({"conv_in.weight": torch.zeros(64, 8, 3, 3)}, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def _zip(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("diffusion_pytorch_model.safetensors", content[:1000])
    return buffer.getvalue()


def _shards(box: Sandbox) -> None:
    """Two shards and their index, the second one not there."""
    from safetensors.torch import load_file, save

    path = weights(box.model, "unet")
    tensors = load_file(path)
    names = sorted(tensors)
    halves = {f"{PREFIX}-00001-of-00002.safetensors": names[::2], f"{PREFIX}-00002-of-00002.safetensors": names[1::2]}
    index = {"metadata": {"total_size": 1}, "weight_map": {k: file for file, keys in halves.items() for k in keys}}
    path.unlink()
    first, keys = next(iter(halves.items()))
    put(path.parent / first, save({k: tensors[k] for k in keys}, {"format": "pt"}))
    put(path.parent / f"{PREFIX}.safetensors.index.json", json.dumps(index).encode())


def _to_bin(box: Sandbox) -> None:
    path = weights(box.model, "unet")
    put(path.parent / f"{PREFIX}.bin", _pickle(b""))
    path.unlink()


def _image_unet(tensors: dict[str, Any]) -> dict[str, Any]:
    """Names as in diffusers' UNet2DConditionModel."""
    kept = _without("temporal", "time_pos_embed", "time_mixer", "add_embedding")(tensors)
    return {k.replace(".spatial_res_block.", "."): v for k, v in kept.items()}


def _lora(tensors: dict[str, Any]) -> dict[str, Any]:
    import torch

    names = [k.removesuffix(".weight") for k in tensors if k.endswith("attn1.to_q.weight")]
    low = {f"unet.{n}.lora_A.weight": torch.randn(4, 64) for n in names}
    return low | {f"unet.{n}.lora_B.weight": torch.randn(64, 4) for n in names}


def _controlnet(tensors: dict[str, Any]) -> dict[str, Any]:
    import torch

    kept = _without("up_blocks", "conv_out", "conv_norm_out")(tensors)
    zeros = {f"controlnet_down_blocks.{i}.weight": torch.zeros(64, 64, 1, 1) for i in range(4)}
    return kept | zeros | {"controlnet_cond_embedding.conv_in.weight": torch.randn(16, 3, 3, 3)}


def _transposed(tensors: dict[str, Any]) -> dict[str, Any]:
    return {k: v.T if k.endswith("attn2.to_k.weight") else v for k, v in tensors.items()}


def _quantised(tensors: dict[str, Any]) -> dict[str, Any]:
    import torch

    return {k: (v * 127).to(torch.int8) if v.ndim > 1 else v for k, v in tensors.items()}


def _sgm_names(tensors: dict[str, Any]) -> dict[str, Any]:
    """A few names as in Stability's own single file."""
    swaps = {
        "conv_in.": "input_blocks.0.0.",
        "time_embedding.linear_1.": "time_embed.0.",
        "down_blocks.": "input_blocks.",
    }

    def renamed(name: str) -> str:
        old = next((old for old in swaps if name.startswith(old)), None)
        return f"model.diffusion_model.{name.replace(old, swaps[old], 1) if old else name}"

    return {renamed(k): v for k, v in tensors.items()}


def _swap(first: str, second: str) -> Callable[[Sandbox], None]:
    def apply(box: Sandbox) -> None:
        put(weights(box.model, first), weights(box.model, second).read_bytes())

    return apply


def _clip(**changes: Any) -> Callable[[Sandbox], None]:
    """An image encoder of other sizes, config and weights alike."""

    def apply(box: Sandbox) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        folder = box.model / "image_encoder"
        content = json.loads((folder / "config.json").read_text())
        shutil.rmtree(folder)
        CLIPVisionModelWithProjection(CLIPVisionConfig.from_dict({**content, **changes})).save_pretrained(folder)

    return apply


def _vae(**changes: Any) -> Callable[[Sandbox], None]:
    """A VAE of other sizes, config and weights alike."""

    def apply(box: Sandbox) -> None:
        from diffusers import AutoencoderKLTemporalDecoder

        folder = box.model / "vae"
        content = json.loads((folder / "config.json").read_text())
        shutil.rmtree(folder)
        vae: Any = AutoencoderKLTemporalDecoder.from_config({**content, **changes})
        vae.save_pretrained(folder)

    return apply


def _a_file(box: Sandbox) -> None:
    box.set(f"model.pretrained={weights(box.model, 'unet')}")


def _tiny_heads(box: Sandbox) -> None:
    from svdtune.model.facts import TINY
    from tests.mutations.sandbox import link_tree

    folder = link_tree(TINY, box.work / "tiny")
    edit_json(folder / "unet/config.json", num_attention_heads=[8, 8])
    box.set(f"model.pretrained={folder}", "model.variant=fp16", "data.num_frames=8")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4f" * 32 + b"\nsize 3049435868\n"
HTML = b"<!DOCTYPE html>\n<html><head><title>Access to this model is restricted</title></head><body>401</body></html>\n"
UNET, VAE, CLIP = "unet/config.json", "vae/config.json", "image_encoder/config.json"
SCHEDULER, PICTURES = "scheduler/scheduler_config.json", "feature_extractor/preprocessor_config.json"

DAMAGED = [
    _file("UNet file cut in the middle", "B01 B03", _bytes("unet", lambda b: b[: len(b) // 2])),
    _file("UNet file cut by its last byte", "B05 B06", _bytes("unet", lambda b: b[:-1])),
    _file("UNet file cut inside its header", "B01", _bytes("unet", lambda b: b[:500])),
    _file("UNet file of four bytes", "B01", _bytes("unet", lambda b: b[:4])),
    _file("UNet file empty", "B16", _bytes("unet", lambda _: b"")),
    _file("UNet file is a git-lfs pointer", "B16", _bytes("unet", lambda _: LFS)),
    _file("CLIP file is a git-lfs pointer", "B16", _bytes("image_encoder", lambda _: LFS)),
    _file("UNet file is a web page", "B16", _bytes("unet", lambda _: HTML)),
    _file("VAE file is a JSON error", "B16", _bytes("vae", lambda _: b'{"error": "Repository not found"}')),
    _file("UNet file is a pickle", "B16", _bytes("unet", _pickle)),
    _file("UNet file is an old pickle", "B16", _bytes("unet", _old_pickle)),
    _file("UNet file is a zip archive", "B16", _bytes("unet", _zip)),
    _file("VAE file cut", "B03", _bytes("vae", lambda b: b[: len(b) // 3])),
    _file("CLIP file with bytes after its end", "B05", _bytes("image_encoder", lambda b: b + b"\0" * 64)),
    _file("UNet header that is no JSON", "B05", _bytes("unet", lambda b: b[:8] + b"x" * 16 + b[24:])),
    _file("UNet file of zeros", "B05", _bytes("unet", lambda b: b"\0" * len(b))),
    _file("second shard missing", "B08 B11", _shards),
    _file("UNet weights missing", "B08", _remove(f"unet/{PREFIX}.safetensors")),
    _file("UNet as .bin only", "B08 B16", _to_bin),
    _file("only fp16 files and variant null", "B08",
          _rename(f"unet/{PREFIX}.safetensors", f"unet/{PREFIX}.fp16.safetensors")),
    _file("plain files and variant fp16", "B08 B15", _set("model.variant=fp16")),
    _file("a variant that does not exist", "B15", _set("model.variant=main")),
    _file("folder does not exist", "B11", lambda box: box.set(f"model.pretrained={box.work / 'svd-xt'}")),
    _file("one weight file as the model", "A01 F20", _a_file),
    _file("UNet config missing", "B11", _remove(UNET)),
    _file("CLIP folder missing", "B10 F20", lambda box: shutil.rmtree(box.model / "image_encoder")),
    _file("CLIP config missing", "B10 B11", _remove(CLIP)),
    _file("scheduler config missing", "B11", _remove(SCHEDULER)),
    _file("feature extractor missing", "B11", lambda box: shutil.rmtree(box.model / "feature_extractor")),
    _file("VAE config missing", "A01 B11", _remove(VAE)),
    _file("UNet config cut", "B11", lambda box: put(box.model / UNET, (box.model / UNET).read_bytes()[:200])),
    _file("UNet config is a list", "own", lambda box: put(box.model / UNET, b"[]")),
    _file("CLIP config is a web page", "B16", lambda box: put(box.model / CLIP, HTML)),
]  # fmt: skip

OTHERS = [
    _file("class of another video model", "A10", _json(UNET, _class_name="UNet3DConditionModel")),
    _file("class of an image model", "A10", _json(UNET, _class_name="UNet2DConditionModel")),
    _file("VAE of an image model", "A01", _json(VAE, _class_name="AutoencoderKL")),
    _file("text tower for image tower", "F13 F15", _json(CLIP, architectures=["CLIPTextModelWithProjection"])),
    _file("one UNet key missing", "A08", _tensors("unet", _without("conv_out.bias")), kind="silent"),
    _file("temporal layers missing", "A21", _tensors("unet", _without("temporal")), kind="silent"),
    _file("mix factors missing", "A08", _tensors("unet", _without("mix_factor")), kind="silent"),
    _file("decoder missing from the VAE", "A08", _tensors("vae", _without("decoder.")), kind="silent"),
    _file("projection missing from CLIP", "A08", _tensors("image_encoder", _without("visual_projection")), kind="silent"),
    _file("weights of an image UNet", "A21", _tensors("unet", _image_unet), kind="silent"),
    _file("keys nobody knows", "A08", _tensors("unet", lambda t: t | {"motion_adapter.weight": t["conv_in.weight"] + 1}), kind="silent"),
    _file("keys behind `unet.`", "A21", _tensors("unet", lambda t: {f"unet.{k}": v for k, v in t.items()}), kind="silent"),
    _file("keys behind `module.`", "A21 J28", _tensors("unet", lambda t: {f"module.{k}": v for k, v in t.items()}), kind="silent"),
    _file("keys of Stability's single file", "A08", _tensors("unet", _sgm_names), kind="silent"),
    _file("a LoRA file for the UNet", "A21 K06", _tensors("unet", _lora), kind="silent"),
    _file("a ControlNet for the UNet", "A21", _tensors("unet", _controlnet), kind="silent"),
    _file("a transposed weight", "A15", _tensors("unet", _transposed)),
    _file("weights as int8", "own", _tensors("unet", _quantised), kind="silent"),
    _file("conv_in of an image model, 4 channels", "A10 C03", _tensors("unet", _resized("conv_in.weight", -1, 4, -1, -1))),
    _file("conv_in of an inpainting model, 9 channels", "A10 A13 C01", _tensors("unet", _resized("conv_in.weight", -1, 9, -1, -1))),
    _file("conv_in of a derivative, 12 channels", "A03 C05", _tensors("unet", _resized("conv_in.weight", -1, 12, -1, -1))),
    _file("9 channels in weights and config", "C01 A20",
          _steps(_tensors("unet", _resized("conv_in.weight", -1, 9, -1, -1)), _json(UNET, in_channels=9)), topic=("CKP", "SHP")),
    _file("9 channels in the config only", "A20", _json(UNET, in_channels=9)),
    _file("9 channels with on_mismatch=adapt", "A11 A20",
          _steps(_tensors("unet", _resized("conv_in.weight", -1, 9, -1, -1)), _set("model.on_mismatch=adapt", "adapt.method=full"))),
    _file("an image UNet widened, and only its spatial layers trained", "A21",
          _steps(_tensors("unet", _image_unet), _set("model.on_mismatch=adapt", "adapt.method=spatial")), topic=("CKP", "CFG", "SEM")),
    _file("cross-attention of SD 1.x", "A15 A16", _tensors("unet", _resized("attn2.to_k.weight", -1, 18))),
    _file("cross-attention width in the config only", "A16", _json(UNET, cross_attention_dim=40)),
    _file("conditioning of SV3D-u", "A23",
          _steps(_tensors("unet", _resized("add_embedding.linear_1.weight", -1, 16)), _json(UNET, projection_class_embeddings_input_dim=16)),
          topic=("CKP", "SHP")),
    _file("conditioning of SV3D-p", "A23",
          _steps(_tensors("unet", _resized("add_embedding.linear_1.weight", -1, 80)), _json(UNET, projection_class_embeddings_input_dim=80)),
          topic=("CKP", "SHP")),
    _file("weights of SV3D-u under SVD's config", "A23", _tensors("unet", _resized("add_embedding.linear_1.weight", -1, 16))),
    _file("time ids of another width in the config", "A23 F30", _json(UNET, addition_time_embed_dim=24), topic=("CKP", "SHP")),
    _file("other layers per block", "A20", _json(UNET, layers_per_block=2)),
    _file("other widths of the blocks", "A20", _json(UNET, block_out_channels=[64, 128])),
    _file("number of frames missing from the config", "E21", _json(UNET, "num_frames"), kind="silent"),
    _file("width of the time ids missing from the config", "A23", _json(UNET, "addition_time_embed_dim"), topic=("CKP", "SHP")),
    _file("UNet file that is the VAE", "own", _swap("unet", "vae"), kind="silent"),
    _file("VAE file that is the UNet", "own", _swap("vae", "unet"), kind="silent"),
]  # fmt: skip

SETTINGS = [
    _file("scheduler predicts epsilon", "F06 F08", _json(SCHEDULER, prediction_type="epsilon"), kind="silent"),
    _file("scheduler with discrete timesteps", "F01 F08", _json(SCHEDULER, timestep_type="discrete"), kind="silent"),
    _file("scheduler without Karras sigmas", "F08", _json(SCHEDULER, use_karras_sigmas=False), kind="silent"),
    _file("scheduler without a largest sigma", "F08", _json(SCHEDULER, sigma_max=None), kind="silent"),
    _file("scheduler with another largest sigma", "F08", _json(SCHEDULER, sigma_max=80.0), kind="silent"),
    _file("scheduler with another smallest sigma", "F08", _json(SCHEDULER, sigma_min=0.2), kind="silent"),
    _file("scheduler of another class", "F03 F06", _json(SCHEDULER, _class_name="DDPMScheduler")),
    _file("scheduler without its prediction type", "F08", _json(SCHEDULER, "prediction_type"), kind="silent"),
    _file("VAE levels missing from its config", "A01", _json(VAE, "block_out_channels")),
    _file("VAE levels that its weights lack", "A01", _json(VAE, block_out_channels=[32, 32, 64, 64], down_block_types=["DownEncoderBlock2D"] * 4)),
    _file("scaling factor missing", "A01", _json(VAE, "scaling_factor"), kind="silent"),
    _file("scaling factor zero", "own", _json(VAE, scaling_factor=0.0), kind="silent"),
    _file("VAE of another latent width", "C06 C08", _vae(latent_channels=6), topic=("CKP", "SHP")),
    _file("latent width in the config only", "C06", _json(VAE, latent_channels=8), topic=("CKP", "SHP")),
    _file("VAE for pictures with alpha", "C13", _vae(in_channels=4), topic=("CKP", "SHP")),
    _file("VAE of factor 16 and a height of 72", "D18",
          _steps(_vae(block_out_channels=[32] * 5, down_block_types=["DownEncoderBlock2D"] * 5), _set("data.height=72")),
          kind="silent", topic=("CKP", "SHP", "CFG")),
    _file("CLIP of another width", "F15 F16", _clip(projection_dim=32), topic=("CKP", "SHP")),
    _file("CLIP width in the config only", "F15", _json(CLIP, projection_dim=32), topic=("CKP", "SHP")),
    _file("CLIP picture size in the config only", "F11", _json(CLIP, image_size=336)),
    _file("CLIP patch size in the config only", "F13", _json(CLIP, patch_size=32)),
    _file("CLIP hidden size in the config only", "F13", _json(CLIP, hidden_size=48)),
    _file("CLIP config of class defaults", "B10 F13", lambda box: put(box.model / CLIP, b'{"model_type": "clip_vision_model"}')),
    _file("CLIP projection missing from its config", "F15", _json(CLIP, "projection_dim")),
    _file("CLIP statistics of ImageNet", "F36 F38",
          _json(PICTURES, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]), kind="silent", warning=True),
    _file("CLIP statistics of one channel", "I25", _json(PICTURES, image_mean=[0.5], image_std=[0.5]), kind="silent",
          topic=("CKP", "SHP"), warning=True),
    _file("CLIP statistics missing", "F38", _json(PICTURES, "image_mean"), topic=("CKP", "SHP")),
]  # fmt: skip

NEEDS_WEIGHTS = [_file("other heads than the weights have", "A01", _tiny_heads, kind="silent", warning=True)]
"""At widths that no release has, heads of equal width are right or wrong by the values of the weights alone."""

CHECKPOINT = [*DAMAGED, *OTHERS, *SETTINGS]
