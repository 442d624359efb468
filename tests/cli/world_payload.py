"""What the processes of test_launch.py run in the place of svdtune/__main__.py: join the world, sum over it, say so."""

import json
import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from svdtune import launch


def main() -> None:
    launch.join_world(sys.argv[1:])
    import torch
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    launch.check_world(accelerator.num_processes)
    total = accelerator.reduce(torch.tensor([10.0 ** launch.rank()], device=accelerator.device), "sum")
    assert isinstance(total, torch.Tensor)
    said = {
        "world": accelerator.num_processes,
        "local": launch.local_processes(),
        "sum": total.item(),
        "arguments": sys.argv[1:],
    }
    # A second process of the same rank, two runs instead of one, must not overwrite the first one's file.
    with Path(f"said-{launch.rank()}.json").open("x") as file:
        json.dump(said, file)
    accelerator.end_training()


if __name__ == "__main__":
    main()
