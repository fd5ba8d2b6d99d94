"""Damaged, hostile and mistaken ONNX files: a FastGPUError that says what came, nothing else."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from fastgpu.errors import FastGPUError, FileError, UnsupportedLayerError
from fastgpu.importers import from_onnx
from fastgpu.importers.onnx.operators import TABLE

RELU = "g (float[n, 2] x) => (float[n, 2] y) { y = Relu (x) }"


@pytest.fixture
def parsed(onnx_models: Any) -> Callable[..., Any]:
    return onnx_models.parsed


def text_model(text: str, opset: int = 17) -> Any:
    """A model that ONNX's own checker would refuse."""
    onnx = pytest.importorskip("onnx")
    return onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]>\n{text}')


def failure(source: Any, kind: type[FastGPUError] = FileError, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        from_onnx(source, **options)
    return str(caught.value)


def failure_when_run(model: Any, *inputs: Any) -> str:
    imported = from_onnx(model)
    with pytest.raises(FastGPUError) as caught:
        jax.eval_shape(imported.module.apply, imported.variables, *inputs)
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "holds no ONNX model"),
        (b"\x80\x04\x95 a pickle", "is not an ONNX model"),
        (b"PK\x03\x04 a zip", "is not an ONNX model"),
    ],
)
def test_other_files(parsed: Any, tmp_path: Path, content: bytes, complaint: str) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    assert complaint in failure(tmp_path / "m.onnx")


def test_other_sources(onnx_models: Any, tmp_path: Path) -> None:
    assert "cannot be opened" in failure(tmp_path / "nothing.onnx")
    assert "a folder" in failure(tmp_path)
    assert "got: int" in failure(3)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("g (float[2] x) => (float[2] y) { a = Add (x, b)  b = Neg (a)  y = Neg (a) }", "cyclic"),
        ("g (float[2] x) => (float[2] y) { y = Neg (nobody) }", "nothing computes 'nobody'"),
        ("g (float[2] x) => (float[2] z) { y = Neg (x) }", "nothing computes the output 'z'"),
        ("g (float[2] x) => (float[2] y) { y = Neg (x)  y = Abs (x) }", "the name 'y' twice"),
        ("g (float[2] x, float[2] x) => (float[2] y) { y = Neg (x) }", "the name 'x' twice"),
        ("g (float[2] x) => (float[2] y) { y = Neg (x, x) }", "has 2 inputs"),
        ("g (float[2] x) => (float[2] y) { y = Concat (x, x) }", "has no axis"),
    ],
)
def test_broken_graphs(text: str, complaint: str) -> None:
    assert complaint in failure(text_model(text))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("g (float[2] x) => (float[2] y) { y = Magic (x)  z = Trick (x) }", "Magic (no rule"),
        ("g (float[2] x) => (float[2] y) { y = Magic (x)  z = Trick (x) }", "Trick (no rule"),
        ("g (float[2] x) => (float[2] y) { y = com.other.Gelu (x) }", "com.other.Gelu"),
        ("g (float[2] x) => (float[2] y) { y = Relu <slope = 2> (x) }", "Relu with slope"),
        ("g (string[2] x) => (string[2] y) { y = Identity (x) }", "text (STRING)"),
        ("g (float[2] x) => (bool y) { y = Cast <to = 26> (x) }", "Cast to INT2"),
    ],
)
def test_parts_without_an_equal_are_named(text: str, complaint: str) -> None:
    assert complaint in failure(text_model(text), UnsupportedLayerError)


@pytest.mark.parametrize("opset", [5, 99])
def test_opsets_beyond_the_table(opset: int) -> None:
    assert f"opset {opset}" in failure(text_model(RELU, opset), UnsupportedLayerError)


def test_inputs_that_shapes_depend_on_are_named(parsed: Any) -> None:
    model = parsed("g (float[4] x, int64[2] s) => (float[a, b] y) { y = Reshape (x, s) }")
    message = failure(model, UnsupportedLayerError)
    assert "the values of s" in message and "constants={'s': value}" in message
    imported = from_onnx(model, constants={"s": [2, 2]})
    assert imported.module.apply({}, np.ones(4, np.float32)).shape == (2, 2)
    assert "has no inputs t" in failure(model, constants={"t": 1})
    assert "holds no array" in failure(model, constants={"s": "text"})


def test_shapes_that_depend_on_computed_values_are_refused_by_name(parsed: Any) -> None:
    model = parsed("g (float[4] x) => (int64[1, k] y) { y = NonZero (x) }")
    assert "the values of x" in failure(model, UnsupportedLayerError)
    imported = from_onnx(model, constants={"x": [0, 3, 0, 1]})
    assert imported.module.apply({}).tolist() == [[1, 3]]


