"""A stand-in for Gluon: the kernels that run whole sequences, on a CPU.

Triton's interpreter does not know Gluon, and a kernel whose programs wait for each other cannot be run one program after the
other.  So the kernels' own source is executed with a stand-in for Gluon: blocks are torch tensors, pointers are addresses,
every program is a thread, and ``settle`` polls the memory that the other threads write.  One thread runs at a time, until it
polls in vain, and sometimes not even so far.  Layouts and PTX are beyond it; the compiled kernels answer for those.  So are
races of warps, but for asynchronous copies: what they bring is NaN until a barrier after the wait, and they must not go where
something was read since the last barrier.
"""

from __future__ import annotations

import ctypes
import importlib
import math
import random
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

from torch_gru_fuse.kernels import wavefront

plainly = torch._C.DisableTorchFunctionSubclass  # within it blocks are tensors as any


class DType:
    """A Triton element type."""

    def __init__(self, dtype: torch.dtype):
        self.torch = dtype
        self.primitive_bitwidth = dtype.itemsize * 8

    def __eq__(self, other):
        return self.torch == other.torch

    def __hash__(self):
        return hash(self.torch)


class Block(torch.Tensor):
    """A block value."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        """As of any subclass, without what torch looks for beside: half of the time of an emulation was spent there."""
        with plainly():
            result = function(*arguments, **(options or {}))
        if type(result) is tuple:
            return tuple(r.as_subclass(Block) if type(r) is torch.Tensor else r for r in result)
        return result.as_subclass(Block) if type(result) is torch.Tensor else result

    def to(self, dtype, bitcast=False):
        dtype = dtype.torch if isinstance(dtype, DType) else dtype
        if bitcast:
            return self.view(dtype)
        result = super().to(dtype)
        return made_by_gpu(result) if dtype in (torch.float16, torch.bfloat16) else result

    def __iadd__(self, other):  # a block is a value: += makes a new one
        return self + other


def made_by_gpu(x):
    """x, its NaN those that a GPU makes of any; torch on a CPU may make the pattern."""
    integer, nan = (torch.int32, 0x7FFFFFFF) if x.dtype == torch.float32 else (torch.int16, 0x7FFF)
    x.view(integer)[x.isnan()] = nan
    return x


def block(value) -> Block:
    return torch.as_tensor(value).as_subclass(Block)


class Scalar(int):
    """A number that a program does not know when it is compiled; where it is compared it becomes a block."""

    def to(self, dtype):
        return self


def _make_operators():
    def operator(name, wrap):
        def operate(self, other):
            result = getattr(int, name)(self, other)
            return result if result is NotImplemented else wrap(result)

        return operate

    for name in ("add", "sub", "mul", "mod", "floordiv"):
        setattr(Scalar, f"__{name}__", operator(f"__{name}__", Scalar))
        setattr(Scalar, f"__r{name}__", operator(f"__r{name}__", Scalar))
    for name in ("eq", "ne", "lt", "le", "gt", "ge"):
        setattr(Scalar, f"__{name}__", operator(f"__{name}__", block))
    Scalar.__hash__ = int.__hash__


_make_operators()


def loop(*bounds):
    """``range`` of a kernel: a loop, not one that is unrolled."""
    return map(Scalar, range(*bounds))


class Pointer:
    """Addresses of elements of one type."""

    def __init__(self, address, dtype: torch.dtype):
        self.address = address
        self.element = dtype
        self.dtype = SimpleNamespace(element_ty=DType(dtype))

    def __add__(self, offset):
        with plainly():
            if isinstance(offset, torch.Tensor):
                offset = offset.long()  # offsets may have 32 bits, addresses have not
            return Pointer(self.address + offset * self.element.itemsize, self.element)

    def __sub__(self, offset):
        return self + -offset

    def to(self, dtype):
        return block(self.address)


def pieces(p: Pointer, address, mask):
    """(elements in memory, where they begin, mask) of what is accessed: in the tensors of the launch and nowhere else, or, if
    they are not known, anywhere.  The mask is None where all of ``address`` is meant."""
    wanted = address if mask is None else address[mask]
    if wanted.numel() == 0:
        return
    begin, end = (bound.item() for bound in wanted.aminmax())
    end += p.element.itemsize
    if not MEMORY:
        yield torch.frombuffer((ctypes.c_uint8 * (end - begin)).from_address(begin), dtype=p.element), begin, mask
        return
    for first, last, flat in MEMORY:
        if first <= begin and end <= last:
            assert flat.dtype == p.element
            yield flat, first, mask
            return
    left = wanted.numel()
    for first, last, flat in MEMORY:
        if first < end and begin < last:
            here = (address >= first) & (address < last)
            here = here if mask is None else here & mask
            count = here.sum().item()
            assert count == 0 or flat.dtype == p.element
            if count:
                yield flat, first, here
            left -= count
    assert left == 0, "an access outside of every tensor"


def read(p: Pointer, mask=True, other=0.0) -> Block:
    with plainly():
        address = torch.as_tensor(p.address)
        if mask is True:
            mask = None
        else:
            address, mask = torch.broadcast_tensors(address, torch.as_tensor(mask))
        values = torch.full(address.shape, other, dtype=p.element)
        for flat, begin, here in pieces(p, address, mask):
            if here is None:
                values = flat.take((address - begin) // p.element.itemsize)
            else:
                values[here] = flat.take((address[here] - begin) // p.element.itemsize)
        return values.as_subclass(Block)


def load(p: Pointer, mask=True, other=0.0):
    """A block, or a number that a program then calculates with."""
    values = read(p, mask, other)
    return values if values.dim() or values.is_floating_point() else Scalar(values)


def write(p: Pointer, value, mask=True):
    with plainly():
        address, mask, value = torch.broadcast_tensors(*(torch.as_tensor(v) for v in (p.address, mask, value)))
        for flat, begin, here in pieces(p, address, mask):
            flat[(address[here] - begin) // p.element.itemsize] = value[here]


class Layout:
    """Any layout: what it was made from."""

    def __init__(self, *arguments, **options):
        self.arguments, self.options = arguments, options
        self.size_per_thread = arguments[0] if arguments else None


class SharedLinearLayout(Layout):
    def check(self, shape):
        """Offsets, coordinates and elements are as many.  Leading dimensions that the layout does not know are buffers."""
        bases = self.arguments[0]
        shape = shape[-len(bases[0]) :]
        assert 2 ** len(bases) == math.prod(shape)
        assert [1 << max(basis[d] for basis in bases).bit_length() for d in range(len(shape))] == shape


class Shared:
    """Shared memory, or a view of it."""

    def __init__(self, data):
        self.data = data

    @property
    def dtype(self):
        return DType(self.data.dtype)

    def store(self, value):
        assert value.dtype == self.data.dtype and value.shape == self.data.shape
        self.data.copy_(value)

    def load(self, layout):
        PROGRAM.read.add(self.data.data_ptr())
        return self.data.clone().as_subclass(Block)

    def slice(self, start, length, dim=0):
        return Shared(self.data.narrow(dim, start, length))

    def permute(self, order):
        return Shared(self.data.permute(order))

    def index(self, i):
        return Shared(self.data[i])


class Program(threading.local):
    """Of each thread: which program it is; its asynchronous copies, not yet in a group, in groups, waited for but not seen by
    all warps; where shared memory was read since the last barrier."""

    def begin(self, i):
        self.id, self.copies, self.groups, self.waited, self.read = i, [], [], [], set()

    def end(self):
        assert not self.copies and not self.groups, "the program ends before its copies"


class Turns:
    """Whose turn it is: programs that ran at once would only take Python's lock from each other, at each of their polls."""

    def begin(self, programs):
        self.locks = {i: threading.Lock() for i in range(programs)}
        for lock in self.locks.values():
            lock.acquire()
        self.order = list(self.locks)
        self.in_vain = 0
        self.chance = random.Random(0)
        self.locks[0].release()

    def wait(self):
        self.locks[PROGRAM.id].acquire()

    def give(self):
        """To the next program, until it is this one's turn again."""
        following = self.order[(self.order.index(PROGRAM.id) + 1) % len(self.order)]
        if following != PROGRAM.id:
            self.locks[following].release()
            self.wait()

    def end(self):
        at = self.order.index(PROGRAM.id)
        del self.order[at]
        self.in_vain = 0
        if self.order:
            self.locks[self.order[at % len(self.order)]].release()

    def found(self):
        """The program has what it polled.  That not all run as far as they can makes it a matter of chance who is ahead."""
        self.in_vain = 0
        if self.chance.random() < 0.25:
            self.give()

    def others_may_bring_it(self):
        """Lets them; False when all have polled in vain, knowing what all have written: then no time is long enough."""
        self.in_vain += 1
        if self.in_vain > 2 * len(self.order):
            return False
        self.give()
        return True


