"""The configuration stage: silent on every sound run, one sentence for each mistake, and never torch."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from svdtune.checkpoint.manifest import build_manifest, write_manifest
from svdtune.config.load import load_config
from svdtune.guards.settings import check_settings, check_targets
from svdtune.guards.table import local_configs
from svdtune.model.facts import PACKAGE

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = sorted(CONFIGS.glob("*.yaml"))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Away from any clips/ and runs/ of the checkout."""
    monkeypatch.chdir(tmp_path)


def check(*overrides, config="svd_xt_lora"):
    return check_settings(load_config(CONFIGS / f"{config}.yaml", overrides))


def only(*overrides, config="svd_xt_lora"):
    (finding,) = check(*overrides, config=config)
    return finding


def clips(folder, count):
    folder.mkdir()
    for number in range(count):
        (folder / f"{number}.mp4").touch()
    return folder


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_are_silent(path):
    assert check_settings(load_config(path)) == []


@pytest.mark.parametrize(
    "overrides",
    [
        ("data.height=320", "data.width=512"),
        ("data.height=568", "data.width=1016"),  # multiples of 8, not of 64
        ("adapt.targets=[to_q]",),  # attn1.to_q learns
        ("adapt.targets=[attn2.to_v]",),
        ("train.lr=9e-4", "adapt.method=temporal"),
        ("train.lr=5e-3",),  # LoRA
        ("objective.p_mean=-1.2", "objective.p_std=1.2"),
        ("objective.p_mean=2.5",),
        ("conditioning.dropout=0", "validation.guidance=[1.0,1.0]"),
        ("conditioning.dropout=0", "validation.samples=0"),
        ("conditioning.noise_aug=[-0.1,0]",),
        ("data.fps=5", "data.motion_bucket=255"),
        ("data.fps=30", "data.motion_bucket=1"),
        ("preflight.ignore=[CFG104]",),
        ("validation.interval=99999",),
    ],
    ids=" ".join,
)
def test_sound_settings_are_silent(overrides):
    assert check(*overrides) == []


def test_it_imports_no_torch():
    code = (
        "import sys\nfrom pathlib import Path\nfrom svdtune.config.load import load_config\n"
        "from svdtune.guards.settings import check_settings\n"
        f"found = check_settings(load_config(Path({str(SHIPPED[0])!r}), ['data.num_frames=5']))\n"
        "assert [f.code for f in found] == ['CFG104'], found\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, timeout=100)
    assert done.stdout.split() == ["False"], done.stderr


def four_times(folder):
    """SVD-XT whose VAE has one level more: one latent is 16 pixels wide."""
    import shutil

    shutil.copytree(PACKAGE / "facts" / "svd-xt", folder)
    vae = json.loads((folder / "vae" / "config.json").read_text())
    vae["block_out_channels"] = [128, 256, 512, 512, 512]
    (folder / "vae" / "config.json").write_text(json.dumps(vae))
    return folder


def test_sizes_follow_the_models_own_vae(tmp_path):
    model = f"model.pretrained={four_times(tmp_path / 'model')}"
    assert check(model) == []
    found = only(model, "data.height=568")
    assert (found.code, found.severity, found.where) == ("CFG102", "error", "data.height")
    assert (found.got, found.expected, found.patch) == ("568", "a multiple of 16", ("data.height=576",))
    assert found.why.startswith("This VAE makes one latent of 16 x 16 pixels. It floors 568 to 560 without a word")


def test_sizes_of_64_only_with_an_old_diffusers(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.31.0")
    found = only("data.height=568")
    assert (found.code, found.severity, found.patch) == ("CFG103", "error", ("data.height=576",))
    assert "halves the latents three times" in found.why
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.32.0")
    assert check("data.height=568") == []


def test_another_number_of_frames():
    found = only("data.num_frames=14")
    assert (found.code, found.severity, found.patch) == ("CFG104", "warning", ("data.num_frames=25",))
    assert found.expected == "25, as the base was trained"
    assert "its temporal layers have seen only 25" in found.why


@pytest.mark.parametrize(
    "target", ["attn2.to_q", "attn2.to_k", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"]
)
def test_targets_that_are_all_dead(target):
    found = only(f"adapt.targets=[{target},attn1.to_v]")
    assert (found.code, found.severity, found.got) == ("CFG105", "error", target)
    assert found.patch == ("adapt.targets=[attn1.to_v]",)
    assert "Softmax over one token is 1" in found.why
    assert only("adapt.targets=[attn2.to_q]").patch == ("adapt.targets=[attn2.to_v]",)


def test_targets_that_match_nothing():
    layers = ["down.0.attn1.to_q", "down.0.attn1.to_v", "down.0.attn2.to_k"]
    config = load_config(CONFIGS / "svd_lora.yaml", ["adapt.targets=[attn1.to_qq,attn1.to_v,attn2.to_k]"])
    (found,) = check_targets(config, layers)
    assert (found.code, found.severity, found.got) == ("CFG106", "error", "'attn1.to_qq'")
    assert found.fix == "Did you mean 'attn1.to_q'?"
    assert found.patch == ("adapt.targets=[attn1.to_q,attn1.to_v,attn2.to_k]",)
    sound = load_config(CONFIGS / "svd_lora.yaml", ["adapt.targets=[to_q,down.0.attn1.to_v]"])
    assert check_targets(sound, layers) == []
    assert check_targets(load_config(CONFIGS / "svd_lora.yaml"), layers) == []


def test_an_update_that_sees_a_file_twice(tmp_path, monkeypatch):
    root = f"data.root={clips(tmp_path / 'clips', 5)}"
    assert check(root) == []
    found = only(root, "train.batch_size=2", "train.accumulation=3")
    assert (found.code, found.severity) == ("CFG107", "warning")
    assert found.got == "batch_size 2 x accumulation 3 = 6 clips per update"
    assert (found.expected, found.fix) == (
        "at most 4, the files to train on",
        "Lower train.accumulation or train.batch_size, or add clips.",
    )
    assert only(root, "data.holdout=0.5").expected == "at most 3, the files to train on"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert only(root).got.endswith("batch_size 1 x accumulation 4 x 2 processes = 8 clips per update")
    monkeypatch.setenv("WORLD_SIZE", "5")
    assert only(root, "train.accumulation=1").fix == "Add clips, or use fewer processes."


def run_folder(*overrides, config="svd_xt_lora", step=5):
    """What a run leaves, as far as resume's question needs it."""
    made = load_config(CONFIGS / f"{config}.yaml", overrides)
    folder = Path(made.run.dir) / made.run.name / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(asdict(made)))))
    write_manifest(folder, build_manifest(folder, step=step, config_hash="", conventions={}))
    return folder


