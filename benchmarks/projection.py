"""Who makes the input projection: the launch that prepares whole sequences, or PyTorch.

    python benchmarks/projection.py --tiles      # graph times with each tile: docs/results/projection-h200.txt
    python benchmarks/projection.py              # small layers, called one by one and in a graph: docs/results/small-h200.txt

Every result is compared with float64 before anything is timed.  Times are medians in microseconds of a call.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
from collections.abc import Callable

import torch
from host import microseconds
from torch import Tensor, nn

import torch_gru_fuse  # noqa: F401  (registers the ops)
from torch_gru_fuse.ops import ready_calls, whole_path
from torch_gru_fuse.planner.projection import projection_tile
from torch_gru_fuse.planner.tiles import Tile
from torch_gru_fuse.tools.timing import graph_of, milliseconds

DTYPES = torch.float16, torch.float32
#: rows, columns, bytes along k, warps, stages
TILES = (
    (16, 32, 256, 4, 3), (32, 32, 256, 4, 3), (32, 64, 128, 4, 3), (64, 64, 128, 4, 3), (64, 64, 64, 4, 4),
    (64, 128, 64, 4, 3), (128, 64, 128, 8, 3), (128, 128, 64, 8, 3),
)  # fmt: skip
#: I, H
WIDTHS = (64, 64), (256, 256), (128, 256), (1024, 512)
ROWS, BATCH = (32, 128, 512, 2048, 8192, 32768), 8
#: I, H, B, T, layers, directions
SMALL = (
    (64, 64, 8, 4, 1, 1), (16, 16, 8, 16, 1, 1), (64, 64, 8, 16, 1, 1), (64, 64, 8, 64, 1, 1), (64, 64, 64, 16, 1, 1),
    (64, 64, 64, 64, 1, 1), (128, 128, 8, 8, 1, 1), (128, 128, 64, 32, 1, 1), (128, 128, 8, 64, 1, 1), (64, 64, 8, 8, 2, 1),
    (64, 64, 8, 8, 1, 2), (128, 128, 128, 100, 1, 1), (1, 64, 8, 16, 1, 1), (1, 64, 64, 64, 1, 1), (7, 128, 32, 32, 1, 1),
    (7, 256, 32, 32, 1, 1), (33, 256, 32, 32, 1, 1), (100, 256, 32, 64, 1, 1), (100, 256, 8, 8, 1, 1),
    (250, 256, 8, 32, 1, 1), (300, 256, 8, 4, 1, 1),
)  # fmt: skip

op = torch.ops.torch_gru_fuse.gru


def graph_microseconds(run: Callable[[], object]) -> float:
    """Of a call in a CUDA graph."""
    return 1e3 * milliseconds(graph_of(run), torch.device("cuda"), 9)


def problem(I: int, H: int, B: int, T: int, L: int, D: int, dtype: torch.dtype) -> tuple:
    module = nn.GRU(I, H, L, bidirectional=D == 2).to("cuda", dtype)
    x, hx = torch.randn(T, B, I, device="cuda", dtype=dtype), torch.zeros(L * D, B, H, device="cuda", dtype=dtype)
    module.flatten_parameters()
    return x, hx, module._flat_weights, True, L, 0.0, False, D == 2, False


def set_tile(choose: Callable[..., Tile | None]) -> None:
    whole_path.projection_tile = choose
    whole_path._recipes.clear()
    ready_calls.forget()


def check(output: Tensor, arguments: tuple) -> None:
    x, hx, params, *flags = arguments
    expected = torch.gru(x.double(), hx.double(), [p.double() for p in params], *flags)[0]
    error = (output - expected).abs().max().item()
    assert error < 0.02, f"error {error}"


def tiles() -> None:
    print("I H dtype rows: PyTorch's product | by tile")
    for (I, H), dtype, rows in itertools.product(WIDTHS, DTYPES, ROWS):
        arguments = problem(I, H, BATCH, rows // BATCH, 1, 1, dtype)
        times = []
        for sizes in (None, *TILES):
            tile = None if sizes is None else Tile(*sizes[:2], sizes[2] // dtype.itemsize, *sizes[3:])
            set_tile(lambda *_, tile=tile: tile)
            check(op(*arguments)[0], arguments)
            name = "" if tile is None else f"{tile.block_b}x{tile.block_u}x{tile.block_k} "
            times.append(f"{name}{graph_microseconds(functools.partial(op, *arguments)):.2f}")
        print(f"{I} {H} {str(dtype)[6:]} {rows}:", " | ".join(times), flush=True)


def small() -> None:
    for sizes, dtype in itertools.product(SMALL, DTYPES):
        arguments = problem(*sizes, dtype)
        set_tile(projection_tile)
        check(op(*arguments)[0], arguments)
        ours, own = (functools.partial(f, *arguments) for f in (op, torch.gru))
        host, host_own = microseconds(ours, own, rounds=9)
        graph, graph_own = graph_microseconds(ours), graph_microseconds(own)
        set_tile(lambda *_: None)
        before, = microseconds(ours, rounds=9)
        I, H, B, T, L, D = sizes
        print(
            f"I{I} H{H} B{B} T{T} L{L} D{D} {str(dtype)[6:]}: one by one {host:.1f} cuDNN {host_own:.1f} "
            f"({host_own / host:.2f}x), graph {graph:.1f} cuDNN {graph_own:.1f} ({graph_own / graph:.2f}x); with PyTorch's "
            f"product {before:.1f}, graph {graph_microseconds(ours):.1f}", flush=True,
        )  # fmt: skip


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", action="store_true")
    arguments = parser.parse_args()
    os.environ["TORCH_GRU_FUSE_KERNELS"] = "triton"
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}")
    tiles() if arguments.tiles else small()


if __name__ == "__main__":
    main()
