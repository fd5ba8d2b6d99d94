"""The `fastgpu` command: the library's verbs, one file each in `commands/`.

A command is a few lines over public calls. Failures are one line on stderr and an exit code other
than 0; `FASTGPU_DEBUG=1` shows the traceback.
"""

import os
import sys

import typer

from fastgpu.cli.commands import (
    benchmark,
    demo,
    env,
    export,
    import_model,
    inspect,
    plan,
    train,
    tune,
)
from fastgpu.errors import FastGPUError

app = typer.Typer(
    name="fastgpu",
    help="Import a model, optimize its program, tune, train, measure and export it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("env")(env.env)
app.command("import")(import_model.import_model)
app.command("inspect")(inspect.inspect)
app.command("plan")(plan.plan)
app.command("tune")(tune.tune)
app.command("train")(train.train)
app.command("benchmark")(benchmark.benchmark)
app.command("export")(export.export)
app.command("demo")(demo.demo)


def main(arguments: list[str] | None = None) -> None:
    """Run the command in `arguments` (by default the process's) and exit.

    Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.

    >>> try:
    ...     main(["import", "/no/such/model.keras"])
    ... except SystemExit as error:
    ...     print(error.code)
    1
    """
    try:
        status = app(args=arguments, standalone_mode=False)
    except typer.TyperException as error:
        # wrong usage: typer knows the command, the argument and what was expected
        error.show()  # pyright: ignore[reportAttributeAccessIssue]
        sys.exit(error.exit_code)  # pyright: ignore[reportAttributeAccessIssue]
    except (KeyboardInterrupt, typer.Abort) as error:
        _fail(f"interrupted {error}".strip(), 130)
    except Exception as error:
        if os.environ.get("FASTGPU_DEBUG") == "1":
            raise
        _fail(describe(error), 1)
    sys.exit(status if isinstance(status, int) else 0)


def describe(error: Exception) -> str:
    """An error on one line; where it is not fastgpu's own, also how to see the traceback.

    >>> describe(FastGPUError("the batch changed", expected="f32[8]", got="f32[7]"))
    'the batch changed; expected: f32[8]; got: f32[7]'
    >>> describe(ZeroDivisionError("division by zero"))
    'ZeroDivisionError: division by zero; FASTGPU_DEBUG=1 shows where'
    """
    if isinstance(error, FastGPUError):
        return error.one_line()
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}; FASTGPU_DEBUG=1 shows where"


def _fail(message: str, status: int) -> None:
    print(f"fastgpu: {message}", file=sys.stderr)
    sys.exit(status)
