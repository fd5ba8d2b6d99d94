"""The pipeline, on one page: which passes run, in what order, and why.

`PASSES` is the whole list; `optimize` applies the default ones of it to a function, and `inspect`
shows what each pass did. To change it, hand `passes=` another list of passes or names:

>>> [step.name for step in DEFAULT_PASSES]
['inline', 'cse', 'fold', 'attention', 'pointwise', 'depthwise', 'max_pool', 'small_spatial',
 'stem', 'outer_products', 'random_bits', 'row_pick', 'in_place', 'dce']
>>> len(without("cse")) == len(DEFAULT_PASSES) - 1
True
>>> [step.name for step in also("roll")][:3]
['inline', 'roll', 'cse']
"""

import difflib
import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import jax

from fastgpu import ir
from fastgpu.errors import ConfigurationError
from fastgpu.hardware import Device, Target, resolve_target
from fastgpu.ir.compat import ClosedJaxpr
from fastgpu.transforms.common_subexpressions import merge_common_subexpressions
from fastgpu.transforms.constant_folding import fold_constants
from fastgpu.transforms.dataflow import (
    depthwise,
    max_pool,
    outer_products,
    pointwise,
    random_bits,
    row_pick,
    small_spatial,
    stem,
)
from fastgpu.transforms.dataflow.attention import fuse_attention
from fastgpu.transforms.dataflow.in_place import update_in_place
from fastgpu.transforms.dataflow.roll import roll_blocks
from fastgpu.transforms.dead_code import remove_dead_code
from fastgpu.transforms.inline import inline_calls
from fastgpu.transforms.pipeline import Context, Pass, PassReport, Ran, report, run_passes
from fastgpu.transforms.precision import Policy, in_precision, policy_of

__all__ = [
    "DEFAULT_PASSES",
    "PASSES",
    "Context",
    "Inspection",
    "Pass",
    "PassReport",
    "also",
    "inspect",
    "optimize",
    "whole_step",
    "without",
]


def _plain(change: Callable[[ClosedJaxpr], ClosedJaxpr]) -> Callable[..., ClosedJaxpr]:
    return lambda closed, context: change(closed)


def _lowering(chooser: ir.Chooser) -> Callable[..., ClosedJaxpr]:
    return lambda closed, context: ir.lower_by(closed, chooser)


PASSES: tuple[Pass, ...] = (
    Pass("inline", "forward", _plain(inline_calls), "later passes see one flat program"),
    Pass(
        "roll",
        "forward",
        _plain(roll_blocks),
        "equal blocks of a deep network as one loop, which is traced and compiled once",
        default=False,
    ),
    Pass("cse", "forward", _plain(merge_common_subexpressions), "equal values are computed once"),
    Pass("fold", "forward", _plain(fold_constants), "what depends on no input is a constant"),
    Pass(
        "attention",
        "forward",
        fuse_attention,
        "softmax attention by cuDNN's kernel, which never writes the scores to memory",
        platforms=("cuda",),
    ),
    Pass(
        "pointwise",
        "forward",
        _lowering(pointwise.CHOOSER),
        "a 1x1 convolution is a matrix product: its weight gradient is 3 to 7 times faster on CPU",
        platforms=("cpu",),
    ),
    Pass(
        "depthwise",
        "forward",
        _lowering(depthwise.CHOOSER),
        "shifted multiply-adds instead of a grouped convolution: 10 times faster on CPU",
        platforms=("cpu",),
    ),
    Pass(
        "max_pool",
        "forward",
        lambda closed, context: ir.lower_by(
            closed,
            max_pool.CHOOSER if context.device.platform == "cpu" else max_pool.DENSE_CHOOSER,
        ),
        "a gradient by comparison, not select-and-scatter: 3 to 5 times faster on CPU, less memory",
        platforms=("cpu", "cuda"),
    ),
    Pass(
        "small_spatial",
        "forward",
        _lowering(small_spatial.CHOOSER),
        "a wide convolution over few positions is a matrix product of its windows",
        platforms=("cpu",),
    ),
    Pass(
        "stem",
        "forward",
        _lowering(stem.CHOOSER),
        "the weight gradient over an image's three features as a product of windows",
        platforms=("cpu",),
    ),
    Pass(
        "outer_products",
        "forward",
        _lowering(outer_products.CHOOSER),
        "a wide layer's weight gradient is added up in the optimizer's pass, not in memory",
        platforms=("cpu",),
    ),
    Pass(
        "random_bits",
        "forward",
        _lowering(random_bits.CHOOSER),
        "dropout masks are computed where they are used, bit for bit: 3 times faster on CPU",
        platforms=("cpu",),
    ),
    Pass(
        "row_pick",
        "forward",
        lambda closed, context: ir.rewrite(closed, {"gather": row_pick.rule}),
        "a label's logit by comparison: its gradient is a mask, not a scatter into zeros",
        platforms=("cuda",),
    ),
    Pass(
        "in_place",
        "step",
        _plain(update_in_place),
        "a parameter is read by the gradient before it is updated, so that it need not be copied",
        platforms=("cpu",),
    ),
    Pass("dce", "forward", _plain(remove_dead_code), "what nobody reads is not computed"),
)

