"""The names of the original single file (svd_xt.safetensors) and of diffusers, as one table of rules that is read both ways.

Original: Stability-AI/generative-models, VideoUNet, AutoencodingEngine with VideoDecoder, open_clip's VisionTransformer.
The rules follow from a part's diffusers config, for any number of blocks and layers; `derive.py` makes that config from shapes.
Needs no torch until tensors are moved.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from svdtune.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "image_encoder": "conditioner.embedders.0.open_clip.model.visual.",
}
"""What stands before the names of each part in the single file."""
TEMPORAL_VAE = "AutoencoderKLTemporalDecoder"
QUANT = "quant_conv"

How = Literal["same", "matrix", "transposed", "joined"]
Move = Literal[
    "same", "to_matrix", "to_convolution", "transposed", "third_0", "third_1", "third_2", "joined", "identity", "zeros", "folded"
]  # fmt: skip


@dataclass(frozen=True)
class Rule:
    """One path on both sides; all that stands below it keeps its name."""

    original: str
    diffusers: tuple[str, ...]
    """One path; three (query, key, value) for a fused projection."""
    how: How = "same"
    """matrix: the original's `weight` is a 1x1 convolution. transposed: the matrix acts from the other side. joined: fused."""


@dataclass(frozen=True)
class Take:
    """How one tensor of the target is made from tensors of the source."""

    sources: tuple[str, ...]
    move: Move = "same"

    def apply(self, tensors: Iterable[Tensor]) -> Tensor:
        """The target, from the `sources` in order; dtype and bits are kept, except where a `quant_conv` is folded."""
        return _MOVES[self.move](*tensors)


@dataclass(frozen=True)
class Plan:
    """What becomes of the tensors of one part."""

    takes: Mapping[str, Take]
    """By name in the target."""
    unknown: tuple[str, ...]
    """Names of the source that no rule knows."""


def rules(part: str, config: Mapping[str, Any]) -> tuple[Rule, ...]:
    """The table of one part (unet, vae or image_encoder), from its diffusers or transformers config. Names without prefix.

    Raises ModelError where the config does not say how many blocks or layers there are.
    """
    try:
        return tuple({"unet": _unet, "vae": _vae, "image_encoder": _clip}[part](config))
    except KeyError as error:
        raise ModelError(
            f"{part}: {error.args[0]} is missing in its JSON, and its class's default need not be this model's. "
            "Copy the file from the model's release."
        ) from None


def rename(table: Iterable[Rule], name: str, to: Literal["original", "diffusers"]) -> str | None:
    """The name of a tensor or module on the other side; None when no rule knows it, or its tensor is cut or joined."""
    known = [(rule.original, rule.diffusers[0]) for rule in table if rule.how != "joined"]
    paths = dict(known) if to == "diffusers" else {there: own for own, there in known}
    hit = _longest(paths, name)
    return None if hit is None else paths[hit] + name[len(hit) :]


def to_diffusers(part: str, config: Mapping[str, Any], names: Iterable[str]) -> Plan:
    """From original `names` (without prefix) to diffusers. The original's VAE has no `quant_conv`: diffusers gets the identity."""
    names = set(names)
    by_path = {rule.original: rule for rule in rules(part, config)}
    takes: dict[str, Take] = {}
    matched, unknown = _matched(by_path, names)
    for name, rule, rest in matched:
        if rule.how == "joined":
            takes |= {target + rest: Take((name,), move) for target, move in zip(rule.diffusers, _THIRDS, strict=True)}
        else:
            takes[rule.diffusers[0] + rest] = Take((name,), _move(rule, rest, into="diffusers"))
    like = ("encoder.conv_out.bias",)
    temporal = part == "vae" and config.get("_class_name", TEMPORAL_VAE) == TEMPORAL_VAE
    if temporal and f"{QUANT}.weight" not in names and names.issuperset(like):
        takes |= {f"{QUANT}.weight": Take(like, "identity"), f"{QUANT}.bias": Take(like, "zeros")}
    return Plan(takes, tuple(unknown))


