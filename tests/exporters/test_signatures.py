"""How inputs may be given, and what inputs and outputs are called."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgpu.errors import ExportError
from fastgpu.exporters.signatures import (
    input_specs,
    named_outputs,
    sample_arrays,
    symbolic_arguments,
)


def _texts(inputs):
    return [f"{spec.name}: {spec}" for spec in input_specs(None, inputs)]


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ([(None, 28, 28, 1)], ["input_0: float32[batch, 28, 28, 1]"]),
        ((None, 28, 28, 1), ["input_0: float32[batch, 28, 28, 1]"]),
        (((None, 9), "int32"), ["input_0: int32[batch, 9]"]),
        (((None, 9), (None, 4)), ["input_0: float32[batch, 9]", "input_1: float32[batch, 4]"]),
        ([((None, None), jnp.bfloat16)], ["input_0: bfloat16[batch, d0_1]"]),
        ([(None, "t"), ("n", "t")], ["input_0: float32[batch, t]", "input_1: float32[n, t]"]),
        ([jax.ShapeDtypeStruct((8, 3), jnp.int32)], ["input_0: int32[8, 3]"]),
        ([jax.ShapeDtypeStruct((None, 3), jnp.int32)], ["input_0: int32[batch, 3]"]),
        (np.zeros((8, 3), np.float64), ["input_0: float32[batch, 3]"]),
        ({"a": (None, 2), "b c": jnp.zeros(4)}, ["a: float32[batch, 2]", "b_c: float32[batch]"]),
    ],
)  # fmt: skip
def test_inputs_are_given_as_shapes_structs_or_arrays(inputs, expected):
    assert _texts(inputs) == expected


def test_a_module_that_knows_its_inputs_needs_no_others():
    image = SimpleNamespace(name="image", shape=(None, 5), dtype="float32")
    mask = SimpleNamespace(name="mask", shape=(None, None), dtype="bool")
    module = SimpleNamespace(input_specs=(image, mask))
    assert [f"{spec.name}: {spec}" for spec in input_specs(module, None)] == [
        "image: float32[batch, 5]",
        "mask: bool[batch, d1_1]",
    ]


def test_unknown_inputs_are_asked_for():
    with pytest.raises(ExportError, match=r"pass inputs=\[") as caught:
        input_specs(jnp.sin, None)
    assert "expected:" in str(caught.value) and "got: inputs=None" in str(caught.value)
    with pytest.raises(ExportError, match="input 'input_1' has no shape"):
        input_specs(None, [(None, 3), "image"])


def test_the_batch_is_one_symbol_and_other_open_sizes_are_their_own():
    a, b = symbolic_arguments(input_specs(None, [(None, None), (None, None)]))
    assert a.shape[0] == b.shape[0]
    assert a.shape[1] is not b.shape[1] and str(a.shape[1]) != str(b.shape[1])


def test_a_sample_must_fit_the_inputs():
    specs = input_specs(None, [(None, 3)])
    (array,) = sample_arrays(specs, None, np.ones((7, 3), np.float64))
    assert array.dtype == np.float32
    assert sample_arrays(specs, [(None, 3)], None) is None
    with pytest.raises(ExportError, match="another shape") as caught:
        sample_arrays(specs, None, np.ones((7, 4), np.float32))
    assert "expected: float32[batch, 3]" in str(caught.value)
    assert "got: float32[7, 4]" in str(caught.value)
    with pytest.raises(ExportError, match="one array per input"):
        sample_arrays(specs, None, ["x"])
    with pytest.raises(ExportError, match="expected: 1 arrays"):
        sample_arrays(specs, None, [np.ones((7, 3)), np.ones((7, 3))])


def test_outputs_are_named_by_key_or_position():
    assert list(named_outputs(0)) == ["output_0"]
    assert list(named_outputs([0, {"x": 1, "y": (2, 3)}])) == [
        "output_0",
        "output_1_x",
        "output_1_y_0",
        "output_1_y_1",
    ]
    assert named_outputs({"a": {"b": 1}, "a_b": 2}) == {"a_b": 1, "a_b_": 2}
