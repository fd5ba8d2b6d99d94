"""1x1 convolutions as matrix products.

A convolution whose window has one element, or that has one output position, is a contraction: over
the features in the first case (a 1x1 convolution and its input gradient), over features and space
in the second (its weight gradient). XLA's CPU backend runs these as general convolutions: up to
1.5 times slower than the matrix product, and 3 to 7 times for the weight gradient
(`benchmarks/lowerings.py`).
"""

from collections.abc import Callable

import jax
from jax import lax

from fastgpu.ir.lowered import Chooser, Site
from fastgpu.transforms.dataflow.convolution import Convolution


def choose(site: Site) -> Callable[..., jax.Array] | None:
    """Code for a pointwise convolution or one of its gradients; `None` for any other."""
    conv = Convolution.of(site)
    if conv is None or conv.feature_groups != 1 or conv.batch_groups != 1:
        return None
    if all(size == 1 for size in conv.window):
        fits = all(_one_tap(conv, d) for d in range(len(conv.window)))
        return (lambda lhs, rhs: _pointwise(conv, site, lhs, rhs)) if fits else None
    if all(size == 1 for size in conv.out_spatial):
        return lambda lhs, rhs: _full_contraction(conv, site, lhs, rhs)
    return None


def _one_tap(conv: Convolution, d: int) -> bool:
    # Dilation and stride together would sample the zeros between elements: rare, left to XLA.
    return conv.lhs_dilation[d] == 1 or conv.strides[d] == 1


def _dot(site: Site, lhs: jax.Array, rhs: jax.Array, contract: int) -> jax.Array:
    """Contract the last `contract` dimensions of `lhs` with the first of `rhs`."""
    axes = (tuple(range(lhs.ndim - contract, lhs.ndim)), tuple(range(contract)))
    return lax.dot_general(
        lhs,
        rhs,
        (axes, ((), ())),
        precision=site["precision"],
        preferred_element_type=site["preferred_element_type"],
    )


def _pointwise(conv: Convolution, site: Site, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    lhs = conv.lhs_last(lhs)
    if all(d == 1 for d in conv.lhs_dilation):
        lhs = conv.padded(lhs)
        limits = [(n - 1) * s + 1 for n, s in zip(conv.out_spatial, conv.strides, strict=True)]
        lhs = lax.slice(
            lhs,
            (0,) * lhs.ndim,
            (conv.batch, *limits, conv.in_features),
            (1, *conv.strides, 1),
        )
    kernel = conv.rhs_last(rhs).reshape(conv.in_features, conv.out_features)
    rows = lhs.reshape(-1, conv.in_features)
    out = _dot(site, rows, kernel, 1).reshape(*lhs.shape[:-1], conv.out_features)
    if any(d > 1 for d in conv.lhs_dilation):
        # Zeros between the inputs give zeros between the outputs: cheaper to add them afterwards.
        out = conv.padded(out)
    return conv.from_last(out)


def _full_contraction(conv: Convolution, site: Site, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    lhs = conv.padded(conv.lhs_last(lhs))
    reach = [(k - 1) * d + 1 for k, d in zip(conv.window, conv.rhs_dilation, strict=True)]
    lhs = lax.slice(
        lhs,
        (0,) * lhs.ndim,
        (conv.batch, *reach, conv.in_features),
        (1, *conv.rhs_dilation, 1),
    )
    out = _dot(site, lhs, conv.rhs_last(rhs), lhs.ndim - 1)
    shape = (conv.batch, *conv.out_spatial, conv.out_features)
    return conv.from_last(out.reshape(shape))


CHOOSER = Chooser("pointwise", ("conv_general_dilated",), choose)
