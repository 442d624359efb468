"""`model.on_mismatch: adapt`: the UNet weights of another model in SVD's UNet, where nothing they compute changes.

Two widenings are known to be safe, and nothing else is ever done:
- conv_in with z input channels where 2 z are needed: the conditioning channels start at zero.
- an image UNet (names of diffusers' UNet2DConditionModel) without temporal layers: the last projection of every temporal path
  and of the time ids starts at zero, so that each frame comes out as the image model would make it, whatever mix_factor is
  (diffusers' SVD has 1e-6 where image models have 1e-5 under the root of some group norms; seen in a tiny model: 1e-4).
The plan is made from names and shapes alone and needs no torch.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod, sqrt
from typing import TYPE_CHECKING

from svdtune.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]

_CONV_IN = "conv_in.weight"
_NEW = re.compile(
    r"(^|\.)(temporal_transformer_blocks|temporal_res_block|time_pos_embed|time_mixer)\.|^add_embedding\."
)
"""What SVD's UNet has and an image UNet lacks."""
_LAST = re.compile(
    r"temporal_res_block\.conv2\.|temporal_transformer_blocks\.\d+\.(ff_in\.net\.2|attn[12]\.to_out\.0|ff\.net\.2)\."
    r"|time_pos_embed\.linear_2\.|^add_embedding\.linear_2\."
)
"""The last layer of each path that is added to what the image model computes."""
_PROJECTION = re.compile(r"\.attentions\.\d+\.proj_(in|out)\.weight$")
_NORM = re.compile(r"\.norm\w*\.weight$")


@dataclass(frozen=True)
class Widening:
    """How each weight of the UNet comes about; every name of the UNet is in exactly one of the first five."""

    same: Mapping[str, str]
    """Weight to the weight of the file it is, up to a shape of the same numbers (1x1 convolutions become matrices)."""
    padded: Mapping[str, str]
    """Weight to the weight of the file that fills its first input channels; the others are zero."""
    zero: Sequence[str]
    like: Mapping[str, str]
    """Inner weight of a temporal layer to the weight of its spatial partner in the file."""
    seeded: Sequence[str]
    """Inner weights without such a partner: norms at 1, biases at 0, matrices drawn from the seed. Nothing sees them at first."""
    shapes: Shapes = field(repr=False)
    """Shapes of the UNet."""
    said: Sequence[str] = ()
    """One sentence for each widening."""

    @property
    def must_learn(self) -> list[str]:
        """Weights that do nothing until they are trained."""
        return [*self.padded, *self.zero]


def plan_widening(expected: Shapes, got: Shapes) -> Widening | None:
    """The widening from the weights `got` to the UNet `expected` (shape by name); None where none is known to be safe.

    None also when nothing needs to be widened. Every weight of the file must find its place.
    """
    if dict(expected) == dict(got):
        return None
    # Some temporal layers there and others missing: a damaged video model, not an image model.
    image = not any(_NEW.search(name) or ".spatial_res_block." in name for name in got)
    old = [name for name in expected if not (image and _NEW.search(name))]
    sources = {name: name.replace(".spatial_res_block.", ".") if image else name for name in old}
    if set(sources.values()) != set(got):
        return None
    same = {name: source for name, source in sources.items() if _same_numbers(name, expected[name], got[source])}
    padded = {name: source for name, source in sources.items() if name not in same}
    if any(not _half_conv_in(name, expected, got[source]) for name, source in padded.items()):
        return None
    new = [name for name in expected if name not in sources]
    zero = [name for name in new if _LAST.search(name)]
    partners = {name: _partner(name) for name in new if name not in zero}
    like = {name: partner for name, partner in partners.items() if got.get(partner) == expected[name]}
    seeded = [name for name in partners if name not in like]
    return Widening(same, padded, zero, like, seeded, expected, _said(expected, bool(padded), len(new)))