MEMORY: list = []
PROGRAM = Program()
TURNS = Turns()


def start_copy(s, p, mask):
    assert s.data.data_ptr() not in PROGRAM.read, "a warp may still read what the copy overwrites"
    PROGRAM.copies.append((s, read(p, mask)))
    s.data.fill_(float("nan"))


def commit_group():
    PROGRAM.groups.append(PROGRAM.copies)
    PROGRAM.copies = []


def wait_group(pending):
    while len(PROGRAM.groups) > pending:
        PROGRAM.waited += PROGRAM.groups.pop(0)


def barrier():
    for s, value in PROGRAM.waited:
        s.store(value)
    PROGRAM.waited.clear()
    PROGRAM.read.clear()


def where(condition, a, b):
    if isinstance(condition, bool):
        if not isinstance(a, torch.Tensor) and not isinstance(b, torch.Tensor):
            return a if condition else b
        condition = torch.tensor(condition)
    if isinstance(a, Pointer):
        return Pointer(where(condition, a.address, b.address), a.element)
    return torch.where(condition, a, b).as_subclass(Block)


def minimum(a, b):
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else torch.as_tensor(a).clamp(max=b).as_subclass(Block)


def full(shape, value, dtype, layout=None):
    return torch.full(shape, value, dtype=dtype.torch).as_subclass(Block)


