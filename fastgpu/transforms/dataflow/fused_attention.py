"""Softmax attention as one operation: cuDNN's kernel on a GPU, matrix products elsewhere.

The kernel never writes the scores to memory, neither forward nor in the gradient, which computes
them again from q, k and one number for each query (Dao et al. 2022, arXiv:2205.14135). JAX reaches
it by a `custom_vjp`, and that ends forward mode and second derivatives. So here the operation is a
primitive in three parts: "forward" gives the result and each query's logsumexp; "tangent" is its
derivative, whose transpose is "backward", the kernel's gradient. All other derivatives are those of
the plain formula.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fastgpu.ir.compat import (
    ClosedJaxpr,
    Primitive,
    define_primitive,
    eval_jaxpr,
    is_linear_input,
    is_zero,
)
from fastgpu.transforms.inline import inline_calls

_log = logging.getLogger("fastgpu")
# JAX's name for the kernel's forward half begins with this.
_KERNEL = "dot_product_attention_fwd"


class Form(NamedTuple):
    """What is static: the factor of the scores, a causal mask, and whether there are a bias and a
    mask, each of shape [B or 1, N or 1, T or 1, S or 1]; a mask is true where a key is seen."""

    scale: float
    causal: bool = False
    bias: bool = False
    mask: bool = False


def attention(form: Form, q: jax.Array, k: jax.Array, v: jax.Array, *extras: jax.Array) -> Any:
    """Attention of `q` [B, T, N, D] to `k` and `v` [B, S, K, D]; N a multiple of K.

    `extras` are the bias and the mask that `form` says there are.
    """
    return _bind(form, "forward", q, k, v, *extras)[0]


def kernel_takes(form: Form, *args: Any) -> bool:
    """Whether cuDNN's kernel, as installed here, computes this attention and its gradient."""
    return _kernel(form, args) is not None


def _bind(form: Form, part: str, *args: Any) -> list[Any]:
    # In the params so that JAX sees that what is in it asks for devices when it is lowered.
    kernel = _kernel(form, args[: _inputs(form)])
    return attention_p.bind(*args, form=form, part=part, kernel=kernel)


def _inputs(form: Form) -> int:
    return 3 + form.bias + form.mask


