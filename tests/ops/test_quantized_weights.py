from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest

from gossamer.ops.weights import QuantizedTensor

ROWS, COLUMNS = 48, 512
BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34, "Q5_0": 22, "Q5_1": 24}


def random_blocks(kind: str, rows: int = ROWS) -> QuantizedTensor:
    rng = np.random.default_rng(7)
    if kind in BLOCK_BYTES:
        values = rng.standard_normal((rows, COLUMNS)).astype(np.float32)
        data = gguf.quantize(values, gguf.GGMLQuantizationType[kind])
    else:  # the package cannot quantise to these: random bits with sane scales are just as good
        sizes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        data = rng.integers(0, 256, (rows, COLUMNS // sizes[0], sizes[1]), dtype=np.uint8)
        scales = slice(0, 4) if kind in ("Q4_K", "Q5_K") else slice(sizes[1] - 2, sizes[1])
        halves = rng.uniform(1e-3, 1e-2, (*data.shape[:2], (scales.stop - scales.start) // 2)).astype(np.float16)
        data[..., scales] = halves.view(np.uint8)
        data = data.reshape(rows, -1)
    return QuantizedTensor(data, kind, (rows, COLUMNS))


def oracle(tensor: QuantizedTensor) -> np.ndarray[Any, Any]:
    return np.asarray(gguf.dequantize(tensor.data, gguf.GGMLQuantizationType[tensor.ggml_type]))


@pytest.mark.parametrize("kind", [*BLOCK_BYTES, "Q4_K", "Q5_K", "Q6_K"])
def test_dequantise_equals_the_package(kind: str) -> None:
    tensor = random_blocks(kind)
    values = tensor.dequantize()
    assert values.dtype.itemsize == 4
    np.testing.assert_array_equal(values.numpy(), oracle(tensor))


@pytest.mark.parametrize(("kind", "tolerance"), [("Q4_0", 0.0), ("Q4_1", 4e-7), ("Q4_K", 4e-7)])
def test_int4_holds_the_stored_values(kind: str, tolerance: float) -> None:
    tensor = random_blocks(kind)
    packed = tensor.to_int4()
    assert packed is not None
    q, scale, zero = (part.numpy().astype(np.float64) for part in packed)
    assert q.shape == (ROWS, COLUMNS)
    assert scale.shape == zero.shape == (ROWS, COLUMNS // 32)
    assert q.min() >= 0
    assert q.max() <= 15
    values = (q.reshape(ROWS, -1, 32) - 8) * scale[..., None] + zero[..., None]
    np.testing.assert_allclose(values.reshape(ROWS, COLUMNS), oracle(tensor), rtol=0, atol=tolerance)


def test_known_block() -> None:
    """One Q4_1 block by hand: byte j holds element j in its low half and element j + 16 in its high half."""
    raw = np.concatenate([np.array([0.5, -1.0], np.float16).view(np.uint8), np.arange(16, dtype=np.uint8)])
    raw[4:] |= 15 << 4
    tensor = QuantizedTensor(raw[None], "Q4_1", (1, 32))
    expected = [0.5 * j - 1.0 for j in range(16)] + [6.5] * 16
    assert tensor.dequantize().tolist() == [expected]


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1", "Q6_K"])
def test_other_types_have_no_int4_form(kind: str) -> None:
    assert random_blocks(kind).to_int4() is None


def test_stacks_dequantise_but_have_no_int4_form() -> None:
    tensor = random_blocks("Q4_0")
    stack = QuantizedTensor(tensor.data.reshape(4, 12, -1), "Q4_0", (4, 12, COLUMNS))
    assert stack.to_int4() is None
    np.testing.assert_array_equal(stack.dequantize().numpy().reshape(ROWS, COLUMNS), oracle(tensor))
    assert stack.data.nbytes == ROWS * COLUMNS // 32 * 18


def test_rows_of_a_memory_map_need_not_be_aligned() -> None:
    tensor = random_blocks("Q4_1")
    shifted = np.empty(tensor.data.nbytes + 1, np.uint8)
    shifted[1:] = tensor.data.reshape(-1)
    view = QuantizedTensor(shifted[1:].reshape(tensor.data.shape), "Q4_1", tensor.shape)
    np.testing.assert_array_equal(view.dequantize().numpy(), oracle(tensor))