@pytest.mark.parametrize(
    ("before", "now", "was"),
    [
        ((), ("adapt.method=temporal",), "adapt.method=lora"),
        ((), ("adapt.rank=8",), "adapt.rank=16"),
        (("adapt.dora=true",), (), "adapt.dora=true"),
        (("adapt.targets=[attn1.to_q]",), ("adapt.targets=[attn1.to_v]",), "adapt.targets=['attn1.to_q']"),
        ((), ("model.pretrained=stabilityai/stable-video-diffusion-img2vid-xt-1-1",), "model.pretrained=stabilityai/stable-video-diffusion-img2vid-xt"),  # noqa: E501
    ],
)  # fmt: skip
def test_resume_against_another_trainable_set(before, now, was):
    folder = run_folder(*before)
    found = only(*now)
    assert (found.code, found.severity, found.where) == ("CFG108", "error", "run.name")
    assert found.expected == f"as {folder} was trained: {was}"
    assert found.patch == ("run.name=svd-xt-lora-2",)
    assert check(*now, *found.patch) == []


@pytest.mark.parametrize(
    "now",
    [
        (), ("run.seed=5",), ("data.height=320", "data.width=512"), ("train.lr=1e-5",), ("adapt.alpha=4",),
        ("adapt.targets=[attn1.to_q]",),  # null before: only the UNet can tell whether that is another list
    ],
)  # fmt: skip
def test_resume_with_other_options_is_silent(now):
    run_folder()
    assert check(*now) == []


def test_rank_means_nothing_without_lora():
    run_folder("adapt.method=temporal")
    assert check("adapt.method=temporal", "adapt.rank=3") == []


def test_a_base_at_another_path_may_be_the_same_base(tmp_path):
    import shutil

    shutil.copytree(PACKAGE / "facts" / "svd-xt", tmp_path / "a")
    run_folder()
    found = only(f"model.pretrained={tmp_path / 'a'}")
    assert (found.code, found.severity) == ("CFG108", "warning")
    assert found.why.endswith("unless the two paths hold the same weights.")


def test_the_newest_whole_checkpoint_counts():
    run_folder("adapt.rank=16", step=3)
    newer = run_folder("adapt.rank=4", step=9)
    assert "adapt.rank=4" in only().expected
    (newer / "MANIFEST.json").unlink()
    assert check() == []


def test_a_learning_rate_that_destroys_the_base():
    full = only("train.lr=1e-3", config="svd_xt_full")
    assert (full.code, full.severity, full.got, full.patch) == ("CFG109", "warning", "0.001", ("train.lr=1e-05",))
    assert full.expected == "below 0.001 with adapt.method=full"
    assert only("train.lr=1e-2").patch == ("train.lr=0.0001",)
    assert check("train.lr=0.05", config="tiny") == []


def test_guidance_without_dropout():
    found = only("conditioning.dropout=0")
    assert (found.code, found.severity, found.patch) == ("CFG110", "warning", ("conditioning.dropout=0.15",))
    assert found.why.startswith("Guidance 3 subtracts the prediction without the image")


def test_noise_levels_that_sampling_never_visits():
    found = only("objective.p_mean=12")
    assert (found.code, found.severity) == ("CFG111", "warning")
    assert found.got == "p_mean 12, p_std 1.6: 0% of the draws are noise levels that sampling visits"
    assert found.expected == "most of ln(sigma) in [-6.2, 6.6]"
    assert [f.code for f in check("objective.p_std=40")] == ["CFG111"]


