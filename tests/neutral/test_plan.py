"""What an average costs on paper."""

from __future__ import annotations

import contextlib
import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import ema
from ema import plan_ema
from ema.command.main import build_app
from ema.plan.model import CHUNK, NARROW_CHUNK
from ema.plan.quantities import parse_quantity, show_bytes, show_count, show_seconds

DTYPES = st.sampled_from(["float32", "bfloat16", "float64"])
PARAM_DTYPES = st.sampled_from(["float16", "bfloat16", "float32", "float64"])
PARAMS = st.integers(1, 10**13)
RANKS = st.integers(1, 10_000)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"param_dtype": "float32"}, 12),  # p; a in and out
        ({}, 10),
        ({"param_dtype": "float32", "compensated": True}, 20),  # p; a and c, in and out
        ({"compensated": True}, 18),
        ({"dtype": "bf16"}, 6),
        ({"dtype": "bfloat16", "param_dtype": "fp32"}, 8),
        ({"dtype": "fp64", "param_dtype": "fp64"}, 24),
        ({"param_dtype": "half"}, 10),
        ({"on_nonfinite": "skip"}, 12),  # p once more
        ({"on_nonfinite": "raise", "param_dtype": "float32"}, 16),
        ({"dtype": "bf16", "on_nonfinite": "skip"}, 8),
    ],
)
def test_bytes_moved_a_parameter(settings, expected):
    plan = plan_ema(1_000, **settings)
    assert plan.traffic.total == expected
    assert plan.update_bytes == 1_000 * expected


def test_seventy_billion_parameters_on_512_ranks():
    plan = plan_ema(70e9, 512, memory_bandwidth=2.6e12, disk_bandwidth=1e9, network_bandwidth=50e9)
    assert plan.params_per_rank == 136_718_750
    assert plan.average_bytes == 546_875_000
    assert plan.remainder_bytes == 0
    assert plan.total_bytes == plan.file_bytes == 280_000_000_000
    assert plan.update_bytes == 1_367_187_500
    assert (
        plan.update_seconds
        == pytest.approx(1_367_187_500 / 2.6e12)
        == pytest.approx(0.526e-3, 1e-3)
    )
    assert plan.communication_bytes == 0
    assert plan.save_seconds == pytest.approx(0.546875)
    assert plan.gather_bytes == 280_000_000_000 - 546_875_000
    assert plan.one_file_seconds == pytest.approx(279.453125 / 50 + 280)
    # in: live kept (2 + 2), average over it (4 + 2); back: 2 + 2
    assert plan.swap_bytes == 14 * 136_718_750
    assert plan.swap_extra_bytes == 2 * 136_718_750


def test_averages_of_the_same_dtype_are_exchanged_and_nothing_is_kept_aside():
    plan = plan_ema(1_000, param_dtype="float32")
    assert (plan.swap_bytes, plan.swap_extra_bytes) == (32_000, 0)  # two reads, two writes, twice


def test_a_remainder_doubles_memory_and_file():
    plain, compensated = plan_ema(1_000, 4), plan_ema(1_000, 4, compensated=True)
    assert compensated.remainder_bytes == compensated.average_bytes == plain.average_bytes == 1_000
    assert compensated.file_bytes == 2 * plain.file_bytes == 8_000


def test_an_offloaded_average_goes_over_the_link_and_through_host_memory():
    plan = plan_ema(
        1e9,
        offload=True,
        on_nonfinite="skip",
        memory_bandwidth=1e12,
        host_link_bandwidth=50e9,
        host_memory_bandwidth=100e9,
        step_seconds=0.05,
        update_every=7,
    )
    assert plan.host_link_bytes == 2e9
    assert plan.host_memory_bytes == 12e9  # params arrive and are read; average read and written
    assert plan.update_seconds == pytest.approx(0.12)  # the slowest of 0.004, 0.04 and 0.12
    assert plan.exposed_seconds == pytest.approx(0.07)
    assert plan.amortized_seconds == pytest.approx(0.01)
    assert not plan.hidden
    # 5 times 2 bytes in device memory, 2 over the link
    assert plan.swap_seconds == pytest.approx(10e9 / 1e12 + 2e9 / 50e9)
    assert plan.swap_extra_bytes == 2e9


