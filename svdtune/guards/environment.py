"""This machine: versions, the device and what it can do, decoder, disk, shared memory, keys. Works without a configuration."""

from __future__ import annotations

import importlib.util
import os
import platform
import warnings
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING

from svdtune import __version__
from svdtune.config.schema import Config
from svdtune.errors import ConfigError
from svdtune.guards.findings import Finding

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

_PACKAGES = (
    "torch", "diffusers", "transformers", "accelerate", "peft", "omegaconf", "safetensors", "decord", "av", "numpy", "wandb",
    "tensorboard", "xformers", "bitsandbytes", "huggingface_hub",
)  # fmt: skip
# Newest reason first: an older version has all that follow it too.
_DIFFUSERS = (
    ((0, 32), "its SVD UNet fails on sizes that are not multiples of 64"),
    ((0, 28), "it mixes the conditioning of different clips at batch > 1"),
    ((0, 27), "its SVD pipeline normalises the CLIP image and applies guidance wrongly"),
    ((0, 25), "its chunked feed-forward gives wrong numbers"),
)


def check_environment(config: Config | None, *, for_a_card: bool = False) -> list[Finding]:
    """ENV001 and following; what depends on options is looked at only with a configuration.

    `for_a_card`: the run is for a GPU that this machine need not have, so what needs one is not refused where there is none.
    """
    found = [*check_versions(), *_driver(), *_decoder(config), *_engine()]
    if config is None:
        return found
    if not for_a_card or _cuda():
        found += [*_attention(config), *_precision(config), *_optimizer(config), *_compiler(config), *_threads(config)]
    return [*found, *_trackers(config), *_keys(config), *_run_folder(config), *_shared_memory(config)]


def environment_report() -> Mapping[str, str]:
    """Versions, platform and devices in words, to paste into an issue. Nothing in it is secret."""
    import torch

    report = {"svdtune": __version__, "python": platform.python_version(), "platform": platform.platform()}
    report |= {name: _installed(name) or "not installed" for name in _PACKAGES}
    gpus = range(torch.cuda.device_count() if _cuda() else 0)
    names = [torch.cuda.get_device_name(i) for i in gpus]
    report["gpus"] = ", ".join(names) or "none visible"
    report["cuda of torch"] = torch.version.cuda or "none (CPU build)"
    report["cores"] = str(os.cpu_count())
    return report


def check_versions() -> list[Finding]:
    """ENV001: a package is missing or older than svdtune's own metadata asks. ENV002: xformers for another torch."""
    from packaging.requirements import Requirement

    found = []
    for text in _requirements("svdtune"):
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        got = _installed(requirement.name)
        if got is None or not _meets(requirement.specifier, got):
            found.append(
                _old(requirement.name, got, str(requirement.specifier), f"{requirement.name}{requirement.specifier}")
            )
    return [*found, *_xformers_build()]


def _old(name: str, got: str | None, wanted: str, install: str) -> Finding:
    why = "svdtune was not tested with it, and needs what newer versions mend or add."
    if got is None:
        why = "svdtune imports it."
    elif name == "diffusers" and (wrong := _wrong_in_diffusers(got)):
        why = f"In this version {'; '.join(wrong)}."
    return Finding(
        "ENV001", "error", name, got or "not installed", wanted, why,
        f"Run `pip install --upgrade '{install}'`, or `pip install -c constraints.txt svdtune` for the tested set.",
    )  # fmt: skip


def _meets(specifier: SpecifierSet, got: str) -> bool:
    """By release number: the 2.10.0a0+nv of a vendor's container is a 2.10."""
    from packaging.version import Version

    return specifier.contains(Version(got).base_version)


def _wrong_in_diffusers(got: str) -> list[str]:
    from packaging.version import Version

    release = Version(got).release
    return [what for below, what in _DIFFUSERS if release < below]


def _xformers_build() -> list[Finding]:
    from packaging.requirements import Requirement

    torch = _installed("torch")
    for text in _requirements("xformers") if torch else ():
        requirement = Requirement(text)
        if requirement.name != "torch" or _meets(requirement.specifier, torch or "0"):
            continue
        got, wanted = f"xformers {_installed('xformers')} beside torch {torch}", f"torch{requirement.specifier}"
        return [Finding("ENV002", "warning", "xformers", got, wanted, "Its compiled kernels are for another torch: they do not "
                        "load, or crash.", "Run `pip install --upgrade xformers`, or uninstall it: svdtune does not need "
                        "it.")]  # fmt: skip
    return []


