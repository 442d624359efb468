"""Widening: the image model's output to the last digits, nothing random where it shows, and nothing else is ever adapted."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel, UNetSpatioTemporalConditionModel
from safetensors.torch import load_file, save_file

from svdtune.config.schema import Adapt, Model
from svdtune.errors import ConfigError, ModelError
from svdtune.model.adapt import adapt
from svdtune.model.load import load_model
from svdtune.model.widen import apply_widening, plan_widening, require_learning

REPO = Path(__file__).parents[2]
ASSETS = Path(__file__).parents[1] / "assets"
UNET = "unet/diffusion_pytorch_model.safetensors"
T = 5


def image_unet(*, linear: bool, channels: int = 4) -> UNet2DConditionModel:
    """A random image model with the layers of tests/assets/unet_config.json; like 2.x (linear) or 1.x (1x1 convolutions)."""
    torch.manual_seed(3)
    unet = UNet2DConditionModel(
        block_out_channels=(64, 64), attention_head_dim=(2, 2), cross_attention_dim=24, layers_per_block=1, in_channels=channels,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        use_linear_projection=linear,
    )  # fmt: skip
    return unet.eval()  # pyright: ignore[reportReturnType]


def shapes(unet) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}


@pytest.fixture(scope="module")
def expected() -> dict[str, tuple[int, ...]]:
    config = json.loads((ASSETS / "unet_config.json").read_text())
    with torch.device("meta"):
        return shapes(UNetSpatioTemporalConditionModel.from_config(config))


@pytest.fixture
def folder(svd_folder, tmp_path) -> Path:
    shutil.copytree(svd_folder, tmp_path / "svd")
    return tmp_path / "svd"


def put(folder: Path, unet) -> Path:
    save_file(
        {name: tensor.contiguous() for name, tensor in unet.state_dict().items()}, folder / UNET, {"format": "pt"}
    )
    return folder


def widened(folder: Path, seed: int = 0):
    return load_model(Model(pretrained=str(folder), variant=None, on_mismatch="adapt"), seed=seed)


def ask(unet, sample, token):
    ids = torch.tensor([[6.0, 127.0, 0.02]]).expand(len(sample), -1)
    return unet(sample, torch.tensor(0.7), encoder_hidden_states=token, added_time_ids=ids).sample


def same_epsilons(image, video) -> None:
    """diffusers' SVD has other epsilons than image models in the group norms of some blocks; no weight can make up for that."""
    for name, module in video.named_modules():
        if isinstance(module, torch.nn.GroupNorm) and "temporal" not in name:
            image.get_submodule(name.replace(".spatial_res_block.", ".")).eps = module.eps


@pytest.mark.parametrize("linear", [True, False], ids=["2.x", "1.x"])
def test_every_frame_is_what_the_image_model_makes_of_it(folder, linear):
    image = image_unet(linear=linear)
    parts = widened(put(folder, image))
    generator = torch.Generator().manual_seed(0)
    sample, token = torch.randn(2, T, 8, 8, 16, generator=generator), torch.randn(2, 1, 24, generator=generator)
    with torch.no_grad():
        for name, parameter in parts.unet.named_parameters():
            if name.endswith("mix_factor"):
                parameter.normal_(std=3.0, generator=generator)
        video = ask(parts.unet, sample, token)
        frames = image(sample[:, :, :4].flatten(0, 1), 0.7, token.repeat_interleave(T, 0)).sample
        assert frames.std() > 0.1
        assert (video.flatten(0, 1) - frames).abs().max() < 2e-4
        same_epsilons(image, parts.unet)
        frames = image(sample[:, :, :4].flatten(0, 1), 0.7, token.repeat_interleave(T, 0)).sample
        assert (video.flatten(0, 1) - frames).abs().max() < 1e-5
        sample[:, 1:] += 1
        assert torch.equal(ask(parts.unet, sample, token)[:, 0], video[:, 0])
    assert all(not parameter.is_meta for parameter in parts.unet.parameters())
    assert not parts.unet.training


