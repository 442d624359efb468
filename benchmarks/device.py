"""The device dry run at full size with random weights: the trial step of `svdtune preflight`, predicted and measured.

    python benchmarks/device.py configs/svd_xt_lora.yaml
    python benchmarks/device.py configs/tiny.yaml --base tiny run.threads=1     # the same path on a CPU

Writes the model and the clips that benchmarks/full_size.py writes, runs `svdtune preflight --only memory` and `--only live` on
them, and prints one JSON object: device, versions, command, findings, predicted and measured memory, seconds and hours.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from typing import Any

import torch
from full_size import prepared


def main() -> None:
    arguments, model = prepared(__doc__)
    clips = arguments.work / "clips"
    command = [sys.executable, "-m", "svdtune", "preflight", arguments.config, f"model.pretrained={model}", "model.variant=fp16",
               f"data.root={clips}", f"run.dir={arguments.work / 'runs'}", *arguments.overrides, "--json"]  # fmt: skip
    predicted, _ = answer([*command, "--only", "memory"])
    live, seconds = answer([*command, "--only", "live"])
    print(json.dumps({
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU",
        "torch": torch.__version__,
        "command": " ".join(["python", "benchmarks/device.py", *sys.argv[1:]]),
        "predicted": predicted["predicted"],
        "measured": live["measured"],
        "stages": live["stages"],
        "findings": live["findings"],
        "seconds_in_all": round(seconds, 1),
    }, indent=2))  # fmt: skip


def answer(command: list[str]) -> tuple[dict[str, Any], float]:
    """The JSON that the command prints, and its seconds; findings (exit code 3) are an answer too."""
    started = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, 3):
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}")
    return json.loads(done.stdout), time.perf_counter() - started


if __name__ == "__main__":
    main()
