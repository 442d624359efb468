"""One file of the original's naming as `model.pretrained`: it is the folder it was made from, or a sentence says what it is."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from svdtune.config.schema import Model
from svdtune.errors import ModelError
from svdtune.model.facts import FILES
from svdtune.model.load import build_part, load_model
from svdtune.model.original import PREFIXES, to_original
from svdtune.model.single_file import LEFTOVERS, NOTES, read_single_file
from svdtune.model.source import part_weights, read_configs, weights_hash

PARTS = ("unet", "vae", "image_encoder")
UNET = "model.diffusion_model."


def load(path):
    return load_model(Model(pretrained=str(path), variant=None))


def off_by(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


def part_tensors(source, part):
    return list(part_weights(source, part, None).items())


def originals(part, config, tensors):
    """A part's tensors under its names in the single file."""
    plan = to_original(part, config, tensors)
    assert plan.unknown == ()
    return {
        PREFIXES[part] + name: take.apply(tensors[source] for source in take.sources).contiguous()
        for name, take in plan.takes.items()
    }


def noted(configs):
    return {NOTES: json.dumps({"configs": {part: dict(getattr(configs, part)) for part in FILES}})}


def network_of(part, config):
    """Random weights, also where a new network has ones and zeros."""
    built = build_part(part, config).eval()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "norm" in name or "mix_factor" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return built


def same_networks(got, expected, but=()):
    for part in PARTS:
        ours, theirs = getattr(got, part).state_dict(), getattr(expected, part).state_dict()
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - set(but):
            assert ours[name].dtype == torch.float32
            assert torch.equal(ours[name], theirs[name]), name


