"""The Dynamo backend "gru_fuse": Inductor with the rewrite, with no call of `enable()`.

    torch.compile(model, backend="gru_fuse")

takes the same ``mode`` and ``options`` as the default backend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from torch_gru_fuse import torch_hooks
from torch_gru_fuse.switch import inductor_hook, keep_dynamo_hook


def gru_fuse(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Rewrite the GRUs of `gm` and compile it with Inductor.

    Args:
        gm: the graph from Dynamo.
        example_inputs: its inputs, fake.
        mode: as for the default backend ("default", "reduce-overhead", "max-autotune", ...).
        options: Inductor options; they take precedence over those of `mode`.
    """
    options = {key.replace("-", "_"): value for key, value in (options or {}).items()}
    return inductor_hook.compile(
        gm, example_inputs, {**torch_hooks.inductor_mode_options(mode), **options}
    )


gru_fuse.rewrites_gru = True  # type: ignore[attr-defined]
keep_dynamo_hook()
