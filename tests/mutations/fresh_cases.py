"""Mistakes thought of after everything else was finished, by somebody who had not read the checks; and sound runs that look odd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from tests.mutations.checkpoint_cases import PREFIX, SCHEDULER, _file, _tensors
from tests.mutations.code_cases import TARGET, _code
from tests.mutations.configuration_cases import checkpointed
from tests.mutations.data_cases import DAT, _written
from tests.mutations.sandbox import Mutation, Sandbox, Sound, edit_weights, link_tree, put, weights

CFG_OR_DAT = ("CFG", "DAT")
MEANING = ("SEM", "NUM", "SHP")


def _films(path: Path, pictures: Sequence[np.ndarray], ticks: Sequence[int], **options: str) -> None:
    """An H.264 file that shows pictures (h, w, 3) at `ticks / 24` seconds."""
    import av

    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=Fraction(24), options=options)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 24)
        for picture, tick in zip(pictures, ticks, strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = tick, Fraction(1, 24)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _picture(moment: float) -> np.ndarray:
    """(64, 96, 3) uint8: slanted bars that move right, 3 pixels a moment."""
    y, x = np.mgrid[:64, :96]
    bars = ((x - 3 * moment + y / 4) % 24 < 12) * 200 + 20
    return np.repeat(bars[:, :, None], 3, axis=2).astype(np.uint8)


def _still(path: Path) -> None:
    _films(path, [_picture(0)] * 72, range(72))


def _stalling(path: Path) -> None:
    """Half a second of film, half a second without a frame, and so on: 13 frames per second on average, a screen recording's way."""
    ticks = [tick for tick in range(96) if tick % 24 < 12]
    _films(path, [_picture(tick) for tick in ticks], ticks)


def _interlaced(path: Path) -> None:
    """The odd rows of each frame are half a frame younger than the even ones, and the file says so."""
    frames = [_picture(number) for number in range(72)]
    for number, frame in enumerate(frames):
        frame[1::2] = _picture(number + 0.5)[1::2]
    _films(path, frames, range(72), **{"x264-params": "tff=1:interlaced=1"})


def _linked_folder(box: Sandbox) -> None:
    """Four of six clips behind a linked folder, which the search does not follow."""
    elsewhere = box.work / "disk2"
    elsewhere.mkdir()
    for path in box.videos[:4]:
        path.rename(elsewhere / path.name)
    (box.clips / "more").symlink_to(elsewhere, target_is_directory=True)


def _runs_among_the_clips(box: Sandbox) -> None:
    """Sample videos of the run lie below data.root: from the first restart on it trains on what it made."""
    box.set(f"run.dir={box.clips / 'runs'}")


def _finished(box: Sandbox) -> None:
    """Other clips under the name of a run that has done all its steps: nothing would be trained, and it ends with 0."""
    steps = ("train.steps=2", "train.warmup=0")
    checkpointed(box, *steps)
    other = link_tree(box.clips, box.work / "other-clips")
    box.set(*steps, f"data.root={other}")


def _dangling(box: Sandbox) -> None:
    """A snapshot copied out of the hub's cache without the blobs its links point to."""
    path = weights(box.model, "unet")
    path.unlink()
    path.symlink_to("../../../blobs/" + "5e" * 32)


def _cache_folder(box: Sandbox) -> None:
    folder = box.work / "models--stabilityai--stable-video-diffusion-img2vid"
    (folder / "snapshots").mkdir(parents=True)
    (folder / "refs").mkdir()
    box.model.rename(folder / "snapshots" / ("9c" * 20))
    put(folder / "refs" / "main", b"9c" * 20)
    box.set(f"model.pretrained={folder}")


def _utf16(box: Sandbox) -> None:
    path = box.model / SCHEDULER
    put(path, path.read_text().encode("utf-16"))


def _image_vae(tensors: dict[str, Any]) -> dict[str, Any]:
    """Names as in diffusers' AutoencoderKL."""
    import torch

    temporal = ("temporal_res_block", "time_mixer", "time_conv_out")
    kept = {k.replace(".spatial_res_block.", "."): v for k, v in tensors.items() if not any(t in k for t in temporal)}
    return kept | {"post_quant_conv.weight": torch.randn(4, 4, 1, 1), "post_quant_conv.bias": torch.zeros(4)}


