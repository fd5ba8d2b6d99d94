"""Training behaviour: outputs, statistics and gradients as Keras gives them with training=True."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from fastgpu.errors import WeightsError
from fastgpu.importers import from_keras


@pytest.fixture
def network(keras: Any, randomize: Any) -> Any:
    """Every layer with a training phase that is not random, in one small network."""
    layers = keras.layers
    return randomize(
        keras.Sequential(
            [
                keras.Input((9, 9, 3)),
                layers.Conv2D(6, 3, strides=2, padding="same", name="stem"),
                layers.BatchNormalization(momentum=0.9, name="bn"),
                layers.ReLU(6.0),
                layers.DepthwiseConv2D(3, padding="same", name="depthwise"),
                layers.BatchNormalization(axis=1, scale=False, name="rows"),
                layers.MaxPooling2D(2, padding="same"),
                layers.SeparableConv2D(4, 3, padding="same", name="separable"),
                layers.Flatten(),
                layers.LayerNormalization(name="ln"),
                layers.Dense(3, name="out"),
            ]
        )
    )


def data(batch: int = 8) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(1, 2, (batch, 9, 9, 3)).astype("float32")
    return x, rng.normal(size=(batch, 3)).astype("float32")


def named(model: Any, values: Any, variables: Any) -> dict[str, Any]:
    return {
        variable.path.split("/", 1)[1]: v for variable, v in zip(variables, values, strict=True)
    }


def flat(collection: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{layer}/{name}": value
        for layer, names in collection.items()
        for name, value in names.items()
    }


def test_training_step_equals_keras(network: Any, run: Any) -> None:
    """Loss, gradient of every weight and both moving statistics; float32 through seven layers."""
    x, y = data()
    imported = from_keras(network)
    statistics = imported.variables["batch_stats"]

    def ours(params: Any) -> Any:
        variables = {"params": params, "batch_stats": statistics}
        out, state = imported.module.apply(variables, x, train=True, mutable=["batch_stats"])
        return jnp.mean((out - y) ** 2), state["batch_stats"]

    def theirs(trainable: Any) -> Any:
        state = [v.value for v in network.non_trainable_variables]
        out, state = network.stateless_call(trainable, state, x, training=True)
        return jnp.mean((out - y) ** 2), state

    (loss, stats), gradient = run(
        jax.value_and_grad(ours, has_aux=True), imported.variables["params"]
    )
    trainable = [v.value for v in network.trainable_variables]
    (want, state), want_gradient = run(jax.value_and_grad(theirs, has_aux=True), trainable)

    np.testing.assert_allclose(loss, want, rtol=1e-5)
    state = named(network, state, network.non_trainable_variables)
    assert flat(stats).keys() == state.keys()
    for name, value in flat(stats).items():
        np.testing.assert_allclose(value, state[name], rtol=1e-4, atol=1e-6, err_msg=name)
        assert not np.allclose(value, flat(statistics)[name]), f"{name} did not move"
    want_gradient = named(network, want_gradient, network.trainable_variables)
    assert flat(gradient).keys() == want_gradient.keys()
    scale = max(float(np.abs(g).max()) for g in want_gradient.values())
    for name, value in flat(gradient).items():
        # A bias before batch norm has no gradient but rounding: compare on the common scale too.
        np.testing.assert_allclose(
            value, want_gradient[name], rtol=1e-3, atol=1e-5 * scale, err_msg=name
        )


def test_inference_leaves_the_statistics_alone(network: Any, run: Any) -> None:
    x, _ = data()
    imported = from_keras(network)
    out, state = imported.module.apply(imported.variables, x, mutable=["batch_stats"])
    np.testing.assert_allclose(out, network(x), rtol=1e-4, atol=1e-4)
    jax.tree.map(
        np.testing.assert_array_equal, state["batch_stats"], imported.variables["batch_stats"]
    )


def test_frozen_batch_norm_stays_in_inference(network: Any) -> None:
    network.get_layer("bn").trainable = False
    imported = from_keras(network)
    x, _ = data()
    _, state = imported.module.apply(imported.variables, x, train=True, mutable=["batch_stats"])
    before, after = imported.variables["batch_stats"], state["batch_stats"]
    np.testing.assert_array_equal(after["bn"]["moving_mean"], before["bn"]["moving_mean"])
    assert not np.allclose(after["rows"]["moving_mean"], before["rows"]["moving_mean"])


def test_half_precision_statistics_are_summed_in_float32(keras: Any, run: Any) -> None:
    layer = keras.layers.BatchNormalization(dtype="mixed_float16", name="bn")
    imported = from_keras(keras.Sequential([keras.Input((4,)), layer]))
    x = np.full((4096, 4), 60.0, "float32") + np.arange(4096, dtype="float32")[:, None] % 2
    out, state = imported.module.apply(imported.variables, x, train=True, mutable=["batch_stats"])
    assert out.dtype == "float16"
    # Half of the values one apart: variance 1/4; the sum of squares overflows float16.
    np.testing.assert_allclose(state["batch_stats"]["bn"]["moving_variance"], 0.99 + 0.01 / 4)


def test_variance_is_accurate_far_from_zero_and_twice_differentiable() -> None:
    """A mean of 1000 deviations costs no digits; derivatives of order one and two are the exact."""
    from fastgpu.importers.keras.layers.normalization import _moments

    rng = np.random.default_rng(0)
    far = jnp.asarray(rng.normal(1000, 1, (512, 3)), "float32")
    np.testing.assert_allclose(_moments(far, 1)[1], jnp.var(far, 0), rtol=1e-5)
    x = jnp.asarray(rng.normal(size=(5, 2)), "float32")
    ours, exact = lambda x: jnp.sum(_moments(x, 1)[1] ** 2), lambda x: jnp.sum(jnp.var(x, 0) ** 2)
    np.testing.assert_allclose(jax.grad(ours)(x), jax.grad(exact)(x), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.hessian(ours)(x), jax.hessian(exact)(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "varies_over"),
    [
        ("Dropout", {"rate": 0.3}, (0, 1, 2, 3)),
        ("Dropout", {"rate": 0.3, "noise_shape": (None, 1, 1, None)}, (0, 3)),
        ("SpatialDropout2D", {"rate": 0.3}, (0, 3)),
        ("SpatialDropout2D", {"rate": 0.3, "data_format": "channels_first"}, (0, 1)),
    ],
)
def test_dropout(keras: Any, name: str, options: dict[str, Any], varies_over: Any) -> None:
    shape = (40, 40, 40)
    model = keras.Sequential([keras.Input(shape), getattr(keras.layers, name)(**options)])
    imported = from_keras(model)
    x = np.ones((40, *shape), "float32")
    out = np.asarray(imported.module.apply({}, x, train=True, rngs={"dropout": jax.random.key(0)}))
    assert set(np.unique(out).tolist()) == {0.0, np.float32(1 / 0.7)}
    index = tuple(slice(None) if axis in varies_over else slice(0, 1) for axis in range(4))
    drawn = out[index]
    np.testing.assert_array_equal(np.broadcast_to(drawn, out.shape), out)
    # 1600 draws or more: the standard error of the fraction is at most 0.0115.
    assert abs((drawn == 0).mean() - 0.3) < 0.05
    other = imported.module.apply({}, x, train=True, rngs={"dropout": jax.random.key(1)})
    assert not np.array_equal(other, out)


@pytest.mark.parametrize(
    ("name", "options", "mean", "deviation"),
    [
        ("GaussianNoise", {"stddev": 0.5}, 2.0, 0.5),
        ("GaussianDropout", {"rate": 0.2}, 2.0, 2.0 * 0.5),
    ],
)
def test_gaussian_noise(
    keras: Any, name: str, options: dict[str, Any], mean: float, deviation: float
) -> None:
    model = keras.Sequential([keras.Input((100,)), getattr(keras.layers, name)(**options)])
    module = from_keras(model).module
    x = np.full((400, 100), 2.0, "float32")
    out = module.apply({}, x, train=True, rngs={"dropout": jax.random.key(0)})
    assert float(jnp.mean(out)) == pytest.approx(mean, abs=0.03)
    assert float(jnp.std(out)) == pytest.approx(deviation, rel=0.03)


def test_two_dropouts_draw_different_masks(keras: Any) -> None:
    x = keras.Input((200,))
    shared = keras.layers.Dropout(0.5)
    model = keras.Model(x, [shared(x), shared(x), keras.layers.Dropout(0.5)(x)])
    module = from_keras(model).module
    ones = np.ones((4, 200), "float32")
    a, b, c = module.apply({}, ones, train=True, rngs={"dropout": jax.random.key(0)})
    assert not np.array_equal(a, b)
    assert not np.array_equal(a, c)


def test_init_draws_from_the_models_own_initializers(keras: Any, run: Any) -> None:
    layers = keras.layers
    options = {
        "kernel_initializer": "he_normal",
        "bias_initializer": keras.initializers.Constant(3),
    }
    uniform = keras.initializers.RandomUniform(2.0, 4.0)
    model = keras.Sequential(
        [
            keras.Input((16, 16, 32)),
            layers.Conv2D(64, 3, name="conv", **options),
            layers.BatchNormalization(name="bn"),
            layers.Flatten(),
            layers.Dense(8, name="out", kernel_initializer=uniform),
        ]
    )
    imported = from_keras(model)
    fresh = run(imported.module.init, jax.random.key(0), np.zeros((1, 16, 16, 32)))
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)  # noqa: E731
    assert shapes(fresh) == shapes(imported.variables)
    kernel = fresh["params"]["conv"]["kernel"]
    assert float(kernel.std()) == pytest.approx(np.sqrt(2 / (9 * 32)), rel=0.05)
    assert np.all(np.asarray(fresh["params"]["conv"]["bias"]) == 3)
    assert np.all(np.asarray(fresh["batch_stats"]["bn"]["moving_variance"]) == 1)
    out = np.asarray(fresh["params"]["out"]["kernel"])
    assert 2 <= out.min() < 2.1
    assert 3.9 < out.max() <= 4


def test_missing_variables_are_named(network: Any) -> None:
    imported = from_keras(network)
    params = {name: value for name, value in imported.variables["params"].items() if name != "out"}
    with pytest.raises(WeightsError, match="variables\\['params'\\] has no 'out/kernel'"):
        imported.module.apply({**imported.variables, "params": params}, data()[0])


def test_module_is_an_ordinary_linen_module(network: Any, run: Any) -> None:
    """Inside another module, under jit as a static argument, under vmap and remat."""
    imported = from_keras(network)
    assert isinstance(imported.module, nn.Module)
    assert hash(imported.module) == hash(from_keras(network).module)
    assert imported.module == from_keras(network).module
    x, _ = data(4)
    want = run(imported.module.apply, imported.variables, x)
    static = jax.jit(lambda module, v, x: module.apply(v, x), static_argnums=0)
    np.testing.assert_allclose(static(imported.module, imported.variables, x), want, rtol=1e-5)
    one = lambda row: imported.module.apply(imported.variables, row[None])[0]  # noqa: E731
    np.testing.assert_allclose(run(jax.vmap(one), x), want, rtol=1e-4, atol=1e-5)
    again = jax.checkpoint(imported.module.apply)
    np.testing.assert_allclose(run(again, imported.variables, x), want, rtol=1e-5)


def test_training_step_has_no_needless_work(network: Any) -> None:
    """No casts (all is float32), no transposes; every convolution is one the passes know."""
    imported = from_keras(network)
    x, _ = data()
    text = str(
        jax.make_jaxpr(lambda v: imported.module.apply(v, x, train=True, mutable=["batch_stats"]))(
            imported.variables
        )
    )
    assert "convert_element_type" not in text
    assert "transpose[" not in text
    assert text.count("conv_general_dilated[") == 4
    assert text.count("reduce_window_max[") == 1
