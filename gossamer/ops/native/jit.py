"""Compiles the native step, keeps the machine code in a file, and runs it on torch's own OpenMP team."""

import ctypes
import glob
import hashlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import torch

FEATURES = ("avx512f", "avx512bf16", "avx512vnni", "avx512vbmi")


def libgomp() -> str | None:
    """The OpenMP library that torch brought along, whose team of threads the step runs on."""
    return next(iter(glob.glob(os.path.join(os.path.dirname(torch.__file__), "lib", "libgomp*.so*"))), None)


def obstacle() -> str | None:
    """Why no native step can be had here; None if one can."""
    if importlib.util.find_spec("llvmlite") is None:
        return "llvmlite is not installed"
    from llvmlite import binding

    features = binding.get_host_cpu_features()
    missing = [name for name in FEATURES if not features.get(name)]
    if missing:
        return f"the CPU has no {missing[0]}"
    return None if libgomp() else "torch brings no libgomp along"


class Code:
    """Machine code of modules of LLVM's language, compiled or read from a file of `folder`."""

    def __init__(self, folder: Path) -> None:
        from llvmlite import binding

        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
        self._binding, self._folder = binding, folder
        features = binding.get_host_cpu_features().flatten() + ",-prefer-256-bit"
        self._target = binding.Target.from_default_triple().create_target_machine(
            cpu=binding.get_host_cpu_name(), features=features, opt=3
        )
        self._salt = f"{binding.llvm_version_info}{binding.get_host_cpu_name()}{features}"
        self._engine = binding.create_mcjit_compiler(binding.parse_assembly(""), self._target)

    def add(self, text: str) -> None:
        """Makes the functions of a module available to `address`."""
        name = hashlib.sha256(f"{self._salt}{text}".encode()).hexdigest()
        path = self._folder / f"{name}.o"
        code = _read(path)
        if code is None:
            code = self._compile(text)
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}")
            temporary.write_bytes(hashlib.sha256(code).digest() + code)
            temporary.replace(path)
        self._engine.add_object_file(self._binding.ObjectFileRef.from_data(code))

    def _compile(self, text: str) -> bytes:
        module = self._binding.parse_assembly(text)
        module.verify()
        passes = self._binding.create_pass_builder(self._target, self._binding.create_pipeline_tuning_options(2))
        passes.getModulePassManager().run(module, passes)
        code: bytes = self._target.emit_object(module)
        return code

    def address(self, name: str) -> int:
        self._engine.finalize_object()
        return int(self._engine.get_function_address(name))


def _read(path: Path) -> bytes | None:
    """The code in the file; None if there is none, or not all of it."""
    if not path.exists():
        return None
    content = path.read_bytes()
    return content[32:] if hashlib.sha256(content[32:]).digest() == content[:32] else None


class Team:
    """torch's OpenMP team of the calling thread."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(libgomp())
        self._run: Callable[..., None] = self._library.GOMP_parallel
        self._library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        self._library.GOMP_parallel.restype = None

    def address(self, name: str) -> int:
        return ctypes.cast(getattr(self._library, name), ctypes.c_void_p).value or 0

    def run(self, function: int, argument: int, num_threads: int) -> None:
        """Every thread of the team calls the function at this address with the argument."""
        self._run(function, argument, num_threads, 0)
