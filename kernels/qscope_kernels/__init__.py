"""Operations with a reference, a portable form and, where they pay, hand-written kernels. Imports nothing of qscope_jax."""
