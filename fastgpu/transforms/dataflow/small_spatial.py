"""Wide convolutions over few positions as a matrix product of their windows."""

from collections.abc import Callable

import jax

from fastgpu.ir.lowered import Chooser, Site


def choose(site: Site) -> Callable[..., jax.Array] | None:
    return None


CHOOSER = Chooser("small_spatial", ("conv_general_dilated",), choose)