def to_original(part: str, config: Mapping[str, Any], names: Iterable[str], *, fold: bool = True) -> Plan:
    """From diffusers `names` to original ones (without prefix). A temporal VAE's `quant_conv` goes into `encoder.conv_out`.

    With `fold` false it is left out as what it is: the identity.
    """
    names = set(names)
    by_path = {path: rule for rule in rules(part, config) for path in rule.diffusers}
    takes: dict[str, Take] = {}
    matched, unknown = _matched(by_path, names)
    for name, rule, rest in matched:
        sources = tuple(path + rest for path in rule.diffusers)
        if names.issuperset(sources):
            takes[rule.original + rest] = Take(sources, _move(rule, rest, into="original"))
        else:
            unknown.append(name)
    if part == "vae" and config.get("_class_name", TEMPORAL_VAE) == TEMPORAL_VAE:
        quant = (takes.pop(f"{QUANT}.weight", None), takes.pop(f"{QUANT}.bias", None))
        if (quant[0] is None) != (quant[1] is None):
            unknown += [name for name in names if name.startswith(f"{QUANT}.")]
        elif fold and None not in quant:
            for end in ("weight", "bias"):
                own = f"encoder.conv_out.{end}"
                takes[own] = Take((own, f"{QUANT}.weight", f"{QUANT}.bias"), "folded")
    return Plan(takes, tuple(unknown))


def is_identity(weight: Tensor, bias: Tensor) -> bool:
    """Whether a `quant_conv` (n, n, 1, 1) changes nothing, so that leaving it out keeps every bit."""
    import torch

    return bool(torch.equal(weight, _identity(bias)) and not bias.any())


_RESNET = (
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
)
"""A ResNet of the UNet, spatial, and temporal below `time_stack`; the VAE's temporal ones have no `emb_layers`."""
_TRANSFORMER = (
    ("norm", "norm"),
    ("proj_in", "proj_in"),
    ("proj_out", "proj_out"),
    ("transformer_blocks", "transformer_blocks"),
    ("time_stack", "temporal_transformer_blocks"),
    ("time_mixer", "time_mixer"),
    ("time_pos_embed.0", "time_pos_embed.linear_1"),
    ("time_pos_embed.2", "time_pos_embed.linear_2"),
)


def _unet(config: Mapping[str, Any]) -> Iterator[Rule]:
    """VideoUNet: `input_blocks` and `output_blocks` count ResNets and samplers through all levels."""
    yield from _same(
        ("time_embed.0", "time_embedding.linear_1"),
        ("time_embed.2", "time_embedding.linear_2"),
        ("label_emb.0.0", "add_embedding.linear_1"),
        ("label_emb.0.2", "add_embedding.linear_2"),
        ("input_blocks.0.0", "conv_in"),
        ("out.0", "conv_norm_out"),
        ("out.2", "conv_out"),
    )
    kinds = config["down_block_types"]
    levels = len(kinds)
    layers = _per_level(config["layers_per_block"], levels)
    index = 1
    for level, kind in enumerate(kinds):
        for layer in range(layers[level]):
            yield from _unet_layer(f"input_blocks.{index}", f"down_blocks.{level}", layer, "CrossAttn" in kind)
            index += 1
        if level < levels - 1:
            yield from _same((f"input_blocks.{index}.0.op", f"down_blocks.{level}.downsamplers.0.conv"))
            index += 1
    yield from _unet_resnet("middle_block.0", "mid_block.resnets.0")
    yield from _within("middle_block.1", "mid_block.attentions.0", _TRANSFORMER)
    yield from _unet_resnet("middle_block.2", "mid_block.resnets.1")
    index = 0
    for level, kind in enumerate(config["up_block_types"]):
        attends = "CrossAttn" in kind
        for layer in range(layers[levels - 1 - level] + 1):
            yield from _unet_layer(f"output_blocks.{index}", f"up_blocks.{level}", layer, attends)
            index += 1
        if level < levels - 1:
            # It stands behind the last layer of its level, which has an attention or has none.
            place = f"output_blocks.{index - 1}.{2 if attends else 1}"
            yield from _same((f"{place}.conv", f"up_blocks.{level}.upsamplers.0.conv"))


