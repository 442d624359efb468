"""The planner against real allocations, torch's own counts and the allocator's rules; the verb, the pick, memory.plan=auto."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNetSpatioTemporalConditionModel
from diffusers.models.attention_processor import Attention
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from svdtune.config.load import load_config
from svdtune.config.schema import Config
from svdtune.errors import UsageError
from svdtune.guards.memory import GIB
from svdtune.guards.plan import Planner, with_plan
from svdtune.guards.plan_ops import Cost, workspaces
from svdtune.guards.plan_pass import record
from svdtune.guards.plan_record import Peak, Recorder
from svdtune.guards.plan_replay import MIB, Allocator, Full
from svdtune.guards.plan_rules import cuda_rules
from svdtune.guards.plan_step import Recording
from svdtune.guards.plan_verb import plan_verb
from svdtune.model.attention import Backend, Kernel, SelfAttention, attend
from svdtune.model.fake import fake_tensors
from svdtune.model.load import build_part, known_configs
from svdtune.trainer.optimizer import make_optimizer, state_bytes

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"


@pytest.mark.parametrize(
    "overrides",
    [
        ("adapt.method=full", "memory.checkpointing=none", "train.precision=no"),
        ("adapt.method=temporal", "memory.checkpointing=units", "train.precision=bf16"),
        ("adapt.method=lora", "memory.checkpointing=nested", "train.precision=no"),
    ],
)
def test_the_predicted_peak_is_that_of_a_real_run(overrides, monkeypatch):
    """Within 1 % of what the CPU's allocator gave out; benchmarks/planner.py has the whole grid."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import planner

    row = planner.on_cpu(planner.loaded("tiny.yaml", ("train.batch_size=2", *overrides)))
    assert abs(row["error"]) < 0.01, row


