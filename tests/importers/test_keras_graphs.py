"""Graphs: several inputs and outputs, nested models, shared layers, calls with fixed phase."""

from pathlib import Path
from typing import Any

import h5py
import jax
import numpy as np
import pytest

from fastgpu.errors import BatchError, FileError, UnsupportedLayerError
from fastgpu.importers import from_keras
from fastgpu.importers.keras.layers.core import Dense


def image(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, (3, 8, 8, 3)).astype("float32")


def assert_close(got: Any, want: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5), got, want)


def test_inputs_outputs_nested_and_shared_layers(small_model: Any, run: Any) -> None:
    imported = from_keras(small_model)
    got = run(imported.module.apply, imported.variables, image(0), image(1))
    assert sorted(got) == ["parts", "score"]
    assert isinstance(got["parts"], list)
    assert_close(got, run(lambda a, b: small_model([a, b]), image(0), image(1)))


def test_names_follow_the_layers(small_model: Any) -> None:
    variables = from_keras(small_model).variables
    shapes = jax.tree.map(lambda leaf: leaf.shape, variables)
    assert shapes == {
        "params": {
            "encoder": {
                "conv": {"kernel": (3, 3, 3, 4), "bias": (4,)},
                "norm": {"gamma": (4,), "beta": (4,)},
            },
            "shared": {"kernel": (4, 5), "bias": (5,)},
            "head": {"out": {"kernel": (5, 2), "bias": (2,)}},
        },
        "batch_stats": {"encoder": {"norm": {"moving_mean": (4,), "moving_variance": (4,)}}},
    }


def test_inputs_may_come_as_keras_takes_them(small_model: Any, run: Any) -> None:
    imported = from_keras(small_model)
    call = lambda *args: run(imported.module.apply, imported.variables, *args)  # noqa: E731
    one_by_one = call(image(0), image(1))
    assert_close(call([image(0), image(1)]), one_by_one)
    assert_close(call({"right": image(1), "left": image(0)}), one_by_one)


def test_wrong_inputs_are_named(small_model: Any) -> None:
    imported = from_keras(small_model)
    with pytest.raises(BatchError, match=r"expected: left \(any, 8, 8, 3\), right"):
        imported.module.apply(imported.variables, image())
    with pytest.raises(BatchError, match=r"input 'right'[\s\S]*\(any, 8, 8, 3\)[\s\S]*8, 9, 3"):
        imported.module.apply(imported.variables, image(), np.zeros((3, 8, 9, 3)))


def test_a_missing_last_axis_of_one_is_added(keras: Any, randomize: Any) -> None:
    model = randomize(keras.Sequential([keras.Input((1,)), keras.layers.Dense(2)]))
    imported = from_keras(model)
    x = np.asarray([1.0, 2.0], "float32")
    assert_close(imported.module.apply(imported.variables, x), model(x))


def test_dict_inputs(keras: Any, randomize: Any) -> None:
    inputs = {"b": keras.Input((3,), name="b"), "a": keras.Input((3,), name="a")}
    dense = keras.layers.Dense(3)(inputs["b"])
    model = randomize(keras.Model(inputs, keras.layers.Subtract()([dense, inputs["a"]])))
    imported = from_keras(model)
    x = {name: np.random.default_rng(i).normal(size=(2, 3)) for i, name in enumerate("ab")}
    want = model(x)
    assert_close(imported.module.apply(imported.variables, x), want)
    # Positional inputs are in Keras's order, which sorts the keys of a dict.
    assert [spec.name for spec in imported.module.graph.inputs] == [i.name for i in model.inputs]
    assert_close(imported.module.apply(imported.variables, x["a"], x["b"]), want)