def _requirements(name: str) -> list[str]:
    """What the package's own metadata asks for; [] when it has none (svdtune started from its folder)."""
    try:
        return requires(name) or []
    except PackageNotFoundError:
        return []


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cuda() -> bool:
    """Whether torch can use an NVIDIA GPU; a broken driver makes torch warn, which `_driver` says better."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.cuda.is_available()


def _nvidia_devices() -> bool:
    return Path("/dev/nvidiactl").exists()


def _driver() -> list[Finding]:
    """ENV003: an NVIDIA GPU is in the machine and torch cannot use it."""
    if not _nvidia_devices() or _cuda() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return []
    import torch

    if torch.version.cuda is None:
        why, fix = (
            "This torch was built for CPUs alone.",
            "Install torch for CUDA: https://pytorch.org/get-started/locally/",
        )
    else:
        why = f"torch is built for CUDA {torch.version.cuda} and does not get along with the driver."
        fix = "Look at `nvidia-smi`; update the driver, or install a torch built for an older CUDA."
    return [Finding("ENV003", "error", "torch", f"torch {torch.__version__} sees no GPU", "the NVIDIA GPU of this machine",
                    f"{why} Training would run on the CPU.", fix)]  # fmt: skip


def _decoder(config: Config | None) -> list[Finding]:
    """ENV004: a reader of videos that was asked for, or that all need, is missing."""
    found = []
    try:
        import av  # noqa: F401
    except ImportError as error:
        found.append(Finding("ENV004", "error", "av", f"cannot be imported ({error})", "PyAV", "Every clip is indexed with it.",
                             "Run `pip install --force-reinstall av`."))  # fmt: skip
    if config is not None and config.data.decoder == "decord" and importlib.util.find_spec("decord") is None:
        found.append(Finding("ENV004", "error", "data.decoder", "decord, which is not installed", "auto or pyav",
                             "decord exists for x86-64 Linux only; PyAV reads every file that it reads.",
                             "Set data.decoder=auto.", ("data.decoder=auto",)))  # fmt: skip
    return found


def _engine() -> list[Finding]:
    """ENV016: an accelerate config, or a variable it left behind, asks for another engine than DDP and FSDP2 as svdtune knows it."""
    from svdtune.engine import unfit

    found = unfit(os.environ)
    if found is None:
        return []
    got = f"{found.variable}={found.value}"
    return [Finding("ENV016", "error", found.variable, got, found.expected, found.why, found.fix)]


def _attention(config: Config) -> list[Finding]:
    """ENV005: the kernel asked for by name cannot be called on this device. One token is really put through it."""
    backend = config.memory.attention
    if backend in ("auto", "sdpa", "math"):
        return []
    import torch

    from svdtune.model.attention import unavailable
    from svdtune.trainer.build import DTYPES

    device = torch.device("cuda" if _cuda() else "cpu")
    if reason := unavailable(backend, device, DTYPES[config.train.precision]):
        return [Finding("ENV005", "error", "memory.attention", f"{backend}: {reason}", "an attention that runs on this device",
                        "flash, cudnn and xformers have kernels for NVIDIA GPUs only, and not for every dtype.",
                        "Set memory.attention=sdpa, torch's own.", ("memory.attention=sdpa",))]  # fmt: skip
    return []


def _precision(config: Config) -> list[Finding]:
    """ENV007: fp16 without a GPU, bf16 on a GPU that only emulates it."""
    precision = config.train.precision
    if precision == "fp16" and not _cuda():
        return [Finding("ENV007", "error", "train.precision", "fp16, and no NVIDIA GPU is visible", "bf16 or no",
                        "The gradient scaler of fp16 needs a GPU.", "Set train.precision=bf16.", ("train.precision=bf16",))]  # fmt: skip
    if precision == "bf16" and _cuda():
        import torch

        if not torch.cuda.is_bf16_supported(including_emulation=False):
            name = torch.cuda.get_device_name(0)
            return [Finding("ENV007", "warning", "train.precision", f"bf16 on {name}", "a GPU that computes in bf16 (Ampere or "
                            "newer)", "It would be emulated, slower than float32.", "Set train.precision=fp16.",
                            ("train.precision=fp16",))]  # fmt: skip
    return []


def _optimizer(config: Config) -> list[Finding]:
    """ENV008: adamw8bit without bitsandbytes or without a GPU."""
    if config.train.optimizer != "adamw8bit" or config.memory.parameters == "bf16":
        return []
    missing = importlib.util.find_spec("bitsandbytes") is None
    if not missing and _cuda():
        return []
    got = "adamw8bit, and bitsandbytes is not installed" if missing else "adamw8bit, and no NVIDIA GPU is visible"
    fix = "Set train.optimizer=adamw" + (
        ", or run `pip install 'svdtune[bitsandbytes]'`." if missing and _cuda() else "."
    )
    return [Finding("ENV008", "error", "train.optimizer", got, "an optimizer that runs here", "It keeps its state in 8 bits with "
                    "bitsandbytes' CUDA kernels.", fix, ("train.optimizer=adamw",))]  # fmt: skip


def _compiler(config: Config) -> list[Finding]:
    """ENV017: train.compile without a GPU or without Triton."""
    if not config.train.compile:
        return []
    import torch

    from svdtune.model.regions import require_compiler

    try:
        require_compiler(torch.device("cuda" if _cuda() else "cpu"))
    except ConfigError as error:
        return [Finding("ENV017", "error", "train.compile", "true", "false on this device", str(error),
                        "Set train.compile=false.", error.patch)]  # fmt: skip
    return []


def _trackers(config: Config) -> list[Finding]:
    """ENV009: a tracker that was asked for is not installed."""
    modules = {"wandb": "wandb", "tensorboard": "tensorboard"}
    backends = config.tracking.backends
    missing = [name for name in backends if importlib.util.find_spec(modules[name]) is None]
    left = [name for name in backends if name not in missing]
    patch = (f"tracking.backends=[{','.join(left)}]",)
    return [
        Finding("ENV009", "error", "tracking.backends", f"{name}, which is not installed", "an installed tracker",
                "The run would stop when it starts to log.", f"Run `pip install {name}`, or set {patch[0]}.", patch)
        for name in missing
    ]  # fmt: skip


def _keys(config: Config) -> list[Finding]:
    """ENV010: no key for a service that asks for one. Values are never read into a message."""
    found = []
    if "wandb" in config.tracking.backends and config.tracking.wandb_mode == "online" and not _has_wandb_key():
        found.append(Finding("ENV010", "warning", "tracking.wandb_mode", "online, and no WANDB_API_KEY or `wandb login` is found",
                             "a key, or offline", "wandb asks for the key when the run starts, and stops where nobody can answer.",
                             "Run `wandb login`, or set tracking.wandb_mode=offline.", ("tracking.wandb_mode=offline",)))  # fmt: skip
    if _needs_hub_token(config):
        found.append(Finding("ENV010", "warning", "model.pretrained", f"{config.model.pretrained} is not on this machine, and no "
                             "token of the Hugging Face hub is set", "a token, or the model's folder", "Stability's repositories want "
                             "their licence accepted by an account; without it the hub may refuse the download.",
                             "Accept the licence on the model's page and run `hf auth login`."))  # fmt: skip
    return found


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    settings = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").partition("//")[2].partition("/")[0]
    try:
        return settings in netrc.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def _needs_hub_token(config: Config) -> bool:
    from svdtune.model.facts import SHIPPED

    if config.model.pretrained not in SHIPPED or Path(config.model.pretrained).is_dir():
        return False
    from huggingface_hub import get_token, try_to_load_from_cache

    cached = try_to_load_from_cache(config.model.pretrained, "unet/config.json", revision=config.model.revision)
    return not isinstance(cached, str) and not get_token()


def _run_folder(config: Config) -> list[Finding]:
    """ENV011: the run folder cannot be made or written to."""
    folder = Path(config.run.dir) / config.run.name
    nearest = next((path for path in (folder, *folder.absolute().parents) if path.exists()), Path("/"))
    if nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK):
        return []
    got = f"{nearest} is a file" if not nearest.is_dir() else f"{nearest} cannot be written to by this user"
    return [Finding("ENV011", "error", "run.dir", got, "a folder for checkpoints and logs",
                    "The run would stop before its first step.", "Set run.dir to a folder that you can write to.")]  # fmt: skip


def _shared_memory(config: Config) -> list[Finding]:
    """ENV012: before any weights are loaded, and for all processes of this machine."""
    from svdtune.data.loader import shared_memory
    from svdtune.launch import local_processes

    data, processes = config.data, local_processes()
    room = shared_memory(data, config.train.batch_size)
    if data.workers == 0 or room is None or data.latents:  # of encoded clips the loader says it
        return []
    each, free = room
    workers = free // (each * processes)
    if workers >= data.workers:
        return []
    needed = each * data.workers * processes
    got = f"{data.workers} workers x {processes} process{'es' * (processes > 1)}: up to {needed / 2**20:,.0f} MB of waiting clips"
    return [Finding("ENV012", "error", "data.workers", got, f"at most the {free / 2**20:,.0f} MB that are free in shared memory",
                    "Workers hand their clips over there; when it is full the kernel kills them (\"Bus error\"). Docker gives 64 MB.",
                    f"Set data.workers={workers}, or start the container with --shm-size={needed // 2**30 + 1}g.",
                    (f"data.workers={workers}",))]  # fmt: skip


def _threads(config: Config) -> list[Finding]:
    """ENV015: more threads than cores wait for each other."""
    from svdtune.launch import cores

    asked, most = config.run.threads or 0, cores()
    if asked <= most:
        return []
    return [Finding("ENV015", "warning", "run.threads", f"{asked:,}", f"at most {most:,}, the cores of this machine",
                    "torch's threads wait for each other in every operator: with more of them than cores a step can take many times "
                    "longer.", "Set run.threads=null.", ("run.threads=null",))]  # fmt: skip
