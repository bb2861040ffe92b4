"""TopK sparse autoencoders: the maths, their quality, and their files."""
