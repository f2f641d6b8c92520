"""Native decode steps as far as any x86 machine goes: valid language, and code for a CPU that has AVX-512."""

import platform

import pytest

pytest.importorskip("llvmlite")
from llvmlite import binding

from gossamer.ops import native
from gossamer.ops.native import step


@pytest.mark.skipif(platform.machine() != "x86_64", reason="its code is x86's")
@pytest.mark.parametrize(("qk_norm", "int8_head", "page_size"), [(True, True, 32), (False, False, 64)])
def test_every_module_compiles(qk_norm: bool, int8_head: bool, page_size: int) -> None:
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine(cpu="sapphirerapids", opt=3)
    shape = native.Shape(128, 192, 6, 2, 64, 320, page_size, 1e-5, qk_norm, int8_head)
    texts = list(step.modules(shape, sorted(native.KINDS)))
    assert len(texts) == 1 + len(native.KINDS) * len(native.ROW_COUNTS)
    for text in texts:
        module = binding.parse_assembly(text)
        module.verify()
        assert len(machine.emit_object(module)) > 500
    assembly = "".join(machine.emit_assembly(binding.parse_assembly(text)) for text in texts)
    for instruction in ("vdpbf16ps", "vpdpbusd", "vcvtneps2bf16"):
        assert instruction in assembly
