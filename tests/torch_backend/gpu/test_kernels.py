"""The GPU's kernels, in Triton's interpreter on the CPU: what they compute, not how fast."""

import math
import signal
import sys

import numpy as np
import pytest
import torch

from ema import rounding
from ema.torch_backend.gpu import kernels
from tests import processes

triton = pytest.importorskip("triton", reason="Triton has wheels for Linux only")
pytestmark = pytest.mark.usefixtures("interpreted")

SIZES = [1, 0, 3, 2047, 2048, 2049, 5000, 0, 64, 7]
COUNTS = [1, 2, 1000, 2**31 - 1, 2**31, 2**32 + 5]
WEIGHTS = [1e-7, 0.001, 0.3, math.nextafter(0.5, 0), 0.5, 0.75, 0.999, 1.0]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, 3.3e38, -3.3e38, 65504.0]


def numbers(sizes, dtype=torch.float32, special=False, shift=0):
    """Tensors of these sizes, each ``shift`` elements into its allocation."""
    tensors = [torch.randn(size + shift).to(dtype)[shift:] for size in sizes]
    if special:
        for tensor in tensors:
            values = torch.tensor(SPECIAL).to(dtype)[: len(tensor)]
            tensor[torch.randperm(len(tensor))[: len(values)]] = values
    return tensors


def different(ours, theirs):
    """How many elements differ; NaN equals NaN, and −0 is not 0."""
    count = 0
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        integer = torch.int32 if one.dtype == torch.float32 else torch.int16
        same = (one.view(integer) == other.view(integer)) | (one.isnan() & other.isnan())
        count += int((~same).sum())
    return count


def clones(tensors):
    return [tensor.clone() for tensor in tensors]


def moved(average, params, weight):
    """The CPU's own float32 update."""
    return params.float() if weight == 1.0 else torch.lerp(average.float(), params.float(), weight)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_mixed_has_the_bits_of_lerp_on_the_cpu(dtype, weight, shift):
    averages = numbers(SIZES, special=True, shift=shift)
    params = numbers(SIZES, dtype, special=True, shift=shift)
    expected = [moved(a, p, weight) for a, p in zip(averages, params, strict=True)]
    kernels.Fused(averages, params)(weight)
    assert different(averages, expected) == 0


@pytest.mark.parametrize("which", range(3))
def test_only_what_is_aligned_is_read_in_large_pieces(which):
    """Elsewhere a load of 16 bytes would be an error of the device, which nothing here can see."""
    tensors = [numbers([5000], shift=int(index == which))[0] for index in range(3)]
    aligned = [numbers([5000])[0] for _ in range(3)]
    average, params, remainder = zip(aligned, tensors, strict=True)
    fused = kernels.Fused(average, params, remainder)
    found = {launch.whole: launch.blocks.tolist() for _, launch in fused._launches}
    assert found == {True: [[0, 0], [0, 1]], False: [[0, 2], [1, 0], [1, 1], [1, 2]]}


def test_params_of_several_dtypes_take_one_call():
    averages = numbers([2100, 5, 2100])
    params = [
        p
        for dtype, size in zip(FLOATS, [2100, 5, 2100], strict=True)
        for p in numbers([size], dtype)
    ]
    expected = [moved(a, p, 0.01) for a, p in zip(averages, params, strict=True)]
    kernels.Fused(averages, params)(0.01)
    assert different(averages, expected) == 0


def compensated(average, remainder, params, weight):
    """The equation on the CPU, where ``torch.add`` with ``alpha`` is a fused multiply-add."""
    a, c, p, w = (np.float32(x) for x in (average, remainder, params.float(), weight))
    d = (p - a) - c
    y = torch.add(torch.from_numpy(c), torch.from_numpy(d), alpha=float(w)).numpy()
    t = a + y
    return torch.from_numpy(t), torch.from_numpy(y - (t - a))


