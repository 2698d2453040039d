"""Enables torch_gru_fuse in a program that does not import it: ``TORCH_GRU_FUSE=1 python program.py``.

torch calls :func:`autoload` at the end of every ``import torch`` (entry point group ``torch.backends``). The module is a
top-level one, so that loading it does not import the package; without the variable it costs one look into the environment.
"""

import os

_ON = ("1", "true")
_OFF = ("", "0", "false")


def autoload() -> None:
    """Enable torch_gru_fuse if the environment variable TORCH_GRU_FUSE is "1" or "true" (in any case)."""
    setting = os.environ.get("TORCH_GRU_FUSE", "")
    value = setting.strip().lower()
    if value in _OFF:
        return
    if value not in _ON:
        import warnings

        # No exception: it would make `import torch` fail.
        warnings.warn(
            f"TORCH_GRU_FUSE={setting!r} is not known and is ignored: set it to 1 or true to enable torch_gru_fuse, "
            "to 0 or false (or not at all) to leave it off.",
            stacklevel=2,
        )
        return

    # The submodule, because `import torch_gru_fuse` imports torch, and so arrives here before the package has its contents.
    from torch_gru_fuse.switch import enable

    enable()
