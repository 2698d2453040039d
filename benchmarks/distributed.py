"""Trains one model on several GPUs, eagerly and compiled, and compares it with the same training on one.

    python benchmarks/distributed.py                                     # 2 GPUs and NCCL; docs/results/distributed-h200.txt
    python benchmarks/distributed.py --autocast float16 --hidden 512
    python benchmarks/distributed.py --device cpu --dtype float64        # 2 processes and gloo

Every process has an equal part of each batch; DDP and FSDP2 (`fully_shard`) average the gradients, so that after N steps of SGD
the weights are those of one process that saw the whole batches, but for rounding.  Those of eager training in one process are
what the others are compared with: "distance" is how far the weights are from them, over how far training moved them, "greatest"
the greatest difference of one weight, "losses" the relative difference of the losses.  Times are medians of single steps, which
all processes start together; the first step, which compiles, has a column of its own.  "ops" are the calls of this package's
ops in one step of one process.

Exit status: 0 when all trainings agree and the compiled ones ran through the ops, else 1.  Nothing runs longer than --seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from statistics import median
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import torch_gru_fuse

# NVLink multicast needs rights that containers do not always have, and NCCL then fails or waits for ever.
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports its start and stop on stderr
# FSDP warns that the output of a Linear is a view; nothing here changes one in place.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module")

#: torch.compile splits the graph of a DDP model into parts whose parameters fill a bucket: here behind the GRU, if H >= 256.
BUCKET_MB, OUTPUTS = 1.0, 1024
# Losses of float16 are scaled, or their gradients are too small for it; the learning rate undoes it, exactly.
SCALE = {None: 1.0, "bfloat16": 1.0, "float16": 2.0**14}
WARM_UP = 2  # steps that are not timed: the first compiles, the second may allocate


class Sizes(NamedTuple):
    T: int  # time steps
    B: int  # sequences of all processes together
    I: int  # inputs
    H: int  # units
    L: int  # layers


class Recurrent(nn.Module):
    """x [T, B, I] -> states [T, B, H]: Linear, GRU."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.embed = nn.Linear(sizes.I, sizes.H)
        self.rnn = nn.GRU(sizes.H, sizes.H, sizes.L)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(torch.relu(self.embed(x)))[0]


