"""What a model folder's JSON says that no weight shows: scheduler, head counts, scaling factor, keys left to class defaults. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from svdtune.guards.findings import Finding
from svdtune.model.facts import CLASSES, FILES, IMAGE_UNET, PACKAGE, class_name

_FROM_RELEASE = "Copy the file from the model's own release."
_DEFAULTS = {
    "scheduler": {"prediction_type": "epsilon", "timestep_type": "discrete", "use_karras_sigmas": False,
                  "sigma_min": None, "sigma_max": None},
    "unet": {"num_attention_heads": [5, 10, 20, 20], "block_out_channels": [320, 640, 1280, 1280]},
    "image_encoder": {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12, "patch_size": 32, "hidden_act": "quick_gelu"},
}  # fmt: skip
"""What the classes of diffusers and transformers take where a key is missing."""
_NEEDED = {
    "unet": ("in_channels", "out_channels", "cross_attention_dim", "addition_time_embed_dim", "projection_class_embeddings_input_dim",
             "num_frames"),
    "vae": ("in_channels", "latent_channels", "block_out_channels", "scaling_factor"),
    "image_encoder": ("projection_dim", "image_size"),
}  # fmt: skip
_CLIP_DEFAULT = "Without it transformers builds ViT-B/32 (width 768, patches of 32, projection 512); SVD has ViT-H/14 (1280, 14, 1024)."
_SCHEDULER_WHY = {
    "prediction_type": "The UNet's output would be read as something else than v, and every sampled video would be wrong.",
    "timestep_type": "The sampler would give the UNet t = 999...0 where it learned ln(sigma) / 4, from 1.6 to -1.6.",
    "use_karras_sigmas": "The noise levels would come from the betas: sampling would start at about 12 instead of 700.",
    "sigma_max": "Sampling would start at the betas' largest noise level or at this one instead of 700, with far too little noise.",
    "sigma_min": "Sampling would end at another noise level than the one SVD was trained for.",
}


def read_jsons(folder: Path) -> tuple[dict[str, dict[str, Any]], list[Finding]]:
    """The readable JSON of each part, and CKP201, CKP215, CKP219 for those that are not there or of another class."""
    parts, findings = {}, []
    for name, file in FILES.items():
        content = _read(folder, name, folder / file)
        if isinstance(content, Finding):
            findings.append(content)
        elif wrong := _wrong_class(name, content, folder / file):
            findings.append(wrong)
        else:
            parts[name] = content
    return parts, findings


def check_json(folder: Path, parts: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """CKP213-217 and CKP220 on the parts that could be read."""
    return [found for part in parts for found in check_part_json(folder / FILES[part], part, parts[part])]


def check_part_json(path: Path, part: str, config: Mapping[str, Any]) -> list[Finding]:
    """The same for the JSON of one part."""
    checks = {
        "unet": _unet_heads,
        "image_encoder": _clip,
        "vae": _scaling,
        "feature_extractor": _pictures,
        "scheduler": _scheduler,
    }
    return [*_needed(path, part, config), *checks[part](path, config)]


def shipped(part: str) -> dict[str, Any]:
    """The JSON of SVD-XT's `part`, as it ships with svdtune."""
    return json.loads((PACKAGE / "facts" / "svd-xt" / FILES[part]).read_text())


