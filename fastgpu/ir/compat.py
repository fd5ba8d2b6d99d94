"""Every JAX name that may move between releases, behind names that stay.

The rest of fastgpu sees jaxprs through this file alone: when a JAX release renames something, the
change is here.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.core import AbstractValue, ShapedArray, Tracer, eval_jaxpr
from jax.extend import source_info_util
from jax.extend.core import (
    ClosedJaxpr,
    DropVar,
    Jaxpr,
    JaxprEqn,
    Literal,
    Primitive,
    Var,
    check_jaxpr,
    jaxpr_as_fun,
)
from jax.interpreters import ad, batching, mlir
from jax.interpreters.partial_eval import dce_jaxpr

__all__ = [
    "AbstractValue",
    "ClosedJaxpr",
    "DropVar",
    "Jaxpr",
    "JaxprEqn",
    "Literal",
    "Primitive",
    "ShapedArray",
    "Tracer",
    "Var",
    "bind",
    "check_jaxpr",
    "dce",
    "define_primitive",
    "eval_jaxpr",
    "is_linear_input",
    "is_plain_call",
    "is_zero",
    "jaxpr_as_fun",
    "map_sub_jaxprs",
    "on_host",
    "platform",
    "scope",
    "shard_mapped",
    "source_line",
    "sub_jaxprs",
    "with_borders",
    "within_scope",
]

# Primitives whose sub-jaxprs are programs of the user's (a reducer of `scatter` is none).
_PROGRAM_PARAMS = {
    "jit": ("jaxpr",),
    "pjit": ("jaxpr",),
    "closed_call": ("call_jaxpr",),
    "core_call": ("call_jaxpr",),
    "remat2": ("jaxpr",),
    "checkpoint": ("jaxpr",),
    "scan": ("jaxpr",),
    "while": ("cond_jaxpr", "body_jaxpr"),
    "cond": ("branches",),
    "custom_jvp_call": ("call_jaxpr",),
    "custom_vjp_call": ("call_jaxpr",),
    "custom_vjp_call_jaxpr": ("call_jaxpr",),
    "shard_map": ("jaxpr",),
}


def on_host(aval: AbstractValue) -> bool:
    """Whether a value of this type lies in the host's memory, not in the device's."""
    return getattr(aval, "memory_space", None) == jax.memory.Space.Host


def sub_jaxprs(eqn: JaxprEqn) -> list[Jaxpr]:
    """The programs that a higher-order equation runs, without their constants."""
    found = []
    for name in _PROGRAM_PARAMS.get(eqn.primitive.name, ()):
        value = eqn.params[name]
        for sub in value if isinstance(value, tuple | list) else (value,):
            found.append(sub.jaxpr if isinstance(sub, ClosedJaxpr) else sub)
    return found


def map_sub_jaxprs(eqn: JaxprEqn, change: Callable[[ClosedJaxpr], ClosedJaxpr]) -> dict[str, Any]:
    """`eqn.params` with `change` applied to every program in it.

    An open jaxpr (that of `jax.checkpoint`, `shard_map`) has no place for constants: when `change`
    makes some, that one program stays as it was.
    """

    def apply(sub: ClosedJaxpr | Jaxpr) -> ClosedJaxpr | Jaxpr:
        if isinstance(sub, ClosedJaxpr):
            return change(sub)
        changed = change(ClosedJaxpr(sub, ()))
        return sub if changed.consts else changed.jaxpr

    params = dict(eqn.params)
    for name in _PROGRAM_PARAMS.get(eqn.primitive.name, ()):
        value = params[name]
        params[name] = (
            type(value)(apply(sub) for sub in value)
            if isinstance(value, tuple | list)
            else apply(value)
        )
    return params


def bind(eqn: JaxprEqn, values: Sequence[Any], params: dict[str, Any] | None = None) -> list[Any]:
    """Apply `eqn`'s primitive to `values`; always a list of outputs."""
    bound = eqn.primitive.get_bind_params(eqn.params if params is None else params)
    outputs = eqn.primitive.bind(*values, **bound)
    return list(outputs) if eqn.primitive.multiple_results else [outputs]