def _unet_layer(original: str, diffusers: str, layer: int, attends: bool) -> Iterator[Rule]:
    yield from _unet_resnet(f"{original}.0", f"{diffusers}.resnets.{layer}")
    if attends:
        yield from _within(f"{original}.1", f"{diffusers}.attentions.{layer}", _TRANSFORMER)


def _unet_resnet(original: str, diffusers: str) -> Iterator[Rule]:
    yield from _within(original, f"{diffusers}.spatial_res_block", (*_RESNET, ("skip_connection", "conv_shortcut")))
    yield from _within(f"{original}.time_stack", f"{diffusers}.temporal_res_block", _RESNET)
    yield from _within(original, diffusers, (("time_mixer", "time_mixer"),))


def _vae(config: Mapping[str, Any]) -> Iterator[Rule]:
    """Encoder, and a temporal or (`svd_image_decoder`) frame-wise decoder, whose levels the original counts from the other end."""
    temporal = config.get("_class_name", TEMPORAL_VAE) == TEMPORAL_VAE
    levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
    yield from _same((QUANT, QUANT), ("post_quant_conv", "post_quant_conv"))
    for net in ("encoder", "decoder"):
        yield from _same((f"{net}.conv_in", f"{net}.conv_in"), (f"{net}.norm_out", f"{net}.conv_norm_out"))
        over_time = temporal and net == "decoder"
        # diffusers' temporal decoder has as many in its middle as layers; the original always has two.
        for number in range(layers if over_time else 2):
            yield from _vae_resnet(f"{net}.mid.block_{number + 1}", f"{net}.mid_block.resnets.{number}", over_time)
        yield from _vae_attention(f"{net}.mid.attn_1", f"{net}.mid_block.attentions.0")
    yield from _same(("encoder.conv_out", "encoder.conv_out"), ("decoder.conv_out", "decoder.conv_out"))
    if temporal:
        yield from _same(("decoder.conv_out.time_mix_conv", "decoder.time_conv_out"))
    for level in range(levels):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{levels - 1 - level}"
        for layer in range(layers):
            yield from _vae_resnet(f"encoder.down.{level}.block.{layer}", f"{down}.resnets.{layer}", False)
        for layer in range(layers + 1):
            yield from _vae_resnet(f"decoder.up.{level}.block.{layer}", f"{up}.resnets.{layer}", temporal)
        yield from _same(
            (f"encoder.down.{level}.downsample", f"{down}.downsamplers.0"),
            (f"decoder.up.{level}.upsample", f"{up}.upsamplers.0"),
        )


def _vae_resnet(original: str, diffusers: str, temporal: bool) -> Iterator[Rule]:
    inner = [(name, name) for name in ("norm1", "conv1", "norm2", "conv2")] + [("nin_shortcut", "conv_shortcut")]
    yield from _within(original, f"{diffusers}.spatial_res_block" if temporal else diffusers, inner)
    if temporal:
        yield from _within(f"{original}.time_stack", f"{diffusers}.temporal_res_block", _RESNET)
        yield from _within(original, diffusers, (("mix_factor", "time_mixer.mix_factor"),))


def _vae_attention(original: str, diffusers: str) -> Iterator[Rule]:
    yield from _within(original, diffusers, (("norm", "group_norm"),))
    for ours, theirs in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
        yield Rule(f"{original}.{ours}", (f"{diffusers}.{theirs}",), "matrix")


