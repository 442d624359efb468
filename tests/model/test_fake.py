"""Fake tensors: torch's cache of what operators return, asked by a shorter key."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, _BypassDispatchCache, _CacheKeyState

from svdtune.config.load import load_config
from svdtune.model.fake import fake_tensors
from svdtune.model.load import fake_model, known_configs

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"


def test_what_the_cache_returns_is_what_torch_computes():
    """torch's own cross-check computes every answer again; the second pass has them all from the cache."""
    unet = fake_model(known_configs(load_config(TINY).model), bridge=False).unet.requires_grad_(True)
    with fake_tensors(unet) as mode:
        mode.cache_crosscheck_enabled = True
        before = mode.cache_info().hits
        for _ in range(2):
            inputs = torch.empty(1, 3, 8, 8, 12), torch.empty(1), torch.empty(1, 1, 64), torch.empty(1, 3)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                unet(*inputs).sample.sum().backward()
        assert mode.cache_info().hits - before > 1000


def key_of(mode: FakeTensorMode, *arguments: object) -> tuple[object, ...]:
    key: list[object] = []
    mode._prep_args_for_hash(key, arguments, _CacheKeyState(None), [])
    return tuple(key)


def test_whatever_differs_has_another_key():
    with fake_tensors() as mode, torch.no_grad():
        base, complex_ = torch.empty(4, 6), torch.empty(4, 6, dtype=torch.cfloat)
        tensors = [base, base.t(), base.double(), base[:2], base[2:], torch.empty(9, 6)[:4], complex_, complex_.conj(),
                   torch.empty(4, 6, requires_grad=True), torch.empty(4, 6, device="meta")]  # fmt: skip
        values = [1, 1.0, True, None, "1", torch.float32, (), [1, [2]], [[1], 2], [1, 2], {"a": 1}, {"b": 1}]
        keys = [key_of(mode, one) for one in (*tensors, *values)]
        keys += [key_of(mode, 1, 2), key_of(mode, base, 1), key_of(mode, 1, base)]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("made", [lambda: torch.empty(2).to_sparse(), lambda: torch.empty(2)], ids=["sparse", "real"])
def test_what_is_no_dense_fake_tensor_is_left_to_torch(made):
    tensor = made()
    with fake_tensors() as mode, pytest.raises(_BypassDispatchCache):
        key_of(mode, tensor)
