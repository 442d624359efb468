"""The model card: its code gives the model that was trained, and nothing in it breaks or says where it was made."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from diffusers.utils import load_image
from huggingface_hub import ModelCard, metadata_load
from PIL import Image, ImageOps
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from svdtune.checkpoint.card import model_card
from svdtune.checkpoint.export import Base, export_run
from svdtune.checkpoint.store import publish
from svdtune.checkpoint.training import Training, base_license, card_images, training_of_run
from svdtune.config.load import resolved_yaml
from svdtune.config.schema import Adapt, Config, Model, Run, Train
from svdtune.errors import CheckpointError
from svdtune.model.adapt import adapt
from svdtune.model.load import load_model
from svdtune.sample.sampler import SampleSettings, build_pipeline, sample_video
from svdtune.sample.video import read_image

XT = "stabilityai/stable-video-diffusion-img2vid-xt"
HEIGHT, WIDTH = 16, 24
CONVENTIONS = {
    "base": {"pretrained": XT, "variant": "fp16", "revision": None, "unet_sha256": "ab" * 32},
    "adapt": "temporal",
    "bridge": None,
    "widened": [],
    "added_time_ids": ["fps - 1", "motion_bucket_id", "noise_aug_strength"],
    "num_frames": 5,
    "height": HEIGHT,
    "width": WIDTH,
    "resize": "cover",
    "fps": 7.5,
    "motion_bucket": 99,
    "p_mean": 1.0,
    "p_std": 1.6,
    "dropout": 0.15,
    "noise_aug": [-3.0, 0.5],
    "noise_aug_strength": 0.05,
    "guidance": [1.0, 2.5],
    "inference_steps": 2,
}
SETTINGS = SampleSettings(
    num_frames=5, fps=7.5, motion_bucket_id=99, noise_aug_strength=0.05, num_inference_steps=2, min_guidance_scale=1.0,
    max_guidance_scale=2.5, decode_chunk_size=2,
)  # fmt: skip
KNOWN = {
    "license": "other",
    "license_name": "stable-video-diffusion-community",
    "license_link": f"https://huggingface.co/{XT}/blob/main/LICENSE.md",
}
TRAINING = Training(
    "my-run", 100, CONVENTIONS, base=XT, licence=KNOWN, decode_chunk_size=2, versions={"svdtune": "0", "torch": "2"}
)


def with_base(pretrained: str, **conventions) -> dict:
    return {**CONVENTIONS, "base": {**CONVENTIONS["base"], "pretrained": pretrained}, **conventions}


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def fences(card: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)


# --- its code ---


@pytest.fixture(scope="module")
def hub_folder(svd_folder, tmp_path_factory) -> Path:
    """The random SVD as the hub has it: float16 files with a variant's names, and a tower whose config says float16."""
    folder = tmp_path_factory.mktemp("hub") / "somebody" / "svd"
    shutil.copytree(svd_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for part, kind in (("unet", UNetSpatioTemporalConditionModel), ("vae", AutoencoderKLTemporalDecoder)):
        kind.from_pretrained(svd_folder / part).half().save_pretrained(folder / part, variant="fp16")
    tower = CLIPVisionModelWithProjection.from_pretrained(svd_folder / "image_encoder")
    tower.half().save_pretrained(folder / "image_encoder", variant="fp16")
    return folder


def wide_tower(hub_folder: Path, folder: Path) -> Path:
    """The same with a CLIP tower that is wider than the UNet's cross-attention."""
    shutil.copytree(hub_folder, folder, ignore=shutil.ignore_patterns("image_encoder"))
    config = CLIPVisionConfig.from_pretrained(hub_folder / "image_encoder")
    config.projection_dim = 40
    torch.manual_seed(1)
    tower = CLIPVisionModelWithProjection(config)
    tower.half().save_pretrained(folder / "image_encoder", variant="fp16")
    return folder


def first_frame() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))


def sampled(model) -> np.ndarray:
    configs = model.configs
    pipeline = build_pipeline(model.unet, model.vae, model.image_encoder, configs.scheduler, configs.feature_extractor)
    image = torch.from_numpy(np.array(first_frame())).permute(2, 0, 1).float() / 127.5 - 1
    return sample_video(pipeline, image, SETTINGS, seed=0)


