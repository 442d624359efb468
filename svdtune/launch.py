"""One truth about the world: how many processes the launcher was asked for, and that they are one run.

Read in accelerate 1.15: `accelerate launch` without `--multi_gpu` starts a single process whatever `--num_processes`
says (`commands/launch.py:simple_launcher`), sets MASTER_ADDR for the others that never come, and no RANK or WORLD_SIZE.
The number asked for stands only in the launcher's own command line and config file.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from svdtune.errors import UsageError

_ENTRY = str(Path(__file__).resolve().parent)
"""The package folder runs as a script from anywhere, installed or not."""

# The variables accelerate itself reads (`utils/environment.py:get_cpu_distributed_information`).
_WORLD_SIZE = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_LOCAL_SIZE = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")
_LOCAL_RANK = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


@dataclass(frozen=True)
class Request:
    """What an `accelerate launch` that started this process was asked for."""

    num_processes: int
    num_machines: int = 1
    machine_rank: int = 0
    main_process_ip: str | None = None
    main_process_port: int | None = None


def split_arguments(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our own arguments, and those after `--` for the launcher."""
    own = list(argv)
    if "--" not in own:
        return own, []
    dashes = own.index("--")
    return own[:dashes], own[dashes + 1 :]


def join_world(argv: Sequence[str]) -> None:
    """Make this process part of the run that was asked for; returns in the processes that train.

    `argv` is what follows `svdtune` on the command line. Where processes are missing this one is replaced: under
    `accelerate launch --cpu --num_processes 2` by torchrun with two, by itself on several GPUs by `accelerate launch`.

    Raises UsageError when the launcher cannot be understood.
    """
    own, for_launcher = split_arguments(argv)
    _end_with_launcher()
    if _is_rank(os.environ):
        return
    if _under_accelerate(os.environ):
        request = _request()
        if request.num_processes > 1:
            _replace_by(_torchrun(request, own))
    elif for_launcher or _visible_gpus() > 1:
        _replace_by([sys.executable, "-m", "accelerate.commands.launch", *for_launcher, _ENTRY, *own])


def cores() -> int:
    """Cores of this machine that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def rank() -> int:
    """Number of this process in the run."""
    return _first_int(os.environ, _RANK, 0)


def world_size() -> int:
    """Processes of the whole run, as far as the environment says."""
    return max(_first_int(os.environ, _WORLD_SIZE, 1), 1)


def local_rank() -> int:
    """Number of this process among those of its machine: its GPU."""
    return _first_int(os.environ, _LOCAL_RANK, 0)


def local_processes() -> int:
    """Processes of the run on this machine, to share its cores between."""
    return _first_int(os.environ, _LOCAL_SIZE, 1)


def check_world(num_processes: int) -> None:
    """Raise UsageError when accelerate's `num_processes` is not what the launcher started."""
    launched = _first_int(os.environ, _WORLD_SIZE, 0)
    if not launched:
        launched = _request().num_processes if _under_accelerate(os.environ) else 1
    if launched != num_processes:
        raise UsageError(
            f"the launcher was asked for {launched} processes, but accelerate reports {num_processes}: each group would "
            "train by itself and overwrite the other's run folder. Start it by "
            f"`torchrun --nproc_per_node {launched} -m svdtune train ...` or "
            f"`accelerate launch --multi_gpu --num_processes {launched} -m svdtune train ...`, "
            "and unset a WORLD_SIZE that another program left in the environment"
        )


def _is_rank(environment: Mapping[str, str]) -> bool:
    return "LOCAL_RANK" in environment or _first_int(environment, _WORLD_SIZE, 1) > 1


def _under_accelerate(environment: Mapping[str, str]) -> bool:
    return "ACCELERATE_MIXED_PRECISION" in environment


def _first_int(environment: Mapping[str, str], names: Sequence[str], default: int) -> int:
    return next((int(environment[name]) for name in names if environment.get(name, "").isdecimal()), default)


def _request() -> Request:
    """Read the command line of the nearest `accelerate launch` above this process."""
    import psutil

    for parent in psutil.Process().parents():
        try:
            arguments = _launch_arguments(parent.cmdline())
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue
        if arguments is not None:
            return _parse(arguments)
    if "MASTER_ADDR" not in os.environ:
        return Request(1)  # accelerate sets it whenever more than one process was asked for
    raise UsageError(
        "accelerate launched this process alone, asked for more than one, and its command line cannot be found among "
        "the parents of this process. Start it by `torchrun --nproc_per_node N -m svdtune train ...`"
    )


def _launch_arguments(command: Sequence[str]) -> list[str] | None:
    """What follows `accelerate launch` in a command line, None when it is another program's."""
    for index, word in enumerate(command):
        name = Path(word).name
        if name == "accelerate-launch" or word == "accelerate.commands.launch" or word.endswith("commands/launch.py"):
            return list(command[index + 1 :])
        if name in ("accelerate", "accelerate_cli.py") or word == "accelerate.commands.accelerate_cli":
            return list(command[index + 2 :]) if list(command[index + 1 : index + 2]) == ["launch"] else None
    return None


def _parse(arguments: Sequence[str]) -> Request:
    """accelerate's own parser, then its config file for what the command line leaves open (`_validate_launch_command`)."""
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    options = vars(launch_command_parser().parse_args(list(arguments)))
    if options["config_file"] or (os.path.isfile(default_config_file) and not options["cpu"]):
        defaults = vars(load_config_from_file(options["config_file"]))
        options = {key: defaults.get(key) if value is None else value for key, value in options.items()}
    return Request(
        num_processes=options["num_processes"] or 1,
        num_machines=options["num_machines"] or 1,
        machine_rank=int(options["machine_rank"] or 0),
        main_process_ip=options["main_process_ip"],
        main_process_port=options["main_process_port"],
    )


def _torchrun(request: Request, own: Sequence[str]) -> list[str]:
    per_machine = request.num_processes // request.num_machines
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={per_machine}"]
    if request.num_machines == 1:
        return [*command, "--standalone", _ENTRY, *own]
    return [
        *command,
        f"--nnodes={request.num_machines}",
        f"--node_rank={request.machine_rank}",
        f"--master_addr={request.main_process_ip}",
        f"--master_port={request.main_process_port}",
        _ENTRY,
        *own,
    ]


def _end_with_launcher() -> None:
    """Have the kernel send SIGTERM when the launcher that is this process's parent dies.

    `accelerate launch` of one process passes no signal on, and torchrun dies of a SIGUSR1 that it was not told of: what
    they started would train on, unseen.
    """
    import psutil

    launcher = os.getppid()
    try:
        command = psutil.Process(launcher).cmdline()
    except (psutil.AccessDenied, psutil.NoSuchProcess):
        return
    if not sys.platform.startswith("linux") or not _is_launcher(command):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != launcher:  # it died before the kernel knew
        signal.raise_signal(signal.SIGTERM)


def _is_launcher(command: Sequence[str]) -> bool:
    torchrun = any(Path(word).name == "torchrun" or word == "torch.distributed.run" for word in command)
    return torchrun or _launch_arguments(command) is not None


def _visible_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _replace_by(command: list[str]) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    # torchrun's own default leaves SIGUSR1 out, which SLURM sends before its time is up.
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
    os.execvp(command[0], command)
