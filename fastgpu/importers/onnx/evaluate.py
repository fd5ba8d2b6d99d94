"""Runs a graph: each node by its rule, known values in numpy, the others as JAX arrays."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastgpu.errors import FastGPUError, TraceError, UnsupportedLayerError
from fastgpu.importers.onnx.dtypes import as_jax, in_use, is_integer
from fastgpu.importers.onnx.graph import Graph, Node, Slot
from fastgpu.importers.onnx.operators import Rule

# Known arrays beyond this are computed in the program, where nothing is held until it runs.
_LARGEST_KNOWN = 1 << 20


@dataclasses.dataclass
class Evaluation:
    """One call of a module: its variables, its randomness, and what it changes."""

    variables: Mapping[Slot, Any]
    train: bool
    draw: Callable[[], jax.Array]
    updates: dict[Slot, jax.Array] = dataclasses.field(default_factory=dict)

    def run(
        self,
        graph: Graph,
        inputs: Sequence[Any],
        around: Mapping[str, Any],
        iterations: tuple[Any, ...] = (),
        slots: Mapping[str, Slot] | None = None,
    ) -> list[Any]:
        """The outputs of a graph. `around` and `slots` are the names of the graphs around it."""
        if len(inputs) > len(graph.inputs):
            raise TraceError(f"a graph of {len(graph.inputs)} inputs got {len(inputs)}")
        values: dict[str, Any] = {**around, **graph.constants}
        places = {**(slots or {}), **graph.slots}
        values.update((name, self.variables[slot]) for name, slot in graph.slots.items())
        values.update(zip(graph.inputs, inputs, strict=False))
        values.update(dict.fromkeys(graph.inputs[len(inputs) :]))
        values[""] = None
        for node in graph.nodes:
            given = [values[name] for name in node.inputs]
            if node.function is not None:
                outputs = self.run(node.function, given, {}, iterations)
            else:
                assert node.rule is not None
                call = NodeCall(self, node, values, places, iterations)
                outputs = _compute(node, node.rule, given, call)
            # an output that is not produced stays absent; only a reader of it fails
            absent = [None] * (len(node.outputs) - len(outputs))
            for name, value in zip(node.outputs, [*outputs, *absent], strict=False):
                values[name] = value
            values[""] = None
        return [values[name] for name in graph.outputs]


@dataclasses.dataclass(frozen=True)
class NodeCall:
    """What a rule may ask of its call; see `operators.Call`."""

    evaluation: Evaluation
    node: Node
    values: Mapping[str, Any]
    slots: Mapping[str, Slot]
    iterations: tuple[Any, ...]

    @property
    def train(self) -> bool:
        """Whether this is a training call."""
        return self.evaluation.train

    @property
    def opset(self) -> int:
        """The opset in which the node is written."""
        return self.node.opset

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the outputs that are read, up to the last one."""
        named = [i for i, name in enumerate(self.node.outputs) if name]
        return self.node.outputs[: named[-1] + 1] if named else ()

    def key(self, seed: float | None = None) -> jax.Array:
        """A random key of this node in this step of the loops around it."""
        if seed is not None:
            return jax.random.key(np.asarray(seed, np.float32).view(np.uint32))
        key = jax.random.fold_in(self.evaluation.draw(), self.node.number)
        for index in self.iterations:
            key = jax.random.fold_in(key, index)
        return key

    def run(self, graph: Graph, inputs: Sequence[Any], iteration: Any = None) -> list[Any]:
        """Evaluate a graph attribute, in step `iteration` of a loop."""
        inside = self.iterations if iteration is None else (*self.iterations, iteration)
        return self.evaluation.run(graph, inputs, self.values, inside, self.slots)

    def update(self, name: str, value: jax.Array) -> None:
        """Store a statistic; one that is computed, not stored, is left alone."""
        assert self.node.rule is not None
        source = self.node.inputs[self.node.rule.inputs.index(name)]
        slot = self.slots.get(source)
        if slot is None or slot.collection != "batch_stats":
            return
        if self.iterations:
            raise UnsupportedLayerError(
                f"{self.node} updates its statistics inside a loop or a branch",
                fix="train the model outside of it, or call it with train=False",
            )
        self.evaluation.updates[slot] = value