def _open_clip(tensors: dict[str, Any]) -> dict[str, Any]:
    """Names as in open_clip's ViT, which SVD's own code uses: q, k and v in one matrix."""
    import torch

    swaps = {
        "vision_model.embeddings.patch_embedding": "visual.conv1", "vision_model.embeddings.class": "visual.class",
        "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding", "vision_model.pre_layrnorm": "visual.ln_pre",
        "vision_model.post_layernorm": "visual.ln_post", "vision_model.encoder.layers": "visual.transformer.resblocks",
        "visual_projection.weight": "visual.proj", ".layer_norm": ".ln_", ".mlp.fc1": ".mlp.c_fc", ".mlp.fc2": ".mlp.c_proj",
        ".self_attn.out_proj": ".attn.out_proj", ".self_attn.q_proj.": ".attn.in_proj_",
    }  # fmt: skip
    saved: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        parts = (
            [tensors[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"] if ".q_proj." in name else [tensor]
        )
        for old, new in swaps.items():
            name = name.replace(old, new)
        saved[name] = torch.cat(parts).T if name == "visual.proj" else torch.cat(parts)
    return saved


def _unmerged(tensors: dict[str, Any]) -> dict[str, Any]:
    """A UNet saved with LoRA adapters still inside."""
    import torch

    saved: dict[str, Any] = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        if not layer.endswith(("attn1.to_q", "attn1.to_v")):
            saved[name] = tensor
            continue
        saved[f"{layer}.base_layer.{kind}"] = tensor
        saved[f"{layer}.lora_A.default.weight"] = torch.randn(4, tensor.shape[1])
        saved[f"{layer}.lora_B.default.weight"] = torch.randn(tensor.shape[0], 4)
    return saved


FRESH_CONFIGURATION = [
    Mutation("runs written among the clips", "silent", CFG_OR_DAT, "own", _runs_among_the_clips, warning_is_enough=True),
    Mutation("other clips for a run that is finished", "silent", ("CFG", "CKP", "DAT"), "own", _finished, warning_is_enough=True),
    Mutation("noise strength where its logarithm belongs", "silent", ("CFG", "SEM", "NUM"), "M11",
             lambda box: box.set("conditioning.noise_aug=[0.02, 0.0]"), warning_is_enough=True),
    Mutation("share to train on given as the share held out", "silent", CFG_OR_DAT, "own",
             lambda box: box.set("data.holdout=0.9"), warning_is_enough=True),
]  # fmt: skip

FRESH_CHECKPOINT = [
    _file("UNet file is a link to nothing", "B11 B13", _dangling),
    _file("folder of the hub's cache instead of its snapshot", "B10 B11", _cache_folder),
    _file("scheduler config in UTF-16", "own", _utf16),
    _file("weights of an image VAE", "A01 A08", _tensors("vae", _image_vae), kind="silent"),
    _file("CLIP with open_clip's names", "A08 F20", _tensors("image_encoder", _open_clip), kind="silent"),
    _file("UNet saved with LoRA still inside", "A08 K06", _tensors("unet", _unmerged), kind="silent"),
]  # fmt: skip

FRESH_DATA = [
    Mutation("clips that stand still", "silent", DAT, "M01", _written(_still), warning_is_enough=True),
    Mutation("clips that stall every half second", "silent", DAT, "I08", _written(_stalling), warning_is_enough=True),
    Mutation("interlaced clips", "silent", DAT, "own", _written(_interlaced), warning_is_enough=True),
    Mutation("most clips behind a linked folder", "silent", DAT, "I06", _linked_folder, warning_is_enough=True),
]  # fmt: skip

FRESH_CODE = [
    _code("latents eight times smaller whatever the VAE", "shape", "D13", "draws._draw_one",
          ('{**axes, "b": 1}', '{**axes, "b": 1, "f": 8}'), topic=("SHP", "CFG")),
    _code("motion bucket as a column", "shape", "F26", "loader._tensors",
          ("torch.full((count,), float(data.motion_bucket))", "torch.full((count, 1), float(data.motion_bucket))"), topic=("SHP", "DAT")),
    _code("UNet asked for each frame alone", "silent", "E13", "step.predict",
          ("output = parts.unet(\n            unet_input.sample.to(parts.dtype),\n",
           "output = torch.cat([parts.unet(\n            frame.to(parts.dtype),\n"),
          ("return_dict=False,\n        )[0]", "return_dict=False,\n        )[0] for frame in unet_input.sample.split(1, dim=1)], dim=1)"),
          topic=MEANING),
    _code("posterior sampled with noise of its own", "silent", "own", TARGET,
          ('mean + std * rearrange(draws.posterior_noise, "b t z h w -> (b t) z h w")', "mean + std * torch.randn_like(mean)"),
          topic=MEANING),
    _code("the same noise for every clip", "silent", "M20", "draws.make_draws",
          ("generator(seed, sample)", "generator(seed)"), topic=(*MEANING, "DST", "DAT")),
    _code("temporal trains the spatial layers", "silent", "J15", "adapt._learns",
          ("return bool(TEMPORAL.search(name))", "return not TEMPORAL.search(name)"), overrides=("adapt.method=temporal",),
          topic=("SEM", "CFG", "SHP")),
]  # fmt: skip


def _offline(box: Sandbox) -> None:
    box.set("model.pretrained=stabilityai/stable-video-diffusion-img2vid")
    box.monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(box.work / "nothing"))
    box.monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def _engine(box: Sandbox) -> None:
    box.monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")


def _held(path: Path) -> None:
    """24 frames per second that hold each picture ten times, as a converted GIF does."""
    number = int(path.stem[-1])
    _films(path, [_picture(number + tick // 10 * 10) for tick in range(96)], range(96))


def _held_clips(box: Sandbox) -> None:
    _written(_held)(box)
    box.set("data.num_frames=8")


def _dead_links(box: Sandbox) -> None:
    for path in box.videos:
        path.unlink()
        path.symlink_to(box.work / "moved" / path.name)


SECOND_ROUND = [
    Mutation("an engine that an accelerate config left behind", "shape", ("ENV",), "own", _engine),
    Mutation("a base on the hub, and the hub is offline", "file", ("CKP", "ENV"), "own", _offline),
    Mutation("files that hold each picture ten times", "silent", DAT, "own", _held_clips, warning_is_enough=True),
    Mutation("clips that are links to nowhere", "file", DAT, "own", _dead_links),
]
"""What a second round of 67 such mistakes brought that was missed, or told wrongly, and can be seen before values are looked at."""

FRESH: list[Mutation] = [*FRESH_CONFIGURATION, *FRESH_CHECKPOINT, *FRESH_DATA, *FRESH_CODE, *SECOND_ROUND]


def _two_shards(box: Sandbox) -> None:
    """The same UNet in two files and their index, all there."""
    import json

    from safetensors.torch import load_file, save

    path = weights(box.model, "unet")
    tensors = load_file(path)
    names = sorted(tensors)
    halves = {f"{PREFIX}-00001-of-00002.safetensors": names[::2], f"{PREFIX}-00002-of-00002.safetensors": names[1::2]}
    path.unlink()
    for file, keys in halves.items():
        put(path.parent / file, save({k: tensors[k] for k in keys}, {"format": "pt"}))
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": {k: file for file, keys in halves.items() for k in keys}}
    put(path.parent / f"{PREFIX}.safetensors.index.json", json.dumps(index).encode())


def _position_ids(box: Sandbox) -> None:
    """CLIP as old transformers saved it."""
    import torch

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        tokens = tensors["vision_model.embeddings.position_embedding.weight"].shape[0]
        return tensors | {"vision_model.embeddings.position_ids": torch.arange(tokens)[None]}

    edit_weights(box, "image_encoder", change)


def _bf16_file(box: Sandbox) -> None:
    import torch

    edit_weights(box, "unet", lambda tensors: {k: v.to(torch.bfloat16) for k, v in tensors.items()})


def _odd_names(box: Sandbox) -> None:
    """A folder that came from a Mac: resource forks beside clips, capitals, blanks, brackets, umlauts."""
    for number, path in enumerate(box.videos[:4]):
        put(box.clips / f"._{path.name}", b"\0\5\x16\7\0\2\0\0Mac OS X")
        path.rename(box.clips / f"Möwe #{number} [final cut].MP4")
    put(box.clips / ".DS_Store", b"\0\0\0\1Bud1")


def _neighbour(box: Sandbox) -> None:
    """Only the beginning of the two paths is the same."""
    box.set(f"run.dir={box.clips}-runs")


def _sound(name: str, apply: Callable[[Sandbox], None]) -> Sound:
    return Sound(name, apply=apply)


def _narrow(box: Sandbox) -> None:
    """decord has no buffer of this width."""
    from svdtune.data.demo import write_demo

    for path in box.videos:
        path.unlink()
    write_demo(box.clips, clips=6, num_frames=100, fps=24, height=64, width=48, motion_bucket=12)


FRESH_SOUND: list[Sound] = [
    _sound("clips 48 pixels wide", _narrow),
    _sound("the UNet in two whole shards", _two_shards),
    _sound("CLIP with the position ids of old transformers", _position_ids),
    _sound("a UNet file in bf16", _bf16_file),
    _sound("clips with a Mac's names and companions", _odd_names),
    _sound("runs in a folder whose name begins like that of the clips", _neighbour),
]
