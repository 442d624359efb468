"""The original's names and diffusers': the original implementations' own numbers, both ways, other architectures, configs from shapes."""

import gzip
import itertools
import json
import math
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from svdtune.errors import ModelError
from svdtune.model.derive import derive_configs
from svdtune.model.facts import PACKAGE, SHIPPED
from svdtune.model.load import build_part, fake_model
from svdtune.model.original import PREFIXES, is_identity, rename, rules, to_diffusers, to_original
from svdtune.model.source import read_configs

ASSETS = Path(__file__).parents[1] / "assets" / "original"
PARTS = ("unet", "vae", "image_encoder")
XT = "stabilityai/stable-video-diffusion-img2vid-xt"
TEMPORAL, FRAME_WISE = "AutoencoderKLTemporalDecoder", "AutoencoderKL"


def golden(part):
    """Original weights (names without prefix), diffusers config, and what went into and came out of the original network."""
    name = {"image_encoder": "clip"}.get(part, part)
    weights = load_file(ASSETS / f"{name}.safetensors")
    assert all(key.startswith(PREFIXES[part]) for key in weights)
    tensors = {key.removeprefix(PREFIXES[part]): tensor for key, tensor in weights.items()}
    return (
        tensors,
        json.loads((ASSETS / f"{name}_config.json").read_text()),
        load_file(ASSETS / f"{name}_io.safetensors"),
    )


def made(plan, tensors):
    assert plan.unknown == ()
    return {name: take.apply(tensors[source] for source in take.sources) for name, take in plan.takes.items()}


def converted(part, config, tensors):
    return made(to_diffusers(part, config, tensors), tensors)


def network(part, config, tensors):
    built = build_part(part, config)
    built.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=True)
    return built.eval()


def on_meta(part, config):
    """State dict of a network of this architecture, without its numbers."""
    return _on_meta(part, json.dumps(config))


@cache
def _on_meta(part, config):
    with torch.device("meta"):
        return {name: tensor.to("meta") for name, tensor in build_part(part, json.loads(config)).state_dict().items()}