def test_the_phase_of_the_call_overrides_one_fixed_in_the_graph(
    keras: Any, randomize: Any, run: Any
) -> None:
    """As in Keras 3, where `fit` and `predict` always give a phase."""
    layers = keras.layers
    base = keras.Sequential([keras.Input((4,)), layers.BatchNormalization(name="bn")], name="base")
    x = keras.Input((4,))
    normed = base(x, training=False)
    model = keras.Model(x, [normed, layers.Dropout(0.5, name="noisy")(normed, training=True)])
    imported = from_keras(randomize(model))
    batch = np.random.default_rng(0).normal(3, 2, (64, 4)).astype("float32")
    quiet = imported.module.apply(imported.variables, batch)
    assert_close(quiet, model(batch, training=False))
    (normalized, dropped), _ = imported.module.apply(
        imported.variables,
        batch,
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": jax.random.key(0)},
    )
    assert_close(normalized, model(batch, training=True)[0])
    assert 0.3 < np.mean(np.asarray(dropped) == 0) < 0.7
    ignored = [entry.name for entry in imported.report.ignored()]
    assert ignored == ["base/training=False", "noisy/training=True"]


def test_a_layer_in_two_models_has_one_set_of_weights(keras: Any, randomize: Any) -> None:
    x = keras.Input((3,))
    inner = keras.Model(x, keras.layers.Dense(3, name="tied")(x), name="inner")
    outer = keras.Input((3,))
    model = keras.Model(outer, [inner(outer), inner.layers[1](outer)])
    imported = from_keras(randomize(model))
    assert set(imported.variables["params"]) == {"inner"}
    batch = np.ones((2, 3), "float32")
    assert_close(imported.module.apply(imported.variables, batch), model(batch))


def test_a_model_deeper_than_the_recursion_limit(keras: Any, tmp_path: Path) -> None:
    layers = [keras.Input((2,)), keras.layers.Activation("linear")]
    config = keras.Sequential(layers).get_config()
    entry = config["layers"][1]
    config["layers"] += [
        {**entry, "config": {**entry["config"], "name": f"more{i}"}} for i in range(1200)
    ]
    with h5py.File(tmp_path / "no.weights.h5", "w") as file:
        file.create_group("layers")
    imported = from_keras((config, tmp_path / "no.weights.h5"))
    assert imported.module.apply({}, np.ones((1, 2))).shape == (1, 2)


class _Config:
    """A stand-in for a live model that has a config and no weights."""

    layers: tuple[()] = ()
    weights: tuple[()] = ()
    name = "made"

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def get_config(self) -> dict[str, Any]:
        return self.config


def test_open_sizes(keras: Any, randomize: Any, run: Any) -> None:
    """A fully convolutional model with a skip connection takes any size that divides evenly."""
    layers = keras.layers
    x = keras.Input((None, None, 3))
    half = layers.MaxPooling2D()(layers.Conv2D(4, 3, padding="same")(x))
    model = keras.Model(x, layers.Concatenate()([layers.UpSampling2D()(half), x]))
    imported = from_keras(randomize(model))
    for size in (8, 12):
        batch = np.random.default_rng(0).normal(size=(1, size, size, 3)).astype("float32")
        got = run(imported.module.apply, imported.variables, batch)
        assert_close(got, run(model, batch))


def test_legacy_node_format(keras: Any, randomize: Any) -> None:
    """Keras 2: nodes are lists, a nested model's construction counts, a fixed phase holds."""
    x = keras.Input((3,), name="x")
    inner_x = keras.Input((3,), name="inner_x")
    norm = keras.layers.BatchNormalization(name="d")
    inner = keras.Model(inner_x, norm(inner_x), name="inner")
    model = randomize(keras.Model(x, keras.layers.Add(name="sum")([inner(x), x])))
    config = model.get_config()
    nodes = {
        "inner": [[["x", 0, 0, {"training": False}]]],
        "sum": [[["inner", 1, 0, {}], ["x", 0, 0, {}]]],
    }
    for entry in config["layers"]:
        entry["inbound_nodes"] = nodes.get(entry["name"], [])
        for nested in entry["config"].get("layers", []):
            nested["inbound_nodes"] = {"d": [[["inner_x", 0, 0, {}]]]}.get(nested["name"], [])
    config["input_layers"], config["output_layers"] = [["x", 0, 0]], [["sum", 0, 0]]

    class Functional:
        name, layers, weights = model.name, model.layers, model.weights

        def get_config(self) -> dict[str, Any]:
            return config

    imported = from_keras(Functional())
    batch = np.ones((2, 3), "float32")
    assert_close(imported.module.apply(imported.variables, batch), model(batch))
    assert_close(imported.module.apply(imported.variables, batch, train=True), model(batch))


