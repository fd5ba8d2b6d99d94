"""Attention, written in many ways: found, with the numbers and derivatives that it had."""

import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fastgpu as fgpu
from fastgpu import ir
from fastgpu.compile import compile_for
from fastgpu.transforms import inspect

BATCH, LENGTH, HEADS, FEATURES = 2, 256, 2, 64
TRIANGLE = np.tri(LENGTH, dtype=bool)


def linen(q, k, v):
    return nn.dot_product_attention(q, k, v, mask=nn.make_causal_mask(q[..., 0, 0]))


def linen_padded(q, k, v):
    seen = jnp.arange(k.shape[1]) < jnp.array([[200], [100]])
    return nn.dot_product_attention(q, k, v, mask=seen[:, None, None])


def jax_nn(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def grouped(q, k, v):
    return jax.nn.dot_product_attention(q, k[:, :, :1], v[:, :, :1])


def heads_first(q, k, v):
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
    scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf)
    return (jax.nn.softmax(scores, -1) @ v).transpose(0, 2, 1, 3)


def by_hand(q, k, v):
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    weights = weights / weights.sum(-1, keepdims=True)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def one_example(q, k, v):
    scores = jnp.einsum("qhd,khd->hqk", q, k).astype(jnp.float32) / 8
    weights = jnp.exp(jax.nn.log_softmax(scores)).astype(q.dtype)
    return jnp.einsum("hqk,khd->qhd", weights, v)


def one_key_head(q, k, v):
    """Queries first in the softmax's dimensions, one head of keys and values for all."""
    scores = jnp.einsum("bqhd,bkd->bqhk", q, k[:, :, 0])
    hidden = jnp.arange(k.shape[1]) > jnp.arange(q.shape[1])[:, None]
    scores = jnp.where(hidden[None, :, None], jnp.asarray(-1e9, scores.dtype), scores / 8)
    return jnp.einsum("bqhk,bkd->bqhd", jax.nn.softmax(scores), v[:, :, 0])


def biased(q, k, v):
    distance = -jnp.abs(jnp.arange(q.shape[1])[:, None] - jnp.arange(k.shape[1]))
    slopes = (2.0 ** -jnp.arange(1, HEADS + 1)).astype(q.dtype)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / 8
    weights = jax.nn.softmax(scores + slopes[:, None, None] * distance.astype(q.dtype))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


WAYS = {
    "linen": linen,
    "linen, padded": linen_padded,
    "jax.nn": jax_nn,
    "grouped queries": grouped,
    "heads first": heads_first,
    "by hand": by_hand,
    "one example, mapped": jax.vmap(one_example),
    "one key head": one_key_head,
    "biased": biased,
}
CAUSAL = {"linen", "jax.nn", "heads first", "one key head"}
MASKED = {"linen, padded"}


def arrays(length=LENGTH, dtype=jnp.bfloat16, features=FEATURES):
    keys = jax.random.split(jax.random.key(0), 3)
    shape = (BATCH, length, HEADS, features)
    return [jax.random.normal(key, shape).astype(dtype) for key in keys]


def fused(fn, *args, target="h100"):
    """The attentions of `fn` after the passes, as equations."""
    after = inspect(fn, *args, target=target).after
    return [eqn for eqn in ir.walk(after) if eqn.primitive.name == "attention"]


def loss_of(attend):
    def loss(q, k, v):
        out = attend(q, k, v).astype(jnp.float32)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape)))

    return loss


def distance(one, two):
    pairs = list(zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True))
    parts = [np.linalg.norm(np.asarray(a, float) - np.asarray(b, float)) for a, b in pairs]
    return np.linalg.norm(parts) / np.linalg.norm([np.linalg.norm(np.asarray(b)) for _, b in pairs])


@pytest.mark.parametrize("way", WAYS)
def test_attention_is_found_and_keeps_its_numbers(way):
    args = arrays()
    [found] = fused(WAYS[way], *args)
    form = found.params["form"]
    assert (form.causal, form.mask, form.bias) == (way in CAUSAL, way in MASKED, way == "biased")
    shapes = [getattr(v.aval, "shape", ()) for v in found.invars]
    assert (BATCH, HEADS, LENGTH, LENGTH) not in shapes

    def all_of(fn, args):
        return fn(*args), jax.grad(loss_of(fn), argnums=(0, 1, 2))(*args)

    exact = all_of(WAYS[way], [x.astype(jnp.float32) for x in args])
    plain = distance(all_of(WAYS[way], args), exact)
    fast = distance(all_of(fgpu.optimize(WAYS[way], target="h100"), args), exact)
    # bfloat16's roundings, and no more of them than before.
    assert 1e-4 < plain < 2e-2
    assert fast < 1.1 * plain


@pytest.mark.parametrize("way", ["linen, padded", pytest.param("biased", marks=pytest.mark.slow)])
def test_all_derivatives_and_vmap_are_those_of_the_original(way):
    original, fast = WAYS[way], fgpu.optimize(WAYS[way], target="h100")
    args = arrays()
    tangents = [jnp.roll(x, 1, 0) for x in args]

    def forward_mode(fn):
        return jax.jvp(fn, args, tangents)[1]

    def twice(fn):
        return jax.jvp(jax.grad(loss_of(fn), argnums=(0, 1)), args, tangents)[1]

    def mapped(fn):
        stacked = [jnp.stack([x, x[::-1]], 1) for x in args]
        gradient = jax.grad(lambda q, k, v: loss_of(fn)(q, k, v), argnums=(0, 2))
        return jax.vmap(gradient, in_axes=(1, None, 1))(stacked[0], args[1], stacked[2])

    for derivative in (forward_mode, twice, mapped):
        assert distance(derivative(fast), derivative(original)) < 2e-2, derivative.__name__


