"""The form for TPUs: one matmul that keeps the largest pre-activations of every bin, a small top-k, and a certificate.

What a bin drops is no larger than the last value it keeps. So if no bin's last kept value exceeds the k-th largest of
all kept ones, these hold the row's k largest; every row is checked, and the few that fail are encoded densely.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from qscope_kernels.dispatch import Device, device_of
from qscope_kernels.pallas_tpu import not_tpu
from qscope_kernels.topk_encode import tpu_plan
from qscope_kernels.topk_encode.tpu_finish import largest
from qscope_kernels.topk_encode.tpu_lists import HUGE, bin_lists, chunk_bits, dense, split_key

# Rows that one pass of the dense fallback takes.
_CAPACITY = 64
# Beyond these the unrolled networks of the finish grow too long: XLA sorts the candidates.
_LONGEST_NETWORK, _MOST_BINS = 128, 256


def topk_encode(
    x: jax.Array,
    w_enc: jax.Array,
    b_enc: jax.Array,
    *,
    k: int,
    contract: str,
    plan: tpu_plan.Plan | None = None,
    kind: str | None = None,
    capacity: int = _CAPACITY,
    with_failures: bool = False,
    interpret: Any = None,
) -> tuple[jax.Array, ...]:
    """Top k of x [n, d], values and indices [n, k]; then the number of rows that took the fallback, if asked.

    "exact" ranks float32-accumulated pre-activations; ties go to any of equal value. "fast" ranks them with their last
    `chunk_bits` mantissa bits dropped (8 to 10 of 23 for the released shapes), ties again to any, and its values are
    the middles of what shares the rest: at most 2^(bits - 24) of the value away, so no more than 2^-14. Rows of the
    fallback have exact values in both.

    An order of the latents that puts a row's largest ones into one bin (columns equal modulo `plan.bins`) makes that
    row take the fallback: it costs time, never the result. Rows with a pre-activation of 2^127 or more take it too;
    so do NaNs, which rank above all. `plan` and `kind` (of device) are chosen from the shapes and the device where not
    given; `capacity` rows at a time, at most those of a tile, take the fallback; `interpret` simulates the kernels.
    """
    n = x.shape[0]
    chip = tpu_plan.chip(kind or device_of(x, w_enc, b_enc).kind) or tpu_plan.SMALLEST
    if (plan := plan or tpu_plan.make_plan(chip, x, w_enc, k)) is None:
        raise ValueError(f"no tiles of x {x.shape} and w_enc {w_enc.shape} with k = {k} fit; see `unsuited`")
    options = {"k": k, "exact": contract == "exact", "plan": plan, "vmem": chip.vmem, "interpret": interpret}
    values, indices, failed = _encode(x, w_enc, b_enc, capacity=min(capacity, n, plan.rows), **options)
    return (values, indices, jnp.sum(failed, dtype=jnp.int32)) if with_failures else (values, indices)


# Compiled once outside `jit` too, not at every call: it takes long.
@partial(jax.jit, static_argnames=("k", "exact", "plan", "vmem", "capacity", "interpret"))
def _encode(
    x: jax.Array,
    w_enc: jax.Array,
    b_enc: jax.Array,
    *,
    k: int,
    exact: bool,
    plan: tpu_plan.Plan,
    vmem: int,
    capacity: int,
    interpret: Any,
) -> tuple[jax.Array, ...]:
    """Values and indices [n, k], and which rows [n] took the fallback."""
    lists = bin_lists(x, w_enc, b_enc, plan=plan, exact=exact, vmem=vmem, interpret=interpret)
    values, indices, failed = _finish(lists, latents=w_enc.shape[1], k=k, plan=plan, vmem=vmem, interpret=interpret)
    multiply = partial(dense, w_enc=w_enc, plan=plan, vmem=vmem, interpret=interpret)
    values, indices = _repair(multiply, x, b_enc, values, indices, failed, capacity)
    return values, indices, failed


def unsuited(device: Device, x: jax.Array, w_enc: jax.Array, b_enc: jax.Array, *, k: int, contract: str) -> str | None:
    """Why `topk_encode` cannot serve this, or None."""
    del b_enc, contract
    if why := not_tpu(device):
        return why
    chip, f = tpu_plan.chip(device.kind) or tpu_plan.SMALLEST, w_enc.shape[1]
    for array in (x, w_enc):
        if array.dtype not in (jnp.bfloat16, jnp.float32):
            return f"it multiplies bfloat16 and float32, not {array.dtype}"
    if 0 in x.shape:
        return f"x is empty: {x.shape}"
    if tpu_plan.choose_bins(f, k) is None:
        return f"k = {k} of {f} needs more candidates than it sorts"
    if tpu_plan.make_plan(chip, x, w_enc, k) is None:
        return f"vectors of {x.shape[1]} do not fit in {chip.vmem >> 20} MiB of VMEM"
    return None


def _finish(
    lists: list[jax.Array], *, latents: int, k: int, plan: tpu_plan.Plan, vmem: int, interpret: Any
) -> tuple[jax.Array, ...]:
    """Values and indices [n, k] of the largest candidates, and which rows [n] the certificate does not cover."""
    bits, exact = chunk_bits(latents, plan.bins), len(lists) == 2
    if k <= _LONGEST_NETWORK and plan.bins <= _MOST_BINS:
        keys, places, bound = largest(lists, latents=latents, k=k, plan=plan, vmem=vmem, interpret=interpret)
    else:
        keys, places, bound = _sorted(lists, latents, k, plan)
    if exact:
        values, indices = keys, places
    else:
        values, chunks = split_key(keys, bits)
        indices = chunks * plan.bins + places
        bound, _ = split_key(bound, bits)
    failed = (bound > values[:, -1]) | (values[:, 0] >= HUGE)
    # Where fewer than k are positive the rest are places that hold nothing, maybe beyond the latents.
    return values, jnp.minimum(indices, latents - 1), failed


def _sorted(lists: list[jax.Array], latents: int, k: int, plan: tpu_plan.Plan) -> tuple[jax.Array, ...]:
    """As `largest`, for any k."""
    flat = lambda a: a.transpose(1, 0, 2).reshape(a.shape[1], -1)  # noqa: E731
    keys, slots = jax.lax.top_k(flat(lists[0]), k)
    places = slots % plan.bins
    if len(lists) == 2:
        places += plan.bins * jnp.take_along_axis(flat(lists[1]), slots, axis=1)
    drops = tpu_plan.columns_of(latents, plan.bins, 1) > plan.keep
    bound = jnp.max(lists[0][-1], axis=1) if drops else jnp.zeros(keys.shape[0])
    return keys, places, bound


def _repair(
    multiply: Callable[[jax.Array], jax.Array], x, b_enc, values, indices, failed, capacity: int
) -> tuple[jax.Array, jax.Array]:
    """Encodes the failed rows densely, `capacity` of them at a time, until none is left."""
    n, k = values.shape

    def encode(state):
        values, indices, failed = state
        rows = jnp.nonzero(failed, size=capacity, fill_value=n)[0]
        pre = multiply(x.at[rows].get(mode="clip")) + b_enc.astype(jnp.float32)
        # Hardware makes NaNs with the sign bit set, which top_k would rank below all numbers.
        best, where = jax.lax.top_k(jnp.where(jnp.isnan(pre), jnp.nan, pre), k)
        values = values.at[rows].set(jax.nn.relu(best), mode="drop")
        return values, indices.at[rows].set(where, mode="drop"), failed.at[rows].set(False, mode="drop")

    return jax.lax.while_loop(lambda state: jnp.any(state[2]), encode, (values, indices, failed))[:2]