def apply_widening(widening: Widening, tensors: Mapping[str, Tensor], *, seed: int) -> dict[str, Tensor]:
    """The weights of the UNet, float32 on the CPU, from those of the file. The drawn ones depend on `seed` alone."""
    import torch

    def ready(name: str, source: str) -> Tensor:
        return tensors[source].float().reshape(widening.shapes[name]).clone()

    generator = torch.Generator().manual_seed(seed)
    made = {name: ready(name, source) for name, source in {**widening.same, **widening.like}.items()}
    made |= {name: torch.zeros(widening.shapes[name]) for name in widening.zero}
    for name, source in widening.padded.items():
        made[name] = torch.zeros(widening.shapes[name])
        made[name][:, : tensors[source].shape[1]] = tensors[source].float()
    for name in sorted(widening.seeded):
        made[name] = _start(name, widening.shapes[name], generator)
    return {name: made[name] for name in widening.shapes}


def require_learning(widening: Widening, trained: Collection[str], method: str) -> None:
    """Raise ConfigError when weights that the widening set to zero are frozen: they would stay zero for the whole run."""
    still = [name for name in widening.must_learn if name not in trained]
    if still:
        told = "the conditioning image" if still[0] == _CONV_IN else "what it is for"
        raise ConfigError(
            f"adapt.method: got {method}, expected full: model.on_mismatch=adapt starts {len(still)} weights of the UNet at zero "
            f"that this method does not train ({', '.join(still[:3])}{', ...' if len(still) > 3 else ''}). {still[0]} would stay "
            f"as it is, and {told} would have no effect in the whole run.",
            ("adapt.method=full",),
        )


def _same_numbers(name: str, expected: tuple[int, ...], got: tuple[int, ...]) -> bool:
    """Equal shapes, or Stable Diffusion 1.x's 1x1 convolution for a matrix."""
    return expected == got or (bool(_PROJECTION.search(name)) and got == (*expected, 1, 1))


def _half_conv_in(name: str, expected: Shapes, got: tuple[int, ...]) -> bool:
    """An image model's conv_in: as many channels as the model gives, where noisy and conditioning latents come side by side."""
    wanted, z = expected[name], expected.get("conv_out.weight", (0,))[0]
    return name == _CONV_IN and len(got) == 4 and got[1] == z and wanted == (got[0], 2 * z, *got[2:])


def _partner(name: str) -> str:
    """The weight in an image model that does for space what `name` does for time; '' for none."""
    if ".temporal_transformer_blocks." in name:
        name = name.replace(".temporal_transformer_blocks.", ".transformer_blocks.")
        return name.replace(".norm_in.", ".norm3.").replace(".ff_in.", ".ff.")
    # Spatial and temporal convolutions share the time embedding; their norms see other activations.
    return name.replace(".temporal_res_block.", ".") if ".temporal_res_block.time_emb_proj." in name else ""


def _start(name: str, shape: tuple[int, ...], generator: object) -> Tensor:
    import torch

    if name.endswith("mix_factor"):
        return torch.full(shape, 0.5)
    if _NORM.search(name):
        return torch.ones(shape)
    if name.endswith(".bias"):
        return torch.zeros(shape)
    return torch.randn(shape, generator=generator) / sqrt(prod(shape[1:]))  # pyright: ignore[reportCallIssue, reportArgumentType]


def _said(expected: Shapes, conv_in: bool, new: int) -> list[str]:
    z2 = expected[_CONV_IN][1] if conv_in else 0
    said = [
        f"model.on_mismatch=adapt: conv_in has {z2 // 2} input channels in the file and {z2} in SVD's UNet; the {z2 // 2} for the "
        "conditioning latents start at zero, so the first frame has no effect until training gives it one."
    ] if conv_in else []  # fmt: skip
    if new:
        said.append(
            f"model.on_mismatch=adapt: the file is an image model; the {new} weights of temporal layers and time ids that it lacks "
            "start so that they change nothing: every frame is what the image model makes of it, until training ties them together. "
            "Head counts show in no shape: num_attention_heads in unet/config.json must be the image model's "
            "(8 in all of Stable Diffusion 1.x; 5, 10, 20, 20 in 2.x)."
        )
    return said