def _compute(node: Node, rule: Rule, given: Sequence[Any], call: NodeCall) -> list[Any]:
    """The outputs of one node. Whatever goes wrong names the node."""
    with _named(node, given):
        arguments, xp = _prepared(node, rule, given)
        extra: dict[str, Any] = {}
        if "xp" in rule.given:
            extra["xp"] = xp
        if "call" in rule.given:
            extra["call"] = call
        if xp is np and "xp" not in rule.given:
            # shape arithmetic by an operator that numpy does not have
            with jax.ensure_compile_time_eval():
                arrays = [a if i in _static(rule) else _jax(a, node) for i, a in arguments]
                found = rule.compute(*arrays, **node.attributes, **extra)
                found = jax.tree.map(np.asarray, found)
        else:
            with np.errstate(all="ignore"):
                found = rule.compute(*(a for _, a in arguments), **node.attributes, **extra)
    outputs = list(found) if isinstance(found, tuple | list) else [found]
    return [_as_array(value) for value in outputs]


def _as_array(value: Any) -> Any:
    """numpy's scalars, and symbols for sizes, as arrays without axes."""
    if value is None or isinstance(value, jax.Array | np.ndarray | tuple):
        return value
    if isinstance(value, np.generic):
        return np.asarray(value)
    symbol = np.empty((), object)
    symbol[()] = value
    return symbol


def _static(rule: Rule) -> Any:
    return {i for i, name in enumerate(rule.inputs) if name in rule.static}


def _jax(value: Any, node: Node) -> Any:
    return value if value is None else as_jax(value, str(node))


def _prepared(node: Node, rule: Rule, given: Sequence[Any]) -> tuple[list[tuple[int, Any]], Any]:
    """The inputs as the rule wants them, with their positions, and the namespace to compute in."""
    for i, value in enumerate(given):
        if i < rule.required and value is None and not rule.as_is:
            raise ValueError(f"the input {rule.input_name(i)!r} is absent")
        if rule.is_static(i) and value is not None and not isinstance(value, np.ndarray):
            raise UnsupportedLayerError(
                f"{node}: the shape of its result depends on values that are not known",
                expected=f"{rule.input_name(i)!r} from constants and the shapes of the inputs",
                got=f"a computed {_described(value)}",
                fix="fix the inputs it depends on: from_onnx(..., constants={name: value})",
            )
    if rule.as_is:
        return list(enumerate(given)), jnp
    free = [v for i, v in enumerate(given) if v is not None and not rule.is_static(i)]
    if any(isinstance(value, tuple) for value in free):
        raise TypeError("a sequence where an array is expected")
    known = all(isinstance(value, np.ndarray) for value in free) and _is_small(free)
    foldable = "xp" in rule.given or ("call" not in rule.given and bool(free))
    if known and foldable:
        return list(enumerate(given)), np
    return [(i, _converted(value, i, node, rule)) for i, value in enumerate(given)], jnp


def _converted(value: Any, position: int, node: Node, rule: Rule) -> Any:
    if value is None or rule.is_static(position):
        return value
    if rule.input_name(position) in rule.bounds and isinstance(value, np.ndarray):
        dtype = in_use(value.dtype, jnp)
        if is_integer(dtype):
            value = np.clip(value, np.iinfo(dtype).min, np.iinfo(dtype).max)
    return as_jax(value, f"an input of {node}")


def _is_small(values: Sequence[np.ndarray]) -> bool:
    """Whether known values stay small together, also once they are broadcast."""
    try:
        shape = np.broadcast_shapes(*(value.shape for value in values))
    except ValueError:
        shape = (sum(value.size for value in values),)
    return math.prod(shape) <= _LARGEST_KNOWN


def _described(value: Any) -> str:
    if value is None:
        return "absent"
    if isinstance(value, tuple):
        return f"a sequence of {len(value)}"
    return f"{value.dtype}[{','.join(map(str, value.shape))}]"


@contextmanager
def _named(node: Node, given: Sequence[Any]) -> Iterator[None]:
    """Say which node it was, on which inputs."""
    try:
        yield
    except UnsupportedLayerError as error:
        if str(node) in error.summary:
            raise
        raise UnsupportedLayerError(
            f"{node}: {error.summary}", expected=error.expected, got=error.got, fix=error.fix
        ) from error
    except FastGPUError:
        raise
    except _MISTAKES as error:
        raise TraceError(
            f"{node} cannot be computed",
            expected="inputs and attributes as ONNX defines them",
            got=f"{', '.join(map(_described, given))}: {str(error).splitlines()[0][:300]}"
            if str(error)
            else type(error).__name__,
            fix="check the shapes of the model's inputs; onnx.checker can check the file",
        ) from error


# What numpy and JAX raise about arguments that do not fit.
_MISTAKES = (
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    NotImplementedError,
    jax.errors.JaxRuntimeError,
)
