"""SVD's cross-attention folded: over a context of one token the softmax is 1, so the answer is the token's value, for every position.

`attn2(x) = to_out(to_v(context))`, exactly. Queries, keys and the norm before them (`adapt.DEAD`) are not computed; they keep their
names, so checkpoints are the same, and what trains or adapts `to_v` and `to_out` acts as before.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.attention import BasicTransformerBlock, TemporalBasicTransformerBlock
from torch import Tensor, nn

from svdtune.contracts import Mismatch
from svdtune.errors import ContractError

_BLOCKS = (BasicTransformerBlock, TemporalBasicTransformerBlock)


def fold(unet: nn.Module) -> None:
    """Fold every cross-attention of `unet`, in place. Its forward then raises ContractError for a context of more than one token."""
    for name, module in unet.named_modules():
        block: Any = module
        if isinstance(module, _BLOCKS) and block.attn2 is not None:
            block.attn2.set_processor(OneToken(f"{name}.attn2"))
            block.norm2.forward = _as_it_is


class OneToken:
    """The processor of one cross-attention. The answer has one position, which the block's residual sum broadcasts."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        """encoder_hidden_states (rows, 1, context) to (rows, 1, channels)."""
        if encoder_hidden_states.shape[1] != 1:
            raise _too_many(self.name, encoder_hidden_states.shape[1])
        return attn.to_out[0](attn.to_v(encoder_hidden_states))


def _as_it_is(hidden_states: Tensor) -> Tensor:
    return hidden_states


def _too_many(name: str, tokens: int) -> ContractError:
    mismatch = Mismatch(
        "UNetInput.encoder_hidden_states",
        "1 token",
        f"{tokens} tokens at {name}",
        "SVD's image context is one CLIP embedding per clip, and its cross-attention is folded on that",
        "Give the projected image embedding, .unsqueeze(1), not the tower's patches.",
    )
    return ContractError(str(mismatch), [mismatch])
