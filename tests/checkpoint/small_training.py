"""Small things that train, for the tests of the training state."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import UNetSpatioTemporalConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import Adafactor

UNET = json.loads((Path(__file__).parents[1] / "assets/unet_config.json").read_text())


def tiny_unet(seed: int = 0) -> UNetSpatioTemporalConditionModel:
    torch.manual_seed(seed)
    return UNetSpatioTemporalConditionModel.from_config(UNET)


def unet_input(seed: int = 5) -> dict[str, torch.Tensor]:
    """b=2, t=3, 8 channels, 8 x 16 latents."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return {
        "sample": normal(2, 3, 8, 8, 16),
        "timestep": normal(2),
        "encoder_hidden_states": normal(2, 1, UNET["cross_attention_dim"]),
        "added_time_ids": normal(2, 3).abs(),
    }


def inject_lora(unet: nn.Module, rank: int = 4, dora: bool = False, seed: int = 1) -> None:
    """Adapters with non-zero B, as after training, on every attention of the spatial and temporal blocks."""
    unet.requires_grad_(False)
    torch.manual_seed(seed)
    targets = [n for n, _ in unet.named_modules() if n.endswith(("attn1.to_q", "attn1.to_v", "attn2.to_out.0"))]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, use_dora=dora, target_modules=targets, init_lora_weights=False)
    inject_adapter_in_model(config, unet, adapter_name="default")


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


class EightBit(torch.optim.Optimizer):
    """Keeps its state as bitsandbytes does: uint8 codes, one code book shared by all, absmax, an int step."""

    def __init__(self, parameters, lr: float = 1e-2) -> None:
        super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.999)})
        self.code_book = torch.linspace(-1, 1, 256)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    codes = torch.full(parameter.shape, 127, dtype=torch.uint8)
                    state.update(step=0, state1=codes, qmap1=self.code_book, absmax1=torch.ones(1))
                state["step"] += 1
                moment = state["qmap1"][state["state1"].long()] * state["absmax1"]
                moment = moment * group["betas"][0] + parameter.grad * (1 - group["betas"][0])
                state["absmax1"] = moment.abs().max().reshape(1)
                scaled = moment / state["absmax1"]
                state["state1"] = ((scaled + 1) * 127.5).round().to(torch.uint8)
                parameter.sub_(group["lr"] * moment / (1 + state["step"]))


OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, betas=(0.8, 0.97), weight_decay=0.1),
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, fused=True),
    "adafactor": lambda parameters: Adafactor(parameters, lr=1e-2, relative_step=False, scale_parameter=True),
    "adafactor relative": lambda parameters: Adafactor(parameters, lr=None, relative_step=True, beta1=0.9),
    "8-bit": EightBit,
}


class Training:
    """A small network in training: parameters, optimizer, schedule, EMA; step n sees data made from n."""

    def __init__(self, optimizer: str = "adamw", width: int = 6) -> None:
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(4, width), nn.SiLU(), nn.Linear(width, 2), nn.LayerNorm(2))
        self.model[1].register_parameter("unused", nn.Parameter(torch.ones(2), requires_grad=optimizer != "8-bit"))
        self.named = trained(self.model)
        self.optimizer = OPTIMIZERS[optimizer](list(self.named.values()))
        if self.optimizer.param_groups[0]["lr"] is not None:
            self.scheduler = get_scheduler("cosine", self.optimizer, num_warmup_steps=3, num_training_steps=20)
        self.ema = EMAModel(self.named.values(), decay=0.99)

    def run(self, first: int, last: int) -> list[float]:
        losses = []
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            loss = self.model(torch.randn(8, 4, generator=generator)).square().sum(-1).sub(1).square().mean()
            loss = loss + (self.model[0].weight - 0.1 * step).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            if hasattr(self, "scheduler"):
                self.scheduler.step()
            self.ema.step(self.named.values())
            losses.append(loss.item())
        return losses
