"""The ``ema`` command."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import ema
import ema.selftest
from ema.command.main import build_app, main, parse_schedule
from ema.schedules import SCHEDULES
from ema.selftest import Check, SelfTest
from tests import processes

FRAMEWORKS = {"torch", "jax", "flax", "optax", "transformers"}


def invoke(*arguments: str):
    return CliRunner().invoke(build_app(), list(arguments))


def table(decay, steps: int, **options) -> str:
    return f"{ema.describe_ema(decay, steps, **options)}\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--decay", "0.999", "--steps", "10000"], table(0.999, 10_000)),
        (
            ["--steps", "10000", "--decay", "0.999", "--update-every", "10"],
            table(0.999, 10_000, update_every=10),
        ),
        (["--half-life", "500", "--steps", "9000"], table(ema.HalfLife(steps=500), 9_000)),
        (
            ["--schedule", "HalfLife(steps=1000)", "--steps", "10000", "--update-every", "2"],
            table(ema.HalfLife(steps=1000), 10_000, update_every=2),
        ),
        (
            ["--schedule", "PowerFunction.from_std(0.1)", "--steps", "100"],
            table(ema.PowerFunction.from_std(0.1), 100),
        ),
        (["--steps", "10000"], table(ema.compute_optimal_decay(10_000), 10_000)),
        (
            ["--steps", "10000", "--update-every", "10"],
            table(ema.compute_optimal_decay(1_000), 10_000, update_every=10),
        ),
    ],
)
def test_info_prints_the_table_of_print_ema_info(arguments, expected):
    result = invoke("info", *arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout == expected
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--decay", "1.5", "--steps", "10"], "`decay` must lie in [0, 1], got 1.5"),
        (["--decay", "nan", "--steps", "10"], "`decay` must be finite, got nan"),
        (["--half-life", "-3", "--steps", "10"], "`half_life` must be positive, got -3.0"),
        (["--steps", "0"], "`steps` must be at least 1, got 0"),
        (["--steps", "10", "--update-every", "0"], "`update_every` must be at least 1, got 0"),
        (
            ["--decay", "0.9", "--half-life", "3", "--steps", "10"],
            "at most one of --decay, --half-life, --schedule, got --decay and --half-life",
        ),
        (
            ["--schedule", "HalfLife(steps=0)", "--steps", "10"],
            "`steps` must be positive, got 0.0",
        ),
        (
            ["--schedule", "exit()", "--steps", "10"],
            f"`schedule` must be one of {', '.join(SCHEDULES)}, got 'exit'",
        ),
    ],
)
def test_an_error_is_one_line_on_stderr_and_exit_code_2(arguments, message):
    result = invoke("info", *arguments)
    assert result.exit_code == 2
    assert result.stderr == f"ema: {message}\n"
    assert result.stdout == ""


@pytest.mark.parametrize(
    "schedule",
    [
        ema.ConstantDecay(decay=0.9),
        ema.HalfLife(steps=1e-5),
        ema.HalfLifeRampup(steps=1e20),
        ema.InverseGammaWarmup(decay=0.999),
        ema.HalfLifeRampup(steps=math.inf, rampup_ratio=0.1),
        ema.RampWarmup(decay=1),
        ema.ExponentialRamp(decay=0.9999, tau=2000),
        ema.DebiasedDecay(decay=0),
        ema.PowerFunction.from_std(0.1),
        ema.CosineDecay(start=0.9, total_steps=100),
        ema.UniformAverage(),
    ],
    ids=str,
)
def test_what_repr_prints_is_read_back(schedule):
    assert parse_schedule(repr(schedule)) == schedule
    assert parse_schedule(f"  {schedule}\n") == schedule


def test_from_std_is_read_with_and_without_its_name():
    expected = ema.PowerFunction.from_std(0.1)
    assert parse_schedule("PowerFunction.from_std(0.1)") == expected
    assert parse_schedule("PowerFunction.from_std(std=0.1)") == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "HalfLife",
        "HalfLife(",
        "HalfLife(1000)",
        "HalfLife(1000, steps=1000)",
        "UniformAverage(1000)",
        "HalfLife()",
        "HalfLife(steps=1, steps=2)",
        "HalfLife(steps=1, schedule='HalfLife')",
        "HalfLife(steps=1, decay=2)",
        "HalfLife(**{'steps': 1})",
        "HalfLife(*[1])",
        "HalfLife(steps=open('/etc/passwd'))",
        "HalfLife(steps=__import__('os').getpid())",
        "Schedule()",
        "ema.HalfLife(steps=1)",
        "HalfLife(steps=1).weight(1)",
        "(lambda: HalfLife(steps=1))()",
        "PowerFunction.from_std()",
        "PowerFunction.from_std(0.1, 0.2)",
        "PowerFunction.from_std(0.1, std=0.1)",
        "PowerFunction.from_std(width=0.1)",
        "UniformAverage.from_std(0.1)",
        "from_std(0.1)",
        "HalfLife(steps=1); import os",
        "HalfLife(steps=1)\x00",
        "(" * 10_000,
        "HalfLife(steps=" + "-" * 10_000 + "1)",
    ],
    ids=lambda text: repr(text[:40]),
)
def test_anything_else_is_refused_and_never_evaluated(text):
    with pytest.raises(ema.ArgumentError):
        parse_schedule(text)


def test_a_field_that_is_no_number_is_refused():
    with pytest.raises(ema.ArgumentTypeError, match="`steps` must be a real number, got 'a'"):
        parse_schedule("HalfLife(steps='a')")


@given(st.text())
def test_no_text_makes_the_parser_fail_with_another_error(text):
    for expression in (text, f"HalfLife({text})", f"HalfLife(steps={text})"):
        with contextlib.suppress(ema.EMAError):
            assert isinstance(parse_schedule(expression), ema.Schedule)


def test_the_version_is_printed():
    result = invoke("--version")
    assert (result.exit_code, result.stdout) == (0, f"ema {ema.__version__}\n")


def test_without_a_command_the_help_lists_them_all():
    result = invoke()
    for command in ("info", "plan", "selftest", "demo"):
        assert command in result.output


def test_the_console_script_runs():
    script = shutil.which("ema", path=str(Path(sys.executable).parent))
    assert script, "the package is not installed: no `ema` beside this Python"
    command = [script, "info", "--decay", "0.999", "--steps", "10000"]
    result = processes.run(command, {"PYTHONIOENCODING": "utf-8"})
    assert result.stdout == table(0.999, 10_000)


def python(code: str) -> subprocess.CompletedProcess[str]:
    return processes.run([sys.executable, "-c", code], check=False)


def test_info_loads_no_framework():
    result = python(
        "import sys\n"
        "from ema.command.main import main\n"
        "sys.argv = ['ema', 'info', '--steps', '1000', '--schedule', 'HalfLife(steps=9)']\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as exit:\n"
        f"    print('loaded', sorted({FRAMEWORKS!r} & set(sys.modules)), exit.code)\n"
    )
    assert result.stdout.splitlines()[-1] == "loaded [] 0", result.stderr


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_typer_or_rich_one_line_names_the_extra(missing):
    result = python(
        f"import sys; sys.modules['{missing}'] = None; from ema.command.main import main; main()"
    )
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr == f"ema: `{missing}` is not installed: pip install 'ema[cli]'\n"


def test_main_is_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ema", "--version"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"ema {ema.__version__}\n"


CHECK = Check(
    name="HalfLife", dtype="float32", elements=100, differing=0, error=1e-7, largest_error=1e-5
)
RESULT = SelfTest(machine="a machine", versions={"torch": "9.9"}, checks=(CHECK,), missing=())


@pytest.mark.parametrize(
    ("result", "exit_code", "lines"),
    [
        (RESULT, 0, ["a machine", "torch 9.9", "0 of 100 elements differ between PyTorch and JAX"]),
        (
            dataclasses.replace(RESULT, checks=(CHECK, dataclasses.replace(CHECK, differing=3))),
            1,
            ["3 of 200 elements differ between PyTorch and JAX: bit equality needs a CPU with"],
        ),
        (
            dataclasses.replace(RESULT, checks=(dataclasses.replace(CHECK, error=0.5),)),
            1,
            ["an average is wrong: it is off by 5.0e-01 from float64"],
        ),
        (
            dataclasses.replace(
                RESULT,
                checks=(dataclasses.replace(CHECK, differing=None),),
                missing=("`jax` is not installed: pip install 'ema[jax]'",),
            ),
            0,
            ["not compared", "`jax` is not installed: pip install 'ema[jax]'"],
        ),
    ],
    ids=["equal", "different", "wrong", "one backend"],
)
def test_selftest_prints_what_it_found_and_exits_accordingly(monkeypatch, result, exit_code, lines):
    monkeypatch.setattr(ema.selftest, "run", lambda: result)
    printed = invoke("selftest")
    assert printed.exit_code == exit_code
    for line in lines:
        assert line in printed.stdout


def test_selftest_prints_what_any_code_page_can(monkeypatch):
    monkeypatch.setattr(ema.selftest, "run", lambda: RESULT)
    printed = invoke("selftest").stdout  # rich draws its table as the terminal can
    assert {c for c in printed if not c.isascii() and not "\u2500" <= c <= "\u257f"} == set()


def test_selftest_without_any_framework_says_what_to_install(monkeypatch):
    for module in ("torch", "jax", "optax"):
        monkeypatch.setitem(sys.modules, module, None)
    printed = invoke("selftest")
    assert printed.exit_code == 1
    assert printed.stderr == (
        "ema: neither torch nor jax is installed: pip install 'ema[torch,jax]'\n"
    )


@pytest.mark.parametrize(
    ("arguments", "steps", "folder"),
    [([], None, "ema-demo"), (["--steps", "30", "--out", "pictures"], 30, "pictures")],
)
def test_demo_runs_with_the_steps_and_the_folder_that_were_given(
    monkeypatch, arguments, steps, folder
):
    calls = []
    module = types.ModuleType("ema.demo")
    module.run = lambda **options: calls.append(options)
    monkeypatch.setitem(sys.modules, "ema.demo", module)
    assert invoke("demo", *arguments).exit_code == 0
    (options,) = calls
    assert options.pop("console").__class__.__name__ == "Console"
    assert options == {"steps": steps, "folder": Path(folder)}


def test_a_demo_whose_extra_is_missing_says_so_in_one_line(monkeypatch):
    def run(**options):
        raise ema.MissingExtraError("`sklearn` is not installed: pip install 'ema[demo]'")

    module = types.ModuleType("ema.demo")
    module.run = run
    monkeypatch.setitem(sys.modules, "ema.demo", module)
    result = invoke("demo")
    assert result.exit_code == 1
    assert result.stderr == "ema: `sklearn` is not installed: pip install 'ema[demo]'\n"