def run_code(card: str, monkeypatch, cwd: Path) -> np.ndarray:
    """The frames that both fences of `card` make when they are run in `cwd`, as they are."""
    first_frame().save(cwd / "first_frame.png")
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # there the card takes half precision
    names: dict = {}
    for code in fences(card):
        exec(code, names)
    names["pipe"].save_pretrained(cwd / "again")  # an ordinary pipeline, to its end
    assert type(names["pipe"].unet) is UNetSpatioTemporalConditionModel
    with Image.open(cwd / "video.webp") as video:
        assert getattr(video, "n_frames", 1) > 1
    return np.stack([np.array(frame) for frame in names["frames"]])


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(
    ("method", "dora", "bridge"),
    [
        ("full", False, False),
        ("temporal", False, False),
        ("lora", False, False),
        ("lora", True, False),
        ("lora", False, True),
    ],
    ids=["full", "temporal", "lora", "dora", "lora with a bridge"],
)
def test_its_code_samples_the_trained_model(tmp_path, monkeypatch, hub_folder, method, dora, bridge):
    lora = method == "lora"
    base = tmp_path / "somebody" / "svd"  # where the code finds the hub id `somebody/svd` without a hub
    base.parent.mkdir()
    wide_tower(hub_folder, base) if bridge else base.symlink_to(hub_folder)
    model = load_model(Model(str(base), variant="fp16"), bridge=bridge, seed=0)
    before = sampled(model)
    trained = adapt(model.unet, Adapt(method=method, rank=4, dora=dora), dtype=torch.float32, seed=0)
    torch.manual_seed(2)
    for parameter in trained.values():
        parameter.data += 0.05 * torch.randn_like(parameter)
    expected = sampled(model)
    export_run(tmp_path / "export", base=Base("somebody/svd", base, "fp16"), unet=model.unet, lora=lora, half=False)
    conventions = with_base("somebody/svd", adapt=method, bridge="linear" if bridge else None)
    training = replace(TRAINING, conventions=conventions, base="somebody/svd")
    (tmp_path / "export/README.md").write_text(model_card(training, kind="lora" if lora else "pipeline"))

    card = (tmp_path / "export/README.md").read_text()
    got = run_code(card, monkeypatch, tmp_path)

    assert got.shape == expected.shape == (5, HEIGHT, WIDTH, 3)
    assert np.abs(got.astype(int) - expected).max() <= 1
    assert (got != expected).mean() < 0.01
    assert np.abs(before.astype(int) - expected).mean() > 2, "the training did nothing, so the test would see nothing"
    lines = [line for line in fences(card)[0].split("\n") if line]
    assert len([line for line in lines if not lora or not line.startswith(("import", "from"))]) == 3


def test_the_code_of_an_adapter_of_tiny_runs_too(tmp_path, monkeypatch):
    model = load_model(Model("tiny"), bridge=False, seed=0)
    adapt(model.unet, Adapt(rank=2), dtype=torch.float32, seed=0)
    export_run(
        tmp_path / "export", base=Base("tiny", model.configs.source, "fp16"), unet=model.unet, lora=True, half=True
    )
    training = replace(TRAINING, conventions=with_base("tiny", adapt="lora", revision="x"), base="tiny")
    names: dict = {}
    monkeypatch.chdir(tmp_path)
    exec(fences(model_card(training, kind="lora"))[0], names)
    assert type(names["pipe"].unet) is UNetSpatioTemporalConditionModel
    assert {p.dtype for p in names["pipe"].unet.parameters()} == {torch.float32}


@pytest.mark.parametrize("resize", ["cover", "pad", "squash"])
def test_a_first_frame_of_another_size_is_fitted_as_in_training(tmp_path, monkeypatch, resize):
    path = tmp_path / "first_frame.png"
    smooth = np.linspace(0, 255, 96 * 48 * 3).reshape(96, 48, 3)  # half a pixel is rounded another way by PIL
    Image.fromarray(smooth.astype(np.uint8)).save(path)
    expected = (read_image(path, height=HEIGHT, width=WIDTH, resize=resize).permute(1, 2, 0) + 1) * 127.5
    code = fences(model_card(replace(TRAINING, conventions={**CONVENTIONS, "resize": resize}), kind="pipeline"))[1]
    (line,) = [line for line in code.split("\n") if line.startswith("image = ")]
    monkeypatch.chdir(tmp_path)
    names: dict = {"ImageOps": ImageOps, "load_image": load_image}
    exec(line, names)
    got = np.array(names["image"]).astype(float)
    assert got.shape == (HEIGHT, WIDTH, 3)
    assert np.abs(got - expected.numpy()).mean() < 2


