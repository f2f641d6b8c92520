"""The canonical weight stream: which tensors a decoder has, under which names, in which shapes and order.

Torch-free, so that memory can be planned and a checkpoint refused before torch is imported or any data is read.
"""

from collections.abc import Iterator
from typing import NamedTuple

from gossamer.config import ModelConfig

Shape = tuple[int, ...]


class CanonicalWeight(NamedTuple):
    template: str
    layer: int
    expert: int
    shape: Shape

    @property
    def name(self) -> str:
        return self.template.format(i=self.layer, e=self.expert)


def canonical_weights(config: ModelConfig) -> Iterator[CanonicalWeight]:
    """Every weight of the decoder in the order of the stream: embedding, layer by layer, final norm, head."""
    hidden, vocab = config.hidden_size, config.vocab_size
    yield CanonicalWeight("embed.weight", 0, 0, (vocab, hidden))
    for layer in range(config.num_layers):
        yield from _attention(config, layer)
        yield CanonicalWeight("layers.{i}.mlp_norm.weight", layer, 0, (hidden,))
        if config.moe is not None and layer not in config.moe.dense_layers:
            yield from _experts(config, layer)
        else:
            yield from _mlp(config, layer)
    yield CanonicalWeight("final_norm.weight", 0, 0, (hidden,))
    if not config.tie_word_embeddings:
        yield CanonicalWeight("lm_head.weight", 0, 0, (vocab, hidden))


def expected_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Canonical names and shapes, in the order of the stream."""
    return {weight.name: weight.shape for weight in canonical_weights(config)}


def _attention(c: ModelConfig, layer: int) -> Iterator[CanonicalWeight]:
    q_size, kv_size = c.num_q_heads * c.head_dim, c.num_kv_heads * c.head_dim
    yield CanonicalWeight("layers.{i}.attn_norm.weight", layer, 0, (c.hidden_size,))
    for name, rows in (("q", q_size), ("k", kv_size), ("v", kv_size)):
        yield CanonicalWeight(f"layers.{{i}}.attn.{name}.weight", layer, 0, (rows, c.hidden_size))
        if c.qkv_bias:
            yield CanonicalWeight(f"layers.{{i}}.attn.{name}.bias", layer, 0, (rows,))
    if c.qk_norm != "none":
        whole = c.qk_norm == "full"
        yield CanonicalWeight("layers.{i}.attn.q_norm.weight", layer, 0, (q_size if whole else c.head_dim,))
        yield CanonicalWeight("layers.{i}.attn.k_norm.weight", layer, 0, (kv_size if whole else c.head_dim,))
    yield CanonicalWeight("layers.{i}.attn.o.weight", layer, 0, (c.hidden_size, q_size))
    if c.o_bias:
        yield CanonicalWeight("layers.{i}.attn.o.bias", layer, 0, (c.hidden_size,))


def _mlp(c: ModelConfig, layer: int) -> Iterator[CanonicalWeight]:
    for name, rows, columns in (
        ("gate", c.intermediate_size, c.hidden_size),
        ("up", c.intermediate_size, c.hidden_size),
        ("down", c.hidden_size, c.intermediate_size),
    ):
        yield CanonicalWeight(f"layers.{{i}}.mlp.{name}.weight", layer, 0, (rows, columns))
        if c.mlp_bias:
            yield CanonicalWeight(f"layers.{{i}}.mlp.{name}.bias", layer, 0, (rows,))


def _experts(c: ModelConfig, layer: int) -> Iterator[CanonicalWeight]:
    if c.moe is None:
        return
    hidden, inner = c.hidden_size, c.moe.intermediate_size
    yield CanonicalWeight("layers.{i}.moe.router.weight", layer, 0, (c.moe.num_experts, hidden))
    for expert in range(c.moe.num_experts):
        yield CanonicalWeight("layers.{i}.moe.experts.{e}.gate.weight", layer, expert, (inner, hidden))
        yield CanonicalWeight("layers.{i}.moe.experts.{e}.up.weight", layer, expert, (inner, hidden))
        yield CanonicalWeight("layers.{i}.moe.experts.{e}.down.weight", layer, expert, (hidden, inner))