def test_a_frame_drowned_in_noise():
    found = only("conditioning.noise_aug=[0.7,1.0]")
    assert (found.code, found.severity, found.patch) == ("CFG112", "warning", ("conditioning.noise_aug=[-3.0,0.5]",))
    assert found.got == "mean 0.7, standard deviation 1: a usual strength of 2.01, and now and then 110"
    rare = only("conditioning.noise_aug=[-3.0,2.0]")
    assert (rare.severity, rare.patch) == ("warning", ("conditioning.noise_aug=[-3.0,0.5]",))
    assert check("conditioning.noise_aug=[-3.0,1.4]") == check("conditioning.noise_aug=[-3.0,0]") == []


def test_noise_that_no_float32_holds():
    found = only("conditioning.noise_aug=[-3.0,50.0]")
    assert (found.code, found.severity) == ("CFG112", "error")
    assert found.why.endswith("Numbers as large as the rare ones are no float32 any more: the loss becomes NaN.")


@pytest.mark.parametrize(
    ("key", "value", "usual"),
    [("fps", "60", 7), ("fps", "2", 7), ("motion_bucket", "0", 127), ("motion_bucket", "400", 127)],
)
def test_micro_conditions_beyond_training(key, value, usual):
    found = only(f"data.{key}={value}")
    assert (found.code, found.severity, found.got) == ("CFG113", "warning", value)
    assert found.patch == (f"data.{key}={usual}",)
    assert check(f"data.{key}={value}", config="tiny") == []


def test_nothing_held_out_and_validation_asked_for():
    found = only("data.holdout=0", "data.root=gone")
    assert (found.code, found.where) == ("CFG116", "data.holdout")
    assert found.why == "There is nothing to make held-out loss and sample videos from, so progress would not be seen."
    assert check("data.holdout=0", *found.patch, "data.root=gone") == []
    assert found.fix.endswith(": validation.clips=0 validation.samples=0.")
    assert check("data.holdout=0", "validation.clips=0", "validation.samples=0") == []
    assert check("data.holdout=0", "validation.clips=0", "validation.images=[a.png]") == []


def test_a_rate_that_destroys_any_model():
    assert only("train.lr=0.5", config="tiny").code == "CFG109"
    assert check("train.lr=0.05", config="tiny") == []


def test_a_run_among_the_clips():
    found = only("data.root=clips", "run.dir=clips/runs")
    assert (found.code, found.where) == ("CFG118", "run.dir")
    assert "its own sample videos would be taken for clips" in found.why
    assert check("data.root=clips", "run.dir=clips-runs") == []


def test_more_held_out_than_trained_on():
    found = only("data.holdout=0.9")
    assert (found.code, found.patch) == ("CFG119", ("data.holdout=0.1",))
    assert found.got == "0.9: more files held out than trained on"
    assert check("data.holdout=0.5") == []


def test_a_code_that_is_no_rule():
    found = only("preflight.ignore=[CFG109,CFG1O4]")
    assert (found.code, found.got) == ("CFG114", "CFG1O4")
    assert found.fix.startswith("Did you mean CFG1")
    stop = only("preflight.stop_on=[SEM542,SHP401]")
    assert (stop.code, stop.where, stop.got) == ("CFG114", "preflight.stop_on", "SHP401")
    assert "SEM540" in stop.fix


def test_a_broken_model_json_is_left_to_the_next_stage(tmp_path):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(PACKAGE / "facts" / "svd-xt", folder)
    for part, name, keys in (
        ("unet", "config", ("num_frames", "block_out_channels", "num_attention_heads")),
        ("vae", "config", ("block_out_channels",)),
        ("scheduler", "scheduler_config", ("sigma_min", "sigma_max")),
    ):
        path = folder / part / f"{name}.json"
        for value in ("text", None, [], 0):
            path.write_text(json.dumps({**json.loads(path.read_text()), **dict.fromkeys(keys, value)}))
            assert check(f"model.pretrained={folder}") == []


def test_a_bridge_is_part_of_what_is_trained():
    folder = run_folder()
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("  bridge: null\n", ""))  # written before the option existed
    write_manifest(folder, build_manifest(folder, step=5, config_hash="", conventions={}))
    assert check() == []
    assert "conditioning.bridge=null" in only("conditioning.bridge=linear").expected


def test_every_patch_of_the_stage_silences_it():
    bad = ["data.num_frames=14", "adapt.targets=[attn2.to_q]", "conditioning.dropout=0", "data.fps=60", "objective.p_mean=-20",
           "conditioning.noise_aug=[1.0,0.5]", "train.lr=0.1"]  # fmt: skip
    found = check(*bad)
    assert sorted(f.code for f in found) == ["CFG104", "CFG105", "CFG109", "CFG110", "CFG111", "CFG112", "CFG113"]
    assert check(*bad, *(patch for finding in found for patch in finding.patch)) == []


def test_a_model_that_is_not_here_silences_the_rules_that_need_it(tmp_path):
    assert check("model.pretrained=someone/else", "data.num_frames=3") == []
    assert check(f"model.pretrained={tmp_path / 'gone'}") == []
    assert local_configs(load_config(SHIPPED[0])) is not None
