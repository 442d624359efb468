"""The loop in this process on a small random model: gates, accumulation, precision, EMA, optimizers, logging."""

import gc
import json
import math
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from svdtune.config.load import load_config, resolved_yaml
from svdtune.data.catalog import scan
from svdtune.errors import CheckpointError, ConfigError, Diverged, Stopped, UsageError
from svdtune.trainer import loop, run, state
from svdtune.trainer.build import build, make_accelerator
from svdtune.trainer.metrics import BANDS, reduce_step
from svdtune.trainer.run_folder import RunFolder
from svdtune.trainer.signals import StopWish
from svdtune.trainer.state import Position
from svdtune.trainer.validate import unique_names
from svdtune.trainer.watch import Watch
from tests.trainer.conftest import REPO, SHORT, metrics

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning", "ignore:.*lr_scheduler.step.*:UserWarning"
)


@pytest.fixture
def config(clips, svd_folder, tmp_path):
    """`config("train.lr=1e-3")` on a random model with 3 frames of 32 x 48."""

    def make(*overrides):
        return load_config(
            REPO / "configs/tiny.yaml",
            [f"model.pretrained={svd_folder}", "model.variant=null", f"data.root={clips}", f"run.dir={tmp_path}", "run.name=r",
             *SHORT, "data.num_frames=3", "train.batch_size=2", "train.accumulation=1",
             "adapt.method=lora", "adapt.rank=2", *overrides],
        )  # fmt: skip

    return make


@pytest.fixture
def session(config, tmp_path):
    """A built session; accelerate's process-wide state is reset afterwards."""

    def make(*overrides):
        _reset()
        made = config(*overrides)
        return build(made, make_accelerator(made), RunFolder(tmp_path / "r"), scan(made.data))

    yield make
    _reset()


def _reset():
    for shared in (AcceleratorState, PartialState, GradientState):
        shared._shared_state.clear()


def train(session, wish=None):
    return loop.run_loop(session, Position(), resolved_yaml(session.config), wish or StopWish(), Watch())


def losses(session):
    return [line["loss"] for line in metrics(session.folder.path) if "loss" in line]


def test_every_step_is_a_line_with_its_numbers(session):
    made = session("train.steps=3", "train.lr=1e-3", "validation.clips=2", "validation.sigmas=[0.5,5]")
    train(made)
    lines = metrics(made.folder.path)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert [line["samples"] for line in steps] == [2, 4, 6]
    for line in steps:
        assert all(math.isfinite(line[key]) for key in ("loss", "grad_norm", "lr", "clips_per_second", "memory_gib"))
        assert line["lr"] == pytest.approx(1e-3)
        bands = {key.removeprefix("loss/sigma "): value for key, value in line.items() if key.startswith("loss/sigma")}
        assert bands
        assert bands.keys() <= set(BANDS)
    held = [line for line in lines if "held_out_loss" in line]
    assert [line["step"] for line in held] == [0, 3]
    assert {"held_out_loss/sigma 0.5", "held_out_loss/sigma 5"} <= held[0].keys()
    assert (made.folder.path / "heartbeat").exists()


def test_held_out_loss_does_not_move_when_nothing_learned(session):
    made = session("validation.clips=2")
    validator = loop.Validator(made)
    assert validator.held_out_loss() == validator.held_out_loss()


def test_accumulation_equals_a_larger_batch(session):
    whole = session("train.steps=3", "train.batch_size=4", "train.lr=1e-2")
    train(whole)
    expected = losses(whole)
    (whole.folder.path / "metrics.jsonl").unlink()
    parts = session("train.steps=3", "train.batch_size=2", "train.accumulation=2", "train.lr=1e-2")
    train(parts)
    assert losses(parts) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_no_update_is_made_from_a_non_finite_step(session, monkeypatch, poison):
    made, step, calls = session("train.steps=5", "train.lr=1e-2"), loop.train_step, []
    before = {}

    def poisoned(parts, batch, draws):
        calls.append(batch.names)
        result = step(parts, batch, draws)
        if len(calls) == 3:
            before.update({name: p.detach().clone() for name, p in made.trained.items()})
            spoil = math.nan if poison == "loss" else 1.0
            object.__setattr__(result, "loss", result.loss * spoil)
            object.__setattr__(result, "loss_per_clip", result.loss_per_clip * spoil)
            if poison == "gradient":
                result.loss.register_hook(lambda grad: grad * math.inf)
        return result

    monkeypatch.setattr(loop, "train_step", poisoned)
    with pytest.raises(
        Diverged, match=r"step 3: loss .*no update was made from it\. Clips of this step: demo-\d+\.mp4 \(sigma "
    ):
        train(made)
    assert len(losses(made)) == 2
    for name, parameter in made.trained.items():
        assert torch.equal(parameter, before[name]), name
        assert parameter.isfinite().all()


