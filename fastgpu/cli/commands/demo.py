"""`fastgpu demo`"""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option(help="Where the files go.")] = Path("demo_output"),
) -> None:
    """Prepare, import, tune, optimize, measure and deploy a small CNN on handwritten digits.

    Example: fastgpu demo
    """
    from fastgpu.cli.demo import run

    run(out)