@pytest.mark.parametrize(
    "node",
    [
        "y = ConstantOfShape (shape)",
        "y = Expand (x, shape)",
        "y = Tile (x, shape)",
        "y = RandomNormal <shape = [1000000, 1000000]> ()",
        "big = Squeeze (last)  y = OneHot (index, big, values)",
        "big = Squeeze (last)  zero = Constant <value_int = 0> () "
        "one = Constant <value_int = 1> () y = Range (zero, big, one)",
        "axis = Constant <value_ints = [-1]> ()  pads = Concat <axis = 0> (last, last)"
        " null = Constant <value_float = 0.0> ()  y = Pad (x, pads, null, axis)",
        "scales = Constant <value_floats = [100000.0, 100000.0]> ()  y = Resize (x, , scales)",
    ],
)
def test_shape_bombs_are_refused_before_memory_is_taken(node: str) -> None:
    shape = "shape = Constant <value_ints = [1000000, 1000000]> ()"
    last = "last = Constant <value_ints = [1000000000000]> ()"
    values = "values = Constant <value_floats = [0.0, 1.0]> ()"
    index = "index = Constant <value_ints = [1]> ()"
    body = f"{shape} {last} {values} {index} {node}"
    model = text_model(f"g (float[1, 1] x) => (float[a, b] y) {{ {body} }}", 18)
    key = {"dropout": jax.random.key(0)}
    imported = from_onnx(model)
    with pytest.raises(FileError, match="absurd size"):
        imported.module.apply(imported.variables, np.ones((1, 1), np.float32), rngs=key)


def test_broadcasts_of_constants_stay_in_the_program(parsed: Any) -> None:
    model = parsed(
        """g (float[1] x) => (float[1] y) {
            n = Constant <value_ints = [100000, 1]> ()
            m = Constant <value_ints = [1, 100000]> ()
            a = ConstantOfShape (n)
            b = ConstantOfShape (m)
            c = Add (a, b)
            d = ReduceMax <keepdims = 0> (c)
            y = Add (x, d)
        }"""
    )
    imported = from_onnx(model)
    # traced, the ten thousand million sums are an instruction, not an array
    assert jax.eval_shape(imported.module.apply, {}, np.ones(1, np.float32)).shape == (1,)


def test_declared_sizes_are_checked_against_what_is_stored(parsed: Any) -> None:
    model = parsed("g (float[2] x) => (float[2] y) { y = Add (x, w) }", {"w": np.ones(2, "f")})
    weight = model.graph.initializer[0]
    for dims, complaint in (
        ([1 << 40, 1 << 40], "another number of elements"),
        ([3], "another number of elements"),
        ([-2], "impossible shape"),
        ([1] * 40, "impossible shape"),
    ):
        weight.dims[:] = dims
        assert complaint in failure(model)


def test_functions_may_not_call_themselves_nor_explode() -> None:
    onnx = pytest.importorskip("onnx")
    model = text_model("g (float[2] x) => (float[2] y) { y = own.f0 (x) }")
    model.opset_import.add(domain="own", version=1)
    for i in range(23):
        call = onnx.helper.make_node
        nodes = [call(f"f{i + 1}", ["x"], [f"t{k}"], domain="own") for k in range(4)]
        nodes.append(call("Sum", [f"t{k}" for k in range(4)], ["y"]))
        opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("own", 1)]
        model.functions.append(
            onnx.helper.make_function("own", f"f{i}", ["x"], ["y"], nodes, opsets)
        )
    own = onnx.helper.make_node("f0", ["x"], ["y"], domain="own")
    last = onnx.helper.make_function("own", "f23", ["x"], ["y"], [own], opsets)
    model.functions.append(last)
    assert "too" in failure(model)


_NAMES = ("i", "c", "v", "s", "going", "new", "same")


def nested_loop(level: int) -> Any:
    """A body that holds a loop that holds a loop, whose innermost step reshapes by its state."""
    onnx = pytest.importorskip("onnx")
    node, value, kinds = onnx.helper.make_node, onnx.helper.make_tensor_value_info, onnx.TensorProto
    i, c, v, s, going, new, same = (f"{name}_{level}" for name in _NAMES)
    if level:
        inner = node("Loop", [i, c, v, s], [new, same], body=nested_loop(level - 1))
        nodes = [inner]
    else:
        nodes = [node("Reshape", [v, s], [new]), node("Identity", [s], [same])]
    types = {c: (kinds.BOOL, []), v: (kinds.FLOAT, [2]), s: (kinds.INT64, [1])}
    types |= {i: (kinds.INT64, []), going: types[c], new: types[v], same: types[s]}
    inputs, outputs = (
        [value(n, *types[n]) for n in names] for names in ((i, c, v, s), (going, new, same))
    )
    return onnx.helper.make_graph(
        [node("Identity", [c], [going]), *nodes], f"g{level}", inputs, outputs
    )


