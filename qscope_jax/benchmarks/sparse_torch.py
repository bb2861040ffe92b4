"""The same two operations as one writes them in PyTorch, and the training step of EleutherAI's sparsify, on the same
device and the same memory; None without torch, or without sparsify."""

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import jax
from qscope_kernels.cases import Case
from qscope_kernels.dispatch import device_of


class Pending:
    """Results of torch that `jax.block_until_ready` can wait for: torch's GPU works behind as jax's does."""

    def __init__(self, results: Any):
        self.results = results

    def block_until_ready(self) -> "Pending":
        import torch  # pyright: ignore[reportMissingImports]

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self


def available() -> bool:
    """Whether torch is installed and computes on the device that jax uses."""
    if importlib.util.find_spec("torch") is None:
        return False
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch's threads would spin through jax's turns
    import torch  # pyright: ignore[reportMissingImports]

    platform = device_of().platform
    return platform == "cpu" or (platform == "gpu" and torch.cuda.is_available())


def shared(*arrays: jax.Array) -> list[Any]:
    """The arrays as torch tensors of the same memory."""
    import torch  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    return [torch.from_dlpack(jax.block_until_ready(array)) for array in arrays]


def encoder(x: jax.Array, w_enc: jax.Array, b_enc: jax.Array, *, k: int) -> Callable[[], Pending] | None:
    """relu(torch.topk(x @ w_enc + b_enc, k)): pre-activations in the dtype of x, as torch's matmul gives them."""
    if not available():
        return None
    import torch  # pyright: ignore[reportMissingImports]

    tensors = functools.cache(lambda: shared(x, w_enc, b_enc.astype(x.dtype)))

    def call() -> Pending:
        rows, matrix, bias = tensors()
        with torch.inference_mode():
            values, indices = torch.topk(torch.addmm(bias, rows, matrix), k)
            return Pending((values.relu_(), indices))

    return call


def decoder(values: jax.Array, indices: jax.Array, w_dec: jax.Array) -> Callable[[], Pending] | None:
    """`embedding_bag` with weights: the sum of k weighted rows per token, in the dtype of w_dec."""
    if not available():
        return None
    import torch  # pyright: ignore[reportMissingImports]

    tensors = functools.cache(lambda: shared(values.astype(w_dec.dtype), indices, w_dec))

    def call() -> Pending:
        weights, bags, matrix = tensors()
        with torch.inference_mode():
            return Pending(torch.nn.functional.embedding_bag(bags, matrix, per_sample_weights=weights, mode="sum"))

    return call


def sparsify_step(x: jax.Array, case: Case) -> Callable[[], Pending] | None:
    """A step as sparsify's trainer makes it with its Adam: decoder rows to norm 1, forward, backward, the decoder's
    parallel gradient taken out; nothing is clipped. Float32 weights, bfloat16 products on a GPU, as it does.
    """
    if importlib.util.find_spec("sparsify") is None or not available():
        return None
    import torch  # pyright: ignore[reportMissingImports]
    from sparsify import SparseCoder, SparseCoderConfig  # pyright: ignore[reportMissingImports]

    @functools.cache
    def fresh() -> tuple[Any, Any, Any]:
        (rows,) = shared(x)
        sae = SparseCoder(case.d, SparseCoderConfig(num_latents=case.f, k=case.k), device=rows.device)
        return rows, sae, torch.optim.Adam(sae.parameters(), lr=1e-4)

    def call() -> Pending:
        rows, sae, optimizer = fresh()
        sae.set_decoder_norm_to_unit_norm()
        fvu = sae(rows).fvu
        fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        return Pending(fvu.detach())

    return call
