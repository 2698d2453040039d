"""Fused GRUs for torch.compile.

    import torch, torch_gru_fuse
    torch_gru_fuse.enable()
    model = torch.compile(MyModelWithGRU(), fullgraph=True)

Importing the package registers the ops `torch.ops.torch_gru_fuse.*` and changes nothing else.
"""

from torch_gru_fuse import functional
from torch_gru_fuse.ops.timeouts import check_errors
from torch_gru_fuse.passes.rewrite import Rewrite, clear_rewrites, rewrites
from torch_gru_fuse.switch import disable, enable, is_enabled
from torch_gru_fuse.tools.explain import Explanation, explain

__version__ = "0.1.0"
__all__ = [
    "Explanation", "Rewrite", "check_errors", "clear_rewrites", "disable", "enable", "explain", "functional", "is_enabled",
    "rewrites",
]  # fmt: skip