DEFAULT_PASSES: tuple[Pass, ...] = tuple(step for step in PASSES if step.default)


def also(*names: str) -> tuple[Pass, ...]:
    """The default passes and those named, each in its place in `PASSES`.

    Raises `ConfigurationError` for a name that is not in the list.

    >>> set(also("roll")) - set(DEFAULT_PASSES) == set(resolve_passes("roll"))
    True
    """
    named = resolve_passes(names)
    return tuple(step for step in PASSES if step.default or step in named)


# What `precision=` of a transform is: a name, names for scopes, or what `configure` set.
Precision = str | Mapping[str, str] | Policy | None
# These leave the program shorter and its numbers alone; precision is settled right after them.
_STRUCTURAL = ("inline", "cse", "fold")


def without(*names: str) -> tuple[Pass, ...]:
    """The default passes less those named.

    Raises `ConfigurationError` for a name that is not in the list.

    >>> "max_pool" in [step.name for step in without("max_pool")]
    False
    """
    dropped = {step.name for step in resolve_passes(names)}
    return tuple(step for step in DEFAULT_PASSES if step.name not in dropped)


def resolve_passes(passes: str | Sequence[Pass | str]) -> tuple[Pass, ...]:
    """Passes from "default", or from a list of passes and names of passes.

    Raises `ConfigurationError` for a name that is not in the list.
    """
    if passes == "default":
        return DEFAULT_PASSES
    if isinstance(passes, str):
        passes = (passes,)
    by_name = {step.name: step for step in PASSES}
    for step in passes:
        if not isinstance(step, Pass) and step not in by_name:
            raise ConfigurationError(
                f"unknown pass {step!r}",
                expected=f"'default', or passes from {', '.join(by_name)}",
                got=repr(step),
                fix="use one of these names, or give a fastgpu.transforms.Pass",
            )
    return tuple(step if isinstance(step, Pass) else by_name[step] for step in passes)


def whole_step(
    passes: str | Sequence[Pass | str], target: str | Device | Target | None = None
) -> tuple[Pass, ...]:
    """Those of `passes` that change a whole training step on `target`, after `inline` if it is in.

    >>> [step.name for step in whole_step("default", "cpu")], whole_step("default", "h100")
    (['inline', 'in_place'], ())
    """
    steps = resolve_passes(passes)
    found = [step for step in _in_force(steps, resolve_target(target)) if step.stage == "step"]
    return (*(step for step in steps if step.name == "inline"), *found) if found else ()


def optimize(
    fn: Callable[..., Any],
    passes: str | Sequence[Pass | str] = "default",
    target: str | Device | Target | None = None,
    precision: Precision = None,
) -> Callable[..., Any]:
    """`fn` with its jaxpr rewritten by `passes` for `target`: the same results, computed faster.

    `fn` takes and returns any pytrees. Arrays and numbers are traced; booleans, strings and other
    hashable leaves are constants, each value traced anew. The result is compiled by `jax.jit` and
    composes with `jax.jit`, `jax.grad`, `jax.jvp`, `jax.vmap` and `jax.lax.scan`; derivatives are
    those of `fn`, and each is optimized too. `target` is a name from `fastgpu.hardware.DEVICES`;
    by default it is what JAX runs on.

    `precision` is "bf16-mixed" or "fp16-mixed" (products and the activations between them in 16
    bits, what has to be exact in float32; inputs, outputs and gradients keep their dtypes),
    "float32" or "tf32" (how float32 products are computed, where `fn` does not say), "default" (as
    the device likes), or a dict from scopes to these, `{"*": "bf16-mixed", "head": "float32"}`, of
    which the last that matches holds. Scopes are Flax modules' names and `jax.named_scope`. `None`
    is what `fastgpu.configure` set, `{}` leaves all products as they are. See docs/training.md.

    Raises `TraceError` when an output of `fn` is not an array, `ConfigurationError` for an unknown
    pass, target or precision, or a scope that is not in the program.

    >>> import jax, jax.numpy as jnp
    >>> fast = optimize(lambda x: {"y": jnp.sin(x) ** 2})
    >>> bool(jnp.allclose(jax.grad(lambda x: fast(x)["y"])(1.0), jnp.sin(2.0)))
    True
    """
    steps, policy = resolve_passes(passes), policy_of(precision)

    @functools.partial(jax.jit, static_argnums=0, inline=True)
    def run(constants: _Constants, leaves: list[Any]) -> Any:
        def call(*leaves: Any) -> Any:
            return constants.call(fn, leaves)

        flat = optimized_trace(call, leaves, steps, target, policy)
        return flat.as_fun()(*leaves)

    @functools.wraps(fn)
    def optimized(*args: Any, **kwargs: Any) -> Any:
        return run(*_split(args, kwargs))

    return optimized