@pytest.mark.parametrize("weight", [1e-7, 0.001, 0.7])
@pytest.mark.parametrize("dtype", FLOATS)
def test_compensated_keeps_the_remainder(dtype, weight):
    averages, remainders = numbers(SIZES), [r * 1e-8 for r in numbers(SIZES)]
    params = numbers(SIZES, dtype)
    update = kernels.Fused(averages, params, remainders)
    for _ in range(5):
        together = zip(averages, remainders, params, strict=True)
        expected = [compensated(*each, weight) for each in together]
        update(weight)
        assert different(averages, [a for a, _ in expected]) == 0
        assert different(remainders, [c for _, c in expected]) == 0


def test_compensated_copies_at_weight_one():
    averages, remainders, params = numbers(SIZES), numbers(SIZES), numbers(SIZES, special=True)
    kernels.Fused(averages, params, remainders)(1.0)
    assert different(averages, params) == 0
    assert different(remainders, [torch.zeros_like(r) for r in remainders]) == 0


def test_compensated_goes_where_a_plain_average_stalls():
    averages, remainders = [torch.ones(5)], [torch.zeros(5)]
    update = kernels.Fused(averages, [torch.full((5,), 1.001)], remainders)
    for _ in range(40):
        update(1e-5)
    exact = 1.001 - (np.float64(np.float32(1.001)) - 1) * (1 - 1e-5) ** 40
    assert averages[0].numpy() == pytest.approx(exact, rel=6e-8, abs=0)


def rounded(x, stream, count, offset):
    """Stochastic rounding of a float32 tensor on Python's integers."""
    key = rounding.key_of(stream, count)
    result = x.to(torch.bfloat16)
    for place, value in enumerate(x.view(torch.int32).tolist()):
        if not math.isnan(x[place]):
            index = (offset + place) & 0xFFFFFFFF
            bits = (value & 0xFFFFFFFF) + (rounding.mix(index ^ key) >> 16)
            upper = bits >> 16 & 0xFFFF
            result.view(torch.int16)[place] = upper - (1 << 16) * (upper >> 15)
    return result


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shift", [0, 8 - 3])
def test_stochastic_has_the_bits_of_the_contract(dtype, count, shift):
    """Also where the first elements are peeled off."""
    averages = numbers(SIZES, torch.bfloat16, special=True, shift=shift)
    params = numbers(SIZES, dtype, special=True, shift=shift)
    streams = [rounding.stream_of(f"layers.{index}", 7) for index in range(len(SIZES))]
    offsets = [0, 3, 2**32 - 1, 2**32 - 1000, 2**31 - 5, 5 * 2**32 + 17, 0, 0, 2**40, 1]
    together = zip(averages, params, streams, offsets, strict=True)
    expected = [rounded(moved(a, p, 0.01), s, count, o) for a, p, s, o in together]
    kernels.Fused(averages, params, None, streams, offsets)(0.01, count)
    assert different(averages, expected) == 0


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_no_nan_is_rounded_to_a_number(weight):
    """A carry out of the low bits would make the first two infinite or the last two zero."""
    params = torch.tensor([0x7F800001, -0x7FFFFF, 0x7FFFFFFF, -1], dtype=torch.int32)
    average = torch.zeros(4, dtype=torch.bfloat16)
    streams = [rounding.stream_of("w", 0)]
    for count in range(1, 9):
        kernels.Fused([average], [params.view(torch.float32)], None, streams)(weight, count)
        assert average.isnan().all()
        average.zero_()


def test_stochastic_rounding_is_unbiased():
    average, params = torch.ones(1 << 15, dtype=torch.bfloat16), torch.full((1 << 15,), 1.2)
    update = kernels.Fused([average], [params], None, [rounding.stream_of("w", 0)])
    for count in range(1, 6):
        update(0.001, count)
    expected = 1.2 - 0.2 * 0.999**5
    error = 2.0**-7 / math.sqrt(12 * len(average))  # of a mean, if each were off by half a step
    assert average.double().mean().item() == pytest.approx(expected, abs=5 * error)


