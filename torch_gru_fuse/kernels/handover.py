"""How programs hand states to each other: the data is its own flag.

A step needs the whole state before it, which other programs made: it crosses through L2.  The sequences of states are filled
with a bit pattern that the kernels never store (all ones, a NaN; their own NaNs are made canonical), and a consumer reads what
it needs again and again until none of it is the pattern: one crossing, no fence.  Only values that a kernel wrote, and the
prepared initial state, are waited for; ``prepare`` fills and prepares.  Programs wait for each other, hence the cooperative
launch: all at once or none.

float32 states that a product takes as tf32 leave bits unused, and nobody has to fill anything: they cross in a ring of two
places, and the lowest bit of each says in which round it was written (``with_epoch``).  A place may be written again without
asking: who writes the state after the next has read the next one of all others, who made it of the one that is overwritten.

Every wait ends: a program that has waited for TIMEOUT ns of the GPU's clock, or sees that another has, sets the error flag,
tells the host and goes on with NaN, and so do all others.  ``p_error`` is int64[4]: the flag, 0 before; the address of an
int32 of the host; what to write there, not 0; and one that is not used.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def _tile_asm(vectors, k_vectors, vector_bytes, pack, element_bytes, timeout, settle):
    """PTX for one thread's part of a polled tile, and its operand constraints.

    vectors of vector_bytes each, pack elements in all; k_vectors of them in a row follow each other at a fixed distance and
    share an address.  ``settle`` false: the loads.  True: loads again until all is there, see ``_poll_asm``.
    """
    words = vector_bytes // 4
    outputs = vectors * words
    per_vector = pack // vectors
    address = 2 * outputs if settle else outputs
    loads = ""
    for i in range(vectors):
        first = address + i // k_vectors * k_vectors * per_vector
        loads += _load_asm(i * words, words, f"${first} + {i % k_vectors * 4 * vector_bytes}")
    if settle:
        loads = _poll_asm(loads, outputs, element_bytes, False, timeout, f"${address + pack}")
    return loads, _constraints(outputs, pack, settle)


@gluon.constexpr_function
def _epoch_asm(vectors, k_vectors, pack, timeout):
    """``_tile_asm`` to settle fp32 vectors of 16 bytes whose lowest bits say the epoch, an operand more."""
    outputs, address = 4 * vectors, 8 * vectors
    loads = ""
    for i in range(vectors):
        first = address + i // k_vectors * k_vectors * 4
        loads += _load_asm(4 * i, 4, f"${first} + {i % k_vectors * 64}")
    asm = _poll_asm(loads, outputs, 4, False, timeout, f"${address + pack}", f"${address + 2 * pack}")
    return asm, _constraints(outputs, pack, True) + ",r" * pack


@gluon.constexpr_function
def _gates_asm(gates, distance, vectors, pack, element_bytes, whole_words, timeout, settle):
    """The same for the tiles of several gates, in vectors of 16 bytes; a gate's are ``distance`` bytes after those of the one
    before.  One loop for all: they cross at once."""
    outputs = gates * vectors * 4
    per_vector = pack // vectors
    address = 2 * outputs if settle else outputs
    loads = ""
    for i in range(gates * vectors):
        loads += _load_asm(4 * i, 4, f"${address + i % vectors * per_vector} + {i // vectors * distance}")
    if settle:
        loads = _poll_asm(loads, outputs, element_bytes, whole_words, timeout, f"${address + pack}")
    return loads, _constraints(outputs, pack, settle)


@gluon.constexpr_function
def _load_asm(first, words, place):
    """A vector of so many words to registers from the first on; relaxed, for weak loads may be hoisted out of the loop."""
    suffix = {4: "v4.b32", 2: "v2.b32", 1: "b32"}[words]
    registers = ", ".join(f"${first + i}" for i in range(words))
    if words > 1:
        registers = "{" + registers + "}"
    return f"ld.relaxed.gpu.global.{suffix} {registers}, [{place}];\n"


@gluon.constexpr_function
def _constraints(outputs, pack, settle):
    """Registers, to ``settle`` also what they hold before; one address an element, to ``settle`` also the error's."""
    if not settle:
        return ",".join(["=&r"] * outputs + ["l"] * pack)
    return ",".join(["=&r"] * outputs + [str(i) for i in range(outputs)] + ["l"] * (2 * pack))


