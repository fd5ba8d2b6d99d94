"""Imported ONNX graphs against onnxruntime, at several batch sizes, and their gradients."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from fastgpu.cli.model import load_model
from fastgpu.errors import BatchError, FastGPUError
from fastgpu.importers import from_onnx
from fastgpu.importers.onnx.operators import TABLE


def image(batch: int) -> tuple[np.ndarray, ...]:
    return (np.random.default_rng(batch).normal(size=(batch, 3, 9, 9)).astype(np.float32),)


def tokens(batch: int) -> tuple[np.ndarray, ...]:
    return (np.random.default_rng(batch).integers(0, 11, (batch, 4 + batch)),)


def sentence(batch: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(batch)
    lengths = rng.integers(1, 6, batch).astype(np.int32)
    lengths[0] = 5
    return rng.normal(size=(5, batch, 4)).astype(np.float32), lengths


MODELS = {"residual_network": image, "transformer_block": tokens, "tagger": sentence}


@pytest.mark.parametrize("name", MODELS)
def test_outputs_equal_onnxruntimes_at_two_batch_sizes(onnx_models: Any, name: str) -> None:
    draw, model = MODELS[name], getattr(onnx_models, name)()
    imported = from_onnx(model)
    apply = jax.jit(imported.module.apply)
    for batch in (1, 3):
        inputs = draw(batch)
        expected = onnx_models.runtime(model, *inputs)
        outputs = apply(imported.variables, *inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        for found, wanted in zip(outputs, expected, strict=True):
            # float32 sums of at most 54 products, in another order
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("residual_network", marks=pytest.mark.slow),
        "transformer_block",
        pytest.param("tagger", marks=pytest.mark.slow),
    ],
)
def test_gradients_equal_finite_differences(onnx_models: Any, name: str) -> None:
    draw, imported = MODELS[name], from_onnx(getattr(onnx_models, name)())
    inputs = draw(2)
    rest = {k: v for k, v in imported.variables.items() if k != "params"}

    def loss(params: Any) -> jax.Array:
        outputs = imported.module.apply({"params": params, **rest}, *inputs)
        return sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(outputs))

    params = imported.variables["params"]
    gradient = jax.jit(jax.grad(loss))(params)
    # along the gradient, where the slope is its length: the difference of a float32 loss is small
    length = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(gradient)))
    step = 1e-2 / length
    ahead, behind = (
        jax.jit(loss)(jax.tree.map(lambda p, g, s=sign: p + s * step * g, params, gradient))
        for sign in (1, -1)
    )
    # 1e-2: what the curvature and the rounding of a sum of some 30 sines leave of the quotient
    np.testing.assert_allclose((ahead - behind) / (2 * step), length**2, rtol=1e-2)


class Twin(nn.Module):
    """The residual network written in linen, channels first outside, last inside."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = x.transpose(0, 2, 3, 1)

        def norm() -> Callable[[jax.Array], jax.Array]:
            return nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, use_fast_variance=False)

        x = nn.Conv(6, (3, 3), 2, padding=1, use_bias=False)(x)
        x = nn.max_pool(nn.relu(norm()(x)), (3, 3), padding="SAME")
        y = norm()(nn.Conv(6, (3, 3), use_bias=False)(x))
        x = nn.relu(y + x).mean((1, 2))
        return nn.Dense(5)(x)


def twin_of(params: Any, stats: Any) -> dict[str, Any]:
    def kernel(weight: jax.Array) -> jax.Array:
        return weight.transpose(2, 3, 1, 0)

    return {
        "params": {
            "Conv_0": {"kernel": kernel(params["stem"]["weight"])},
            "Conv_1": {"kernel": kernel(params["block"]["weight"])},
            "Dense_0": {"kernel": params["fc"]["weight"].T, "bias": params["fc"]["bias"]},
            **{
                f"BatchNorm_{i}": {
                    "scale": params[f"bn{i + 1}"]["weight"],
                    "bias": params[f"bn{i + 1}"]["bias"],
                }
                for i in range(2)
            },
        },
        "batch_stats": {f"BatchNorm_{i}": stats[f"bn{i + 1}"] for i in range(2)},
    }


def test_a_training_step_equals_linens(onnx_models: Any) -> None:
    (x,) = image(4)
    imported = from_onnx(_without_dropout(onnx_models))
    quiet, variables = imported.module, imported.variables
    stats = variables["batch_stats"]

    def ours(params: Any) -> tuple[jax.Array, Any]:
        y, state = quiet.apply(
            {"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"]
        )
        return jnp.sum(jnp.square(y)), state

    def linens(params: Any) -> tuple[jax.Array, Any]:
        y, state = Twin().apply(twin_of(params, stats), x, True, mutable=["batch_stats"])
        return jnp.sum(jnp.square(y)), state

    (loss, state), gradient = jax.jit(jax.value_and_grad(ours, has_aux=True))(variables["params"])
    twins = jax.jit(jax.value_and_grad(linens, has_aux=True))
    (loss2, state2), gradient2 = twins(variables["params"])
    np.testing.assert_allclose(loss, loss2, rtol=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), gradient, gradient2
    )
    for i in (1, 2):
        for name in ("mean", "var"):
            np.testing.assert_allclose(
                state["batch_stats"][f"bn{i}"][name],
                state2["batch_stats"][f"BatchNorm_{i - 1}"][name],
                rtol=1e-4,
                atol=1e-5,
            )