def test_stochastic_copies_to_nearest_at_weight_one():
    average, params = numbers(SIZES, torch.bfloat16), numbers(SIZES, special=True)
    params[2][:] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8])  # ties, to even
    streams = [rounding.stream_of("w", 0)] * len(SIZES)
    kernels.Fused(average, params, None, streams)(1.0, 3)
    assert different(average, [p.to(torch.bfloat16) for p in params]) == 0


def test_bfloat16_without_streams_is_rounded_to_nearest():
    averages, params = numbers(SIZES, torch.bfloat16), numbers(SIZES)
    expected = [moved(a, p, 0.3).to(torch.bfloat16) for a, p in zip(averages, params, strict=True)]
    kernels.Fused(averages, params)(0.3)
    assert different(averages, expected) == 0


def kinds():
    """One of each kernel: averages, their remainders and streams."""
    streams = [rounding.stream_of("w", 0)] * len(SIZES)
    yield numbers(SIZES), None, None
    yield numbers(SIZES), numbers(SIZES), None
    yield numbers(SIZES, torch.bfloat16), None, streams


def test_nothing_is_written_at_weight_zero_or_where_the_flag_is_false():
    for averages, remainders, streams in kinds():
        params = numbers(SIZES, torch.bfloat16, special=True)
        before = clones([*averages, *(remainders or ())])
        update = kernels.Fused(averages, params, remainders, streams)
        update(0.0, 1)
        update(0.5, 1, torch.tensor(data=False))
        update(1.0, 1, torch.tensor(0, dtype=torch.int32))
        assert different([*averages, *(remainders or ())], before) == 0


def test_a_true_flag_changes_nothing_about_the_result():
    for averages, remainders, streams in kinds():
        params = numbers(SIZES, torch.bfloat16)
        ours, rest = clones(averages), None if remainders is None else clones(remainders)
        kernels.Fused(averages, params, remainders, streams)(0.01, 2**31 + 3)
        update = kernels.Fused(ours, params, rest, streams)
        update(0.01, 2**31 + 3, torch.tensor(data=True))
        assert different(ours, averages) == 0
        assert different(rest or [], remainders or []) == 0


def test_a_call_without_tensors_does_nothing():
    kernels.Fused([], [])(0.5)
    kernels.Fused([torch.empty(0)], [torch.empty(0)])(0.5)


def test_what_does_not_match_is_refused():
    one, two = torch.zeros(1), torch.zeros(2)
    with pytest.raises(ValueError, match="flat"):
        kernels.Fused([one], [two])
    with pytest.raises(ValueError, match="flat"):
        kernels.Fused([torch.zeros(4)[::2]], [two])
    with pytest.raises(ValueError, match="shorter"):
        kernels.Fused([one], [])
    with pytest.raises(TypeError, match="float64"):
        kernels.Fused([one.double()], [one.double()])


def test_control_c_waits_for_the_end_of_an_update(monkeypatch):
    """Two launches, with a signal in the first: both are made, then it is raised."""
    from ema.torch_backend.gpu import device_code

    class Launches:
        made = 0

        def __getitem__(self, grid):
            def launch(*args, **kwargs):
                self.made += 1
                signal.raise_signal(signal.SIGINT)

            return launch

    launches = Launches()
    monkeypatch.setattr(device_code, "update", launches)
    with pytest.raises(KeyboardInterrupt):
        kernels.Fused(numbers([3000]), numbers([3000]))(0.5)
    assert launches.made == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("place", [0, 1, 1234, -1])
def test_a_look_finds_one_bad_element(dtype, bad, shift, place):
    tensors = [*numbers(SIZES, dtype, shift=shift), *numbers([5000], torch.float32)]
    tensors[6][:] = torch.finfo(dtype).max
    look = kernels.Look(tensors)
    assert look()
    tensors[6][place] = bad
    assert not look()
    tensors[6][place] = -torch.finfo(dtype).max
    assert look()


