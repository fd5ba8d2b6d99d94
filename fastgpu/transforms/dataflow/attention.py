"""Softmax attention, however it is written, by a kernel that never writes the scores to memory.

Recognised is what attention does, not how: from the product that a softmax's result goes into, back
through the softmax and through scales, masks, biases, casts and moved dimensions, to the product of
queries and keys. Any order of dimensions, any split of heads (grouped queries too) and every mask
that fills with a very negative number is found; a mask that depends on no input is looked at, and
if it is the lower triangle the kernel skips what it hides. Left as it is: what the kernel does not
compute (dropout of the weights, float32), and attention whose weights are read by others. A query
that a mask hides from every key gets the mean of the values, also where it was filled with -inf and
would have got NaN.
"""

import jax

from fastgpu.hardware import Geometry
from fastgpu.ir.compat import ClosedJaxpr, JaxprEqn, map_sub_jaxprs, platform, sub_jaxprs
from fastgpu.transforms.dataflow.attention_match import attentions
from fastgpu.transforms.pipeline import Context

# GPUs before Ampere have no such kernel.
_LEAST_CAPABILITY = (8, 0)


def fuse_attention(closed: ClosedJaxpr, context: Context) -> ClosedJaxpr:
    """`closed` with each attention that cuDNN's kernel computes as one operation.

    >>> import jax.numpy as jnp
    >>> from fastgpu.transforms.inline import inline_calls
    >>> from fastgpu.hardware import device
    >>> def attend(q, k, v):
    ...     weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / 8)
    ...     return jnp.einsum("bhqk,bkhd->bqhd", weights, v)
    >>> q = jax.ShapeDtypeStruct((1, 512, 2, 64), jnp.bfloat16)
    >>> closed = inline_calls(jax.make_jaxpr(attend)(q, q, q))
    >>> fused = fuse_attention(closed, Context(device("h100")))
    >>> "attention" in [eqn.primitive.name for eqn in fused.jaxpr.eqns]
    True
    """
    geometry = context.device.geometry
    if not isinstance(geometry, Geometry) or geometry.compute_capability < _LEAST_CAPABILITY:
        return closed
    if platform() == "gpu":  # which may be one that the profiles do not know
        major, minor = jax.devices()[0].compute_capability.split(".")
        if (int(major), int(minor)) < _LEAST_CAPABILITY:
            return closed
    return _fused(closed)


def _fused(closed: ClosedJaxpr) -> ClosedJaxpr:
    jaxpr = closed.jaxpr
    known = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    found = {id(site.result): site for site in attentions(jaxpr, known)}
    eqns: list[JaxprEqn] = []
    for eqn in jaxpr.eqns:
        site = found.get(id(eqn))
        if site is not None:
            eqns += site.fused()
        elif sub_jaxprs(eqn):
            eqns.append(eqn.replace(params=map_sub_jaxprs(eqn, _fused)))
        else:
            eqns.append(eqn)
    return ClosedJaxpr(jaxpr.replace(eqns=eqns), closed.consts)