def test_revision_and_variant_of_a_hub_base_are_in_the_code():
    base = {**CONVENTIONS["base"], "revision": "abc123"}
    training = replace(TRAINING, conventions={**CONVENTIONS, "adapt": "lora", "base": base})
    code = fences(model_card(training, kind="lora"))[0]
    assert f'from_pretrained("{XT}", variant="fp16", revision="abc123", torch_dtype=torch.float32)' in code


# --- its front matter ---


@pytest.mark.parametrize(
    ("kind", "library", "relation"), [("pipeline", "diffusers", "finetune"), ("lora", "peft", "adapter")]
)
def test_front_matter_is_what_the_hub_reads(tmp_path, kind, library, relation):
    text = model_card(TRAINING, kind=kind)
    card = ModelCard(text)
    assert card.data.to_dict() == {
        **KNOWN,
        "base_model": XT,
        "base_model_relation": relation,
        "library_name": library,
        "pipeline_tag": "image-to-video",
        "tags": ["stable-video-diffusion", "svdtune", *(["lora"] if kind == "lora" else [])],
    }
    assert card.text.lstrip().startswith("# my-run\n")
    (tmp_path / "README.md").write_text(text)
    assert metadata_load(tmp_path / "README.md") == front_matter(text)
    assert "Powered by Stability AI" in text


@pytest.mark.parametrize(
    ("pretrained", "expected"),
    [
        (XT, KNOWN),
        (XT.removesuffix("-xt"), KNOWN | {"license_link": KNOWN["license_link"].replace("-xt", "")}),
        (f"{XT}-1-1", {
            "license": "other",
            "license_name": "stable-video-diffusion-1-1-community",
            "license_link": f"https://huggingface.co/{XT}-1-1/blob/main/LICENSE.md",
        }),
        ("tiny", {"license": "apache-2.0"}),
        ("somebody/svd", {"license": "other", "license_name": "unknown"}),
        ("/data/models/svd", {"license": "other", "license_name": "unknown"}),
    ],
)  # fmt: skip
def test_licence_without_a_readme(tmp_path, pretrained, expected):
    assert base_license(pretrained, tmp_path) == base_license(pretrained, None) == expected
    card = model_card(replace(TRAINING, licence=expected), kind="pipeline")
    assert {key: value for key, value in front_matter(card).items() if key.startswith("license")} == expected
    sentence = "The licence of the base could not be read."
    assert (sentence in card) == (expected.get("license_name") == "unknown")


@pytest.mark.parametrize(
    ("pretrained", "readme", "expected"),
    [
        ("/data/svd-xt", "license: other\nlicense_name: stable-video-diffusion-community\nlicense_link: LICENSE.md",
         KNOWN | {"license_link": KNOWN["license_link"].replace("-xt", "")}),
        ("/data/svd", "license: mit", {"license": "mit"}),
        ("/data/svd", "license: other\nlicense_name: ours\nlicense_link: LICENSE",
         {"license": "other", "license_name": "ours", "license_link": "LICENSE"}),
        ("/data/svd", "license: other\nlicense_name: ours\nlicense_link: https://a.b/c",
         {"license": "other", "license_name": "ours", "license_link": "https://a.b/c"}),
        ("/data/svd", "license: other\nlicense_name: ours\nlicense_link: /home/me/LICENSE",
         {"license": "other", "license_name": "ours"}),
        ("/data/svd", "license: other\nlicense_name: ours\nlicense_link: ../LICENSE",
         {"license": "other", "license_name": "ours"}),
        ("/data/svd", "license: other", {"license": "other", "license_name": "unknown"}),
        (XT, "license: other", KNOWN),
        (XT, "pipeline_tag: image-to-video", KNOWN),
        (XT, "license: [", KNOWN),
        (XT, "license: !!python/object/apply:os.system ['false']", KNOWN),
        (XT, "- license", KNOWN),
        ("/data/svd", "license: [mit, other]", {"license": "other", "license_name": "unknown"}),
    ],
)  # fmt: skip
def test_licence_from_the_readme_of_the_base(tmp_path, pretrained, readme, expected):
    (tmp_path / "README.md").write_text(f"---\n{readme}\n---\n# Base\nlicense: not this one\n")
    assert base_license(pretrained, tmp_path) == expected


