"""Training of sparse autoencoders: the pure step, its state, and the checkpoints of both."""
