"""Every way to start comes up as one run of the number of processes that was asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import svdtune
from svdtune import launch
from svdtune.errors import UsageError

PACKAGE = Path(svdtune.__file__).parent
ACCELERATE_CONFIGS = Path(__file__).parents[2] / "configs" / "accelerate"
PYTHON = sys.executable
ACCELERATE = [PYTHON, "-m", "accelerate.commands.launch"]
ACCELERATE_SCRIPT = [str(Path(PYTHON).parent / "accelerate"), "launch"]
TORCHRUN = [PYTHON, "-m", "torch.distributed.run"]

SPELLINGS: dict[str, tuple[int, list[str]]] = {
    "svdtune": (1, ["bin/svdtune"]),
    "python -m": (1, [PYTHON, "-m", "svdtune"]),
    "python folder": (1, [PYTHON, "svdtune"]),
    "accelerate folder": (1, [*ACCELERATE_SCRIPT, "svdtune"]),
    "accelerate -m": (1, [*ACCELERATE, "-m", "svdtune"]),
    "accelerate single.yaml": (1, [*ACCELERATE, "--config_file", str(ACCELERATE_CONFIGS / "single.yaml"), "svdtune"]),
    "torchrun 1": (1, [*TORCHRUN, "--standalone", "--nproc_per_node", "1", "-m", "svdtune"]),
    "torchrun 2": (2, [*TORCHRUN, "--standalone", "--nproc_per_node", "2", "-m", "svdtune"]),
    "accelerate --multi_gpu": (
        2,
        [*ACCELERATE, "--multi_gpu", "--num_processes", "2", "--main_process_port", "0", "-m", "svdtune"],
    ),
    "accelerate multi_gpu.yaml": (
        2,
        [
            *ACCELERATE,
            "--config_file",
            str(ACCELERATE_CONFIGS / "multi_gpu.yaml"),
            "--main_process_port",
            "0",
            "svdtune",
        ],
    ),
    "accelerate --cpu 2": (2, [*ACCELERATE_SCRIPT, "--cpu", "--num_processes", "2", "svdtune"]),
    "accelerate --cpu 2 -m": (2, [*ACCELERATE, "--cpu", "--num-processes=2", "-m", "svdtune"]),
    "accelerate 2, no flag": (2, [*ACCELERATE, "--num_processes", "2", "-m", "svdtune"]),
    "accelerate --cpu 2, config file": (2, [*ACCELERATE, "--config_file", "two_on_cpu.yaml", "-m", "svdtune"]),
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder that holds an `svdtune` with the real launch.py, the payload as its __main__, and a console script."""
    package = tmp_path / "svdtune"
    package.mkdir()
    (tmp_path / "bin").mkdir()
    for name in ("__init__.py", "errors.py", "launch.py"):
        (package / name).write_bytes((PACKAGE / name).read_bytes())
    (package / "__main__.py").write_bytes((Path(__file__).parent / "world_payload.py").read_bytes())
    script = tmp_path / "bin" / "svdtune"
    script.write_text(f"#!{PYTHON}\nfrom svdtune.__main__ import main\nmain()\n")
    script.chmod(0o755)
    (tmp_path / "two_on_cpu.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nnum_machines: 1\nnum_processes: 2\nuse_cpu: true\n"
    )
    return tmp_path


def start(place: Path, command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "MASTER_"))}
    settings = {
        "PYTHONPATH": str(place),
        "HF_HOME": str(place / "hf"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return subprocess.run(
        command, cwd=place, env=inherited | settings | environment, text=True, capture_output=True, timeout=300
    )


@pytest.mark.parametrize(("processes", "command"), SPELLINGS.values(), ids=SPELLINGS)
def test_one_run_of_the_number_asked_for(place: Path, processes: int, command: list[str]) -> None:
    arguments = ["train", "cfg.yaml", "run.name=a b"]
    done = start(place, [*command, *arguments])
    assert done.returncode == 0, done.stderr[-3000:]
    said = [json.loads(path.read_text()) for path in sorted(place.glob("said-*.json"))]
    expected = {"world": processes, "local": processes, "sum": {1: 1.0, 2: 11.0}[processes], "arguments": arguments}
    assert said == [expected] * processes


def test_what_follows_the_dashes_goes_to_the_launcher(place: Path) -> None:
    done = start(place, ["bin/svdtune", "train", "cfg.yaml", "--", "--cpu", "--num_processes", "2"])
    assert done.returncode == 0, done.stderr[-3000:]
    said = [json.loads(path.read_text()) for path in sorted(place.glob("said-*.json"))]
    assert [item["world"] for item in said] == [2, 2]
    assert said[0]["arguments"] == ["train", "cfg.yaml"]


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "MASTER_", "OMPI_", "PMI_", "MV2_")) or name in (
            "RANK",
            "WORLD_SIZE",
            "LOCAL_RANK",
        ):
            monkeypatch.delenv(name)
    return monkeypatch


