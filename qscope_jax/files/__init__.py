"""Where files come from and how they are written: sources, tensors, atomic writes."""