@pytest.fixture(scope="module")
def folder(svd_folder, tmp_path_factory):
    """The session's folder, whose VAE got the original's identity after its encoder."""
    import shutil

    folder = tmp_path_factory.mktemp("single") / "svd"
    shutil.copytree(svd_folder, folder)
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors |= {"quant_conv.weight": torch.eye(8)[:, :, None, None].contiguous(), "quant_conv.bias": torch.zeros(8)}
    save_file(tensors, path, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def tensors(folder):
    """The folder under original names."""
    configs = read_configs(folder)
    found = {}
    for part in PARTS:
        found |= originals(part, getattr(configs, part), dict(part_tensors(folder, part)))
    return found


@pytest.fixture(scope="module")
def notes(folder):
    return noted(read_configs(folder))


@pytest.fixture
def write(tmp_path, tensors, notes):
    """Writes a single file: the folder's tensors with `changes` (None takes one away), and its notes."""

    def write(changes=(), metadata=notes, name="svd_xt.safetensors"):
        content = {**tensors, **dict(changes)}
        save_file({key: tensor for key, tensor in content.items() if tensor is not None}, tmp_path / name, metadata)
        return tmp_path / name

    return write


# What it loads to.


def test_a_single_file_is_the_folder_it_was_made_from(folder, write):
    parts = load(write())
    same_networks(parts, load(folder))
    assert parts.configs.source.name == "svd_xt.safetensors"
    assert {part: getattr(parts.configs, part) for part in FILES} == {
        part: getattr(read_configs(folder), part) for part in FILES
    }
    assert parts.facts == load(folder).facts
    for part in PARTS:
        assert not getattr(parts, part).training
        assert not any(parameter.requires_grad for parameter in getattr(parts, part).parameters())
        assert not any(
            tensor.is_meta for tensor in (*getattr(parts, part).parameters(), *getattr(parts, part).buffers())
        )


@torch.no_grad()
def test_a_loaded_single_file_computes_what_the_folder_does(folder, write):
    one, two = load(write()), load(folder)
    torch.manual_seed(0)
    pixels, clip = torch.randn(3, 3, 16, 32), torch.randn(1, 3, 224, 224)
    assert off_by(*(parts.vae(pixels, num_frames=3).sample for parts in (one, two))) < 1e-6
    embeds = [parts.image_encoder(clip).image_embeds[:, None] for parts in (one, two)]
    assert off_by(*embeds) < 1e-6
    sample, ids = torch.randn(1, 3, 8, 8, 16), torch.tensor([[6.0, 127.0, 0.02]])
    assert off_by(*(parts.unet(sample, 0.3, embeds[0], added_time_ids=ids).sample for parts in (one, two))) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_file_of_half_the_bits_loads_to_float32(tensors, write, dtype):
    half = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    path = write(half)
    assert {tensor.dtype for part in PARTS for _, tensor in part_tensors(path, part)} == {dtype}
    unet = load(path).unet.state_dict()
    assert {tensor.dtype for tensor in unet.values()} == {torch.float32}
    assert torch.equal(unet["conv_in.weight"], half[f"{UNET}input_blocks.0.0.weight"].float())


def test_hash_of_a_unet_is_that_of_the_folder_and_follows_the_weights(folder, tensors, write, tmp_path):
    assert weights_hash(write(), "unet", None) == weights_hash(folder, "unet", None)
    half = {name: tensor.half() for name, tensor in tensors.items()}
    (tmp_path / "unet").mkdir()
    unet = {name: tensor.half() for name, tensor in part_tensors(folder, "unet")}
    save_file(unet, tmp_path / "unet/diffusion_pytorch_model.safetensors")
    hashed = weights_hash(write(half), "unet", None)
    assert hashed == weights_hash(tmp_path, "unet", None)
    assert hashed != weights_hash(folder, "unet", None)
    bias = f"{UNET}out.2.bias"
    assert weights_hash(write({bias: tensors[bias] + 1}), "unet", None) != weights_hash(folder, "unet", None)
    others = {name: tensor + 1 for name, tensor in tensors.items() if not name.startswith(UNET)}
    assert weights_hash(write(others), "unet", None) == weights_hash(folder, "unet", None)


def test_tensors_of_a_single_file_have_memory_of_their_own(write):
    path = write()
    for _, tensor in part_tensors(path, "image_encoder"):
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_what_released_files_hold_beside_the_model_is_ignored(folder, tensors, write):
    clip = "conditioner.embedders.0.open_clip.model."
    beside = {
        "model_ema.decay": torch.ones(1), "model_ema.diffusion_modelinput_blocks00weight": torch.ones(3),
        "denoiser.sigmas": torch.ones(4), "conditioner.embedders.3.encoder.encoder.conv_in.bias": torch.ones(32),
        f"{clip}transformer.resblocks.0.ln_1.weight": torch.ones(5), f"{clip}token_embedding.weight": torch.ones(7, 5),
        f"{clip}positional_embedding": torch.ones(3, 5), f"{clip}ln_final.bias": torch.ones(5),
        f"{clip}text_projection": torch.ones(5, 5), f"{clip}logit_scale": torch.ones(()), f"{clip}attn_mask": torch.ones(3, 3),
    }  # fmt: skip
    assert all(name.startswith(LEFTOVERS) for name in beside)
    assert not any(name.startswith(LEFTOVERS) for name in tensors)
    path = write(beside)
    same_networks(load(path), load(folder))
    assert weights_hash(path, "unet", None) == weights_hash(folder, "unet", None)


# Without notes: from shapes alone.


UNET_64 = {
    "block_out_channels": [64, 128], "num_attention_heads": [1, 2], "cross_attention_dim": 24, "addition_time_embed_dim": 16,
    "projection_class_embeddings_input_dim": 48, "layers_per_block": 1, "in_channels": 8, "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"],
    "up_block_types": ["UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"],
}  # fmt: skip
VAE = {
    "block_out_channels": [32, 64], "layers_per_block": 2, "down_block_types": ["DownEncoderBlock2D"] * 2,
    "latent_channels": 4, "in_channels": 3, "out_channels": 3,
}  # fmt: skip
CLIP = {
    "hidden_size": 768, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 12, "patch_size": 16,
    "image_size": 48, "projection_dim": 24, "num_channels": 3, "hidden_act": "gelu",
}  # fmt: skip