@pytest.mark.parametrize("method", ["lora", "temporal"])
def test_bf16_trains_float32_parameters_beside_frozen_bf16(session, method):
    made = session("train.steps=2", "train.precision=bf16", f"adapt.method={method}", "train.lr=1e-3")
    before = {name: p.detach().clone() for name, p in made.trained.items()}
    train(made)
    assert {p.dtype for p in made.trained.values()} == {torch.float32}
    frozen = {p.dtype for name, p in made.model.unet.named_parameters() if name not in made.trained}
    assert frozen == {torch.bfloat16}
    moved = [name for name, p in made.trained.items() if not torch.equal(p, before[name])]
    assert len(moved) > len(before) / 3
    assert next(made.model.vae.parameters()).dtype == torch.float32


def test_optimizer_holds_exactly_the_trained_parameters(session):
    made = session("adapt.method=temporal_attention")
    held = {id(p) for group in made.optimizer.param_groups for p in group["params"]}
    assert (
        held
        == {id(p) for p in made.trained.values()}
        == {id(p) for p in made.model.unet.parameters() if p.requires_grad}
    )


def test_ema_follows_and_is_what_is_sampled_and_put_back(session):
    made = session("train.steps=3", "train.ema=true", "train.lr=1e-2")
    train(made)
    from svdtune.trainer.validate import inference

    trained = {name: p.detach().clone() for name, p in made.trained.items()}
    shadows = dict(zip(made.trained, made.ema.shadow_params, strict=True))
    assert any(not torch.equal(shadows[name], trained[name]) for name in trained)
    with inference(made):
        assert all(torch.equal(p, shadows[name]) for name, p in made.trained.items())
        assert not made.model.unet.training
    assert all(torch.equal(p, trained[name]) for name, p in made.trained.items())
    assert made.model.unet.training


@pytest.mark.parametrize("policy", ["diffusers", "level0", "units", "nested"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_checkpointing_gives_the_same_gradients(session, policy, method):
    def gradients(kind):
        made = session(f"memory.checkpointing={kind}", f"adapt.method={method}")
        batches = iter(loop.loader_from(made, Position()))
        loop.accumulate(made, batches)
        return {name: p.grad for name, p in made.trained.items()}

    plain, checkpointed = gradients("none"), gradients(policy)
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name], rtol=1e-4, atol=1e-7)


