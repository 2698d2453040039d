"""The kernel for one step of a tiny batch: its mathematics by Triton's interpreter, its code by the compiler, its plans."""

import re
from types import SimpleNamespace

import interpreted
import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from torch_gru_fuse import equations
from torch_gru_fuse.kernels import aot, stream
from torch_gru_fuse.planner.stream import StreamPlan, plan_stream

EACH, OVERLAP = (8, 9), (9, 0)
SPARE = 0  # bytes on the stack
SMALL = StreamPlan(units=4, block_k=32, num_warps=4, depth=2)
# Of states in [-1, 1], which one rounding of the result and some of the sums (fp32: operations) may take it away.  The
# interpreter cuts fp32 to bf16 instead of rounding.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1.6e-2}
TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


# --- mathematics -----------------------------------------------------------------------------------------------------


def problem(dtype, B, I, H, L, bias=True):
    generator = torch.Generator().manual_seed(B + I + H + L)

    def draw(*shape, scale=1.0):
        return ((torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1) * scale).to(dtype)

    w_ih = [draw(3 * H, H if l else I, scale=H**-0.5) for l in range(L)]
    w_hh = [draw(3 * H, H, scale=H**-0.5) for _ in range(L)]
    b_ih, b_hh = ([draw(3 * H, scale=H**-0.5) for _ in range(L)] for _ in range(2))
    return draw(B, I, scale=2.0), draw(L, B, H), w_ih, w_hh, b_ih if bias else None, b_hh if bias else None


def expected(x, h0, w_ih, w_hh, b_ih, b_hh):
    params = [w_ih, w_hh] if b_ih is None else [w_ih, w_hh, b_ih, b_hh]
    flat = [t.double() for layer in zip(*params, strict=True) for t in layer]
    return equations.gru(x.double()[None], h0.double(), flat, b_ih is not None, len(w_ih), False)


def run(arguments, plan):
    """What the interpreted kernel writes."""
    h0 = arguments[1]
    output, h_n = torch.full_like(h0[-1:], float("nan")), torch.full_like(h0, float("nan"))
    interpreted.load("kernels.stream").stream_forward(*arguments, output, h_n, plan=plan)
    return output, h_n


def check(arguments, plan):
    for actual, wanted in zip(run(arguments, plan), expected(*arguments), strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=0, atol=TOLERANCE[actual.dtype] * len(arguments[2]))


