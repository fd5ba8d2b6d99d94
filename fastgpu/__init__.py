"""fastgpu: import a model, optimize its jaxpr, train it, measure it, export it.

This file is the list of what is public. Names are resolved on first use, so that `import fastgpu`
starts no JAX backend and imports neither TensorFlow nor Keras.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgpu.benchmarking import benchmark as benchmark
    from fastgpu.compile import plan as plan
    from fastgpu.compile import value_and_grad as value_and_grad
    from fastgpu.config import Configuration as Configuration
    from fastgpu.config import configure as configure
    from fastgpu.errors import FastGPUError as FastGPUError
    from fastgpu.exporters import export_saved_model as export_saved_model
    from fastgpu.exporters import export_stablehlo as export_stablehlo
    from fastgpu.exporters import load_stablehlo as load_stablehlo
    from fastgpu.importers import from_keras as from_keras
    from fastgpu.importers import from_nnx as from_nnx
    from fastgpu.importers import from_onnx as from_onnx
    from fastgpu.importers import register_keras_layer as register_keras_layer
    from fastgpu.keras_integration import accelerate as accelerate
    from fastgpu.training import TrainState as TrainState
    from fastgpu.training import evaluate as evaluate
    from fastgpu.training import fit as fit
    from fastgpu.training import gather_params as gather_params
    from fastgpu.training import max_batch as max_batch
    from fastgpu.training import predict as predict
    from fastgpu.training import shard_fsdp as shard_fsdp
    from fastgpu.training import supervised_loss as supervised_loss
    from fastgpu.training import train_step as train_step
    from fastgpu.transforms import optimize as optimize
    from fastgpu.tuning import tune as tune

_PUBLIC = {
    # prepare
    "configure": "fastgpu.config",
    "Configuration": "fastgpu.config",
    "FastGPUError": "fastgpu.errors",
    # import
    "from_keras": "fastgpu.importers",
    "from_nnx": "fastgpu.importers",
    "from_onnx": "fastgpu.importers",
    "register_keras_layer": "fastgpu.importers",
    # optimize
    "optimize": "fastgpu.transforms",
    "accelerate": "fastgpu.keras_integration",
    # plan
    "value_and_grad": "fastgpu.compile",
    "plan": "fastgpu.compile",
    "max_batch": "fastgpu.training",
    # train
    "TrainState": "fastgpu.training",
    "supervised_loss": "fastgpu.training",
    "train_step": "fastgpu.training",
    "gather_params": "fastgpu.training",
    "shard_fsdp": "fastgpu.training",
    "fit": "fastgpu.training",
    "evaluate": "fastgpu.training",
    "predict": "fastgpu.training",
    # tune, measure
    "tune": "fastgpu.tuning",
    "benchmark": "fastgpu.benchmarking",
    # deploy
    "export_saved_model": "fastgpu.exporters",
    "export_stablehlo": "fastgpu.exporters",
    "load_stablehlo": "fastgpu.exporters",
}
_SUBMODULES = ("errors", "hardware", "ir", "models", "optimizers", "transforms")

__all__ = [*sorted(_PUBLIC), *_SUBMODULES]  # pyright: ignore[reportUnsupportedDunderAll]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"fastgpu.{name}")
    raise AttributeError(f"module 'fastgpu' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
