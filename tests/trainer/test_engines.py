"""A run is the same run in one process, with a copy on each of two (DDP) and with a part on each (FSDP2), by the shipped configs.

Losses, weights, averages, optimizer state and export are compared; a run goes on under another engine; two machines are two launchers.
"""

from __future__ import annotations

import json
import re
import socket
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from safetensors.torch import load_file

from svdtune.config.load import load_config
from svdtune.engine import BLOCKS, Sharding, set_aside, sharding, unfit
from svdtune.errors import ConfigError
from svdtune.model.load import load_model
from svdtune.trainer.sharding import require_shardable
from tests.trainer.conftest import REPO, SHORT, losses, metrics, start

LAUNCH = ["-m", "accelerate.commands.launch"]
ENGINES = {
    "one": [],
    "ddp": [*LAUNCH, "--config_file", "configs/accelerate/multi_gpu.yaml", "--main_process_port", "0"],
    "fsdp2": [*LAUNCH, "--config_file", "configs/accelerate/fsdp2.yaml", "--main_process_port", "0"],
}
SMALL = ["data.num_frames=2", "preflight.enabled=false"]
EMA = ["train.accumulation=2", "train.ema=true", "train.lr=1e-4"]
HELD_OUT = [
    "validation.clips=3",
    "data.holdout=0.3",
    "validation.sigmas=[0.5,5]",
    "validation.samples=1",
    "validation.inference_steps=1",
]
TWO_STEPS = ["train.steps=2", *EMA, *HELD_OUT]