def _clip(config: Mapping[str, Any]) -> Iterator[Rule]:
    """open_clip's visual tower; its attention is `nn.MultiheadAttention`, which stores query, key and value in one tensor."""
    yield from _same(
        ("class_embedding", "vision_model.embeddings.class_embedding"),
        ("conv1", "vision_model.embeddings.patch_embedding"),
        ("positional_embedding", "vision_model.embeddings.position_embedding.weight"),
        ("ln_pre", "vision_model.pre_layrnorm"),
        ("ln_post", "vision_model.post_layernorm"),
    )
    yield Rule("proj", ("visual_projection.weight",), "transposed")
    for layer in range(config["num_hidden_layers"]):
        original, there = f"transformer.resblocks.{layer}", f"vision_model.encoder.layers.{layer}"
        inner = (("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2"))
        yield from _within(original, there, (*inner, ("attn.out_proj", "self_attn.out_proj")))
        for end in ("weight", "bias"):
            three = tuple(f"{there}.self_attn.{letter}_proj.{end}" for letter in "qkv")
            yield Rule(f"{original}.attn.in_proj_{end}", three, "joined")


def _same(*pairs: tuple[str, str]) -> Iterator[Rule]:
    for original, diffusers in pairs:
        yield Rule(original, (diffusers,))


def _within(original: str, diffusers: str, pairs: Iterable[tuple[str, str]]) -> Iterator[Rule]:
    yield from _same(*((f"{original}.{ours}", f"{diffusers}.{theirs}") for ours, theirs in pairs))


def _per_level(value: int | list[int], levels: int) -> list[int]:
    return [value] * levels if isinstance(value, int) else list(value)


def _matched(by_path: Mapping[str, Rule], names: Iterable[str]) -> tuple[list[tuple[str, Rule, str]], list[str]]:
    """Each name with its rule and what stands behind the rule's path; and the names that no rule knows."""
    hits = {name: _longest(by_path, name) for name in sorted(names)}
    known = [(name, by_path[hit], name[len(hit) :]) for name, hit in hits.items() if hit is not None]
    return known, [name for name, hit in hits.items() if hit is None]


def _longest(paths: Mapping[str, Any], name: str) -> str | None:
    """The longest of `paths` that is `name` or stands above it."""
    while name not in paths:
        name, dot, _ = name.rpartition(".")
        if not dot:
            return None
    return name


_THIRDS: tuple[Move, ...] = ("third_0", "third_1", "third_2")


def _move(rule: Rule, rest: str, *, into: Literal["original", "diffusers"]) -> Move:
    if rule.how == "matrix":
        return "same" if rest != ".weight" else "to_matrix" if into == "diffusers" else "to_convolution"
    return rule.how


def _identity(bias: Tensor) -> Tensor:
    import torch

    return torch.eye(bias.numel(), dtype=bias.dtype, device=bias.device)[:, :, None, None]


def _joined(*thirds: Tensor) -> Tensor:
    import torch

    return torch.cat(thirds)


def _third(tensor: Tensor, number: int) -> Tensor:
    return tensor.tensor_split(3)[number] if tensor.dim() else tensor


def _folded(own: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`quant_conv` after `conv_out` as one convolution, computed in float64: (m, n, 1, 1) onto (n, c, 3, 3) or onto (n,)."""
    matrix = weight[:, :, 0, 0].double()
    product = matrix @ own.double().flatten(1) if own.dim() > 1 else matrix @ own.double() + bias.double()
    return product.reshape(matrix.shape[0], *own.shape[1:]).to(own.dtype)


# A tensor of a wrong shape passes through: strict loading names it.
_MOVES: Mapping[str, Any] = {
    "same": lambda tensor: tensor,
    "to_matrix": lambda tensor: tensor[:, :, 0, 0] if tensor.dim() == 4 else tensor,
    "to_convolution": lambda tensor: tensor[:, :, None, None],
    "transposed": lambda tensor: tensor.T if tensor.dim() == 2 else tensor,
    "third_0": lambda tensor: _third(tensor, 0),
    "third_1": lambda tensor: _third(tensor, 1),
    "third_2": lambda tensor: _third(tensor, 2),
    "joined": _joined,
    "identity": _identity,
    "zeros": lambda tensor: tensor.new_zeros(tensor.shape),
    "folded": _folded,
}