@pytest.fixture(scope="module")
def plain():
    """Networks of an architecture that shapes show, and the single file's tensors."""
    torch.manual_seed(0)
    configs = {"unet": UNET_64, "vae": {**VAE, "_class_name": "AutoencoderKLTemporalDecoder"}, "image_encoder": CLIP}
    networks = {part: network_of(part, config) for part, config in configs.items()}
    with torch.no_grad():
        networks["vae"].quant_conv.weight.copy_(torch.eye(8)[:, :, None, None])
        networks["vae"].quant_conv.bias.zero_()
    found = {}
    for part, config in configs.items():
        found |= originals(part, config, networks[part].state_dict())
    return networks, found


@torch.no_grad()
def test_a_file_without_notes_is_built_from_its_shapes(plain, tmp_path):
    networks, found = plain
    save_file(found, tmp_path / "svd.safetensors")
    parts = load(tmp_path / "svd.safetensors")
    for part in PARTS:
        for name, tensor in networks[part].state_dict().items():
            got = getattr(parts, part).state_dict()[name]
            if part == "vae" and name.startswith("encoder.conv_out"):
                assert torch.allclose(got, tensor)  # the identity after it was folded in
            else:
                assert torch.equal(got, tensor)
    sample, ids = torch.randn(1, 3, 8, 8, 16), torch.tensor([[6.0, 127.0, 0.02]])
    given = (sample, 0.3, torch.randn(1, 1, 24))
    assert off_by(*(unet(*given, added_time_ids=ids).sample for unet in (parts.unet, networks["unet"]))) < 1e-5
    pixels = torch.randn(1, 3, 48, 48)
    assert off_by(*(tower(pixels).image_embeds for tower in (parts.image_encoder, networks["image_encoder"]))) < 1e-5
    assert (parts.facts.d, parts.facts.f, parts.facts.clip_size, parts.facts.num_frames) == (24, 2, 48, 14)


@pytest.mark.parametrize(
    ("name", "frames"),
    [
        ("svd_xt", 25),
        ("SVD-XT-1-1", 25),
        ("svdXT.fp16", 25),
        ("svd", 14),
        ("mine", 14),
        ("next-svd", 14),
        ("textured", 14),
    ],
)
def test_the_name_says_for_how_many_frames_it_was_made(plain, tmp_path, name, frames):
    path = tmp_path / f"{name}.safetensors"
    save_file(plain[1], path)
    assert read_configs(path).unet["num_frames"] == frames


@pytest.mark.parametrize(
    "notes",
    ["{", "3", "null", "[1]", '"configs"', "{}", '{"configs": 1}', '{"configs": {"unet": {}}}',
     json.dumps({"configs": dict.fromkeys(FILES, "unet")}), json.dumps({"configs": {**{part: {} for part in FILES}, "vae": None}}),
     "[" * 50_000],
)  # fmt: skip
def test_notes_that_are_garbage_are_passed_over(plain, tmp_path, notes):
    save_file(plain[1], tmp_path / "svd.safetensors", {NOTES: notes})
    configs = read_configs(tmp_path / "svd.safetensors")
    assert {key: configs.unet[key] for key in UNET_64} == UNET_64
    assert configs.image_encoder["hidden_size"] == 768


def test_attention_of_a_vae_may_be_stored_as_matrices(plain, tmp_path):
    """Some tools write the 1x1 convolutions of the original so."""
    flat = {n: t[:, :, 0, 0] if ".attn_1." in n and t.dim() == 4 else t for n, t in plain[1].items()}
    assert flat["first_stage_model.encoder.mid.attn_1.q.weight"].dim() == 2
    save_file({name: tensor.contiguous() for name, tensor in flat.items()}, tmp_path / "svd.safetensors")
    got = load(tmp_path / "svd.safetensors").vae.state_dict()
    name = "encoder.mid_block.attentions.0.to_q.weight"
    assert torch.equal(got[name], plain[0]["vae"].state_dict()[name])


