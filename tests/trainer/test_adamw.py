"""bfloat16 parameters lose nothing on average: rounding, codes, updates and a whole small training, against float32."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from svdtune.checkpoint.optimizer import load_optimizer, optimizer_state, write_optimizer
from svdtune.checkpoint.tensors import is_shard
from svdtune.config.load import load_config
from svdtune.config.schema import Model
from svdtune.contracts import Draws, Encoded, VideoBatch, specs
from svdtune.errors import ConfigError
from svdtune.model.load import load_model
from svdtune.trainer import adamw
from svdtune.trainer.adamw import GROUP, RoundingAdamW, RoundingAdamW8bit, encode, round_by_chance, signed, unsigned
from svdtune.trainer.build import clip_pixels, prepare_networks
from svdtune.trainer.optimizer import make_optimizer, state_bytes
from svdtune.trainer.step import Parts, denoise
from tests.trainer.conftest import REPO

KINDS = [RoundingAdamW, RoundingAdamW8bit]
EVERY_CHANCE = torch.arange(2**16, dtype=torch.int32)


def made(kind, parameters, lr=1e-5, **options):
    return kind(parameters, **{"lr": lr, "betas": (0.9, 0.999), "weight_decay": 0.0, **options})


def weights(*shape, size=0.02, seed=0):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size
    return nn.Parameter(values.bfloat16())


def test_rounding_is_right_on_average_and_goes_to_a_neighbour():
    """Over every chance there is, not over a sample: the mean is the number itself, to the last bit."""
    x = torch.cat(
        [torch.randn(60) * 10.0 ** torch.randint(-20, 20, (60,)), torch.tensor([1.0, -1.0, 2 - 2**-20, 1e-40])]
    )
    rounded = round_by_chance(x[:, None].expand(-1, 2**16).contiguous(), EVERY_CHANCE.expand(len(x), -1))
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded.double().mean(1), x.double())
    low, high = rounded.float().amin(1), rounded.float().amax(1)
    assert bool(((low <= x) & (x <= high)).all())
    assert bool((torch.nextafter(low.bfloat16(), torch.tensor(torch.inf).bfloat16()) >= high.bfloat16()).all())


def test_rounding_leaves_what_is_no_number_alone():
    canonical = torch.tensor([0x7FFFFFFF, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    x = torch.cat([torch.tensor([torch.inf, -torch.inf, 0.0]), canonical])
    for chance in (0, 1, 0xFFFF):
        rounded = round_by_chance(x, torch.full(x.shape, chance, dtype=torch.int32))
        assert rounded[:3].tolist() == [torch.inf, -torch.inf, 0.0]
        assert bool(rounded[3:].isnan().all())


@pytest.mark.parametrize(
    ("decode", "code", "largest"),
    [(signed, lambda x: 2 * x / (1 + x.abs()) * 127, 127), (unsigned, lambda x: x.sqrt() * 255, 255)],
    ids=["exp_avg", "exp_avg_sq"],
)
def test_codes_are_right_on_average_and_the_largest_is_kept(decode, code, largest):
    row = torch.randn(GROUP) * 1e-6
    row = row if decode is signed else row.square()
    codes, scale = encode(row.expand(2**16, -1).contiguous(), decode, code, EVERY_CHANCE[:, None].expand(-1, GROUP))
    assert bool((codes.amax(0) - codes.amin(0) <= 1).all())
    assert float(codes.abs().max()) <= largest
    assert float(scale[0]) >= float(row.abs().max())
    mean = (decode(codes).double() * scale.double()[:, None]).mean(0)
    assert float((mean - row).abs().max() / row.abs().max()) < 2e-5


def test_an_update_too_small_for_bfloat16_moves_the_share_it_should():
    """lr 1e-5 on weights near 0.02, a twelfth of their spacing: to nearest not one moves."""
    ours, nearest = weights(200_000, size=0.02), weights(200_000, size=0.02)
    before = ours.detach().clone()
    ours.grad = nearest.grad = torch.ones_like(ours)
    made(RoundingAdamW, [ours]).step()
    torch.optim.AdamW([nearest], lr=1e-5, weight_decay=0.0).step()
    spacing = torch.finfo(torch.bfloat16).eps * 2 ** (torch.frexp(before.float()).exponent - 1.0)
    likely = (1e-5 / spacing).clamp(max=1)
    moved, due = int((ours != before).sum()), float(likely.sum())
    assert abs(moved - due) < 5 * float((likely * (1 - likely)).sum()) ** 0.5
    assert 0.1 < due / len(before) < 0.9
    large = before.abs() > 0.01
    assert int((nearest != before)[large].sum()) == 0 < int((ours != before)[large].sum())
    assert float((ours.detach().float() - before.float()).mean()) == pytest.approx(-1e-5, rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [adamw.CHUNK, 30 * GROUP], ids=["together", "in pieces"])
def test_it_is_adamw_on_average(monkeypatch, kind, chunk):
    """The same gradients into torch's AdamW over float32; shapes that fill no group, of no axis, and with channels last."""
    monkeypatch.setattr(adamw, "CHUNK", chunk)
    shapes = [(96, 64), (7,), (), (33, 3), (16, 8, 3, 3), (5, 5)]
    ours = [weights(*shape, seed=i) for i, shape in enumerate(shapes)]
    ours[4].data = ours[4].data.to(memory_format=torch.channels_last)
    theirs = [nn.Parameter(p.detach().float().contiguous()) for p in ours]
    settings = {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 10.0}
    ours_step, theirs_step = made(kind, ours, **settings), torch.optim.AdamW(theirs, **settings)
    generator = torch.Generator().manual_seed(1)
    for step in range(30):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            left_out = i == 5 and step < 3  # no gradient at first: its steps are counted by itself
            p.grad = None if left_out else ((torch.randn(p.shape, generator=generator) + 0.5) * 10.0**-i).bfloat16()
            q.grad = None if left_out else p.grad.float()
        ours_step.step()
        theirs_step.step()
    for p, q in zip(ours, theirs, strict=True):
        apart = (p.detach().float() - q.detach()).flatten()
        # Each of 30 roundings is off by up to half a spacing, to either side.
        assert float(apart.abs().max()) <= 30**0.5 * 3 * 2**-8 * max(0.02, float(q.detach().abs().max()))
        if p.numel() > 1000:
            assert abs(float(apart.mean())) < 0.02 * 30 * 1e-4
            shrunk = float((apart * q.detach().flatten()).sum() / q.detach().square().sum())
            assert abs(shrunk) < 3e-3  # of the 0.03 that weight decay takes
    assert ours_step.state[ours[5]]["step"] == 27


