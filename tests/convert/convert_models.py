"""Small SVD models as folders, files and runs, written without the code under test."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from svdtune.checkpoint.beside import write_beside
from svdtune.checkpoint.export import Base, export_run
from svdtune.checkpoint.state import save_ema, save_trained
from svdtune.checkpoint.store import publish
from svdtune.checkpoint.training import public_name
from svdtune.config.load import load_config, resolved_yaml
from svdtune.model.adapt import adapt
from svdtune.model.facts import FILES, STEMS
from svdtune.model.load import load_model
from svdtune.model.original import PREFIXES, to_original
from svdtune.sample.run import open_checkpoint, trained_model
from svdtune.trainer.build import conventions
from svdtune.trainer.optimizer import make_ema

PARTS = ("unet", "vae", "image_encoder")
UNET: dict[str, Any] = {
    "block_out_channels": [64, 128], "num_attention_heads": [1, 2], "cross_attention_dim": 24, "addition_time_embed_dim": 16,
    "projection_class_embeddings_input_dim": 48, "layers_per_block": 1, "in_channels": 8, "out_channels": 4, "num_frames": 25,
    "down_block_types": ["CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"],
    "up_block_types": ["UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"],
}  # fmt: skip
VAE: dict[str, Any] = {
    "block_out_channels": [32, 64], "layers_per_block": 1, "down_block_types": ["DownEncoderBlock2D"] * 2, "latent_channels": 4,
    "scaling_factor": 0.2,
}  # fmt: skip
CLIP: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 16,
    "image_size": 48, "projection_dim": 24,
}  # fmt: skip
PLAIN_CLIP: dict[str, Any] = {
    **CLIP,
    "hidden_size": 768,
    "num_attention_heads": 12,
    "num_hidden_layers": 1,
    "hidden_act": "gelu",
}
"""A tower whose head count follows from its width, so that a file needs no notes."""
SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler", "prediction_type": "v_prediction", "use_karras_sigmas": True, "sigma_max": 600.0,
    "sigma_min": 0.002, "timestep_type": "continuous", "timestep_spacing": "leading", "steps_offset": 1, "beta_start": 0.00085,
    "beta_end": 0.012, "beta_schedule": "scaled_linear", "interpolation_type": "linear", "num_train_timesteps": 1000,
}  # fmt: skip
FEATURE_EXTRACTOR = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711], "do_resize": True,
    "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48},
}  # fmt: skip
MODEL_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@cache
def _networks(seed: int, unet: str, vae: str, clip: str) -> dict[str, Any]:
    torch.manual_seed(seed)
    found = {
        "unet": UNetSpatioTemporalConditionModel(**json.loads(unet)),
        "vae": AutoencoderKLTemporalDecoder(**json.loads(vae)),
        "image_encoder": CLIPVisionModelWithProjection(CLIPVisionConfig(**json.loads(clip))),
    }
    with torch.no_grad():
        for network in found.values():
            for name, parameter in network.named_parameters():
                if "norm" in name or "mix_factor" in name or name.endswith("bias"):
                    parameter.add_(torch.randn_like(parameter) * 0.3)  # new networks have ones and zeros there
    return found


def make_folder(
    folder: Path, dtype: torch.dtype = torch.float32, *, seed: int = 0, variant: str | None = None, quant: bool = False, **changed: Any
) -> Path:  # fmt: skip
    """A random SVD as a diffusers folder; with `quant` its VAE has a `quant_conv` that does something."""
    configs = [json.dumps({**own, **changed.get(part, {})}) for part, own in zip(PARTS, (UNET, VAE, CLIP), strict=True)]
    networks = _networks(seed, *configs)
    for part, network in networks.items():
        made = copy.deepcopy(network)
        if part == "vae" and not quant:
            made.quant_conv.weight.data = torch.eye(8)[:, :, None, None].clone()
            made.quant_conv.bias.data.zero_()
        made.to(dtype).save_pretrained(folder / part, variant=variant)
    for part, content in (("scheduler", SCHEDULER), ("feature_extractor", FEATURE_EXTRACTOR)):
        (folder / FILES[part]).parent.mkdir()
        (folder / FILES[part]).write_text(json.dumps(content))
    return folder


def jsons_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {part: json.loads((folder / file).read_text()) for part, file in FILES.items()}


def folder_tensors(folder: Path, variant: str | None = None) -> dict[str, torch.Tensor]:
    """Of all parts, as `part/name`."""
    end = f".{variant}.safetensors" if variant else ".safetensors"
    return {
        f"{part}/{name}": tensor
        for part in PARTS
        for name, tensor in load_file(folder / part / f"{STEMS[part]}{end}").items()
    }


def originals(folder: Path) -> dict[str, torch.Tensor]:
    """The folder's tensors under the names of the single file."""
    found = {}
    for part in PARTS:
        weights = load_file(folder / part / f"{STEMS[part]}.safetensors")
        plan = to_original(part, jsons_of(folder)[part], weights, fold=False)
        assert not plan.unknown
        for name, take in plan.takes.items():
            found[PREFIXES[part] + name] = take.apply(weights[own] for own in take.sources).contiguous().clone()
    return found


