"""Promise R4: what comes back from disk is equal to the bit, and nothing of it is a pickle."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from small_training import OPTIMIZERS, Training, inject_lora, tiny_unet, trained
from torch import nn

from svdtune.checkpoint import files, state
from svdtune.checkpoint import optimizer as optimizer_state
from svdtune.checkpoint.store import find_latest, publish
from svdtune.errors import CheckpointError


def save(folder: Path, training: Training) -> None:
    state.save_trained(folder, training.named, lora=False)
    optimizer_state.write_optimizer(folder, optimizer_state.optimizer_state(training.optimizer, training.named))
    state.save_ema(folder, training.ema, training.named)
    if hasattr(training, "scheduler"):
        files.save_json(folder / "scheduler.json", training.scheduler.state_dict())


def load(folder: Path, training: Training) -> None:
    state.load_trained(folder, training.named)
    optimizer_state.load_optimizer(folder, training.optimizer, training.named)
    state.load_ema(folder, training.ema, training.named)
    if hasattr(training, "scheduler"):
        training.scheduler.load_state_dict(files.load_json(folder / "scheduler.json"))


def assert_same(one: Training, other: Training) -> None:
    for name, parameter in one.named.items():
        assert torch.equal(parameter, other.named[name]), name
        left, right = one.optimizer.state.get(parameter, {}), other.optimizer.state.get(other.named[name], {})
        assert left.keys() == right.keys(), name
        for key, value in left.items():
            assert type(value) is type(right[key]), (name, key)
            if isinstance(value, torch.Tensor):
                assert (value.dtype, value.device, value.shape) == (
                    right[key].dtype,
                    right[key].device,
                    right[key].shape,
                )
                assert torch.equal(value, right[key]), (name, key)
            else:
                assert value == right[key], (name, key)
    for left, right in zip(one.optimizer.param_groups, other.optimizer.param_groups, strict=True):
        assert {k: v for k, v in left.items() if k != "params"} == {k: v for k, v in right.items() if k != "params"}
    for left, right in zip(one.ema.shadow_params, other.ema.shadow_params, strict=True):
        assert torch.equal(left, right)
    assert one.ema.optimization_step == other.ema.optimization_step
    assert one.ema.cur_decay_value == other.ema.cur_decay_value


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_goes_on_after_a_load_as_if_never_interrupted(tmp_path, optimizer):
    through = Training(optimizer)
    losses = through.run(0, 12)

    first = Training(optimizer)
    head = first.run(0, 5)
    save(tmp_path, first)
    second = Training(optimizer)
    second.run(0, 1)  # state that the load must replace
    load(tmp_path, second)
    assert_same(first, second)

    assert head + second.run(5, 12) == losses
    assert_same(through, second)


def test_a_fresh_optimizer_without_state_round_trips(tmp_path):
    save(tmp_path, Training())
    resumed = Training()
    resumed.run(0, 2)
    load(tmp_path, resumed)
    assert_same(Training(), resumed)


def test_step_stays_what_the_kernel_wants(tmp_path):
    for kind in ("adamw", "fused"):
        training = Training(kind)
        training.run(0, 3)
        optimizer_state.write_optimizer(tmp_path, optimizer_state.optimizer_state(training.optimizer, training.named))
        again = Training(kind)
        optimizer_state.load_optimizer(tmp_path, again.optimizer, again.named)
        step = again.optimizer.state[again.named["0.weight"]]["step"]
        assert (step.dtype, step.device.type, step.item()) == (torch.float32, "cpu", 3.0)


def test_kernel_settings_belong_to_the_resuming_machine(tmp_path):
    first = Training("fused")
    first.run(0, 2)
    optimizer_state.write_optimizer(tmp_path, optimizer_state.optimizer_state(first.optimizer, first.named))
    second = Training("adamw")
    optimizer_state.load_optimizer(tmp_path, second.optimizer, second.named)
    assert not second.optimizer.param_groups[0]["fused"]
    assert second.optimizer.param_groups[0]["betas"] == (0.9, 0.999)


def test_the_order_of_parameters_does_not_matter(tmp_path):
    first = Training()
    first.run(0, 3)
    optimizer_state.write_optimizer(tmp_path, optimizer_state.optimizer_state(first.optimizer, first.named))
    second = Training()
    backwards = OPTIMIZERS["adamw"](list(reversed(second.named.values())))
    optimizer_state.load_optimizer(tmp_path, backwards, second.named)
    for name, parameter in second.named.items():
        if name != "1.unused":
            assert torch.equal(
                backwards.state[parameter]["exp_avg"], first.optimizer.state[first.named[name]]["exp_avg"]
            )


def test_accelerates_wrapper_is_seen_through(tmp_path):
    training = Training()
    training.run(0, 3)
    optimizer_state.write_optimizer(tmp_path, optimizer_state.optimizer_state(training.optimizer, training.named))
    resumed = Training()
    wrapped = Accelerator(cpu=True).prepare(resumed.optimizer)
    optimizer_state.load_optimizer(tmp_path, wrapped, resumed.named)
    key = resumed.named["2.weight"]
    assert torch.equal(
        resumed.optimizer.state[key]["exp_avg"], training.optimizer.state[training.named["2.weight"]]["exp_avg"]
    )
    optimizer_state.write_optimizer(tmp_path, optimizer_state.optimizer_state(wrapped, resumed.named))
    assert json.loads((tmp_path / "optimizer.json").read_text())["optimizer"] == "AdamW"


def test_bits_survive_that_equality_does_not_see(tmp_path):
    odd = torch.tensor([0.0, -0.0, float("nan"), float("inf"), 1e-45, 1 / 3], dtype=torch.float32)
    parameter = nn.Parameter(odd.clone())
    state.save_trained(tmp_path, {"p": parameter}, lora=False)
    target = nn.Parameter(torch.ones(6))
    place = target.data_ptr()
    state.load_trained(tmp_path, [("p", target)])
    assert torch.equal(target.data.view(torch.int32), odd.view(torch.int32))
    assert target.data_ptr() == place


def test_strided_parameters_round_trip(tmp_path):
    parameter = nn.Parameter(torch.arange(12.0).reshape(3, 4).t())
    state.save_trained(tmp_path, {"p": parameter}, lora=False)
    target = nn.Parameter(torch.zeros(4, 3))
    state.load_trained(tmp_path, {"p": target})
    assert torch.equal(target, parameter)


@pytest.mark.parametrize("dora", [False, True])
def test_lora_of_a_unet_round_trips(tmp_path, dora):
    saved = tiny_unet()
    inject_lora(saved, dora=dora)
    state.save_trained(tmp_path, trained(saved), lora=True)
    loaded = tiny_unet()
    inject_lora(loaded, dora=dora, seed=9)
    state.load_trained(tmp_path, trained(loaded))
    assert [path.name for path in tmp_path.iterdir()] == ["lora.safetensors"]
    assert len(trained(loaded)) > 10
    for name, parameter in trained(loaded).items():
        assert torch.equal(parameter, trained(saved)[name]), name


def test_the_averages_can_be_loaded_as_weights(tmp_path):
    training = Training()
    training.run(0, 6)
    save(tmp_path, training)
    other = Training()
    state.load_trained(tmp_path, other.named, ema=True)
    for parameter, shadow in zip(other.named.values(), training.ema.shadow_params, strict=True):
        assert torch.equal(parameter, shadow)
    assert not torch.equal(other.named["0.weight"], training.named["0.weight"])


def lora_of(rank: int) -> dict[str, nn.Parameter]:
    shapes = {"a.lora_A.default.weight": (rank, 8), "a.lora_B.default.weight": (8, rank)}
    return {name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}


def test_another_trainable_set_is_explained(tmp_path):
    state.save_trained(tmp_path, lora_of(16), lora=True)
    three = {f"mid.{i}.weight": nn.Parameter(torch.zeros(2, 5)) for i in range(3)}
    with pytest.raises(CheckpointError) as caught:
        state.load_trained(tmp_path, three)
    assert str(caught.value) == (
        f"{tmp_path / 'lora.safetensors'}: the run was made with adapt.method=lora rank 16 (2 parameters, 256 numbers); "
        "this config trains weights of the model itself, no lora (3 parameters, 30 numbers). "
        "Resume needs the same model and adapt section: restore them, or start a new run with another run.name.\n"
        "  missing in the checkpoint: mid.0.weight, mid.1.weight, mid.2.weight\n"
        "  unexpected in the checkpoint: a.lora_A.default.weight, a.lora_B.default.weight"
    )


def test_another_rank_is_explained_and_nothing_is_changed(tmp_path):
    state.save_trained(tmp_path, lora_of(16), lora=True)
    eight = lora_of(8)
    with pytest.raises(
        CheckpointError, match=r"lora rank 16 .* this config trains adapt.method=lora rank 8 "
    ) as caught:
        state.load_trained(tmp_path, eight)
    assert "a.lora_A.default.weight: saved (16, 8), expected (8, 8)" in str(caught.value)
    assert all(not parameter.any() for parameter in eight.values())


def test_the_optimizer_refuses_another_trainable_set(tmp_path):
    training = Training()
    training.run(0, 1)
    optimizer_state.write_optimizer(tmp_path, optimizer_state.optimizer_state(training.optimizer, training.named))
    other = Training(width=7)
    with pytest.raises(
        CheckpointError, match=r"optimizer\.json: the run was made with .*\n  0\.bias: saved \(6,\), expected \(7,\)"
    ):
        optimizer_state.load_optimizer(tmp_path, other.optimizer, other.named)
    assert not other.optimizer.state


def test_the_optimizer_refuses_another_class(tmp_path):
    training = Training()
    optimizer_state.write_optimizer(tmp_path, optimizer_state.optimizer_state(training.optimizer, training.named))
    other = Training("adafactor")
    with pytest.raises(
        CheckpointError, match=r"made with the optimizer AdamW, this config uses Adafactor. Resume needs the same"
    ):
        optimizer_state.load_optimizer(tmp_path, other.optimizer, other.named)


def test_the_optimizer_refuses_other_groups(tmp_path):
    training = Training()
    optimizer_state.write_optimizer(tmp_path, optimizer_state.optimizer_state(training.optimizer, training.named))
    first, *rest = training.named.values()
    grouped = torch.optim.AdamW([{"params": [first]}, {"params": rest}])
    with pytest.raises(
        CheckpointError, match=r"had 1 parameter groups of \[7\] parameters, this config has 2 of \[1, 6\]"
    ):
        optimizer_state.load_optimizer(tmp_path, grouped, training.named)


def test_a_parameter_without_a_name_is_a_programming_error(tmp_path):
    training = Training()
    with pytest.raises(ValueError, match=r"holds a parameter of shape \(6, 4\) that has no name"):
        optimizer_state.write_optimizer(tmp_path, optimizer_state.optimizer_state(training.optimizer, {}))


def test_another_dtype_is_an_error(tmp_path):
    state.save_trained(tmp_path, {"p": nn.Parameter(torch.zeros(2))}, lora=False)
    with pytest.raises(
        CheckpointError, match=r"p was saved as torch.float32, this run holds it as torch.bfloat16: .*round"
    ):
        state.load_trained(tmp_path, {"p": nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))})


def test_bfloat16_goes_into_float32_where_it_loses_nothing(tmp_path):
    """As sampling loads what memory.parameters=bf16 trained; float16 is nothing that training writes."""
    saved = torch.randn(50).bfloat16()
    state.save_trained(tmp_path, {"p": nn.Parameter(saved)}, lora=False)
    parameter = nn.Parameter(torch.zeros(50))
    state.load_trained(tmp_path, {"p": parameter})
    assert parameter.dtype == torch.float32
    assert torch.equal(parameter.detach(), saved.float())
    state.save_trained(tmp_path, {"p": nn.Parameter(saved.half())}, lora=False)
    with pytest.raises(CheckpointError, match=r"p was saved as torch.float16"):
        state.load_trained(tmp_path, {"p": parameter})


def test_missing_and_foreign_files_are_named(tmp_path):
    training = Training()
    with pytest.raises(CheckpointError, match=r"unet\.safetensors: expected a safetensors file, got none"):
        state.load_trained(tmp_path, training.named)
    with pytest.raises(CheckpointError, match=r"ema\.json: expected a JSON file, got none"):
        state.load_ema(tmp_path, training.ema, training.named)
    (tmp_path / "unet.safetensors").write_bytes(pickle.dumps({"p": 1}))
    with pytest.raises(CheckpointError, match=r"unet\.safetensors: expected a safetensors file, got something else"):
        state.load_trained(tmp_path, training.named)


def test_what_json_cannot_hold_is_refused(tmp_path):
    with pytest.raises(TypeError):
        files.save_json(tmp_path / "trainer.json", {"scaler": torch.ones(1)})
    values = {"step": 3, "scale": 65536.0, "lr": 0.1 + 0.2, "tiny": 5e-324, "growth": None}
    files.save_json(tmp_path / "trainer.json", values)
    assert files.load_json(tmp_path / "trainer.json") == values


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path, optimizer):
    training = Training(optimizer)
    training.run(0, 3)

    folder = publish(tmp_path, 3, lambda f: save(f, training), conventions={}, config_hash="c", keep=1)
    assert find_latest(tmp_path).folder == folder
    found = sorted(folder.iterdir())
    assert len(found) >= 5
    for path in found:
        assert path.suffix in (".safetensors", ".json"), path.name
        assert not zipfile.is_zipfile(path), path.name
        assert not is_pickle(path.read_bytes()), path.name


def is_pickle(content: bytes) -> bool:
    """Protocol 2 and later begin with PROTO (0x80) and a version; earlier ones are no JSON and no safetensors."""
    return content[:1] == b"\x80" and content[1:2] <= b"\x05"


def test_the_test_for_pickles_sees_one(tmp_path):
    assert is_pickle(pickle.dumps({"a": 1}))
    torch.save({"a": torch.ones(1)}, tmp_path / "a.bin")
    assert zipfile.is_zipfile(tmp_path / "a.bin")