@pytest.mark.parametrize("kind", KINDS)
def test_the_second_moment_shrinks(kind):
    """By a thousandth a step, less than half the spacing of bfloat16 and of 8 bits: to nearest it would stay for ever."""
    p = weights(1024)
    optimizer = made(kind, [p], lr=0.0)
    p.grad = torch.ones_like(p)
    optimizer.step()
    second_moment = lambda: second_of(optimizer.state[p])  # noqa: E731
    begin = second_moment()
    p.grad = torch.zeros_like(p)
    p.grad[::GROUP] = 1.0  # one of each group goes on: its scale does not shrink
    for _ in range(400):
        optimizer.step()
    rest = torch.arange(1024) % GROUP != 0
    assert float(begin.mean()) == pytest.approx(1e-3, rel=0.01)
    assert float(second_moment()[rest].mean()) == pytest.approx(1e-3 * 0.999**400, rel=0.03)
    assert float(second_moment()[~rest].mean()) == pytest.approx(1 - 0.999**401, rel=0.03)


def test_shards_are_moved_as_whole_parameters(tmp_path):
    """FSDP2's parameters, in a world of one: the state is divided as they are, so that a checkpoint puts it together."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        whole, gradient = weights(50, 7), torch.randn(50, 7).bfloat16()
        shard = nn.Parameter(distribute_tensor(whole.detach().clone(), mesh, [Shard(0)]))
        whole.grad, shard.grad = gradient, distribute_tensor(gradient.clone(), mesh, [Shard(0)])
        optimizers = [made(RoundingAdamW, [p], lr=1e-3) for p in (whole, shard)]
        for optimizer in optimizers:
            optimizer.step()
        assert torch.equal(shard.full_tensor(), whole)
        one, other = (
            optimizer_state(optimizer, {"p": p}) for optimizer, p in zip(optimizers, (whole, shard), strict=True)
        )
        assert one.plain["plain"] == other.plain["plain"] == {"p": {"step": 1}}
        assert one.tensors.keys() == other.tensors.keys()
        assert all(torch.equal(one.tensors[key], other.tensors[key]) for key in one.tensors)
        assert is_shard(optimizers[1].state[shard]["exp_avg"])
    finally:
        torch.distributed.destroy_process_group()


def second_of(state):
    v = state["exp_avg_sq"]
    if v.dtype == torch.bfloat16:
        return v.float()
    return (unsigned(v) * state["exp_avg_sq_scale"].float()[:, None]).flatten()


def test_no_small_second_moment_becomes_nothing():
    """A number whose gradients are a ten-thousandth of its neighbours' would be divided by next to nothing."""
    p = weights(GROUP)
    optimizer = made(RoundingAdamW8bit, [p], lr=1e-3)
    before = p.detach().float()
    for _ in range(20):
        p.grad = torch.full_like(p, 1e-4)
        p.grad[0] = 1.0
        optimizer.step()
    assert int(optimizer.state[p]["exp_avg_sq"].min()) >= 1
    assert float((p.detach().float() - before).abs().max()) < 21 * 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_chance_is_of_seed_and_step_alone_and_a_saved_state_goes_on_as_if_never_stopped(tmp_path, kind):
    def network():
        return {"a": weights(40, 9), "b": weights(5, seed=1)}

    def run(named, optimizer, first, last):
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            for p in named.values():
                p.grad = torch.randn(p.shape, generator=generator).bfloat16()
            torch.rand(step)  # others draw from the global stream as they like
            optimizer.step()

    whole = network()
    optimizer = made(kind, whole.values(), seed=3)
    state = torch.get_rng_state()
    for p in whole.values():
        p.grad = None
    optimizer.step()
    assert torch.equal(torch.get_rng_state(), state)
    run(whole, optimizer, 0, 9)

    first = network()
    stopped = made(kind, first.values(), seed=3)
    run(first, stopped, 0, 4)
    write_optimizer(tmp_path, optimizer_state(stopped, first))
    second = {name: nn.Parameter(p.detach().clone()) for name, p in first.items()}
    resumed = made(kind, second.values(), seed=3)
    load_optimizer(tmp_path, resumed, second)
    run(second, resumed, 4, 9)
    assert all(torch.equal(whole[name], second[name]) for name in whole)
    for name in whole:
        for key, value in optimizer.state[whole[name]].items():
            loaded = resumed.state[second[name]][key]
            assert torch.equal(value, loaded) if isinstance(value, torch.Tensor) else value == loaded, key

    other = network()
    run(other, made(kind, other.values(), seed=4), 0, 9)
    assert not torch.equal(whole["a"], other["a"])