def allocate_shared(dtype, shape, layout):
    if isinstance(layout, SharedLinearLayout):
        layout.check(shape)
    return Shared(torch.full(shape, float("nan"), dtype=dtype.torch))


def stand_in() -> ModuleType:
    gl = ModuleType("gluon_language")
    for name in ("float32", "float16", "bfloat16", "uint8", "int32", "int64"):
        setattr(gl, name, DType(getattr(torch, name)))
    for name in ("NVMMADistributedLayout", "DotOperandLayout", "SliceLayout", "BlockedLayout", "SwizzledSharedLayout"):
        setattr(gl, name, Layout)
    gl.SharedLinearLayout = SharedLinearLayout
    gl.constexpr = None
    gl.cast = lambda x, dtype: x
    gl.maximum = max  # of programs and lanes only
    gl.barrier = barrier
    gl.static_range = range
    gl.program_id = lambda axis: PROGRAM.id
    gl.arange = lambda start, end, layout: block(torch.arange(start, end))
    gl.expand_dims = lambda x, axis: x.unsqueeze(axis)
    gl.zeros = lambda shape, dtype, layout: full(shape, 0, dtype)
    gl.full, gl.where, gl.minimum, gl.load, gl.store = full, where, minimum, load, write
    gl.sum = lambda x, axis: x.sum(axis)
    gl.convert_layout = lambda x, layout: x
    gl.allocate_shared_memory = allocate_shared
    return gl


def stand_in_jit(function=None, **options):
    return function if function is not None else stand_in_jit


def round_tf32(x: torch.Tensor) -> torch.Tensor:
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def round_operand(x):
    return round_tf32(x) if x.dtype == torch.float32 else x


def round_parameter(x):
    return where(x == x, round_operand(x), float("nan"))


def dot(w, h, acc):
    """Tensor cores ignore what tf32 does not hold: rounding is up to the kernel."""
    if w.dtype == torch.float32:
        assert not any((x.contiguous().view(torch.int32) & 0x1FFF).any() for x in (w, h)), "an operand that is not tf32"
    return acc + w.float() @ h.float()


def issue(p, vectors, k_vectors, vector_bytes, pack):
    """The addresses, for ``settle``.  A vector is loaded by the address of its first element."""
    address = torch.as_tensor(p.address)
    length = vector_bytes // p.element.itemsize

    def in_vectors(axis):
        if address.shape[axis] % length:
            return False
        vector = address.movedim(axis, -1).unflatten(-1, (-1, length))
        follows = vector == vector[..., :1] + torch.arange(length) * p.element.itemsize
        return follows.all() and (vector[..., 0] % vector_bytes == 0).all()

    with plainly():
        assert any(map(in_vectors, range(address.dim()))), "vectors that are none in memory"
    assert pack == vectors * length
    return address


def time_is_over(p_error):
    """Whether a program that polls in vain has to end: as it is itself the first to say so, or as another one has."""
    if read(p_error).item() == 0 and TURNS.others_may_bring_it():
        return False
    write(p_error, 1)
    ctypes.c_int32.from_address(read(p_error + 1).item()).value = read(p_error + 2).item()
    return True


def settle(b, p, p_error, *rest):
    assert torch.equal(b, p.address), "not the tile that was issued"
    integer = torch.int32 if p.element == torch.float32 else torch.int16
    while True:
        value = read(p)
        if not (value.as_subclass(torch.Tensor).view(integer) == -1).any():
            break
        if time_is_over(p_error):
            return torch.full_like(value, float("nan"))
    TURNS.found()
    return round_operand(value)