def optimized_trace(
    fn: Callable[..., Any],
    args: Sequence[Any],
    passes: str | Sequence[Pass | str],
    target: str | Device | Target | None,
    precision: Precision = None,
) -> ir.Traced:
    """`fn(*args)` traced, and rewritten by `passes` for `target`: what `optimize` runs."""
    policy = policy_of(precision)
    with _unhindered(policy):
        traced = ir.trace(fn, *args)
        closed, _ = _run(traced.closed_jaxpr, with_precision(passes, policy), target)
    return traced.with_jaxpr(closed)


def with_precision(passes: str | Sequence[Pass | str], precision: Precision) -> tuple[Pass, ...]:
    """`passes` with the one that computes products as `precision` says, if there is any to say.

    >>> [step.name for step in with_precision(["inline", "dce"], "bf16-mixed")]
    ['inline', 'precision', 'dce']
    """
    steps, policy = resolve_passes(passes), policy_of(precision)
    if not policy.rules:
        return steps
    names = ", ".join(f"{pattern}: {name}" for pattern, name in policy.rules)
    step = Pass(
        "precision",
        "forward",
        lambda closed, context: in_precision(closed, policy),
        f"products and the activations between them in another precision ({names})",
        exact=False,
    )
    place = next((i for i, s in enumerate(steps) if s.name not in _STRUCTURAL), len(steps))
    return (*steps[:place], step, *steps[place:])


def _unhindered(policy: Policy) -> Any:
    """A context in which products that ask for no precision show none of `configure`'s."""
    return jax.default_matmul_precision(None) if policy.rules else nullcontext()  # pyright: ignore[reportArgumentType]


def inspect(
    fn: Callable[..., Any],
    *args: Any,
    passes: str | Sequence[Pass | str] = "default",
    target: str | Device | Target | None = None,
    precision: Precision = None,
    **kwargs: Any,
) -> "Inspection":
    """What `optimize` does to `fn` on these arguments: arrays or `jax.ShapeDtypeStruct`.

    >>> import jax.numpy as jnp
    >>> found = inspect(lambda x: jnp.sin(x) + jnp.sin(x), jnp.ones(3))
    >>> [row.equations for row in found.passes if row.name == "cse"]
    [(3, 2)]
    """
    constants, leaves = _split(args, kwargs)
    policy = policy_of(precision)
    with _unhindered(policy):
        traced = ir.trace(lambda *leaves: constants.call(fn, leaves), *leaves)
        after, ran = _run(traced.closed_jaxpr, with_precision(passes, policy), target)
    return Inspection(traced.closed_jaxpr, after, tuple(map(report, ran)))