def test_a_gradient_is_not_written_to_and_the_state_takes_what_was_promised():
    for kind, optimizer in ((RoundingAdamW, "adamw"), (RoundingAdamW8bit, "adamw8bit")):
        p = weights(64, 64)
        p.grad = torch.randn(64, 64).bfloat16()
        before = p.grad.clone()
        stepper = made(kind, [p])
        stepper.step()
        assert torch.equal(p.grad, before)
        held = sum(value.nbytes for value in stepper.state[p].values() if isinstance(value, torch.Tensor))
        config = load_config(
            REPO / "configs/svd_xt_full.yaml", ["memory.parameters=bf16", f"train.optimizer={optimizer}"]
        )
        assert type(make_optimizer(config, [p], torch.device("cpu"))) is kind
        assert held == state_bytes(config) * p.numel()


def test_float32_parameters_are_refused():
    with pytest.raises(ValueError, match=r"RoundingAdamW moves bfloat16 parameters, got torch\.float32"):
        made(RoundingAdamW, [nn.Parameter(torch.zeros(2))])


@pytest.mark.parametrize(
    ("overrides", "said", "patch"),
    [
        (["train.precision=no"], r"train\.precision: got 'no', expected bf16 with memory\.parameters=bf16", "train.precision=bf16"),
        (["train.precision=fp16"], r"train\.precision: got 'fp16', expected bf16", "train.precision=bf16"),
        (["train.precision=bf16", "train.optimizer=adafactor"], r"train\.optimizer: got 'adafactor'", "train.optimizer=adamw"),
    ],
)  # fmt: skip
def test_what_would_lose_updates_is_refused(overrides, said, patch):
    with pytest.raises(ConfigError, match=said) as refused:
        load_config(REPO / "configs/tiny.yaml", ["memory.parameters=bf16", *overrides])
    assert refused.value.patch == (patch,)