def test_hard_sigmoid_keeps_the_meaning_of_the_keras_that_wrote_it(keras: Any) -> None:
    from fastgpu.importers.keras.options import OptionReader

    build = lambda keras_2: OptionReader({}, keras_2, print, lambda *_: None).build(  # noqa: E731
        Dense, {"units": 1, "activation": "hard_sigmoid"}
    )
    x = np.float32(1.0)
    assert float(build(False).activation(x)) == pytest.approx(1 / 6 + 0.5)
    assert float(build(True).activation(x)) == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inner": [["missing", 0, 0, {}]]}, "call 0 of layer 'missing', which it does not hold"),
        ({"inner": [["sum", 0, 0, {}]]}, "depends on its own output"),
    ],
)
def test_graphs_that_cannot_run(keras: Any, change: dict[str, Any], message: str) -> None:
    x = keras.Input((3,), name="x")
    model = keras.Model(
        x, keras.layers.Add(name="sum")([keras.layers.Dense(3, name="inner")(x), x])
    )
    config = model.get_config()
    nodes = {"inner": [["x", 0, 0, {}]], "sum": [["inner", 0, 0, {}], ["x", 0, 0, {}]], **change}
    for entry in config["layers"]:
        entry["inbound_nodes"] = [nodes[entry["name"]]] if entry["name"] in nodes else []
    config["input_layers"], config["output_layers"] = [["x", 0, 0]], [["sum", 0, 0]]

    class Functional(_Config):
        pass

    with pytest.raises(FileError, match=message):
        from_keras(Functional(config))


def test_call_arguments_without_an_equal_are_refused(keras: Any) -> None:
    x = keras.Input((4, 3))
    model = keras.Model(x, keras.layers.Dense(2)(x))
    config = model.get_config()
    config["layers"][1]["inbound_nodes"][0]["kwargs"]["scale"] = 2.0
    model.get_config = lambda: config
    with pytest.raises(UnsupportedLayerError, match=r"call argument \['scale'\]"):
        from_keras(model)


def test_subclassed_models_are_refused(keras: Any) -> None:
    class Custom(keras.Model):
        def call(self, x: Any) -> Any:
            return x

    with pytest.raises(UnsupportedLayerError, match="subclassed model"):
        from_keras(Custom())


def test_a_subclass_may_be_declared_to_be_functional(keras: Any, randomize: Any) -> None:
    class WithMyTrainStep(keras.Model):
        pass

    x = keras.Input((3,))
    model = randomize(WithMyTrainStep(x, keras.layers.Dense(2)(x)))
    with pytest.raises(UnsupportedLayerError, match="WithMyTrainStep"):
        from_keras(model)
    imported = from_keras(model, custom_objects={"WithMyTrainStep": "Functional"})
    batch = np.ones((2, 3), "float32")
    assert_close(imported.module.apply(imported.variables, batch), model(batch))


def test_layers_with_names_of_module_attributes(keras: Any, randomize: Any) -> None:
    names = ["graph", "variables", "apply", "scope", "dropout"]
    layers = [keras.layers.Dense(3, name=name) for name in names]
    model = randomize(keras.Sequential([keras.Input((3,)), *layers]))
    imported = from_keras(model)
    batch = np.ones((2, 3), "float32")
    assert_close(imported.module.apply(imported.variables, batch), model(batch))


def test_a_layer_named_as_flax_names_its_collection_is_refused(keras: Any) -> None:
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(3, name="params")])
    with pytest.raises(UnsupportedLayerError, match="rename the layer"):
        from_keras(model)