def _plain(form: Form, q: Any, k: Any, v: Any, *extras: Any) -> tuple[Any, Any]:
    """The definition: the result, and the logsumexp of each query's scores, [B, N, T]."""
    rest = list(extras)
    batch, queries, heads, features = q.shape
    groups = k.shape[2]
    grouped = q.reshape(batch, queries, groups, heads // groups, features)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, k, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, heads, queries, k.shape[1]) * form.scale
    if form.bias:
        scores = scores + rest.pop(0).astype(jnp.float32)
    lowest = jnp.float32(-2e38)
    if form.mask:
        scores = jnp.where(rest.pop(0), scores, lowest)
    if form.causal:
        places = [lax.broadcasted_iota(jnp.int32, scores.shape[2:], axis) for axis in (0, 1)]
        scores = jnp.where(places[0] >= places[1], scores, lowest)
    logsumexp = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.exp(scores - logsumexp[..., None]).astype(v.dtype)
    weights = weights.reshape(batch, groups, heads // groups, queries, k.shape[1])
    out = jnp.einsum("bkgts,bskd->btkgd", weights, v)
    return out.reshape(batch, queries, heads, v.shape[-1]), logsumexp


def _plain_part(form: Form, part: str) -> Callable[..., list[Any]]:
    """The part as a function of all its inputs, by the definition."""
    count = _inputs(form)

    def forward(*args: Any) -> list[Any]:
        return list(_plain(form, *args))

    def result_of(extras: Sequence[Any]) -> Callable[..., Any]:
        return lambda q, k, v: _plain(form, q, k, v, *extras)[0]

    def tangent(*args: Any) -> list[Any]:
        return [jax.jvp(result_of(args[3:count]), args[:3], args[count + 2 :])[1]]

    def backward(*args: Any) -> list[Any]:
        return list(jax.vjp(result_of(args[3:count]), *args[:3])[1](args[-1]))

    return {"forward": forward, "tangent": tangent, "backward": backward}[part]


def _kernel(form: Form, args: Sequence[Any]) -> ClosedJaxpr | None:
    """Result and gradient by cuDNN as one program of the inputs and the cotangent."""
    q, k, v = args[:3]
    features = q.shape[-1]
    if v.shape[-1] != features or features % 8 or features > 128:
        return None
    if (form.bias or form.mask) and (q.shape[1] % 2 or k.shape[1] % 2):
        return None
    if q.dtype not in (jnp.bfloat16, jnp.float16) or not q.dtype == k.dtype == v.dtype:
        return None
    try:
        found = _kernel_for(form, tuple(_struct(x) for x in args))
    except RuntimeError as error:  # how JAX says that there is no cuDNN
        _warn_once(str(error))
        return None
    except (NotImplementedError, ValueError):  # how JAX says that the kernel does not
        return None
    return found if _forward_half(found) is not None else None


@functools.cache
def _warn_once(reason: str) -> None:
    _log.warning(
        "attention is left as it is, which needs more memory and time: %s "
        "Where the program runs cuDNN is there; to plan for it, pip install 'fastgpu[cudnn]'",
        reason,
    )


@functools.cache
def _kernel_for(form: Form, structs: tuple[Any, ...]) -> ClosedJaxpr:
    def call(q: Any, k: Any, v: Any, *extras: Any) -> Any:
        rest = list(extras)
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            bias=rest.pop(0) if form.bias else None,
            mask=rest.pop(0) if form.mask else None,
            scale=form.scale,
            is_causal=form.causal,
            implementation="cudnn",
        )

    def both(*args: Any) -> Any:
        out, pull = jax.vjp(lambda q, k, v: call(q, k, v, *args[3:-1]), *args[:3])
        return out, *pull(args[-1])

    return inline_calls(jax.make_jaxpr(both)(*structs, structs[0]))


def _forward_half(kernel: ClosedJaxpr) -> int | None:
    """The place of the equation that gives the result and the logsumexp."""
    eqns = kernel.jaxpr.eqns
    places = [i for i, eqn in enumerate(eqns) if eqn.primitive.name.startswith(_KERNEL)]
    return places[0] if len(places) == 1 and len(eqns[places[0]].outvars) == 2 else None


def _kernel_part(kernel: ClosedJaxpr, part: str) -> Callable[..., list[Any]]:
    jaxpr, place = kernel.jaxpr, _forward_half(kernel)
    assert place is not None
    forward = jaxpr.eqns[place]
    if part == "forward":
        half = jaxpr.replace(
            eqns=jaxpr.eqns[: place + 1], invars=jaxpr.invars[:-1], outvars=forward.outvars
        )
        return lambda *args: eval_jaxpr(half, kernel.consts, *args)
    half = jaxpr.replace(
        eqns=[eqn for eqn in jaxpr.eqns if eqn is not forward],
        invars=[*jaxpr.invars[:-1], *forward.outvars, jaxpr.invars[-1]],
        outvars=jaxpr.outvars[1:],
    )
    return lambda *args: eval_jaxpr(half, kernel.consts, *args)


def _struct(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


# Compiled once for equal layers.
@functools.partial(jax.jit, static_argnames=("form", "part", "kernel"))
def _run(*args: Any, form: Form, part: str, kernel: ClosedJaxpr | None) -> list[Any]:
    plain = _plain_part(form, part)
    if part == "tangent" or kernel is None:
        return plain(*args)
    return lax.platform_dependent(*args, cuda=_kernel_part(kernel, part), default=plain)


def _out_avals(*avals: Any, form: Form, part: str, kernel: ClosedJaxpr | None) -> list[Any]:
    return jax.make_jaxpr(_plain_part(form, part))(*avals).out_avals


def _jvp(primals: Any, tangents: Any, *, form: Form, part: str, kernel: Any) -> Any:
    plain = _plain_part(form, part)
    if part == "forward" and all(is_zero(t) for t in tangents[3:]):
        results = _bind(form, part, *primals)
        moving = [
            jnp.zeros(x.shape, x.dtype) if is_zero(t) else t
            for x, t in zip(primals, tangents[:3], strict=False)
        ]
        (change,) = _bind(form, "tangent", *primals, *results, *moving)
        # Only the parts here read the logsumexp; their own derivatives do not use its tangent.
        return results, [change, jnp.zeros(results[1].shape, results[1].dtype)]
    active = [i for i, t in enumerate(tangents) if not is_zero(t)]

    def of_active(*values: Any) -> list[Any]:
        merged = list(primals)
        for index, value in zip(active, values, strict=True):
            merged[index] = value
        return plain(*merged)

    moving = tuple(tangents[i] for i in active)
    return jax.jvp(of_active, tuple(primals[i] for i in active), moving)


def _transpose(cts: Any, *args: Any, form: Form, part: str, kernel: Any) -> list[Any]:
    result: list[Any] = [None] * len(args)
    if all(is_zero(ct) for ct in cts):
        return result
    linear = [i for i, arg in enumerate(args) if is_linear_input(arg)]
    if part == "tangent" and min(linear) >= len(args) - 3:
        pulled = _bind(form, "backward", *args[:-3], cts[0])
        for index in linear:
            result[index] = pulled[index - len(args)]
        return result

    def of_linear(*values: Any) -> list[Any]:
        merged = list(args)
        for index, value in zip(linear, values, strict=True):
            merged[index] = value
        return _plain_part(form, part)(*merged)

    structs = [_struct(args[i].aval) for i in linear]
    pulled = jax.linear_transpose(of_linear, *structs)(list(cts))
    for index, value in zip(linear, pulled, strict=True):
        result[index] = value
    return result


def _batch(args: Any, dims: Any, *, form: Form, part: str, kernel: Any) -> Any:
    """The mapped axis becomes a part of the batch's."""
    (size,) = {x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None}
    batch = args[0].shape[1 if dims[0] == 0 else 0]
    extras = range(3, _inputs(form))

    def merged(place: int, x: Any, d: int | None) -> Any:
        if d is None and place in extras and x.shape[0] == 1:
            return x
        x = jnp.broadcast_to(x, (size, *x.shape)) if d is None else jnp.moveaxis(x, d, 0)
        if place in extras:
            x = jnp.broadcast_to(x, (size, batch, *x.shape[2:]))
        return x.reshape(size * batch, *x.shape[2:])

    values = [merged(i, x, d) for i, (x, d) in enumerate(zip(args, dims, strict=True))]
    out = _bind(form, part, *values)
    return [x.reshape(size, batch, *x.shape[1:]) for x in out], [0] * len(out)


attention_p: Primitive = define_primitive("attention", _run, _out_avals, _jvp, _transpose, _batch)