def test_dropout_draws_in_training_from_its_own_stream(onnx_models: Any) -> None:
    imported = from_onnx(
        onnx_models.parsed(
            """g (float[n, 50] x) => (float[n, 50] y, bool[n, 50] kept) {
                ratio = Constant <value_float = 0.25> ()
                y, kept = Dropout (x, ratio)
            }"""
        )
    )
    x = np.ones((20, 50), np.float32)
    y, kept = imported.module.apply({}, x)
    assert np.array_equal(y, x) and np.all(kept)
    draws = [
        imported.module.apply({}, x, train=True, rngs={"dropout": jax.random.key(seed)})
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(draws[0][0], np.where(draws[0][1], x / 0.75, 0))
    np.testing.assert_array_equal(draws[0][0], draws[1][0])
    assert np.any(draws[0][1] != draws[2][1])
    assert abs(np.mean(draws[0][1]) - 0.75) < 0.05  # 1000 draws: 3.6 standard deviations
    with pytest.raises(FastGPUError, match="draws random numbers"):
        imported.module.apply({}, x, train=True)


def _without_dropout(onnx_models: Any) -> Any:
    model = onnx_models.residual_network()
    for node in model.graph.node:
        if node.op_type == "Dropout":
            node.op_type = "Identity"
            del node.input[1:]
    return model


def test_untrained_statistics_that_a_file_shares_are_kept_apart(onnx_models: Any) -> None:
    weights = {
        "ones": np.ones(2, np.float32),
        "zeros": np.zeros(2, np.float32),
    }
    model = onnx_models.parsed(
        """g (float[n, 2, 3] x) => (float[n, 2, 3] y) {
            scale = Identity (ones)
            var = Identity (ones)
            a = BatchNormalization (x, scale, zeros, zeros, var)
            y = BatchNormalization (a, scale, zeros, zeros, var)
        }""",
        weights,
    )
    imported = from_onnx(model)
    assert set(imported.variables["params"]) == {"ones", "zeros"}
    assert len(jax.tree.leaves(imported.variables["batch_stats"])) == 4
    x = np.random.default_rng(0).normal(3, 2, (8, 2, 3)).astype(np.float32)
    _, state = imported.module.apply(imported.variables, x, train=True, mutable=["batch_stats"])
    first = state["batch_stats"]["a"]["mean"], state["batch_stats"]["a"]["var"]
    # momentum 0.9 from 0 and 1
    np.testing.assert_allclose(first[0], 0.1 * x.mean((0, 2)), rtol=1e-5)
    np.testing.assert_allclose(first[1], 0.9 + 0.1 * x.var((0, 2)), rtol=1e-5)
    np.testing.assert_allclose(state["batch_stats"]["y"]["mean"], 0, atol=1e-6)


def test_shape_arithmetic_leaves_nothing_in_the_program(onnx_models: Any) -> None:
    imported = from_onnx(onnx_models.transformer_block())
    program = jax.make_jaxpr(imported.module.apply)(imported.variables, *tokens(2))
    primitives = {str(equation.primitive) for equation in program.eqns}
    assert not primitives & {"concatenate", "scatter", "while", "cond"}, primitives


@pytest.mark.parametrize(
    ("shape", "complaint"),
    [((2, 3, 9), "has another shape"), ((2, 3, 9, 8), r"\[2, 3, 9, 9\]"), (None, "other inputs")],
)
def test_inputs_of_another_shape_are_refused(onnx_models: Any, shape: Any, complaint: str) -> None:
    imported = from_onnx(onnx_models.residual_network())
    inputs = () if shape is None else (np.zeros(shape, np.float32),)
    with pytest.raises(BatchError, match=complaint):
        imported.module.apply(imported.variables, *inputs)


def test_a_fixed_batch_can_be_opened(onnx_models: Any) -> None:
    text = "g (float[1, 2] x) => (float[1, 2] y) { y = Relu (x) }"
    x = np.ones((3, 2), np.float32)
    imported = from_onnx(onnx_models.parsed(text))
    with pytest.raises(BatchError, match="shapes="):
        imported.module.apply({}, x)
    opened = from_onnx(onnx_models.parsed(text), shapes={"x": (None, 2)})
    assert opened.module.apply({}, x).shape == (3, 2)
    assert opened.module.input_specs[0].shape == (None, 2)


def test_loops_and_branches(onnx_models: Any) -> None:
    model = onnx_models.loops()
    imported = from_onnx(model)
    apply = jax.jit(imported.module.apply)
    x = np.array([1.0, -2.0], np.float32)
    for up, steps in ((True, 3), (False, 0)):
        inputs = (x, np.array(up), np.array(steps))
        for found, wanted in zip(
            apply({}, *inputs), onnx_models.runtime(model, *inputs), strict=True
        ):
            np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("residual_network", ["n, 3, 9, 9"]),
        ("transformer_block", ["n, t"]),
        pytest.param("tagger", ["5, n, 4", "n"], marks=pytest.mark.slow),
    ],
)
def test_one_exported_program_serves_every_batch_size(
    onnx_models: Any, name: str, shapes: list[str]
) -> None:
    model = getattr(onnx_models, name)()
    imported = from_onnx(model)
    scope = jax.export.SymbolicScope()
    specs = [
        jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape, scope=scope), spec.dtype)
        for shape, spec in zip(shapes, imported.module.input_specs, strict=True)
    ]
    function = jax.jit(lambda *inputs: imported.module.apply(imported.variables, *inputs))
    exported = jax.export.export(function)(*specs)
    for batch in (2, 3):
        inputs = MODELS[name](batch)
        given = [np.asarray(x, spec.dtype) for x, spec in zip(inputs, specs, strict=True)]
        found = jax.tree.leaves(exported.call(*given))
        for ours, theirs in zip(found, onnx_models.runtime(model, *inputs), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-5)


