"""Error of the ops against float64, beside cuDNN's own error in the same precision.

    TORCH_GRU_FUSE_KERNELS=triton python benchmarks/accuracy.py [--shapes NAMES] [--precisions NAMES] [--json FILE]

For every shape and precision: outputs, final states and the gradients of input, initial state and
every parameter, by the ops and by `torch.gru` / `torch.gru_cell` on the same GPU, both compared
with float64 on the same inputs.  An error is divided by the RMS of the float64 value.  Errors of a
kind (for instance all weight gradients) are pooled over parameters; "max" is the greatest of them,
averaged over seeds (a greatest error of one draw says little), "rms" their RMS over all seeds.  The
last columns are the ratios ours / cuDNN.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

import torch_gru_fuse  # noqa: F401  (registers the ops)

LIMIT = 1.1
MODES = {
    "fp32 ieee": (torch.float32, False),
    "fp32 tf32": (torch.float32, True),
    "fp16": (torch.float16, True),
    "bf16": (torch.bfloat16, True),
}
#: name: T, B, I, H, L, bidirectional, bias
GRUS = {
    "small": (24, 7, 33, 50, 2, False, True),
    "odd": (5, 1, 1, 3, 1, True, True),
    "bidirectional": (40, 10, 64, 96, 2, True, True),
    "no bias": (40, 16, 64, 64, 1, False, False),
    "kb39, T=64": (64, 10, 128, 256, 6, False, True),
    "h512": (64, 16, 512, 512, 2, False, True),
    "long": (1000, 4, 64, 128, 1, False, True),
    "longest": (2000, 4, 128, 256, 1, False, True),
    "longest, 2": (2000, 4, 256, 256, 2, False, True),
    "wide": (16, 300, 128, 256, 1, False, True),
    "stream1": (1000, 1, 256, 256, 2, False, True),
    "h64": (200, 64, 64, 64, 2, False, True),
}
#: name: B, I, H
CELLS = {"cell small": (5, 33, 50), "cell 256": (10, 128, 256), "cell wide": (300, 512, 512)}
#: Elements of output to draw in all, so that small shapes get as good a statistic as large ones.
ELEMENTS, MIN_SEEDS, MAX_SEEDS = 1_000_000, 4, 40


def gru_problem(name: str, seed: int) -> tuple[list[Tensor], tuple]:
    T, B, I, H, L, bidirectional, bias = GRUS[name]
    torch.manual_seed(seed)
    module = torch.nn.GRU(I, H, L, bias=bias, bidirectional=bidirectional)
    x = torch.randn(T, B, I)
    h0 = torch.randn(L * (1 + bidirectional), B, H)
    weights = [p.detach() for p in module.parameters()]
    return [x, h0, *weights], (bias, L, 0.0, True, bidirectional, False)


def cell_problem(name: str, seed: int) -> tuple[list[Tensor], tuple]:
    B, I, H = CELLS[name]
    torch.manual_seed(seed)
    module = torch.nn.GRUCell(I, H)
    return [torch.randn(B, I), torch.randn(B, H), *(p.detach() for p in module.parameters())], ()


def run(function, tensors: list[Tensor], flags: tuple, weights_of_loss: list[Tensor]) -> list[Tensor]:
    """Outputs, then gradients of a loss that weighs every output element at random."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    if flags:
        outputs = function(tensors[0], tensors[1], tensors[2:], *flags)
    else:
        outputs = (function(*tensors),)
    loss = sum((o.double() * w.to(o.device)).sum() for o, w in zip(outputs, weights_of_loss, strict=True))
    return [o.detach() for o in outputs] + list(torch.autograd.grad(loss, tensors))


def kinds(flags: tuple, tensors: list[Tensor]) -> list[str]:
    outputs = ["output", "h_n"] if flags else ["output"]
    weights = ["grad bias" if t.dim() == 1 else "grad weight" for t in tensors[2:]]
    return [*outputs, "grad input", "grad hx", *weights]


