"""The image's lock with the CPU build of torch:  cpu_lock.py requirements.lock torch-2.13.0+cpu-....whl > cpu.lock

For docker/build_and_smoke.sh on machines without a GPU. Everything but torch keeps its version and hashes; what torch's
CUDA build alone needs is left out.
"""

import hashlib
import re
import sys
from pathlib import Path

CUDA_ONLY = re.compile(r"(nvidia|cuda)-|triton==")


def entries(lock: str) -> list[str]:
    """One text for each package: its pin and the hashes below it."""
    return [entry for entry in re.split(r"\n(?=[^\s#])", lock) if "==" in entry]


def for_cpu(lock: str, version: str, sha256: str) -> str:
    """`lock` with the CPU build of torch in place of the other one and its libraries."""
    kept = [entry.rstrip() for entry in entries(lock) if not re.match(r"torch==", entry) and not CUDA_ONLY.match(entry)]
    return "\n".join([*kept, f"torch=={version} \\\n    --hash=sha256:{sha256}", ""])


def main() -> None:
    lock, wheel = Path(sys.argv[1]), Path(sys.argv[2])
    version = wheel.name.split("-")[1]
    print(for_cpu(lock.read_text(), version, hashlib.sha256(wheel.read_bytes()).hexdigest()), end="")


if __name__ == "__main__":
    main()
