"""Out of memory in the trial step, told without a GPU: what torch reports there is put in its place."""

from __future__ import annotations

import torch

from svdtune.guards.live.oom import out_of_memory
from svdtune.guards.live.prove import prove
from svdtune.guards.shapes import rehearse
from svdtune.trainer.state import Position

GIB = 2**30
ERROR = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 282.00 MiB. GPU 0 has a total capacity of 79.18 GiB of which 122 MiB is free. See documentation"
)


def card(monkeypatch, total: float, taken: float) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, int(total * GIB)))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: int(taken * GIB))


def test_predicted_measured_and_the_next_setting_that_fits(small, monkeypatch):
    config = small("adapt.method=full", "data.num_frames=8", "data.height=128", "data.width=192", "train.batch_size=4")
    planned = rehearse(config).needed
    assert planned is not None
    card(monkeypatch, 0.9 * planned.peak / GIB + 0.5, 0.8 * planned.peak / GIB)  # the driver has half a GiB
    found = out_of_memory(config, ERROR, torch.device("cpu"))
    assert (found.code, found.severity, found.where) == ("MEM703", "error", "memory")
    assert "GiB; CUDA out of memory. Tried to allocate 282.00 MiB" in found.got
    assert "documentation" not in found.got
    assert "as preflight predicted" in found.expected
    assert found.why.startswith("The prediction was above the card already: its peak is in ")
    assert found.patch
    assert {change.partition("=")[0] for change in found.patch} <= {"memory.checkpointing", "memory.offload", "memory.vae_chunk",
                                                                     "train.batch_size", "train.accumulation"}  # fmt: skip
    assert found.fix.startswith(f"Set {' '.join(found.patch)}: ")


def test_nothing_that_fits_is_said_so(small, monkeypatch):
    card(monkeypatch, 0.001, 0.001)
    found = out_of_memory(small(), ERROR, torch.device("cpu"))
    assert found.patch == ()
    assert "fewer frames" in found.fix or "larger card" in found.fix


def test_the_trial_step_turns_it_into_a_finding(session, monkeypatch):
    made = session()
    card(monkeypatch, 1, 1)

    def full(*_):
        raise ERROR

    made.model.unet.conv_out.register_forward_hook(full)
    assert [finding.code for finding in prove(made, Position()).findings] == ["MEM703"]