def test_adafactor_trains(session):
    made = session("train.steps=2", "train.optimizer=adafactor")
    train(made)
    assert type(made.optimizer.optimizer).__name__ == "Adafactor"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.precision=fp16", r"train\.precision: fp16 needs an NVIDIA GPU .* Use bf16 or no"),
        ("train.optimizer=adamw8bit", r"train\.optimizer: adamw8bit needs an NVIDIA GPU, this process runs on cpu"),
        ("memory.attention=xformers", r"memory\.attention: xformers cannot be used here .* Use memory\.attention=sdpa"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU cannot do")
def test_what_a_cpu_cannot_do_is_said(session, override, sentence):
    with pytest.raises(ConfigError, match=sentence):
        session(override)


def test_an_edited_learning_rate_and_weight_decay_apply_on_resume(session):
    made = session("train.steps=2", "train.lr=1e-3", "train.weight_decay=0.5", "train.schedule=cosine")
    train(made)
    edited = session("train.steps=4", "train.lr=1e-4", "train.weight_decay=0.1")
    position, said = state.resume(edited, resolved_yaml(edited.config))
    assert position == Position(2, 4)
    assert said[0] == f"resuming {edited.folder.checkpoints / 'step-00000002'}"
    assert "option changed since that checkpoint: train.lr was 0.001, is 0.0001" in said
    assert len(said) == 5
    (group,) = edited.optimizer.param_groups
    assert group["lr"] == pytest.approx(1e-4)
    assert group["weight_decay"] == pytest.approx(0.1)
    assert edited.schedule.get_last_lr() == [pytest.approx(1e-4)]


def test_band_losses_add_up(session):
    made = session()
    own_norm, report = reduce_step(
        made.accelerator,
        torch.tensor([1.0, 3.0, 5.0, math.nan]),
        torch.tensor([0.5, 0.7, 1.0, 100.0]),
        torch.tensor(2.0),
    )
    assert own_norm == report.grad_norm == 2.0
    assert math.isnan(report.loss)
    assert report.loss_by_sigma["0-1"] == pytest.approx(2.0)
    assert report.loss_by_sigma["1-3"] == pytest.approx(5.0)
    assert math.isnan(report.loss_by_sigma["8-inf"])
    assert "3-8" not in report.loss_by_sigma


def test_an_update_waits_for_the_device_once(session, monkeypatch):
    """However a value is read on the host: by Python, or below it."""
    made, reads = session("train.ema=true", "train.accumulation=2", "train.lr=1e-3"), []
    batches = iter(loop.loader_from(made, Position()))
    accumulated = loop.accumulate(made, batches)
    for name in ("tolist", "item", "__float__", "__int__", "__bool__", "numpy", "cpu"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda t, *a, name=name, real=real: reads.append(name) or real(t, *a))
    with HostReads() as below:
        loop.update(made, accumulated)
    assert reads == ["tolist"]
    assert below.seen == []


class HostReads(TorchDispatchMode):
    """Notes operators for which a GPU would be waited for."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_trackers_get_the_numbers_and_the_run_folder_no_secret(session, config, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "planted-secret-0123456789")
    _reset()
    made = config(
        "train.steps=2", "tracking.backends=[wandb,tensorboard]", "validation.samples=1", "validation.inference_steps=2"
    )
    run.train(made, config_text="text of the YAML\n")
    folder = tmp_path / "r"
    assert list(folder.rglob("events.out.tfevents*"))
    assert list(folder.rglob("*.wandb"))
    assert list(folder.glob("wandb/**/*.mp4"))
    assert json.loads((folder / "status.json").read_text())["state"] == "done"
    for path in folder.rglob("*"):
        if path.is_file():
            assert b"planted-secret" not in path.read_bytes(), path
    assert list((folder / "samples" / "step-000002").glob("*.mp4"))
    assert (folder / "contact_sheet.png").exists()
    assert (folder / "config.yaml").read_text() == "text of the YAML\n"


def test_the_networks_are_gone_before_the_process_group(session, config, monkeypatch):
    """What DDP holds on to must not be the last to hold the group: its destructor then waits for ever, once in a while."""
    _reset()
    unets, alive = [], []

    def built(*arguments):
        made = build(*arguments)
        unets.append(weakref.ref(made.parts.unet))
        return made

    monkeypatch.setattr(run, "build", built)
    monkeypatch.setattr(Accelerator, "end_training", lambda _: alive.append(unets[0]() is not None))
    run.train(config("train.steps=1", "train.warmup=0"), config_text="")
    assert alive == [False]


def test_a_signal_in_validation_stops_after_the_checkpoint(session, monkeypatch):
    made, wish = session("train.steps=9", "validation.interval=2", "checkpoint.interval=100"), StopWish()
    validate = loop._validate

    def signalled(*arguments):
        validate(*arguments)
        wish.name = "SIGTERM" if arguments[0].position.step == 2 else None

    monkeypatch.setattr(loop, "_validate", signalled)
    with pytest.raises(Stopped, match=r"stopped by SIGTERM after step 2; the checkpoint is saved"):
        train(made, wish)
    assert (made.folder.checkpoints / "step-00000002" / "MANIFEST.json").exists()


def with_loss_scale(session, init_scale):
    """fp16's path on a CPU: what accelerate sets up for mixed_precision="fp16", with a CPU gradient scaler."""
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
    optimizer = AcceleratedOptimizer(session.optimizer.optimizer, scaler=scaler)
    accelerator = session.accelerator
    accelerator.scaler, accelerator.native_amp, accelerator._optimizers = scaler, True, [optimizer]
    accelerator.state._mixed_precision = "fp16"
    return replace(session, optimizer=optimizer)


def test_overflow_under_a_loss_scale_skips_the_update_and_the_scale_resumes(session, monkeypatch):
    """Infinite gradients halve the scale and do nothing more."""
    made = with_loss_scale(session("train.steps=3", "train.lr=1e-2"), 1024.0)
    scaler = made.accelerator.scaler
    step, calls, at_overflow = loop.train_step, [], {}

    def overflowing(parts, batch, draws):
        calls.append(batch)
        result = step(parts, batch, draws)
        if len(calls) == 2:
            at_overflow.update({name: p.detach().clone() for name, p in made.trained.items()})
            result.loss.register_hook(lambda grad: grad * math.inf)
        if len(calls) == 3:
            assert all(torch.equal(p, at_overflow[name]) for name, p in made.trained.items())
        return result

    monkeypatch.setattr(loop, "train_step", overflowing)
    train(made)
    assert scaler.get_scale() == 512.0
    assert [line["grad_norm"] is None for line in metrics(made.folder.path)] == [False, True, False]
    assert not all(torch.equal(p, at_overflow[name]) for name, p in made.trained.items())

    again = with_loss_scale(session("train.steps=4"), 7.0)
    state.resume(again, resolved_yaml(again.config))
    assert again.accelerator.scaler.get_scale() == 512.0


def test_endless_overflow_ends_the_run(session, monkeypatch):
    made = with_loss_scale(session("train.steps=60"), 2.0**60)
    step = loop.train_step

    def overflowing(parts, batch, draws):
        result = step(parts, batch, draws)
        result.loss.register_hook(lambda grad: grad * math.inf)
        return result

    monkeypatch.setattr(loop, "train_step", overflowing)
    with pytest.raises(Diverged, match=r"step 21: .*gradient norm"):
        train(made)


def test_no_whole_checkpoint_left_is_an_error_not_a_new_start(session):
    made = session("train.steps=1")
    train(made)
    weights = made.folder.checkpoints / "step-00000001" / "lora.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(
        CheckpointError, match=r"(?s)no checkpoint of this run can be used.*step-00000001.*set another run\.name"
    ):
        state.resume(session("train.steps=2"), "{}")