def make_file(
    path: Path, folder: Path, dtype: torch.dtype | None = None, *, notes: dict | None = None, changed: dict | None = None
) -> Path:  # fmt: skip
    """The folder as a single file; notes say its configs unless they are given. `changed` tensors: None takes one away."""
    tensors: dict[str, Any] = {name: tensor.to(dtype or tensor.dtype) for name, tensor in originals(folder).items()}
    tensors |= changed or {}
    noted = {"configs": jsons_of(folder)} if notes is None else notes
    metadata = {"format": "pt", **({"svdtune": json.dumps(noted)} if noted else {})}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path, metadata)
    return path


def change_part(folder: Path, part: str, changed: dict[str, torch.Tensor | None]) -> None:
    """Give a part other tensors; None takes one away."""
    path = folder / part / f"{STEMS[part]}.safetensors"
    tensors = {**load_file(path), **changed}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path, {"format": "pt"})


def bits(tensor: torch.Tensor) -> tuple[Any, ...]:
    """-0.0 and each NaN count."""
    return tensor.dtype, tuple(tensor.shape), bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    """Names whose tensors are not equal to the bit."""
    return {
        name for name in one.keys() | other.keys()
        if name not in one or name not in other or bits(one[name]) != bits(other[name])
    }  # fmt: skip


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def notes_of(path: Path) -> dict[str, Any]:
    return json.loads(metadata_of(path)["svdtune"])


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def make_run(run: Path, base: Path | str, *overrides: str) -> Path:
    """A run folder without checkpoints."""
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(f"run: {{name: {run.name}}}\n")
    options = [
        f"model.pretrained={base}", "model.variant=null", "data.num_frames=4", "data.height=16", "data.width=24", "data.fps=7.5",
        "data.motion_bucket=50", "adapt.rank=2", "train.precision=no", "validation.inference_steps=2", *overrides,
    ]  # fmt: skip
    (run / "config.resolved.yaml").write_text(resolved_yaml(load_config(run / "config.yaml", options)))
    return run


def save(run: Path, step: int, *, ema: bool = False) -> Path:
    """What the trainer saves after `step` steps, which moved each trained weight somewhere; averages are elsewhere again."""
    config = load_config(run / "config.resolved.yaml")
    model = load_model(config.model, bridge=config.conditioning.bridge is not None)
    trained = adapt(model.unet, config.adapt, dtype=torch.float32, seed=0)
    _move(trained, step)

    def write(folder: Path) -> None:
        save_trained(folder, trained, lora=config.adapt.method == "lora")
        (folder / "config.yaml").write_text((run / "config.resolved.yaml").read_text())
        if ema:
            config.train.ema = True
            _move(trained, 1000 + step)
            save_ema(folder, make_ema(config.train, trained.values()), trained)

    return publish(run / "checkpoints", step, write, conventions=conventions(config, model), config_hash="", keep=9)


def _move(trained: dict[str, Any], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def export(checkpoint: Path, destination: Path) -> Path:
    """As svdtune/trainer/run.py does at the end of a run."""
    opened = open_checkpoint(checkpoint)
    model, config = trained_model(opened, torch.float32), opened.config
    source, lora = model.configs.source, config.adapt.method == "lora"
    name = public_name(config.model.pretrained, source) or source.name
    base = Base(name, source, config.model.variant, widened=model.widening is not None)

    def beside(folder: Path) -> None:
        kind = "lora" if lora else "pipeline"
        write_beside(folder, checkpoint=checkpoint, source=source, kind=kind, name=destination.name)

    half = config.model.variant == "fp16"
    export_run(destination, base=base, unet=model.unet, lora=lora, half=half, beside=beside)
    return destination


def unet_input(d: int = 24) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return {
        "sample": normal(1, 3, 8, 8, 16), "timestep": normal(1), "encoder_hidden_states": normal(1, 1, d),
        "added_time_ids": normal(1, 3).abs(),
    }  # fmt: skip


@torch.no_grad()
def output(unet: Any) -> torch.Tensor:
    return unet.eval()(**unet_input()).sample


def off_by(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def everything_said(path: Path) -> str:
    """All text that a published file or folder shows: names, headers and every file that is no weights."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return "\n".join(
        f"{file.name}\n"
        + (
            json.dumps(metadata_of(file))
            if file.suffix == ".safetensors"
            else file.read_bytes().decode("utf-8", "replace")
        )
        for file in files
    )
