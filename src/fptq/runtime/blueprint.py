"""A decoder as data: which layers it has, what they are called in the checkpoint, and how they are put together.

Names inside a block are relative to it. `architectures.blueprint` makes it from a config.json.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fptq.runtime.rotary import Rotary

Array = np.ndarray


@dataclass(frozen=True)
class Norm:
    """A norm: of the whole row, or of each head; RMSNorm, or with `center` LayerNorm.

    `plus_one` marks norms that multiply by 1 + weight (Gemma).
    """

    name: str
    eps: float
    center: bool = False
    plus_one: bool = False


@dataclass(frozen=True)
class Linear:
    """A linear layer, and the order in which its output channels are wanted (None: as they are)."""

    name: str
    rows: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Block:
    """A decoder block: x += attention(norm(x)), then x += MLP(norm(x)).

    Attributes:
        attention: the name of the attention module, under which the cache's scales stand.
        attention_norm: before attention; and so on. None where there is none.
        query_norm: of each query head, before the rotation.
        key_norm: likewise.
        attention_output_norm: of what attention adds.
        mlp_output_norm: of what the MLP adds.
        qkv: one fused layer or three, whose channels in order are all queries, keys, values.
        output: the layer after attention.
        up: the MLP's first: gate and up, fused or two, or a single one without a gate.
        down: its second.
        rotary: None without rotary embeddings.
        window: positions that a query sees; 0 for all.
    """

    attention: str
    attention_norm: Norm
    qkv: tuple[Linear, ...]
    output: Linear
    mlp_norm: Norm
    up: tuple[Linear, ...]
    down: Linear
    rotary: Rotary | None = None
    window: int = 0
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    attention_output_norm: Norm | None = None
    mlp_output_norm: Norm | None = None


@dataclass(frozen=True)
class Blueprint:
    """A decoder.

    Attributes:
        prefix: name of the list of blocks.
        blocks: each of them.
        hidden: channels between blocks; likewise the other sizes.
        inner: channels inside the MLP.
        gated: the MLP is down(activation(gate(x)) · up(x)); otherwise down(activation(up(x))).
        softmax_scale: factor of attention scores.
        attention_softcap: scores become cap · tanh(score / cap); 0 leaves them.
        logit_softcap: likewise of logits.
        alibi: adds slopes by distance to the scores instead of rotating.
        residual_from_norm: what is added to is the normed input.
        embedding: name of the embedding's weight; and so on.
        embedding_scale: factor of embeddings.
        embedding_norm: after them.
        positions: name of learned position embeddings, of which the first `position_offset` aren't used.
        final_norm: before the head.
        head: name of the output head's layer.
        tied: the head has the embedding's weight.
        context: positions that the model was made for; None if it doesn't say.
    """

    prefix: str
    blocks: tuple[Block, ...]
    vocabulary: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    activation: str
    gated: bool
    softmax_scale: float
    embedding: str
    final_norm: Norm
    tied: bool
    context: int | None
    head: str = "lm_head"
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    alibi: bool = False
    residual_from_norm: bool = False
    embedding_scale: float = 1.0
    embedding_norm: Norm | None = None
    positions: str | None = None
    position_offset: int = 0

    def alibi_slopes(self) -> Array | None:
        """Return float32 [heads], the slopes of ALiBi (arXiv 2108.12409), or None."""
        if not self.alibi:
            return None
        nearest = 2 ** (self.heads.bit_length() - 1)
        base = np.float32(2.0 ** -(8 / nearest))
        slopes = base ** np.arange(1, nearest + 1, dtype=np.int32)
        extra = np.float32(2.0 ** -(4 / nearest)) ** np.arange(1, 2 * (self.heads - nearest), 2, dtype=np.int32)
        return np.concatenate([slopes, extra]).astype(np.float32)