class Tagger(nn.Module):
    """x [T, B, I] -> scores [T, B, OUTPUTS]."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.body = Recurrent(sizes)
        self.out = nn.Linear(sizes.H, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(x))


# ---- the ways to train --------------------------------------------------------------------------------------------------


def _ddp(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return DistributedDataParallel(model, device_mesh=mesh, bucket_cap_mb=BUCKET_MB)


def _shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Two units, each gathered before its forward and again before its backward: the body, and the rest."""
    fully_shard(model.body, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _compile_body(model: nn.Module) -> nn.Module:
    model.body.compile(fullgraph=True)
    return model


#: name: (model, mesh) -> what is called in its place
DISTRIBUTED: dict[str, Callable[[nn.Module, DeviceMesh], nn.Module]] = {
    "DDP": _ddp,
    "DDP(compile)": lambda model, mesh: _ddp(torch.compile(model, fullgraph=True), mesh),
    "compile(DDP)": lambda model, mesh: torch.compile(_ddp(model, mesh)),
    "FSDP2": _shard,
    "FSDP2(compile)": lambda model, mesh: _shard(_compile_body(model), mesh),
    "compile(FSDP2)": lambda model, mesh: torch.compile(_shard(model, mesh)),
}
ALONE: dict[str, Callable[[nn.Module, None], nn.Module]] = {
    "one process": lambda model, _: model,
    "one process, compile": lambda model, _: torch.compile(model, fullgraph=True),
}

#: The eager way to do the same.
PAIRS = {
    "one process, compile": "one process", "DDP(compile)": "DDP", "compile(DDP)": "DDP", "FSDP2(compile)": "FSDP2",
    "compile(FSDP2)": "FSDP2",
}  # fmt: skip


class Training(NamedTuple):
    losses: Tensor  # [steps], of the whole batches
    weights: Tensor  # all, one after the other
    first_s: float
    step_ms: float
    ops: dict[str, int]


def train(wrap: Callable[..., nn.Module], mesh: DeviceMesh | None, model: nn.Module, batches: list, a) -> Training:
    device = batches[0][0].device
    model = copy.deepcopy(model)
    forward = wrap(model, mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5 / SCALE[a.autocast], momentum=0.9)
    dtype = getattr(torch, a.autocast) if a.autocast else None

    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            loss = nn.functional.cross_entropy(forward(x).flatten(0, 1), y.flatten())
        (loss * SCALE[a.autocast]).backward()
        optimizer.step()
        return loss.detach()

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    losses, seconds, ops = [], [], {}
    for i, batch in enumerate(batches):
        last = i == len(batches) - 1
        if mesh is not None:
            dist.barrier()
        begin = now()
        with _calls(ops) if last else contextlib.nullcontext():
            losses.append(step(*batch))
        seconds.append(now() - begin)
    losses = torch.stack(losses).double()
    if mesh is not None:
        dist.all_reduce(losses)
        losses /= mesh.size()
    weights = [p.detach() for p in model.parameters()]
    weights = [p.full_tensor() if isinstance(p, DTensor) else p for p in weights]
    torch_gru_fuse.check_errors()
    timed = seconds[WARM_UP:-1] or seconds[-1:]
    return Training(losses.cpu(), _flat(weights), seconds[0], 1e3 * median(timed), ops)


def _flat(weights: list[Tensor]) -> Tensor:
    return torch.cat([w.detach().double().cpu().flatten() for w in weights])


@contextlib.contextmanager
def _calls(counts: dict[str, int]) -> Iterator[None]:
    """Counts the calls of the ops: what ran, not what a graph was meant to hold."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        yield
    prefix = "torch_gru_fuse::"
    counts |= {e.key.removeprefix(prefix): e.count for e in profile.key_averages() if e.key.startswith(prefix)}


# ---- processes ----------------------------------------------------------------------------------------------------------


def work(rank: int, port: int, a: argparse.Namespace, answer) -> None:
    """What one process does; the first one puts the rows of the table into `answer`."""
    torch.set_num_threads(1)
    cuda = a.device == "cuda"
    if cuda:
        torch.cuda.set_device(rank)
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    dist.init_process_group(
        "nccl" if cuda else "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=a.processes,
        timeout=timedelta(seconds=a.seconds), device_id=device if cuda else None,
    )  # fmt: skip
    mesh = init_device_mesh(a.device, (a.processes,))
    torch_gru_fuse.enable()

    sizes = Sizes(a.T, a.B, a.input, a.hidden, a.layers)
    torch.manual_seed(0)
    dtype = getattr(torch, a.dtype)
    model = Tagger(sizes).to(device, dtype)
    batches = [
        (torch.randn(sizes.T, sizes.B, sizes.I).to(device, dtype), torch.randint(OUTPUTS, (sizes.T, sizes.B)).to(device))
        for _ in range(a.steps)
    ]
    parts = [tuple(t[:, rank :: a.processes].contiguous() for t in batch) for batch in batches]
    before, reference, rows = _flat([*model.parameters()]), None, []

    for name, wrap in (ALONE | DISTRIBUTED).items():
        torch._dynamo.reset()
        torch_gru_fuse.clear_rewrites()
        alone = name in ALONE
        trained = train(wrap, None if alone else mesh, model, batches if alone else parts, a)
        if reference is None:
            reference = trained
        moved = (reference.weights - before).norm()
        rows.append({
            "name": name,
            "distance": ((trained.weights - reference.weights).norm() / moved).item(),
            "greatest": (trained.weights - reference.weights).abs().max().item(),
            "losses": ((trained.losses - reference.losses).norm() / reference.losses.norm()).item(),
            "first_s": trained.first_s,
            "step_ms": trained.step_ms,
            "ops": trained.ops,
            "rewrites": [str(r) for r in torch_gru_fuse.rewrites()],
        })  # fmt: skip
        if rank == 0 and not a.json:
            print(_row(rows[-1]), flush=True)
    if rank == 0:
        answer.put(rows)
    dist.barrier()
    dist.destroy_process_group()


def run(a: argparse.Namespace) -> list[dict]:
    """The rows, or an error after --seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answer = torch.multiprocessing.get_context("spawn").SimpleQueue()
    workers = torch.multiprocessing.spawn(work, (port, a, answer), nprocs=a.processes, join=False)
    end = time.monotonic() + a.seconds
    try:
        while not workers.join(timeout=1):  # raises the error of a worker
            if time.monotonic() > end:
                raise TimeoutError(f"not done after {a.seconds} s; pass more --seconds, or fewer --steps")
        return answer.get()
    finally:
        for process in workers.processes:
            if process.is_alive():
                process.kill()


# ---- output -------------------------------------------------------------------------------------------------------------

HEADER = f"{'':<22}{'distance':>10}{'greatest':>10}{'losses':>10}{'first, s':>10}{'step, ms':>10}  ops"


def _row(row: dict) -> str:
    errors = "".join(f"{row[name]:>10.1e}" for name in ("distance", "greatest", "losses"))
    ops = ", ".join(f"{name} x{count}" for name, count in row["ops"].items()) or "none"
    return f"{row['name']:<22}{errors}{row['first_s']:>10.2f}{row['step_ms']:>10.2f}  {ops}"


def problems(rows: list[dict], a: argparse.Namespace) -> list[str]:
    # A rounding of the precision in which the GRU computes, a few times over; TF32 keeps 11 bits, as float16 does.
    bits = {"float64": 53, "float32": 11 if a.device == "cuda" else 24, "float16": 11, "bfloat16": 8}[a.autocast or a.dtype]
    limit = 32 * 2.0**-bits
    found = []
    for row in rows:
        name, off = row["name"], max(row["distance"], row["losses"])
        if not off <= limit:  # nan, too
            found.append(f"{name} is off by {off:.1e}, expected at most {limit:.1e}")
        expected = {"gru_forward": 1, "gru_backward": 1} if "compile" in name else {}
        if row["ops"] != expected:
            found.append(f"{name} called {row['ops']}, expected {expected}")
    return found


def main(argv: list[str] | None = None) -> int:
    a = _arguments(argv)
    if not a.json:
        name = torch.cuda.get_device_name() if a.device == "cuda" else "CPU"
        precision = a.dtype + (f", autocast to {a.autocast}" if a.autocast else "")
        print(f"{a.processes} x {name}, torch {torch.__version__}, {precision}, {a.steps} steps")
        print(f"T={a.T}, B={a.B} in all, I={a.input}, H={a.hidden}, L={a.layers}\n\n{HEADER}", flush=True)
    rows = run(a)
    found = problems(rows, a)
    if a.json:
        print(json.dumps({"rows": rows, "problems": found}, indent=2))
    else:
        ms = {row["name"]: row["step_ms"] for row in rows}
        print("\nEager step over compiled step")
        for compiled, eager in PAIRS.items():
            print(f"{compiled:<22}{ms[eager] / ms[compiled]:>9.2f}x")
        print("\n" + ("\n".join(found) or "All trainings agree."))
    return 1 if found else 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--processes", type=int, default=2, help="one a GPU (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="of training; the last one is not timed (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="of the weights")
    parser.add_argument("--autocast", choices=("float16", "bfloat16"))
    parser.add_argument("--T", type=int, default=256)
    parser.add_argument("--B", type=int, default=128, help="sequences of all processes together (default: %(default)s)")
    parser.add_argument("--input", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=400, help="after which everything is ended (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    a = parser.parse_args(argv)
    if a.B % a.processes:
        parser.error(f"--B {a.B} does not divide among --processes {a.processes}; expected a multiple")
    if a.device == "cuda" and torch.cuda.device_count() < a.processes:
        parser.error(f"--processes {a.processes}, but there are {torch.cuda.device_count()} GPUs; pass --device cpu, or fewer")
    return a


if __name__ == "__main__":
    sys.exit(main())