def settle_epoch(b, p, p_error, epoch, vectors, k_vectors, pack, timeout):
    assert torch.equal(b, p.address), "not the tile that was issued"
    while True:
        bits = read(p).as_subclass(torch.Tensor).view(torch.int32)
        if ((bits & 1) == int(epoch)).all():
            break
        if time_is_over(p_error):
            return block(torch.full_like(bits, 0, dtype=torch.float32) + float("nan"))
    TURNS.found()
    assert not (bits & 0x1FFE).any(), "states that are not tf32"
    return block((bits & -2).view(torch.float32))


def with_epoch(h, epoch):
    bits = h.as_subclass(torch.Tensor).contiguous().view(torch.int32)
    return block(((bits + 0x1000) & -0x2000 | int(epoch)).view(torch.float32))


def issue_gates(p, gates, distance, vectors, pack):
    return tuple(issue(p + g * distance, vectors, 1, 16, pack) for g in range(gates))


def settle_gates(bs, p, p_error, distance, *rest):
    return tuple(settle(b, p + g * distance, p_error) for g, b in enumerate(bs))


def load_emulated() -> SimpleNamespace:
    """``wavefront``, ``resident`` and ``staged`` from their sources, over the stand-in."""
    gl = stand_in()
    gluon = ModuleType("gluon")
    gluon.jit, gluon.constexpr_function, gluon.language = stand_in_jit, stand_in_jit, gl
    experimental = ModuleType("experimental")
    experimental.gluon = gluon
    ampere = ModuleType("ampere")
    ampere.async_copy = SimpleNamespace(
        async_copy_global_to_shared=start_copy,
        commit_group=commit_group,
        wait_group=wait_group,
    )
    name = "triton.experimental"
    replaced = {
        name: experimental,
        f"{name}.gluon": gluon,
        f"{name}.gluon.language": gl,
        f"{name}.gluon.language.nvidia": ModuleType("nvidia"),
        f"{name}.gluon.language.nvidia.ampere": ampere,
    }
    alias = "torch_gru_fuse_kernels_emulated"
    package = ModuleType(alias)
    package.__path__ = [str(Path(wavefront.__file__).parent)]
    before = {key: sys.modules.get(key) for key in replaced}
    sys.modules.update(replaced)
    sys.modules[alias] = package
    try:
        handover, lanes = (importlib.import_module(f"{alias}.{name}") for name in ("handover", "lanes"))
        handover.issue, handover.settle = issue, settle
        handover.issue_gates, handover.settle_gates = issue_gates, settle_gates
        handover.settle_epoch, handover.with_epoch = settle_epoch, with_epoch
        handover.prefetch = lambda address: None
        lanes.round_operand, lanes.round_parameter = round_operand, round_parameter
        lanes.sigmoid, lanes.tanh = lambda x: made_by_gpu(torch.sigmoid(x)), lambda x: made_by_gpu(torch.tanh(x))
        lanes.dot = dot
        # the kernels take over what they find there
        forward = ("wavefront", "resident", "staged")
        names = [n for f in forward for n in (f, f"{f}_backward") if Path(package.__path__[0], f"{n}.py").exists()]
        kernels = {name: importlib.import_module(f"{alias}.{name}") for name in names}
        for module in (handover, lanes, *kernels.values()):
            module.range = loop
        return SimpleNamespace(**kernels)
    finally:
        for key, module in before.items():
            if module is None:
                del sys.modules[key]
            else:
                sys.modules[key] = module


EMULATED = load_emulated()


def run(kernel, grid: tuple[int, ...], arguments: dict) -> None:
    """All programs, each a thread.  Arguments are tensors, beyond which nothing is touched, or all are addresses."""
    arguments = {k: v for k, v in arguments.items() if k not in ("launch_cooperative_grid", "maxnreg")}
    MEMORY.clear()

    def pointer(tensor):
        begin = tensor.data_ptr()
        if isinstance(tensor, torch.Tensor) and all(begin != other for other, _, _ in MEMORY):
            MEMORY.append((begin, begin + tensor.numel() * tensor.itemsize, tensor.view(-1)))
        return Pointer(begin, tensor.dtype)

    for name, value in arguments.items():
        if hasattr(value, "data_ptr"):
            arguments[name] = pointer(value)
        elif isinstance(value, tuple):
            arguments[name] = tuple(pointer(tensor) for tensor in value)
    failures = []
    TURNS.begin(grid[0])

    def program(i):
        PROGRAM.begin(i)
        TURNS.wait()
        try:
            with torch.no_grad():
                kernel(**arguments)
            PROGRAM.end()
        except BaseException as failure:  # handed to the test below
            failures.append(failure)
            ctypes.c_int.from_address(arguments["p_error"].address).value = 1  # the others end
        finally:
            TURNS.end()

    threads = [threading.Thread(target=program, args=(i,)) for i in range(grid[0])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@contextmanager
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
