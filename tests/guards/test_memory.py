"""The estimate counts what lives at once, and a device that is too small is refused with a change that helps."""

from __future__ import annotations

import pytest
import torch

from svdtune.config.load import with_overrides
from svdtune.guards.memory import CONTEXT, GIB, Estimate, check_memory
from svdtune.guards.preflight import Options, run_preflight
from svdtune.guards.shapes import rehearse

UNET = ("train.batch_size=4", "memory.vae_chunk=1", "validation.samples=0")
"""So that the UNet is the peak: the tiny one is small beside its encoder."""


def test_checkpointing_and_fewer_frames_lower_the_peak(tiny):
    plain, recomputed, shorter = (
        rehearse(tiny(f"memory.checkpointing={mode}", f"data.num_frames={frames}", *UNET)).needed
        for mode, frames in (("none", 8), ("diffusers", 8), ("none", 4))
    )
    assert recomputed.step < plain.step
    assert shorter.step < plain.step
    assert plain.reserved > plain.peak
    assert plain.where.startswith("backward in unet.")
    assert plain.weights == recomputed.weights == shorter.weights


def test_each_level_of_recomputation_needs_less(tiny):
    """diffusers' flag leaves the temporal blocks out: the peak with it is above that of units."""
    peaks = {
        p: rehearse(tiny(f"memory.checkpointing={p}", *UNET)).needed.step
        for p in ("none", "diffusers", "units", "nested")
    }
    assert peaks["none"] > peaks["diffusers"] > peaks["units"] > peaks["nested"]


def test_optimizer_and_average_are_counted(tiny):
    adamw, with_ema, lora = (rehearse(tiny(*o)).needed for o in ([], ["train.ema=true"], ["adapt.method=lora"]))
    assert adamw.optimizer == pytest.approx(8 * adamw.trained_parameters, abs=512)
    assert with_ema.optimizer == pytest.approx(12 * adamw.trained_parameters, abs=1024)
    assert lora.optimizer < adamw.optimizer / 2


def test_shards_divide_what_is_held_and_not_what_is_computed(tiny, monkeypatch):
    """FSDP2 on four processes: a quarter of the UNet, its gradients and the optimizer's state, and two blocks that are whole."""
    alone = rehearse(tiny("adapt.method=full", "train.ema=true")).needed
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    shared = rehearse(tiny("adapt.method=full", "train.ema=true")).needed
    assert shared.optimizer == alone.optimizer // 4
    gradients = 4 * alone.trained_parameters
    assert shared.step == alone.step - gradients * 3 // 4
    assert alone.weights / 4 < shared.weights < alone.weights
    assert shared.trained_parameters == alone.trained_parameters
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    copied = rehearse(tiny("adapt.method=full", "train.ema=true")).needed
    assert copied.step == pytest.approx(alone.step + gradients, rel=0.01)  # DDP's buckets


def test_a_device_that_is_large_enough_is_silent(tiny):
    assert check_memory(tiny(), Estimate(1, 1, 1, 1), 3 + CONTEXT) == []
    assert check_memory(tiny(), Estimate(1, 1, 1, 1), None) == []


def test_a_machine_without_a_gpu_is_told(tiny, monkeypatch):
    import psutil

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    [found] = check_memory(tiny(), Estimate(2**60, 1, 1, 1), None)
    assert (found.code, found.severity) == ("MEM702", "warning")
    assert "no GPU is visible" in found.got
    assert found.expected == f"at most {psutil.virtual_memory().total / GIB:.1f} GiB, this machine's memory"


def test_the_sentence_and_the_change(tiny):
    [found] = check_memory(
        tiny("memory.checkpointing=none"),
        Estimate(2 * GIB, GIB, 5 * GIB, 7, 9 * GIB, "forward in unet.conv_in"),
        4 * GIB,
    )
    assert found.code == "MEM701"
    assert found.got == (
        "8.0 GiB in one process, 9.0 GiB with what the allocator keeps: 2.0 GiB of weights, 1.0 GiB of optimizer state, 5.0 GiB beside "
        "them at the peak, in forward in unet.conv_in"
    )
    assert found.expected == "at most 3.5 GiB: the device's 4.0 GiB without the driver's 512 MiB"
    assert found.patch == ("memory.checkpointing=units",)


def test_the_change_is_proved_or_dropped(tiny):
    """Between the peaks with and without recomputation the change helps; below both it does not."""
    config = tiny("memory.checkpointing=none", *UNET)
    plain, recomputed = (
        rehearse(with_overrides(config, [f"memory.checkpointing={m}"])).needed.reserved for m in ("none", "units")
    )
    [helped] = run_preflight(config, Options(device_bytes=(plain + recomputed) // 2 + CONTEXT)).findings
    assert helped.patch == ("memory.checkpointing=units",)
    assert helped.verified
    [hopeless] = run_preflight(config, Options(device_bytes=recomputed // 10)).findings
    assert (hopeless.patch, hopeless.verified) == ((), False)
