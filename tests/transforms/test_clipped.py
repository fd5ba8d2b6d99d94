"""Masks of clipped values: asked of the result, which says the same."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgpu.compile import compile_for, memory_report
from fastgpu.hardware import device
from fastgpu.ir.compat import eval_jaxpr
from fastgpu.transforms.remat import Planner, trace_joint
from fastgpu.transforms.remat.clipped import masks_of_results
from fastgpu.transforms.remat.joint import flat_program

X = jnp.asarray([[-2.0, -0.0, 0.0, 1e-45], [3.0, 6.0, 9.0, jnp.nan], [jnp.inf, -jnp.inf, 5.9, 0.5]])
W = jnp.eye(4) * 0.5


def joint_of(activation):
    def fn(x, w):
        return [jnp.sum(activation(x * 1.0) @ w)], []

    return trace_joint(fn, [X, W], [])


def run(joint):
    program = flat_program(joint)
    return eval_jaxpr(program.jaxpr, program.consts, X, W, 1.0)


def compared(joint):
    """Which primitives make what the forward half compares."""
    made = {v: eqn.primitive.name for eqn in joint.forward.eqns for v in eqn.outvars}
    masks = [eqn for eqn in joint.forward.eqns if eqn.primitive.name in ("gt", "lt")]
    return [made.get(eqn.invars[0]) for eqn in masks]


@pytest.mark.parametrize("activation", [jax.nn.relu, jax.nn.relu6], ids=["relu", "relu6"])
def test_clipped_results_are_compared_and_gradients_are_the_same(activation):
    joint = joint_of(activation)
    changed = masks_of_results(joint)
    assert set(compared(joint)) == {"mul"}
    assert set(compared(changed)) == {"custom_jvp_call"}
    for found, expected in zip(run(changed), run(joint), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "activation",
    [
        lambda x: jnp.where(x > 1, jax.nn.relu(x), 0),
        lambda x: jnp.where(x < 0, jax.nn.relu(x), x),
        lambda x: jax.nn.elu(x),
    ],
    ids=["another-bound", "another-side", "elu"],
)
def test_other_comparisons_stay(activation):
    joint = joint_of(activation)
    changed = masks_of_results(joint)
    for found, expected in zip(run(changed), run(joint), strict=True):
        np.testing.assert_array_equal(found, expected)
    stayed = [a == b for a, b in zip(compared(joint), compared(changed), strict=True)]
    assert any(stayed)


def test_inputs_that_the_gradient_reads_anyway_are_compared():
    def normalized(x, w):
        x = x @ w
        x = (x - jnp.mean(x, 0)) * jax.lax.rsqrt(jnp.var(x, 0) + 1e-3)
        return [jnp.sum(jax.nn.relu(x) @ w)], []

    def added(x, w):
        y = x @ w
        return [jnp.sum(jax.nn.relu(y / jnp.std(y, 0) + x) @ w)], []

    for fn, asks_result in ((normalized, False), (added, True)):
        joint = masks_of_results(trace_joint(fn, [X, W], []))
        assert ("custom_jvp_call" in compared(joint)) == asks_result


def test_a_plan_keeps_one_of_two_arrays_for_each_layer_at_no_cost():
    def deep(*leaves):
        *weights, x = leaves
        for w in weights:
            x = jax.nn.relu(x @ w)
        return [jnp.sum(x)], []

    w = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    x = jax.ShapeDtypeStruct((1 << 16, 512), jnp.float32)
    planner = Planner(trace_joint(deep, [w] * 8, [x]), device("h100"))
    before = planner.unconstrained
    planned = planner.decide(0.75 * before.peak)
    assert planned is not None
    assert planned.seconds < 1.02 * before.seconds
    args = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in planned.program.in_avals]
    fn = partial(eval_jaxpr, planned.program.jaxpr, planned.program.consts)
    assert memory_report(compile_for(fn, args, "h100")).temp_bytes <= 1.05 * planned.peak
