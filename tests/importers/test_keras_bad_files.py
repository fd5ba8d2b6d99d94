"""Damaged, hostile and mistaken sources: a FastGPUError that says what came, and nothing else."""

import io
import json
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from fastgpu.errors import (
    ConfigurationError,
    FastGPUError,
    FileError,
    UnsupportedLayerError,
    WeightsError,
)
from fastgpu.importers import from_keras

pytestmark = pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")


@pytest.fixture(scope="module")
def saved(keras: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model.keras and model.h5 of one small network."""
    folder = tmp_path_factory.mktemp("saved")
    layers = keras.layers
    model = keras.Sequential(
        [keras.Input((3,)), layers.Dense(4, name="d"), layers.BatchNormalization(name="bn")]
    )
    model.save(folder / "model.keras")
    model.save(folder / "model.h5")
    return folder


@pytest.fixture
def repack(saved: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of model.keras with members changed (a function of the old bytes) or added."""

    def copy(changes: dict[str, Any], compression: int = zipfile.ZIP_STORED) -> Path:
        target = tmp_path / "changed.keras"
        with zipfile.ZipFile(saved / "model.keras") as source:
            members = {name: source.read(name) for name in source.namelist()}
        for name, change in changes.items():
            value = change(members.get(name)) if callable(change) else change
            members = {k: v for k, v in members.items() if k != name}
            members |= {name: value} if value is not None else {}
        with zipfile.ZipFile(target, "w", compression) as archive:
            for name, value in members.items():
                archive.writestr(name, value)
        return target

    return copy


def edit_weights(change: Callable[[h5py.File], None]) -> Callable[[bytes], bytes]:
    def edit(data: bytes) -> bytes:
        buffer = io.BytesIO(data)
        with h5py.File(buffer, "r+") as file:
            change(file)
        return buffer.getvalue()

    return edit


def edit_config(change: Callable[[dict[str, Any]], None]) -> Callable[[bytes], bytes]:
    def edit(data: bytes) -> bytes:
        config = json.loads(data)
        change(config)
        return json.dumps(config).encode()

    return edit


def failure(source: Any, kind: type[FastGPUError] = FileError) -> str:
    with pytest.raises(kind) as caught:
        from_keras(source)
    return str(caught.value)


def replace(file: h5py.File, name: str, value: Any) -> None:
    del file[name]
    file[name] = value


@pytest.mark.parametrize(
    ("content", "came"),
    [
        (b"", "an empty file"),
        (b'{"class_name": "Sequential"}', "JSON text"),
        (b"\x1c\x00\x00\x00TFL3" + bytes(20), "a TFLite model"),
        (b"\x80\x04pickled", "a Python pickle"),
        (b"anything else", "starts with b'anything'"),
    ],
)
def test_not_what_its_name_says(tmp_path: Path, content: bytes, came: str) -> None:
    path = tmp_path / "model.keras"
    path.write_bytes(content)
    message = failure(path)
    assert f"{path} is not a Keras model" in message
    assert "expected: a .keras archive" in message
    assert came in message
    assert "to do: save it with model.save" in message


def test_other_archives_folders_and_objects(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "torch.keras", "w") as archive:
        archive.writestr("archive/data.pkl", b"")
    assert "got: archive/data.pkl" in failure(tmp_path / "torch.keras")
    (tmp_path / "saved_model.pb").touch()
    assert "got: a TensorFlow SavedModel" in failure(tmp_path)
    assert "got: No such file" in failure(tmp_path / "missing.keras")
    assert "got: list" in failure([1, 2])


@pytest.mark.parametrize("name", ["model.keras", "model.h5"])
def test_truncated(saved: Path, tmp_path: Path, name: str) -> None:
    data = (saved / name).read_bytes()
    path = tmp_path / name
    path.write_bytes(data[: len(data) // 2])
    message = failure(path)
    assert f"{path} cannot be read" in message
    assert "it may be truncated" in message


def test_missing_members(repack: Callable[..., Path]) -> None:
    assert "has no model.weights.h5" in failure(repack({"model.weights.h5": None}))
    assert "not of a Keras model" in failure(repack({"config.json": None}))
    npz = repack({"model.weights.h5": None, "model.weights.npz": b"PK"})
    assert "weights_format='h5'" in failure(npz)


def test_weights_alone_need_their_config(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "only.weights.h5"
    with zipfile.ZipFile(saved / "model.keras") as archive:
        path.write_bytes(archive.read("model.weights.h5"))
    message = failure(path)
    assert "weights without the model they belong to" in message
    assert "from_keras((model.to_json(), 'only.weights.h5'))" in message
    assert "describes no model" in failure(({"layer": 1}, path))


def test_missing_extra_and_misshapen_weights(repack: Callable[..., Path]) -> None:
    def change(file: h5py.File) -> None:
        del file["layers/dense/vars/1"]
        file["layers/batch_normalization/vars/4"] = np.zeros(4, "float32")
        replace(file, "layers/batch_normalization/vars/2", np.zeros(5, "float32"))
        file["layers/dense_9/vars/0"] = np.zeros(2, "float32")

    message = failure(repack({"model.weights.h5": edit_weights(change)}), WeightsError)
    assert "layer 'd': bias (4,) is missing" in message
    assert "layer 'bn': layers/batch_normalization/vars/4 (4,) is left over" in message
    assert "layer 'bn': moving_mean is (4,) in the config and (5,) in" in message
    assert "layers/dense_9/vars/0 belongs to no layer" in message


def test_missing_weights_of_an_h5(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.h5"
    path.write_bytes((saved / "model.h5").read_bytes())
    with h5py.File(path, "r+") as file:
        group = file["model_weights/d"]
        names = list(group.attrs["weight_names"])
        group.attrs["weight_names"] = names[:1]
    assert "layer 'd': bias (4,) is missing" in failure(path, WeightsError)
    with h5py.File(path, "r+") as file:
        file["model_weights/d"].attrs["weight_names"] = ["elsewhere/kernel"]
    assert "lists a weight that the file does not hold" in failure(path)


def test_refusals_come_before_any_weight_is_read(repack: Callable[..., Path]) -> None:
    def unknown(config: dict[str, Any]) -> None:
        config["config"]["layers"][1]["class_name"] = "Sparkle"

    path = repack({"config.json": edit_config(unknown), "model.weights.h5": edit_weights(_spoil)})
    assert "'d' (Sparkle: no such layer in the table)" in failure(path, UnsupportedLayerError)


def _spoil(file: h5py.File) -> None:
    del file["layers"]


def test_lambda_bytecode_is_not_run(repack: Callable[..., Path]) -> None:
    def evil(config: dict[str, Any]) -> None:
        config["config"]["layers"][1] = {
            "module": "keras.layers",
            "class_name": "Lambda",
            "config": {"name": "x", "function": {"class_name": "__lambda__", "config": {}}},
        }

    message = failure(repack({"config.json": edit_config(evil)}), UnsupportedLayerError)
    assert "'x' (Lambda: holds Python bytecode, which is never run)" in message


def test_modules_named_in_a_file_are_not_imported(
    repack: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')")

    def evil(config: dict[str, Any]) -> None:
        config["config"]["layers"][1]["module"] = "evil_module"
        config["config"]["layers"][1]["registered_name"] = "evil_module>Dense"

    message = failure(repack({"config.json": edit_config(evil)}), UnsupportedLayerError)
    assert "a custom class of 'evil_module'" in message


@pytest.mark.parametrize("name", ["../outside.txt", "/etc/outside", "a\\..\\..\\b", "C:\\x"])
def test_paths_that_leave_the_archive(repack: Callable[..., Path], name: str) -> None:
    assert "leaves the archive" in failure(repack({name: b"x"}))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.keras"
    path.write_bytes((saved / "model.keras").read_bytes())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("config.json", "{}")
    assert "occurs twice" in failure(path)


def test_absurd_member_size(repack: Callable[..., Path]) -> None:
    bomb = repack({"config.json": bytes(4 << 20)}, zipfile.ZIP_DEFLATED)
    assert "declares an absurd size" in failure(bomb)


def test_absurd_dataset_size(repack: Callable[..., Path]) -> None:
    """Config and file agree on 4 TB of weights; HDF5 stores none of them."""

    def large(config: dict[str, Any]) -> None:
        config["config"]["layers"][1]["config"]["units"] = 10**12 // 3
        config["config"]["layers"] = config["config"]["layers"][:2]

    def change(file: h5py.File) -> None:
        del file["layers/batch_normalization"]
        del file["layers/dense/vars/0"], file["layers/dense/vars/1"]
        shapes = {"0": (3, 10**12 // 3), "1": (10**12 // 3,)}
        for name, shape in shapes.items():
            file["layers/dense/vars"].create_dataset(name, shape, "float32", chunks=True)

    path = repack({"config.json": edit_config(large), "model.weights.h5": edit_weights(change)})
    message = failure(path)
    assert "declares a size that it does not have" in message
    assert "stored (0 bytes)" in message


@pytest.mark.parametrize("kind", ["soft", "external", "hard", "virtual", "raw"])
def test_weights_that_are_elsewhere(repack: Callable[..., Path], kind: str) -> None:
    def change(file: h5py.File) -> None:
        name = "layers/dense/vars/1"
        del file[name]
        if kind == "soft":
            file[name] = h5py.SoftLink("/layers/dense/vars/0")
        elif kind == "external":
            file[name] = h5py.ExternalLink("/etc/passwd", "/x")
        elif kind == "hard":
            file["layers/dense/vars/loop"] = file["layers"]
        elif kind == "virtual":
            layout = h5py.VirtualLayout((4,), "float32")
            layout[:] = h5py.VirtualSource("other.h5", "x", (4,))
            file.create_virtual_dataset(name, layout)
        else:
            file.create_dataset(name, (4,), "float32", external=[("/etc/passwd", 0, 16)])

    message = failure(repack({"model.weights.h5": edit_weights(change)}))
    words = {"soft": "SoftLink", "external": "ExternalLink", "hard": "second name"}
    assert words.get(kind, "keeps its data in other files") in message


def test_weights_that_are_no_numbers(repack: Callable[..., Path]) -> None:
    def change(file: h5py.File) -> None:
        replace(file, "layers/dense/vars/1", ["a", "b", "c", "d"])

    assert "expected numbers" in failure(repack({"model.weights.h5": edit_weights(change)}))


def test_configs_of_the_wrong_form(repack: Callable[..., Path]) -> None:
    assert "cannot be read" in failure(repack({"config.json": b"{" * 3}))
    assert "cannot be read" in failure(repack({"config.json": b"[" * 100_000}))
    assert "describes no model" in failure(repack({"config.json": b"[1]"}))
    wrong = repack({"config.json": b'{"class_name": "Sequential", "config": {"layers": [{}]}}'})
    assert "the config of" in failure(wrong)


def test_layers_that_do_not_fit_together(repack: Callable[..., Path]) -> None:
    def change(config: dict[str, Any]) -> None:
        config["config"]["layers"][2]["config"]["axis"] = 7

    message = failure(repack({"config.json": edit_config(change)}))
    assert "do not fit together" in message
    assert "axis 7 of an array of rank 2" in message


def test_nested_too_deep(repack: Callable[..., Path]) -> None:
    def change(config: dict[str, Any]) -> None:
        inner = config["config"]["layers"][1:]
        for i in range(40):
            inner = [{"class_name": "Sequential", "config": {"name": f"s{i}", "layers": inner}}]
        config["config"]["layers"][1:] = inner

    assert "nested deeper than" in failure(repack({"config.json": edit_config(change)}))


def test_a_model_that_was_never_built(keras: Any, tmp_path: Path) -> None:
    message = failure(keras.Sequential([keras.layers.Dense(2)]))
    assert "does not say the shape of its input" in message


def test_float64_needs_64_bit_numbers_in_jax(keras: Any) -> None:
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, dtype="float32")])
    config = model.get_config()
    config["layers"][1]["config"]["dtype"] = "float64"

    class Sequential:
        name, layers, weights = "m", model.layers, model.weights

        def get_config(self) -> dict[str, Any]:
            return config

    message = failure(Sequential(), ConfigurationError)
    assert 'jax.config.update("jax_enable_x64", True)' in message


@pytest.mark.parametrize("name", ["model.keras", "model.h5"])
@pytest.mark.parametrize("seed", range(30))
def test_any_damage_gives_a_clear_error_or_a_model(
    saved: Path, tmp_path: Path, name: str, seed: int
) -> None:
    """Flip or cut bytes anywhere: never another exception, and no file is left behind."""
    rng = random.Random(seed)
    data = bytearray((saved / name).read_bytes())
    if seed % 3 == 0:
        del data[rng.randrange(8, len(data)) :]
    for _ in range(rng.choice([1, 4, 32])):
        data[rng.randrange(8, len(data))] = rng.randrange(256)
    path = tmp_path / name
    path.write_bytes(data)
    try:
        from_keras(path)
    except FastGPUError as error:
        assert str(error)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("seed", range(40))
def test_any_change_of_a_config_gives_a_clear_error_or_a_model(
    repack: Callable[..., Path], seed: int
) -> None:
    """Replace a random value of the config by another kind of value."""
    rng = random.Random(seed)

    def change(config: dict[str, Any]) -> None:
        here: Any = config
        while True:
            key = rng.choice(list(here) if isinstance(here, dict) else range(len(here)))
            if isinstance(here[key], dict | list) and here[key] and rng.random() < 0.85:
                here = here[key]
                continue
            here[key] = rng.choice([None, -1, 10**20, "x", [], {}, [[]], {"class_name": "a"}, True])
            return

    path = repack({"config.json": edit_config(change)})
    try:
        from_keras(path)
    except FastGPUError as error:
        assert str(error)
