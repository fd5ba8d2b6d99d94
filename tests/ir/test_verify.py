import jax
import jax.numpy as jnp
import pytest

from fastgpu import ir
from fastgpu.errors import VerificationError
from fastgpu.ir.compat import ClosedJaxpr


def closed(fn, *args):
    return jax.make_jaxpr(fn)(*args)


def test_the_same_numbers_in_another_order_pass():
    x = jnp.ones((64, 64))
    ir.verify(closed(lambda x: x @ x.T, x), closed(lambda x: (x @ x.T).T, x))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
def test_other_numbers_fail(dtype):
    x = jnp.ones(8, dtype)
    with pytest.raises(VerificationError, match=r"changed output 0(?s:.*)largest difference"):
        ir.verify(closed(lambda x: x + x, x), closed(lambda x: x + x + 1, x))


def test_other_types_fail():
    with pytest.raises(VerificationError, match="out_avals"):
        ir.verify(
            closed(lambda x: x, jnp.ones(3)), closed(lambda x: x.astype(jnp.bfloat16), jnp.ones(3))
        )


def test_an_ill_typed_jaxpr_fails():
    good = closed(lambda x: jnp.sin(x) + 1, jnp.ones(3))
    broken = good.jaxpr.replace(eqns=good.jaxpr.eqns[1:])
    with pytest.raises(VerificationError, match="ill-typed"):
        ir.verify(good, ClosedJaxpr(broken, good.consts))


def test_keys_and_booleans_are_compared_too():
    def fn(key, flag):
        return jax.random.split(key), ~flag, jax.random.bits(key, (3,))

    one = closed(fn, jax.random.key(0), jnp.array(True))
    ir.verify(one, one)


def test_nan_equals_nan():
    one = closed(lambda x: jnp.log(x), jnp.ones(3))
    ir.verify(one, one)
