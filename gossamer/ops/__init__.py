"""One folder per op family: contract and dispatch in `__init__`, torch in `reference`, kernels in `triton`."""