def compare(name: str, mode: str) -> Iterator[dict]:
    dtype, tf32 = MODES[mode]
    torch.backends.cudnn.allow_tf32 = tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    is_cell = name in CELLS
    ours, theirs = (
        (torch.ops.torch_gru_fuse.gru_cell, torch.gru_cell) if is_cell else (torch.ops.torch_gru_fuse.gru, torch.gru)
    )
    squares = collections.defaultdict(lambda: [0.0, 0.0, 0])
    greatest = collections.defaultdict(lambda: [0.0, 0.0])
    sizes = CELLS[name] if is_cell else GRUS[name]
    outputs = sizes[0] * sizes[2] if is_cell else sizes[0] * sizes[1] * sizes[3]
    seeds = min(MAX_SEEDS, max(MIN_SEEDS, ELEMENTS // outputs))
    for seed in range(seeds):
        worst = collections.defaultdict(lambda: [0.0, 0.0])
        tensors, flags = (cell_problem if is_cell else gru_problem)(name, seed)
        tensors = [t.to("cuda", dtype) for t in tensors]
        exact_in = [t.double() for t in tensors]
        with torch.no_grad():
            shapes = theirs(*exact_in) if is_cell else theirs(exact_in[0], exact_in[1], exact_in[2:], *flags)
        loss_weights = [torch.randn_like(s) for s in ((shapes,) if is_cell else shapes)]
        exact = run(theirs, exact_in, flags, loss_weights)
        results = [run(f, tensors, flags, loss_weights) for f in (ours, theirs)]
        for kind, reference, a, b in zip(kinds(flags, tensors), exact, *results, strict=True):
            scale = reference.square().mean().sqrt().item() or 1.0
            for which, value in enumerate((a, b)):
                error = (value.double() - reference) / scale
                assert torch.isfinite(error).all(), f"{name} {mode} {kind}: not finite"
                squares[kind][which] += error.square().sum().item()
                worst[kind][which] = max(worst[kind][which], error.abs().max().item())
            squares[kind][2] += reference.numel()
        for kind, values in worst.items():
            for which, value in enumerate(values):
                greatest[kind][which] += value / seeds
    for kind, (ours_sq, theirs_sq, count) in squares.items():
        yield {
            "shape": name, "precision": mode, "what": kind,
            "max": greatest[kind][0], "max_cudnn": greatest[kind][1],
            "rms": math.sqrt(ours_sq / count), "rms_cudnn": math.sqrt(theirs_sq / count),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", help=f"semicolon-separated, of {'; '.join((*GRUS, *CELLS))} (all)")
    parser.add_argument("--precisions", help=f"semicolon-separated, of {'; '.join(MODES)} (all)")
    parser.add_argument("--json", help="write the rows to this file")
    args = parser.parse_args()
    chosen = []
    for option, names in (("shapes", [*GRUS, *CELLS]), ("precisions", [*MODES])):
        given = getattr(args, option)
        chosen.append(names if given is None else given.split(";"))
        if unknown := set(chosen[-1]) - set(names):
            parser.error(f"--{option} has {'; '.join(sorted(unknown))}")
    rows = [row for mode in chosen[1] for name in chosen[0] for row in compare(name, mode)]
    print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}")
    columns = ("max", "cuDNN", "rms", "cuDNN")
    print(f"{'shape':14} {'precision':10} {'what':12}", *(f"{c:>9}" for c in columns), f"{'max x':>6} {'rms x':>6}")
    worse = 0
    for row in rows:
        pairs = [(row[k], row[f"{k}_cudnn"]) for k in ("max", "rms")]
        ratios = [ours / theirs if theirs else (math.inf if ours else 1.0) for ours, theirs in pairs]
        over = max(ratios) > LIMIT
        worse += over
        print(f"{row['shape']:14} {row['precision']:10} {row['what']:12} {row['max']:9.2e} {row['max_cudnn']:9.2e} "
              f"{row['rms']:9.2e} {row['rms_cudnn']:9.2e} {ratios[0]:6.2f} {ratios[1]:6.2f}{'  <--' if over else ''}")
    print(f"{len(rows)} rows, {worse} with a ratio above {LIMIT}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