def test_what_the_kernel_does_not_compute_is_left_alone():
    args = arrays()

    def with_weights(q, k, v):
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v), weights.mean()

    def with_dropout(q, k, v):
        return nn.dot_product_attention(
            *(q, k, v), dropout_rng=jax.random.key(0), dropout_rate=0.1, deterministic=False
        )

    def capped(q, k, v):
        scores = 30 * jnp.tanh(jnp.einsum("bqhd,bkhd->bhqk", q, k) / 30)
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)

    def over_queries(q, k, v):
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k), axis=2)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v)

    def other_sums(q, k, v):
        """Divided by the sums of the queries in another order."""
        weights = jnp.exp(jnp.einsum("bqhd,bkhd->bhqk", q, k))
        weights = weights / weights.sum(-1)[:, :, ::-1, None]
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v)

    def learned_scale(q, k, v):
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * q[0, 0, 0, 0])
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v)

    def soft_mask(q, k, v):
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k)
        weights = jax.nn.softmax(jnp.where(TRIANGLE, scores, jnp.asarray(-3, scores.dtype)))
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v)

    others = (with_weights, with_dropout, capped, over_queries, other_sums, learned_scale)
    for other in (*others, soft_mask):
        assert not fused(other, *args), other.__name__
    assert not fused(by_hand, *arrays(dtype=jnp.float32))
    assert not fused(by_hand, *arrays(features=36))
    assert not fused(by_hand, *arrays(length=16))
    assert not fused(by_hand, *args, target="t4")
    assert not fused(by_hand, *args, target="cpu")


def test_running_the_passes_twice_changes_nothing():
    once = fgpu.optimize(jax_nn, target="h100")
    args = arrays()
    assert len(fused(once, *args)) == 1
    assert len(fused(jax.grad(loss_of(once)), *args)) == 2


def keras_attention(**settings):
    keras = pytest.importorskip("keras")
    layer = keras.layers.MultiHeadAttention(8, 64, dtype="mixed_bfloat16", **settings)
    layer.build((2, 2048, 512), (2, 2048, 512))
    trainable, fixed = (
        [v.value for v in vs] for vs in (layer.trainable_variables, layer.non_trainable_variables)
    )

    def attend(trainable, x):
        return layer.stateless_call(trainable, fixed, x, x, use_causal_mask=True)[0]

    return attend, (trainable, jnp.ones((2, 2048, 512), jnp.bfloat16))


def linen_attention():
    module = nn.MultiHeadDotProductAttention(8, dtype=jnp.bfloat16)
    x = jnp.ones((2, 2048, 512), jnp.bfloat16)
    mask = nn.make_causal_mask(jnp.ones((2, 2048)))
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    return (lambda variables, x: module.apply(variables, x, mask=mask)), (variables, x)


def temporaries_of_gradient(fn, args, target="h100"):
    def loss(*args):
        return jnp.sum(fn(*args).astype(jnp.float32) ** 2)

    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    compiled = compile_for(jax.grad(loss, argnums=(0, 1)), structs, target)
    kernels = re.findall(r'custom_call_target="__cudnn\$(\w+)"', compiled.as_text())
    return compiled.memory_analysis().temp_size_in_bytes, sorted(kernels)


@pytest.mark.parametrize(
    "way",
    [
        *("linen", "by hand"),
        *(pytest.param(way, marks=pytest.mark.slow) for way in ("jax.nn", "heads first")),
    ],
)
def test_an_h100_runs_it_in_cudnn_and_needs_a_twentieth_of_the_memory(way):
    struct = jax.ShapeDtypeStruct((4, 2048, 8, 64), jnp.bfloat16)
    args = (struct, struct, struct)
    plain, none = temporaries_of_gradient(WAYS[way], args)
    small, kernels = temporaries_of_gradient(fgpu.optimize(WAYS[way], target="h100"), args)
    assert none == []
    assert kernels == ["fmhaSoftmax", "fmhaSoftmaxBackward"]
    assert small <= 0.05 * plain


LAYERS = {
    "Keras": keras_attention,
    "Keras with dropout, not training": lambda: keras_attention(dropout=0.1),
    "linen": linen_attention,
}


@pytest.mark.parametrize(
    "name", ["Keras", *(pytest.param(n, marks=pytest.mark.slow) for n in list(LAYERS)[1:])]
)
def test_attention_of_whole_layers_runs_in_cudnn(name):
    fn, args = LAYERS[name]()
    plain, _ = temporaries_of_gradient(fn, args)
    small, kernels = temporaries_of_gradient(fgpu.optimize(fn, target="h100"), args)
    assert kernels == ["fmhaSoftmax", "fmhaSoftmaxBackward"]
    # What is left are the layer's own projections.
    assert small <= 0.2 * plain
