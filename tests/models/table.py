"""The table docs/results/models-of-others.txt.

    python tests/models/table.py > docs/results/models-of-others.txt

prints one line for each model of the catalogue.  Needs the extras `test` and `models`.
"""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import sys
import warnings
from pathlib import Path

HEAD = """\
Models from packages on PyPI, unchanged, with random weights: eager against compiled, forward and backward, in training mode.
Compiled is Dynamo and the rewrite, run by PyTorch operation by operation (no Inductor), on a CPU.

found     GRUs, cells and loops over a cell that the pass found
calls     calls of this package's ops in one forward; cells are rewritten as on a GPU (on a CPU they are left to Inductor)
graphs    into how many graphs Dynamo cuts the model; more than one where the model itself breaks them
without   the same without this package; what runs outside of graphs is not counted, so fewer is not better
error     greatest error of an output or a gradient, in units of the greatest value of its tensor (at least 1)
"""


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
    import torch
    from catalogue import MODELS
    from measure import run

    print(HEAD)
    print("python tests/models/table.py, Python", platform.python_version(), "torch", torch.__version__)
    print()
    row = "{:<22} {:<8} {:<48} {:>5}  {:<26} {:>6} {:>8}  {:<8} {:>8}"
    print(row.format("package", "version", "model", "found", "calls", "graphs", "without", "dtype", "error").rstrip())
    left: list[tuple[str, str]] = []
    for model in MODELS:
        result = run(model)
        calls = ", ".join(f"{count} {op}" for op, count in result.calls.items()) or "none"
        print(row.format(
            model.package, importlib.metadata.version(model.package), model.name, result.found, calls, result.graphs,
            result.graphs_without, str(model.dtype).removeprefix("torch."), f"{result.error:.1e}",
        ), flush=True)  # fmt: skip
        left += [(str(model), reason) for reason in dict.fromkeys(result.left)]
    print()
    print("Left as they were, or as single cells:")
    for name, reason in left:
        print(f"  {name}: {reason}")


if __name__ == "__main__":
    main()