def test_licence_link_of_another_hub_base_is_made_absolute(tmp_path):
    folder = tmp_path / "models--somebody--svd/snapshots/0"
    folder.mkdir(parents=True)
    (folder / "README.md").write_bytes(
        b"---\r\nlicense: other\r\nlicense_name: theirs\r\nlicense_link: LICENSE\r\n---\r\n"
    )
    found = base_license("somebody/svd", folder)
    assert found["license_link"] == "https://huggingface.co/somebody/svd/blob/main/LICENSE"


def test_a_licence_file_of_the_base_has_to_be_copied():
    licence = {"license": "other", "license_name": "ours", "license_link": "LICENSE"}
    assert "LICENSE is a file of the base: copy it" in model_card(replace(TRAINING, licence=licence), kind="lora")


# --- what must not break it ---

HOSTILE = [
    "a\"b'c",
    "--- # x: [y, {z}] & *a !b |c > d % @e `f`",
    "```python",
    "</h1><script>alert(1)</script>",
    "![x](http://a) | www.a.b | $$x$$ | ~~s~~ \\",
    "a\nb\n---\nc",
    "null",
    " né 日本 ",
]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("kind", ["pipeline", "lora"])
def test_a_hostile_name_breaks_nothing(name, kind):
    plain, card = model_card(TRAINING, kind=kind), model_card(replace(TRAINING, name=name), kind=kind)
    assert front_matter(card) == front_matter(plain)
    assert ModelCard(card).data.to_dict() == front_matter(plain)
    assert fences(card) == fences(plain)
    (heading,) = [line for line in card.split("\n") if line.startswith("# ")]
    shown = re.sub(r"\\([\\`*_{}\[\]<>#!|&~$@:^.])", r"\1", heading[2:])
    assert shown == name.replace("\n", " ")
    assert not re.search(r"(?<!\\)[<`|$*\[]", heading)
    assert card.split("\n").index(heading) == plain.split("\n").index("# my-run")
    assert len(card.split("\n")) == len(plain.split("\n"))


@pytest.mark.parametrize("folder", HOSTILE)
def test_a_hostile_folder_is_a_string_in_the_code(folder):
    card = model_card(TRAINING, kind="pipeline", folder=folder)
    (call,) = [line for line in fences(card)[0].split("\n") if line.startswith("pipe = ")]
    names = {"StableVideoDiffusionPipeline": FakePipeline, "torch": torch}
    exec(call, names)
    assert names["pipe"] == folder
    assert len(fences(card)) == 2


class FakePipeline:
    @staticmethod
    def from_pretrained(where: str, **_options) -> str:
        return where


@pytest.mark.parametrize("image", ["/a.png", "../a.png", "C:\\a.png", "~/a.png", "https://a/b.png", ""])
def test_an_image_outside_the_folder_is_refused(image):
    with pytest.raises(ValueError, match="expected a path relative to the folder"):
        model_card(TRAINING, kind="lora", images=[image])


def test_images_are_links_that_work():
    card = model_card(TRAINING, kind="lora", images=["contact_sheet.png", "pics/a (1)>b.png"])
    assert "![contact sheet](contact_sheet.png)" in card
    assert "](pics/a%20%281%29%3Eb.png)" in card


# --- what a run's files say ---


def make_run(folder: Path, config: Config, conventions: dict) -> Path:
    """A run folder with one checkpoint of step 20, made by the code that makes them."""

    def write(checkpoint: Path) -> None:
        (checkpoint / "config.yaml").write_text(resolved_yaml(config))
        (checkpoint / "trainer.json").write_text(json.dumps({"step": 20, "samples": 160, "world_size": 2}))

    return publish(folder / "checkpoints", 20, write, conventions=conventions, config_hash="0", keep=1)