@pytest.mark.parametrize(
    ("slowest", "seconds"),
    [("memory_bandwidth", 4.0), ("host_link_bandwidth", 2.0), ("host_memory_bandwidth", 12.0)],
)
def test_the_slowest_stage_of_an_offloaded_update_decides(slowest, seconds):
    bandwidths = dict.fromkeys(
        ("memory_bandwidth", "host_link_bandwidth", "host_memory_bandwidth"), 1e15
    )
    plan = plan_ema(1e9, offload=True, on_nonfinite="skip", **{**bandwidths, slowest: 1e9})
    assert plan.update_seconds == pytest.approx(seconds)


def test_what_fits_behind_a_step_is_hidden_and_without_a_step_nothing_is():
    assert plan_ema(1e9, offload=True, step_seconds=0.2).hidden
    assert plan_ema(1e9, offload=True, step_seconds=0.2).amortized_seconds == 0.0
    assert not plan_ema(1e9, offload=True, step_seconds=0.1).hidden
    assert not plan_ema(1e9, offload=True).hidden
    assert not plan_ema(1e9, step_seconds=100).hidden  # on the device it takes the memory's time


def test_overhead_is_added_to_every_update():
    bare, real = plan_ema(1e6), plan_ema(1e6, update_overhead=1e-3, update_every=2)
    assert real.update_seconds == pytest.approx(bare.update_seconds + 1e-3)
    assert real.amortized_seconds == pytest.approx(real.update_seconds / 2)


@given(PARAMS, RANKS, DTYPES, PARAM_DTYPES)
def test_sharded_bytes_go_down_with_the_ranks_and_replicated_ones_do_not(
    params, ranks, dtype, param_dtype
):
    one = plan_ema(params, dtype=dtype, param_dtype=param_dtype)
    sharded = plan_ema(params, ranks, dtype=dtype, param_dtype=param_dtype)
    replicated = plan_ema(params, ranks, dtype=dtype, param_dtype=param_dtype, sharded=False)
    width = one.average_bytes // params
    assert one.average_bytes <= ranks * sharded.average_bytes < one.average_bytes + ranks * width
    assert sharded.total_bytes == one.total_bytes
    assert sharded.update_seconds <= one.update_seconds
    assert replicated.average_bytes == one.average_bytes
    assert replicated.update_seconds == one.update_seconds
    assert replicated.total_bytes == ranks * one.total_bytes
    assert replicated.gather_bytes == 0
    assert sharded.file_bytes == replicated.file_bytes == one.file_bytes


@given(PARAMS, RANKS, st.booleans(), st.integers(1, 1_000), st.floats(1e-3, 1e3))
def test_a_step_never_waits_longer_than_an_update_takes(params, ranks, offload, every, step):
    plan = plan_ema(params, ranks, offload=offload, update_every=every, step_seconds=step)
    assert 0.0 <= plan.amortized_seconds <= plan.exposed_seconds <= plan.update_seconds
    assert plan.amortized_seconds * every == pytest.approx(plan.exposed_seconds)
    assert plan.communication_bytes == 0