def test_gradients_reach_everything_that_starts_at_zero_and_then_the_rest(folder):
    parts = widened(put(folder, image_unet(linear=True)))
    trained = adapt(parts.unet, Adapt(method="full"), dtype=torch.float32, seed=0)
    assert parts.widening
    require_learning(parts.widening, trained, "full")
    generator = torch.Generator().manual_seed(0)
    sample, token = torch.randn(1, T, 8, 8, 8, generator=generator), torch.randn(1, 1, 24, generator=generator)
    optimizer = torch.optim.SGD(trained.values(), lr=1e-2)
    ask(parts.unet, sample, token).square().mean().backward()
    for name in parts.widening.zero:
        assert trained[name].grad.abs().max() > 0, name
    assert trained["conv_in.weight"].grad[:, 4:].abs().max() > 0
    optimizer.step()
    optimizer.zero_grad()
    output = ask(parts.unet, sample, token)
    output.square().mean().backward()
    behind = [name for name in parts.widening.seeded if name in trained]
    # The first attention output is still tiny, but not nothing.
    assert [name for name in behind if trained[name].grad.abs().max() == 0] == []
    changed = sample.clone()
    changed[:, 1:] += 1
    assert not torch.equal(ask(parts.unet, changed, token)[:, 0], output[:, 0])


def test_what_is_drawn_depends_on_the_seed_alone(folder):
    put(folder, image_unet(linear=True))
    first, again, other = (widened(folder, seed).unet.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    different = {name for name in first if not torch.equal(first[name], other[name])}
    assert different
    assert all(name.endswith(("conv1.weight", "linear_1.weight")) for name in different)


def test_a_video_model_with_an_image_models_conv_in_gets_zeros_for_the_conditioning_channels(folder):
    tensors = load_file(folder / UNET)
    whole = tensors["conv_in.weight"]
    tensors["conv_in.weight"] = whole[:, :4].contiguous()
    save_file(tensors, folder / UNET, {"format": "pt"})
    parts = widened(folder)
    got = parts.unet.state_dict()
    assert torch.equal(got["conv_in.weight"][:, :4], whole[:, :4])
    assert not got["conv_in.weight"][:, 4:].any()
    assert all(torch.equal(got[name], tensors[name]) for name in got if name != "conv_in.weight")
    assert parts.widening
    (said,) = parts.widening.said
    assert said.startswith(
        "model.on_mismatch=adapt: conv_in has 4 input channels in the file and 8 in SVD's UNet; the 4 for the"
    )
    # spatial trains conv_in; lora does not.
    require_learning(parts.widening, adapt(parts.unet, Adapt(method="spatial"), dtype=torch.float32, seed=0), "spatial")
    with pytest.raises(ConfigError, match=r"adapt\.method: got temporal, expected full: .*starts 1 weights .*conv_in\.weight "
                       r"would stay as it is, and the conditioning image would have no effect") as error:  # fmt: skip
        require_learning(parts.widening, ["conv_out.weight"], "temporal")
    assert error.value.patch == ("adapt.method=full",)


@pytest.mark.parametrize("method", ["lora", "spatial", "temporal", "temporal_attention"])
def test_methods_that_would_leave_temporal_layers_or_ids_at_zero_are_refused(folder, method):
    parts = widened(put(folder, image_unet(linear=True)))
    trained = adapt(parts.unet, Adapt(method=method), dtype=torch.float32, seed=0)
    assert parts.widening
    with pytest.raises(
        ConfigError, match=rf"adapt\.method: got {method}, expected full: model\.on_mismatch=adapt starts \d+ "
    ):
        require_learning(parts.widening, trained, method)


def test_a_sound_model_is_not_touched(svd_folder, expected):
    assert plan_widening(expected, dict(expected)) is None
    parts = widened(svd_folder)
    saved = load_file(svd_folder / UNET)
    assert parts.widening is None
    assert all(torch.equal(tensor, saved[name]) for name, tensor in parts.unet.state_dict().items())


def test_without_adapt_the_error_says_that_it_could(folder):
    put(folder, image_unet(linear=True))
    with pytest.raises(
        ModelError, match=r"unet: .*set model\.on_mismatch=adapt, and adapt\.method=full to train what it adds"
    ):
        load_model(Model(pretrained=str(folder), variant=None))


def damage(kind: str, got: dict) -> dict:
    """Shapes of an image model, or of SVD, with one thing about them that no widening covers."""
    name = "mid_block.resnets.0.conv1.weight"
    if kind == "one weight is missing":
        return {key: shape for key, shape in got.items() if key != name}
    if kind == "one more weight":
        return {**got, "motion.weight": (2,)}
    if kind == "inpainting, nine channels":
        return {**got, "conv_in.weight": (64, 9, 3, 3)}
    if kind == "other width":
        return {**got, name: (32, 64, 3, 3)}
    if kind == "other cross-attention width":
        return {
            key: (shape[0], 32) if key.endswith(("attn2.to_k.weight", "attn2.to_v.weight")) else shape
            for key, shape in got.items()
        }
    return {**got, "mid_block.attentions.0.proj_in.weight": (64, 64, 3, 3)}


@pytest.mark.parametrize(
    "kind",
    [
        "one weight is missing",
        "one more weight",
        "inpainting, nine channels",
        "other width",
        "other cross-attention width",
        "3x3",
    ],
)
def test_nothing_else_is_adapted(expected, kind):
    got = shapes(image_unet(linear=True))
    assert plan_widening(expected, got)
    assert plan_widening(expected, damage(kind, got)) is None


def test_a_video_model_that_lost_temporal_layers_is_damaged_not_an_image_model(folder):
    tensors = load_file(folder / UNET)
    save_file({k: v for k, v in tensors.items() if "temporal_transformer" not in k}, folder / UNET, {"format": "pt"})
    with pytest.raises(ModelError, match=r"missing \(.*temporal_transformer_blocks.*train from random values") as error:
        widened(folder)
    assert "set model.on_mismatch" not in str(error.value)


def test_every_weight_has_one_origin_and_what_is_said(expected):
    plan = plan_widening(expected, shapes(image_unet(linear=False)))
    assert plan
    names = [*plan.same, *plan.padded, *plan.zero, *plan.like, *plan.seeded]
    assert sorted(names) == sorted(expected)
    assert all("temporal" in name for name in plan.like)
    assert len(plan.said) == 2
    new = len(expected) - len(plan.same) - 1
    assert (
        f"the file is an image model; the {new} weights of temporal layers and time ids that it lacks start so"
        in plan.said[1]
    )
    assert "num_attention_heads in unet/config.json must be the image model's" in plan.said[1]
    made = apply_widening(plan, image_unet(linear=False).state_dict(), seed=0)
    assert {name: tuple(tensor.shape) for name, tensor in made.items()} == expected


def test_eight_channels_of_an_editing_model_stay(expected):
    plan = plan_widening(expected, shapes(image_unet(linear=True, channels=8)))
    assert plan
    assert not plan.padded
    assert len(plan.said) == 1


def test_an_image_models_config_says_which_one_to_put(folder):
    path = folder / "unet/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_class_name": "UNet2DConditionModel"}))
    with pytest.raises(
        ModelError, match=r"this is the config of an image model\. .*put the unet/config\.json of an SVD release"
    ):
        widened(folder)