@pytest.mark.parametrize("shifts", [(0, 0), (1, 1), (1, 2)])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64, torch.int8])
def test_an_exchange_moves_every_bit(dtype, shifts):
    ones, others = (
        [
            torch.randint(-128, 128, ((n + shift) * dtype.itemsize,), dtype=torch.int8).view(dtype)[
                shift:
            ]
            for n in SIZES
        ]
        for shift in shifts
    )
    before = [tensor.view(torch.int8).clone() for tensor in (*ones, *others)]
    around = [tensor._base.clone() for tensor in (*ones, *others)]
    for launch in kernels.Exchange(ones, others).launches():
        launch()
    after = [tensor.view(torch.int8) for tensor in (*others, *ones)]
    assert all(map(torch.equal, before, after))
    for tensor, old in zip((*ones, *others), around, strict=True):
        edge = tensor.storage_offset()
        assert torch.equal(tensor._base[:edge].view(torch.int8), old[:edge].view(torch.int8))


def test_what_cannot_change_places_is_refused():
    with pytest.raises(ValueError, match="change places"):
        kernels.Exchange([torch.zeros(4)], [torch.zeros(5)])
    with pytest.raises(ValueError, match="change places"):
        kernels.Exchange([torch.zeros(4)], [torch.zeros(4).double()])


def test_there_are_no_kernels_for_the_cpu():
    assert not kernels.available(torch.device("cpu"))


def test_nothing_loads_triton_where_there_is_no_gpu():
    code = (
        "import sys, torch; from torch import nn; from ema.torch_backend import EMAModel; from ema.torch_backend.gpu import kernels;"
        "model = nn.Linear(3, 3).bfloat16(); EMAModel(model).update();"
        "kernels.available(torch.device('cpu')); assert 'triton' not in sys.modules"
    )
    processes.run([sys.executable, "-c", code])


COMPILE = """
import re, sys
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from ema.torch_backend.gpu import device_code

TYPES = dict(table="*i64", blocks="*i32", finite="*i1")


def assembly(kernel, constants, **types):
    constants = dict(BLOCK=2048) | constants
    signature = {n: (TYPES | types).get(n, "constexpr") for n in kernel.arg_names}
    options = dict(num_warps=8, enable_fp_fusion=False)
    source = ASTSource(kernel, signature, constants)
    code = compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options=options).asm
    assert code["cubin"]
    return code["ptx"]


names = ("COMPENSATED", "STOCHASTIC", "GUARDED", "WHOLE")
for average, params, flags, multiplies in [
    (tl.float32, tl.uint16, (0, 0, 0, 1), 16),
    (tl.float32, tl.float16, (0, 0, 1, 0), 16),
    (tl.float32, tl.float32, (0, 0, 0, 1), 16),
    (tl.float32, tl.float32, (1, 0, 0, 1), 8),
    (tl.uint16, tl.uint16, (0, 1, 0, 1), 16),
]:
    constants = dict(AVERAGE=average, PARAMS=params)
    constants |= {name: bool(flag) for name, flag in zip(names, flags, strict=True)}
    ptx = assembly(device_code.update, constants, weight="fp32", count="i32")
    multiply = re.findall(r"(?:fma|mad|mul)[.a-z]*[.]f32", ptx)
    assert multiply == ["fma.rn.f32"] * multiplies, multiply
    if constants["WHOLE"]:
        assert "ld.global.v4.b32" in ptx
        assert "st.global.v4.b32" in ptx

for whole in (True, False):
    ptx = assembly(device_code.exchange, dict(ELEMENT=tl.int32, WHOLE=whole))
    assert "bar.sync" not in ptx
    assert ptx.count("ld.global.v4") == ptx.count("st.global.v4") == 4 * whole, ptx
    ptx = assembly(device_code.look, dict(PARAMS=tl.uint16, WHOLE=whole, BLOCK=4096))
    assert ptx.count("ld.global.v4") == 2 * whole
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the wheel with the compiler is for Linux")
@pytest.mark.parametrize("capability", ["80", "90"])
def test_the_code_for_a_gpu_fuses_what_is_written_so_and_nothing_else(tmp_path, capability):
    """8 elements a thread, two branches or one; compiling needs no GPU."""
    environment = {"TRITON_INTERPRET": None, "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-W", "error", "-c", COMPILE, capability]
    processes.run(command, environment)