BF16 = ["train.precision=bf16", "memory.parameters=bf16", "train.lr=1e-3", "train.steps=4", "checkpoint.interval=2"]


@pytest.mark.parametrize(
    "options",
    [["train.optimizer=adamw8bit", "train.ema=true", "memory.ema_on_cpu=true"], ["adapt.method=temporal_attention"]],
)
def test_bfloat16_parameters_go_on_to_the_bit(session, options):
    made = session(*BF16, *options)
    assert {parameter.dtype for parameter in made.trained.values()} == {torch.bfloat16}
    train(made)
    last = made.folder.checkpoints / "step-00000004"
    files = ["lora.safetensors", "ema.safetensors", "optimizer.safetensors", "unet.safetensors"]
    whole = {name: load_file(last / name) for name in files if (last / name).exists()}
    shutil.rmtree(last)
    resumed = session(*BF16, *options)
    position, _ = state.resume(resumed, resolved_yaml(resumed.config))
    assert position.step == 2
    loop.run_loop(resumed, position, resolved_yaml(resumed.config), StopWish(), Watch())
    for name, tensors in whole.items():
        again = load_file(last / name)
        assert again.keys() == tensors.keys()
        assert all(torch.equal(again[key], tensors[key]) for key in tensors), name
    kinds = {str(tensor.dtype) for tensor in whole.get("ema.safetensors", {}).values()}
    assert kinds <= {"torch.float32"}


def test_a_checkpoint_of_the_other_parameters_is_refused_with_the_key(session):
    train(session("train.precision=bf16", "train.steps=1"))
    other = session(*BF16)
    with pytest.raises(
        CheckpointError, match=r"saved as torch\.float32, this run holds it as torch\.bfloat16: .*memory\.parameters"
    ):
        state.resume(other, resolved_yaml(other.config))
    shutil.rmtree(other.folder.checkpoints)
    train(session(*BF16, "train.steps=1"))
    other = session("train.precision=bf16")
    with pytest.raises(
        CheckpointError, match=r"optimizer RoundingAdamW, this config uses AdamW\. Resume needs .*memory\.parameters"
    ):
        state.resume(other, resolved_yaml(other.config))


def test_ema_turned_on_for_a_resume_starts_from_the_weights(session):
    made = session("train.steps=2", "train.lr=1e-2")
    train(made)
    resumed = session("train.steps=3", "train.ema=true")
    _, said = state.resume(resumed, resolved_yaml(resumed.config))
    assert any("averages start from the weights of this checkpoint" in line for line in said)
    for average, parameter in zip(resumed.ema.shadow_params, resumed.trained.values(), strict=True):
        assert torch.equal(average, parameter)