@pytest.mark.parametrize("overlap, bias", [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize("B, I, H, L", [(1, 64, 64, 2), (2, 64, 32, 1), (3, 33, 17, 3), (8, 7, 40, 2)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_equations(dtype, B, I, H, L, bias, overlap):
    check(problem(dtype, B, I, H, L, bias), StreamPlan(8, 32, 4, 2, overlap))


@pytest.mark.parametrize("block_k, depth", [(32, 1), (32, 3), (64, 1), (64, 100), (128, 100), (32, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_steps_along_k(dtype, block_k, depth):
    """All of them up front, one at a time, the flight that goes from h to x in the middle of one, a loop."""
    for I, H in (64, 64), (40, 64), (70, 40):
        check(problem(dtype, 2, I, H, 2), StreamPlan(16, block_k, 4, depth, overlap=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_planned(dtype):
    for B, I, H, L in (1, 64, 64, 2), (4, 24, 32, 1), (1, 3, 16, 2):
        check(problem(dtype, B, I, H, L), plan_stream(B, I, H, L, dtype.itemsize, capability=OVERLAP))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_nan_stays_in_its_row(dtype):
    for which in (0, 1):
        arguments = problem(dtype, 2, 32, 32, 2)
        arguments[which].view(-1)[3] = float("nan")
        output, h_n = run(arguments, SMALL)
        assert output[0, 0].isnan().all() and h_n[:, 0].isnan().all()
        assert not output[0, 1].isnan().any()


def test_infinite_input():
    """Saturates its gates as in the equations; what pads a partial step is not multiplied with it."""
    arguments = problem(torch.float32, 1, 20, 20, 2)
    arguments[0][0, -1] = float("inf")
    check(arguments, SMALL)


# --- launches --------------------------------------------------------------------------------------------------------


@pytest.fixture
def launches(monkeypatch):
    """(constants, types, grid, values) of every launch; nothing is launched."""
    made = []

    def launcher(kernel, device, constants, types):
        def call(grid, stream, values, aligned):
            assert stream == 7 and aligned
            made.append((constants, types, grid, values))

        return call

    monkeypatch.setattr(stream, "launcher", launcher)
    monkeypatch.setattr(stream, "driver", SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda device: 7)))
    monkeypatch.setattr(stream, "_stacks", {})
    return made


def test_a_launch_a_layer(launches):
    x, h0, w_ih, w_hh, b_ih, b_hh = arguments = problem(torch.float32, 2, 24, 32, 3)
    output, h_n = torch.empty(1, 2, 32), torch.empty(3, 2, 32)
    stream.stream_forward(*arguments, output, h_n, plan=StreamPlan(4, 32, 4, 2, overlap=True))
    assert len(launches) == 3
    below = x
    for l, (constants, types, grid, values) in enumerate(launches):
        tensors = (below, h0[l], w_ih[l], w_hh[l], b_ih[l], b_hh[l], output if l == 2 else None, h_n[l])
        assert values == tuple(t if t is None else t.data_ptr() for t in tensors)
        assert types == tuple(t if t is None else t.dtype for t in tensors)
        assert grid == (8, 1, 1) and constants["I"] == below.shape[-1]
        assert (constants["BEFORE"], constants["AFTER"]) == (l < 2, l > 0)
        assert constants["launch_pdl"] == (l > 0)  # the lowest waits for what was before it
        below = h_n[l]


def test_no_overlap(launches):
    arguments = problem(torch.float16, 1, 24, 32, 2, bias=False)
    output, h_n = torch.empty(1, 32), torch.empty(2, 1, 32)
    stream.stream_forward(*arguments, output, h_n, plan=SMALL)
    for constants, types, _, values in launches:
        assert not (constants["BEFORE"] or constants["AFTER"] or constants["launch_pdl"])
        assert values[4:6] == types[4:6] == (None, None)


def test_what_is_not_aligned_is_copied(launches):
    x, *others = problem(torch.float32, 1, 24, 32, 1)
    room = torch.empty(25)
    room[1:] = x
    output, h_n = torch.empty(1, 32), torch.empty(1, 1, 32)
    stream.stream_forward(room[1:].view(1, 24), *others, output, h_n, plan=SMALL)
    ((*_, values),) = launches
    assert values[0] != room[1:].data_ptr() and not values[0] % 16
    assert values[1] == others[0].data_ptr()


@pytest.mark.parametrize("option", [True, False])
def test_option_reaches_the_code(option):
    """Triton's launcher reads it from there: `launch` passes nothing but addresses."""
    arguments = launch_arguments(torch.float16, plan_stream(1, 64, 64, 2, 2, capability=OVERLAP), 1, 64, 64, False, option)
    assert arguments["launch_pdl"] == option
    assert compile_launch(arguments, 90).metadata.launch_pdl == option


# --- code ------------------------------------------------------------------------------------------------------------


def launch_arguments(dtype, plan, B, I, H, before=False, after=False, bias=True, top=False):
    """Of one layer."""

    def new(*shape):
        return torch.empty(shape, dtype=dtype, device="meta")

    b, state = new(3 * H) if bias else None, new(B, H)
    out = state if top else None
    return stream.stream_launch(
        new(B, I), state, new(3 * H, I), new(3 * H, H), b, b, out, state, plan=plan, before=before, after=after
    )[1]


def compile_launch(arguments, capability):
    """As ``aot.compile_launch``, but all that the compiler made."""
    kernel = stream.stream_kernel
    tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    signature = {name: TYPES[tensors[name].dtype] if name in tensors else "constexpr" for name in kernel.arg_names}
    constants = {name: arguments[name] for name in kernel.arg_names if name not in tensors}
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in tensors}
    options = {name: arguments[name] for name in ("num_warps", "launch_pdl")}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


# B 1, 2, 4, 8; powers of two and others; rows of x that are no vectors; loops.
SHAPES = [
    (1, 512, 512), (8, 512, 512), (1, 128, 128), (4, 256, 256), (1, 1024, 1024), (1, 80, 512), (3, 33, 104), (2, 1024, 1024),
    (1, 40, 200), (1, 2048, 2048), (1, 3, 64), (8, 5, 128), (4, 512, 512), (2, 1000, 1000),
]  # fmt: skip


# Compute capability 9.0 with each shape and each dtype, but not with each of both.
@pytest.mark.parametrize(
    "B, I, H, dtype, capability",
    [
        pytest.param(*shape, dtype, capability, id=f"{'-'.join(map(str, shape))}-{str(dtype)[6:]}-sm{capability}")
        for i, shape in enumerate(SHAPES)
        for j, dtype in enumerate((torch.float32, torch.float16))
        for capability in (89, 90)
        if capability == 89 or (i + j) % 2 == 0
    ],
)
def test_code_of_plans(B, I, H, dtype, capability):
    """Nothing spills, and a program fits twice, or once where it has eight warps."""
    plan = plan_stream(B, I, H, 2, dtype.itemsize, capability=divmod(capability, 10))
    assert isinstance(plan, StreamPlan) and plan.overlap == (capability == 90)
    for inputs, after in {I: False, H: plan.overlap}.items():
        arguments = launch_arguments(dtype, plan, B, inputs, H, before=plan.overlap, after=after)
        compiled = compile_launch(arguments, capability)
        registers, stack_bytes = aot._usage(compiled.asm["cubin"])
        spilled = aot._spills(compiled.asm["ptx"], capability) if stack_bytes else 0
        assert max(spilled, stack_bytes) <= SPARE, f"{spilled} bytes spilled, {registers} registers"
        assert -(-registers // 8) * 8 * 32 * plan.num_warps * (2 if plan.num_warps == 4 else 1) <= 65536
        assert compiled.metadata.shared <= 16384


@pytest.mark.parametrize("B, I, H, L", [(1, 512, 512, 2), (8, 512, 512, 2)])
@pytest.mark.parametrize("before, after", [(True, False), (True, True), (False, True), (False, False)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_code_of_launches_that_overlap(dtype, before, after, B, I, H, L):
    """The signal comes first.  x is read and results are written after the wait, all of it, and weights before it."""
    plan = plan_stream(B, I, H, L, dtype.itemsize, capability=OVERLAP)
    ptx = compile_launch(launch_arguments(dtype, plan, B, I, H, before, after, top=True), 90).asm["ptx"]
    events = re.findall(r"griddepcontrol\.\w+|\bld\.global|\bst\.global", ptx)
    assert (events[0] == "griddepcontrol.launch_dependents") == before
    assert events.count("griddepcontrol.launch_dependents") == before and events.count("griddepcontrol.wait") == after
    if after:
        place = events.index("griddepcontrol.wait")
        early, late = events[:place], events[place + 1 :]
        assert "st.global" not in early and "st.global" in late
        if plan.depth:
            assert 0 < late.count("ld.global") < early.count("ld.global")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("after", [False, True])
def test_weights_go_straight_from_16_byte_loads_to_products(dtype, after):
    """The layout of the weights is that of the product: only operands move, and a sum along k is five shuffles."""
    plan = StreamPlan(4, 512 // dtype.itemsize, 4, 8)
    compiled = compile_launch(launch_arguments(dtype, plan, 1, 512, 512, after=after), 90 if after else 89)
    assert compiled.asm["ptx"].count("ld.global.v4.b32") >= 3 * 2 * 512 // plan.block_k
    assert compiled.asm["ptx"].count("shfl.sync") == 20
    moved = re.findall(r"convert_layout [^:]* : tensor<(\S+)x\w+,", compiled.asm["ttgir"])
    assert all(shape.startswith("1x1x") or shape == f"1x{plan.units}" for shape in moved), moved
    assert "mma" not in compiled.asm["ptx"]  # float32 is float32


# --- plans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capability", [EACH, OVERLAP, (12, 0)])
@pytest.mark.parametrize("multiprocessors", [58, 128, 132])
@pytest.mark.parametrize("element_bytes", [2, 4])
def test_plans(element_bytes, multiprocessors, capability):
    for H in (8, 64, 128, 200, 256, 512, 1000, 1024, 2048):
        for I in (1, 64, H):
            for B in (1, 2, 5, 8):
                for L in (1, 2, 4, 8):
                    plan = plan_stream(B, I, H, L, element_bytes, multiprocessors=multiprocessors, capability=capability)
                    if isinstance(plan, str):
                        assert B > 1 and H > 512 and "products" in plan
                        continue
                    assert plan.units * plan.programs(H) >= H
                    for size in (plan.units, plan.block_k, plan.num_warps):
                        assert size > 0 and size & (size - 1) == 0
                    assert plan.depth >= 0 and plan.overlap == (capability >= OVERLAP and L > 1)


# us of this plan on an H200 in a CUDA graph.
TIMED = [
    (1, 128, 128, 2, 2, OVERLAP, 3.26), (1, 256, 256, 2, 2, OVERLAP, 3.36), (1, 256, 256, 2, 4, OVERLAP, 3.50),
    (1, 512, 512, 2, 2, OVERLAP, 3.91), (1, 512, 512, 2, 4, OVERLAP, 4.52), (1, 512, 512, 2, 2, EACH, 4.97),
    (1, 512, 512, 2, 4, EACH, 5.29), (1, 512, 512, 4, 2, OVERLAP, 7.15), (1, 512, 512, 4, 2, EACH, 9.66),
    (4, 512, 512, 2, 2, OVERLAP, 6.00), (4, 512, 512, 2, 2, EACH, 7.24), (4, 512, 512, 2, 4, OVERLAP, 6.96),
    (8, 512, 512, 2, 2, OVERLAP, 10.93), (8, 512, 512, 2, 4, OVERLAP, 12.95),
    (1, 1024, 1024, 2, 2, OVERLAP, 7.97), (1, 1024, 1024, 2, 2, EACH, 7.48), (1, 1024, 1024, 2, 4, OVERLAP, 14.11),
    (1, 1024, 1024, 2, 4, EACH, 14.27),
]  # fmt: skip


def test_predictions():
    for B, I, H, L, element_bytes, capability, us in TIMED:
        plan = plan_stream(B, I, H, L, element_bytes, multiprocessors=132, capability=capability)
        assert 0.85 < plan.predicted_us / us < 1.2


def test_no_plan():
    assert "batch" in plan_stream(9, 64, 64, 1, 2)
    assert "H = 333" in plan_stream(1, 64, 333, 1, 2)
    assert "I = 333" in plan_stream(1, 333, 64, 1, 2)
    assert isinstance(plan_stream(1, 33, 64, 1, 2), StreamPlan)
    assert "2048" in plan_stream(1, 64, 2056, 1, 2)
    assert "2048" in plan_stream(1, 8000, 64, 1, 2)
    assert isinstance(plan_stream(8, 512, 512, 2, 2), StreamPlan)
    assert "products" in plan_stream(4, 1024, 1024, 2, 2)
    with pytest.raises(ValueError, match="layers is 0"):
        plan_stream(1, 64, 64, 0, 2)
    with pytest.raises(ValueError, match="element_bytes is 8"):
        plan_stream(1, 64, 64, 1, 8)
