"""memory.attention: what is chosen where, that all choices and parts compute the same, and what is said of one that is missing."""

import pytest
import torch
from diffusers.models.attention import TemporalBasicTransformerBlock
from diffusers.models.attention_processor import Attention
from torch._subclasses.fake_tensor import FakeTensorMode

from svdtune.errors import ConfigError
from svdtune.model import attention
from svdtune.model.attention import Site, attend, kernel_for, require_attention, unavailable, use_attention

HOPPER, ADA, TURING = (9, 0), (8, 9), (7, 5)
BACKENDS = ["auto", "sdpa", "flash", "cudnn", "xformers", "math"]


def site(temporal=False, head_dim=64, dtype=torch.bfloat16, capability=HOPPER):
    return Site(temporal, head_dim, dtype, capability)


@pytest.mark.parametrize(
    ("backend", "spatial", "temporal"),
    [
        ("auto", attention.SPATIAL[9], attention.TEMPORAL),
        ("sdpa", "sdpa", "sdpa"),
        ("flash", "flash", attention.TEMPORAL),
        ("cudnn", "cudnn", attention.TEMPORAL),
        ("xformers", "xformers", attention.TEMPORAL),
        ("math", "math", "math"),
    ],
)
def test_what_is_chosen_on_hopper(backend, spatial, temporal):
    assert kernel_for(backend, site()) == spatial
    assert kernel_for(backend, site(temporal=True)) == temporal