def test_notes_of_other_things_are_kept(plain, tmp_path):
    save_file(plain[1], tmp_path / "svd.safetensors", {NOTES: json.dumps({"base": "x"}), "modelspec.title": "t"})
    file = read_single_file(tmp_path / "svd.safetensors")
    assert file.notes == {"base": "x"}
    assert file.path == tmp_path / "svd.safetensors"
    assert len(file.names("unet")) == sum(name.startswith(UNET) for name in plain[1])


@torch.no_grad()
@pytest.mark.parametrize("quant", [True, False])
def test_an_image_decoder_model_keeps_its_frame_wise_vae(plain, tmp_path, quant):
    config = {
        **VAE, "_class_name": "AutoencoderKL", "up_block_types": ["UpDecoderBlock2D"] * 2, "use_quant_conv": quant,
        "use_post_quant_conv": quant,
    }  # fmt: skip
    torch.manual_seed(1)
    vae = network_of("vae", config)
    found = {name: tensor for name, tensor in plain[1].items() if not name.startswith(PREFIXES["vae"])}
    found |= originals("vae", config, vae.state_dict())
    assert ("first_stage_model.post_quant_conv.weight" in found) is quant
    assert f"{PREFIXES['vae']}decoder.up.1.block.0.conv1.weight" in found
    path = tmp_path / "svd_image_decoder.safetensors"
    save_file(found, path)
    assert read_single_file(path).family.name == "SVD image_decoder"
    loaded = load(path).vae
    assert type(loaded).__name__ == "AutoencoderKL"
    latents, pixels = torch.randn(3, 4, 8, 12), torch.randn(3, 3, 16, 24)
    assert off_by(loaded.decode(latents).sample, vae.decode(latents).sample) < 1e-6
    assert off_by(loaded.encode(pixels).latent_dist.parameters, vae.encode(pixels).latent_dist.parameters) < 1e-6


# Memory.


