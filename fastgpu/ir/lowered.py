"""An equation that computes what it always did, by other code.

`lowered` stands in for an equation of another primitive and compiles to a JAX function that is
faster on the target. To differentiation and batching it still is the primitive that it stands for:
its derivative, transpose and batched form are those that JAX defines, and each of these is offered
to the same chooser again. So a convolution and its two gradients each get the code that suits them,
and forward mode, reverse mode, higher derivatives and `vmap` all keep working.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from fastgpu.ir.compat import (
    ClosedJaxpr,
    JaxprEqn,
    Primitive,
    define_primitive,
    eval_jaxpr,
    is_linear_input,
    is_zero,
    map_sub_jaxprs,
    sub_jaxprs,
)


@dataclass(frozen=True)
class Site:
    """Where a primitive is applied: what a chooser looks at."""

    primitive: Primitive
    params: tuple[tuple[str, Any], ...]
    in_avals: tuple[Any, ...]
    out_avals: tuple[Any, ...]

    def __getitem__(self, name: str) -> Any:
        return dict(self.params)[name]


@dataclass(frozen=True)
class Chooser:
    """How to pick code for the primitives named: `choose(site)` gives a function of the inputs.

    `choose` must be a pure function of the site: it is asked again when the program is compiled.
    """

    name: str
    primitives: tuple[str, ...]
    choose: Callable[[Site], Callable[..., Any] | None]

    def params_for(self, eqn: JaxprEqn) -> dict[str, Any] | None:
        """The params of the `lowered` equation that may replace `eqn`, or `None`."""
        if eqn.primitive.name not in self.primitives:
            return None
        settings = tuple(sorted(eqn.params.items()))
        in_avals = tuple(v.aval for v in eqn.invars)
        site = Site(eqn.primitive, settings, in_avals, tuple(v.aval for v in eqn.outvars))
        if self.choose(site) is None:
            return None
        return {"of": eqn.primitive, "settings": settings, "chooser": self}


def lower_by(closed: ClosedJaxpr, chooser: Chooser) -> ClosedJaxpr:
    """Put `lowered` in place of every equation, nested ones included, that has other code.

    Only the equations that change are touched, so nothing is traced again.

    >>> import jax, jax.numpy as jnp
    >>> chooser = Chooser("by_table", ("sin",), lambda site: jnp.sin)
    >>> closed = lower_by(jax.make_jaxpr(lambda x: jnp.sin(x) + 1)(1.0), chooser)
    >>> [(eqn.primitive.name, stands_for(eqn)[0]) for eqn in closed.jaxpr.eqns]
    [('lowered', 'sin'), ('add', 'add')]
    """

    def change(eqn: JaxprEqn) -> JaxprEqn:
        if sub_jaxprs(eqn):
            return eqn.replace(params=map_sub_jaxprs(eqn, lambda sub: lower_by(sub, chooser)))
        params = chooser.params_for(eqn)
        return eqn if params is None else eqn.replace(primitive=lowered_p, params=params)

    jaxpr = closed.jaxpr.replace(eqns=[change(eqn) for eqn in closed.jaxpr.eqns])
    return ClosedJaxpr(jaxpr, closed.consts)


def stands_for(eqn: JaxprEqn) -> tuple[str, dict[str, Any]]:
    """The primitive's name and params that `eqn` means: those it stands for, if it is `lowered`."""
    if eqn.primitive is lowered_p:
        return eqn.params["of"].name, dict(eqn.params["settings"])
    return eqn.primitive.name, eqn.params


def _apply_original(primitive: Primitive, params: Any) -> Callable[..., list[Any]]:
    def apply(*args: Any) -> list[Any]:
        out = primitive.bind(*args, **primitive.get_bind_params(dict(params)))
        return list(out) if primitive.multiple_results else [out]

    return apply


def _rerewritten(fn: Callable[..., Any], args: Sequence[Any], chooser: Chooser) -> Any:
    """`fn(*args)`, with the chooser's code for the equations that it traces to."""
    leaves, tree = jax.tree.flatten(tuple(args))
    out_tree = None

    def flat(*leaves: Any) -> list[Any]:
        nonlocal out_tree
        out, out_tree = jax.tree.flatten(fn(*jax.tree.unflatten(tree, leaves)))
        return out

    closed = jax.make_jaxpr(flat)(*leaves)
    closed = lower_by(closed, chooser)
    out = eval_jaxpr(closed.jaxpr, closed.consts, *leaves)
    assert out_tree is not None
    return jax.tree.unflatten(out_tree, out)


def _out_avals(*avals: Any, of: Primitive, settings: Any, chooser: Chooser) -> list[Any]:
    return jax.make_jaxpr(_apply_original(of, settings))(*avals).out_avals


# Compiled once for equal sites: deep networks repeat their blocks.
@partial(jax.jit, static_argnames=("of", "settings", "chooser"))
def _run(*args: Any, of: Primitive, settings: Any, chooser: Chooser) -> list[Any]:
    avals = tuple(jax.typeof(arg) for arg in args)
    outs = _out_avals(*avals, of=of, settings=settings, chooser=chooser)
    fast = chooser.choose(Site(of, settings, avals, tuple(outs)))
    out = (fast or _apply_original(of, settings))(*args)
    return list(out) if isinstance(out, list | tuple) else [out]


def _jvp(primals: Any, tangents: Any, *, of: Primitive, settings: Any, chooser: Chooser):
    original = _apply_original(of, settings)
    active = [i for i, tangent in enumerate(tangents) if not is_zero(tangent)]

    def push(primals: Any, moving: Any) -> Any:
        def of_active(*values: Any) -> list[Any]:
            merged = list(primals)
            for index, value in zip(active, values, strict=True):
                merged[index] = value
            return original(*merged)

        return jax.jvp(of_active, tuple(primals[i] for i in active), tuple(moving))

    return _rerewritten(push, (tuple(primals), tuple(tangents[i] for i in active)), chooser)


def _transpose(cts: Any, *args: Any, of: Primitive, settings: Any, chooser: Chooser):
    original = _apply_original(of, settings)
    linear = [i for i, arg in enumerate(args) if is_linear_input(arg)]
    fixed = tuple(None if is_linear_input(arg) else arg for arg in args)
    if all(is_zero(ct) for ct in cts):
        return [None] * len(args)
    templates = tuple(jax.ShapeDtypeStruct(args[i].aval.shape, args[i].aval.dtype) for i in linear)

    def pull(cts: Any, fixed: Any) -> Any:
        def of_linear(*values: Any) -> list[Any]:
            merged = list(fixed)
            for index, value in zip(linear, values, strict=True):
                merged[index] = value
            return original(*merged)

        return jax.linear_transpose(of_linear, *templates)(list(cts))

    pulled = _rerewritten(pull, (tuple(cts), fixed), chooser)
    result: list[Any] = [None] * len(args)
    for index, value in zip(linear, pulled, strict=True):
        result[index] = value
    return result


def _batch(args: Any, dims: Any, *, of: Primitive, settings: Any, chooser: Chooser):
    batched = jax.vmap(_apply_original(of, settings), in_axes=tuple(dims))
    out = _rerewritten(batched, tuple(args), chooser)
    return out, [0] * len(out)


lowered_p = define_primitive("lowered", _run, _out_avals, _jvp, _transpose, _batch)
