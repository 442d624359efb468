"""The real `svdtune train`, started in every way: one run of the number of processes asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from svdtune.data.demo import write_demo

REPOSITORY = Path(__file__).parents[2]
PYTHON = sys.executable
CONSOLE_SCRIPT = [PYTHON, "-c", "import sys; from svdtune.cli import main; sys.exit(main())"]
ACCELERATE = [PYTHON, "-m", "accelerate.commands.launch"]
TORCHRUN = [PYTHON, "-m", "torch.distributed.run", "--standalone"]
MULTI_GPU_CONFIG = str(REPOSITORY / "configs" / "accelerate" / "multi_gpu.yaml")

SPELLINGS: dict[str, tuple[int, list[str]]] = {
    "svdtune": (1, CONSOLE_SCRIPT),
    "accelerate launch svdtune": (1, [*ACCELERATE, "svdtune"]),
    "torchrun --nproc_per_node 2": (2, [*TORCHRUN, "--nproc_per_node", "2", "-m", "svdtune"]),
    "accelerate launch --multi_gpu --num_processes 2": (
        2,
        [*ACCELERATE, "--multi_gpu", "--num_processes", "2", "--main_process_port", "0", "-m", "svdtune"],
    ),
    "accelerate launch --config_file multi_gpu.yaml": (
        2,
        [*ACCELERATE, "--config_file", MULTI_GPU_CONFIG, "--main_process_port", "0", "svdtune"],
    ),
}
"""The others train in tests/trainer/test_preemption.py until a signal comes; test_launch.py has all of them, with a payload of seconds."""


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    write_demo(folder, clips=8)
    return folder


def small_run(clips: Path, runs: Path, *more: str) -> list[str]:
    return [
        "configs/tiny.yaml",
        f"run.dir={runs}",
        f"data.root={clips}",
        "run.name=r",
        "run.threads=1",
        "data.workers=0",
        "train.steps=2",
        "train.warmup=0",
        "train.batch_size=1",
        "train.log_interval=1",
        "validation.samples=0",
        "validation.clips=0",
        *more,
    ]


def start(command: list[str]) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "MASTER_"))}
    settings = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        command, cwd=REPOSITORY, env=inherited | settings, text=True, capture_output=True, timeout=400
    )


@pytest.mark.parametrize(("processes", "command"), SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_is_one_run(processes: int, command: list[str], clips: Path, tmp_path: Path) -> None:
    # Once is enough for the seconds of preflight, where one rank runs it and the other waits.
    preflight = f"preflight.enabled={str(command[:3] == TORCHRUN[:3]).lower()}"
    done = start([*command, "train", *small_run(clips, tmp_path, preflight)])
    assert done.returncode == 0, done.stderr[-4000:]
    status = json.loads((tmp_path / "r" / "status.json").read_text())
    assert (status["state"], status["world_size"], status["exit_code"]) == ("done", processes, 0)
    lines = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert Counter(line["step"] for line in lines if "loss" in line) == {1: 1, 2: 1}
    assert len(list((tmp_path / "r" / "checkpoints").glob("step-*"))) == 1


def test_preflight_only_trains_nothing(clips: Path, tmp_path: Path) -> None:
    done = start([*CONSOLE_SCRIPT, "train", "--preflight-only", *small_run(clips, tmp_path)])
    assert done.returncode == 0, done.stderr[-4000:]
    assert not list(tmp_path.rglob("checkpoints"))


def test_a_refused_preflight_is_exit_code_3(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    for verb in (["preflight"], ["train"]):
        done = start([*CONSOLE_SCRIPT, *verb, *small_run(nowhere, tmp_path)])
        assert done.returncode == 3, done.stderr[-4000:]
        assert str(nowhere) in done.stdout + done.stderr
