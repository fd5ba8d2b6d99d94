"""`value_and_grad`: like JAX's, within a number of bytes.

The warning: the budget is that of the program compiled for the shapes at hand. Under `vmap`, and
inside of a larger program, the gradients are the same and the decisions stay, but what surrounds
them needs memory of its own. `fastgpu.train_step(memory_budget=...)` counts the whole step.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from fastgpu.compile.budget import Search, Version
from fastgpu.compile.deviceless import compile_for, options_for, plain_shape, shape_of
from fastgpu.errors import TraceError
from fastgpu.hardware import Device, Target, resolve_target
from fastgpu.ir.analysis import aval_bytes
from fastgpu.ir.compat import ClosedJaxpr, Tracer, eval_jaxpr, jaxpr_as_fun, platform
from fastgpu.transforms import Precision, optimize, optimized_trace, policy_of
from fastgpu.transforms.remat import (
    Joint,
    Planner,
    check_compress,
    flat_program,
    in_row_chunks,
    reshaped_loops,
    shelves_for,
    softmaxes_of_results,
    trace_joint,
)

# A vocabulary. Gradients of programs with less than these bytes are taken as they are.
_WIDE = 8192
_LEAST_BYTES = 1 << 30


def value_and_grad(
    fn: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    memory_budget: int | float | str | None = None,
    target: str | Device | Target | None = None,
    passes: Any = "default",
    compress: str | None = None,
    precision: Precision = None,
) -> "ValueAndGrad":
    """`jax.value_and_grad` of `fastgpu.optimize(fn)`, compiled to a peak within `memory_budget`.

    Args:
      fn: a function of pytrees of arrays that returns a real scalar (or `(scalar, aux)`).
      argnums, has_aux: as in `jax.value_and_grad`.
      memory_budget: bytes; or "16GiB", "8GB"; or "60%" of the peak without a budget. The peak is
        the compiler's: arguments + results - aliases + temporaries + code, on one device.
      target: the device to plan for, such as "h100"; `None` is the one that JAX runs on.
      passes, precision: handed to `fastgpu.optimize`. Gradients keep the dtypes of what they are
        of; with "fp16-mixed" they are not scaled here, as `fastgpu.train_step` does.
      compress: "int8" or "bfloat16" allows a plan to keep values for the backward half in fewer
        bits, where that is cheaper than to compute them again. Gradients then differ a little: see
        `ValueAndGrad.gradient_error`. `None` keeps them exact.

    What the backward half needs and the budget does not allow to keep is computed again or, on one
    GPU, waits in the host's memory; the gradients are the same. The decisions are made for each
    set of shapes, once. Composes with `jit`, `vmap` and further differentiation, which all see
    plain equations (JAX cannot differentiate a copy to the host: plan with `target="cpu"` for
    that). On a CPU the plan only holds in programs compiled with
    `fastgpu.compile.options_for("cpu")`, as a direct call is.

    Raises `BudgetError` when no plan fits, with the smallest peak that was found; `TraceError` when
    the result is no real scalar or a differentiated argument is not floating-point.

    >>> def loss(w, x):
    ...     for _ in range(12):
    ...         x = jnp.tanh(x @ w)
    ...     return jnp.sum(x)
    >>> w, x = jnp.eye(32) * 0.5, jnp.ones((2048, 32))
    >>> value, grad = value_and_grad(loss, memory_budget="70%")(w, x)
    >>> bool(jnp.allclose(grad, jax.grad(loss)(w, x), rtol=1e-5))
    True
    """
    return ValueAndGrad(fn, argnums, has_aux, memory_budget, target, passes, compress, precision)


class ValueAndGrad:
    """What `value_and_grad` returns. Call it; `search` is what `fastgpu.plan` asks."""

    def __init__(
        self,
        fn: Callable[..., Any],
        argnums: int | Sequence[int],
        has_aux: bool,
        memory_budget: int | float | str | None,
        target: str | Device | Target | None,
        passes: Any,
        compress: str | None = None,
        precision: Precision = None,
    ) -> None:
        check_compress(compress)
        self.compress, self.precision = compress, policy_of(precision)
        self.fn, self.argnums, self.has_aux = fn, argnums, has_aux
        self.memory_budget, self.target, self.passes = memory_budget, target, passes
        self._searches: dict[Any, tuple[Gradient, Search]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`(value, gradients)`, or `((value, aux), gradients)`."""
        if self.memory_budget is None:
            moving, rest = self._split(args, kwargs)
            if _may_be_wide(moving, rest):
                return self._result(self._without_budget(moving, rest))
            fn = optimize(self.fn, self.passes, self.target, self.precision)
            return jax.value_and_grad(fn, self.argnums, self.has_aux)(*args, **kwargs)
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((args, kwargs))):
            return self._planned(*args, **kwargs)
        return self._jitted(*args, **kwargs)

    @cached_property
    def _without_budget(self) -> Callable[..., Any]:
        return jax.jit(gradient_of(self._of_trees, self.passes, self.target, self.precision))

    @cached_property
    def _jitted(self) -> Callable[..., Any]:
        # The plan is made while JAX traces: once for each set of shapes.
        return jax.jit(self._planned, compiler_options=options_for(platform()))

    def _planned(self, *args: Any, **kwargs: Any) -> Any:
        assert self.memory_budget is not None
        moving, rest = self._split(args, kwargs)
        gradient, search = self._search_for(moving, rest, self.target)
        program = search.within(self.memory_budget).modelled.program
        return self._result(gradient.evaluate(program, moving, rest))

    def search(
        self, args: Sequence[Any], target: str | Device | Target | None
    ) -> tuple[Search, Callable[..., Callable[..., Any]], tuple[Any, ...]]:
        """The search for these arguments, what it compiles for a program, and on what."""
        moving, rest = self._split(tuple(args), {})
        gradient, search = self._search_for(moving, rest, target or self.target)

        def build(program: ClosedJaxpr) -> Callable[..., Any]:
            return lambda moving, rest: gradient.evaluate(program, moving, rest)

        return search, build, (moving, rest)

    def gradient_error(self, *args: Any) -> float:
        """How far the plan's gradients for `args` are from exact ones, measured by running both.

        The norm of the difference as a part of the norm, over all arguments together. Needs the
        memory of the program without a budget.
        """
        assert self.memory_budget is not None
        moving, rest = self._split(args, {})
        _, search = self._search_for(moving, rest, self.target)
        program = search.within(self.memory_budget).modelled.program
        return gradient_distance(search.planner.unconstrained.program, program, moving, rest)

    def _search_for(self, moving: Any, rest: Any, target: Any) -> tuple["Gradient", Search]:
        leaves, tree = jax.tree.flatten((moving, rest))
        structs = [shape_of(leaf) for leaf in leaves]
        key = (tree, tuple((s.shape, s.dtype, s.weak_type, s.sharding) for s in structs), target)
        if key not in self._searches:
            moving, rest = jax.tree.unflatten(tree, structs)
            gradient = Gradient(
                self._of_trees, moving, rest, target, self.passes, self.compress, self.precision
            )

            def compiled(program: ClosedJaxpr) -> Any:
                def run(moving: Any, rest: Any) -> Any:
                    return gradient.evaluate(program, moving, rest)

                return compile_for(run, (moving, rest), target)

            self._searches[key] = gradient, gradient.search(compiled)
        return self._searches[key]

    def _split(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        moving = tuple(args[i] for i in self._numbers(len(args)))
        fixed = {i: arg for i, arg in enumerate(args) if i not in self._numbers(len(args))}
        return moving, (fixed, kwargs)

    def _numbers(self, count: int) -> tuple[int, ...]:
        numbers = (self.argnums,) if isinstance(self.argnums, int) else tuple(self.argnums)
        for number in numbers:
            if not -count <= number < count:
                raise TraceError(
                    f"argnums={self.argnums} names an argument that was not given",
                    expected=f"indexes into {count} positional arguments",
                    got=str(number),
                )
        return tuple(number % count for number in numbers)

    def _of_trees(self, moving: Any, rest: Any) -> tuple[Any, Any]:
        fixed, kwargs = rest
        args = dict(fixed)
        args.update(zip(self._numbers(len(fixed) + len(moving)), moving, strict=True))
        result = self.fn(*(args[i] for i in sorted(args)), **kwargs)
        return result if self.has_aux else (result, ())

    def _result(self, result: Any) -> Any:
        (value, aux), grads = result
        if isinstance(self.argnums, int):
            grads = grads[0]
        return ((value, aux) if self.has_aux else value), grads


def gradient_of(
    fn: Callable[..., tuple[Any, Any]],
    passes: Any,
    target: str | Device | Target | None,
    precision: Precision = None,
) -> Callable[..., Any]:
    """`jax.value_and_grad(optimize(fn), has_aux=True)`, of the first argument.

    A loss over a large vocabulary runs in chunks of rows together with its gradient: its scores
    are never in memory as a whole, and nothing is computed twice.
    """
    plain = jax.value_and_grad(optimize(fn, passes, target, precision), has_aux=True)

    def value_and_grad(moving: Any, *rest: Any) -> Any:
        def of_trees(moving: Any, rest: Any) -> Any:
            return fn(moving, *rest)

        chunked = _in_chunks(of_trees, moving, rest, passes, target, precision)
        return plain(moving, *rest) if chunked is None else chunked

    return value_and_grad


def _in_chunks(
    fn: Callable[[Any, Any], tuple[Any, Any]],
    moving: Any,
    rest: Any,
    passes: Any,
    target: Any,
    precision: Precision,
) -> Any:
    """`((value, aux), gradients)` with a large product near its end in chunks, if there is one."""
    if not _may_be_wide(moving, rest):
        return None
    several = jax.device_count() if target is None else resolve_target(target).count
    if several > 1:  # rows that lie on several devices are chunks already
        return None
    gradient = Gradient(fn, moving, rest, target, passes, precision=precision)
    kept = sum(aval_bytes(v.aval) for v in gradient.joint.residuals)
    found = in_row_chunks(gradient.joint, max(kept, _LEAST_BYTES))
    if found is None:
        return None
    return gradient.evaluate(flat_program(found.joint), moving, rest)


def _may_be_wide(moving: Any, rest: Any) -> bool:
    """Whether all leaves are arrays, one of them as wide as only a vocabulary is."""
    leaves = jax.tree.leaves((moving, rest))
    return all(hasattr(leaf, "dtype") for leaf in leaves) and any(
        max(leaf.shape, default=0) >= _WIDE for leaf in jax.tree.leaves(moving)
    )


class Gradient:
    """A function `(moving, rest) -> (scalar, aux)` and its gradient, as one flat program."""

    def __init__(
        self,
        fn: Callable[[Any, Any], tuple[Any, Any]],
        moving: Any,
        rest: Any,
        target: str | Device | Target | None,
        passes: Any = "default",
        compress: str | None = None,
        precision: Precision = None,
    ) -> None:
        self.target = resolve_target(target)
        shelves = shelves_for(self.target.device, compress)
        # Copies to the host are not placed when a program is split over devices.
        self.shelves = tuple(s for s in shelves if self.target.count == 1 or not s.host)
        moving_leaves, self.moving_tree = jax.tree.flatten(jax.tree.map(shape_of, moving))
        rest_leaves, self.rest_tree = jax.tree.flatten(jax.tree.map(shape_of, rest))
        _require_floating(moving)
        self.count = len(moving_leaves)
        self.structs = structs = [plain_shape(s) for s in (*moving_leaves, *rest_leaves)]

        def of_leaves(*leaves: Any) -> tuple[Any, Any]:
            moving = jax.tree.unflatten(self.moving_tree, leaves[: self.count])
            rest = jax.tree.unflatten(self.rest_tree, leaves[self.count :])
            value, aux = fn(moving, rest)
            _require_scalar(value)
            return value, aux

        traced = optimized_trace(of_leaves, structs, passes, self.target, precision)
        self.closed_jaxpr = traced.closed_jaxpr
        _, self.aux_tree = traced.out_tree.children()
        self.joint = self._joint(self.closed_jaxpr)

    @cached_property
    def planner(self) -> Planner:
        """What decides what the gradient keeps."""
        return self._planner(self.joint)

    def _joint(self, closed: ClosedJaxpr) -> Joint:
        """`closed` and its gradient: leaves → scalar, then leaves of `aux`."""
        run = jaxpr_as_fun(closed)

        def flat(*leaves: Any) -> tuple[list[Any], list[Any]]:
            value, *aux = run(*leaves)
            return [value], aux

        return trace_joint(flat, self.structs[: self.count], self.structs[self.count :])

    def _planner(self, joint: Joint) -> Planner:
        return Planner(joint, self.target.device, self.shelves)

    def _alternatives(self) -> Iterator[Version]:
        """The same gradient without copies to the host, or up to roundings with less to keep."""
        peak = self.planner.unconstrained.peak
        near = tuple(shelf for shelf in self.shelves if not shelf.host)
        if near != self.shelves:
            # Fewer ways to meet a budget, but the compiler is easier to foresee.
            yield Version(Planner(self.joint, self.target.device, near))
        for joint, changes in self._changed(self.joint, (), peak):
            yield Version(self._planner(joint), changes)
        for other in reshaped_loops(self.closed_jaxpr, peak):
            joint = self._joint(other.program)
            ways = (joint, other.loops), *self._changed(joint, other.loops, peak)
            joint, changes = ways[-1]
            yield Version(self._planner(joint), changes)

    def _changed(
        self, joint: Joint, changes: tuple[str, ...], peak: int
    ) -> Iterator[tuple[Joint, tuple[str, ...]]]:
        """`joint` after each change that there is to make, on top of those before it."""
        if found := softmaxes_of_results(joint):
            joint, changes = found.joint, (*changes, found.how)
            yield joint, changes
        # Rows that lie on several devices are chunks already.
        if self.target.count == 1 and (found := in_row_chunks(joint, peak)):
            yield found.joint, (*changes, found.how)

    def search(self, compiled: Callable[[ClosedJaxpr], Any]) -> Search:
        """A search over this gradient's programs, each compiled as `compiled(program)` does."""
        return Search(self.planner, compiled, self.target.count, alternatives=self._alternatives)

    def evaluate(self, program: ClosedJaxpr, moving: Any, rest: Any) -> Any:
        """`((value, aux), gradients)` by `program`, one of the planner's."""
        leaves = [*jax.tree.leaves(moving), *jax.tree.leaves(rest)]
        one = jnp.ones((), program.in_avals[-1].dtype)  # pyright: ignore[reportAttributeAccessIssue]
        outputs = eval_jaxpr(program.jaxpr, program.consts, *leaves, one)
        value, aux, grads = (
            outputs[0],
            outputs[1 : self.joint.results],
            outputs[self.joint.results :],
        )
        aux = jax.tree.unflatten(self.aux_tree, aux)
        return (value, aux), jax.tree.unflatten(self.moving_tree, grads)


def gradient_distance(exact: ClosedJaxpr, found: ClosedJaxpr, moving: Any, rest: Any) -> float:
    """The relative distance of two programs' gradients by `moving`, both run on these arguments."""
    leaves, count = jax.tree.leaves((moving, rest)), len(jax.tree.leaves(moving))

    @jax.jit
    def squares(*leaves: Any) -> tuple[jax.Array, jax.Array]:
        a, b = (
            jax.tree.leaves(eval_jaxpr(one.jaxpr, one.consts, *leaves, 1.0))[-count:]
            for one in (exact, found)
        )
        apart = (jnp.sum((x - y).astype(jnp.float32) ** 2) for x, y in zip(a, b, strict=True))
        return sum(apart, jnp.zeros(())), sum(
            (jnp.sum(x.astype(jnp.float32) ** 2) for x in a), jnp.zeros(())
        )

    apart, size = squares(*leaves)
    return float(jnp.sqrt(apart / size)) if size else 0.0


def _require_floating(moving: Any) -> None:
    for path, leaf in jax.tree_util.tree_flatten_with_path(moving)[0]:
        if not jnp.issubdtype(shape_of(leaf).dtype, jnp.floating):
            raise TraceError(
                f"argument {jax.tree_util.keystr(path)} cannot be differentiated",
                expected="floating-point arrays in the arguments that `argnums` names",
                got=str(shape_of(leaf).dtype),
                fix="name another argument, or cast it to float32",
            )


def _require_scalar(value: Any) -> None:
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape != () or dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TraceError(
            "the function's result cannot be differentiated",
            expected="a floating-point scalar",
            got=type(value).__name__ if dtype is None else f"{dtype}{list(shape or ())}",
            fix="reduce it, for example with .mean(); pass has_aux=True if it returns a pair",
        )
