"""Fake tensors: torch's cache of what operators return, asked by a shorter key."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
import torch

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


def test_whatever_differs_has_another_key():
    with fake_tensors() as mode, torch.no_grad():
        base = torch.empty(4, 6)
        views = [base, base.t(), base.double(), base[:2], base[2:], torch.empty(9, 6)[:4], torch.empty(4, 6, requires_grad=True),
                 torch.empty(4, 6, dtype=torch.cfloat), torch.empty(4, 6, dtype=torch.cfloat).conj(), torch.empty(4, 6, device="meta")]  # fmt: skip
        values = [1, 1.0, True, None, "1", torch.float32, (), [1, [2]], [[1], 2], [1, 2], {"a": 1}, {"b": 1}]
        keys = []
        for arguments in [(one,) for one in (*views, *values)] + [(1, 2), (base, 1), (1, base)]:
            keys.append(result := [])
            mode._prep_args_for_hash(result, arguments, None, [])
        assert all(
            tuple(one) != tuple(other) or [*map(type, one)] != [*map(type, other)]
            for one, other in combinations(keys, 2)
        )
        assert len({tuple(key) for key in keys}) == len(keys)


@pytest.mark.parametrize("made", [lambda: torch.empty(2).to_sparse(), lambda: torch.empty(2)], ids=["sparse", "real"])
def test_what_is_no_dense_fake_tensor_is_left_to_torch(made):
    from torch._subclasses.fake_tensor import _BypassDispatchCache

    tensor = made()
    with fake_tensors() as mode, pytest.raises(_BypassDispatchCache):
        mode._prep_args_for_hash([], (tensor,), None, [])
