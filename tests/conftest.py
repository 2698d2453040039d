"""Shared fixtures: one compile cache for the run, a clean Dynamo and switched-off rewrite for every test."""

import os
import tempfile

import pytest

# Before torch reads them.  Compiled code is shared by the tests of one run, in all of its processes, never with another run:
# what a test finds in a cache was put there by this code.
_PREFIX = "torch_gru_fuse-tests-"
if "PYTEST_XDIST_WORKER" not in os.environ or _PREFIX not in os.environ.get("TORCHINDUCTOR_CACHE_DIR", ""):
    _CACHE = tempfile.TemporaryDirectory(prefix=_PREFIX)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = _CACHE.name
os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # a quarter of the time that a kernel takes to compile; the code is the same
os.environ.pop("TORCH_GRU_FUSE", None)
os.environ.pop("TORCH_GRU_FUSE_KERNELS", None)

import torch  # noqa: E402

# `torch._dynamo.reset` goes through the backends that were used, and imports this on the way, which adds one.
import torch._inductor.compile_fx  # noqa: E402

import torch_gru_fuse  # noqa: E402

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(autouse=True)
def clean_state():
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch_gru_fuse.disable()
    torch_gru_fuse.clear_rewrites()
    yield
    torch_gru_fuse.disable()
    torch._dynamo.reset()


@pytest.fixture
def cells_on_cpu(monkeypatch):
    """Cells are rewritten on a CPU, too: it is not worth it there, and shows without a GPU what happens on one."""
    from torch_gru_fuse.passes import guards

    monkeypatch.setattr(guards, "GUARDS", tuple(g for g in guards.GUARDS if g is not guards.profitable))


@pytest.fixture
def nan_filled_empty(monkeypatch):
    """`torch.empty` holds NaN, so that an element which nobody wrote shows."""
    from torch_gru_fuse import torch_hooks

    def filled(size, stride, dtype):
        return torch.empty_strided(size, stride, dtype=dtype, device="cuda")

    monkeypatch.setattr(torch_hooks, "empty_strided_cuda", filled)
    torch.use_deterministic_algorithms(True, warn_only=True)  # with fill_uninitialized_memory, which is torch's default
    yield
    torch.use_deterministic_algorithms(False)
