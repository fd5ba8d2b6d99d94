"""What waits for the backward half in the host's memory, or in fewer bits."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fastgpu as fgpu
from fastgpu.compile import compile_for, memory_report
from fastgpu.errors import ConfigurationError
from fastgpu.hardware import device
from fastgpu.ir.compat import eval_jaxpr
from fastgpu.transforms.remat import Planner, trace_joint
from fastgpu.transforms.remat.shelves import BFLOAT16, HOST, INT8, shelves_for

H100 = device("h100")
DEPTH, WIDTH = 12, 256


def deep(*leaves):
    *weights, x = leaves
    for w in weights:
        x = jnp.tanh(x @ w)
    return [jnp.sum(x**2)], []


# A link to the host that keeps up with layers as small as these.
LINKED = dataclasses.replace(H100, host_link=H100.bandwidth)
# Products so slow that it never pays to compute them again.
SLOW = dataclasses.replace(H100, flops={"float32": 5e12})


def planner(shelves, batch=1 << 15, width=WIDTH, on=H100):
    w = jax.ShapeDtypeStruct((width, width), jnp.float32)
    x = jax.ShapeDtypeStruct((batch, width), jnp.float32)
    return Planner(trace_joint(deep, [w] * DEPTH, [x]), on, shelves)


def compiled(program):
    args = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in program.in_avals]
    return compile_for(partial(eval_jaxpr, program.jaxpr, program.consts), args, "h100")


def run(program, batch):
    rng = np.random.default_rng(0)
    args = [rng.normal(size=(WIDTH, WIDTH)) / WIDTH**0.5 for _ in range(DEPTH)]
    args.append(rng.normal(size=(batch, WIDTH)))
    args = [jnp.asarray(a, jnp.float32) for a in (*args, 1.0)]
    return jax.jit(partial(eval_jaxpr, program.jaxpr, program.consts))(*args)


def relative_distance(found, exact):
    pairs = list(zip(found, exact, strict=True))
    apart = sum(float(jnp.sum((a - b) ** 2)) for a, b in pairs)
    return (apart / sum(float(jnp.sum(b**2)) for _, b in pairs)) ** 0.5


def kinds(planned):
    return {planned.decision.of(v) for v in planned.decision.problem.residuals}


# In the host's memory


def test_offloading_is_chosen_where_it_is_cheaper_and_costs_less_than_recomputing():
    with_host, without = (planner(shelves, width=4096) for shelves in ((HOST,), ()))
    budget = 0.7 * without.unconstrained.peak
    offloading, recomputing = with_host.decide(budget), without.decide(budget)
    assert "offload" in kinds(offloading)
    assert offloading.seconds < recomputing.seconds
    assert offloading.peak <= budget


def test_the_compiler_takes_offloaded_values_off_the_device():
    found = planner((HOST,), 1 << 17, on=LINKED)
    planned = found.decide(0.6 * found.unconstrained.peak)
    program = compiled(planned.program)
    waiting = sum(v.aval.size * 4 for v in planned.decision.shelved)
    assert waiting > 0
    assert program.memory_analysis().host_temp_size_in_bytes >= waiting
    before = memory_report(compiled(found.unconstrained.program)).temp_bytes
    # Which of many equal decisions is found differs between machines, and with it how many copies
    # the compiler has under way at once.
    assert memory_report(program).temp_bytes < 0.85 * before


def test_offloaded_values_come_back_as_they_were():
    batch = 1 << 12
    found = planner((HOST,), batch, on=LINKED)
    planned = found.decide(0.7 * found.unconstrained.peak)
    assert "offload" in kinds(planned)
    exact = run(found.unconstrained.program, batch)
    # What is computed again beside them may be fused otherwise: float32 roundings.
    assert relative_distance(run(planned.program, batch), exact) < 1e-6


def test_a_cpu_has_no_host_to_offload_to():
    assert shelves_for(device("cpu"), None) == ()


# In fewer bits


@pytest.mark.parametrize("shelf", [BFLOAT16, INT8])
def test_packing_loses_what_its_bits_allow(shelf):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 384)), jnp.float32)
    put, _ = shelf.programs(x)
    back = shelf.restore(x, *shelf.put(x))
    assert back.dtype == x.dtype
    # bfloat16 has 8 bits of mantissa; int8 has 255 steps over each block of 128.
    allowed = abs(x) * 2**-8 if shelf is BFLOAT16 else (x.max() - x.min()) / 255 / 2 * 1.01
    assert bool(jnp.all(abs(back - x) <= allowed))
    assert shelf.device_bytes(x) < {"bfloat16": 0.51, "int8": 0.27}[shelf.name] * x.nbytes
    assert put.outvars[0].aval.dtype.itemsize == {"bfloat16": 2, "int8": 1}[shelf.name]


def test_int8_keeps_zeros_constants_and_what_is_not_finite_visible():
    x = jnp.zeros((2, 128)).at[0, :64].set(3.0)
    back = INT8.restore(x, *INT8.put(x))
    np.testing.assert_array_equal(back[x == 0], 0)
    np.testing.assert_array_max_ulp(np.asarray(back), np.asarray(x), maxulp=1)
    broken = x.at[1, 5].set(jnp.inf)
    assert not bool(jnp.isfinite(INT8.restore(x, *INT8.put(broken))[1]).all())


@pytest.mark.parametrize(("shelf", "part", "most"), [(BFLOAT16, 0.8, 0.004), (INT8, 0.65, 0.01)])
def test_gradients_from_packed_values_are_near_the_exact_ones(shelf, part, most):
    batch = 1 << 12
    found = planner((shelf,), batch, on=SLOW)
    planned = found.decide(part * found.unconstrained.peak)
    assert shelf.name in kinds(planned)
    exact = run(found.unconstrained.program, batch)
    assert 0 < relative_distance(run(planned.program, batch)[1:], exact[1:]) < most


def test_int8_takes_less_than_a_half_of_the_compilers_temporaries():
    found = planner((INT8,))
    before = memory_report(compiled(found.unconstrained.program)).temp_bytes
    planned = found.decide(before / 2.4)
    assert planned is not None
    assert memory_report(compiled(planned.program)).temp_bytes < before / 2.1


def test_steps_measure_their_gradient_error():
    def loss(w, x):
        for _ in range(8):
            x = jnp.tanh(x @ w)
        return jnp.sum(x**2)

    w = jnp.asarray(np.random.default_rng(0).normal(size=(128, 128)) / 11, jnp.float32)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2048, 128)), jnp.float32)
    exact = fgpu.value_and_grad(loss, memory_budget="70%")
    packed = fgpu.value_and_grad(loss, memory_budget="70%", compress="int8")
    assert exact.gradient_error(w, x) < 1e-6
    measured = packed.gradient_error(w, x)
    assert 1e-6 < measured < 0.01
    report = fgpu.plan(packed, w, x, target="cpu")
    assert "as int8" in str(report)
    assert report.fits
    difference = jnp.linalg.norm(packed(w, x)[1] - jax.grad(loss)(w, x))
    assert float(difference / jnp.linalg.norm(jax.grad(loss)(w, x))) == pytest.approx(
        measured, rel=0.05
    )


def test_an_unknown_way_to_compress_is_refused():
    with pytest.raises(ConfigurationError, match="int4") as caught:
        fgpu.value_and_grad(jnp.sum, memory_budget="50%", compress="int4")
    assert "'bfloat16' or 'int8'" in str(caught.value)