def test_functions_of_the_file_become_their_bodies(onnx_models: Any) -> None:
    model = onnx_models.functions()
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    imported = from_onnx(model)
    (expected,) = onnx_models.runtime(model, x)
    np.testing.assert_allclose(imported.module.apply({}, x), expected, rtol=1e-6)
    assert "by its definition" in str(imported.report)


def test_operators_that_onnx_defines_by_others_become_those(onnx_models: Any) -> None:
    model = onnx_models.parsed("g (float[4] x) => (float[4] y) { y = SwiGLU (x, x) }", opset=28)
    assert "SwiGLU" not in TABLE
    x = np.linspace(-2, 2, 4, dtype=np.float32)
    expected = x * x / (1 + np.exp(-x))
    np.testing.assert_allclose(from_onnx(model).module.apply({}, x), expected, rtol=1e-5)


def test_affine_grids(onnx_models: Any) -> None:
    text = """g (float[n, 2, 3] theta) => (float[n, 3, 2, 2] a, float[n, 3, 2, 2] b) {
        size = Constant <value_ints = [1, 1, 3, 2]> ()
        a = AffineGrid <align_corners = 1> (theta, size)
        b = AffineGrid (theta, size)
    }"""
    model = onnx_models.parsed(text, opset=20)
    theta = np.random.default_rng(0).normal(size=(1, 2, 3)).astype(np.float32)
    for found, expected in zip(
        from_onnx(model).module.apply({}, theta), onnx_models.runtime(model, theta), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_pools_against_onnxruntime(onnx_models: Any) -> None:
    model = onnx_models.parsed(
        """g (float[n, 2, 7, 6] x) =>
           (float[n, 2, a, b] p, float[n, 2, c, d] q, float[n, 2, e, f] r, int64[n, 2, e, f] i) {
            p = AveragePool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1],
                             ceil_mode = 1, count_include_pad = 1> (x)
            q = AveragePool <kernel_shape = [2, 3], auto_pad = "SAME_LOWER", strides = [2, 2]> (x)
            r, i = MaxPool <kernel_shape = [3, 2], strides = [2, 2], dilations = [2, 1],
                            pads = [1, 0, 1, 1]> (x)
        }""",
        opset=19,
    )
    x = np.random.default_rng(0).normal(size=(2, 2, 7, 6)).astype(np.float32)
    found = jax.jit(from_onnx(model).module.apply)({}, x)
    for ours, theirs in zip(found, onnx_models.runtime(model, x), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_trainable_chooses_the_parameters(onnx_models: Any) -> None:
    model = onnx_models.residual_network()
    imported = from_onnx(model, trainable=lambda name: name.startswith("fc."))
    assert set(imported.variables["params"]) == {"fc"}
    x = image(2)[0]
    (expected,) = onnx_models.runtime(model, x)
    found = jax.jit(imported.module.apply)(imported.variables, x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5)


def test_the_command_line_takes_onnx_files(onnx_models: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(onnx_models.residual_network().SerializeToString())
    loaded = load_model(str(path), {})
    assert [(spec.shape, spec.dtype) for spec in loaded.inputs] == [((3, 9, 9), np.float32)]
    assert set(loaded.variables) == {"params", "batch_stats"}