@pytest.mark.parametrize("temporal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_cannot_be_done_is_left_to_torch(backend, temporal):
    plain = "math" if backend == "math" else "sdpa"
    assert kernel_for(backend, site(temporal, capability=None)) == plain  # a CPU
    left = [
        site(temporal, dtype=torch.float32),
        site(temporal, capability=TURING),
        site(temporal, head_dim=20),
        site(temporal, head_dim=512),
    ]
    chosen = {kernel_for(backend, each) for each in left}
    assert chosen <= {plain, "xformers", "efficient"}  # of which each does all of these, but heads of 512
    assert kernel_for(backend, left[-1]) in (plain, "efficient")


def test_auto_before_hopper():
    assert kernel_for("auto", site(capability=ADA)) == "flash"
    assert kernel_for("auto", site(capability=ADA, dtype=torch.float16)) == "flash"


def tensors(rows=7, heads=2, tokens=5, head_dim=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shape = (4, rows, heads, tokens, head_dim)
    return [tensor.requires_grad_() for tensor in torch.randn(shape, generator=generator, dtype=dtype)[:3].unbind()]


def forward_and_gradients(kernel, given):
    made = attend(*given, kernel)
    gradients = torch.autograd.grad(made.sin().sum(), given)
    return torch.stack([made.detach(), *gradients])


@pytest.mark.parametrize("most", [1, 2, 3, 6])
@pytest.mark.parametrize("kernel", ["sdpa", "flash"])
def test_parts_are_the_whole(monkeypatch, kernel, most):
    given, sizes, compute = tensors(), [], attention.compute
    whole = forward_and_gradients(kernel, given)
    monkeypatch.setattr(attention, "MOST_ROWS", most)
    monkeypatch.setattr(attention, "compute", lambda *a: sizes.append(len(a[0])) or compute(*a))
    parts = forward_and_gradients(kernel, given)
    assert max(sizes) <= most
    assert sum(sizes) == 7
    assert (parts - whole).abs().max() <= 1e-12 * whole.abs().max()


def test_plain_products_equal_torchs_own():
    given = tensors()
    sdpa, math = (forward_and_gradients(kernel, given) for kernel in ("sdpa", "math"))
    assert (math - sdpa).abs().max() <= 1e-12 * sdpa.abs().max()


@pytest.mark.parametrize("kernel", ["flash", "cudnn", "efficient"])
def test_a_kernel_that_is_not_there_is_replaced(kernel):
    """On a CPU none of them is, and what torch takes instead gives the same."""
    given = tensors(dtype=torch.float32)
    torch.testing.assert_close(forward_and_gradients(kernel, given), forward_and_gradients("sdpa", given))


def layers(unet):
    return {name: module for name, module in unet.named_modules() if isinstance(module, Attention) and "attn1" in name}


@pytest.fixture
def unet(svd_folder):
    from diffusers import UNetSpatioTemporalConditionModel

    return UNetSpatioTemporalConditionModel.from_pretrained(svd_folder / "unet").to(torch.float64)


def ask(unet, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 3, 8, 8, 12, generator=generator, dtype=torch.float64)
    context = torch.randn(2, 1, 24, generator=generator, dtype=torch.float64)
    ids = torch.tensor([[7.0, 127.0, 0.02], [5.0, 90.0, 0.0]], dtype=torch.float64)
    with torch.no_grad():
        return unet(sample.to(dtype), 0.3, encoder_hidden_states=context.to(dtype), added_time_ids=ids.to(dtype)).sample


def test_every_layer_asks_and_the_network_is_the_same(unet, monkeypatch):
    expected, asked, compute = ask(unet), [], attention.compute
    monkeypatch.setattr(attention, "compute", lambda *a: asked.append(a[0].shape[2]) or compute(*a))
    for backend in BACKENDS:
        use_attention(unet, backend)
        asked.clear()
        made = ask(unet)
        assert (made - expected).abs().max() <= 1e-12 * expected.abs().max(), backend
        assert len(asked) == len(layers(unet))
        # 3 frames seen by the temporal layers, 96 and 24 positions by the spatial ones.
        assert asked.count(3) == sum(isinstance(m, TemporalBasicTransformerBlock) for m in unet.modules())
        assert 96 in asked


def test_layers_know_whether_they_are_temporal(unet):
    use_attention(unet, "auto")
    assert {
        module.processor.temporal == ("temporal_transformer_blocks" in n) for n, module in layers(unet).items()
    } == {True}


def test_the_dtype_of_autocast_counts(unet, monkeypatch):
    seen = []
    monkeypatch.setattr(attention, "kernel_for", lambda backend, where: seen.append(where) or "sdpa")
    use_attention(unet.float(), "auto")
    ask(unet, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ask(unet, torch.float32)
    half = len(seen) // 2
    assert {where.dtype for where in seen[:half]} == {torch.float32}
    assert {where.dtype for where in seen[half:]} == {torch.bfloat16}
    assert {(where.head_dim, where.capability) for where in seen} == {(32, None)}


def test_shapes_alone_are_enough():
    with FakeTensorMode():
        given = [torch.empty(70_000, 2, 5, 64, requires_grad=True) for _ in range(3)]
        made = attend(*given, "sdpa")
        made.sum().backward()
    assert made.shape == given[0].grad.shape == (70_000, 2, 5, 64)


@pytest.mark.parametrize("backend", ["flash", "cudnn", "xformers"])
def test_what_is_missing_is_said(backend, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    with pytest.raises(
        ConfigError, match=rf"memory\.attention: {backend} cannot be used here \(no NVIDIA GPU is visible.*Use memory\."
    ) as raised:
        require_attention(backend, torch.device("cpu"), torch.bfloat16)
    assert raised.value.patch == ("memory.attention=sdpa",)
    if backend != "xformers":
        reason = unavailable(backend, torch.device("cuda"), torch.float32)
        assert reason == "it computes in bf16 or fp16, and train.precision=no is float32"
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    reason = unavailable("xformers", torch.device("cuda"), torch.bfloat16)
    assert reason == "it is not installed"


@pytest.mark.parametrize("backend", ["auto", "sdpa", "math"])
def test_what_is_everywhere_is_not_refused(backend):
    require_attention(backend, torch.device("cpu"), torch.float32)


def test_a_gpu_that_is_too_old_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: TURING)
    reason = unavailable("flash", torch.device("cuda"), torch.float16)
    assert reason == "it needs compute capability 8.0 (Ampere), this GPU has 7.5"