def shapes_of(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def off_by(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


def bits(tensor):
    """-0.0 and each NaN count."""
    return tensor.dtype, tuple(tensor.shape), bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def same_bits(got, expected):
    return got.keys() == expected.keys() and all(bits(got[name]) == bits(expected[name]) for name in expected)


# The original implementations' own numbers.


@torch.no_grad()
def test_a_converted_unet_computes_what_the_original_did():
    tensors, config, io = golden("unet")
    unet = network("unet", config, converted("unet", config, tensors))
    got = unet(io["sample"], io["timestep"], io["encoder_hidden_states"], added_time_ids=io["added_time_ids"]).sample
    assert off_by(got, io["output"]) < 1e-4


@torch.no_grad()
def test_a_converted_vae_computes_what_the_original_did():
    tensors, config, io = golden("vae")
    vae = network("vae", config, converted("vae", config, tensors))
    assert off_by(vae.encode(io["pixels"]).latent_dist.parameters, io["moments"]) < 1e-5
    assert off_by(vae.decode(io["latents"], num_frames=len(io["latents"])).sample, io["decoded"]) < 1e-5


@torch.no_grad()
def test_a_converted_clip_tower_computes_what_open_clip_did():
    tensors, config, io = golden("image_encoder")
    tower = network("image_encoder", config, converted("image_encoder", config, tensors))
    assert off_by(tower(io["pixel_values"]).image_embeds, io["image_embeds"]) < 1e-5


# The original's UNet once more, over its own names: which block stands where is read off them, not from the rules.


class VideoUNet:
    """`VideoUNet.forward` of Stability-AI/generative-models as functions of a state dict that has its names."""

    def __init__(self, tensors, *, head, frames):
        self.w, self.head, self.frames = tensors, head, frames
        self.paths = {name[:end] for name in tensors for end, letter in enumerate(name) if letter == "."}

    def __call__(self, sample, timestep, context, ids, *, id_width):
        emb = self.mlp("time_embed", sinus(timestep, self.w["time_embed.0.weight"].shape[1]))
        emb = emb + self.mlp("label_emb.0", sinus(ids.flatten(), id_width).view(len(ids), -1))
        emb, context = (each.repeat_interleave(self.frames, 0) for each in (emb, context))
        h, hs = sample.flatten(0, 1), []
        for path in self.numbered("input_blocks"):
            h = self.sequence(path, h, emb, context)
            hs.append(h)
        h = self.sequence("middle_block", h, emb, context)
        for path in self.numbered("output_blocks"):
            h = self.sequence(path, torch.cat([h, hs.pop()], 1), emb, context)
        assert not hs
        return self.conv("out.2", F.silu(self.norm("out.0", h))).unflatten(0, (-1, self.frames))

    def numbered(self, path):
        return itertools.takewhile(self.paths.__contains__, (f"{path}.{index}" for index in itertools.count()))

    def sequence(self, path, h, emb, context):
        for layer in self.numbered(path):
            if f"{layer}.in_layers" in self.paths:
                h = self.resnet(layer, h, emb)
            elif f"{layer}.proj_in" in self.paths:
                h = self.transformer(layer, h, context)
            elif f"{layer}.op" in self.paths:
                h = self.conv(f"{layer}.op", h, stride=2)
            elif f"{layer}.conv" in self.paths:
                h = self.conv(f"{layer}.conv", F.interpolate(h, scale_factor=2))
            else:
                h = self.conv(layer, h)
        return h

    def resnet(self, path, h, emb):
        spatial = self.conv(f"{path}.skip_connection", h) if f"{path}.skip_connection" in self.paths else h
        spatial = spatial + self.layers(path, h, self.linear(f"{path}.emb_layers.1", F.silu(emb))[..., None, None])
        spatial = spatial.unflatten(0, (-1, self.frames)).transpose(1, 2)
        emb = self.linear(f"{path}.time_stack.emb_layers.1", F.silu(emb)).unflatten(0, (-1, self.frames))
        temporal = spatial + self.layers(f"{path}.time_stack", spatial, emb.transpose(1, 2)[..., None, None])
        return self.blend(path, spatial, temporal).transpose(1, 2).flatten(0, 1)

    def layers(self, path, h, emb):
        h = self.conv(f"{path}.in_layers.2", F.silu(self.norm(f"{path}.in_layers.0", h))) + emb
        return self.conv(f"{path}.out_layers.3", F.silu(self.norm(f"{path}.out_layers.0", h)))

    def transformer(self, path, x, context):
        h = self.linear(f"{path}.proj_in", self.norm(f"{path}.norm", x, 1e-6).flatten(2).transpose(1, 2))
        batch, pixels = len(x) // self.frames, h.shape[1]
        emb = self.mlp(f"{path}.time_pos_embed", sinus(torch.arange(self.frames).repeat(batch), x.shape[1]))[:, None]
        first = context[:: self.frames].repeat_interleave(pixels, 0)
        for spatial, temporal in zip(
            self.numbered(f"{path}.transformer_blocks"), self.numbered(f"{path}.time_stack"), strict=True
        ):
            h = self.block(spatial, h, context)
            mixed = (h + emb).unflatten(0, (batch, self.frames)).transpose(1, 2).flatten(0, 1)
            mixed = mixed + self.forward(f"{temporal}.ff_in", self.layer_norm(f"{temporal}.norm_in", mixed))
            mixed = self.block(temporal, mixed, first).unflatten(0, (batch, pixels)).transpose(1, 2).flatten(0, 1)
            h = self.blend(path, h, mixed)
        return x + self.linear(f"{path}.proj_out", h).transpose(1, 2).unflatten(2, x.shape[2:])

    def block(self, path, h, context):
        normed = self.layer_norm(f"{path}.norm1", h)
        h = h + self.attention(f"{path}.attn1", normed, normed)
        h = h + self.attention(f"{path}.attn2", self.layer_norm(f"{path}.norm2", h), context)
        return h + self.forward(f"{path}.ff", self.layer_norm(f"{path}.norm3", h))

    def attention(self, path, h, context):
        q, k, v = (
            self.linear(f"{path}.to_{letter}", given).unflatten(-1, (-1, self.head)).transpose(1, 2)
            for letter, given in (("q", h), ("k", context), ("v", context))
        )
        return self.linear(f"{path}.to_out.0", F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, path, h):
        h, gate = self.linear(f"{path}.net.0.proj", h).chunk(2, -1)
        return self.linear(f"{path}.net.2", h * F.gelu(gate))

    def blend(self, path, spatial, temporal):
        alpha = self.w[f"{path}.time_mixer.mix_factor"].sigmoid()
        return alpha * spatial + (1 - alpha) * temporal

    def mlp(self, path, h):
        return self.linear(f"{path}.2", F.silu(self.linear(f"{path}.0", h)))

    def linear(self, path, h):
        return F.linear(h, self.w[f"{path}.weight"], self.w.get(f"{path}.bias"))

    def conv(self, path, h, stride=1):
        weight = self.w[f"{path}.weight"]
        convolve = F.conv2d if weight.dim() == 4 else F.conv3d
        return convolve(h, weight, self.w[f"{path}.bias"], stride, tuple(n // 2 for n in weight.shape[2:]))

    def norm(self, path, h, eps=1e-5):
        return F.group_norm(h, 32, self.w[f"{path}.weight"], self.w[f"{path}.bias"], eps)

    def layer_norm(self, path, h):
        return F.layer_norm(h, h.shape[-1:], self.w[f"{path}.weight"], self.w[f"{path}.bias"])


def sinus(numbers, width):
    angles = numbers[:, None].float() * torch.exp(-math.log(10000) * torch.arange(width // 2) / (width // 2))
    return torch.cat([angles.cos(), angles.sin()], -1)


def unet_config(attends, layers=1, **more):
    """`attends`: which levels have attention. Widths grow by level, heads are 64 wide."""
    kinds = ["CrossAttn" if attend else "" for attend in attends]
    widths = [64 * (1 + level // 2) for level in range(len(kinds))]
    return {
        "block_out_channels": widths, "num_attention_heads": [width // 64 for width in widths], "layers_per_block": layers,
        "cross_attention_dim": 24, "addition_time_embed_dim": 16, "projection_class_embeddings_input_dim": 48,
        "in_channels": 8, "out_channels": 4, "num_frames": 3, "transformer_layers_per_block": 1,
        "down_block_types": [f"{kind}DownBlockSpatioTemporal" for kind in kinds],
        "up_block_types": [f"{kind}UpBlockSpatioTemporal" for kind in reversed(kinds)], **more,
    }  # fmt: skip


@torch.no_grad()
def test_the_unet_read_off_its_names_is_the_original():
    tensors, config, io = golden("unet")
    original = VideoUNet({name: tensor.float() for name, tensor in tensors.items()}, head=32, frames=3)
    given = (io["sample"], io["timestep"], io["encoder_hidden_states"], io["added_time_ids"])
    assert off_by(original(*given, id_width=config["addition_time_embed_dim"]), io["output"]) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize(
    ("attends", "layers", "depth"),
    [
        ([True], 2, 1),
        ([False, True, True], 1, 1),
        ([True, False, True], 2, 2),
        ([True, True, False], [1, 3, 2], 1),
        ([True, False, True, False], [2, 1, 1, 2], 1),
    ],
)
def test_any_unet_under_the_original_names_computes_the_same(attends, layers, depth):
    config = unet_config(attends, layers, transformer_layers_per_block=depth)
    torch.manual_seed(len(attends))
    unet = build_part("unet", config).eval()
    for name, parameter in unet.named_parameters():
        if "norm" in name or "mix_factor" in name or name.endswith("bias"):
            parameter.add_(torch.randn_like(parameter) * 0.5)
    given = torch.randn(2, 3, 8, 16, 8), torch.randn(2), torch.randn(2, 1, 24)
    ids = torch.tensor([[6.0, 127.0, 0.02], [24.0, 30.0, 0.1]])
    expected = unet(*given, added_time_ids=ids).sample
    tensors = unet.state_dict()
    original = made(to_original("unet", config, tensors), tensors)
    assert off_by(VideoUNet(original, head=64, frames=3)(*given, ids, id_width=16), expected) < 1e-4
    assert same_bits(converted("unet", config, original), tensors)


def test_mix_factors_of_three_blocks_go_where_they_belong():
    """diffusers' own script puts one of a wrong block into the first up block."""
    config = unet_config([True, True, False])
    tensors = {f"output_blocks.{index}.0.time_mixer.mix_factor": torch.tensor([float(index)]) for index in range(6)}
    got = {name: tensor.item() for name, tensor in converted("unet", config, tensors).items()}
    assert got == {
        f"up_blocks.{index // 2}.resnets.{index % 2}.time_mixer.mix_factor": float(index) for index in range(6)
    }


# Both ways.


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("part", PARTS)
def test_there_and_back_keeps_every_bit(part, dtype):
    tensors, config, _ = golden(part)
    tensors = {name: tensor.to(dtype or tensor.dtype) for name, tensor in tensors.items()}
    if part == "vae":
        odd = tensors["encoder.conv_out.weight"].view(-1)
        odd[:4] = torch.tensor([-0.0, float("inf"), float("nan"), 1e-40])
        tensors["encoder.conv_out.bias"][0] = -0.0
        assert torch.signbit(odd[0])
    there = converted(part, config, tensors)
    if part == "vae":
        assert is_identity(there["quant_conv.weight"], there["quant_conv.bias"])
    assert {tensor.dtype for tensor in there.values()} == {tensor.dtype for tensor in tensors.values()}
    assert same_bits(made(to_original(part, config, there, fold=False), there), tensors)


def test_a_quant_conv_that_an_original_file_has_is_kept():
    tensors, config, _ = golden("vae")
    own = {"quant_conv.weight": torch.randn(8, 8, 1, 1), "quant_conv.bias": torch.randn(8)}
    there = converted("vae", config, {**tensors, **own})
    assert all(torch.equal(there[name], own[name]) for name in own)


def test_what_is_and_what_is_no_identity():
    weight, bias = torch.eye(8)[:, :, None, None], torch.zeros(8)
    assert is_identity(weight, bias)
    assert is_identity(weight.half(), bias.half())
    assert not is_identity(weight, bias + torch.tensor([0.0] * 7 + [1e-7]))
    assert not is_identity(weight * 1.001, bias)
    assert not is_identity(weight.flip(0), bias)


@torch.no_grad()
def test_a_quant_conv_that_changes_something_is_folded_into_the_encoder():
    tensors, config, io = golden("vae")
    there = converted("vae", config, tensors)
    torch.manual_seed(0)
    there["quant_conv.weight"], there["quant_conv.bias"] = torch.randn(8, 8, 1, 1), torch.randn(8)
    assert not is_identity(there["quant_conv.weight"], there["quant_conv.bias"])
    back = made(to_original("vae", config, there), there)
    assert shapes_of(back) == shapes_of(tensors)
    before = network("vae", config, there).encode(io["pixels"]).latent_dist.parameters
    after = network("vae", config, converted("vae", config, back)).encode(io["pixels"]).latent_dist.parameters
    assert off_by(after, before) < 1e-5
    half = {name: tensor.half() for name, tensor in there.items()}
    folded = made(to_original("vae", config, half), half)
    assert {tensor.dtype for tensor in folded.values()} == {torch.float16}
    assert off_by(folded["encoder.conv_out.weight"].float(), back["encoder.conv_out.weight"]) < 2e-3


@pytest.fixture(scope="module")
def ledger():
    """All names and shapes of the released SVD-XT."""
    with gzip.open(PACKAGE / "facts" / "original" / "svd_xt.json.gz") as file:
        return {name: tuple(shape) for name, shape in json.load(file).items()}


@pytest.fixture(scope="module")
def full_size():
    return fake_model(read_configs(SHIPPED[XT]))


@pytest.mark.parametrize("part", PARTS)
def test_the_released_file_is_the_released_folder(ledger, full_size, part):
    prefix, config = PREFIXES[part], getattr(full_size.configs, part)
    original = {name[len(prefix) :]: shape for name, shape in ledger.items() if name.startswith(prefix)}
    tensors = {name: torch.empty(shape, dtype=torch.float16, device="meta") for name, shape in original.items()}
    there = converted(part, config, tensors)
    assert shapes_of(there) == shapes_of(getattr(full_size, part).state_dict())
    assert {tensor.dtype for tensor in there.values()} == {torch.float16}
    for fold in (True, False):
        assert shapes_of(made(to_original(part, config, there, fold=fold), there)) == original


def test_the_ledger_is_the_three_parts_and_nothing_else(ledger):
    assert len(ledger) == 2192
    assert all(name.startswith(tuple(PREFIXES.values())) for name in ledger)
    assert sum(math.prod(shape) for shape in ledger.values()) == 2_254_442_657


def test_a_frame_wise_vae_has_the_names_of_the_release_without_the_temporal_ones(ledger, full_size):
    config = vae_config([128, 256, 512, 512], 2, FRAME_WISE)
    got = shapes_of(made(to_original("vae", config, tensors := on_meta("vae", config)), tensors))
    temporal = (".time_stack.", ".mix_factor", ".time_mix_conv.")
    prefix = PREFIXES["vae"]
    assert got == {
        **{n[len(prefix) :]: s for n, s in ledger.items() if n.startswith(prefix) and not any(t in n for t in temporal)},
        "quant_conv.weight": (8, 8, 1, 1), "quant_conv.bias": (8,),
        "post_quant_conv.weight": (4, 4, 1, 1), "post_quant_conv.bias": (4,),
    }  # fmt: skip


# Other architectures.


def vae_config(widths, layers, kind=TEMPORAL, **more):
    config = {
        "_class_name": kind, "in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": widths,
        "layers_per_block": layers, "down_block_types": ["DownEncoderBlock2D"] * len(widths), **more,
    }  # fmt: skip
    return config if kind == TEMPORAL else {"up_block_types": ["UpDecoderBlock2D"] * len(widths), **config}


def clip_config(layers, width=96):
    return {
        "hidden_size": width, "intermediate_size": 128, "num_hidden_layers": layers, "num_attention_heads": width // 48,
        "num_channels": 3, "patch_size": 8, "image_size": 24, "projection_dim": 24,
    }  # fmt: skip


SUBSETS = [attends for levels in (1, 2, 3, 4) for attends in itertools.product([True, False], repeat=levels)]
LAYERS = [1, 2, 3, [2, 1, 3, 1]]
UNETS = [
    *(unet_config(attends, LAYERS[n % 3]) for n, attends in enumerate(SUBSETS)),
    *(unet_config(attends, [2, 1, 3, 1][: len(attends)]) for attends in SUBSETS[1:30:4]),
    unet_config([True, False], transformer_layers_per_block=2),
]
VAES = [
    *(vae_config([32, 32, 64, 64][-levels:], layers) for levels in (2, 3, 4) for layers in (1, 2, 3)),
    *(
        vae_config([32, 64, 64][-levels:], layers, FRAME_WISE, use_quant_conv=before, use_post_quant_conv=after)
        for levels, layers in ((2, 1), (3, 2))
        for before, after in itertools.product([True, False], repeat=2)
    ),
]
ARCHITECTURES = [
    *(("unet", config) for config in UNETS),
    *(("vae", config) for config in VAES),
    *(("image_encoder", clip_config(layers)) for layers in (1, 2, 3)),
]


def said(value):
    if not isinstance(value, dict):
        return None
    widths, layers = value.get("block_out_channels", []), value.get("layers_per_block", value.get("num_hidden_layers"))
    marks = ["".join("x" if "CrossAttn" in kind else "-" for kind in value.get("down_block_types", []))]
    marks += [str(value[key])[0] for key in ("use_quant_conv", "use_post_quant_conv") if key in value]
    return f"{value.get('_class_name', '')}{widths}{layers}{''.join(marks)}".replace(" ", "")


@pytest.mark.parametrize(("part", "config"), ARCHITECTURES, ids=said)
def test_names_of_any_architecture_go_there_and_back(part, config):
    tensors = on_meta(part, config)
    original = made(to_original(part, config, tensors), tensors)
    assert shapes_of(converted(part, config, original)) == shapes_of(tensors)


@pytest.mark.parametrize(("part", "config"), ARCHITECTURES, ids=said)
def test_no_path_of_a_table_is_twice_or_below_another(part, config):
    """But for the convolution over time, which the original keeps inside the last one: the longer path wins."""
    table = rules(part, config)
    for side in ([rule.original for rule in table], [path for rule in table for path in rule.diffusers]):
        assert len(side) == len(set(side))
        nested = [path for path in side for end, letter in enumerate(path) if letter == "." and path[:end] in set(side)]
        assert nested in ([], ["decoder.conv_out.time_mix_conv"])


def test_names_that_no_rule_knows_are_told():
    config = unet_config([True, False])
    plan = to_diffusers("unet", config, ["out.2.bias", "out.3.bias", "input_blocks.9.0.in_layers.0.bias", "out"])
    assert plan.unknown == ("input_blocks.9.0.in_layers.0.bias", "out", "out.3.bias")
    assert list(plan.takes) == ["conv_out.bias"]
    three = [f"vision_model.encoder.layers.0.self_attn.{letter}_proj.bias" for letter in "qkv"]
    assert to_original("image_encoder", clip_config(1), three[:2]).unknown == (three[1], three[0])
    assert list(to_original("image_encoder", clip_config(1), three).takes) == [
        "transformer.resblocks.0.attn.in_proj_bias"
    ]


def test_one_name_is_renamed_unless_its_tensor_is_cut_or_joined():
    unet, clip, vae = (
        rules("unet", unet_config([True])),
        rules("image_encoder", clip_config(1)),
        rules("vae", vae_config([32], 1)),
    )
    pairs = [
        (unet, "input_blocks.1.1.transformer_blocks.0.attn1.to_q", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"),
        (unet, "output_blocks.0.1.time_stack.0.ff", "up_blocks.0.attentions.0.temporal_transformer_blocks.0.ff"),
        (vae, "decoder.conv_out.time_mix_conv.weight", "decoder.time_conv_out.weight"),
        (vae, "decoder.conv_out.weight", "decoder.conv_out.weight"),
        (clip, "proj", "visual_projection.weight"),
    ]  # fmt: skip
    for table, original, diffusers in pairs:
        assert rename(table, original, "diffusers") == diffusers
        assert rename(table, diffusers, "original") == original
    assert rename(clip, "transformer.resblocks.0.attn.in_proj_weight", "diffusers") is None
    assert rename(clip, "vision_model.encoder.layers.0.self_attn.q_proj.weight", "original") is None
    assert rename(unet, "input_blocks.5.0", "diffusers") is None


# Configs from shapes.


@pytest.fixture(scope="module")
def whole():
    """Shapes of a whole small single file that derive_configs knows: heads of 64, a tower of 768."""
    return whole_file(unet_config([True, False]), vae_config([32, 64], 1), clip_config(2, 768))


def whole_file(unet, vae, clip):
    shapes = {}
    for part, config in (("unet", unet), ("vae", vae), ("image_encoder", clip)):
        tensors = on_meta(part, config)
        shapes |= {
            PREFIXES[part] + n: s for n, s in shapes_of(made(to_original(part, config, tensors), tensors)).items()
        }
    return shapes


@pytest.mark.parametrize(("suffix", "frames"), [("-xt", 25), ("", 14)])
def test_shapes_of_the_release_give_its_json(ledger, suffix, frames):
    shipped = read_configs(SHIPPED[f"stabilityai/stable-video-diffusion-img2vid{suffix}"])
    derived = derive_configs(ledger, num_frames=frames)
    assert derived == {part: getattr(shipped, part) for part in derived}
    assert set(derived) == {*PARTS, "scheduler", "feature_extractor"}


@pytest.mark.parametrize("config", UNETS, ids=said)
def test_shapes_of_a_unet_give_the_config_it_was_made_from(whole, config):
    tensors = on_meta("unet", config)
    own = {PREFIXES["unet"] + n: s for n, s in shapes_of(made(to_original("unet", config, tensors), tensors)).items()}
    others = {name: shape for name, shape in whole.items() if not name.startswith(PREFIXES["unet"])}
    derived = derive_configs({**others, **own}, num_frames=3)["unet"]
    if isinstance(config["layers_per_block"], list) and len(set(config["layers_per_block"])) == 1:
        derived["layers_per_block"] = [derived["layers_per_block"]] * len(config["layers_per_block"])
    assert {key: derived[key] for key in config} == config


@pytest.mark.parametrize("config", VAES, ids=said)
def test_shapes_of_a_vae_give_the_config_it_was_made_from(whole, config):
    tensors = on_meta("vae", config)
    own = {PREFIXES["vae"] + n: s for n, s in shapes_of(made(to_original("vae", config, tensors), tensors)).items()}
    others = {name: shape for name, shape in whole.items() if not name.startswith(PREFIXES["vae"])}
    derived = derive_configs({**others, **own}, num_frames=3)["vae"]
    assert {key: derived[key] for key in config} == config
    assert shapes_of(on_meta("vae", derived)) == shapes_of(tensors)


@pytest.mark.parametrize(("width", "heads"), [(768, 12), (1024, 16), (1280, 16), (1408, 16), (1664, 16)])
def test_shapes_of_a_clip_tower_give_the_config_it_was_made_from(whole, width, heads):
    config = {**clip_config(3, width), "num_attention_heads": heads}
    tensors = on_meta("image_encoder", config)
    plan = to_original("image_encoder", config, tensors)
    own = {PREFIXES["image_encoder"] + n: s for n, s in shapes_of(made(plan, tensors)).items()}
    others = {name: shape for name, shape in whole.items() if not name.startswith(PREFIXES["image_encoder"])}
    derived = derive_configs({**others, **own}, num_frames=3)
    assert {key: derived["image_encoder"][key] for key in config} == config
    assert derived["image_encoder"]["hidden_act"] == "gelu"
    assert derived["feature_extractor"]["size"] == {"shortest_edge": 24}
    assert derived["feature_extractor"]["crop_size"] == {"height": 24, "width": 24}


def test_depth_of_transformers_may_differ_by_level(whole):
    config = unet_config([True, True, False], transformer_layers_per_block=[1, 2, 3])
    derived = derive_configs(
        {**whole, **whole_file(config, vae_config([32, 64], 1), clip_config(1, 768))}, num_frames=3
    )
    assert derived["unet"]["transformer_layers_per_block"] == [1, 2, 3]
    assert shapes_of(on_meta("unet", derived["unet"])) == shapes_of(on_meta("unet", config))


def test_a_width_that_is_no_heads_of_64_is_told():
    shapes = whole_file(
        unet_config([True, True], block_out_channels=[64, 96], num_attention_heads=[1, 1]),
        vae_config([32, 64], 1),
        clip_config(1, 768),
    )
    with pytest.raises(
        ModelError,
        match=r"model\.diffusion_model: a level has 96 channels, which are no heads of 64\. .*unet/config\.json",
    ):
        derive_configs(shapes, num_frames=14)


def test_a_clip_tower_of_unknown_width_is_told(whole):
    shapes = whole_file(unet_config([True, False]), vae_config([32, 64], 1), clip_config(1, 96))
    with pytest.raises(
        ModelError,
        match=r"visual\.\*: the tower's width is 96, expected one of open_clip's \(768, 1024, .*no shape: give",
    ):
        derive_configs(shapes, num_frames=14)


@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.input_blocks.0.0.weight",
        "model.diffusion_model.input_blocks.1.0.in_layers.2.weight",
        "model.diffusion_model.label_emb.0.0.weight",
        "model.diffusion_model.out.2.weight",
        "first_stage_model.encoder.conv_in.weight",
        "first_stage_model.encoder.down.0.block.0.conv1.weight",
        "first_stage_model.decoder.conv_in.weight",
        "first_stage_model.decoder.conv_out.weight",
        "conditioner.embedders.0.open_clip.model.visual.class_embedding",
        "conditioner.embedders.0.open_clip.model.visual.conv1.weight",
        "conditioner.embedders.0.open_clip.model.visual.proj",
        "conditioner.embedders.0.open_clip.model.visual.positional_embedding",
        "conditioner.embedders.0.open_clip.model.visual.transformer.resblocks.0.mlp.c_fc.weight",
    ],
)
def test_a_missing_tensor_that_the_structure_follows_from_is_told(whole, name):
    for shapes in ({n: s for n, s in whole.items() if n != name}, {**whole, name: ()}):
        with pytest.raises(
            ModelError, match=f"no network of SVD can be built from these weights: {name} is not there, or"
        ):
            derive_configs(shapes, num_frames=14)


def test_a_unet_without_any_attention_is_told(whole):
    shapes = {
        name: shape for name, shape in whole.items() if "transformer_blocks" not in name and "time_stack.0" not in name
    }
    with pytest.raises(
        ModelError,
        match=r"no network of SVD can be built from these weights: model\.diffusion_model\.middle_block\.1\.",
    ):
        derive_configs(shapes, num_frames=14)


def test_a_level_without_resnets_is_told(whole):
    shapes = {n: s for n, s in whole.items() if not n.startswith("model.diffusion_model.input_blocks.3.")}
    with pytest.raises(
        ModelError,
        match=r"no network of SVD can be built from these weights: .*input_blocks\.\*: a ResNet of level 1 is not",
    ):
        derive_configs(shapes, num_frames=14)


def test_half_a_quant_conv_is_told_and_not_left_out():
    names = ("encoder.conv_out.weight", "encoder.conv_out.bias", "quant_conv.weight")
    config = {"_class_name": "AutoencoderKLTemporalDecoder", "block_out_channels": [32], "layers_per_block": 1}
    assert to_original("vae", config, names).unknown == ("quant_conv.weight",)
