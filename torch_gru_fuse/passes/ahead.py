"""While Inductor compiles what is around a GRU, the kernels for it are compiled already.

Which these are follows from sizes and the GPU alone.  A guess that is wrong (autograd is asked for later, another stream
captures the call) costs the time of threads that nobody waits for.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from torch_gru_fuse import torch_hooks
from torch_gru_fuse.ops import dispatch
from torch_gru_fuse.ops.call import GRUCall
from torch_gru_fuse.ops.schemas import ops
from torch_gru_fuse.passes import guards
from torch_gru_fuse.passes.nodes import value

log = logging.getLogger("torch_gru_fuse")


def load_ahead(gm: GraphModule) -> None:
    """Starts to compile the kernels for the calls of `gru` in a graph, and in those below it, whose sizes are known."""
    nodes = (node for module in (gm, *torch_hooks.child_graphs(gm)) for node in module.graph.nodes)
    for node in nodes:
        if node.target is not ops.gru.default:
            continue
        try:
            call = _call(node)
            if call is not None:
                save = torch.is_grad_enabled() and any(t.requires_grad for t in call.tensors) and not node.kwargs
                dispatch.load_ahead(call, save)
        except Exception as error:  # what cannot be planned here is not planned there either, and raised there
            log.debug("not loaded ahead: %s", error)


def _call(node: Node) -> GRUCall | None:
    """A call of `gru` with fake tensors, where these say all that a plan depends on."""
    if node.kwargs.keys() - {"recompute"}:  # resets
        return None
    given = dict(zip(guards.SIGNATURES["gru"], node.args, strict=True))
    if given["train"] and given["dropout"] and given["num_layers"] != 1:
        return None
    x, hx, *params = (value(n) for n in (given["input"], given["hx"], *given["params"]))
    tensors = (x, hx, *params)
    if not all(isinstance(t, Tensor) and t.is_cuda and all(type(s) is int for s in t.shape) for t in tensors):
        return None
    if torch.is_autocast_enabled("cuda") or len({t.dtype for t in (value(node)[0], *tensors)}) != 1:  # autocast, in the graph
        return None
    if given["batch_first"]:
        x = x.transpose(0, 1)
    return GRUCall(x, hx, params, given["has_biases"], given["num_layers"], given["bidirectional"], None)
