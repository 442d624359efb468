"""One model to sample: a base, with the weights of a run or not, with a LoRA or not. Found and checked, not loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdtune.checkpoint.files import load_json
from svdtune.checkpoint.manifest import file_facts
from svdtune.config.schema import Model
from svdtune.contracts import ModelFacts
from svdtune.model.facts import FILES, ModelConfigs, model_facts
from svdtune.model.source import model_source, read_configs, weights_hash
from svdtune.sample.run import Checkpoint, trained_model

if TYPE_CHECKING:
    import torch

    from svdtune.checkpoint.lora import Lora
    from svdtune.model.load import ModelParts


@dataclass(frozen=True)
class Base:
    """A model without anything trained on it."""

    model: Model
    configs: ModelConfigs
    bridge: bool = False
    """conditioning.bridge of the run: its CLIP tower has another width than the UNet's cross-attention."""
    seed: int = 0
    """run.seed: the start values of what no file holds."""

    @cached_property
    def unet_sha256(self) -> str:
        """What a checkpoint and a LoRA of ours know their base by. Reads all of the UNet."""
        return weights_hash(self.configs.source, "unet", self.model.variant)


@dataclass(frozen=True)
class Subject:
    """What one row of a comparison shows."""

    label: str
    source: str
    """Name of what it was read from; no path."""
    base: Base
    conventions: Mapping[str, Any] = field(default_factory=dict)
    """How it was trained; empty where that is not known."""
    checkpoint: Checkpoint | None = None
    lora: Lora | None = None
    scale: float | None = None
    """How much the LoRA acts; None: as trained."""

    @cached_property
    def configs(self) -> ModelConfigs:
        """The JSON of all parts, of the tower that really sees the picture."""
        tower = _tower(self.lora)
        if tower is None:
            return self.base.configs
        return replace(self.base.configs, image_encoder=load_json(tower / FILES["image_encoder"]))

    @cached_property
    def facts(self) -> ModelFacts:
        """Raises ModelError when the parts do not belong together."""
        return model_facts(self.configs, bridge=self.base.bridge)

    @property
    def is_lora_run(self) -> bool:
        return self.checkpoint is not None and self.checkpoint.config.adapt.method == "lora"

    def load(self, dtype: torch.dtype) -> ModelParts:
        """The networks on the CPU, frozen weights of the UNet in `dtype`. Raises ModelError, CheckpointError."""
        from svdtune.checkpoint.lora import merge_lora, put_lora, scale_lora

        if self.lora is None:
            parts = trained_model(self.checkpoint, dtype) if self.checkpoint else self._load_base()
            if self.checkpoint is None:
                _cast(parts, dtype)
            elif self.scale is not None:
                scale_lora(parts.unet, self.scale)
            return parts
        import torch

        parts = trained_model(self.checkpoint, torch.float32) if self.checkpoint else self._load_base()
        if self.is_lora_run:
            merge_lora(parts.unet)  # a layer holds one adapter
            vars(parts.unet).pop("peft_config")
        _cast(parts, dtype)
        put_lora(parts.unet, self.lora, scale=1.0 if self.scale is None else self.scale)
        return parts

    def origin(self) -> dict[str, Any]:
        """What a written video says of its model; the first call may read the whole UNet."""
        weights = self.checkpoint.weights if self.checkpoint else self.base.unet_sha256
        return {
            "label": self.label,
            "source": self.source,
            "checkpoint": self.checkpoint.folder.name if self.checkpoint else None,
            "weights": weights,
            "variant": self.base.model.variant,
            "lora": self.lora.path.resolve().name if self.lora else None,
            "lora_sha256": file_facts(lora_file(self.lora.path)).sha256 if self.lora else None,
            "lora_scale": (1.0 if self.scale is None else self.scale) if self.lora or self.is_lora_run else None,
        }

    def _load_base(self) -> ModelParts:
        from svdtune.model.load import ModelParts, load_model, load_part

        base, tower = self.base, _tower(self.lora)
        if tower is None:
            return load_model(base.model, bridge=base.bridge, seed=base.seed)
        variant = base.model.variant
        return ModelParts(
            unet=load_part(base.configs, "unet", variant),
            vae=load_part(base.configs, "vae", variant),
            image_encoder=load_part(replace(self.configs, source=tower), "image_encoder", None),
            configs=self.configs,
            facts=self.facts,
        )


def run_base(checkpoint: Checkpoint) -> Base:
    """The base of a run."""
    config = checkpoint.config
    configs = read_configs(model_source(config.model))
    return Base(config.model, configs, config.conditioning.bridge is not None, config.run.seed)


def lora_file(path: Path) -> Path:
    """The weights of a LoRA file or of peft's adapter folder."""
    return path / "adapter_model.safetensors" if path.is_dir() else path


def _tower(lora: Lora | None) -> Path | None:
    """An adapter folder that holds the CLIP tower with a run's bridge folded in; it replaces the base's."""
    return lora.path if lora and (lora.path / FILES["image_encoder"]).is_file() else None


def _cast(parts: ModelParts, dtype: torch.dtype) -> None:
    for parameter in parts.unet.parameters():
        parameter.data = parameter.data.to(dtype)
