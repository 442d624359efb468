"""The README.md of a result: a model card for the hub, which names no path of the machine that trained. Pure text, no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, Literal
from urllib.parse import quote

import yaml

from svdtune.checkpoint.training import HUB, STABILITY, TINY, UNKNOWN, Training, is_inside, number

Kind = Literal["pipeline", "lora"]

_SPECIAL = re.compile(r"[\\`*_{}\[\]<>#!|&~$@:^]|(?<=www)\.", re.IGNORECASE)

_LEARNED = {
    "full": "the whole UNet",
    "temporal": "the temporal layers of the UNet",
    "temporal_attention": "the temporal attention of the UNet",
    "spatial": "the spatial layers of the UNet",
    "lora": "low-rank adapters (LoRA) for the UNet",
}
_KEPT = {
    "full": "In the UNet: `attn2.to_q`, `attn2.to_k` and the norm before them, which have no effect in this model.",
    "temporal": "In the UNet: every spatial layer.",
    "temporal_attention": "In the UNet: everything but the temporal transformer blocks.",
    "spatial": "In the UNet: every temporal layer and the mixing factors.",
    "lora": "The UNet's own weights: the adapters are added to them when they are loaded.",
}
_MERGED = "In the UNet: every layer that had no adapter; the adapters of the others are in their weights."
_FIT = {
    "cover": "ImageOps.fit(load_image({image}), ({width}, {height}))",
    "pad": "ImageOps.pad(load_image({image}), ({width}, {height}))",
    "squash": "load_image({image}).resize(({width}, {height}))",
}
"""How a first frame gets the size of training, by `data.resize`."""
_CALL = {
    "height": "height",
    "width": "width",
    "num_frames": "num_frames",
    "fps": "fps",
    "motion_bucket_id": "motion_bucket",
    "noise_aug_strength": "noise_aug_strength",
    "num_inference_steps": "inference_steps",
}
"""Argument of diffusers' pipeline to the name of the manifest's convention."""


def model_card(training: Training, *, kind: Kind, images: Sequence[str] = (), folder: str = "export") -> str:
    """The text of README.md for a result of `kind`, front matter included.

    `images` are paths relative to the folder of the card, `folder` is what the code in it calls that folder. The two
    ```python fences run as they are, one after the other. Raises ValueError for an image that is not inside the folder.
    """
    for image in images:
        if not is_inside(image):
            raise ValueError(f"images: got {image!r}, expected a path relative to the folder of the card and inside it")
    sections = (
        f"# {_plain(training.name)}",
        _summary(training),
        *(f"![{_plain(PurePosixPath(image).stem.replace('_', ' '))}]({_url(image)})" for image in images),
        *_loading(training, kind, folder),
        *_sampling(training),
        "## Training",
        _trained_with(training),
        _table(training),
        *(f"- {_plain(str(said))}" for said in training.conventions.get("widened", ())),
        *_unchanged(training.conventions, kind),
        *_limits(training.conventions),
        *_licence(training, kind),
    )
    return _front_matter(training, kind) + "\n" + "\n\n".join(sections) + "\n"


# --- sections ---


def _front_matter(training: Training, kind: Kind) -> str:
    """Nothing of the run's own words: a name cannot break it."""
    lora = kind == "lora"
    fields: dict[str, Any] = dict(training.licence)
    if hub := _hub_id(training):
        fields |= {"base_model": hub, "base_model_relation": "adapter" if lora else "finetune"}
    fields |= {
        "library_name": "peft" if lora else "diffusers",
        "pipeline_tag": "image-to-video",
        "tags": ["stable-video-diffusion", "svdtune", *(["lora"] if lora else [])],
    }
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---\n"


def _summary(training: Training) -> str:
    c = training.conventions
    rate = f" at {number(c['fps'])} frames per second" if "fps" in c else ""
    return (
        f"Stable Video Diffusion, image to video, fine-tuned from {_base_link(training)}: {_plain(_learned(c))}, "
        f"{training.step} steps on clips of {_frames(c)}{rate}."
    )


def _loading(training: Training, kind: Kind, folder: str) -> Iterator[str]:
    yield "## Load it"
    yield _fence(_pipeline_code(folder) if kind == "pipeline" else _lora_code(training, folder))
    yield f"`{json.dumps(folder)}` is this folder: its path, or its id on the hub."
    if kind == "lora" and training.base is None:
        yield (
            '`"base"` stands for the model that was fine-tuned, as a diffusers folder. The sha256 of its UNet is in '
            "the table below; an adapter acts on no other model as it did in training."
        )
    if kind == "lora":
        yield (
            "Merged, it is an ordinary pipeline. Without `.merge_and_unload()` the adapter stays apart, and sampling "
            "takes longer."
        )


def _pipeline_code(folder: str) -> list[str]:
    return [
        "import torch",
        "from diffusers import StableVideoDiffusionPipeline",
        f"pipe = StableVideoDiffusionPipeline.from_pretrained({json.dumps(folder)}, torch_dtype=torch.float32)",
    ]


def _lora_code(training: Training, folder: str) -> list[str]:
    """Three lines behind the imports. Without a dtype transformers would open the base's tower in that of its files."""
    base, here = training.conventions.get("base", {}), json.dumps(folder)
    tiny, bridge = training.base == TINY, bool(training.conventions.get("bridge"))
    where = "TINY" if tiny else json.dumps(training.base or "base")
    options = [
        f"{key}={json.dumps(base[key])}"
        for key, wanted in (("variant", True), ("revision", _hub_id(training)))
        if wanted and base.get(key)
    ]
    tower = ["image_encoder=tower"] if bridge else []
    arguments = ", ".join([where, *tower, *options, "torch_dtype=torch.float32"])
    pipe = f"pipe = StableVideoDiffusionPipeline.from_pretrained({arguments})"
    adapted = f"PeftModel.from_pretrained(pipe.unet, {here})"
    return [
        "import torch",
        "from diffusers import StableVideoDiffusionPipeline",
        "from peft import PeftModel",
        *(["from svdtune.model.facts import TINY  # the base that ships with svdtune"] if tiny else []),
        *(["from transformers import CLIPVisionModelWithProjection"] if bridge else []),
        "",
        *(
            [f'tower = CLIPVisionModelWithProjection.from_pretrained({here}, subfolder="image_encoder")']
            if bridge
            else []
        ),
        pipe,
        *([] if bridge else [f"adapted = {adapted}"]),
        f"pipe.unet = {adapted if bridge else 'adapted'}.merge_and_unload()",
    ]


def _sampling(training: Training) -> Iterator[str]:
    c = training.conventions
    values = [f"{argument}={number(c[key])}" for argument, key in _CALL.items() if key in c]
    if "guidance" in c:
        low, high = c["guidance"]
        values += [f"min_guidance_scale={number(low)}", f"max_guidance_scale={number(high)}"]
    values += [f"decode_chunk_size={training.decode_chunk_size}", 'generator=torch.Generator("cpu").manual_seed(0)']
    fit = _FIT.get(c.get("resize", ""), "load_image({image})")
    image = fit.format(image='"first_frame.png"', width=c.get("width"), height=c.get("height"))
    yield "## Sample a video"
    yield _fence(
        [
            "from diffusers.utils import load_image",
            "from PIL import ImageOps",
            "",
            "if torch.cuda.is_available():",
            '    pipe.to("cuda", torch.float16)',
            f"image = {image}",
            "frames = pipe(",
            "    image,",
            *(f"    {value}," for value in values),
            ").frames[0]",
            "frames[0].save(",
            '    "video.webp", save_all=True, append_images=frames[1:], loop=0,',
            f"    duration={round(1000 / c.get('fps', 7))},  # milliseconds a frame",
            ")",
        ]
    )
    yield (
        "These are the values of training; diffusers takes 1 from `fps` itself. Where a GPU has too little memory, "
        "`pipe.to(torch.float16)` and `pipe.enable_model_cpu_offload()` take the place of the line with `cuda`."
    )


def _trained_with(training: Training) -> str:
    named = ", ".join(f"{_plain(k)} {_plain(v)}" for k, v in training.versions.items() if k != "svdtune")
    version = training.versions.get("svdtune")
    return f"Trained with svdtune{f' {_plain(version)}' if version else ''}{f' on {named}' if named else ''}."


def _table(training: Training) -> str:
    rows = {**_convention_rows(training), **training.options, **_loss_rows(training)}
    return "\n".join(["| | |", "|---|---|", *(f"| {_plain(k)} | {_plain(v)} |" for k, v in rows.items())])


def _convention_rows(training: Training) -> dict[str, str]:
    c = training.conventions
    base = c.get("base", {})
    told: dict[str, tuple[str, Callable[[Any], str]]] = {
        "num_frames": ("clips", lambda _: _frames(c)),
        "fps": ("frames per second", number),
        "resize": ("resized by", str),
        "motion_bucket": ("motion bucket", number),
        "added_time_ids": ("time ids", lambda ids: ", ".join(map(str, ids))),
        "p_mean": ("ln(sigma) of the noise", lambda mean: _normal((mean, c.get("p_std", "?")))),
        "dropout": ("condition dropped", lambda p: f"with probability {number(p)}"),
        "noise_aug": ("ln(strength) of the noise on the first frame", _normal),
        "bridge": ("bridge", lambda bridge: f"{bridge}, from a CLIP tower of another width" if bridge else ""),
    }
    rows = {
        "base": _base_name(training),
        "revision of the base": str(base.get("revision") or "") if _hub_id(training) else "",
        "weights of the base": f"{base['variant']} files" if base.get("variant") else "",
        "sha256 of the base's UNet": str(base.get("unet_sha256", "")),
        "trained": _learned(c),
        "optimizer steps": str(training.step),
        **{label: tell(c[key]) for key, (label, tell) in told.items() if key in c},
    }
    return {label: text for label, text in rows.items() if text}


def _loss_rows(training: Training) -> dict[str, str]:
    if training.losses is None:
        return {}
    first, last = training.losses
    return {"loss on held-out clips": f"{first:.4f} at first, {last:.4f} at last"}


def _unchanged(conventions: Mapping[str, Any], kind: Kind) -> Iterator[str]:
    tower = (
        "The VAE, the scheduler and the image processor. Of the CLIP tower all but its last projection, into which the "
        "trained bridge is folded."
        if conventions.get("bridge")
        else "The VAE, the CLIP image encoder, the scheduler and the image processor."
    )
    yield "## What is the base's, unchanged"
    merged = kind == "pipeline" and conventions.get("adapt") == "lora"
    kept = _MERGED if merged else _KEPT.get(str(conventions.get("adapt")))
    yield "\n".join(f"- {line}" for line in (kept, tower) if line)


def _limits(conventions: Mapping[str, Any]) -> Iterator[str]:
    yield "## Limits"
    yield (
        "It inherits the limits and biases of its base, and those of the clips it was trained on. It has seen "
        f"{_frames(conventions)} only; other lengths, sizes, rates and motion buckets were not trained. It was not "
        "tested for anything beyond what the table says."
    )


def _licence(training: Training, kind: Kind) -> Iterator[str]:
    fields = training.licence
    name, link = fields.get("license_name") or fields.get("license", ""), fields.get("license_link")
    yield "## Licence"
    if name in ("", UNKNOWN["license_name"]):
        yield (
            "The licence of the base could not be read. It binds this model too: add it here and to the metadata above "
            "(`license`, `license_name`, `license_link`) before publishing."
        )
        return
    named = f"[{_plain(name)}]({_url(link)})" if link else _plain(name)
    made = "The adapter" if kind == "lora" else "This model"
    yield f"{made} is made from its base and comes under the base's licence: {named}."
    if link and not link.startswith("https://"):
        yield f"{_plain(link)} is a file of the base: copy it into this folder before publishing."
    if name in STABILITY.values():
        yield (
            "Powered by Stability AI. That licence wants a copy of itself and a Notice file beside every model that is "
            "passed on: read it before publishing."
        )


# --- words and characters ---


def _learned(conventions: Mapping[str, Any]) -> str:
    method = str(conventions.get("adapt", "unknown"))
    return _LEARNED.get(method, method)


def _frames(conventions: Mapping[str, Any]) -> str:
    frames, height, width = (conventions.get(key, "?") for key in ("num_frames", "height", "width"))
    return f"{frames} frames of {width} × {height}"


def _hub_id(training: Training) -> str | None:
    return None if training.base == TINY else training.base


def _base_name(training: Training) -> str:
    return _hub_id(training) or (
        "the tiny SVD that ships with svdtune" if training.base else "a model without a hub id"
    )


def _base_link(training: Training) -> str:
    hub = _hub_id(training)
    return f"[{_plain(hub)}]({HUB}/{hub})" if hub else _base_name(training)


def _fence(lines: Sequence[str]) -> str:
    return "\n".join(["```python", *lines, "```"])


def _plain(text: str) -> str:
    """`text` as markdown that shows it, on one line."""
    shown = "".join(c if c.isprintable() else " " for c in text)
    return _SPECIAL.sub(lambda found: "\\" + found[0], shown)


def _url(text: str) -> str:
    """`text` as the target of a markdown link."""
    return quote(text, safe="/:?#@!$&'*+,;=%" if "://" in text else "/")


def _normal(drawn: Sequence[Any]) -> str:
    return f"normal, mean {number(drawn[0])}, deviation {number(drawn[1])}"