def test_the_arithmetic_compiles_whole_and_gives_the_same():
    """Traced with symbolic sizes, run without a compiler; on a GPU the same graph becomes one kernel."""
    n, rates = 4 * GROUP, (*torch.tensor([1.0, 1e-3, 0.5]), 0.9, 0.999, 1e-8)
    p, g = torch.randn(2, n).bfloat16()
    chance = torch.randint(-(2**31), 2**31, (n,)).int()
    m, v, scale = (
        torch.randint(-127, 128, (n,)).to(torch.int8),
        torch.randint(1, 256, (n,)).to(torch.uint8),
        torch.rand(4).bfloat16(),
    )
    cases = [(adamw._in_bf16, (p, g, g, g.square())), (adamw._in_8bit, (p, g, m, scale, v, scale))]
    for arithmetic, tensors in cases:
        compiled = torch.compile(arithmetic, dynamic=True, fullgraph=True, backend="eager")
        for one, other in zip(arithmetic(*tensors, chance, *rates), compiled(*tensors, chance, *rates), strict=True):
            assert torch.equal(one, other)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_on_a_gpu_it_waits_for_nothing_and_moves_as_on_the_cpu(kind, compiled):
    shapes, moved = [(1000, 333), (7,), ()], {}
    for device in ("cpu", "cuda"):
        ours = [nn.Parameter(weights(*shape).to(device)) for shape in shapes]
        optimizer = made(kind, ours, lr=1e-4, compiled=compiled and device == "cuda")
        for step in range(20):
            generator = torch.Generator().manual_seed(step)
            for p in ours:
                p.grad = (torch.randn(p.shape, generator=generator) + 0.5).bfloat16().to(device)
            if device == "cuda" and step == 19:
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
            try:
                optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        moved[device] = float(ours[0].detach().float().mean()), float(second_of(optimizer.state[ours[0]]).mean())
    assert moved["cuda"] == pytest.approx(moved["cpu"], rel=5e-3)


STEPS = 16
VARIANTS = {
    "fp32": ["memory.parameters=fp32"],
    "bf16": ["memory.parameters=bf16"],
    "8-bit": ["memory.parameters=bf16", "train.optimizer=adamw8bit"],
}


def curve(svd_folder, *overrides, nearest=False):
    """Losses of a small random SVD UNet that learns two clips of latents, all of it trained, computed in bfloat16."""
    config = load_config(REPO / "configs/tiny.yaml", ["train.precision=bf16", "train.lr=1e-4", *overrides])
    model = load_model(Model(pretrained=str(svd_folder), variant=None))
    trained = prepare_networks(model, config, on_accelerator=False)
    parts = Parts(model.unet, model.vae, model.image_encoder, clip_pixels(model), model.facts, torch.bfloat16, 4)
    optimizer = make_optimizer(config, trained.values(), torch.device("cpu"))
    if nearest:
        optimizer = torch.optim.AdamW(trained.values(), lr=1e-4)
    losses = []
    for encoded, batch, draws in clips(model.facts):
        result = denoise(parts, encoded, batch, draws)
        result.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(result.loss.detach()))
    return losses


def clips(facts):
    """The same two clips of latents again and again, each time with other noise."""
    generator = torch.Generator().manual_seed(0)
    # Three frames: over two, oneDNN 3.12 leaves the weight gradient of a bf16 convolution over time unwritten on a CPU without AVX512_BF16.
    axes = facts.axes(b=2, t=3, h=8 * facts.f, w=8 * facts.f)

    def record(kind):
        values = {name: torch.randn(spec.shape(axes), generator=generator) for name, spec in specs(kind).items()}
        return kind(**{name: values[name].abs().to(getattr(torch, spec.dtype)) for name, spec in specs(kind).items()})

    encoded, batch, draws = record(Encoded), record(VideoBatch), record(Draws)
    encoded = replace(encoded, latents=torch.randn(encoded.latents.shape, generator=generator))
    for _ in range(STEPS):
        noise = torch.randn(draws.noise.shape, generator=generator)
        yield encoded, batch, replace(draws, noise=noise, sigma=torch.rand(2, generator=generator) + 1)


@pytest.fixture(scope="module")
def curves(svd_folder):
    made = {name: curve(svd_folder, *overrides) for name, overrides in VARIANTS.items()}
    return {**made, "nearest": curve(svd_folder, *VARIANTS["bf16"], nearest=True)}


@pytest.mark.parametrize("variant", ["bf16", "8-bit"])
def test_it_learns_as_float32_does_where_rounding_to_nearest_does_not(curves, variant):
    first, last = (lambda losses: fmean(losses[:4])), (lambda losses: fmean(losses[-4:]))
    learned = first(curves["fp32"]) - last(curves["fp32"])
    behind = abs(last(curves[variant]) - last(curves["fp32"]))
    lost = last(curves["nearest"]) - last(curves["fp32"])
    print({name: (first(losses), last(losses)) for name, losses in curves.items()})
    assert learned > 0.1
    assert behind < 0.02 * learned
    assert lost > 0.1 * learned
