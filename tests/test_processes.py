"""What crosses from one process to the next: compile caches, the environment variable, the backend's entry point."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A process for each mode, one after the other, forked from one that has imported torch, which takes as long as all else.
_SCRIPT = """
import json, os, sys
import torch
import torch._inductor.compile_fx
from torch._dynamo.utils import counters

def model(x, *params):  # a direct call compiles without the package, too: unrolled
    return torch.gru(x, x.new_zeros(1, 2, 4), list(params), True, 1, 0.0, True, False, False)[0].relu()

def run(function, x, params):
    out = function(x, *params)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *params])]

def main(mode):
    calls = []
    if mode != "without":
        import torch_gru_fuse
        from torch_gru_fuse.ops import torch_path
        if mode == "other version":
            sys.modules["torch_gru_fuse.switch"].inductor_hook._cache_tag = lambda: "torch_gru_fuse-other"
        torch_gru_fuse.enable()
        for name in ("gru_forward", "gru_backward"):
            def counting(*args, name=name, run=getattr(torch_path, name)):
                calls.append(name)
                return run(*args)
            setattr(torch_path, name, counting)
    torch.manual_seed(0)
    params = [*torch.nn.GRU(3, 4).parameters()]
    x = torch.randn(3, 2, 3, requires_grad=True)
    expected = run(model, x, params)
    actual = run(torch.compile(model, fullgraph=True), x, params)
    print(json.dumps({
        "error": max((a - e).abs().max().item() for a, e in zip(actual, expected)),
        "calls": None if mode == "without" else calls,
        "aot_hits": counters["aot_autograd"]["autograd_cache_hit"],
    }), flush=True)

for mode in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        main(mode)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status == 0, mode
"""


def python(code, *args, cache=None, **environment):
    # In a new cache Inductor tries which vector instructions the compiler can, which takes longer than all else: none here.
    environment["TORCHINDUCTOR_VEC_ISA_OK"] = "0"
    clean = {k: v for k, v in os.environ.items() if k not in ("TORCH_GRU_FUSE", "TORCHINDUCTOR_CACHE_DIR")}
    if cache is not None:
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    done = subprocess.run(
        [sys.executable, "-c", code, *args], cwd=ROOT, capture_output=True, text=True,
        env=clean | {"PYTHONPATH": str(ROOT)} | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.versions
def test_processes_share_a_cache_and_never_a_wrong_entry(tmp_path):
    modes = "without", "with", "with", "other version", "without"
    printed = [line for line in python(_SCRIPT, *modes, cache=tmp_path).splitlines() if line.startswith("{")]
    results = [json.loads(line) for line in printed]
    assert len(results) == len(modes) and all(result["error"] < 1e-6 for result in results)
    unrolled, after_unrolled, again, other, without = results
    fused = ["gru_forward", "gru_backward"]
    assert unrolled["calls"] is None
    assert after_unrolled["calls"] == fused and after_unrolled["aot_hits"] == 0  # the unrolled entry is not taken
    assert again["calls"] == fused and again["aot_hits"] == 1  # its own entry is
    assert other["calls"] == fused and other["aot_hits"] == 0  # another version's is not
    assert without["aot_hits"] == 1  # and without the package the unrolled one still serves


_ENABLED = "import sys, torch; print(('torch_gru_fuse' in sys.modules) and sys.modules['torch_gru_fuse'].is_enabled())"


def _installed():
    from importlib.metadata import entry_points

    return any(e.value == "torch_gru_fuse_autoload:autoload" for e in entry_points(group="torch.backends"))


def installed_only(test):
    """Entry points exist where the package is installed, and not where its sources are only on the path."""
    return pytest.mark.skipif(not _installed(), reason="the package is not installed: pip install -e .")(test)


@pytest.mark.versions
@installed_only
@pytest.mark.parametrize(("value", "expected"), [("1", "True"), ("0", "False"), (None, "False")])
def test_environment_variable_enables(value, expected):
    environment = {} if value is None else {"TORCH_GRU_FUSE": value}
    assert python(_ENABLED, **environment).strip() == expected


@pytest.mark.versions
@installed_only
def test_environment_variable_rewrites_unchanged_code():
    code = """
import torch
print(torch.compile(torch.nn.GRU(3, 4), fullgraph=True)(torch.randn(3, 2, 3))[0].shape)
"""
    assert "torch.Size([3, 2, 4])" in python(code, TORCH_GRU_FUSE="1")


@pytest.mark.versions
@installed_only
def test_backend_by_its_name():
    code = """
import torch
print("gru_fuse" in torch._dynamo.list_backends())
rnn, x = torch.nn.GRU(3, 4), torch.randn(3, 2, 3)
y = torch.compile(rnn, backend="gru_fuse", mode="reduce-overhead", fullgraph=True)(x)[0]
print((y - rnn(x)[0]).abs().max().item() < 1e-6)
import torch_gru_fuse
print(torch_gru_fuse.is_enabled(), len(torch_gru_fuse.rewrites()))
"""
    assert python(code).split() == ["True", "True", "False", "1"]


@pytest.mark.versions
def test_importing_the_package_imports_neither_dynamo_nor_triton():
    code = """
import sys, torch
before = set(sys.modules)
import torch_gru_fuse
new = {m.split(".")[0] + "." + m.split(".")[1] for m in set(sys.modules) - before if m.startswith("torch.")}
print(sorted(new & {"torch._dynamo", "torch._inductor"}), "triton" in sys.modules and "triton" not in before)
"""
    assert python(code).strip() == "[] False"


def test_compile_time_does_not_grow_with_the_sequence_length(tmp_path):
    code = """
import sys, time, torch, torch_gru_fuse
torch_gru_fuse.enable()
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = torch.nn.GRU(8, 16, 6)
    def forward(self, x):
        return self.rnn(x)[0].relu()
def compile_seconds(T):
    torch._dynamo.reset()
    before = torch._dynamo.utils.calculate_time_spent()
    out = torch.compile(Model(), fullgraph=True)(torch.randn(T, 2, 8))
    out.sum().backward()
    after = torch._dynamo.utils.calculate_time_spent()
    return sum(after[k] - before.get(k, 0) for k in ("entire_frame_compile", "entire_backward_compile"))
torch.set_num_threads(1)
compile_seconds(16)  # imports, and the compiler's own start
times = {64: [], 512: []}
for _ in range(3):
    for T in times:
        times[T].append(compile_seconds(T))
print(*(sorted(t)[1] for t in times.values()))
"""
    start = time.perf_counter()
    short, long = map(float, python(code, cache=tmp_path, TORCHINDUCTOR_FORCE_DISABLE_CACHES="1").split())
    print(f"T=64: {short:.2f} s, T=512: {long:.2f} s ({time.perf_counter() - start:.0f} s in all)")
    # An unrolled graph of T=512 has 8 times the nodes of T=64 and more than 8 times the compile time.
    assert long < 1.5 * short + 0.5
