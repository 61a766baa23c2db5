"""``ema plan``: the options of :func:`ema.plan.model.plan_ema` as those of a command."""

# No `from __future__ import annotations` here, for the reason that ema/command/main.py gives.

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Annotated, cast

from ema.options import OnNonfinite
from ema.plan.model import plan_ema
from ema.plan.quantities import parse_quantity

if TYPE_CHECKING:
    import typer

__all__ = ["add_plan"]


def add_plan(app: "typer.Typer", errors: Callable[[], AbstractContextManager[None]]) -> None:
    """Give ``app`` the command; ``errors`` is what turns our errors into one line."""
    import typer

    @app.command()
    def plan(
        params: Annotated[str, typer.Option(help="Averaged parameters, as 70e9, 70B or 124M.")],
        *,
        ranks: Annotated[int, typer.Option(help="Processes, such as one a GPU.")] = 1,
        dtype: Annotated[
            str, typer.Option(help="Of the average: float32, bfloat16 or float64.")
        ] = "float32",
        param_dtype: Annotated[str, typer.Option(help="Of the live weights.")] = "bfloat16",
        compensated: Annotated[
            bool, typer.Option("--compensated", help="With a remainder beside the average.")
        ] = False,
        on_nonfinite: Annotated[str, typer.Option(help="propagate, skip or raise.")] = "propagate",
        update_every: Annotated[int, typer.Option(help="Steps from one update to the next.")] = 1,
        sharded: Annotated[
            bool,
            typer.Option(
                "--sharded/--replicated", help="Params shared out to the ranks, or all on each."
            ),
        ] = True,
        offload: Annotated[
            bool, typer.Option("--offload", help="The average lies in host memory.")
        ] = False,
        memory_bandwidth: Annotated[
            str, typer.Option(help="Bytes a second a rank, read and written, as 3.35T.")
        ] = "3.35T",
        host_link_bandwidth: Annotated[
            str, typer.Option(help="From accelerator to host, one way.")
        ] = "64G",
        host_memory_bandwidth: Annotated[
            str, typer.Option(help="A rank's part of host memory.")
        ] = "75G",
        network_bandwidth: Annotated[str, typer.Option(help="Into one rank.")] = "50G",
        disk_bandwidth: Annotated[str, typer.Option(help="Of one rank.")] = "1G",
        update_overhead: Annotated[
            float, typer.Option(help="Seconds of an update besides memory traffic.")
        ] = 0.0,
        step_seconds: Annotated[
            float | None, typer.Option(help="Length of a training step, if known.")
        ] = None,
    ) -> None:
        """Show bytes, traffic and time of an average on paper. Defaults: an H100, vendor's figures."""
        with errors():
            typer.echo(
                plan_ema(
                    parse_quantity("params", params),
                    ranks,
                    dtype=dtype,
                    param_dtype=param_dtype,
                    compensated=compensated,
                    on_nonfinite=cast("OnNonfinite", on_nonfinite),  # checked there
                    update_every=update_every,
                    sharded=sharded,
                    offload=offload,
                    memory_bandwidth=parse_quantity("memory_bandwidth", memory_bandwidth),
                    host_link_bandwidth=parse_quantity("host_link_bandwidth", host_link_bandwidth),
                    host_memory_bandwidth=parse_quantity(
                        "host_memory_bandwidth", host_memory_bandwidth
                    ),
                    network_bandwidth=parse_quantity("network_bandwidth", network_bandwidth),
                    disk_bandwidth=parse_quantity("disk_bandwidth", disk_bandwidth),
                    update_overhead=update_overhead,
                    step_seconds=step_seconds,
                )
            )
