"""A module with some of its names replaced, for those who look them up there."""

from types import ModuleType
from typing import Any


class With:
    """`module`, in which the names given are others.

    >>> import math
    >>> With(math, floor=math.ceil).floor(0.5)
    1
    """

    def __init__(self, module: ModuleType, **replaced: Any) -> None:
        self._module = module
        vars(self).update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