def shard_mapped(eqn: JaxprEqn, body: Callable[..., list[Any]], values: Sequence[Any]) -> list[Any]:
    """The `shard_map` equation `eqn` with another body: under it the mesh's axes have names."""
    params = eqn.params
    mapped = jax.shard_map(
        body,
        mesh=params["mesh"],
        in_specs=tuple(params["in_specs"]),
        out_specs=list(params["out_specs"]),
        axis_names=set(params["newly_manual_axes"]),
        check_vma=params["check_vma"],
    )
    return list(mapped(*values))


def scope(eqn: JaxprEqn):
    """A context for tracing in `eqn`'s place: its source line, name scope, mesh and flags."""
    stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
    context = source_info_util.user_context(eqn.source_info.traceback, name_stack=stack)
    return _Both(context, eqn.ctx.manager)


def within_scope(eqn: JaxprEqn, caller: JaxprEqn) -> JaxprEqn:
    """`eqn`, an equation of the program that `caller` calls, with the name scopes of the call."""
    name = caller.params.get("name", caller.primitive.name)
    inner = eqn.source_info.name_stack
    stack = caller.source_info.name_stack.extend(name) + inner
    return eqn.replace(source_info=eqn.source_info.replace(name_stack=stack))


class _Both:
    def __init__(self, outer: Any, inner: Any) -> None:
        self.outer, self.inner = outer, inner

    def __enter__(self) -> None:
        self.outer.__enter__()
        self.inner.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.inner.__exit__(*error)
        self.outer.__exit__(*error)


def is_plain_call(eqn: JaxprEqn) -> bool:
    """Whether `eqn` is a call without placement, layout, donation or compiler options."""
    if eqn.primitive.name in ("closed_call", "core_call"):
        return True
    if eqn.primitive.name not in ("jit", "pjit"):
        return False
    placed = [
        *eqn.params["in_shardings"],
        *eqn.params["out_shardings"],
        *(layout for layout in eqn.params["in_layouts"] if layout is not None),
        *(layout for layout in eqn.params["out_layouts"] if layout is not None),
    ]
    return (
        all(type(spec).__name__ == "UnspecifiedValue" for spec in placed)
        and not any(eqn.params["donated_invars"])
        and not eqn.params["compiler_options_kvs"]
    )


def dce(closed: ClosedJaxpr) -> ClosedJaxpr:
    """Drop equations whose results nobody reads and which have no effects; inputs all stay."""
    jaxpr, _ = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True)
    read = {v for eqn in jaxpr.eqns for v in eqn.invars if isinstance(v, Var)}
    read |= {v for v in jaxpr.outvars if isinstance(v, Var)}
    kept = [(v, c) for v, c in zip(closed.jaxpr.constvars, closed.consts, strict=True) if v in read]
    jaxpr = jaxpr.replace(constvars=[v for v, _ in kept], debug_info=closed.jaxpr.debug_info)
    return ClosedJaxpr(jaxpr, [c for _, c in kept])


def with_borders(jaxpr: Jaxpr, **changes: Any) -> Jaxpr:
    """`jaxpr.replace` for other inputs or outputs: the names of the old ones are dropped."""
    unnamed = jaxpr.debug_info._replace(arg_names=None, result_paths=None)
    return jaxpr.replace(debug_info=unnamed, **changes)


def source_line(eqn: JaxprEqn) -> str:
    """The user's source line of `eqn` as `file:line (function)`, or an empty string."""
    return source_info_util.summarize(eqn.source_info)


def platform() -> str:
    """The platform that JAX runs on now: "cpu", "gpu" or "tpu". Starts the backend."""
    return jax.default_backend()


def define_primitive(
    name: str,
    run: Callable[..., list[Any]],
    out_avals: Callable[..., list[AbstractValue]],
    jvp: Callable[..., Any],
    transpose: Callable[..., Any],
    batch: Callable[..., Any],
) -> Primitive:
    """A primitive with several results that compiles to the JAX function `run`."""
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_impl(run)
    primitive.def_abstract_eval(out_avals)
    ad.primitive_jvps[primitive] = jvp
    ad.primitive_transposes[primitive] = transpose
    batching.primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, mlir.lower_fun(run, multiple_results=True))
    return primitive


def is_linear_input(value: Any) -> bool:
    """In a transpose rule: whether `value` stands for an input to be transposed."""
    return ad.is_undefined_primal(value)


def is_zero(tangent: Any) -> bool:
    """In a derivative rule: whether `tangent` is a symbolic zero."""
    return isinstance(tangent, ad.Zero)
