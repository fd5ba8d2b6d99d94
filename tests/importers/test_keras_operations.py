"""`keras.ops` in a functional graph: every operation of the table against Keras on JAX."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from fastgpu.errors import UnsupportedLayerError
from fastgpu.importers import from_keras
from fastgpu.importers.keras.layers.operations import OPERATIONS

SHAPE = (4, 6)
BINARY = [
    "Add",
    "Divide",
    "Equal",
    "FloorDivide",
    "Fmax",
    "Fmin",
    "Fmod",
    "Greater",
    "GreaterEqual",
    "Isclose",
    "Less",
    "LessEqual",
    "Logaddexp",
    "Logaddexp2",
    "LogicalAnd",
    "LogicalOr",
    "LogicalXor",
    "Maximum",
    "Minimum",
    "Mod",
    "Multiply",
    "NotEqual",
    "Power",
    "Subtract",
    "TrueDivide",
    "DivideNoNan",
]
INTEGER = [
    "BitwiseAnd",
    "BitwiseInvert",
    "BitwiseLeftShift",
    "BitwiseNot",
    "BitwiseOr",
    "BitwiseRightShift",
    "BitwiseXor",
    "Gcd",
    "Lcm",
    "LeftShift",
    "RightShift",
]
UNARY_INTEGER = {"BitwiseInvert", "BitwiseNot"}
# Those that need more than one array of any shape.
SPECIAL: dict[str, Callable[..., Any]] = {
    "Append": lambda ops, x: ops.append(x, x, axis=1),
    "Inner": lambda ops, x: ops.inner(x, x),
    "Kron": lambda ops, x: ops.kron(x, x),
    "Outer": lambda ops, x: ops.outer(x, x),
    "Vdot": lambda ops, x: ops.vdot(x, x),
    "Heaviside": lambda ops, x: ops.heaviside(x, x),
    "Hypot": lambda ops, x: ops.hypot(x, x),
    "Angle": lambda ops, x: ops.angle(x),
    "Arctan2": lambda ops, x: ops.arctan2(x, x + 1),
    "Average": lambda ops, x: ops.average(x, axis=1, weights=x),
    "BatchNorm": lambda ops, x: ops.batch_normalization(
        x, ops.mean(x, [0, 1]), ops.var(x, [0, 1]), -1, scale=ops.max(x, [0, 1])
    ),
    "BroadcastTo": lambda ops, x: ops.broadcast_to(x, (3, 2, *SHAPE)),
    "Cast": lambda ops, x: ops.cast(x, "int32"),
    "Clip": lambda ops, x: ops.clip(x, 0.5, 1.0),
    "Concatenate": lambda ops, x: ops.concatenate([x, x], axis=1),
    "ConvertToTensor": lambda ops, x: ops.convert_to_tensor(x),
    "Corrcoef": lambda ops, x: ops.corrcoef(x[:, 0]),
    "Cross": lambda ops, x: ops.cross(x[..., :3], x[..., 3:]),
    "Diag": lambda ops, x: ops.diag(x[0], k=1),
    "Diagflat": lambda ops, x: ops.diagflat(x[0]),
    "Diagonal": lambda ops, x: ops.diagonal(x, offset=1, axis1=1, axis2=2),
    "Diff": lambda ops, x: ops.diff(x, n=1, axis=1),
    "Digitize": lambda ops, x: ops.digitize(x, np.array([0.1, 0.5], "float32")),
    "Dot": lambda ops, x: ops.dot(x, x[0, 0]),
    "Dstack": lambda ops, x: ops.dstack([x, x]),
    "Einsum": lambda ops, x: ops.einsum("bij,bkj->bik", x, x),
    "ExpandDims": lambda ops, x: ops.expand_dims(x, (1, -1)),
    "Flip": lambda ops, x: ops.flip(x, axis=-1),
    "FullLike": lambda ops, x: ops.full_like(x, 2),
    "GetItem": lambda ops, x: x[:, ::-2, None, 1],
    "Hstack": lambda ops, x: ops.hstack([x, x]),
    "Imag": lambda ops, x: ops.imag(x),
    "Ldexp": lambda ops, x: ops.ldexp(x, ops.cast(x, "int32")),
    "Linspace": lambda ops, x: ops.linspace(x, x + 1, num=3, axis=1),
    "Matmul": lambda ops, x: ops.matmul(x, ops.swapaxes(x, 1, 2)),
    "Moments": lambda ops, x: ops.moments(x, [0, 1], keepdims=True),
    "Moveaxis": lambda ops, x: ops.moveaxis(x, 1, -1),
    "Norm": lambda ops, x: ops.norm(x),
    "Normalize": lambda ops, x: ops.normalize(x, axis=1, order=3),
    "OneHot": lambda ops, x: ops.one_hot(ops.cast(x, "int32"), 3),
    "Pad": lambda ops, x: ops.pad(x, [[0, 0], [1, 2], [0, 1]], constant_values=2),
    "Percentile": lambda ops, x: ops.percentile(x, 30),
    "Quantile": lambda ops, x: ops.quantile(x, 0.3),
    "Repeat": lambda ops, x: ops.repeat(x, 2, axis=1),
    "Reshape": lambda ops, x: ops.reshape(x, (-1, 3, 8)),
    "Roll": lambda ops, x: ops.roll(x, 2, axis=1),
    "Rot90": lambda ops, x: ops.rot90(x, k=1, axes=(1, 2)),
    "Round": lambda ops, x: ops.round(x, 1),
    "SearchSorted": lambda ops, x: ops.searchsorted(np.array([0.1, 0.5], "float32"), x[0, 0]),
    "Slice": lambda ops, x: ops.slice(x, [0, 1, 2], [1, 2, 3]),
    "SliceUpdate": lambda ops, x: ops.slice_update(x, [0, 1, 2], x[:, :2, :3]),
    "Split": lambda ops, x: ops.split(x, [1, 3], axis=1),
    "Squeeze": lambda ops, x: ops.squeeze(x[:, :1], axis=1),
    "Stack": lambda ops, x: ops.stack([x, x], axis=1),
    "Swapaxes": lambda ops, x: ops.swapaxes(x, 1, 2),
    "Take": lambda ops, x: ops.take(x, [2, 0], axis=1),
    "TakeAlongAxis": lambda ops, x: ops.take_along_axis(x, ops.argsort(x, axis=1), axis=1),
    "Tensordot": lambda ops, x: ops.tensordot(x, x, axes=[[1, 2], [1, 2]]),
    "Threshold": lambda ops, x: ops.threshold(x, 0.5, -1.0),
    "Tile": lambda ops, x: ops.tile(x, [1, 2, 1]),
    "TopK": lambda ops, x: ops.top_k(x, 2),
    "Trace": lambda ops, x: ops.trace(x, axis1=1, axis2=2),
    "Transpose": lambda ops, x: ops.transpose(x, (0, 2, 1)),
    "Unstack": lambda ops, x: ops.unstack(x, axis=1),
    "Vander": lambda ops, x: ops.vander(x[0, 0]),
    "Vstack": lambda ops, x: ops.vstack([x, x]),
    "Where": lambda ops, x: ops.where(x > 0.5, x, 0.0),
}


def _built(keras: Any, name: str, x: Any) -> Any:
    from keras.src.ops import core, linalg, math, nn, numpy

    ops = keras.ops
    if name in SPECIAL:
        return SPECIAL[name](ops, x)
    found = next(getattr(m, name) for m in (numpy, nn, math, core, linalg) if hasattr(m, name))
    if name in INTEGER:
        integers = ops.cast(x * 3, "int32") + 1
        return found()(integers) if name in UNARY_INTEGER else found()(integers, integers)
    return found()(x, 0.75) if name in BINARY else found()(x)


FEW = ("Add", "Clip", "Einsum", "GetItem", "Mean", "Pad", "Relu", "Reshape", "Split", "TopK")


@pytest.mark.parametrize(
    "names", [FEW, pytest.param(sorted(OPERATIONS), marks=pytest.mark.slow)], ids=["few", "all"]
)
def test_operations_equal_keras(keras: Any, run: Any, names: Any) -> None:
    x = keras.Input(SHAPE, batch_size=2)
    outputs = {name: _built(keras, name, x) for name in names}
    model = keras.Model(x, outputs)
    imported = from_keras(model)
    batch = np.random.default_rng(0).uniform(0.1, 0.9, (2, *SHAPE)).astype("float32")
    got, want = run(imported.module.apply, imported.variables, batch), run(model, batch)
    for name in outputs:
        pairs = zip(jax.tree.leaves(got[name]), jax.tree.leaves(want[name]), strict=True)
        for g, w in pairs:
            assert (g.shape, g.dtype) == (w.shape, w.dtype), name
            np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6, err_msg=name)


def test_constants_in_a_call_are_kept(keras: Any, run: Any) -> None:
    x = keras.Input((3,))
    table = np.arange(6, dtype="float32").reshape(3, 2)
    y = keras.ops.matmul(keras.ops.subtract(1.0, x), table)
    model = keras.Model(x, keras.ops.add(y, np.array([1, 2], "int32")))
    imported = from_keras(model)
    assert hash(imported.module) == hash(from_keras(model).module)
    batch = np.random.default_rng(0).normal(size=(2, 3)).astype("float32")
    np.testing.assert_allclose(
        run(imported.module.apply, imported.variables, batch), model(batch), rtol=1e-6
    )


def test_operations_without_an_equal_are_named(keras: Any) -> None:
    x = keras.Input((8,))
    model = keras.Model(x, keras.ops.stft(x, 4, 2, 4))
    with pytest.raises(UnsupportedLayerError, match=r"'stft' \(STFT: no such keras.ops function"):
        from_keras(model)
