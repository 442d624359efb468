"""train.compile: the blocks are traced whole, no shape twice, and compute what they computed. On a CPU by the compiler's own fronts."""

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import nn
from torch._dynamo.utils import counters

from svdtune.config.load import load_config
from svdtune.config.schema import Adapt
from svdtune.errors import ConfigError
from svdtune.model import regions
from svdtune.model.adapt import adapt
from svdtune.model.attention import use_attention
from svdtune.model.fold import fold
from svdtune.model.recompute import Recomputed, recompute
from svdtune.model.regions import BLOCKS, Compiled, compile_blocks, require_compiler, uncompiled
from tests.trainer.conftest import REPO

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler's own


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    before = torch._dynamo.config.recompile_limit
    yield
    torch._dynamo.config.recompile_limit = before
    torch._dynamo.reset()


@pytest.fixture
def made(svd_folder):
    """`made("lora", "units", "eager")`: a small UNet as training prepares it, compiled or (no backend) not."""
    from diffusers import UNetSpatioTemporalConditionModel

    def make(method="full", policy="none", backend=None):
        unet = UNetSpatioTemporalConditionModel.from_pretrained(svd_folder / "unet").train()
        fold(unet)
        use_attention(unet, "auto")
        adapt(unet, Adapt(method, rank=2), dtype=torch.float32, seed=0)
        if backend:
            compile_blocks(unet, backend)
        recompute(unet, policy)
        return unet

    return make


def ask(unet, height=8, width=12, batch=2):
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(batch, 3, 8, height, width, generator=generator)
    context, ids = torch.randn(batch, 1, 24, generator=generator), torch.rand(batch, 3, generator=generator)
    return unet(sample, 0.3, encoder_hidden_states=context, added_time_ids=ids).sample


def output_and_gradients(unet, **size):
    output = ask(unet, **size)
    output.square().sum().backward()
    gradients = torch.cat([p.grad.flatten() for p in unet.parameters() if p.grad is not None])
    unet.zero_grad(set_to_none=True)
    return output.detach(), gradients


def graphs():
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(("method", "policy", "backend"), [("lora", "units", "eager"), ("full", "nested", "aot_eager")])
def test_blocks_are_traced_whole_once_and_compute_the_same(made, method, policy, backend):
    """fullgraph raises at a break, so that it runs is the proof; autocast as in training."""
    plain, compiled = made(method, policy), made(method, policy, backend)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        output, gradients = output_and_gradients(plain)
        first, _ = output_and_gradients(compiled)
        after_warm_up = graphs()
        again, those = output_and_gradients(compiled)
    assert graphs() == after_warm_up > len(BLOCKS)
    assert counters["graph_break"] == {}
    assert torch.equal(first, again)
    torch.testing.assert_close(again, output, rtol=2e-2, atol=2e-2 * float(output.abs().max()))
    assert (those - gradients).norm() < 2e-2 * gradients.norm()


def test_sizes_that_have_been_seen_are_not_compiled_again(made):
    unet = made(backend="eager")
    sizes = ({"height": 8, "width": 12}, {"height": 12, "width": 8, "batch": 1})
    per_size = []
    for size in sizes:
        before = graphs()
        output_and_gradients(unet, **size)
        per_size.append(graphs() - before)
    assert all(per_size)
    warm = graphs()
    for size in (*sizes, *reversed(sizes)):
        output_and_gradients(unet, **size)
    assert graphs() == warm


def test_samples_compile_nothing(made):
    unet = made(backend="eager")
    plain = made()
    with torch.no_grad():
        assert torch.equal(ask(unet), ask(plain))
    assert graphs() == 0


def test_every_block_is_compiled_inside_what_is_recomputed(made):
    unet = made("full", "nested", "eager")
    blocks = [module for module in unet.modules() if isinstance(module, BLOCKS)]
    assert {type(block) for block in blocks} == set(BLOCKS)
    for block in blocks:
        forward = block.forward
        if isinstance(forward, Recomputed):
            forward = forward.forward
        assert isinstance(forward, Compiled), block


@pytest.mark.parametrize("policy", ["units", "nested"])
def test_uncompiled_lets_hooks_inside_be_called(made, policy, monkeypatch):
    monkeypatch.setattr(regions, "BLOCKS", (BasicTransformerBlock,))
    unet, called = made("full", policy, "eager"), []
    block = next(module for module in unet.modules() if isinstance(module, BasicTransformerBlock))
    norm = block.norm1
    assert isinstance(norm, nn.LayerNorm)
    ask(unet)
    handle = norm.register_forward_hook(lambda *_: called.append(1))
    warm = graphs()
    with uncompiled(unet):
        ask(unet)
    handle.remove()
    assert called
    ask(unet)
    assert graphs() == warm


def test_a_break_in_a_block_is_an_error(made):
    """The proof above is none if breaks pass."""
    unet = made(backend="eager")
    block = next(module for module in unet.modules() if isinstance(module, BasicTransformerBlock))
    forward = block.norm3.forward
    block.norm3.forward = lambda x: (torch._dynamo.graph_break(), forward(x))[1]
    with pytest.raises(torch._dynamo.exc.Unsupported):
        ask(unet)


@pytest.mark.parametrize(
    ("device", "triton", "reason"),
    [("cpu", True, "no NVIDIA GPU is visible"), ("cuda", False, "Triton is not installed")],
)
def test_what_the_compiler_needs_is_said(monkeypatch, device, triton, reason):
    monkeypatch.setattr(regions.importlib.util, "find_spec", lambda _: object() if triton else None)
    with pytest.raises(ConfigError, match=rf"train\.compile: {reason}, .* Use train\.compile=false\.") as raised:
        require_compiler(torch.device(device))
    assert raised.value.patch == ("train.compile=false",)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["memory.attention=xformers"],
            r"memory\.attention: got 'xformers', expected another than xformers with train\.compile",
        ),
        (["adapt.method=lora", "adapt.dora=true"], r"adapt\.dora: got True, expected false with train\.compile"),
    ],
)
def test_what_cannot_be_compiled_is_refused(overrides, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load_config(REPO / "configs/tiny.yaml", ["train.compile=true", *overrides])
