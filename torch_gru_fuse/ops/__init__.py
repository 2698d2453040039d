"""The custom ops `torch.ops.torch_gru_fuse.*`.  Importing this package registers them."""

from torch_gru_fuse.ops import cell, dispatch, gru, packed, padding, pair  # noqa: F401  (registration)