@dataclass(frozen=True)
class Inspection:
    """A program before and after the passes, and what each pass did; prints as a table.

    >>> found = inspect(lambda x: x * 2, 1.0)
    >>> len(found.before.jaxpr.eqns), [row.name for row in found.passes][-1]
    (1, 'dce')
    """

    before: ClosedJaxpr
    after: ClosedJaxpr
    passes: tuple[PassReport, ...]

    def before_pass(self, name: str) -> ClosedJaxpr:
        """The program that the pass called `name` was given.

        Raises `ConfigurationError` if no such pass ran.
        """
        index = self._index(name)
        program = self.passes[index - 1].program if index else self.before
        assert program is not None
        return program

    def after_pass(self, name: str) -> ClosedJaxpr:
        """The program that the pass called `name` returned.

        Raises `ConfigurationError` if no such pass ran.
        """
        program = self.passes[self._index(name)].program
        assert program is not None
        return program

    def operations(self) -> list[dict[str, object]]:
        """Every product, convolution, pooling and attention, and whose code computes it.

        One dict each: the operation, the types of its inputs, the pass whose code it is or "XLA",
        floating-point operations, and the user's source line.

        >>> found = inspect(lambda x: x @ x, jax.ShapeDtypeStruct((4, 4), "float32"), target="cpu")
        >>> [(row["operation"], row["code"], row["flops"]) for row in found.operations()]
        [('dot_general', 'XLA', 128.0)]
        """
        rows: list[dict[str, object]] = []
        for eqn in ir.walk(self.after):
            name, _ = ir.stands_for(eqn)
            if name in _OPERATIONS:
                claimed = eqn.primitive.name != name
                code = eqn.params["chooser"].name if claimed else _OPERATIONS[name]
                row = {
                    "operation": name,
                    "inputs": [str(v.aval) for v in eqn.invars],
                    "code": code,
                    "flops": ir.equation_cost(eqn).flops,
                    "source": ir.source_line(eqn),
                }
                rows.append(row)
        return rows

    def difference(self, other: "Inspection") -> str:
        """The optimized program against that of `other`, as a unified diff of their equations.

        An equation is its operation, types and source line; names of variables are left out.

        >>> twice = lambda x: jax.lax.sin(x) + jax.lax.sin(x)
        >>> merged, both = inspect(twice, 1.0), inspect(twice, 1.0, passes=without("cse"))
        >>> [line.split("  ")[0] for line in merged.difference(both).splitlines()[3:]]
        ['+sin float32[] -> float32[]']
        """
        pair = [[_described(eqn) for eqn in ir.walk(one.after)] for one in (self, other)]
        lines = difflib.unified_diff(pair[0], pair[1], "this", "other", n=0, lineterm="")
        return "\n".join(lines)

    def to_json(self) -> list[dict[str, object]]:
        """One JSON-ready dict per pass."""
        return [report.to_json() for report in self.passes]

    def _index(self, name: str) -> int:
        names = [report.name for report in self.passes]
        if name not in names:
            raise ConfigurationError(
                f"no pass called {name!r} ran",
                expected=f"one of {', '.join(names)}",
                got=repr(name),
                fix="take one of these; others are off on this target, or were disabled",
            )
        return names.index(name)

    def __str__(self) -> str:
        lines = [f"{'pass':<14}{'equations':>14}{'GFLOP':>22}{'GB moved':>22}{'seconds':>9}  +/-"]
        for row in self.passes:
            changed = ", ".join(f"{count:+d} {name}" for name, count in row.changed.items())
            flops = " → ".join(f"{value / 1e9:.3g}" for value in row.flops)
            moved = " → ".join(f"{value / 1e9:.3g}" for value in row.bytes_moved)
            equations = " → ".join(str(count) for count in row.equations)
            lines.append(
                f"{row.name:<14}{equations:>14}{flops:>22}{moved:>22}{row.seconds:>9.3f}  {changed}"
            )
        return "\n".join(lines)


# Whose code computes an operation that no pass has claimed.
_OPERATIONS = {
    **dict.fromkeys(("dot_general", "conv_general_dilated", "cumsum", "sort", "gather"), "XLA"),
    **dict.fromkeys(("reduce_window_max", "reduce_window_sum", "select_and_scatter_add"), "XLA"),
    **dict.fromkeys(("select_and_gather_add", "scatter-add", "random_bits"), "XLA"),
    "attention": "attention",
}


def _described(eqn: ir.JaxprEqn) -> str:
    name, _ = ir.stands_for(eqn)
    if eqn.primitive.name != name:
        name = f"{name} by {eqn.params['chooser'].name}"
    types = ", ".join(v.aval.str_short() for v in eqn.invars)  # pyright: ignore
    made = ", ".join(v.aval.str_short() for v in eqn.outvars)  # pyright: ignore
    return f"{name} {types} -> {made}  # {ir.source_line(eqn)}"


def _run(
    closed: ClosedJaxpr, steps: Sequence[Pass], target: str | Device | Target | None
) -> tuple[ClosedJaxpr, list[Ran]]:
    chosen = resolve_target(target)
    return run_passes(closed, _in_force(steps, chosen), Context(chosen.device))


def _in_force(steps: Sequence[Pass], target: Target) -> list[Pass]:
    return [step for step in steps if target.device.platform in step.platforms]


@dataclass(frozen=True)
class _Constants:
    """The leaves of a call that are not traced, and where the traced ones go."""

    tree: Any
    leaves: tuple[Any, ...]

    def call(self, fn: Callable[..., Any], traced: Sequence[Any]) -> Any:
        rest = iter(traced)
        leaves = [next(rest) if leaf is _TRACED else leaf for leaf in self.leaves]
        args, kwargs = jax.tree.unflatten(self.tree, leaves)
        return fn(*args, **kwargs)


class _Traced:
    """Stands where a traced leaf goes."""


_TRACED = _Traced()


def _split(args: Any, kwargs: Any) -> tuple[_Constants, list[Any]]:
    leaves, tree = jax.tree.flatten((args, kwargs))
    traced = [
        hasattr(leaf, "dtype")
        or (isinstance(leaf, int | float | complex) and not isinstance(leaf, bool))
        for leaf in leaves
    ]
    kept = tuple(_TRACED if t else leaf for t, leaf in zip(traced, leaves, strict=True))
    return _Constants(tree, kept), [leaf for t, leaf in zip(traced, leaves, strict=True) if t]