def test_another_thread_count_is_said(session):
    made = session("train.steps=1")
    train(made)
    threads = torch.get_num_threads()
    resumed = session("train.steps=2", f"run.threads={threads + 1}")
    _, said = state.resume(resumed, resolved_yaml(resumed.config))
    assert any(f"it ran with {threads} CPU threads, this process has {threads + 1}" in line for line in said)


def test_a_run_killed_before_its_first_checkpoint_starts_its_metrics_anew(session, config, tmp_path):
    _reset()
    made = config("train.steps=1", "validation.clips=1")
    folder = RunFolder(tmp_path / "r")
    folder.append_metrics({"step": 0, "held_out_loss": 1.0})
    folder.append_metrics({"step": 1, "loss": 1.0})
    run.train(made, config_text="")
    assert [(line["step"], "loss" in line) for line in metrics(tmp_path / "r")] == [(0, False), (1, True), (1, False)]


def test_samples_of_one_file_or_of_namesakes_do_not_overwrite_each_other():
    assert unique_names([Path("a/x.mp4"), Path("b/x.mp4"), Path("y.mp4"), Path("a/x.mp4")]) == ["x", "x~2", "y", "x~3"]


def test_parallelism_that_is_not_ours_is_refused(config, monkeypatch):
    from accelerate import Accelerator, DistributedType

    _reset()
    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda _self: DistributedType.FSDP))
    with pytest.raises(UsageError, match=r"the launcher asks for FSDP: svdtune trains with one process, DDP or FSDP2"):
        make_accelerator(config())
    _reset()


def test_what_an_accelerate_config_left_in_the_environment(config, monkeypatch):
    """An engine is refused by its variable; accumulation is svdtune's own, and the loss is divided once."""
    _reset()
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert make_accelerator(config()).gradient_accumulation_steps == 1
    _reset()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(
        UsageError, match=r"ACCELERATE_USE_DEEPSPEED=true: expected not set. svdtune trains with one process"
    ):
        make_accelerator(config())
    _reset()


def test_status_follows_without_a_write_per_step(session, monkeypatch):
    made = session("train.steps=4", "checkpoint.interval=100")
    told, write = [], RunFolder.write_status
    monkeypatch.setattr(RunFolder, "write_status", lambda self, **facts: told.append(facts) or write(self, **facts))
    train(made)
    assert [facts["step"] for facts in told if "step" in facts] == [1, 4], "the first, and the one that is saved"
    (saved,) = [facts for facts in told if "checkpoint" in facts]
    assert saved["checkpoint"] == str(made.folder.checkpoints / "step-00000004")
    assert saved["checkpoint_seconds"] >= 0


def test_the_heart_beats_in_held_out_clips_sampler_steps_and_saves(session, monkeypatch):
    made = session("train.steps=1", "validation.clips=3", "validation.samples=1", "validation.inference_steps=4")
    beats = []
    monkeypatch.setattr(RunFolder, "beat", lambda _: beats.append(1))
    train(made)
    assert len(beats) == 2 * (3 + 4) + 1 + 2


def test_a_stop_lets_go_of_the_loader_without_the_garbage_collector(session, monkeypatch):
    """Only then does a DataLoader tell its workers to end; collected later, it waits five seconds for each of them."""
    alive, real = [], loop.loader_from

    class Batches:
        def __init__(self, batches):
            self.batches = batches

        def __iter__(self):
            return self

        def __next__(self):
            return next(self.batches)

    def watched(*arguments):
        batches = Batches(iter(real(*arguments)))
        alive.append(weakref.ref(batches))
        return batches

    monkeypatch.setattr(loop, "loader_from", watched)
    made, wish = session("train.steps=9", "checkpoint.interval=100"), StopWish()
    real_update = loop.update
    monkeypatch.setattr(loop, "update", lambda *arguments: (wish.hear("SIGTERM"), real_update(*arguments))[1])
    gc.disable()
    try:
        with pytest.raises(Stopped) as stopped:
            train(made, wish)
        assert [batches() for batches in alive] == [None]
    finally:
        gc.enable()
    assert "after step 1" in str(stopped.value)
