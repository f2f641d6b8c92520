"""Without a CUDA device, Triton kernels run in the interpreter and tests marked `gpu` are skipped."""

from __future__ import annotations

import os
import re
import zlib

import pytest
import torch

# Before anything imports triton, which reads it once.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


# Long cases beside others of the same test that are not.
SLOW = re.compile(
    r"""test_attention_triton.py::test_an_output_in_fp8_is_the_output_quantised\[dtype0-False\]
    |test_fp8_fusions.py::test_experts_sum_norm_and_quantisation_in_one\[triton-2-144-160-dtype1\]
    |test_gemm_fp8.py::test_fp8_moe_mlp\[[12]-chosen\]
    |test_mtp.py::test_tokens_and_drafts_do_not_depend_on_the_schedule\[glm4_moe\]
    |test_paged_schedules.py::test_each_request_gets_its_tokens\[deepseek_v2_groups\]
    |test_sparse_index.py::test_chunks\[rule[013]-dtype1\]
    |test_sparse_nsa_triton.py::test_a_layer_of_kernels\[independent\]
    |test_sparse_triton.py::test_prefill\[rule2-heads2-2\]
    |test_swiglu.py::test_fp8_experts\[1\]
    |test_moe_triton.py::test_grouped_routing_with_a_bias_equals_the_reference\[(0.0-.*|None-options[123]\])
    |test_dsa.py::test_the_best_tokens_are_chosen\[\[\(2,.*-((1|40)-dtype1|(1|8|128)-dtype2)\]
    |test_dsa.py::test_attention_to_the_chosen\[\[\(2,.*-(1-1-1|8-1-2|128-100-2)-dtype2\]
    |test_dsa.py::test_ties_go_to_the_earliest\[(1.0-32|-1.0-128)-triton\]
    |test_dsa.py::test_candidates_hold_the_best\[(random|rising|falling|steps)-4\]""",
    re.VERBOSE,
)


@pytest.fixture(autouse=True)
def _own_draws(request: pytest.FixtureRequest) -> None:
    """A test draws the same numbers whatever ran before it, so that what fails, fails again."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if SLOW.fullmatch(item.nodeid.rpartition("/")[2]):
            item.add_marker(pytest.mark.slow)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
