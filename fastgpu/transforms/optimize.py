"""`optimize`: a function in, the same function out with its jaxpr rewritten."""

from typing import Any


def optimize(fn, passes: Any = "default", target: Any = None):
    return fn
