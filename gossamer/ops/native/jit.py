"""Compiles LLVM's language to machine code in memory, and runs it on torch's own OpenMP team."""

import ctypes

_LLVMLITE = 0, 50
_FEATURES = "avx512f", "avx512bw", "avx512bf16", "avx512vnni"


def obstacle() -> str | None:
    """Why no native code can be had here; None if it can."""
    try:
        from llvmlite import __version__, binding
    except ImportError:
        return "llvmlite is not installed (pip install 'gossamer[cpu]')"
    if tuple(map(int, __version__.split(".")[:2])) < _LLVMLITE:
        return f"llvmlite {__version__} is older than {_LLVMLITE[0]}.{_LLVMLITE[1]}"
    features = binding.get_host_cpu_features()
    missing = [name for name in _FEATURES if not features.get(name)]
    if missing:
        return f"the CPU has no {missing[0]}"
    return None if hasattr(ctypes.CDLL(None), "GOMP_parallel") else "torch does not run on libgomp"


class Code:
    """Functions at addresses. They live as long as this object."""

    def __init__(self) -> None:
        from llvmlite import binding

        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
        features = binding.get_host_cpu_features().flatten() + ",-prefer-256-bit"
        self._target = binding.Target.from_default_triple().create_target_machine(
            cpu=binding.get_host_cpu_name(), features=features, opt=3
        )
        self._binding, self._engine = binding, binding.create_mcjit_compiler(binding.parse_assembly(""), self._target)
        self._openmp = ctypes.CDLL(None)  # whichever libgomp torch found first

    def add(self, text: str) -> None:
        """Compiles a module."""
        module = self._binding.parse_assembly(text)
        module.verify()
        passes = self._binding.create_pass_builder(self._target, self._binding.create_pipeline_tuning_options(2))
        passes.getModulePassManager().run(module, passes)
        self._engine.add_object_file(self._binding.ObjectFileRef.from_data(self._target.emit_object(module)))

    def address(self, name: str) -> int:
        """Of a function compiled, or one of the OpenMP library."""
        if name.lower().startswith(("gomp_", "omp_")):
            return ctypes.cast(getattr(self._openmp, name), ctypes.c_void_p).value or 0
        self._engine.finalize_object()
        return int(self._engine.get_function_address(name))

    def run(self, address: int, argument: int, num_threads: int) -> None:
        """Every thread of the calling thread's team, the one that torch's operators run on, calls the function."""
        self._openmp.GOMP_parallel(ctypes.c_void_p(address), ctypes.c_void_p(argument), num_threads, 0)
