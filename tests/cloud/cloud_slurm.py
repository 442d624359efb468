"""What is wrong with the sbatch script of the document. It runs here, with stand-ins for Slurm and accelerate."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from accelerate.commands.launch import launch_command_parser
from cloud_doc import blocks, shellcheck
from simple_slurm.core import read_simple_txt

_KNOWN = {row[0].replace("_", "-") for row in read_simple_txt("arguments.txt")}
_TIME = re.compile(r"(\d+-)?\d+:\d\d:\d\d")
_INNER = re.compile(r"bash -c '\n(.*?)\n'", re.DOTALL)
_ENVIRONMENT = {
    "SLURM_JOB_ID": "123",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_NNODES": "2",
    "SLURM_GPUS_ON_NODE": "4",
    "SLURM_CPUS_PER_TASK": "32",
}
_STANDINS = {
    "scontrol": '[ "$1 $2 $3" = "show hostnames n[1-2]" ] && printf "n1\\nn2\\n" || echo "scontrol $*" >>log',
    # As Slurm: the command after the options, on every node.
    "srun": 'while [ "$1" != bash ]; do shift; done; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; code=$?; done; exit $code',
    # The launcher gets the signal too, and makes every code a 1.
    "accelerate": 'kill -USR1 $$; echo "accelerate $*" >>log; [ -z "$STATE" ] || '
    'echo "{\\"state\\": \\"$STATE\\"}" >runs/svd-xt-lora/status.json; [ "$STATE" = done ]',
}


@dataclass(frozen=True)
class Outcome:
    """What one run of the script did."""

    code: int
    launches: list[list[str]]
    others: list[str]


def script(doc: str) -> str:
    """The batch script; the section's other bash block installs."""
    (text,) = [text for text in blocks(doc, "Slurm", "bash") if text.startswith("#!")]
    return text


def problems(doc: str) -> list[str]:
    """By Slurm's options and shellcheck, then by running it."""
    text = script(doc)
    told = _option_problems(text) + shellcheck(text, "SC1091", "SC2016")
    if not (inner := _INNER.search(text)):
        return [*told, "srun starts no shell on each node"]
    return told + _inner_problems(inner[1]) + _behaviour_problems(text)


def options(text: str) -> dict[str, str]:
    """Of the #SBATCH lines that sbatch reads: those before the first command."""
    header = itertools.takewhile(lambda line: not line or line.startswith("#"), text.splitlines())
    words = [word for line in header if line.startswith("#SBATCH ") for word in line.split()[1:]]
    pairs = [word.removeprefix("--").partition("=") for word in words]
    return {name: value for name, _, value in pairs}


def _option_problems(text: str) -> list[str]:
    given = options(text)
    told = [f"sbatch has no --{name}" for name in given if name not in _KNOWN]
    written = " ".join(line for line in text.splitlines() if line.startswith("#SBATCH ")).split()
    if len(given) != sum(word.startswith("--") for word in written):
        told.append("an #SBATCH option stands twice, or below the first command, where sbatch does not look")
    name, _, seconds = given.get("signal", "").partition("@")
    checks = {
        "--signal is not USR1 to the steps (no B:)": name == "USR1",
        "--signal leaves less than a minute": seconds.isdecimal() and int(seconds) >= 60,
        "without --time no signal comes": bool(_TIME.fullmatch(given.get("time", ""))),
        "--requeue is missing": given.get("requeue") == "",
        "a requeued job would overwrite its log": given.get("open-mode") == "append",
        "the launcher starts the processes of a node: --ntasks-per-node=1": given.get("ntasks-per-node") == "1",
        "one node": int(given.get("nodes", "1")) >= 2,
        "no GPUs": int(given.get("gpus-per-node", "0")) >= 1,
    }
    return told + [problem for problem, sound in checks.items() if not sound]


def _inner_problems(inner: str) -> list[str]:
    """What each node runs: the launcher ignores the signal and takes the place of the shell."""
    words = shlex.split(inner.replace("\\\n", " "))
    told = [] if words[:4] == ["trap", "", "USR1", "exec"] else ["the launcher would die of the signal"]
    return told + shellcheck(inner)


def _behaviour_problems(text: str) -> list[str]:
    told = []
    requeue = ["scontrol requeue 123"]
    for state, code, others in (("stopped", 0, requeue), ("done", 0, []), ("failed", 1, []), ("", 1, [])):
        outcome = run(text, state)
        if (min(outcome.code, 1), outcome.others) != (code, others):
            told.append(f"state {state or 'unwritten'}: exit code {outcome.code}, {outcome.others or 'not requeued'}")
        told += [] if len(outcome.launches) == 2 else [f"{len(outcome.launches)} launchers on two nodes"]
        for node, words in enumerate(outcome.launches):
            told += _argument_problems(words, node)
    return list(dict.fromkeys(told))


def _argument_problems(words: list[str], node: int) -> list[str]:
    """accelerate's own parser reads what each node was launched with."""
    try:
        launch = launch_command_parser().parse_args(words[2:])
    except SystemExit:
        return ["accelerate does not know these options"]
    given = (launch.num_machines, launch.num_processes, int(launch.machine_rank or 0), launch.main_process_ip)
    checks = {
        f"node {node} was launched as {given}": given == (2, 8, node, "n1"),
        f"port {launch.main_process_port}": launch.main_process_port == 20123,
        "svdtune does not train": [launch.training_script, *launch.training_script_args[:1]] == ["svdtune", "train"],
        f"config file {launch.config_file}": launch.config_file == "configs/accelerate/multi_node.yaml",
    }
    return [problem for problem, sound in checks.items() if not sound]


def run(text: str, state: str) -> Outcome:
    """Run the script where an earlier attempt was stopped; this one leaves `state` in status.json, or nothing."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for path in ("bin", ".venv/bin", "runs/svd-xt-lora"):
            (place / path).mkdir(parents=True)
        (place / ".venv/bin/activate").touch()
        (place / "runs/svd-xt-lora/status.json").write_text('{"state": "stopped"}')
        for name, body in _STANDINS.items():
            (place / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
            (place / "bin" / name).chmod(0o755)
        path = f"{place / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        env = {**_ENVIRONMENT, "PATH": path, "STATE": state}
        done = subprocess.run(["bash", "-c", text], cwd=place, env=env, capture_output=True, timeout=300, check=False)
        log = (place / "log").read_text().splitlines() if (place / "log").exists() else []
    launches = [line.split() for line in log if line.startswith("accelerate ")]
    return Outcome(done.returncode, launches, [line for line in log if not line.startswith("accelerate ")])
