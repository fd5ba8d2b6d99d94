"""Which precision a program, or a named part of it, computes in."""

import fnmatch
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from fastgpu.config import default_precision
from fastgpu.errors import ConfigurationError


class Mode(NamedTuple):
    """The dtype that activations travel in, if not their own, and what products ask for."""

    low: np.dtype | None
    products: lax.Precision


_MODES = {
    "default": Mode(None, lax.Precision.DEFAULT),
    "float32": Mode(None, lax.Precision.HIGHEST),
    "tf32": Mode(None, lax.Precision.HIGH),
    "bfloat16": Mode(None, lax.Precision.DEFAULT),
    "bf16-mixed": Mode(np.dtype(jnp.bfloat16), lax.Precision.DEFAULT),
    "fp16-mixed": Mode(np.dtype(np.float16), lax.Precision.DEFAULT),
}
# What transformations write around a scope's name: "transpose(jvp(Net))".
_WRAPPERS = re.compile(r"\w+\(|\)")


@dataclass(frozen=True)
class Policy:
    """A precision for each pattern of scopes; of several that match, the last one holds.

    With `strict`, a pattern that matches nothing in a program is an error.

    >>> policy = Policy((("*", "bf16-mixed"), ("head", "float32")))
    >>> policy.mode("Net/head/Dense_0").low, policy.mode("Net/Dense_0").low
    (None, dtype(bfloat16))
    """

    rules: tuple[tuple[str, str], ...]
    strict: bool = True

    @property
    def low(self) -> np.dtype | None:
        """The one low dtype of the program, if any of its parts has one."""
        found = (_MODES[name].low for _, name in self.rules)
        return next((low for low in found if low is not None), None)

    @property
    def scales_loss(self) -> bool:
        """Whether gradients need a loss scale: float16 has 5 bits of exponent."""
        return self.low == np.float16

    @functools.lru_cache(maxsize=4096)  # noqa: B019 (policies are values, and few)
    def mode(self, path: str) -> Mode | None:
        """What holds for equations in the scope `path`, such as "Net/block_0/Dense_1"."""
        for pattern, name in reversed(self.rules):
            if matches(pattern, path):
                return _MODES[name]
        return None


@functools.lru_cache(maxsize=16384)
def matches(pattern: str, path: str) -> bool:
    """Whether scopes one after the other, anywhere in `path`, are called `pattern`.

    `*` and `?` stand for any text and any character, as in file names.

    >>> matches("block_*/mlp", "GPT/block_3/mlp/Dense_0"), matches("mlp", "GPT/mlp_2/Dense_0")
    (True, False)
    """
    if pattern == "*":
        return True
    scopes = _WRAPPERS.sub("", path).split("/")
    parts = range(len(scopes) + 1)
    return any(
        fnmatch.fnmatchcase("/".join(scopes[start:stop]), pattern)
        for start in parts
        for stop in parts[start + 1 :]
    )


def policy_of(precision: str | Mapping[str, str] | Policy | None) -> Policy:
    """The policy that `precision=` of a transform means; `None` is what `configure` set.

    Raises `ConfigurationError` for an unknown name, or two low dtypes in one program.

    >>> policy_of({"*": "tf32"}).rules, policy_of({}).rules
    ((('*', 'tf32'),), ())
    """
    if isinstance(precision, Policy):
        return precision
    if precision is None:
        precision = default_precision() or {}
    rules: Any = {"*": precision} if isinstance(precision, str) else precision
    if not isinstance(rules, Mapping):
        raise _unknown(precision)
    for pattern, name in rules.items():
        if not isinstance(pattern, str) or not isinstance(name, str) or name not in _MODES:
            raise _unknown(name if isinstance(pattern, str) else pattern)
    lows = {name for name in rules.values() if _MODES[name].low is not None}
    if len(lows) > 1:
        raise ConfigurationError(
            "a program has one low dtype",
            expected="'bf16-mixed' or 'fp16-mixed' for some scopes, 'float32' or 'tf32' for others",
            got=", ".join(sorted(lows)),
        )
    return Policy(tuple(rules.items()))


def _unknown(got: Any) -> ConfigurationError:
    return ConfigurationError(
        f"precision={got!r} is not a known precision",
        expected=f"one of {', '.join(map(repr, _MODES))}; or a dict from scopes to these",
        got=repr(got),
        fix='precision="bf16-mixed"; or precision={"*": "bf16-mixed", "head": "float32"}',
    )
