"""``ema inspect`` and ``ema convert``: what a file holds, and what another library has saved."""

# No `from __future__ import annotations` here, for the reason that `ema.command.main` gives.

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ema.checkpoint import atomic
from ema.errors import CheckpointError, EMAWarning, listing
from ema.schedules import Schedule

if TYPE_CHECKING:
    import typer

__all__ = ["add_convert", "add_inspect"]


def add_inspect(app: "typer.Typer", errors: Callable[[], AbstractContextManager[None]]) -> None:
    """Add the command ``inspect``.

    Args:
        app: the application.
        errors: turns an error of ours into one line.
    """
    import typer

    @app.command()
    def inspect(
        file: Annotated[Path, typer.Argument(help="ema.safetensors, or the folder with it.")],
    ) -> None:
        """Show what a saved average is and how far, and check every tensor."""
        from ema.checkpoint.description import describe_file

        with errors():
            description = describe_file(file)
        typer.echo(description)
        raise typer.Exit(1 if description.damaged else 0)


def add_convert(
    app: "typer.Typer",
    errors: Callable[[], AbstractContextManager[None]],
    parse: Callable[[str], Schedule],
) -> None:
    """Add the command ``convert``.

    Args:
        app: the application.
        errors: turns an error of ours into one line.
        parse: reads a schedule.
    """
    import typer

    @app.command()
    def convert(
        source: Annotated[Path, typer.Argument(help="A file or folder of another library.")],
        target: Annotated[Path, typer.Argument(help="File ending in .safetensors, or a folder.")],
        *,
        names: Annotated[
            Path | None,
            typer.Option(help="Text file with the names of the parameters, one a line, in order."),
        ] = None,
        name: Annotated[str | None, typer.Option(help="Which of several averages.")] = None,
        key: Annotated[
            str | None,
            typer.Option(help="The part that is the average, such as ema or state.ema_params."),
        ] = None,
        averaged: Annotated[
            bool, typer.Option("--averaged", help="The weights are averages; nothing says so.")
        ] = False,
        rename: Annotated[
            Path | None,
            typer.Option(
                help="Text file with a name of the source and the parameter's on each line; a name"
                " alone is left out."
            ),
        ] = None,
        exclude: Annotated[
            list[str] | None,
            typer.Option(help="Pattern of names to leave out; may be given often."),
        ] = None,
        force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
        max_bytes: Annotated[
            int | None, typer.Option(help="That the tensors may take in memory.")
        ] = None,
        step: Annotated[int | None, typer.Option(help="Steps so far.")] = None,
        count: Annotated[int | None, typer.Option(help="Updates so far.")] = None,
        schedule: Annotated[str | None, typer.Option(help="As in ema info.")] = None,
        update_after_step: Annotated[int | None, typer.Option(help="As it was set.")] = None,
        update_every: Annotated[int | None, typer.Option(help="As it was set.")] = None,
    ) -> None:
        """Write an average of diffusers, ema-pytorch, torch-ema, timm, … as ema.safetensors."""
        from ema.checkpoint.paths import errors_of
        from ema.converting import BUFFERS
        from ema.converting import convert as run

        with errors(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", EMAWarning)
            with errors_of(names or "", "read"):
                listed = None if names is None else _lines(names)
            with errors_of(rename or "", "read"):
                table = None if rename is None else _table(rename)
            result = run(
                source,
                target,
                key=key,
                averaged=averaged,
                force=force,
                max_bytes=max_bytes,
                names=listed,
                exclude=exclude or BUFFERS,
                rename=table,
                name=name,
                step=step,
                count=count,
                decay=None if schedule is None else parse(schedule),
                update_after_step=update_after_step,
                update_every=update_every,
            )
        for warning in caught:
            typer.secho(f"ema: {warning.message}", fg=typer.colors.YELLOW, err=True)
        typer.echo(f"{result.place}: {len(result.names)} averages of {result.kind}")
        for note in result.notes:
            typer.echo(f"note: {note}")
        if result.left_out:
            typer.echo(f"left out: {listing(result.left_out)}")


def _table(file: Path) -> dict[str, str | None]:
    """The names on each line: one of the source, and that of the parameter or None."""
    table: dict[str, str | None] = {}
    for line in _lines(file):
        old, *new = line.split()
        if len(new) > 1 or old in table:
            raise CheckpointError(
                "each line must have a name of the source, used once, and that of the parameter or"
                f" nothing, got {line!r:.200}"
            )
        table[old] = new[0] if new else None
    return table


def _lines(file: Path) -> list[str]:
    """The name on each line; it may hold spaces."""
    try:
        with atomic.open_file(file) as stream:  # refuses a device, which never ends
            text = stream.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"it must be text in UTF-8: byte {error.start} is not") from None
    return [line for line in map(str.strip, text.split("\n")) if line]
