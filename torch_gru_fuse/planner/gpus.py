"""What a plan has to know of a GPU, as plain numbers: no torch, no driver, no GPU.

Sources.  Limits of a multiprocessor go by compute capability and are those of the table "Technical Specifications per Compute
Capability" of NVIDIA's CUDA programming guide.  Numbers of a card (multiprocessors, L2, bandwidth) are those of the whitepaper
or data sheet named beside it and, where these do not say, what the CUDA driver reports for the card (deviceQuery).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

__all__ = ["GPUS", "GPU", "gpu_named"]

_KB = 1024
_WARP = 32  # threads
# Programming guide, "Maximum number of resident blocks per SM": 32, 16, 24, 32, 24 for 8.0, 8.6, 8.9, 9.0, 12.0.  The least of
# them; torch does not report it, and programs of the kernels here are far fewer.
_PROGRAMS_PER_SM = 16
_REGISTERS_OF_A_WARP = 256  # registers are given to warps in pieces of so many: 8 a thread (CUDA occupancy calculator)
_RESERVED_SHARED_BYTES = _KB  # of each program for the system, from 8.0 on (programming guide, "Shared Memory")


@dataclass(frozen=True)
class GPU:
    """One model of GPU.

    Attributes:
        name: for people, "NVIDIA GeForce RTX 4090".
        capability: compute capability, (8, 9).
        multiprocessors: SMs that work.
        registers_per_sm: 32-bit registers of an SM.
        warps_per_sm: most warps resident on an SM.
        shared_bytes_per_sm: shared memory of an SM.
        shared_bytes_per_program: most of it that one program (thread block) may have, by opting in.
        l2_bytes: L2 cache.
        memory_bytes_per_s: bandwidth of device memory; None if not known.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    registers_per_sm: int
    warps_per_sm: int
    shared_bytes_per_sm: int
    shared_bytes_per_program: int
    l2_bytes: int
    memory_bytes_per_s: float | None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("name", "capability") or (field.name == "memory_bytes_per_s" and value is None):
                continue
            if not value > 0:
                raise ValueError(f"{field.name} of a GPU is {value!r}, expected a positive number")

    @classmethod
    def from_properties(
        cls,
        *,
        name: str,
        major: int,
        minor: int,
        multi_processor_count: int,
        regs_per_multiprocessor: int,
        max_threads_per_multi_processor: int,
        shared_memory_per_multiprocessor: int,
        shared_memory_per_block_optin: int,
        L2_cache_size: int,
        memory_clock_rate: int | None = None,
        memory_bus_width: int | None = None,
    ) -> GPU:
        """Any other GPU.  The arguments are attributes of what ``torch.cuda.get_device_properties`` returns.

        Sizes are in bytes, memory_clock_rate in kHz (two transfers a clock) and memory_bus_width in bits; without these two
        the bandwidth is not known.
        """
        known = memory_clock_rate is not None and memory_bus_width is not None
        return cls(
            name=name,
            capability=(major, minor),
            multiprocessors=multi_processor_count,
            registers_per_sm=regs_per_multiprocessor,
            warps_per_sm=max_threads_per_multi_processor // _WARP,
            shared_bytes_per_sm=shared_memory_per_multiprocessor,
            shared_bytes_per_program=shared_memory_per_block_optin,
            l2_bytes=L2_cache_size,
            memory_bytes_per_s=2e3 * memory_clock_rate * memory_bus_width / 8 if known else None,
        )

    def resident_programs(self, registers: int, num_warps: int, shared_bytes: int) -> int:
        """Programs that one SM holds at once; 0 if not even one.

        registers: of a thread.  shared_bytes: of a program, without what the system reserves.
        """
        if shared_bytes > self.shared_bytes_per_program:
            return 0
        registers_of_a_warp = -(-registers * _WARP // _REGISTERS_OF_A_WARP) * _REGISTERS_OF_A_WARP
        return min(
            self.registers_per_sm // (registers_of_a_warp * num_warps),
            self.warps_per_sm // num_warps,
            self.shared_bytes_per_sm // (shared_bytes + _RESERVED_SHARED_BYTES),
            _PROGRAMS_PER_SM,
        )


def _gpu(name: str, capability: tuple[int, int], multiprocessors: int, l2_kb: int, gb_per_s: float) -> GPU:
    # Programming guide: registers of an SM 64 K throughout; resident warps; shared memory of an SM and of a program in KB.
    warps, shared_kb, program_kb = {
        (8, 0): (64, 164, 163),
        (8, 6): (48, 100, 99),
        (8, 9): (48, 100, 99),
        (9, 0): (64, 228, 227),
        (12, 0): (48, 100, 99),
    }[capability]
    return GPU(
        name, capability, multiprocessors, 64 * _KB, warps, shared_kb * _KB, program_kb * _KB, l2_kb * _KB, gb_per_s * 1e9
    )


#: Known GPUs by the name that ``gpu_named`` takes.
GPUS = {
    # "NVIDIA Ada GPU Architecture" whitepaper, appendix A: 128 SMs, 73728 KB of L2, 1008 GB/s.
    "rtx4090": _gpu("NVIDIA GeForce RTX 4090", (8, 9), 128, 73728, 1008),
    # "NVIDIA Ampere GA102 GPU Architecture" whitepaper, comparison of GeForce cards: 82 SMs, 6144 KB, 936 GB/s.
    "rtx3090": _gpu("NVIDIA GeForce RTX 3090", (8, 6), 82, 6144, 936),
    # L4 data sheet: 300 GB/s.  deviceQuery: 58 SMs.  Ada whitepaper, AD104: 49152 KB.
    "l4": _gpu("NVIDIA L4", (8, 9), 58, 49152, 300),
    # "NVIDIA A100 Tensor Core GPU Architecture" whitepaper: 108 SMs, 40960 KB, 1555 GB/s, the 40 GB model (80 GB: 2039 GB/s).
    "a100": _gpu("NVIDIA A100", (8, 0), 108, 40960, 1555),
    # "NVIDIA H100 Tensor Core GPU Architecture" whitepaper, SXM5: 132 SMs, 50 MB; H100 data sheet: 3.35 TB/s.
    "h100": _gpu("NVIDIA H100 SXM", (9, 0), 132, 51200, 3350),
    # H200 data sheet: 4.8 TB/s; otherwise the GH100 of the H100 SXM5, as deviceQuery says.
    "h200": _gpu("NVIDIA H200", (9, 0), 132, 51200, 4800),
    # "NVIDIA RTX Blackwell GPU Architecture" whitepaper, appendix A: 170 SMs, 98304 KB, 1792 GB/s.
    "rtx5090": _gpu("NVIDIA GeForce RTX 5090", (12, 0), 170, 98304, 1792),
}


def gpu_named(name: str) -> GPU:
    """The GPU of that name: a key of ``GPUS``, in any case, with or without spaces, hyphens, underscores."""
    key = "".join(c for c in name.lower() if c not in " -_")
    if key not in GPUS:
        raise ValueError(f"GPU {name!r} is not known, expected one of {', '.join(GPUS)}")
    return GPUS[key]
