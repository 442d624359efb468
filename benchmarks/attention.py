"""Every attention kernel on the shapes of SVD-XT's UNet: milliseconds forward and backward, and what each cannot do, in its own words.

    python benchmarks/attention.py                  # 25 frames of 576 x 1024, bf16, one clip
    python benchmarks/attention.py --clips 8        # temporal layers past the 65,535 rows of a CUDA grid
    python benchmarks/attention.py --small          # the same path on a CPU, in seconds

Each kernel is forced: where it cannot, its error is the entry. `temporal-whole` is asked without the split of svdtune/model/attention.py.
Prints one JSON object; the fastest of a shape is what `memory.attention=auto` should take there (SPATIAL and TEMPORAL in that file).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from svdtune.model import attention

KERNELS = ("flash", "cudnn", "efficient", "xformers", "math", "sdpa")
FORCED = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
LEVELS = ((72, 128, 5), (36, 64, 10), (18, 32, 20), (9, 16, 20))
"""Latent height, width and heads of 64 at each level of the UNet, at 576 x 1024."""
HEAD_DIM = 64
MOST_BYTES = 8 * 2**30
"""Of the scores of plain products; more is left out."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=1)
    parser.add_argument("--frames", type=int, default=25)
    parser.add_argument("--small", action="store_true", help="an eighth of each side, four frames")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    frames, shrink = (4, 8) if arguments.small else (arguments.frames, 1)
    rows: dict[str, Any] = {}
    for name, shape, context in shapes(arguments.clips, frames, shrink):
        rows[f"{name} {'x'.join(map(str, shape))}"] = {
            kernel: measured(kernel, shape, device, arguments.repeats, context) for kernel in KERNELS
        }
    print(json.dumps({
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "command": " ".join(["python", "benchmarks/attention.py", *sys.argv[1:]]),
        "shape": "rows x heads x tokens x head_dim; milliseconds of [forward, forward and backward], bf16",
        "rows": rows,
    }, indent=2))  # fmt: skip


def shapes(clips: int, frames: int, shrink: int) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """Name, (rows, heads, tokens, head_dim), and whether rows are split as in training."""
    for height, width, heads in LEVELS:
        positions = max(1, height // shrink) * max(1, width // shrink)
        yield "spatial", (clips * frames, heads, positions, HEAD_DIM), True
        yield "temporal", (clips * positions, heads, frames, HEAD_DIM), True
        if clips * positions > attention.MOST_ROWS:
            yield "temporal-whole", (clips * positions, heads, frames, HEAD_DIM), False


def measured(kernel: str, shape: tuple[int, ...], device: torch.device, repeats: int, split: bool) -> Any:
    """Medians of both passes, or the error."""
    rows, heads, tokens, _ = shape
    if kernel == "math" and rows * heads * tokens * tokens * 2 > MOST_BYTES:
        return f"left out: {rows * heads * tokens * tokens * 2 / 2**30:.0f} GiB of scores"
    try:
        # As the layers give them: (rows, tokens, heads, head_dim) in memory.
        made = torch.randn(3, rows, tokens, heads, HEAD_DIM, device=device, dtype=torch.bfloat16)
        given = [tensor.transpose(1, 2).requires_grad_() for tensor in made.unbind()]
        run = attention.attend if split else attention.compute
        with forced(kernel):
            asked = "sdpa" if kernel in FORCED else kernel
            forward = timed(lambda: run(*given, asked), device, repeats)  # pyright: ignore[reportArgumentType]
            both = timed(lambda: backward(run(*given, asked), given), device, repeats)  # pyright: ignore[reportArgumentType]
        return [round(forward, 3), round(both, 3)]
    except (ImportError, RuntimeError, NotImplementedError, ValueError) as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"


def forced(kernel: str) -> AbstractContextManager[Any]:
    return sdpa_kernel(FORCED[kernel]) if kernel in FORCED else nullcontext()


def backward(output: Tensor, given: list[Tensor]) -> None:
    torch.autograd.grad(output, given, output)


def timed(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median milliseconds, after two runs that are not timed."""
    seconds = []
    for _ in range(repeats + 2):
        synchronize(device)
        began = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 1000 * median(seconds[2:])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