def full_size(frames: int, height: int, width: int) -> dict[str, float]:
    """TFLOP of SVD-XT's whole UNet, every parameter trained and nothing folded, by phase."""
    configs = known_configs(load_config(TINY, ["model.pretrained=stabilityai/stable-video-diffusion-img2vid-xt"]).model)
    with torch.device("meta"):
        unet: UNetSpatioTemporalConditionModel = build_part("unet", configs.unet)
    unet = unet.to("meta").to(torch.bfloat16)
    recorder = Recorder({"unet": unet})
    with fake_tensors(unet), cuda_rules(), recorder.watching():
        recorder.phase = "forward"
        made = {"dtype": torch.bfloat16}
        sample, token = torch.empty(1, frames, 8, height // 8, width // 8, **made), torch.empty(1, 1, 1024, **made)
        unet(
            sample, torch.empty(1), encoder_hidden_states=token, added_time_ids=torch.empty(1, 3, **made)
        ).sample.sum().backward()
    return {phase: cost.model_flops / 1e12 for phase, cost in recorder.costs.items()}


@pytest.mark.parametrize(
    ("size", "forward", "both"),
    [((25, 576, 1024), 79.95, 239.72), ((14, 320, 512), 10.71, 32.09)],
    ids=["native", "small"],
)
def test_flops_are_those_of_the_table(size, forward, both):
    """PERFORMANCE section 3, attention counted as six products."""
    flops = full_size(*size)
    assert flops["forward"] == pytest.approx(forward, rel=1e-3)
    assert flops["forward"] + flops["backward"] == pytest.approx(both, rel=1e-3)


def test_autocast_follows_cuda_inside_and_the_cpu_outside():
    x = torch.ones(2, 4, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with cuda_rules():
            assert (F.group_norm(x, 2).dtype, F.layer_norm(x, (8,)).dtype) == (torch.float32, torch.float32)
        assert F.group_norm(x, 2).dtype == torch.bfloat16
    with cuda_rules():
        assert F.layer_norm(x, (8,)).dtype == torch.bfloat16


def backward_of(backend: Backend, *, temporal: bool) -> set[str]:
    """Names of the attention operators that the backward pass of one layer runs."""
    ran: set[str] = set()

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            ran.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    layer = Attention(query_dim=128, heads=2, dim_head=64)
    layer.set_processor(SelfAttention(backend, temporal, None))
    with fake_tensors(layer), cuda_rules(), Names(), torch.autocast("cpu", dtype=torch.bfloat16):
        layer(torch.empty(4, 25, 128, requires_grad=True)).sum().backward()
    return {name.removeprefix("_scaled_dot_product_") for name in ran if "attention_backward" in name}


@pytest.mark.parametrize(
    ("backend", "spatial", "temporal"),
    [
        ("auto", {"flash_attention_backward"}, {"efficient_attention_backward"}),
        ("flash", {"flash_attention_backward"}, {"efficient_attention_backward"}),
        ("cudnn", {"flash_attention_backward"}, {"efficient_attention_backward"}),
        ("xformers", {"efficient_attention_backward"}, {"efficient_attention_backward"}),
        ("sdpa", {"flash_attention_backward"}, {"flash_attention_backward"}),
        ("math", set(), set()),
    ],
)
def test_the_kernel_is_the_one_that_memory_attention_takes_on_a_gpu(backend, spatial, temporal):
    assert backward_of(backend, temporal=False) == spatial
    assert backward_of(backend, temporal=True) == temporal


def test_a_gpu_before_ampere_has_no_flash_attention(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    assert backward_of("auto", temporal=False) == backward_of("sdpa", temporal=True) == {"efficient_attention_backward"}


def test_attention_makes_no_matrix_of_tokens_by_tokens():
    def peak(kernel: Kernel) -> int:
        recorder = Recorder()
        with fake_tensors(), cuda_rules(), recorder.watching():
            q = torch.empty(1, 1, 4096, 64, dtype=torch.bfloat16, requires_grad=True)
            attend(q, q, q, kernel).sum().backward()
        return recorder.peak

    assert max(peak("flash"), peak("efficient")) < 10 * MIB < 60 * MIB < peak("math")


@pytest.mark.parametrize(
    ("kernel", "held"),
    [
        # 25 tokens are computed as 128: more than the activations themselves in temporal layers.
        ("flash", 128 * 64 * 4 + 128 * 4),
        # As one block of 64 x 64 with a lock, and the row sums.
        ("efficient", 64 * 64 * 4 + 16 + 25 * 4),
    ],
)
def test_a_backward_pass_has_its_float32_queries(kernel, held):
    q = torch.empty(9216, 5, 25, 64, dtype=torch.bfloat16, device="meta")
    op = getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}_attention_backward").default
    assert sum(workspaces(op, (q, q, q, q))) == 9216 * 5 * held


def test_storages_are_counted_once_rounded_and_until_they_die():
    recorder = Recorder()
    with recorder.watching():
        recorder.phase = "one"
        one = torch.zeros(1000)
        view = one[:10].view(2, 5)
        two = one + 1
        assert recorder.live == 2 * 4096
        del two
        recorder.phase = "two"
        three = torch.ones(500)
    del one, three
    assert recorder.live == 4096
    del view
    assert recorder.live == 0
    assert {phase: peak.bytes for phase, peak in recorder.peaks.items()} == {"one": 8192, "two": 4096 + 2048}


def test_the_allocator_takes_segments_splits_and_joins():
    allocator = Allocator()
    allocator.run(
        [(1, 512), (2, MIB)]
    )  # one small segment holds the first, the second has no room left in it... of 2 MiB
    assert allocator.reserved == 2 * MIB
    allocator.run([(3, 3 * MIB), (4, 3 * MIB)])
    assert allocator.reserved == 22 * MIB
    allocator.run([(5, 15 * MIB)])
    assert allocator.reserved == 22 * MIB + 16 * MIB  # 14 MiB are left of the 20
    allocator.run([(5, 0), (6, 16 * MIB)])
    assert allocator.reserved == 38 * MIB  # taken again
    allocator.run([(3, 0), (4, 0), (7, 9 * MIB), (8, 9 * MIB)])
    assert allocator.reserved == 38 * MIB  # neighbours were joined
    with pytest.raises(Full):
        Allocator(30 * MIB).run([(1, 20 * MIB), (2, 20 * MIB)])
    tight = Allocator(30 * MIB)
    tight.run([(1, 20 * MIB), (1, 0), (2, 28 * MIB)])  # what is unused is given back before it fails
    assert (tight.reserved, tight.most) == (28 * MIB, 28 * MIB)


def test_state_that_is_added_equals_state_that_is_made(tiny):
    """Rows over optimizers and averages are not recorded again: AdamW's own state, average included, has these bytes."""
    config = tiny()
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (1000, 3 * 4096, 77)]
    optimizer = make_optimizer(config, parameters, torch.device("cpu"))
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    made = sum(value.nbytes for state in optimizer.state.values() for value in state.values() if value.dim())
    assert made == state_bytes(config) * sum(parameter.numel() for parameter in parameters)
    planner = Planner(config)
    plain, averaged, host = (
        planner.row(*o) for o in ((), ("train.ema=true",), ("train.ema=true", "memory.ema_on_cpu=true"))
    )
    assert averaged.needed.peak - plain.needed.peak == 4 * plain.needed.trained_parameters
    assert host.needed.peak == plain.needed.peak
    assert len(planner._recorded) == 1
    whole = record(replace(config, train=replace(config.train, ema=True)))
    assert abs(whole.top[1].bytes - averaged.needed.peak) <= 4 * 512


def test_accumulated_gradients_live_through_the_step(tiny):
    one, two = (record(tiny(f"train.accumulation={n}")) for n in (1, 2))
    assert two.peaks["forward"].bytes - one.peaks["forward"].bytes >= two.gradients > 0


LEVELS = {"none": 800, "level0": 600, "units": 400, "auto": 400, "nested": 200}
"""MiB of a step that is made up."""


@pytest.fixture
def made_up(monkeypatch):
    """Recordings of steps that were not run: bf16 needs half, offloading takes 50 MiB off."""

    def made(config: Config) -> Recording:
        size = (LEVELS[config.memory.checkpointing] - 50 * config.memory.offload) * MIB
        size = size // 2 if config.memory.parameters == "bf16" else size
        costs = {"forward": Cost(10**12, 10**12, 10**6, 0.1, 1)}
        return Recording(0, 0, 1000, 0, 0, 0, {"backward": Peak(size, "unet.conv_in")}, costs, [(1, size), (1, 0)], 0)

    monkeypatch.setattr("svdtune.guards.plan.record", made)


def test_the_fastest_exact_setting_is_picked_before_one_that_rounds(tiny, made_up):
    config = tiny("train.precision=bf16", "memory.vae_chunk=1")

    def picked(room: int, **how: bool) -> tuple[str, ...]:
        row = Planner(config, room * MIB + GIB // 2).pick(**how)
        return row.changes if row else ("nothing",)

    assert picked(810) == ("memory.checkpointing=none",)
    assert picked(700) == ("memory.checkpointing=level0",)
    assert picked(500) == ()  # auto is units
    assert picked(360) == ("memory.offload=true",)
    assert picked(210) == ("memory.checkpointing=nested",)
    assert picked(160) == ("memory.checkpointing=nested", "memory.offload=true")
    assert picked(110) == ("memory.checkpointing=nested", "memory.parameters=bf16")
    assert picked(10) == ("nothing",)
    # One clip at a time is exact and no option of memory; here it needs as much.
    config = tiny("train.batch_size=2", "train.precision=bf16", "memory.vae_chunk=1")
    assert picked(110, beyond=True)[-1] == "memory.parameters=bf16"
    row = Planner(config, 610 * MIB).pick()
    assert row is not None
    assert (row.exact, row.fits) == (False, True)


def test_plan_auto_says_what_it_took(tiny, made_up):
    config = tiny("memory.plan=auto")
    planned, said = with_plan(config, 2 * GIB)
    assert planned.memory.checkpointing == "none"
    assert said.startswith("memory.plan=auto: memory.checkpointing=none; about 0.")
    assert said.endswith("GiB reserved of 2.0 GiB")
    assert (planned.train, planned.adapt) == (config.train, config.adapt)
    same, said = with_plan(config, None)
    assert (same, "no GPU is visible" in said) == (config, True)


def test_the_verb_prints_rows_and_writes_the_pick(tmp_path, capsys, made_up):
    source, target = tmp_path / "a.yaml", tmp_path / "b.yaml"
    source.write_text(TINY.read_text())
    plan_verb(source, [], gpu="2GiB", apply=target, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["pick"]["changes"] == ["memory.checkpointing=none"]
    assert told["now"]["model_tflops"] > 0
    assert {tuple(row["changes"]) for row in told["rows"]} >= {(), ("memory.checkpointing=none",)}
    assert load_config(target).memory.checkpointing == "none"
    assert "# For everybody, first" in target.read_text()
    with pytest.raises(UsageError, match="no settings were picked"):
        plan_verb(source, [], gpu="0.51GiB", apply=tmp_path / "c.yaml", as_json=False)
    assert "Nothing here fits into 0.5 GiB" in capsys.readouterr().out