@gluon.constexpr_function
def _poll_asm(loads, outputs, element_bytes, whole_words, timeout, error, epoch=None):
    """Loads again until no element is all ones, then, for fp32, rounds to tf32 (half of the last kept bit is added; the product
    drops the rest).  epoch: or until it is the lowest bit of all; who wrote them has rounded.

    whole_words: who writes half precision does so in words of two, so a word is all there or not.  Reading the clock costs, so
    it is read at every 256th failure.  When the time is over the tile is NaN: the pattern is one, but rounding would make it 0.
    """
    chains = min(4, outputs)
    halves = element_bytes == 2 and not whole_words
    test = ""
    for i in range(outputs):
        m = f"m{i % chains}"
        if epoch is not None:  # m or (word xor epoch)
            test += f"xor.b32 {m}, ${i}, {epoch};\n" if i < chains else f"lop3.b32 {m}, {m}, ${i}, {epoch}, 0xf6;\n"
        elif halves:  # a half-word of ones is a zero half-word of the complement y: (y - 1) & ~y has its top bit
            test += f"sub.u32 m, 0xfffefffe, ${i};\nand.b32 m, m, ${i};\n"
            test += f"mov.b32 {m}, m;\n" if i < chains else f"or.b32 {m}, {m}, m;\n"
        else:
            test += f"mov.b32 {m}, ${i};\n" if i < chains else f"max.u32 {m}, {m}, ${i};\n"
    for i in range(1, chains):
        test += f"{'or.b32' if halves or epoch is not None else 'max.u32'} m0, m0, m{i};\n"
    if epoch is not None:
        test += "and.b32 m0, m0, 1;\nsetp.ne.u32 p, m0, 0;\n"
    elif halves:
        test += "and.b32 m0, m0, 0x80008000;\nsetp.ne.u32 p, m0, 0;\n"
    else:
        test += "setp.eq.u32 p, m0, 0xffffffff;\n"
    rounding = "".join(f"add.u32 ${i}, ${i}, 0x1000;\n" for i in range(outputs)) if element_bytes == 4 and epoch is None else ""
    nothing = "".join(f"mov.b32 ${i}, 0x7fc00000;\n" for i in range(outputs)) if element_bytes == 4 else ""
    return f"""{{
.reg .pred p, q;
.reg .b32 m, m0, m1, m2, m3, c;
.reg .b64 t, t0;
mov.u32 c, 0;
mov.u64 t0, 0;
POLL:
{test}vote.sync.any.pred p, p, 0xffffffff;
@!p bra END;
{loads}add.u32 c, c, 1;
and.b32 m, c, 255;
setp.ne.u32 p, m, 0;
@p bra POLL;
ld.relaxed.gpu.global.b32 m, [{error}];
setp.ne.u32 p, m, 0;
mov.u64 t, %globaltimer;
setp.eq.u64 q, t0, 0;
@q mov.u64 t0, t;
sub.u64 t, t, t0;
setp.gt.or.u64 p, t, {timeout}, p;
vote.sync.any.pred p, p, 0xffffffff;
@!p bra POLL;
st.relaxed.gpu.global.b32 [{error}], 1;
ld.relaxed.gpu.global.b64 t, [{error} + 8];
ld.relaxed.gpu.global.b32 c, [{error} + 16];
st.relaxed.sys.global.b32 [t], c;
{nothing}END:
{rounding}}}
"""


@gluon.jit
def issue(p, vectors: gl.constexpr, k_vectors: gl.constexpr, vector_bytes: gl.constexpr, pack: gl.constexpr):
    """Starts to read the tile at p; ``settle`` must follow."""
    element_bytes: gl.constexpr = p.dtype.element_ty.primitive_bitwidth // 8
    asm: gl.constexpr = _tile_asm(vectors, k_vectors, vector_bytes, pack, element_bytes, 0, False)
    return gl.inline_asm_elementwise(asm[0], asm[1], [p], dtype=p.dtype.element_ty, is_pure=False, pack=pack)


