import sys
from pathlib import Path

import pytest
import torch

from gossamer.core import KVLayout
from gossamer.kv_cache.pool import KVPool

LAYOUT = KVLayout((2, 3, 8), "bfloat16", 2)


@pytest.mark.parametrize("heads_first", [False, True])
def test_layers_are_views_of_zeros(heads_first):
    pool = KVPool(4, LAYOUT, num_pages=5, page_size=16, device=torch.device("cpu"), heads_first=heads_first)
    assert pool.num_bytes == 4 * 5 * 16 * LAYOUT.bytes_per_token
    assert len(pool.layers) == 4
    keys, values = pool.layers[2]
    assert keys.shape == values.shape == (5, 3, 16, 8)
    assert (keys.transpose(0, 1) if heads_first else keys).is_contiguous()
    assert not pool.tensor.any()
    values[1, 2, 3] = 1.0
    assert pool.tensor.sum() == 8
    assert pool.tensor[2, 1, 1, 2, 3].sum() == 8


@pytest.mark.parametrize("heads_first", [False, True])
def test_fp8_pages_come_with_scales(heads_first):
    layout = KVLayout.of((2, 3, 8), "fp8")
    pool = KVPool(4, layout, num_pages=5, page_size=16, device=torch.device("cpu"), heads_first=heads_first)
    keys, values, k_scales, v_scales = pool.layers[1]
    assert keys.dtype == values.dtype == torch.float8_e4m3fn
    assert keys.shape == (5, 3, 16, 8)
    assert k_scales.shape == v_scales.shape == (5, 3)
    assert k_scales.is_contiguous()
    assert k_scales.dtype == torch.float32
    assert not k_scales.any()
    v_scales[4, 2] = 2.0
    assert pool.scales[1, 1, 4, 2] == pool.scales.sum() == 2.0
    # 16 tokens of 48 bytes, and 6 scales, in each of 4 layers and 5 pages
    assert pool.num_bytes == 4 * 5 * layout.page_bytes(16) == 4 * 5 * (16 * 48 + 6 * 4)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_taken_when_it_is_written():
    def resident_bytes():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident_bytes()
    pool = KVPool(8, LAYOUT, num_pages=40_000, page_size=64, device=torch.device("cpu"))
    assert pool.num_bytes > 1_900_000_000
    assert resident_bytes() - before < 50_000_000