def test_deeply_nested_loops_are_read_in_no_time() -> None:
    onnx = pytest.importorskip("onnx")
    graph = text_model("g (int64 n, float[2] x) => (float[2] y) { y = Neg (x) }").graph
    loop = onnx.helper.make_node("Loop", ["n", "", "x", "two"], ["y", ""], body=nested_loop(20))
    graph.node[0].CopyFrom(loop)
    graph.initializer.append(onnx.numpy_helper.from_array(np.array([2]), "two"))
    opsets = [onnx.helper.make_opsetid("", 17)]
    # walked again at each level for each of its outputs, this would take 4**20 walks
    imported = from_onnx(onnx.helper.make_model(graph, opset_imports=opsets))
    assert [spec.name for spec in imported.module.input_specs] == ["n", "x"]
    graph.node[0].CopyFrom(onnx.helper.make_node("If", ["n"], ["y"], then_branch=nested_loop(24)))
    assert "too deep" in failure(onnx.helper.make_model(graph, opset_imports=opsets))


def external_model(parsed: Any, location: str, length: int = 8) -> bytes:
    model = parsed("g (float[2] x) => (float[2] y) { y = Add (x, w) }", {"w": np.ones(2, "f")})
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = 1
    for key, value in (("location", location), ("offset", "0"), ("length", str(length))):
        entry = weight.external_data.add()
        entry.key, entry.value = key, value
    return model.SerializeToString()


def test_external_data_beside_the_model_is_read(parsed: Any, tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(np.array([2, 3], "f").tobytes())
    (tmp_path / "m.onnx").write_bytes(external_model(parsed, "w.bin"))
    imported = from_onnx(tmp_path / "m.onnx")
    assert imported.variables["params"]["w"].tolist() == [2, 3]


@pytest.mark.parametrize(
    ("location", "complaint"),
    [
        ("../secret", "leaves the model's folder"),
        ("inner/../../secret", "leaves the model's folder"),
        ("{secret}", "leaves the model's folder"),
        ("link", "leaves the model's folder"),
        ("", "leaves the model's folder"),
        ("C:\\secret", "leaves the model's folder"),
        ("..\\secret", "leaves the model's folder"),
        ("missing", "is no file"),
        ("inner", "is no file"),
    ],
)
def test_external_data_elsewhere_is_refused(
    parsed: Any, tmp_path: Path, location: str, complaint: str
) -> None:
    folder = tmp_path / "model"
    (folder / "inner").mkdir(parents=True)
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(64))
    (folder / "link").symlink_to(secret)
    location = location.replace("{secret}", str(secret))
    (folder / "m.onnx").write_bytes(external_model(parsed, location))
    assert complaint in failure(folder / "m.onnx")


def test_external_data_of_another_size_is_refused(parsed: Any, tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(6))
    (tmp_path / "m.onnx").write_bytes(external_model(parsed, "w.bin"))
    assert "does not fit the file" in failure(tmp_path / "m.onnx")
    (tmp_path / "w.bin").write_bytes(bytes(80))
    (tmp_path / "m.onnx").write_bytes(external_model(parsed, "w.bin", length=80))
    assert "does not fit the file" in failure(tmp_path / "m.onnx")
    assert "pass the path" in failure(external_model(parsed, "w.bin"))


def test_integers_beyond_32_bits_are_refused_where_they_matter(parsed: Any) -> None:
    model = parsed(
        """g (int64[n] x) => (int64[n] y) {
            large = Constant <value_int = 9223372036854775807> ()
            y = Add (x, large)
        }"""
    )
    assert "more than 32 bits" in failure_when_run(model, np.ones(2, np.int32))
    # as an end of a slice or a bound of a clip it only says "all"
    model = parsed(
        """g (int64[n] x) => (int64[m] y) {
            large = Constant <value_ints = [9223372036854775807]> ()
            one = Constant <value_ints = [1]> ()
            rest = Slice (x, one, large)
            most = Constant <value_int = 9223372036854775807> ()
            y = Clip (rest, , most)
        }"""
    )
    assert from_onnx(model).module.apply({}, np.arange(4)).tolist() == [1, 2, 3]