_PEAK = """
import sys, threading, time
from pathlib import Path
import torch
from svdtune.model.load import load_part
from svdtune.model.source import read_configs

def anonymous():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

small, path = map(Path, sys.argv[1:])
load_part(read_configs(small), "unet", None)  # what the libraries need once
configs, before, peak, done = read_configs(path), anonymous(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)

watcher = threading.Thread(target=watch)
watcher.start()
unet = load_part(configs, "unet", None)
peak, done = max(peak, anonymous()), True
watcher.join()
print(sum(p.nbytes for p in unet.parameters()), peak - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RssAnon is Linux's")
def test_a_unet_is_never_twice_in_memory(plain, tmp_path):
    config = {**UNET_64, "block_out_channels": [192, 512], "num_attention_heads": [3, 8]}
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in build_part("unet", config).state_dict().items()}
    big = originals("unet", config, {name: torch.zeros(shape) for name, shape in shapes.items()})
    assert sum(tensor.nbytes for tensor in big.values()) > 250e6
    save_file(plain[1], tmp_path / "small.safetensors")
    save_file({**{n: t for n, t in plain[1].items() if not n.startswith(UNET)}, **big}, tmp_path / "big.safetensors")
    del big
    command = [sys.executable, "-c", _PEAK, tmp_path / "small.safetensors", tmp_path / "big.safetensors"]
    told = []
    for _ in range(3):  # a crowded machine can only add to what is needed
        ran = subprocess.run(command, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        parameters, grown = map(int, ran.stdout.split())
        told.append(grown / parameters)
        if 0.9 < told[-1] < 1.35:
            return
    pytest.fail(f"peak of anonymous memory over the parameters' bytes: {told}")


# What it is instead.


def refused(path, sentence):
    for read in (read_configs, load):
        with pytest.raises(ModelError, match=sentence) as caught:
            read(path)
        assert str(path) in str(caught.value)


def image_unet(cross, **ids):
    return {
        f"{UNET}input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3), f"{UNET}time_embed.0.weight": torch.zeros(8, 320),
        f"{UNET}out.2.weight": torch.zeros(4, 320, 3, 3),
        f"{UNET}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(8, cross),
        **{f"{UNET}{name}": tensor for name, tensor in ids.items()},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (image_unet(768), r"one file: SD 1\.x, original naming; expected a whole SVD model\. It is an image model.*Take the release's own"),
        (image_unet(2048, **{"label_emb.0.0.weight": torch.zeros(8, 2816)}), r"one file: SDXL, original naming; .*no temporal layers"),
        ({f"lora_unet_attn2_to_k.{end}": torch.zeros(4, 4) for end in ("lora_down.weight", "lora_up.weight")},
         r"one file: LoRA, kohya naming; .*Give the model as model\.pretrained; `svdtune sample BASE IMAGE --lora FILE`"),
        ({"a.weight": torch.zeros(2)}, r"one file: unknown; expected a whole SVD model\. Take the release's own file"),
    ],
)  # fmt: skip
def test_another_model_is_named(tmp_path, content, sentence):
    save_file(content, tmp_path / "model.safetensors")
    refused(tmp_path / "model.safetensors", sentence)


def test_a_unet_in_diffusers_names_is_sent_to_its_folder(folder):
    refused(
        folder / "unet/diffusion_pytorch_model.safetensors",
        r"one file: SVD, diffusers naming; .*weights of unet in diffusers' names: give the folder above them",
    )


def test_a_cut_download_is_told(write):
    path = write()
    path.write_bytes(path.read_bytes()[:-1000])
    refused(path, r"it is cut off: its header declares tensors up to byte .*Download it again")


def test_a_pickle_is_told_whatever_its_name(tmp_path, tensors):
    torch.save(tensors, tmp_path / "svd.safetensors")
    refused(
        tmp_path / "svd.safetensors",
        r"no safetensors file but a file of torch\.save, whatever its name says\. It can run code",
    )


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ("image_encoder", r"it holds no CLIP image encoder \(no weight's name begins with conditioner\..*\)\. Without it no video"),
        ("vae", r"it holds no VAE \(no weight's name begins with first_stage_model\.\)"),
    ],
)  # fmt: skip
def test_a_file_without_a_part_is_told(write, tensors, part, told):
    refused(write({name: None for name in tensors if name.startswith(PREFIXES[part])}), told)


@pytest.mark.parametrize("with_notes", [True, False])
@pytest.mark.parametrize(
    ("name", "made", "told"),
    [
        (f"{UNET}input_blocks.1.0.time_stack.in_layers.0.bias", None,
         r"unet: .*1 missing \(down_blocks\.0\.resnets\.0\.temporal_res_block\.norm1\.bias\)\. Missing weights would train"),
        (f"{UNET}motion.weight", lambda _: torch.ones(2), r"unet: .*1 unexpected \(motion\.weight\)"),
        (f"{UNET}out.2.extra", lambda _: torch.ones(2), r"unet: .*1 unexpected \(conv_out\.extra\)"),
        (f"{UNET}time_embed.2.bias", lambda tensor: tensor[:-1].clone(), r"unet: .*1 misshapen \(time_embedding\.linear_2\.bias\)"),
        ("first_stage_model.decoder.mid.attn_1.q.weight", None, r"vae: .*1 missing \(decoder\.mid_block\.attentions\.0\.to_q\.weight\)"),
        ("first_stage_model.encoder.conv_out.bias", None,
         r"vae: .*3 missing \(encoder\.conv_out\.bias, quant_conv\.bias, quant_conv\.weight\)"),
        ("first_stage_model.encoder.conv_out.bias", lambda _: torch.ones(()), r"vae: .*misshapen \(encoder\.conv_out\.bias, quant_conv"),
        ("first_stage_model.decoder.mid.attn_1.k.weight", lambda tensor: tensor[0, 0, 0],
         r"vae: .*1 misshapen \(decoder\.mid_block\.attentions\.0\.to_k\.weight\)"),
        ("conditioner.embedders.0.open_clip.model.visual.proj", lambda tensor: tensor[0].clone(),
         r"(image_encoder: .*1 misshapen \(visual_projection\.weight\)|open_clip\.model\.visual\.proj is not there, or has another shape)"),
        ("conditioner.embedders.0.open_clip.model.visual.transformer.resblocks.0.attn.in_proj_bias", lambda _: torch.ones(2),
         r"image_encoder: .*3 misshapen \(vision_model\.encoder\.layers\.0\.self_attn\.k_proj\.bias, "),
        ("first_stage_model.post_quant_conv.bias", lambda _: torch.ones(4), r"vae: .*1 unexpected \(post_quant_conv\.bias\)"),
        ("conditioner.embedders.0.open_clip.model.visual.transformer.resblocks.0.attn.in_proj_bias", None,
         r"image_encoder: .*3 missing \(vision_model\.encoder\.layers\.0\.self_attn\.k_proj\.bias, "),
        ("conditioner.embedders.0.open_clip.model.visual.transformer.resblocks.0.attn.in_proj_weight", lambda tensor: tensor[:-3].clone(),
         r"image_encoder: .*3 misshapen \(vision_model\.encoder\.layers\.0\.self_attn\.k_proj\.weight, "),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(write, plain, tmp_path, name, made, told, with_notes):
    path, found = tmp_path / "svd.safetensors", plain[1]
    if with_notes:
        path = write({name: None if made is None else made(read_one(write(), name))})
    else:
        changed = {**found, name: None if made is None else made(found.get(name))}
        save_file({key: tensor for key, tensor in changed.items() if tensor is not None}, path)
    with pytest.raises(ModelError, match=told) as caught:
        load(path)
    assert str(path) in str(caught.value)


def read_one(path, name):
    return load_file(path).get(name)


@pytest.mark.parametrize(
    ("part", "change", "told"),
    [
        ("unet", {"layers_per_block": 2}, r"unet: the weights are not the network of .*missing \(.*unexpected \("),
        ("unet", {"block_out_channels": [64, 128]}, r"unet: .*misshapen \("),
        ("unet", {"cross_attention_dim": 32}, r"embeddings of width 24, the UNet's cross_attention_dim is 32"),
        ("vae", {"layers_per_block": 2}, r"vae: .*missing \("),
        ("vae", {"_class_name": "AutoencoderKL", "up_block_types": ["UpDecoderBlock2D"] * 3}, r"vae: .*(missing|unexpected) \("),
        ("image_encoder", {"num_hidden_layers": 1}, r"image_encoder: .*unexpected \(transformer\.resblocks\.1\."),
        ("image_encoder", {"intermediate_size": 64}, r"image_encoder: .*misshapen \(vision_model\.encoder\.layers\.0\.mlp\.fc1\.bias"),
    ],
)  # fmt: skip
def test_notes_that_contradict_the_tensors_are_told(write, notes, part, change, told):
    configs = json.loads(notes[NOTES])["configs"]
    configs[part] = {**configs[part], **change}
    with pytest.raises(ModelError, match=told):
        load(write(metadata={NOTES: json.dumps({"configs": configs})}))


@pytest.mark.parametrize(
    ("part", "key"),
    [
        ("unet", "down_block_types"),
        ("unet", "layers_per_block"),
        ("unet", "in_channels"),
        ("unet", "cross_attention_dim"),
        ("vae", "block_out_channels"),
        ("vae", "layers_per_block"),
        ("image_encoder", "num_hidden_layers"),
    ],
)
def test_notes_without_a_number_that_shapes_follow_from_are_told(write, notes, part, key):
    configs = json.loads(notes[NOTES])["configs"]
    del configs[part][key]
    path = write(metadata={NOTES: json.dumps({"configs": configs})})
    with pytest.raises(ModelError, match=key):
        load(path)
    if "layers" in key or "block" in key:  # names follow from it: no network is needed to see it
        with pytest.raises(ModelError, match=f"{part}: {key} is missing in its JSON"):
            read_configs(path)