def test_the_chunk_is_that_of_the_backend():
    from ema.torch_backend.tensors import memory

    assert (CHUNK, NARROW_CHUNK) == (memory.CHUNK, memory.NARROW_CHUNK)
    assert plan_ema(1e9).buffer_bytes == 4 * CHUNK
    assert plan_ema(1e9, dtype="bf16").buffer_bytes == 4 * (CHUNK + 4 * NARROW_CHUNK)
    assert plan_ema(1e9, compensated=True).buffer_bytes == 12 * CHUNK
    assert plan_ema(1e9, dtype="fp64").buffer_bytes == 8 * CHUNK
    assert plan_ema(10).buffer_bytes == 40


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_the_model_holds_the_bytes_that_the_plan_says(param_dtype):
    import torch
    from torch import nn

    model = nn.Linear(64, 32).to(getattr(torch, param_dtype))
    averages = ema.EMAModel(model, 0.9).averaged_parameters()
    plan = plan_ema(64 * 32 + 32, param_dtype=param_dtype)
    assert sum(a.numel() * a.element_size() for a in averages.values()) == plan.average_bytes


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((0,), {}, "`params` must be a whole number of at least 1, got 0"),
        ((1.5,), {}, "`params` must be a whole number of at least 1, got 1.5"),
        ((float("nan"),), {}, "`params` must be finite, got nan"),
        ((1, 0), {}, "`ranks` must be at least 1, got 0"),
        ((1,), {"update_every": 0}, "`update_every` must be at least 1, got 0"),
        (
            (1,),
            {"dtype": "float16"},
            "`dtype` must be one of float32, bfloat16, float64, got 'float16'",
        ),
        ((1,), {"dtype": "fp16"}, "`dtype` must be one of float32, bfloat16, float64, got 'fp16'"),
        (
            (1,),
            {"param_dtype": "int8"},
            "`param_dtype` must be one of float16, bfloat16, float32, float64, got 'int8'",
        ),
        ((1,), {"dtype": ["float32"]}, "`dtype` must be one of float32, bfloat16, float64, got"),
        (
            (1,),
            {"dtype": "bf16", "compensated": True},
            "`compensated` must be False where `dtype` is bfloat16, got True",
        ),
        (
            (1,),
            {"on_nonfinite": "ignore"},
            "`on_nonfinite` must be 'propagate', 'skip' or 'raise', got 'ignore'",
        ),
        ((1,), {"offload": 1}, "`offload` must be a bool, got 1"),
        ((1,), {"memory_bandwidth": 0}, "`memory_bandwidth` must be positive, got 0.0"),
        ((1,), {"disk_bandwidth": -1}, "`disk_bandwidth` must be positive, got -1.0"),
        ((1,), {"update_overhead": -1}, "`update_overhead` must not be negative, got -1.0"),
        ((1,), {"step_seconds": 0}, "`step_seconds` must be positive, got 0.0"),
        ((True,), {}, "`params` must be a real number, got True (bool)"),
    ],
)
def test_a_bad_argument_is_named_with_its_rule_and_value(arguments, settings, message):
    with pytest.raises((ema.ArgumentError, ema.ArgumentTypeError), match=re.escape(message)):
        plan_ema(*arguments, **settings)


def test_a_plan_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan_ema(1).params = 2


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("70e9", 70e9),
        ("70B", 70e9),
        ("70b", 70e9),
        ("124M", 124e6),
        ("1.5T", 1.5e12),
        ("350k", 350e3),
        (" 64 GB/s ", 64e9),
        ("3.35TB/s", 3.35e12),
        ("64gb", 64e9),
        ("100B/s", 100.0),
        (".5e3k", 5e5),
        ("-3", -3.0),
    ],
)
def test_numbers_are_read_as_people_write_them(text, number):
    assert parse_quantity("params", text) == number


@pytest.mark.parametrize(
    "text", ["", "B", "70x", "7 0", "1.2.3", "e9", "nan", "inf", "1_000", "٣", "7\u212a"]
)
def test_what_is_no_number_is_refused_with_its_name(text):
    with pytest.raises(ema.ArgumentError) as caught:
        parse_quantity("params", text)
    assert str(caught.value) == (
        f"`params` must be a number such as 70e9, 70B, 124M or 3.35T, got {text!r}"
    )


def test_a_number_beyond_all_is_refused():
    with pytest.raises(ema.ArgumentError, match="`params` must be finite, got inf"):
        parse_quantity("params", "1e400")


@given(st.text())
def test_no_text_makes_the_reader_fail_with_another_error(text):
    for written in (text, f"1{text}", f"1e{text}"):
        with contextlib.suppress(ema.ArgumentError):
            assert isinstance(parse_quantity("params", written), float)


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (show_bytes(0), "0 B"),
        (show_bytes(999), "999 B"),
        (show_bytes(999.6), "1 kB"),
        (show_bytes(1e24), "1000000 EB"),
        (show_bytes(280e9), "280 GB"),
        (show_count(12), "12"),
        (show_count(124e6), "124 million"),
        (show_seconds(0), "0 s"),
        (show_seconds(2.1e-5), "21 µs"),
        (show_seconds(0.25), "250 ms"),
        (show_seconds(12345.6), "12346 s"),
    ],
)
def test_numbers_are_shown_in_three_digits_and_a_unit(shown, expected):
    assert shown == expected


