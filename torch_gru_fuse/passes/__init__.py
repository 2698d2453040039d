"""Graph passes: what `torch.compile` hands to Inductor, rewritten to the ops of this package."""
