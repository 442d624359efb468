"""The environment stage: every machine it describes is made on the spot by replacing what it asks."""

from __future__ import annotations

import importlib.util
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from svdtune.config.load import load_config
from svdtune.data import loader
from svdtune.errors import DataError
from svdtune.guards import environment
from svdtune.guards.environment import check_environment, check_versions, environment_report
from svdtune.guards.memory import check_disk
from svdtune.model.attention import unavailable

CONFIGS = Path(__file__).parents[2] / "configs"
Usage = namedtuple("Usage", "total used free")
REAL_FIND = importlib.util.find_spec


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """A sound laptop: no GPU, room everywhere, a token set."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_secret-of-this-test")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**50, 0, 2**50))
    monkeypatch.setattr(environment, "_cuda", lambda: False)
    monkeypatch.setattr(environment, "_nvidia_devices", lambda: False)


def config(*overrides, name="svd_xt_lora"):
    return load_config(CONFIGS / f"{name}.yaml", overrides)


def only(*overrides, name="svd_xt_lora"):
    (finding,) = check_environment(config(*overrides, name=name))
    return finding


def without(monkeypatch, *names):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in names else REAL_FIND(name, *a))


def with_module(monkeypatch, *names):
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: object() if name in names else REAL_FIND(name, *a)
    )


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_are_silent(path):
    assert check_environment(load_config(path)) == []


def test_without_a_configuration():
    assert check_environment(None) == []


def test_the_report_has_versions_and_no_secret(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "a-secret")
    report = environment_report()
    assert report["diffusers"][0].isdigit()
    assert report["gpus"] == "none visible"
    assert report["xformers"] in ("not installed", environment._installed("xformers"))
    assert "secret" not in str(report)


def versions(monkeypatch, **installed):
    real = environment._installed
    monkeypatch.setattr(environment, "_installed", lambda name: installed[name] if name in installed else real(name))


@pytest.mark.parametrize(
    ("version", "wrong"),
    [
        ("0.31.0", ["multiples of 64"]),
        ("0.27.2", ["multiples of 64", "conditioning of different clips"]),
        ("0.26.3", ["multiples of 64", "conditioning of different clips", "normalises the CLIP image"]),
        ("0.24.0", ["multiples of 64", "conditioning of different clips", "normalises the CLIP image", "chunked"]),
    ],
)
def test_an_old_diffusers_says_what_is_wrong_in_it(monkeypatch, version, wrong):
    versions(monkeypatch, diffusers=version)
    (found,) = check_versions()
    assert (found.code, found.severity, found.where, found.got, found.expected) == (
        "ENV001",
        "error",
        "diffusers",
        version,
        ">=0.42",
    )
    assert found.why.startswith("In this version ")
    assert [all_ in found.why for all_ in wrong] == [True] * len(wrong)
    assert found.why.count(";") == len(wrong) - 1


def test_an_old_or_missing_package(monkeypatch):
    versions(monkeypatch, diffusers="0.33.0", peft=None, torch="2.10.0a0+git")
    old, peft = sorted(check_versions(), key=lambda f: f.where)
    assert (old.where, old.got, old.why) == (
        "diffusers",
        "0.33.0",
        "svdtune was not tested with it, and needs what newer versions mend or add.",
    )
    assert (peft.where, peft.got, peft.expected) == ("peft", "not installed", ">=0.18")
    assert "pip install --upgrade 'peft>=0.18'" in peft.fix


def test_extras_are_not_asked_for(monkeypatch):
    versions(monkeypatch, tensorboard=None, xformers=None, bitsandbytes=None, pytest=None)
    assert check_versions() == []


def test_xformers_for_another_torch(monkeypatch):
    real = environment._requirements
    wanted = {"xformers": ["torch==2.5.1", "numpy"]}
    monkeypatch.setattr(environment, "_requirements", lambda name: wanted.get(name) or real(name))
    versions(monkeypatch, xformers="0.0.29", torch="2.13.0+cpu")
    (found,) = check_versions()
    assert (found.code, found.severity) == ("ENV002", "warning")
    assert (found.got, found.expected) == ("xformers 0.0.29 beside torch 2.13.0+cpu", "torch==2.5.1")
    wanted["xformers"] = ["torch>=2.10"]
    assert check_versions() == []


def test_a_gpu_that_torch_cannot_use(monkeypatch):
    import torch

    monkeypatch.setattr(environment, "_nvidia_devices", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "cuda", None)
    (found,) = check_environment(None)
    assert (found.code, found.severity) == ("ENV003", "error")
    assert found.why == "This torch was built for CPUs alone. Training would run on the CPU."
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    (found,) = check_environment(None)
    assert "built for CUDA 13.0 and does not get along with the driver" in found.why
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert check_environment(None) == []


def test_decord_that_is_not_installed(monkeypatch):
    without(monkeypatch, "decord")
    found = only("data.decoder=decord")
    assert (found.code, found.severity, found.where, found.patch) == (
        "ENV004",
        "error",
        "data.decoder",
        ("data.decoder=auto",),
    )
    assert check_environment(config("data.decoder=auto")) == []
    with_module(monkeypatch, "decord")
    assert check_environment(config("data.decoder=decord")) == []


def test_xformers_is_called_and_not_only_found(monkeypatch):
    without(monkeypatch, "xformers")
    found = only("memory.attention=xformers")
    assert (found.code, found.severity, found.got) == ("ENV005", "error", "xformers: it is not installed")
    assert found.patch == ("memory.attention=sdpa",)
    with_module(monkeypatch, "xformers")
    assert only("memory.attention=xformers").got == "xformers: no NVIDIA GPU is visible, and it has no CPU kernel"
    for backend in ("flash", "cudnn"):
        assert only(f"memory.attention={backend}").got.startswith(f"{backend}: no NVIDIA GPU is visible")
    monkeypatch.setattr("svdtune.model.attention.unavailable", lambda *_: None)
    assert check_environment(config("memory.attention=xformers", "train.batch_size=8")) == []


def test_a_build_without_kernels_says_its_own_reason(monkeypatch):
    import sys
    from types import ModuleType

    import torch

    def attention(*tokens):
        raise NotImplementedError("No operator found for `memory_efficient_attention_forward`\n  with inputs: ...")

    ops = ModuleType("xformers.ops")
    vars(ops)["memory_efficient_attention"] = attention
    monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    with_module(monkeypatch, "xformers")
    real, cuda = torch.zeros, torch.device("cuda")
    monkeypatch.setattr(torch, "zeros", lambda *size, **options: real(*size))
    assert unavailable("xformers", cuda, torch.float16) == "No operator found for `memory_efficient_attention_forward`"
    vars(ops)["memory_efficient_attention"] = lambda *tokens: tokens[0]
    assert unavailable("xformers", cuda, torch.float16) is None


def test_the_compiler_needs_a_gpu_and_triton(monkeypatch):
    found = only("train.compile=true")
    assert (found.code, found.where, found.patch) == ("ENV017", "train.compile", ("train.compile=false",))
    assert found.why.startswith("train.compile: no NVIDIA GPU is visible, and")
    monkeypatch.setattr(environment, "_cuda", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **options: True)
    without(monkeypatch, "triton")
    assert only("train.compile=true").why.startswith("train.compile: Triton is not installed, and")
    with_module(monkeypatch, "triton")
    assert check_environment(config("train.compile=true")) == []


def test_precision_that_the_device_lacks(monkeypatch):
    found = only("train.precision=fp16")
    assert (found.code, found.severity, found.patch) == ("ENV007", "error", ("train.precision=bf16",))
    assert found.got == "fp16, and no NVIDIA GPU is visible"
    monkeypatch.setattr(environment, "_cuda", lambda: True)
    assert check_environment(config("train.precision=fp16")) == []
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **options: False)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda number: "Tesla T4")
    found = only()
    assert (found.code, found.severity, found.got) == ("ENV007", "warning", "bf16 on Tesla T4")


def test_the_eight_bit_optimizer(monkeypatch):
    without(monkeypatch, "bitsandbytes")
    found = only("train.optimizer=adamw8bit")
    assert (found.code, found.severity, found.patch) == ("ENV008", "error", ("train.optimizer=adamw",))
    assert found.got == "adamw8bit, and bitsandbytes is not installed"
    ours = config("train.optimizer=adamw8bit", "memory.parameters=bf16", "train.precision=bf16")
    assert "ENV008" not in {finding.code for finding in check_environment(ours)}
    with_module(monkeypatch, "bitsandbytes")
    assert only("train.optimizer=adamw8bit").got == "adamw8bit, and no NVIDIA GPU is visible"
    monkeypatch.setattr(environment, "_cuda", lambda: True)
    assert check_environment(config("train.optimizer=adamw8bit", "train.precision=no")) == []


def test_a_run_for_a_rented_card_is_not_refused_for_what_this_machine_lacks(monkeypatch):
    without(monkeypatch, "xformers", "bitsandbytes")
    made = config("train.precision=fp16", "memory.attention=xformers", "train.optimizer=adamw8bit", "run.threads=999")
    assert sorted(f.code for f in check_environment(made)) == ["ENV005", "ENV007", "ENV008", "ENV015"]
    assert check_environment(made, for_a_card=True) == []
    monkeypatch.setattr(environment, "_cuda", lambda: True)
    assert "ENV008" in [f.code for f in check_environment(made, for_a_card=True)]


def test_an_engine_that_an_accelerate_config_left_behind(monkeypatch):
    engine = "ACCELERATE_USE_DEEPSPEED"
    monkeypatch.setenv(engine, "false")
    assert check_environment(None) == []
    monkeypatch.setenv(engine, "true")
    [found] = check_environment(None)
    assert (found.code, found.severity, found.where, found.got) == ("ENV016", "error", engine, f"{engine}=true")
    assert found.fix.startswith(f"Run `unset {engine}`")


def test_fsdp2_is_ours_and_other_fsdp_is_not(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    [found] = check_environment(None)
    assert (found.code, found.where, found.got, found.expected) == ("ENV016", "FSDP_VERSION", "FSDP_VERSION=1", "2")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert check_environment(None) == []


def test_more_threads_than_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1})
    assert check_environment(config("run.threads=2")) == []
    found = only("run.threads=1000")
    assert (found.code, found.severity, found.where) == ("ENV015", "warning", "run.threads")
    assert (found.got, found.expected) == ("1,000", "at most 2, the cores of this machine")
    assert check_environment(config("run.threads=1000", *found.patch)) == []


def test_a_tracker_that_is_not_installed(monkeypatch):
    without(monkeypatch, "tensorboard")
    found = only("tracking.backends=[wandb,tensorboard]")
    assert (found.code, found.severity, found.patch) == ("ENV009", "error", ("tracking.backends=[wandb]",))
    with_module(monkeypatch, "tensorboard")
    assert check_environment(config("tracking.backends=[wandb,tensorboard]")) == []


def test_wandb_online_without_a_key(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    found = only("tracking.wandb_mode=online")
    assert (found.code, found.severity, found.patch) == ("ENV010", "warning", ("tracking.wandb_mode=offline",))
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password a-secret")
    assert check_environment(config("tracking.wandb_mode=online")) == []
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_API_KEY", "a-secret")
    assert check_environment(config("tracking.wandb_mode=online")) == []


def test_a_gated_model_without_a_token(monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *a, **options: None)
    found = only()
    assert (found.code, found.severity, found.where) == ("ENV010", "warning", "model.pretrained")
    assert "no token of the Hugging Face hub is set" in found.got
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *a, **options: "/a/file")
    assert check_environment(config()) == []


def test_a_run_folder_that_cannot_be(tmp_path):
    (tmp_path / "runs").touch()
    found = only()
    assert (found.code, found.severity, found.where) == ("ENV011", "error", "run.dir")
    assert found.got.endswith("runs is a file")


def test_shared_memory_for_the_workers(monkeypatch):
    """25 x 3 x 576 x 1024 float32 are 168.75 MiB; 4 workers with 2 batches each want 1350."""
    monkeypatch.setattr(loader, "_SHARED_MEMORY", Path("/"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**40, 0, 1350 * 2**20))
    assert check_environment(config()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**40, 0, 1349 * 2**20))
    found = only()
    assert (found.code, found.severity, found.patch) == ("ENV012", "error", ("data.workers=3",))
    assert found.got == "4 workers x 1 process: up to 1,350 MB of waiting clips"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**26, 0, 2**26))
    assert only().patch == ("data.workers=0",)
    assert check_environment(config("data.workers=0")) == []


def test_shared_memory_agrees_with_the_loader(monkeypatch):
    """The same number of bytes makes both refuse."""
    monkeypatch.setattr(loader, "_SHARED_MEMORY", Path("/"))
    made = config("data.workers=3", "data.num_frames=14", "train.batch_size=2")
    needed = 2 * 14 * 3 * 576 * 1024 * 4 * 3 * 2
    for free, refused in ((needed, False), (needed - 1, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: Usage(2**50, 0, free))
        assert bool(environment._shared_memory(made)) is refused
        if refused:
            with pytest.raises(DataError, match="wait in"):
                loader.require_shared_memory(made.data, 2)
        else:
            loader.require_shared_memory(made.data, 2)


def test_disk_for_the_checkpoints(monkeypatch):
    """A million numbers: 4 bytes, Adam's 8, averages 4; three kept and one being written: 64 MB."""
    made = config("train.ema=true", "checkpoint.keep=3", "checkpoint.interval=10", "train.steps=100")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**40, 0, 64_000_000))
    assert check_disk(made, 1_000_000) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**40, 0, 63_999_999))
    (found,) = check_disk(made, 1_000_000)
    assert (found.code, found.severity, found.patch) == ("ENV013", "error", ("checkpoint.keep=2",))
    assert found.expected == "61 MiB: 4 checkpoints of 15 MiB"
    assert found.why.startswith("Each holds 1,000,000 trained numbers in float32, adamw's state and their averages")
    short = config("checkpoint.interval=500", "train.steps=600", "checkpoint.keep=3")
    assert check_disk(short, 2_600_000) == []  # 2 checkpoints of 31.2 MB, and no third
    assert check_disk(short, 2_700_000)[0].expected.endswith("2 checkpoints of 31 MiB")


def test_checkpoints_that_are_there_need_no_new_room(monkeypatch):
    made = config("checkpoint.interval=10", "train.steps=100", "checkpoint.keep=1")
    folder = Path("runs/svd-xt-lora/checkpoints/step-00000010")
    folder.mkdir(parents=True)
    (folder / "lora.safetensors").write_bytes(b"0" * 12_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**40, 0, 12_000))
    assert check_disk(made, 1000) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**40, 0, 11_999))
    assert len(check_disk(made, 1000)) == 1