def invoke(*arguments: str):
    return CliRunner().invoke(build_app(), ["plan", *arguments])


@pytest.mark.parametrize(
    ("arguments", "plan"),
    [
        ("--params 70e9 --ranks 512", plan_ema(70e9, 512)),
        (
            "--params 70B --ranks 512 --dtype bf16",
            plan_ema(70e9, 512, dtype="bfloat16"),
        ),
        (
            "--params 124M --ranks 8 --replicated --compensated",
            plan_ema(124e6, 8, sharded=False, compensated=True),
        ),
        (
            (
                "--params 7B --offload --update-every 4 --step-seconds 0.5 --on-nonfinite skip"
                " --host-link-bandwidth 450GB/s --host-memory-bandwidth 500G --param-dtype fp32"
                " --memory-bandwidth 4.8T --update-overhead 1e-5"
            ),
            plan_ema(
                7e9,
                offload=True,
                update_every=4,
                step_seconds=0.5,
                on_nonfinite="skip",
                host_link_bandwidth=450e9,
                host_memory_bandwidth=500e9,
                param_dtype="float32",
                memory_bandwidth=4.8e12,
                update_overhead=1e-5,
            ),
        ),
        (
            "--params 1B --ranks 3 --disk-bandwidth 2G --network-bandwidth 25G",
            plan_ema(1e9, 3, disk_bandwidth=2e9, network_bandwidth=25e9),
        ),
    ],
)
def test_the_command_prints_the_plan_of_its_options(arguments, plan):
    result = invoke(*arguments.split())
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{plan}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--params", "many"],
            "`params` must be a number such as 70e9, 70B, 124M or 3.35T, got 'many'",
        ),
        (["--params", "0"], "`params` must be a whole number of at least 1, got 0"),
        (["--params", "7B", "--ranks", "0"], "`ranks` must be at least 1, got 0"),
        (
            ["--params", "7B", "--disk-bandwidth", "fast"],
            "`disk_bandwidth` must be a number such as 70e9, 70B, 124M or 3.35T, got 'fast'",
        ),
        (
            ["--params", "7B", "--on-nonfinite", "ignore"],
            "`on_nonfinite` must be 'propagate', 'skip' or 'raise', got 'ignore'",
        ),
    ],
)
def test_a_bad_option_is_one_line_on_stderr_and_exit_code_2(arguments, message):
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"ema: {message}\n"


def test_the_table_says_all_that_the_options_ask_for():
    text = str(
        plan_ema(
            7e9,
            8,
            compensated=True,
            on_nonfinite="skip",
            update_every=4,
            step_seconds=0.5,
            update_overhead=1e-3,
        )
    )
    for line in (
        "Average:                  float32 + float32 remainder of bfloat16 params",
        "Ranks:                    8, params sharded",
        "Memory a rank:            7 GB, and a buffer of 12.6 MB",
        "Sent between ranks:       one number an update, for the guard; nothing in swaps",
        "Bytes moved a parameter:  20: params 2, guard 2, average 4 + 4, remainder 4 + 4",
        "Time an update:           6.22 ms at 3.35 TB/s, 1 ms of it overhead",
        "Added to a step:          1.56 ms, 0.31 % of a step, with an update every 4 steps",
        "Swap in and back:         3.66 ms, 1.75 GB kept aside",
        "  each rank its share:    7 s",
    ):
        assert line in text.splitlines(), text
    hidden = str(plan_ema(1e9, offload=True, step_seconds=1))
    assert "Added to a step:          nothing, the update is done behind it" in hidden
    assert "  over the host link:     2 GB, 31.2 ms at 64 GB/s" in hidden
