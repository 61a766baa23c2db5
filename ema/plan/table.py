"""A plan as the table that ``ema plan`` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ema.plan.quantities import show_bytes, show_count, show_seconds

if TYPE_CHECKING:
    from ema.plan.model import Plan

__all__ = ["table"]

_LABEL = 26  # width of the label column
_RULE = 50  # width of the rules

_Rows = list[tuple[str, str]]


def table(plan: Plan) -> str:
    """Memory, traffic and time, files: a row each."""
    rule = "=" * _RULE
    rows = [*_memory(plan), *_traffic(plan), *_time(plan), *_files(plan)]
    lines = [f"{label:<{_LABEL}}{value}" for label, value in rows]
    return "\n".join([rule, "EMA PLAN", rule, *lines, rule])


def _memory(plan: Plan) -> _Rows:
    kind = f"{plan.dtype} + {plan.dtype} remainder" if plan.compensated else plan.dtype
    layout = "params sharded" if plan.sharded else "all params on each"
    own = show_bytes(plan.average_bytes + plan.remainder_bytes)
    where = " in host memory" if plan.offload else ""
    return [
        ("Average:", f"{kind} of {plan.param_dtype} params"),
        ("Params:", show_count(plan.params)),
        ("Ranks:", f"{plan.ranks}, {layout}" if plan.ranks > 1 else "1"),
        ("Memory a rank:", f"{own}{where}, and a buffer of {show_bytes(plan.buffer_bytes)}"),
        ("Memory in total:", show_bytes(plan.total_bytes)),
    ]


def _traffic(plan: Plan) -> _Rows:
    traffic = plan.traffic
    parts = [f"params {traffic.params}"]
    parts += [f"guard {traffic.guard}"] if traffic.guard else []
    parts += [f"average {traffic.average // 2} + {traffic.average // 2}"]
    if traffic.remainder:
        parts.append(f"remainder {traffic.remainder // 2} + {traffic.remainder // 2}")
    rows = [
        ("Bytes moved a parameter:", f"{traffic.total}: {', '.join(parts)}"),
        ("Bytes moved an update:", f"{show_bytes(plan.update_bytes)} a rank"),
    ]
    if plan.offload:
        rows += [
            ("  over the host link:", _over(plan.host_link_bytes, plan.host_link_bandwidth)),
            ("  in host memory:", _over(plan.host_memory_bytes, plan.host_memory_bandwidth)),
        ]
    return rows


def _time(plan: Plan) -> _Rows:
    update = show_seconds(plan.update_seconds)
    if not plan.offload:
        update += f" at {show_bytes(plan.memory_bandwidth)}/s"
    if plan.update_overhead:
        update += f", {show_seconds(plan.update_overhead)} of it overhead"
    added = show_seconds(plan.amortized_seconds)
    if plan.step_seconds is not None:
        added += f", {100 * plan.amortized_seconds / plan.step_seconds:.2g} % of a step"
    if plan.update_every > 1:
        added += f", with an update every {plan.update_every} steps"
    if plan.hidden:
        added = "nothing, the update is done behind it"
    aside = show_bytes(plan.swap_extra_bytes) if plan.swap_extra_bytes else "nothing"
    return [
        ("Time an update:", update),
        ("Added to a step:", added),
        ("Sent between ranks:", _sent(plan)),
        ("Swap in and back:", f"{show_seconds(plan.swap_seconds)}, {aside} kept aside"),
    ]


def _files(plan: Plan) -> _Rows:
    one_file = show_seconds(plan.one_file_seconds)
    rows = [("Checkpoint:", show_bytes(plan.file_bytes))]
    if plan.gather_bytes:
        rows.append(("  each rank its share:", show_seconds(plan.save_seconds)))
        gathering = f"{show_seconds(plan.gather_seconds)} to gather {show_bytes(plan.gather_bytes)}"
        one_file += f", {gathering}"
    return [*rows, ("  in one file:", one_file)]


def _over(count: float, bandwidth: float) -> str:
    return f"{show_bytes(count)}, {show_seconds(count / bandwidth)} at {show_bytes(bandwidth)}/s"


def _sent(plan: Plan) -> str:
    if not plan.communication_bytes:
        return "nothing in updates and swaps"
    return "one number an update, for the guard; nothing in swaps"
