"""Without a CUDA device, Triton kernels run in the interpreter and tests marked `gpu` are skipped."""

from __future__ import annotations

import os

import pytest
import torch

# Before anything imports triton, which reads it once.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


# Cases of twenty seconds and more on an old machine, beside others of the same test.
SLOW = {
    "test_attention_triton.py::test_an_output_in_fp8_is_the_output_quantised[dtype0-False]",
    "test_fp8_fusions.py::test_experts_sum_norm_and_quantisation_in_one[triton-2-144-160-dtype1]",
    "test_gemm_fp8.py::test_fp8_moe_mlp[1-chosen]",
    "test_mtp.py::test_tokens_and_drafts_do_not_depend_on_the_schedule[glm4_moe]",
    "test_sparse_index.py::test_chunks[rule1-dtype1]",
    "test_sparse_index.py::test_chunks[rule3-dtype1]",
    "test_sparse_nsa_triton.py::test_a_layer_of_kernels[independent]",
    "test_sparse_triton.py::test_prefill[rule2-heads2-2]",
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.rpartition("/")[2] in SLOW:
            item.add_marker(pytest.mark.slow)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
