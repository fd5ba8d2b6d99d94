"""Every test runs on the CPU backend, so that a machine with a GPU gives the same numbers.

The tests compare numbers of tiny programs: most of their time would be LLVM's, so its optimizations
are off. `benchmarks/` compares losses with them on.
"""

import os
import signal

# A shell that starts the tests in the background has them ignore SIGINT, and so would the programs
# that they start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("KERAS_BACKEND", "jax")
