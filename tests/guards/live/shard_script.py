"""What the two processes of test_shards.py run under FSDP2: the proof of sound sessions and of broken ones; findings saved per rank."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate import Accelerator

from svdtune.checkpoint.tensors import local, whole
from svdtune.config.load import load_config
from svdtune.config.schema import Config
from svdtune.data.catalog import scan
from svdtune.guards.live.precision import culprit_of
from svdtune.guards.live.prove import prove
from svdtune.trainer import state
from svdtune.trainer.build import Session, build, dismiss, make_accelerator
from svdtune.trainer.run_folder import RunFolder
from svdtune.trainer.state import Position


def main() -> None:
    out, config_path, *overrides = sys.argv[1:]
    config = load_config(Path(config_path), overrides)
    accelerator = make_accelerator(config)
    found = cases(accelerator, config, Path(out))
    (Path(out) / f"rank-{accelerator.process_index}.json").write_text(json.dumps(found))
    accelerator.wait_for_everyone()
    dismiss(accelerator)


def cases(accelerator: Accelerator, config: Config, out: Path) -> dict[str, object]:
    def fresh() -> Session:
        return build(config, accelerator, RunFolder(out), scan(config.data))

    session = fresh()
    held = {name: local(p).clone() for name, p in session.trained.items()}
    found: dict[str, object] = {"share": share(session), "sound": codes(session)}
    found["as before"] = all(torch.equal(local(p), held[name]) for name, p in session.trained.items())
    found["no state"] = not session.optimizer.state
    with patch.object(state, "snapshot", rounded(state.snapshot)):
        found["rounded"] = codes(session)
    weight = next(session.model.vae.encoder.parameters()).data
    before = weight.clone()
    if accelerator.process_index == 1:
        weight.fill_(float("nan"))
    found["nan on one rank"] = codes(session)
    found["culprit"] = str(culprit_of(session, Position()))
    weight.copy_(before)
    found["sound again"] = codes(session)
    found["frozen"] = codes(frozen(fresh()))
    return found


def codes(session: Session) -> list[str]:
    return sorted({finding.code for finding in prove(session, Position()).findings})


def share(session: Session) -> list[float]:
    """Of the UNet, and of what is trained."""
    return [
        sum(local(p).numel() for p in parameters) / sum(p.numel() for p in parameters)
        for parameters in (list(session.model.unet.parameters()), list(session.trained.values()))
    ]


def rounded(snapshot):
    def taken(session: Session, *, keep: bool):
        made = snapshot(session, keep=keep)
        return replace(made, trained={name: tensor.bfloat16().float() for name, tensor in made.trained.items()})

    return taken


def frozen(session: Session) -> Session:
    """One of the parameters that the optimizer holds gets no gradient any more."""
    name = next(name for name in session.trained if name.endswith("attn1.to_q.weight"))
    session.trained[name].requires_grad_(False)
    assert whole(session.trained[name]).dim() == 2
    return session


if __name__ == "__main__":
    main()
