"""What the processes of test_ranks.py run: one step by the trainer's own functions, everything it saw saved per rank."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from svdtune.config.load import load_config
from svdtune.config.schema import Config
from svdtune.data.catalog import scan
from svdtune.trainer import loop
from svdtune.trainer.build import build, dismiss, make_accelerator
from svdtune.trainer.run_folder import RunFolder
from svdtune.trainer.state import Position


def main() -> None:
    out, config_path, *overrides = sys.argv[1:]
    config = load_config(Path(config_path), overrides)
    accelerator = make_accelerator(config)
    step(accelerator, config, out)
    accelerator.wait_for_everyone()
    dismiss(accelerator)


def step(accelerator: Accelerator, config: Config, out: str) -> None:
    session = build(config, accelerator, RunFolder(Path(out)), scan(config.data))
    batches = list(loop.loader_from(session, Position()))
    seen = {"samples": torch.cat([b.sample for b in batches]), "pixels": torch.cat([b.pixels for b in batches])}
    draws = []
    draws_for = loop.draws_for
    loop.draws_for = lambda *a, **k: draws.append(draws_for(*a, **k)) or draws[-1]
    accumulated = loop.accumulate(session, iter(batches))
    seen["noise"] = torch.cat([d.noise for d in draws])
    seen |= {f"grad/{name}": p.grad.clone() for name, p in session.trained.items()}
    if (Path(out) / "poison").exists() and accelerator.process_index == 1:
        accumulated.losses[0] = float("nan")
    seen |= {f"before/{name}": p.detach().clone() for name, p in session.trained.items()}
    _, report = loop.update(session, accumulated)
    seen["loss"] = torch.tensor(report.loss)
    seen |= {f"weight/{name}": p.detach().clone() for name, p in session.trained.items()}
    torch.save(seen, Path(out) / f"rank-{accelerator.process_index}-of-{accelerator.num_processes}.pt")


if __name__ == "__main__":
    main()
