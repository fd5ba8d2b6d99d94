"""Losses in chunks of rows, and softmaxes from their results: same gradients, less to keep."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import fastgpu as fgpu
from fastgpu.compile import compile_for, memory_report
from fastgpu.hardware import device
from fastgpu.ir.compat import eval_jaxpr
from fastgpu.transforms.remat import (
    Planner,
    in_row_chunks,
    softmaxes_of_results,
    trace_joint,
)
from fastgpu.transforms.remat.joint import flat_program
from fastgpu.transforms.remat.sliceable import SUMMED, sliced, sliced_result

VOCABULARY, WIDTH = 3000, 32


def picked(scores, labels):
    return jnp.take_along_axis(jax.nn.log_softmax(scores), labels[..., None], axis=-1)


def optax_loss(w, b, x, labels):
    losses = optax.softmax_cross_entropy_with_integer_labels(x @ w + b, labels)
    return [jnp.mean(losses)], [jnp.mean(jnp.argmax(x @ w + b, -1) == labels)]


def one_hot_loss(w, b, x, labels):
    targets = jax.nn.one_hot(labels, VOCABULARY)
    return [optax.softmax_cross_entropy(x @ w + b, targets).sum() / labels.size], []


def smoothed_loss(w, b, x, labels):
    targets = optax.smooth_labels(jax.nn.one_hot(labels, VOCABULARY), 0.1)
    return [optax.softmax_cross_entropy(x @ w + b, targets).mean()], []


def masked_loss(w, b, x, labels):
    weights = (labels % 3 != 0).astype(jnp.float32)
    losses = -picked(x @ w + b, labels)[..., 0] * weights
    return [jnp.sum(losses) / jnp.sum(weights)], [losses]


def shifted_loss(w, b, x, labels):
    scores = (x @ w + b)[:, :-1]
    return [-jnp.mean(picked(scores, labels[:, 1:]))], []


def z_loss(w, b, x, labels):
    scores = x @ w + b
    z = jax.nn.logsumexp(scores, axis=-1)
    return [jnp.mean(z - picked(scores, labels)[..., 0]) + 1e-2 * jnp.mean(z**2)], []


def capped_loss(w, b, x, labels):
    scores = 30 * jnp.tanh((x @ w + b) / 30)
    return [-jnp.mean(picked(scores, labels))], []


def counting_loss(w, b, x, labels):
    scores = x @ w + b
    return [-jnp.mean(picked(scores, labels))], [jnp.sum(scores > 0), jnp.sum(scores, axis=(0, 1))]


def flat_rows_loss(w, b, x, labels):
    scores = (x @ w + b).reshape(-1, VOCABULARY)
    return [-jnp.mean(picked(scores, labels.reshape(-1)))], []


LOSSES = [
    *(optax_loss, one_hot_loss, smoothed_loss, masked_loss, z_loss, capped_loss),
    *(flat_rows_loss, shifted_loss, counting_loss),
]


def arguments(rows=(8, 16), dtype=jnp.float32):
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(WIDTH, VOCABULARY)) / WIDTH**0.5, dtype)
    b = jnp.asarray(rng.normal(size=VOCABULARY), dtype)
    x = jnp.asarray(rng.normal(size=(*rows, WIDTH)), dtype)
    return [w, b, x], [jnp.asarray(rng.integers(0, VOCABULARY, rows))]


def joint_of(loss, **settings):
    return trace_joint(loss, *arguments(**settings))


def chunked(joint, parts=8):
    """In chunks where a program of `parts` arrays of scores is taken to be all there is."""
    return in_row_chunks(joint, temporary_bytes=parts * 8 * 16 * VOCABULARY * 4)


def run(joint, cotangent=1.0, **settings):
    program = flat_program(joint)
    moving, rest = arguments(**settings)
    fn = jax.jit(partial(eval_jaxpr, program.jaxpr, program.consts))
    return fn(*moving, *rest, jnp.asarray(cotangent, program.in_avals[-1].dtype))


def distance(found, expected):
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    return np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30)


def primitives(joint):
    return [eqn.primitive.name for eqn in joint.forward.eqns]


# In chunks of rows


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_in_chunks_have_the_same_gradients(loss):
    joint = joint_of(loss)
    found = chunked(joint)
    assert found is not None and "scan" in primitives(found.joint)
    for a, b in zip(run(found.joint, 2.5), run(joint, 2.5), strict=True):
        assert a.dtype == b.dtype
        assert distance(a, b) < 3e-6


def test_sums_of_sixteen_bits_are_added_up_in_thirty_two():
    settings = {"dtype": jnp.bfloat16}
    joint, exact = joint_of(optax_loss, **settings), run(joint_of(optax_loss))
    found = chunked(joint, parts=4)
    assert found is not None
    ours, theirs = run(found.joint, **settings), run(joint, **settings)
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert a.dtype == b.dtype
        assert distance(a, c) < 1.2 * distance(b, c) + 1e-6


def test_the_compiled_gradient_has_no_array_of_all_scores():
    def loss(w, x, labels):
        return [optax.softmax_cross_entropy_with_integer_labels(x @ w, labels).mean()], []

    w, x = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((256, 50257), (4096, 256)))
    joint = trace_joint(loss, [w, x], [jax.ShapeDtypeStruct((4096,), jnp.int32)])
    before = Planner(joint, device("h100")).unconstrained
    found = in_row_chunks(joint, before.peak)
    assert found is not None

    def temporaries(joint):
        program = flat_program(joint)
        args = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in program.in_avals]
        fn = partial(eval_jaxpr, program.jaxpr, program.consts)
        return memory_report(compile_for(fn, args, "h100")).temp_bytes

    assert temporaries(found.joint) < 0.25 * temporaries(joint)


def given_out(w, b, x, labels):
    scores = x @ w
    return [-jnp.mean(picked(scores, labels))], [scores]


def summed_over_rows(w, b, x, labels):
    scores = x @ w
    return [jnp.mean(jnp.cumsum(scores.reshape(-1, VOCABULARY), 0) ** 2)], []


def divided_by_the_largest(w, b, x, labels):
    scores = x @ w
    return [-jnp.mean(picked(scores / jnp.max(scores), labels))], []


@pytest.mark.parametrize("loss", [given_out, summed_over_rows, divided_by_the_largest])
def test_scores_that_are_needed_whole_stay_whole(loss):
    assert chunked(joint_of(loss)) is None


def test_what_has_effects_stays_whole():
    def loss(w, b, x, labels):
        scores = x @ w
        jax.debug.print("{}", labels[0, 0])
        return [-jnp.mean(picked(scores, labels))], []

    assert chunked(joint_of(loss)) is None


def test_chunks_have_the_same_size():
    found = chunked(joint_of(z_loss, rows=(5, 16)), parts=4)
    assert found is not None and "5 chunks" in found.how
    assert chunked(joint_of(z_loss, rows=(1, 17)), parts=4) is None


def test_a_step_within_a_budget_trains_as_without_one():
    def loss(params, x, labels):
        hidden = jnp.tanh(x @ params["in"])
        return optax.softmax_cross_entropy_with_integer_labels(hidden @ params["w"], labels).mean()

    rng = np.random.default_rng(0)
    params = {
        "in": jnp.asarray(rng.normal(size=(64, 64)) / 8, jnp.float32),
        "w": jnp.asarray(rng.normal(size=(64, 20000)) / 8, jnp.float32),
    }
    x = jnp.asarray(rng.normal(size=(512, 64)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 20000, 512))
    found = fgpu.plan(fgpu.value_and_grad(loss), params, x, labels, memory_budget="50%")
    assert found.fits and any("chunks of rows" in change for change in found.changes)
    value, grads = fgpu.value_and_grad(loss, memory_budget="50%")(params, x, labels)
    expected, exact = jax.value_and_grad(loss)(params, x, labels)
    assert distance(value, expected) < 1e-6
    assert all(distance(grads[name], exact[name]) < 3e-6 for name in exact)


# What slices can do


def equation(fn, *shapes):
    jaxpr = jax.make_jaxpr(fn)(*(jnp.ones(shape) for shape in shapes)).jaxpr
    return jaxpr.eqns[-1]


@pytest.mark.parametrize(
    ("fn", "shapes", "dims", "expected"),
    [
        (jnp.add, [(4, 6), (4, 6)], (0, None), ((0, 0), 0)),
        (lambda x: jnp.max(x, 1), [(4, 6, 2)], (2,), ((2,), 1)),
        (lambda x: jnp.sum(x, 0), [(4, 6)], (0,), ((0,), SUMMED)),
        (lambda x: jnp.max(x, 0), [(4, 6)], (0,), None),
        (lambda x: jnp.argmax(x, 1), [(4, 6)], (0,), ((0,), 0)),
        (jnp.dot, [(4, 6), (6, 2)], (0, None), ((0, None), 0)),
        (jnp.dot, [(4, 6), (6, 2)], (None, 1), ((None, 1), 1)),
        (jnp.dot, [(4, 6), (6, 2)], (1, None), ((1, 0), SUMMED)),
        (lambda x: x.T, [(4, 6)], (0,), ((0,), 1)),
        (lambda x: lax.broadcast_in_dim(x, (3, 4), (1,)), [(4,)], (0,), ((0,), 1)),
        (lambda x: x.reshape(24), [(4, 6)], (0,), ((0,), 0)),
        (lambda x: x.reshape(24), [(4, 6)], (1,), None),
        (lambda x: x.reshape(2, 12), [(24,)], (0,), ((0,), 0)),
        (lambda x: x.reshape(4, 3, 2), [(4, 6)], (1,), ((1,), 1)),
        (lambda x: lax.squeeze(x, (0,)), [(1, 6)], (1,), ((1,), 0)),
        (lambda x: jnp.cumsum(x, 0), [(4, 6)], (0,), None),
        (lambda x: x[1:], [(4, 6)], (0,), None),
        (lambda x: lax.slice(x, (0, 1), (4, 6)), [(4, 6)], (0,), ((0,), 0)),
        (lambda x: lax.pad(x, 0.0, ((0, 0, 0), (1, 0, 0))), [(4, 6)], (0, None), ((0, None), 0)),
        (lambda x: lax.pad(x, 0.0, ((0, 1, 0), (0, 0, 0))), [(4, 6)], (0, None), None),
    ],
)
def test_what_a_slice_gives(fn, shapes, dims, expected):
    found = sliced(equation(fn, *shapes), dims)
    assert (found and (found.inputs, found.output)) == expected


def test_what_gives_a_slice():
    outer = equation(jnp.dot, (4, 6), (6, 2))
    assert sliced_result(outer, 1).inputs == (None, 1)
    positions = equation(lambda x: x + lax.iota(jnp.float32, 4), (4,))
    assert sliced_result(positions, 0).inputs == (0, 0)
    numbers = jax.make_jaxpr(lambda: lax.broadcasted_iota(jnp.int32, (4, 6), 1))().jaxpr.eqns[0]
    assert sliced_result(numbers, 0) is not None and sliced_result(numbers, 1) is None


# From a softmax's result


def attend(q, k, v):
    scores = jnp.einsum("bqd,bkd->bqk", q, k) / math.sqrt(q.shape[-1])
    scores = jnp.where(jnp.tri(scores.shape[-1], dtype=bool), scores, -jnp.inf)
    e = jnp.exp(scores - lax.stop_gradient(jnp.max(scores, -1, keepdims=True)))
    return (e / jnp.sum(e, -1, keepdims=True)) @ v


def attention(q, k, v):
    return [jnp.sum(jnp.tanh(attend(q, k, v)))], []


def test_gradients_of_softmaxes_come_from_their_results():
    rng = np.random.default_rng(0)
    args = [jnp.asarray(rng.normal(size=(2, 24, 8)), jnp.float32) for _ in range(3)]
    joint = trace_joint(attention, args, [])
    found = softmaxes_of_results(joint)
    assert found is not None
    for a, b in zip(*(_gradients(j, args) for j in (found.joint, joint)), strict=True):
        assert np.all(np.isfinite(a)) and distance(a, b) < 1e-6


def test_a_plan_need_not_keep_the_scores():
    def deep(x):
        for _ in range(6):
            x = attend(x, x, x)
        return [jnp.sum(x)], []

    joint = trace_joint(deep, [jax.ShapeDtypeStruct((64, 1024, 16), jnp.float32)], [])
    found = softmaxes_of_results(joint)
    assert found is not None
    before, after = (Planner(j, device("h100")) for j in (joint, found.joint))
    whole = before.unconstrained.peak
    assert after.decide(0.8 * whole).seconds < 0.97 * before.decide(0.8 * whole).seconds


def test_exponentials_that_may_overflow_stay():
    def unshifted(x, v):
        e = jnp.exp(x)
        return [jnp.sum((e / jnp.sum(e, -1, keepdims=True)) @ v)], []

    x = jnp.ones((4, 4))
    assert softmaxes_of_results(trace_joint(unshifted, [x, x], [])) is None


def _gradients(joint, args):
    program = flat_program(joint)
    return jax.jit(partial(eval_jaxpr, program.jaxpr, program.consts))(*args, jnp.ones(()))
