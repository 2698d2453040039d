"""Inductor: rewrite a graph where compile_fx receives it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch


class InductorHook:
    """Runs `rewrite` on every graph that Inductor's `compile_fx` receives, before AOTAutograd.

    Standing before `compile_fx` and not in `config.pre_grad_custom_pass`, it neither takes the
    place of a user's own pass nor loses its own to ``torch.compile(options=...)``, and
    Inductor's and AOTAutograd's caches look up the rewritten graph.

    Args:
        rewrite: changes a GraphModule in place, subgraphs included; returns the number of
            replaced nodes.
        cache_tag: becomes part of the cache keys of rewritten graphs, so that an entry made by
            another version of this package is never used.
        options: called with a graph after that; what Inductor's configuration has to be for it.
        ahead: called with a rewritten graph; what may be started while Inductor works.
    """

    def __init__(
        self,
        rewrite: Callable[[torch.fx.GraphModule], int],
        cache_tag: Callable[[], str],
        options: Callable[[torch.fx.GraphModule], dict[str, Any]] = lambda gm: {},
        ahead: Callable[[torch.fx.GraphModule], None] = lambda gm: None,
    ):
        self._rewrite = rewrite
        self._cache_tag = cache_tag
        self._options = options
        self._ahead = ahead
        self._original: Callable[..., Any] | None = None

    @property
    def installed(self) -> bool:
        return self._original is not None

    def install(self) -> None:
        if self.installed:
            return
        from torch._inductor import compile_fx as module

        original = module.compile_fx

        @functools.wraps(original)
        def compile_fx(model_: Any, example_inputs_: Any, *args: Any, **kwargs: Any) -> Any:
            return self._compile(original, model_, example_inputs_, args, kwargs)

        module.compile_fx = compile_fx
        self._original = original

    def remove(self) -> None:
        if not self.installed:
            return
        from torch._inductor import compile_fx as module

        module.compile_fx = self._original
        self._original = None

    def compile(self, gm: torch.fx.GraphModule, inputs: Sequence[Any], config_patches: dict[str, Any]) -> Any:
        """Rewrite and compile one graph, installed or not."""
        from torch._inductor import compile_fx as module

        original = self._original or module.compile_fx
        return self._compile(original, gm, inputs, (), {"config_patches": config_patches or None})

    def _compile(
        self, original: Callable[..., Any], gm: Any, inputs: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if not isinstance(gm, torch.fx.GraphModule):
            return original(gm, inputs, *args, **kwargs)
        count, options = self._rewrite(gm), self._options(gm)
        if not count and not options:
            return original(gm, inputs, *args, **kwargs)
        if count:
            self._ahead(gm)
        from torch._inductor import config as inductor_config
        from torch._inductor.compile_fx import compile_fx_inner

        config = torch.compiler.config
        tag = f"{config.cache_key_tag}{self._cache_tag()}"
        inner = args[0] if args else kwargs.pop("inner_compile", compile_fx_inner)

        # The backward graph is compiled after this function has returned, hence the second patch.
        @functools.wraps(inner)
        def inner_compile(*inner_args: Any, **inner_kwargs: Any) -> Any:
            with config.patch(cache_key_tag=tag), inductor_config.patch(options):
                return inner(*inner_args, **inner_kwargs)

        with config.patch(cache_key_tag=tag), inductor_config.patch(options):
            return original(gm, inputs, inner_compile, *args[1:], **kwargs)


def inductor_mode_options(mode: str | None, dynamic: bool | None = None) -> dict[str, Any]:
    """What ``torch.compile(mode=...)`` means for Inductor."""
    if mode is None or mode == "default":
        return {}
    from torch._inductor import list_mode_options

    return dict(list_mode_options(mode, dynamic))


def child_graphs(gm: torch.fx.GraphModule) -> list[torch.fx.GraphModule]:
    """The graph modules below `gm`: bodies of checkpoint, cond, scan and the like."""
    return [m for name, m in gm.named_modules() if name and isinstance(m, torch.fx.GraphModule)]
