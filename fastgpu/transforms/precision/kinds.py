"""What a float32 value is made of: that decides which dtype it travels in.

The names of primitives are here, and nowhere else.
"""

import enum
from collections.abc import Sequence

# Their inputs are cast, and their results are in the low dtype.
PRODUCTS = frozenset({"dot_general", "conv_general_dilated", "ragged_dot_general"})

# Computed in the low dtype between products.
ELEMENTWISE = frozenset(
    {
        *("abs", "add", "add_any", "clamp", "div", "erf", "erfc", "logistic", "max", "min", "mul"),
        *("neg", "sign", "sub", "tanh"),
    }
)

# Elements go elsewhere, or are chosen, as they are.
MOVING = frozenset(
    {
        *("all_gather", "all_to_all", "broadcast_in_dim", "concatenate", "copy", "copy_p"),
        *("dynamic_slice", "dynamic_update_slice", "expand_dims", "gather", "name", "pad"),
        *("ppermute", "pvary", "reshape", "rev"),
        *("select_n", "sharding_constraint", "slice", "split", "squeeze", "stop_gradient"),
        "transpose",
    }
)
# Elements are chosen too, but what they are chosen from is stored: as other activations are.
POOLING = frozenset({"reduce_window_max", "reduce_window_min"})
# Each result is the operand in the same place.
PARALLEL = frozenset({"optimization_barrier"})

# Always in float32. What a reduction or a power of activations is used for says whether they have
# to be wide before it.
REDUCTIONS = frozenset({"reduce_max", "reduce_min", "reduce_prod", "reduce_sum"})
PASSING = frozenset(
    {"cumsum", "integer_pow", "psum", "psum_invariant", "reduce_window_sum", "square"}
)
# The rest of what is computed in float32. Here a rounding before is larger than one after.
_CURVED = frozenset(
    {
        *("cbrt", "digamma", "erf_inv", "exp", "exp2", "expm1", "lgamma", "log", "log1p", "pow"),
        *("rsqrt", "sqrt"),
    }
)


class Kind(enum.Enum):
    """Of a float32 value, what it is made of."""

    CONSTANT = "literals and masks"
    SPREAD = "data or a parameter, repeated: a bias, a position's embedding"
    DATA = "inputs and parameters, and what is computed of them without a product"
    LOOKUP = "rows of a table: an embedding"
    STATISTIC = "sums and other results that are small, or have to be exact"
    WIDE = "activations in float32: what a norm or a softmax returns"
    LOW = "activations in the low dtype: what a product returns"


_YIELDING = {Kind.CONSTANT, Kind.SPREAD}


def elementwise(name: str, kinds: Sequence[Kind], low: bool) -> Kind:
    """The kind of an elementwise result; LOW means that it is computed in the low dtype.

    `low` says that it may be: a product reads what is made of it.
    """
    rest = [kind for kind in kinds if kind not in _YIELDING]
    if not rest:
        return Kind.SPREAD if Kind.SPREAD in kinds else Kind.CONSTANT
    if Kind.DATA in rest:  # what was not rounded yet is not rounded here
        return Kind.DATA
    if Kind.STATISTIC in rest:
        return Kind.STATISTIC if set(rest) == {Kind.STATISTIC} else Kind.WIDE
    if set(rest) == {Kind.LOOKUP}:
        return Kind.LOOKUP
    # A norm subtracts its running mean before it divides: as exact as the mean of the batch.
    centred = name == "sub" and kinds[1] in _YIELDING
    # What is divided by may be nearly zero: it was made wide for a reason.
    guarded = name == "div" and kinds[1] is Kind.WIDE
    # A norm's result stays wide through its scale and bias, and until it meets other activations.
    alone = rest == [Kind.WIDE]
    return Kind.WIDE if not low or centred or guarded or alone else Kind.LOW


def wide_result(name: str, kinds: Sequence[Kind]) -> Kind:
    """The kind of a result that is computed in float32 whatever it is for."""
    if not kinds:  # positions, random numbers
        return Kind.DATA
    if set(kinds) == {Kind.CONSTANT}:
        return Kind.CONSTANT
    if name in REDUCTIONS:
        return Kind.STATISTIC
    if set(kinds) & {Kind.WIDE, Kind.LOW, Kind.LOOKUP}:
        return Kind.WIDE
    if Kind.STATISTIC in kinds or name in _CURVED:
        return Kind.STATISTIC
    return Kind.DATA if Kind.DATA in kinds else Kind.SPREAD


def repeated(kind: Kind) -> Kind:
    """The kind of a value that is used for more elements than it has."""
    return Kind.SPREAD if kind is Kind.DATA else kind
