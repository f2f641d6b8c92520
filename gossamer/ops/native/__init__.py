"""Decode steps of dense decoders as native code, which LLVM compiles at start for the CPU at hand (AVX-512 with bf16).

The step reads weights where torch and oneDNN packed them, and the pages of the KV cache where they lie. What it is
given are tables of addresses; their entries are here.
"""

from dataclasses import dataclass

ROW_COUNTS = (1, 2, 4, 8, 12, 16)
"""Numbers of rows that there are kernels for."""
MAX_ROWS = ROW_COUNTS[-1]
TILE = 64
"""Outputs that lie together in a packed weight."""

ARGUMENTS = (
    "rows", "ids", "positions", "page_tables", "layers", "num_layers", "embed", "cos", "sin", "page_bytes",
    "kv_head_bytes", "x", "qkv", "attended", "activated", "logits", "scratch", "barrier", "thread_num", "num_threads",
    "bf16", "int4", "int8",
)  # fmt: skip
"""What the step's one argument points to, 8 bytes each; the last three are the kernels for as many rows."""
KINDS = ("bf16", "int4", "int8")
WEIGHT = ("kernel", "data", "tile_bytes", "half_bytes", "scales", "bias")
"""Of a weight; scales of the int8 head fp32 [N], its bias int32: -128 times the sums of its rows. Others: fp32 [N]."""
LAYER = (
    "attn_norm", "mlp_norm", "q_norm", "k_norm", "k_pages", "v_pages", "window",
    *(f"{name}.{field}" for name in ("qkv", "o", "gate_up", "down", "head") for field in WEIGHT),
)  # fmt: skip
"""Of a layer, norms in fp32; behind the last one's, as if of another: the final norm, as attn_norm, and the head."""


@dataclass(frozen=True)
class Shape:
    """The numbers that a step is compiled for."""

    hidden: int
    intermediate: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    page_size: int
    eps: float
    qk_norm: bool
    int8_head: bool

    @property
    def q_width(self) -> int:
        return self.num_q_heads * self.head_dim

    @property
    def qkv(self) -> int:
        return self.q_width + 2 * self.num_kv_heads * self.head_dim
