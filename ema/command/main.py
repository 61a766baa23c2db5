"""The ``ema`` command: ``info``, ``plan``, ``selftest``, ``demo``, ``inspect`` and ``convert``.

typer and rich come with the extra ``cli``, so this module imports them when it is called and not
when it is imported; ``ema info`` imports neither torch nor jax.
"""

# No `from __future__ import annotations` here: typer reads the annotations of commands that are
# defined inside a function, and as strings they could not see that function's imports.

import ast
import contextlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import ema
from ema import validate
from ema.command.files import add_convert, add_inspect
from ema.command.plan import add_plan
from ema.decay import compute_optimal_decay
from ema.errors import (
    ArgumentError,
    EMAError,
    MissingExtraError,
)
from ema.extras import require
from ema.info import describe_ema
from ema.schedules import HalfLife, PowerFunction, Schedule, schedule_from_dict

if TYPE_CHECKING:
    import typer

    from ema.selftest import SelfTest

__all__ = ["build_app", "main", "parse_schedule"]


def main() -> None:
    """Run the command; without typer and rich, say in one line what to install."""
    try:
        app = build_app()
    except MissingExtraError as error:
        sys.exit(f"ema: {error}")
    app()


def build_app() -> "typer.Typer":
    """The command as a typer application.

    Raises:
        MissingExtraError: typer or rich is not installed.
    """
    require("typer", "cli")
    require("rich", "cli")
    import typer
    from rich.console import Console

    app = typer.Typer(
        name="ema",
        help="Exponential moving averages of model weights, equal to the last bit in PyTorch and"
        " JAX.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )

    def show_version(wanted: bool) -> None:
        if wanted:
            typer.echo(f"ema {ema.__version__}")
            raise typer.Exit

    @app.callback()
    def ema_command(
        version: Annotated[
            bool,
            typer.Option(
                "--version", callback=show_version, is_eager=True, help="Show the version."
            ),
        ] = False,
    ) -> None: ...

    @app.command()
    def info(
        steps: Annotated[int, typer.Option(help="Steps in the run.")],
        decay: Annotated[float | None, typer.Option(help="Decay per update, in [0, 1].")] = None,
        half_life: Annotated[float | None, typer.Option(help="Half-life in steps.")] = None,
        schedule: Annotated[
            str | None,
            typer.Option(
                help='For instance "HalfLife(steps=1000)" or "PowerFunction(gamma=6.94)".'
            ),
        ] = None,
        update_every: Annotated[int, typer.Option(help="Steps from one update to the next.")] = 1,
    ) -> None:
        """Show what a decay means for a run. Without one, the recommended decay is shown."""
        with _errors_in_one_line():
            chosen = _choose(decay, half_life, schedule, steps, update_every)
            typer.echo(describe_ema(chosen, steps, update_every=update_every))

    add_plan(app, _errors_in_one_line)

    add_inspect(app, _errors_in_one_line)
    add_convert(app, _errors_in_one_line, parse_schedule)

    @app.command()
    def selftest() -> None:
        """Check that both backends give the same bits on this machine."""
        from ema.selftest import run

        with _errors_in_one_line():
            result = run()
        _print_selftest(result)
        raise typer.Exit(0 if result.passed else 1)

    @app.command()
    def demo(
        steps: Annotated[int | None, typer.Option(help="Training steps.")] = None,
        out: Annotated[Path, typer.Option(help="Folder for the picture.")] = Path("ema-demo"),
    ) -> None:
        """Train with both backends and compare the results."""
        with _errors_in_one_line():
            from ema.demo import run

            run(steps=steps, folder=out, console=Console())

    return app


def parse_schedule(text: str) -> Schedule:
    """The schedule that ``repr`` prints as ``text``; nothing is evaluated.

    Also reads ``PowerFunction.from_std(0.1)``.

    Raises:
        ArgumentError: ``text`` is not a call of a schedule with numbers, or a number is out of range.

    >>> parse_schedule("HalfLife(steps=1000)")
    HalfLife(steps=1000.0)
    """
    try:
        name, positional, fields = _parse_call(text.strip())
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        raise ArgumentError(
            "`schedule` must be a schedule with its fields, such as HalfLife(steps=1000),"
            f" got {text!r}"
        ) from None
    if name == "PowerFunction.from_std":
        if len(positional) == 1 and not fields:
            return PowerFunction.from_std(positional[0])
        if not positional and fields.keys() == {"std"}:
            return PowerFunction.from_std(fields["std"])
        raise ArgumentError(f"`PowerFunction.from_std` takes one number, `std`, got {text!r}")
    if positional:
        raise ArgumentError(f"fields go by name, as in HalfLife(steps=1000), got {text!r}")
    return schedule_from_dict({**fields, "schedule": name})


def _parse_call(text: str) -> tuple[str, list[Any], dict[str, Any]]:
    """Name, positional and named arguments of ``name(1, b=2)``; ValueError for anything else."""
    call = ast.parse(text, mode="eval").body
    if not isinstance(call, ast.Call):
        raise ValueError(text)  # noqa: TRY004 — the caller words it
    fields: dict[str, Any] = {}
    for keyword in call.keywords:
        if keyword.arg is None or keyword.arg in {*fields, "schedule"}:  # **, twice, our own key
            raise ValueError(text)
        fields[keyword.arg] = _value(keyword.value)
    return ast.unparse(call.func), [ast.literal_eval(value) for value in call.args], fields


def _value(node: ast.expr) -> Any:
    """A literal, or ``inf``, as ``repr`` prints it."""
    return math.inf if ast.unparse(node) == "inf" else ast.literal_eval(node)


def _choose(
    decay: float | None,
    half_life: float | None,
    schedule: str | None,
    steps: int,
    update_every: int,
) -> float | Schedule:
    """The one way of the three that was given, or the recommended decay."""
    options = {"--decay": decay, "--half-life": half_life, "--schedule": schedule}
    given = [name for name, value in options.items() if value is not None]
    if len(given) > 1:
        raise ArgumentError(f"at most one of {', '.join(options)}, got {' and '.join(given)}")
    if decay is not None:
        return decay
    if half_life is not None:
        return HalfLife(steps=validate.positive("half_life", half_life))
    if schedule is not None:
        return parse_schedule(schedule)
    steps = validate.integer("steps", steps, minimum=1)
    update_every = validate.integer("update_every", update_every, minimum=1)
    return compute_optimal_decay(steps / update_every)


@contextlib.contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """Turn an error of ours into one red line and exit code 2 (1 for a missing extra)."""
    import typer

    try:
        yield
    except EMAError as error:
        typer.secho(f"ema: {error}", fg=typer.colors.RED, err=True)
        raise typer.Exit(1 if isinstance(error, MissingExtraError) else 2) from None


def _print_selftest(result: "SelfTest") -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    console.print(f"[bold]{escape(result.machine)}[/]")
    console.print(escape(", ".join(f"{name} {v}" for name, v in result.versions.items())))
    table = Table("average", "params", "elements", "differing", "error")
    for column in table.columns[2:]:
        column.justify = "right"
    for check in result.checks:
        differing = "not compared" if check.differing is None else f"{check.differing}"
        table.add_row(
            escape(check.name),
            check.dtype,
            f"{check.elements}",
            differing,
            f"{check.error:.1e}",
            style=None if check.passed else "red",
        )
    console.print(table)
    console.print(
        "differing: elements whose bits are not equal in PyTorch and JAX, over all steps;"
        " error: max |difference| / max |reference| against NumPy in float64"
    )
    for line in result.missing:
        console.print(escape(line), style="yellow", soft_wrap=True)
    verdict = result.verdict
    console.print(escape(verdict), style="green" if result.passed else "red", soft_wrap=True)