def _read(folder: Path, name: str, path: Path) -> dict[str, Any] | Finding:
    if not path.is_file():
        return _absent(folder, name, path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return Finding("CKP201", "error", str(path), f"not valid JSON: {error}", "a JSON object", fix=_FROM_RELEASE)
    if not isinstance(content, dict):
        return Finding(
            "CKP201", "error", str(path), f"a JSON {type(content).__name__}", "a JSON object", fix=_FROM_RELEASE
        )
    return content


def _absent(folder: Path, name: str, path: Path) -> Finding:
    got = "no such file" if path.parent.is_dir() else f"there is no folder {path.parent.name}/ in {folder}"
    if name == "image_encoder":
        return Finding(
            "CKP215", "error", str(path), got, "the config of SVD's CLIP tower", _CLIP_DEFAULT, _FROM_RELEASE
        )
    if name == "feature_extractor":
        why = "It holds the mean and standard deviation that CLIP's pictures are normalised with."
        return Finding("CKP219", "error", str(path), got, "CLIP's preprocessing", why, _FROM_RELEASE)
    if name == "scheduler":
        why = "Without it diffusers takes a schedule of image models: t = 999...0 and far less noise than SVD's 700."
        return Finding("CKP214", "error", str(path), got, "SVD's EulerDiscreteScheduler", why, _FROM_RELEASE)
    why = "Without its config a part would be built from class defaults (the VAE's are one level of 64 channels)."
    return Finding("CKP201", "error", str(path), got, f"the config of {CLASSES[name]}", why, _FROM_RELEASE)


def _wrong_class(name: str, content: Mapping[str, Any], path: Path) -> Finding | None:
    wanted = CLASSES.get(name)
    got = class_name(content) or wanted
    if wanted is None or got == wanted:
        return None
    if name == "scheduler":
        why = "SVD is sampled with continuous noise levels from 700 to 0.002, which this class does not do here."
        return Finding("CKP214", "error", str(path), f"class {got}", wanted, why, _FROM_RELEASE)
    if got == "AutoencoderKL":
        why = "This VAE decodes each frame for itself: an image model's, or SVD's image_decoder variant."
        return Finding(
            "CKP207", "error", str(path), f"class {got}", wanted, why, "Take the vae folder of the SVD release."
        )
    why, fix = "This part is not of Stable Video Diffusion.", "Take the whole folder of an SVD release."
    if got == IMAGE_UNET:
        why = "This is the UNet of an image model: it has no temporal layers."
        fix += " To train video layers on image weights, see model.on_mismatch in `svdtune config show`."
    return Finding("CKP207", "error", str(path), f"class {got}", wanted, why, fix)


def _needed(path: Path, name: str, config: Mapping[str, Any]) -> list[Finding]:
    missing = [key for key in _NEEDED.get(name, ()) if key not in config]
    if not missing:
        return []
    why = {
        "vae": "diffusers would take its class defaults (block_out_channels (64,): one level instead of four)."
        if missing != ["scaling_factor"]
        else "diffusers would take its class default, which need not be this VAE's.",
        "image_encoder": _CLIP_DEFAULT,
    }.get(name, "A class default need not be this model's number.")
    code = "CKP215" if name == "image_encoder" else "CKP216"
    return [
        Finding(
            code,
            "error",
            str(path),
            f"no {', '.join(missing)}",
            "every number that shapes follow from",
            why,
            _FROM_RELEASE,
        )
    ]


def _unet_heads(path: Path, config: Mapping[str, Any]) -> list[Finding]:
    """CKP213: SVD's heads are 64 wide at every level, and no shape of a weight shows it."""
    widths = config.get("block_out_channels", _DEFAULTS["unet"]["block_out_channels"])
    heads = config.get("num_attention_heads", _DEFAULTS["unet"]["num_attention_heads"])
    told = "" if "num_attention_heads" in config else " (the key is missing: class default)"
    widths = widths if isinstance(widths, list) else [widths]
    heads = [heads] * len(widths) if isinstance(heads, int) else heads if isinstance(heads, list) else [heads]
    if not all(isinstance(n, int) and n > 0 for n in [*widths, *heads]):
        got, expected = f"{heads} for widths {widths}", "whole numbers from 1 up"
        return [Finding("CKP213", "error", f"{path}: num_attention_heads", got, expected, fix=_FROM_RELEASE)]
    released = shipped("unet")
    if len(heads) == len(widths) and any(width % count for width, count in zip(widths, heads, strict=True)):
        got, expected = f"{heads} for widths {widths}", "numbers of heads that divide the widths"
        why = "The attention would be made narrower than its level, and its weights would have other shapes than the file's."
        return [Finding("CKP213", "error", f"{path}: num_attention_heads", got, expected, why, _FROM_RELEASE)]
    if widths == released["block_out_channels"]:
        expected, right = str(released["num_attention_heads"]), list(heads) == released["num_attention_heads"]
    else:
        expected = f"{len(widths)} numbers that give heads of one width at every level"
        right = len(heads) == len(widths) and len({w / h for w, h in zip(widths, heads, strict=True)}) == 1
    if right:
        return []
    dims = ", ".join(f"{w / h:g}" for w, h in zip(widths, heads, strict=False))
    why = f"Heads would be {dims} wide. All weights fit any number of heads, so they load and attend wrongly, without an error."
    severity = "error" if widths == released["block_out_channels"] or told or len(heads) != len(widths) else "warning"
    return [
        Finding(
            "CKP213", severity, f"{path}: num_attention_heads", f"{list(heads)}{told}", expected, why, _FROM_RELEASE
        )
    ]


def _clip(path: Path, config: Mapping[str, Any]) -> list[Finding]:
    defaults, released = _DEFAULTS["image_encoder"], shipped("image_encoder")
    got = {key: config.get(key, default) for key, default in defaults.items()}
    findings = []
    if not all(isinstance(got[key], int) and got[key] > 0 for key in ("hidden_size", "num_attention_heads")):
        where, told = (
            f"{path}: num_attention_heads",
            f"{got['num_attention_heads']} for hidden_size {got['hidden_size']}",
        )
        return [Finding("CKP213", "error", where, told, "whole numbers from 1 up", fix=_FROM_RELEASE)]
    for key in ("num_attention_heads", "hidden_act"):
        is_vit_h = all(got[k] == released[k] for k in ("hidden_size", "num_hidden_layers", "patch_size"))
        divides = key != "num_attention_heads" or got["hidden_size"] % got[key] == 0
        if divides and (not is_vit_h or got[key] == released[key]):
            continue
        told = "" if key in config else " (the key is missing: class default)"
        expected = str(released[key]) if is_vit_h else f"a divisor of hidden_size = {got['hidden_size']}"
        why = "No shape of a weight shows it: they load, and the embedding of every first frame is wrong."
        findings.append(Finding("CKP213", "error", f"{path}: {key}", f"{got[key]}{told}", expected, why, _FROM_RELEASE))
    return findings


def _scaling(path: Path, config: Mapping[str, Any]) -> list[Finding]:
    """CKP217: only where the VAE has SVD's shapes is its factor known."""
    released = shipped("vae")
    same = all(
        config.get(key) == released[key] for key in ("block_out_channels", "latent_channels", "layers_per_block")
    )
    got = config.get("scaling_factor")
    if not same or got is None or got == released["scaling_factor"]:
        return []
    why = "Latents are multiplied by it: the UNet would see another spread of values than the one its noise levels are made for."
    return [
        Finding(
            "CKP217", "error", f"{path}: scaling_factor", str(got), str(released["scaling_factor"]), why, _FROM_RELEASE
        )
    ]


def _pictures(path: Path, config: Mapping[str, Any]) -> list[Finding]:
    """CKP220: mean and standard deviation of CLIP's pictures; every CLIP of SVD's kind has the same."""
    released = shipped("feature_extractor")
    wrong = [key for key in ("image_mean", "image_std") if not _close(config.get(key), released[key])]
    if not wrong:
        return []
    numbers = all(_numbers(config.get(key), len(released[key])) for key in wrong)
    why = "The first frame is normalised with them before CLIP sees it: " + (
        "with others the embedding is of a picture with shifted colours, without an error."
        if numbers
        else "without three numbers each nothing can be normalised."
    )
    return [
        Finding(
            "CKP220", "error", f"{path}: {', '.join(wrong)}", ", ".join(str(config.get(key, "missing")) for key in wrong),
            ", ".join(str(released[key]) for key in wrong), why, _FROM_RELEASE,
        )
    ]  # fmt: skip


def _numbers(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(isinstance(item, int | float) for item in value)


def _close(value: Any, expected: list[float]) -> bool:
    return _numbers(value, len(expected)) and all(abs(a - b) < 1e-4 for a, b in zip(value, expected, strict=True))


def _scheduler(path: Path, config: Mapping[str, Any]) -> list[Finding]:
    """CKP214: one finding for all keys of the sampler that are not SVD's."""
    released, defaults = shipped("scheduler"), _DEFAULTS["scheduler"]
    got = {key: config.get(key, default) for key, default in defaults.items()}
    wrong = [key for key in _SCHEDULER_WHY if got[key] != released[key]]
    if not wrong:
        return []

    def said(key: str) -> str:
        return f"{key}={json.dumps(got[key])}" + ("" if key in config else " (missing: class default)")

    return [
        Finding(
            "CKP214", "error", str(path), ", ".join(said(key) for key in wrong),
            ", ".join(f"{key}={json.dumps(released[key])}" for key in wrong),
            " ".join(_SCHEDULER_WHY[key] for key in wrong),
            "Copy scheduler/scheduler_config.json from the SVD release.",
        )
    ]  # fmt: skip
