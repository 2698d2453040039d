"""Whole sequences against cuDNN over a grid of sizes, both replayed from a CUDA graph, whatever the planner would choose.

    python benchmarks/sweep.py --json docs/results/sweep-h200.json
    python benchmarks/sweep.py --hidden 20,50,100,200,300,500 --steps 16,100    # some of these: padded-h200.txt
    python benchmarks/sweep.py --train --steps 4,8,16,100 --json docs/results/sweep-train-h100.json

Forward, or with --train forward and backward on a part of the grid; inputs = H, float32 with TF32 allowed and float16. Each
result is compared with float64 beside cuDNN's. The rows decide what `planner/plan.py` gives to these kernels; a test holds it
against them.
"""

from __future__ import annotations

import argparse
import json
import os
import time

import torch

from torch_gru_fuse.ops.support import gpu_of
from torch_gru_fuse.planner.whole_sequence import plan_whole_sequence, plan_whole_sequence_backward
from torch_gru_fuse.tools.bench import Problem, Shape, _error
from torch_gru_fuse.tools.timing import graph_of, milliseconds

DEVICE = torch.device("cuda")
COLUMNS = (
    "T", "B", "H", "layers", "directions", "dtype", "cudnn_graph_ms", "ms", "ratio", "cudnn_rms_error", "rms_error",
    "error_word", "lanes", "plan",
)  # fmt: skip
#: Batches by H.
BATCHES = {
    16: (1, 64, 1024), 32: (8, 256), 64: (1, 16, 128, 1024, 4096), 96: (32,), 128: (1, 8, 32, 128, 512, 1024, 4096),
    200: (16, 256), 256: (1, 8, 32, 64, 128, 256, 512, 2048, 4096), 384: (64,), 512: (1, 8, 32, 64, 128, 512, 1024, 2048),
    768: (32,), 1024: (1, 8, 32, 64, 128, 256, 512), 2048: (1, 8, 32, 64),
}  # fmt: skip
TRAIN_BATCHES = {
    16: (64,), 32: (8, 256), 64: (1, 64, 1024), 128: (1, 32, 128, 1024), 256: (1, 8, 32, 128, 512, 2048), 384: (64,),
    512: (1, 16, 64, 256, 1024), 1024: (1, 16, 64, 256), 2048: (1, 16, 64), 4096: (16,),
}  # fmt: skip
STEPS = (4, 16, 100)
STACKS = ((1, 1), (3, 1), (1, 2))  # layers, directions
MOST = 4096 * 256 * 64  # states of a sequence: larger ones take too long


def measure(shape: Shape, dtype: torch.dtype, train: bool) -> list | None:
    """One row, or None where there is no plan; of training, plans of the forward, if there is one, and of the backward."""
    gpu = gpu_of(0)
    lanes = 2 if shape.D == 2 else shape.L
    plans = [
        make(
            shape.B, shape.H, lanes, dtype.itemsize, reverse=shape.D == 2, multiprocessors=gpu.multiprocessors,
            shared_bytes=gpu.shared_bytes_per_program,
        )
        for make in ((plan_whole_sequence, plan_whole_sequence_backward) if train else (plan_whole_sequence,))
    ]  # fmt: skip
    if plans[-1] is None:
        return None
    problem = Problem(shape, dtype, DEVICE, train=train)
    exact = problem.exact()
    errors = [_error(run(), exact)[1] for run in (problem.own, problem.fused)]
    own, ours = (milliseconds(graph_of(run), DEVICE, 5) for run in (problem.own, problem.fused))
    sizes = [shape.T, shape.B, shape.H, shape.L, shape.D, str(dtype).removeprefix("torch.")]
    lanes, names = plans[-1].lanes, [str(plan and plan.kernel) for plan in plans]
    return [*sizes, round(own, 4), round(ours, 4), round(own / ours, 2), *errors, 0, lanes, "; ".join(names)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", help="comma-separated, instead of the grid's")
    parser.add_argument("--batch", default="8,64,512", help="with --hidden (%(default)s)")
    parser.add_argument("--steps", default=",".join(map(str, STEPS)), help="(%(default)s)")
    parser.add_argument("--seconds", type=float, default=600, help="no new row after that (%(default)s)")
    parser.add_argument("--train", action="store_true", help="forward and backward")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    grid = TRAIN_BATCHES if arguments.train else BATCHES
    if arguments.hidden:
        grid = dict.fromkeys(map(int, arguments.hidden.split(",")), tuple(map(int, arguments.batch.split(","))))
    os.environ["TORCH_GRU_FUSE_KERNELS"] = "triton"  # also where the planner would call cuDNN
    begin, rows = time.perf_counter(), []
    for hidden, batches in grid.items():
        for batch in batches:
            for steps in map(int, arguments.steps.split(",")):
                for layers, directions in STACKS:
                    states = batch * hidden * steps * max(layers, directions)
                    if states > MOST or time.perf_counter() - begin > arguments.seconds:
                        continue
                    for dtype in (torch.float32, torch.float16):
                        with torch.set_grad_enabled(arguments.train):
                            row = measure(Shape(steps, batch, hidden, hidden, layers, directions), dtype, arguments.train)
                        if row is not None:
                            rows.append(row)
                            print(*row, flush=True)
    if arguments.json:
        context = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cudnn": torch.backends.cudnn.version()}
        with open(arguments.json, "w") as file:
            json.dump({"context": context, "columns": COLUMNS, "rows": rows}, file)


if __name__ == "__main__":
    main()
