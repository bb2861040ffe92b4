"""Operations with a reference, a portable form and, where they pay, kernels. Imports nothing of qscope_jax."""
