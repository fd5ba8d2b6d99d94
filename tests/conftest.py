"""Every test runs on the CPU backend, so that a machine with a GPU gives the same numbers.

The tests compare numbers of tiny programs: most of their time would be LLVM's, so its optimizations
are off. `benchmarks/` compares losses with them on.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("KERAS_BACKEND", "jax")