def test_training_of_a_run(tmp_path):
    config = Config(run=Run(name="x", seed=3), adapt=Adapt(rank=8, alpha=4), train=Train(lr=2e-4, ema=True))
    checkpoint = make_run(tmp_path, config, with_base(XT, adapt="lora"))
    losses = [(0, 0.5), (10, 0.4), (20, 0.25), (30, 0.1)]
    lines = [json.dumps({"step": step, "held_out_loss": loss}) for step, loss in losses]
    lines[1:1] = ['{"step": 1, "loss": 0.3}', "[]", "null", '{"step": 5, "held_out_loss": null}', '{"held_out_']
    lines.insert(0, '{"step": 0, "held_out_loss": NaN}')
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    training = training_of_run(tmp_path, checkpoint)
    assert (training.name, training.step, training.base, training.licence) == ("x", 20, XT, KNOWN)
    assert training.losses == (0.5, 0.25), "later lines are of weights that are not in this checkpoint"
    assert training.decode_chunk_size == config.memory.vae_chunk
    card = model_card(training, kind="lora")
    for row in (
        "| LoRA | rank 8, alpha 4 |",
        "| learning rate | 0.0002, cosine, 100 steps of warm-up |",
        "| clips per step | 1 × 4 accumulated × 2 processes |",
        "| clips seen, repeats counted | 160 |",
        "| loss on held-out clips | 0.5000 at first, 0.2500 at last |",
        "| seed | 3 |",
        "| average of the weights | EMA, decay up to 0.9999 |",
    ):
        assert row in card
    assert all(f"{package} " in card for package in ("torch", "diffusers", "peft"))


def test_training_of_a_run_that_lost_its_other_files(tmp_path):
    checkpoint = make_run(tmp_path / "lost", Config(), CONVENTIONS)
    (checkpoint / "config.yaml").write_text("data: [")
    (checkpoint / "trainer.json").unlink()
    training = training_of_run(tmp_path / "lost", checkpoint)
    assert (training.name, training.options, training.losses) == ("lost", {}, None)
    assert "held-out" not in model_card(training, kind="pipeline")
    (checkpoint / "MANIFEST.json").unlink()
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json"):
        training_of_run(tmp_path / "lost", checkpoint)


@pytest.mark.parametrize("kind", ["pipeline", "lora"])
@pytest.mark.parametrize("relative", [False, True])
def test_a_local_base_leaves_no_path(tmp_path, monkeypatch, svd_folder, kind, relative):
    monkeypatch.chdir(tmp_path)
    secret = tmp_path / "models/my-secret-svd"
    secret.parent.mkdir()
    secret.symlink_to(svd_folder)
    pretrained = "models/my-secret-svd" if relative else str(secret)
    config = Config(model=Model(pretrained), adapt=Adapt(method="lora" if kind == "lora" else "full"))
    config.data.root = str(tmp_path / "clips")
    checkpoint = make_run(tmp_path / "run", config, with_base(pretrained, adapt=config.adapt.method))
    card = model_card(training_of_run(tmp_path / "run", checkpoint), kind=kind)
    assert "base_model" not in front_matter(card)
    assert "secret" not in card
    assert not re.search(r"(?<![\w.:/])(/|~/)\w", re.sub(r"https://\S+", "", card)), "an absolute path"
    assert "The licence of the base could not be read." in card
    # The same from a folder where the relative path means nothing: `models/my-secret-svd` could be a hub id there.
    monkeypatch.chdir(tmp_path / "run")
    training = training_of_run(tmp_path / "run", checkpoint, source=secret)
    assert "secret" not in model_card(training, kind=kind)


def test_card_images(tmp_path):
    assert card_images(tmp_path) == []
    for name in (
        "contact_sheet.png",
        "samples/step-000010/sheet.png",
        "samples/sheets/12:30-compare-sheet.png",
        "samples/sheets/contact_sheet.png",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    # What a person sampled from the run is theirs, with names that a card need not be able to show.
    assert card_images(tmp_path) == [tmp_path / "contact_sheet.png"]


def test_what_was_widened_is_told():
    card = model_card(
        replace(TRAINING, conventions={**CONVENTIONS, "widened": ["conv_in | starts at zero"]}), kind="pipeline"
    )
    assert "\n- conv\\_in \\| starts at zero\n" in card


def test_a_lora_in_the_weights_is_not_told_as_an_adapter() -> None:
    training = Training("merged", 3, {**CONVENTIONS, "adapt": "lora"})
    merged, apart = model_card(training, kind="pipeline"), model_card(training, kind="lora")
    assert "the adapters of the others are in their weights" in merged
    assert "the adapters are added to them when they are loaded" not in merged
    assert "the adapters are added to them when they are loaded" in apart