def test_errors_at_run_time_name_the_node(parsed: Any) -> None:
    model = text_model("g (float x, float y) => (float z) { z = MatMul (x, y) }")
    for value in model.graph.input:
        value.type.tensor_type.ClearField("shape")
    message = failure_when_run(model, np.ones((2, 3), "f"), np.ones((4, 5), "f"))
    assert "MatMul 'z'" in message and "float32[2,3], float32[4,5]" in message


def mutants(data: bytes, seed: int, count: int) -> list[bytes]:
    """Copies with bytes changed, cut out, doubled, or replaced by extreme numbers."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        mutant = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 4))):
            at = rng.randrange(len(mutant))
            kind = rng.randrange(5)
            if kind == 0:
                mutant[at] = rng.randrange(256)
            elif kind == 1:
                mutant[at] ^= 1 << rng.randrange(8)
            elif kind == 2:
                del mutant[at : at + rng.randrange(1, 9)]
            elif kind == 3:
                mutant[at:at] = mutant[at : at + rng.randrange(1, 9)]
            else:
                mutant[at : at + 5] = b"\xff\xff\xff\xff\x0f"
            if not mutant:
                mutant = bytearray(b"\0")
        found.append(bytes(mutant))
    return found


def altered(model: Any, rng: random.Random) -> bytes:
    """A copy that still parses: other operators, inputs, attributes, shapes or types."""
    copy = type(model)()
    copy.CopyFrom(model)
    graph = copy.graph
    names = [name for node in graph.node for name in (*node.input, *node.output)]
    for _ in range(rng.choice((1, 1, 2, 3))):
        node = rng.choice(graph.node)
        kind = rng.randrange(8)
        if kind == 0:
            node.op_type = rng.choice(sorted(TABLE))
        elif kind == 1 and node.input:
            node.input[rng.randrange(len(node.input))] = rng.choice(names)
        elif kind == 2 and node.input:
            del node.input[rng.randrange(len(node.input))]
        elif kind == 3:
            node.input.append(rng.choice(["", *names]))
        elif kind == 4 and node.attribute:
            attribute = rng.choice(node.attribute)
            numbers = [rng.choice(EXTREMES) for _ in range(rng.randrange(4))]
            attribute.i, attribute.ints[:] = rng.choice(EXTREMES), numbers
            attribute.type = rng.choice((attribute.type, 1, 2, 3, 6, 7))
        elif kind == 5 and graph.initializer:
            rng.choice(graph.initializer).data_type = rng.randrange(30)
        elif kind == 6:
            constants = [node for node in graph.node if node.op_type == "Constant"]
            for attribute in rng.choice(constants).attribute if constants else ():
                attribute.i = rng.choice(EXTREMES)
                attribute.ints[:] = [rng.choice(EXTREMES) for _ in attribute.ints]
        else:
            rng.choice(graph.input).type.tensor_type.elem_type = rng.randrange(30)
    return copy.SerializeToString()


EXTREMES = (0, 1, -1, 2, 3, -7, 40, 1 << 20, 1 << 31, -(1 << 31), (1 << 63) - 1, -(1 << 63))


def survive(data: bytes) -> bool:
    """Import and trace a mutant; whether that worked. Only a FastGPUError may come out."""
    try:
        imported = from_onnx(data)
        inputs = [
            jax.ShapeDtypeStruct([min(n or 2, 64) for n in spec.shape], spec.dtype)
            for spec in imported.module.input_specs
        ]
        jax.eval_shape(imported.module.apply, imported.variables, *inputs)
    except FastGPUError:
        return False
    return True


def fuzz(onnx_models: Any, count: int, seed: int) -> int:
    names = ("residual_network", "tagger", "transformer_block", "loops")
    survivors = 0
    for number, name in enumerate(names):
        model = getattr(onnx_models, name)()
        rng = random.Random(seed + number)
        each = count // len(names) // 2
        sources = mutants(model.SerializeToString(), seed + number, each)
        sources += [altered(model, rng) for _ in range(each)]
        survivors += sum(map(survive, sources))
    return survivors


def test_mutated_files_raise_nothing_else(onnx_models: Any) -> None:
    # some mutants only change a weight or a name that nobody reads, and still import
    assert 0 < fuzz(onnx_models, 80, seed=0) < 80


@pytest.mark.slow
def test_many_mutated_files_raise_nothing_else(onnx_models: Any) -> None:
    assert 0 < fuzz(onnx_models, 8000, seed=100) < 8000
