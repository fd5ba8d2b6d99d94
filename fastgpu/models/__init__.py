"""Reference models as pure linen modules: one family a file, each with a frozen config.

Every model is called `model.apply(variables, x, train=False)`. Parameters are float32; `dtype` is
the dtype it computes in; logits come back as float32. Training draws from the rng "dropout" and
updates the collection "batch_stats", where the model has them.

>>> model = create("resnet18", num_classes=10, dtype=jnp.bfloat16)
>>> model.config
ResNetConfig(stage_sizes=(2, 2, 2, 2), bottleneck=False, width=64, num_classes=10)
"""

from collections.abc import Callable
from dataclasses import fields
from difflib import SequenceMatcher
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from fastgpu.errors import ModelError
from fastgpu.models.convnet import ConvNet, ConvNetConfig
from fastgpu.models.googlenet import GoogLeNet, GoogLeNetConfig
from fastgpu.models.gpt import GPT, GPTConfig
from fastgpu.models.llama import Llama, LlamaConfig
from fastgpu.models.mlp import MLP, MLPConfig
from fastgpu.models.mobilenet import MobileNetV2, MobileNetV2Config
from fastgpu.models.resnet import ResNet, ResNetConfig
from fastgpu.models.unet import UNet, UNetConfig
from fastgpu.models.vgg import VGG, VGGConfig
from fastgpu.models.vit import ViT, ViTConfig

__all__ = [
    "GPT",
    "MLP",
    "VGG",
    "ConvNet",
    "ConvNetConfig",
    "GPTConfig",
    "GoogLeNet",
    "GoogLeNetConfig",
    "Llama",
    "LlamaConfig",
    "MLPConfig",
    "MobileNetV2",
    "MobileNetV2Config",
    "ResNet",
    "ResNetConfig",
    "UNet",
    "UNetConfig",
    "VGGConfig",
    "ViT",
    "ViTConfig",
    "create",
    "families",
    "names",
    "tiny",
]

_PRESETS: dict[str, tuple[type[nn.Module], Callable[..., Any]]] = {
    "mlp": (MLP, MLPConfig),
    "convnet": (ConvNet, ConvNetConfig),
    "resnet18": (ResNet, ResNetConfig.resnet18),
    "resnet50": (ResNet, ResNetConfig.resnet50),
    "mobilenetv2": (MobileNetV2, MobileNetV2Config),
    "vgg16": (VGG, VGGConfig.vgg16),
    "vgg19": (VGG, VGGConfig.vgg19),
    "googlenet": (GoogLeNet, GoogLeNetConfig),
    "vit-ti16": (ViT, ViTConfig.ti16),
    "vit-s16": (ViT, ViTConfig.s16),
    "vit-b16": (ViT, ViTConfig.b16),
    "gpt2-small": (GPT, GPTConfig.small),
    "gpt2-medium": (GPT, GPTConfig.medium),
    "gpt2-large": (GPT, GPTConfig.large),
    "gpt2-xl": (GPT, GPTConfig.xl),
    "llama-1b": (Llama, LlamaConfig.llama_1b),
    "unet": (UNet, UNetConfig),
}
_TINY: dict[str, tuple[type[nn.Module], Callable[..., Any], tuple[int, ...], DTypeLike]] = {
    "mlp": (MLP, MLPConfig.tiny, (2, 8), jnp.float32),
    "convnet": (ConvNet, ConvNetConfig.tiny, (2, 8, 8, 1), jnp.float32),
    "resnet": (ResNet, ResNetConfig.tiny, (2, 16, 16, 3), jnp.float32),
    "mobilenetv2": (MobileNetV2, MobileNetV2Config.tiny, (2, 16, 16, 3), jnp.float32),
    "vgg": (VGG, VGGConfig.tiny, (2, 8, 8, 3), jnp.float32),
    "googlenet": (GoogLeNet, GoogLeNetConfig.tiny, (2, 24, 24, 3), jnp.float32),
    "vit": (ViT, ViTConfig.tiny, (2, 16, 16, 3), jnp.float32),
    "gpt": (GPT, GPTConfig.tiny, (2, 16), jnp.int32),
    "llama": (Llama, LlamaConfig.tiny, (2, 16), jnp.int32),
    "unet": (UNet, UNetConfig.tiny, (2, 16, 16, 1), jnp.float32),
}


def names() -> list[str]:
    """The names that `create` knows.

    >>> names()[:3]
    ['mlp', 'convnet', 'resnet18']
    """
    return list(_PRESETS)


def families() -> list[str]:
    """The names that `tiny` knows.

    >>> families()
    ['mlp', 'convnet', 'resnet', 'mobilenetv2', 'vgg', 'googlenet', 'vit', 'gpt', 'llama', 'unet']
    """
    return list(_TINY)


def create(name: str, *, dtype: DTypeLike = jnp.float32, **overrides: Any) -> nn.Module:
    """The model called `name`, computing in `dtype`; `overrides` replace fields of its config.

    Raises `ModelError` for a name or a field that does not exist, and lists those that do.

    >>> create("gpt2-small", context=256).config.context
    256
    >>> create("resnet34")
    Traceback (most recent call last):
    ...
    fastgpu.errors.ModelError: no model is called 'resnet34'
    """
    if name not in _PRESETS:
        raise _unknown_name(name, known=names())
    module, preset = _PRESETS[name]
    known = [field.name for field in fields(preset())]
    for key in overrides:
        if key not in known:
            raise ModelError(
                f"{name!r} has no setting {key!r}",
                expected=f"one of {', '.join(_nearest_first(key, known))}",
                got=f"{key}={overrides[key]!r}",
                fix=f"take {_nearest_first(key, known)[0]!r}, or leave it out",
            )
    return module(preset(**overrides), dtype=dtype)


def tiny(
    family: str, *, dtype: DTypeLike = jnp.float32, **overrides: Any
) -> tuple[nn.Module, jax.ShapeDtypeStruct]:
    """The smallest model of `family`, and an input it takes: for tests and first tries.

    Every kind of layer of the family is in it (shortcuts with and without projection, dropout,
    batch norm), so that what holds for the tiny model holds for the large one.

    >>> model, x = tiny("gpt")
    >>> x
    ShapeDtypeStruct(shape=(2, 16), dtype=int32)
    >>> jax.eval_shape(model.init_with_output, jax.random.key(0), x)[0].shape
    (2, 16, 32)
    """
    if family not in _TINY:
        raise _unknown_name(family, known=families())
    module, preset, shape, input_dtype = _TINY[family]
    return module(preset(**overrides), dtype=dtype), jax.ShapeDtypeStruct(shape, input_dtype)


def _unknown_name(name: str, known: list[str]) -> ModelError:
    nearest = _nearest_first(name, known)
    return ModelError(
        f"no model is called {name!r}",
        expected=f"one of {', '.join(nearest)}",
        got=repr(name),
        fix=f"take {nearest[0]!r}, or import your own model",
    )


def _nearest_first(name: str, known: list[str]) -> list[str]:
    return sorted(known, key=lambda other: -SequenceMatcher(None, name, other).ratio())
