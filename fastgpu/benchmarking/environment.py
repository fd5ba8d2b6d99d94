"""Where figures were measured."""

import importlib.metadata
import os
import platform
from typing import Any

import jax

_PACKAGES = ("jax", "flax", "optax", "keras", "tensorflow-cpu", "tensorflow", "numpy")


def environment() -> dict[str, Any]:
    """Device, cores, machine and versions, to stand beside the figures. Starts JAX's backend.

    >>> environment()["versions"]["jax"] == jax.__version__
    True
    """
    device = jax.devices()[0]
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES if _is_installed(name)}
    return {
        "device": f"{device.platform}: {device.device_kind}",
        "cores": os.cpu_count(),
        "machine": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
    }


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