def train(folder: Path, to: Path, method: str) -> subprocess.CompletedProcess[str]:
    """One step of a run on the model in `folder`, in a process of its own."""
    options = [f"data.root={to / 'clips'}", f"run.dir={to}", "run.name=wide", f"model.pretrained={folder}", "model.variant=null",
               "model.on_mismatch=adapt", f"adapt.method={method}", "preflight.enabled=false", "data.num_frames=3", "data.height=32",
               "data.width=48", "data.workers=0", "run.threads=1", "train.warmup=0", "train.steps=1", "train.batch_size=1",
               "train.precision=bf16", "validation.samples=0", "validation.clips=0"]  # fmt: skip
    return subprocess.run(
        [sys.executable, "-m", "svdtune", "train", str(REPO / "configs/tiny.yaml"), *options],
        capture_output=True, text=True, cwd=REPO, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_a_run_says_it_records_it_samples_and_exports_it(folder, tmp_path):
    from svdtune.data.demo import write_demo
    from svdtune.sample.cli import load_pipeline
    from svdtune.sample.run import open_checkpoint

    write_demo(tmp_path / "clips", clips=4, motion="down", seed=0)
    put(folder, image_unet(linear=False))
    refused = train(folder, tmp_path, "lora")
    assert refused.returncode == 2
    assert "adapt.method: got lora, expected full" in refused.stderr
    done = train(folder, tmp_path, "full")
    assert done.returncode == 0, done.stderr[-3000:]
    checkpoint = tmp_path / "wide/checkpoints/step-00000001"
    conventions = json.loads((checkpoint / "MANIFEST.json").read_text())["conventions"]
    assert len(conventions["widened"]) == 2
    assert all(done.stderr.count(sentence) == 1 for sentence in conventions["widened"])
    exported = UNetSpatioTemporalConditionModel.from_pretrained(tmp_path / "wide/export/unet").state_dict()
    trained = load_file(checkpoint / "unet.safetensors")
    assert all(torch.equal(exported[name], trained[name]) for name in trained)
    # Frozen are only weights without any effect; they are the file's where it has them.
    own = image_unet(linear=False).state_dict()
    frozen = exported.keys() - trained.keys()
    assert all(torch.equal(exported[name], own[name]) for name in frozen & own.keys())
    pipeline = load_pipeline(open_checkpoint(checkpoint), "no", torch.device("cpu"))
    sampled = pipeline.unet.state_dict()
    assert all(torch.equal(sampled[name], trained[name]) for name in trained)
