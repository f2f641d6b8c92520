"""Gluon kernels have no interpreter, but the installed Triton compiles them for Hopper, whose names it changes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

COMPILE = """
import importlib, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

def swizzled(dtype, rows, columns):
    layout = gl.NVMMASharedLayout(128, 8 if dtype == "fp8e4nv" else 16, 2)
    return f"tensordesc<{dtype}[{rows}, {columns}],{layout!r}>"

family = sys.argv[1]
ints = dict.fromkeys("num_tokens num_rows num_blocks num_assignments N K num_m num_n".split(), "i32")
ints |= dict.fromkeys("table_stride row_stride head_stride group_stride scale_stride window".split(), "i32")
floats = dict.fromkeys("out_scales a_scales w_scales".split(), "*fp32") | {"scale_log2": "fp32"}
if family == "attention":
    tile = swizzled("bf16", 64, 64)
    kinds = {"q": "*bf16", "out": "*fp8e4nv", "k_desc": tile, "v_desc": tile}
    constants = dict(sinks=None, NUM_KV_HEADS=4, GROUP=6, HEAD_DIM=128, PAGE=64, BLOCK_R=32, HAS_SINKS=False,
                     HAS_WINDOW=True, STAGES=2)
elif family == "mla_fp8":
    kinds = {"scales": "*fp32", "partials": "*i64", "lse": "*fp32", "desc": swizzled("i16", 64, 64)}
    kinds["key_desc"] = f"tensordesc<i16[64, 32],{gl.NVMMASharedLayout(64, 16, 2)!r}>"
    constants = dict(NUM_BLOCKS=4, GROUP=32, BLOCK_R=64, MIN_PAGES=2, STAGES=2)
elif family.startswith("mla"):
    kinds = {"latent_q": "*bf16", "rope_q": "*bf16", "out": "*bf16", "desc": swizzled("bf16", 64, 64)}
    kinds |= {"partials": "*fp32", "lse": "*fp32", "head_stride": "i32"}
    kinds["pages"] = "*bf16"
    constants = dict(NUM_BLOCKS=2, BLOCK_R=64, MIN_PAGES=2, STAGES=2, TOP=2048 if family == "mla_listed" else 0)
elif family == "moe":
    kinds = {"a": "*bf16", "out": "*bf16", "a_desc": swizzled("bf16", 64, 64), "w_desc": swizzled("bf16", 256, 64)}
    kinds["num_blocks"] = "*i32"
    constants = dict(ALPHA=1.702, LIMIT=7.0, TOP_K=8, GATED=True, FEEDERS=4, PDL=True)
elif family.startswith("few"):
    kinds = dict.fromkeys(("a_desc", "w_desc"), swizzled("fp8e4nv", 64, 128)) | {"out_desc": swizzled("bf16", 64, 64)}
    kinds["partial"] = "*fp32"
    constants = dict(WGS=1, TOKENS=1, PARTS=1, STEPS=2, SPLIT_K=4, W_STAGES=7, A_STAGES=6, REGS=216, LATE=False)
    if family == "few_wide":
        constants |= dict(WGS=3, TOKENS=2, PARTS=3, STEPS=1, SPLIT_K=1, W_STAGES=5, REGS=152, LATE=True)
    constants["PDL"] = True
elif family == "grouped":
    kinds = dict.fromkeys("a w1 act".split(), "*fp8e4nv") | {"y": "*bf16"}
    kinds |= dict.fromkeys("act_scales w1_scales w2_scales".split(), "*fp32")
    kinds |= dict.fromkeys("inter hidden act_stride".split(), "i32") | {"num_blocks": "*i32"}
    kinds |= dict.fromkeys(("w1_desc", "w2_desc"), swizzled("fp8e4nv", 128, 128))
    constants = dict(ALPHA=1.702, LIMIT=7.0, M=32, TOP_K=8, PDL=True)
else:
    kinds = {"a": "*fp8e4nv", "out": "*bf16", "bias": "*bf16", "a_desc": swizzled("fp8e4nv", 64, 128)}
    kinds |= {"w_desc": swizzled("fp8e4nv", 128, 128), "out_desc": swizzled("bf16", 64, 128)}
    constants = dict(WGS=3, PARTS=1, TOP_K=0, GATED=False, BIAS=True, CHANNEL_STEP=-1, GROUP_M=8, STAGES=4, FEEDERS=1,
                     REGS=160, FEED_REGS=32, ALPHA=1.0, LIMIT=0.0, PDL=True)
    if family in ("experts", "down"):
        constants |= dict(WGS=2, PARTS=2, TOP_K=8, BIAS=False, GROUP_M=1, REGS=216)
    if family == "experts":
        kinds["out_desc"] = kinds["a_desc"]
        constants |= dict(GATED=True, FEEDERS=4, FEED_REGS=80, ALPHA=1.702, LIMIT=7.0)
modules = {"mla_fp8": "mla.hopper_fp8", "mla_listed": "mla.hopper", "experts": "gemm_fp8.hopper",
           "down": "gemm_fp8.hopper", "few": "gemm_fp8.hopper_few",
           "few_wide": "gemm_fp8.hopper_few", "grouped": "gemm_fp8.hopper_grouped"}
module = importlib.import_module(f"gossamer.ops.{modules.get(family, family + '.hopper')}")
names = {"attention": "_hopper_prefill_kernel", "mla": "_hopper_decode_kernel",
         "mla_listed": "_hopper_decode_kernel", "mla_fp8": "_hopper_fp8_decode_kernel",
         "few": "_few_kernel", "few_wide": "_few_kernel", "grouped": "_experts_kernel"}
kernel = getattr(module, names.get(family, "_hopper_kernel"))
kinds = ints | floats | kinds
types = {n: "constexpr" if n in constants else kinds.get(n, "*i32") for n in kernel.arg_names}
constexprs = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
sizes = "N K inter hidden".split()
aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(types) if types[n][0] == "*" or n in sizes}
source = GluonASTSource(fn=kernel, signature=types, constexprs=constexprs, attrs=aligned)
options = {"num_warps": 8 if "mla" in family else 4} | ({"maxnreg": 128} if "few" in family else {})
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
if family == "few":
    assert 2 * (compiled.metadata.shared + 1024) <= 228 * 1024, "two programs of a multiprocessor"
assert compiled.metadata.shared <= 227 * 1024
"""


@pytest.mark.parametrize(
    "family",
    ["attention", "mla", "mla_listed", "mla_fp8", "moe", "gemm_fp8", "experts", "down", "few", "few_wide", "grouped"],
)
def test_hopper_kernel_compiles(family: str, tmp_path: os.PathLike[str]) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, family], env=environment, capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr[-2000:]
