"""Losses, each `*_loss -> (scalar, metrics)`; nothing here holds logits of more than a chunk of tokens."""
