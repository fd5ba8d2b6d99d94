"""The run folder: variables come back as they were, or the message says what differs."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgpu.cli.run_folder import read_config, read_variables, write_config, write_variables
from fastgpu.errors import FileError, WeightsError

VARIABLES = {
    "params": {"dense/1": {"kernel": jnp.arange(6.0).reshape(2, 3)}, "scale": jnp.ones(())},
    "batch_stats": {"mean": jnp.arange(3, dtype=jnp.bfloat16)},
}


def test_variables_come_back_bit_for_bit(tmp_path: Path) -> None:
    write_variables(tmp_path, VARIABLES)
    read = read_variables(tmp_path, jax.tree.map(jnp.zeros_like, VARIABLES))
    assert jax.tree.structure(read) == jax.tree.structure(VARIABLES)
    for before, after in zip(jax.tree.leaves(VARIABLES), jax.tree.leaves(read), strict=True):
        assert before.dtype == after.dtype
        np.testing.assert_array_equal(np.asarray(before), after)
    assert [path.name for path in tmp_path.iterdir()] == ["variables.npz"]


@pytest.mark.parametrize(
    ("other", "leaf"),
    [
        (VARIABLES | {"params": {"scale": jnp.ones(())}}, "params/dense/1/kernel"),
        (VARIABLES | {"batch_stats": {"mean": jnp.zeros(4, jnp.bfloat16)}}, "batch_stats/mean"),
        (VARIABLES | {"batch_stats": {"mean": jnp.zeros(3)}}, "batch_stats/mean"),
        (VARIABLES | {"more": {"x": jnp.zeros(3)}}, "more/x"),
    ],
)
def test_variables_of_another_model_are_refused(other: object, leaf: str, tmp_path: Path) -> None:
    write_variables(tmp_path, VARIABLES)
    with pytest.raises(WeightsError, match=leaf) as error:
        read_variables(tmp_path, other)
    assert error.value.expected != error.value.got


def test_a_run_that_has_not_finished_has_no_variables(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"variables\.npz cannot be read"):
        read_variables(tmp_path, VARIABLES)


def test_a_run_is_resumed_only_with_its_own_settings(tmp_path: Path) -> None:
    config = {"model": "mlp", "batch_size": 8, "epochs": 1, "settings": {"sizes": (1, 2)}}
    write_config(tmp_path, config)
    write_config(tmp_path, config | {"epochs": 2})  # longer is not other
    with pytest.raises(FileError, match="other settings") as error:
        write_config(tmp_path, config | {"batch_size": 16})
    assert (error.value.expected, error.value.got) == ("batch_size=8", "batch_size=16")
    assert read_config(tmp_path)["batch_size"] == 8


def test_what_is_no_run_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="is not a run folder"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FileError, match="is not a run folder"):
        read_config(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot be written"):
        write_config(tmp_path / "file", {})
    assert json.dumps({}) not in (tmp_path / "file").read_text()