def test_check_world_names_both_numbers(no_launcher: pytest.MonkeyPatch) -> None:
    launch.check_world(1)
    no_launcher.setenv("WORLD_SIZE", "2")
    launch.check_world(2)
    sentence = "the launcher was asked for 2 processes, but accelerate reports 1: each group would train by itself"
    with pytest.raises(UsageError, match=sentence):
        launch.check_world(1)
    no_launcher.delenv("WORLD_SIZE")
    with pytest.raises(UsageError, match="asked for 1 processes, but accelerate reports 2"):
        launch.check_world(2)


def test_a_launcher_out_of_sight_is_an_error(no_launcher: pytest.MonkeyPatch) -> None:
    no_launcher.setenv("ACCELERATE_MIXED_PRECISION", "no")
    launch.check_world(1)  # without MASTER_ADDR accelerate was asked for one
    no_launcher.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(UsageError, match="asked for more than one, and its command line cannot be found"):
        launch.join_world(["train", "cfg.yaml"])


def test_several_gpus_hand_over_to_accelerate(no_launcher: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    no_launcher.setattr(launch, "_replace_by", commands.append)
    no_launcher.setattr(launch, "_visible_gpus", lambda: 1)
    launch.join_world(["train", "c.yaml"])
    assert commands == []
    no_launcher.setattr(launch, "_visible_gpus", lambda: 4)
    launch.join_world(["train", "c.yaml", "--", "--num_processes", "3"])
    assert commands == [[*ACCELERATE, "--num_processes", "3", str(PACKAGE), "train", "c.yaml"]]
    no_launcher.setenv("LOCAL_RANK", "0")
    launch.join_world(["train", "c.yaml"])
    assert len(commands) == 1


def test_machines_keep_their_address(no_launcher: pytest.MonkeyPatch) -> None:
    words = "--cpu --num_processes 4 --num_machines 2 --machine_rank 1 --main_process_ip 10.0.0.1 --main_process_port 29 svdtune"
    request = launch._parse(words.split())
    command = launch._torchrun(request, ["train", "c.yaml"])
    assert command[3:] == [
        *("--nproc_per_node=2", "--nnodes=2", "--node_rank=1", "--master_addr=10.0.0.1", "--master_port=29"),
        *(str(PACKAGE), "train", "c.yaml"),
    ]


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("/v/bin/python /v/bin/accelerate launch --cpu svdtune train", ["--cpu", "svdtune", "train"]),
        ("python -m accelerate.commands.launch -m svdtune", ["-m", "svdtune"]),
        ("/v/bin/python /v/bin/accelerate-launch svdtune", ["svdtune"]),
        ("python -m accelerate.commands.accelerate_cli launch svdtune", ["svdtune"]),
        ("python /v/accelerate/commands/launch.py svdtune", ["svdtune"]),
        ("/v/bin/accelerate env", None),
        ("bash run.sh", None),
    ],
)
def test_launcher_command_lines(command: str, arguments: list[str] | None) -> None:
    assert launch._launch_arguments(command.split()) == arguments
    assert launch._is_launcher(command.split()) == (arguments is not None)


def test_torchrun_is_a_launcher_too() -> None:
    """Processes end with it; with a shell in between they do not, for that one may be gone without meaning anything."""
    for command in ("/v/bin/python /v/bin/torchrun -m svdtune", "python -m torch.distributed.run -m svdtune"):
        assert launch._is_launcher(command.split())
    assert not launch._is_launcher(["bash", "torchrun.sh"])
