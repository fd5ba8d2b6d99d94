"""The forms in which a Keras model comes: archive, folder, h5, weights with a config, live."""

import json
import zipfile
from pathlib import Path
from typing import Any

import h5py
import jax
import numpy as np
import pytest

from fastgpu.importers import from_keras
from fastgpu.importers.keras.names import snake_case

pytestmark = pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")


def same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_every_form_gives_the_same_variables(small_model: Any, tmp_path: Path) -> None:
    archive, full, weights = (tmp_path / f"m{end}" for end in (".keras", ".h5", ".weights.h5"))
    small_model.save(archive)
    small_model.save(full)
    small_model.save_weights(weights)
    config_file = tmp_path / "config.json"
    config_file.write_text(small_model.to_json())
    folder = tmp_path / "unzipped"
    zipfile.ZipFile(archive).extractall(folder)

    live = from_keras(small_model).variables
    same(from_keras(archive).variables, live)
    same(from_keras(str(full)).variables, live)
    same(from_keras(folder).variables, live)
    same(from_keras((small_model.to_json(), weights)).variables, live)
    same(from_keras((small_model.get_config(), weights)).variables, live)
    same(from_keras((config_file, str(weights))).variables, live)


def test_the_ending_of_a_name_means_nothing(small_model: Any, tmp_path: Path) -> None:
    small_model.save(tmp_path / "m.keras")
    small_model.save(tmp_path / "m.h5")
    (tmp_path / "m.keras").rename(tmp_path / "archive.h5")
    (tmp_path / "m.h5").rename(tmp_path / "full.keras")
    same(
        from_keras(tmp_path / "archive.h5").variables,
        from_keras(tmp_path / "full.keras").variables,
    )


def test_more_than_ten_layers_of_a_class(keras: Any, randomize: Any, tmp_path: Path) -> None:
    layers = [keras.layers.Dense(2, name=f"layer_{12 - i}") for i in range(12)]
    model = randomize(keras.Sequential([keras.Input((2,)), *layers]))
    model.save(tmp_path / "m.keras")
    same(from_keras(tmp_path / "m.keras").variables, from_keras(model).variables)


def test_freezing_reorders_an_h5_but_not_its_import(
    keras: Any, randomize: Any, tmp_path: Path
) -> None:
    """All weights here have one shape: a match by position would go unnoticed."""
    layers = keras.layers
    inner = keras.Sequential(
        [
            keras.Input((3,)),
            layers.Dense(3, name="a", use_bias=False),
            layers.Dense(3, name="b", use_bias=False),
        ],
        name="inner",
    )
    model = randomize(keras.Sequential([keras.Input((3,)), inner]))
    inner.layers[0].trainable = False
    model.save(tmp_path / "m.h5")
    with h5py.File(tmp_path / "m.h5") as file:
        names = [str(name) for name in file["model_weights/inner"].attrs["weight_names"]]
    assert names.index("inner/b/kernel") < names.index("inner/a/kernel")
    same(from_keras(tmp_path / "m.h5").variables, from_keras(model).variables)


def test_unnamed_variables_of_an_h5_go_by_order(keras: Any, randomize: Any, tmp_path: Path) -> None:
    from keras.src.applications.convnext import LayerScale

    model = randomize(keras.Sequential([keras.Input((3,)), LayerScale(0.1, 3, name="scale")]))
    model.save(tmp_path / "m.h5")
    same(from_keras(tmp_path / "m.h5").variables, from_keras(model).variables)


def test_frozen_weights_are_not_trainable(keras: Any, randomize: Any, tmp_path: Path) -> None:
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((3,)),
            layers.Dense(3, name="frozen"),
            layers.BatchNormalization(name="bn"),
            layers.Normalization(name="adapted"),
            layers.Dense(2, name="trained"),
        ]
    )
    model.layers[0].trainable = model.layers[1].trainable = False
    randomize(model).save(tmp_path / "m.keras")
    variables = from_keras(tmp_path / "m.keras").variables
    names = {collection: sorted(layer) for collection, layer in variables.items()}
    assert names == {
        "params": ["trained"],
        "batch_stats": ["bn"],
        "non_trainable": ["adapted", "bn", "frozen"],
    }
    assert sorted(variables["non_trainable"]["bn"]) == ["beta", "gamma"]
    trained = sum(int(np.prod(w.shape)) for w in model.trainable_weights)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == trained


def test_a_frozen_nested_model_freezes_its_layers(keras: Any, randomize: Any) -> None:
    inner = keras.Sequential([keras.Input((3,)), keras.layers.Dense(3, name="d")], name="inner")
    model = randomize(keras.Sequential([keras.Input((3,)), inner]))
    inner.trainable = False
    assert "params" not in from_keras(model).variables


def test_bfloat16_weights(keras: Any, randomize: Any, tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, dtype="bfloat16", name="d")])
    randomize(model).save(tmp_path / "m.keras")
    kernel = from_keras(tmp_path / "m.keras").variables["params"]["d"]["kernel"]
    assert kernel.dtype == "bfloat16"
    np.testing.assert_array_equal(kernel, np.asarray(model.layers[0].kernel))


@pytest.mark.filterwarnings("ignore")
def test_training_state_is_ignored_and_reported(
    keras: Any, small_model: Any, tmp_path: Path
) -> None:
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="d")])
    model.compile("adam", "mse", metrics=["mae"])
    model.fit(np.ones((4, 3)), np.ones((4, 2)), verbose=0)
    model.save(tmp_path / "m.keras")
    report = from_keras(tmp_path / "m.keras").report
    assert report.parameter_count == model.count_params()
    ignored = list(report.ignored())
    assert ignored
    assert all(entry.name.startswith("optimizer/") for entry in ignored)
    assert "training state" in ignored[0].detail


def test_report_names_every_layer_and_variable(small_model: Any, tmp_path: Path) -> None:
    small_model.save(tmp_path / "m.keras")
    report = from_keras(tmp_path / "m.keras").report
    text = str(report)
    for name in ("encoder/conv", "encoder/norm/moving_mean", "shared/kernel", "head/out/bias"):
        assert name in text
    assert f"{small_model.count_params():,} parameters" in text
    assert json.loads(json.dumps(report.to_dict()))["parameter_count"] == report.parameter_count


@pytest.mark.parametrize(
    "name", ["Conv2D", "Conv2DTranspose", "PReLU", "ReLU", "LeakyReLU", "ConvLSTM2D", "InputLayer"]
)
def test_names_of_groups_are_spelled_as_in_keras(keras: Any, name: str) -> None:
    from keras.src.utils import naming

    assert snake_case(name) == naming.to_snake_case(name)