Train = Callable[..., Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def run(clips, folder, worker) -> Train:
    """`run("name", "fsdp2", "train.steps=3")`: two clips an update-step, on one process or on two; returns the run folder."""

    def train(name: str, engine: str, *overrides: str) -> Path:
        door = [*ENGINES[engine], "-m", "svdtune"]
        arguments = command(clips, folder, name, door, 2 if engine == "one" else 1, *overrides)
        if engine == "one":
            code, err = worker.run(arguments[arguments.index("train") :])
        else:
            done = start(arguments)
            _, err = done.communicate(timeout=600)
            code = done.returncode
        assert code == 0, err[-3000:]
        return folder / name

    return train


def command(clips: Path, folder: Path, name: str, door: list[str], batch: int, *overrides: str) -> list[str]:
    own = [f"run.dir={folder}", f"run.name={name}", f"data.root={clips}", f"train.batch_size={batch}"]
    return [sys.executable, *door, "train", str(REPO / "configs/tiny.yaml"), *own, *SHORT, *SMALL, *overrides]


@pytest.fixture(scope="module")
def ended(run) -> Callable[[str, str], Path]:
    """`ended("lora", "ddp")`: the folder of two updates of two micro-steps; each is run once."""
    return cache(lambda method, engine: run(f"{method}-{engine}", engine, *TWO_STEPS, f"adapt.method={method}"))


both = pytest.mark.parametrize(("method", "engine"), [(m, e) for m in ("full", "lora") for e in ("ddp", "fsdp2")])


def checkpoint(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("step-*"))[-1]


def apart(one: Path, other: Path) -> float:
    """The largest difference between two safetensors files of the same names, shapes and dtypes."""
    first, second = load_file(one), load_file(other)
    assert {n: (t.shape, t.dtype) for n, t in first.items()} == {n: (t.shape, t.dtype) for n, t in second.items()}
    return max(float((first[name].float() - second[name].float()).abs().max()) for name in first)


@both
def test_two_processes_are_the_run_of_one(ended, method, engine):
    one, two = ended(method, "one"), ended(method, engine)
    assert losses(two).keys() == losses(one).keys() == {1, 2}
    for step, loss in losses(one).items():
        assert losses(two)[step] == pytest.approx(loss, abs=1e-5)
    norms = [[line["grad_norm"] for line in metrics(run) if "grad_norm" in line] for run in (one, two)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    held = [[line["held_out_loss"] for line in metrics(run) if "held_out_loss" in line] for run in (one, two)]
    assert len(held[0]) == 2
    assert held[1] == pytest.approx(held[0], abs=1e-5)
    assert len(list((two / "samples" / "step-000002").glob("*.mp4"))) == 1


@both
def test_the_checkpoint_is_that_of_one_process(ended, method, engine):
    one, two = checkpoint(ended(method, "one")), checkpoint(ended(method, engine))
    files = sorted(path.name for path in one.iterdir())
    assert sorted(path.name for path in two.iterdir()) == files
    for name in (name for name in files if name.endswith(".safetensors")):
        assert apart(one / name, two / name) <= 1e-5, name
    for name in ("optimizer.json", "ema.json", "scheduler.json"):
        assert (two / name).read_text() == (one / name).read_text()
    assert json.loads((two / "trainer.json").read_text())["world_size"] == 2
    weights = next(name for name in files if name in ("unet.safetensors", "lora.safetensors"))
    assert apart(two / weights, two / "ema.safetensors") > 1e-5


@both
def test_the_export_is_that_of_one_process(ended, method, engine):
    one, two = (ended(method, name) / "export" for name in ("one", engine))
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert sorted(path.relative_to(two) for path in two.rglob("*") if path.is_file()) == files
    tensors = [path for path in files if path.suffix == ".safetensors"]
    assert tensors
    for path in tensors:
        assert apart(one / path, two / path) <= 1e-3  # float16 of values about 1


def test_a_run_goes_on_under_another_engine_and_number_of_processes(run):
    options = ["adapt.method=full", *EMA]
    whole = run("whole", "one", "train.steps=5", *options)
    for steps, engine in ((2, "one"), (3, "fsdp2"), (4, "ddp"), (5, "one")):
        moved = run("moved", engine, f"train.steps={steps}", *options)
    assert losses(moved).keys() == losses(whole).keys() == {1, 2, 3, 4, 5}
    for step, loss in losses(whole).items():
        assert losses(moved)[step] == pytest.approx(loss, abs=2e-5)
    for name in ("unet", "ema", "optimizer"):
        assert apart(checkpoint(whole) / f"{name}.safetensors", checkpoint(moved) / f"{name}.safetensors") <= 5e-5


def test_bf16_under_fsdp2_stays_near_one_process(run):
    options = ["adapt.method=lora", "train.precision=bf16", "train.steps=2", "memory.checkpointing=diffusers"]
    one, fsdp2 = (run(f"bf16-{engine}", engine, *options) for engine in ("one", "fsdp2"))
    assert losses(one).keys() == {1, 2}
    for step, loss in losses(one).items():
        assert losses(fsdp2)[step] == pytest.approx(loss, rel=1e-2)
    weights = load_file(checkpoint(fsdp2) / "lora.safetensors")
    assert {str(tensor.dtype) for tensor in weights.values()} == {"torch.float32"}


def test_a_loss_that_is_not_finite_on_one_process_stops_both_and_makes_no_update(clips, folder):
    door = [*ENGINES["fsdp2"], str(Path(__file__).with_name("poisoned.py"))]
    done = start(command(clips, folder, "poisoned", door, 1, "train.steps=4", "checkpoint.interval=1"))
    _, err = done.communicate(timeout=600)
    assert done.returncode == 1, err[-3000:]
    status = json.loads((folder / "poisoned" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("diverged", 4)
    assert "step 2: loss nan" in status["reason"]
    assert checkpoint(folder / "poisoned").name == "step-00000001"


@pytest.mark.parametrize("flags", [[], ["--use_fsdp", "--fsdp_version", "2"]], ids=["ddp", "fsdp2"])
def test_two_machines_are_two_launchers_that_meet(ended, clips, folder, flags):
    name, port = f"nodes-{len(flags)}", str(free_port())
    config = ["--config_file", "configs/accelerate/multi_node.yaml", "--main_process_port", port, *flags]
    doors = [[*LAUNCH, *config, "--machine_rank", rank, "-m", "svdtune"] for rank in ("0", "1")]
    nodes = [start(command(clips, folder, name, door, 1, "adapt.method=lora", *TWO_STEPS)) for door in doors]
    ends = [(node.communicate(timeout=600)[1][-3000:], node.returncode) for node in nodes]
    assert [code for _, code in ends] == [0, 0], ends
    assert json.loads((checkpoint(folder / name) / "trainer.json").read_text())["world_size"] == 2
    for step, loss in losses(ended("lora", "one")).items():
        assert losses(folder / name)[step] == pytest.approx(loss, abs=1e-5)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "false"}


def test_what_an_accelerate_config_leaves_in_the_environment_is_understood():
    assert sharding({}) is None
    assert sharding({"ACCELERATE_USE_FSDP": "false"}) is None
    assert sharding(FSDP2) == Sharding(reshard_after_forward=True)
    assert sharding({**FSDP2, "FSDP_RESHARD_AFTER_FORWARD": "false"}) == Sharding(reshard_after_forward=False)
    fits = [{}, FSDP2, {"ACCELERATE_USE_DEEPSPEED": "false"}, {"FSDP_VERSION": "1"}]
    ours = {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": ", ".join(BLOCKS)}
    assert [unfit(environ) for environ in [*fits, {**FSDP2, **ours}]] == [None] * 5


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "ACCELERATE_USE_DEEPSPEED=true: expected not set. svdtune trains with one process, "
         "DDP or FSDP2; DeepSpeed wraps the network"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Run `unset ACCELERATE_USE_MEGATRON_LM`, or take Megatron-LM out of the accelerate"),
        ({**FSDP2, "ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "take a parallelism_config out of the accelerate config"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP_VERSION=1: expected 2. FSDP1 flattens parameters"),
        ({**FSDP2, "FSDP_VERSION": "1"}, "Write `fsdp_version: 2` under fsdp_config of the accelerate config"),
        ({**FSDP2, "FSDP_OFFLOAD_PARAMS": "true"}, "Write `fsdp_offload_params: false` under fsdp_config"),
        ({**FSDP2, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "by memory.checkpointing of its own config"),
        ({**FSDP2, "FSDP_IGNORED_MODULES": "conv.*"}, "Take fsdp_ignored_modules out of fsdp_config."),
        ({**FSDP2, "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "FSDP_AUTO_WRAP_POLICY=SIZE_BASED_WRAP: expected not set, or TRANS"),
        ({**FSDP2, "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer"}, "Take fsdp_auto_wrap_policy and fsdp_transformer_layer_cls"),
    ],
)  # fmt: skip
def test_what_svdtune_does_not_do_is_refused_with_the_line_to_change(environ, said):
    found = unfit(environ)
    assert said in str(found)
    assert found.variable in environ or found.variable == "FSDP_VERSION"
    assert "configs/accelerate/fsdp2.yaml" in str(found) or "IGNORED" in found.variable


def test_accelerate_sees_nothing_of_fsdp_while_it_starts_and_no_rank_is_left_with_empty_weights():
    environ = dict(FSDP2)
    with set_aside(environ):
        assert "ACCELERATE_USE_FSDP" not in environ
    assert environ == {**FSDP2, "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
    untouched: dict[str, str] = {}
    with set_aside(untouched):
        assert untouched == {}
    assert untouched == {}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.optimizer=adafactor", "train.optimizer: adafactor looks at whole parameters, and under FSDP2 each process holds a part"),
        ("train.optimizer=adamw8bit", "train.optimizer: adamw8bit looks at whole parameters"),
        ("train.precision=fp16", "train.precision: fp16 needs one loss scale for all shards"),
        ("memory.ema_on_cpu=true", "memory.ema_on_cpu: under FSDP2 each process holds a part of the averages"),
    ],
)  # fmt: skip
def test_what_cannot_be_sharded_is_refused(override, said):
    config = load_config(REPO / "configs/tiny.yaml", [override])
    with pytest.raises(ConfigError, match=re.escape(said)):
        require_shardable(config)
    require_shardable(load_config(REPO / "configs/tiny.yaml"))


def test_the_blocks_that_are_sharded_are_those_of_the_network():
    unet = load_model(load_config(REPO / "configs/tiny.yaml").model).unet
    held = [module for module in unet.modules() if type(module).__name__ in BLOCKS]
    assert {type(module).__name__ for module in held} == set(BLOCKS)
    in_blocks = {id(parameter) for module in held for parameter in module.parameters()}
    numbers = [(parameter.numel(), id(parameter) in in_blocks) for parameter in unet.parameters()]
    assert sum(size for size, inside in numbers if inside) > 0.8 * sum(size for size, _ in numbers)
