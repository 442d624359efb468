"""Seconds and memory of `svdtune preflight` as a whole process, imports included.

    python benchmarks/preflight.py configs/svd_xt_lora.yaml data.root=clips/ [more overrides or options]

Runs it three times and prints one JSON object: wall seconds (median), peak resident memory, seconds per stage.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time


def main(arguments: list[str]) -> None:
    runs = [_run(arguments) for _ in range(3)]
    report = json.loads(runs[-1][2])
    print(json.dumps({
        "command": f"svdtune preflight {' '.join(arguments)}",
        "cores": os.cpu_count(),
        "seconds_median": round(statistics.median(run[0] for run in runs), 1),
        "peak_memory_gib": round(max(run[1] for run in runs), 2),
        "stages": {stage["name"]: stage["seconds"] for stage in report["stages"]},
        "findings": [finding["code"] for finding in report["findings"]],
    }, indent=2))  # fmt: skip


def _run(arguments: list[str]) -> tuple[float, float, str]:
    """Wall seconds, peak resident GiB of that process alone, stdout."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "svdtune", "preflight", *arguments, "--json"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    out = process.stdout.read()
    _, _, usage = os.wait4(process.pid, 0)
    return time.perf_counter() - started, usage.ru_maxrss / 2**20, out


if __name__ == "__main__":
    main(sys.argv[1:])
