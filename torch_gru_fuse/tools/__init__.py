"""What users run: the commands of ``python -m torch_gru_fuse``."""
