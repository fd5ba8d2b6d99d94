"""Numbers of bytes, as people write and read them."""

import re
from collections.abc import Callable

from fastgpu.errors import ConfigurationError


def parse_budget(budget: int | float | str, unconstrained: Callable[[], int]) -> int:
    """Bytes from bytes, "16GiB", "8GB", or "60%" of the unconstrained peak.

    Raises `ConfigurationError` for anything else, or a budget that is not positive.

    >>> parse_budget("1.5KiB", lambda: 0), parse_budget("50%", lambda: 1000)
    (1536, 500)
    """
    if isinstance(budget, int | float) and not isinstance(budget, bool):
        bytes_wanted = float(budget)
    else:
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]i?b|b|%)\s*", str(budget).lower())
        if match is None:
            raise ConfigurationError(
                f"the memory budget {budget!r} cannot be read",
                expected="bytes, or text such as '16GiB', '8000MB' or '60%'",
                got=repr(budget),
            )
        number, unit = float(match[1]), match[2]
        if unit == "%":
            bytes_wanted = number / 100 * unconstrained()
        else:
            base = 1024 if "i" in unit else 1000
            bytes_wanted = number * base ** "bkmgt".index(unit[0])
    if not 0 < bytes_wanted < float("inf"):
        raise ConfigurationError(
            f"the memory budget {budget!r} is not positive",
            expected="a positive number of bytes",
            got=repr(budget),
        )
    return int(bytes_wanted)


def show_bytes(count: float) -> str:
    """Bytes for people.

    >>> show_bytes(3 * 2**30), show_bytes(1536)
    ('3.00 GiB', '1.50 KiB')
    """
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