@gluon.jit
def settle(
    b, p, p_error,
    vectors: gl.constexpr, k_vectors: gl.constexpr, vector_bytes: gl.constexpr, pack: gl.constexpr, TIMEOUT: gl.constexpr,
):  # fmt: skip
    """The tile at p, as soon as all of it is there; b is what ``issue`` saw."""
    element_bytes: gl.constexpr = p.dtype.element_ty.primitive_bitwidth // 8
    asm: gl.constexpr = _tile_asm(vectors, k_vectors, vector_bytes, pack, element_bytes, TIMEOUT, True)
    return gl.inline_asm_elementwise(
        asm[0], asm[1], [b, p.to(gl.int64), p_error.to(gl.int64)], dtype=p.dtype.element_ty, is_pure=False, pack=pack
    )


@gluon.jit
def settle_epoch(
    b, p, p_error, epoch, vectors: gl.constexpr, k_vectors: gl.constexpr, pack: gl.constexpr, TIMEOUT: gl.constexpr
):
    """The fp32 tile at p, as soon as all of it is of that epoch, 0 or 1; b is what ``issue`` saw."""
    asm: gl.constexpr = _epoch_asm(vectors, k_vectors, pack, TIMEOUT)
    return gl.inline_asm_elementwise(
        asm[0], asm[1], [b, p.to(gl.int64), p_error.to(gl.int64), epoch], dtype=gl.float32, is_pure=False, pack=pack
    )


@gluon.jit
def with_epoch(b_h, epoch):
    """fp32 states rounded to tf32, as ``settle`` rounds, with an epoch, 0 or 1, in the lowest bit; NaN must be canonical."""
    return (((b_h.to(gl.int32, bitcast=True) + 0x1000) & -0x2000) | epoch).to(gl.float32, bitcast=True)


@gluon.constexpr_function
def _repeat(x, count):
    return [x] * count


@gluon.jit
def issue_gates(p, gates: gl.constexpr, distance: gl.constexpr, vectors: gl.constexpr, pack: gl.constexpr):
    """Starts to read tiles of so many gates, the first at p; ``settle_gates`` must follow."""
    BYTES: gl.constexpr = p.dtype.element_ty.primitive_bitwidth // 8
    asm: gl.constexpr = _gates_asm(gates, distance * BYTES, vectors, pack, BYTES, True, 0, False)
    types: gl.constexpr = _repeat(p.dtype.element_ty, gates)
    return gl.inline_asm_elementwise(asm[0], asm[1], (p,), dtype=types.value, is_pure=False, pack=pack)


@gluon.jit
def settle_gates(
    bs, p, p_error, distance: gl.constexpr, vectors: gl.constexpr, pack: gl.constexpr, whole_words: gl.constexpr,
    TIMEOUT: gl.constexpr,
):  # fmt: skip
    """The tiles, as soon as all of them are there; bs are what ``issue_gates`` saw."""
    BYTES: gl.constexpr = p.dtype.element_ty.primitive_bitwidth // 8
    asm: gl.constexpr = _gates_asm(len(bs), distance * BYTES, vectors, pack, BYTES, whole_words, TIMEOUT, True)
    types: gl.constexpr = _repeat(p.dtype.element_ty, len(bs))
    arguments = bs + (p.to(gl.int64), p_error.to(gl.int64))
    return gl.inline_asm_elementwise(asm[0], asm[1], arguments, dtype=types.value, is_pure=False, pack=pack)


@gluon.jit
def clear_beyond(b, m, WHOLE: gl.constexpr):
    """b where m, else 0: a weight of 0 would make NaN of an Inf that was read in its place."""
    if WHOLE:
        return b
    else:
        return gl.where(m, b, 0.0)


@gluon.jit
def prefetch(address):
    """Brings the lines at these addresses to L2."""
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], dtype=gl.int32, is_pure=False, pack=1
    )
