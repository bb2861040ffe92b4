"""The sparse operations at the released shapes: encode, decode and the gradients of both matrices.

Every row is a ratio of times within one run. Bytes of decode and gather_dot are those of the k rows per token, as if no
cache held any of them; busy latents are found in caches, so that a share above 1 is possible.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from qscope_kernels import sparse_decode as decoding
from qscope_kernels import sparse_outer as outer
from qscope_kernels import topk_encode as encoding
from qscope_kernels.cases import Case
from qscope_kernels.dispatch import device_of
from qscope_kernels.topk_encode import cuda
from qscope_kernels.topk_encode.select import group_width, select

from qscope_jax.benchmarks import sparse_torch
from qscope_jax.benchmarks.ceilings import copy_bandwidth, matmul_rate, precision
from qscope_jax.benchmarks.codes import Usage, random_code
from qscope_jax.benchmarks.rows import Row, Setting, Work, implementations, measure, picked

USAGES: tuple[Usage, ...] = ("heavy", "uniform")


class Data(NamedTuple):
    """Activations and weights of one case: x [n, d], w_enc [d, f], w_dec [f, d] of the setting's dtype, b_enc [f]."""

    x: jax.Array
    w_enc: jax.Array
    b_enc: jax.Array
    w_dec: jax.Array


def check_impl(names: Sequence[str]) -> None:
    """Raises ValueError for a name that no operation has on this device: other forms would be measured in its place."""
    tables, platform = (
        (encoding._KERNELS, decoding._KERNELS, decoding._DOT_KERNELS, outer._KERNELS),
        device_of().platform,
    )
    known = {name for table in tables for name, kernel in table.items() if kernel.platform == platform} | {"ref", "xla"}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"--impl {' '.join(unknown)}: expected some of {', '.join(sorted(known))} on this {platform}")


def random_data(case: Case, setting: Setting) -> Data:
    """Unit-variance activations and unit-norm latents, so that pre-activations have unit variance."""

    def make():
        keys = jax.random.split(jax.random.key(0), 3)
        x = jax.random.normal(keys[0], (setting.tokens, case.d), setting.dtype)
        w_dec = jax.random.normal(keys[1], (case.f, case.d), setting.dtype) / case.d**0.5
        return Data(x, w_dec.T, 0.3 * jax.random.normal(keys[2], (case.f,), jnp.float32), w_dec)

    return jax.jit(make)()


def bench_encode(setting: Setting) -> Iterator[Row]:
    """Encode over the bare matmul of its float32 or bfloat16 result, and the alternatives over encode."""
    for case in setting.cases:
        yield from encode_rows(case, setting, random_data(case, setting))


def encode_rows(case: Case, setting: Setting, data: Data) -> Iterator[Row]:
    """The rows of one case."""
    arrays, flops = data[:3], 2.0 * setting.tokens * case.d * case.f
    work = Work(flops, "FLOP/s", matmul_rate(setting.dtype, setting.sample))
    row = partial(measure, setting, case.name)
    wide, narrow = (partial(matmul(dtype), *arrays[:2]) for dtype in (jnp.float32, jnp.bfloat16))
    yield from row("matmul, bfloat16 result / float32 result", narrow, wide, work)
    for impl in implementations(setting, encoding._KERNELS):
        if impl not in encoding._KERNELS:  # one program serves both contracts
            call = partial(encoder(case.k, "exact", impl), *arrays)
            yield from row(f"encode, {impl} / matmul, float32 result", call, wide, work)
            continue
        for contract in ("exact", "fast"):
            call = partial(encoder(case.k, contract, impl), *arrays)
            yield from row(f"encode {contract}, {impl} / matmul, float32 result", call, wide, work)
            if contract == "fast":  # what is ranked in bfloat16 may be stored so
                yield from row(f"encode {contract}, {impl} / matmul, bfloat16 result", call, narrow, work)
    pre = wide()
    yield from row("lax.top_k / selection alone", partial(top_k(case.k), pre), partial(selector(case.k), pre))
    del pre  # gigabytes
    dense, theirs = partial(dense_encoder(case.k), *arrays), sparse_torch.encoder(*arrays, k=case.k)
    for contract in ("exact", "fast"):
        impl = picked(setting, encoding._KERNELS, *arrays, k=case.k, contract=contract)
        if contract == "fast" and impl not in encoding._KERNELS:
            return  # the same program
        ours = partial(encoder(case.k, contract, impl), *arrays)
        yield from row(f"matmul + lax.top_k / encode {contract}, {impl}", dense, ours, work)
        yield from row(f"torch matmul + topk / encode {contract}, {impl}", theirs, ours, work)


def bench_decode(setting: Setting) -> Iterator[Row]:
    """Decode over the dense matmul with the same code, and the alternatives over decode; by use of the latents."""
    for case in setting.cases:
        data = random_data(case, setting)
        for usage in USAGES:
            yield from decode_rows(case, setting, data, usage)


def decode_rows(case: Case, setting: Setting, data: Data, usage: Usage) -> Iterator[Row]:
    """The rows of one case and one kind of code."""
    values, indices = random_code(setting.tokens, case.f, case.k, usage=usage)
    row = partial(measure, setting, f"{case.name}, {usage}")
    work = _rows_read(case, setting)
    dense = to_dense(values, indices, case.f, setting.dtype)
    matmul_dense = partial(matmul(jnp.float32), dense, data.w_dec)
    chosen = picked(setting, decoding._KERNELS, values, indices, data.w_dec)
    theirs = sparse_torch.decoder(values, indices, data.w_dec)
    for impl in implementations(setting, decoding._KERNELS) if usage == "heavy" else (chosen,):
        call = partial(decoder(impl), values, indices, data.w_dec)
        yield from row(f"decode, {impl} / dense matmul", call, matmul_dense, work)
        yield from row(f"torch embedding_bag / decode, {impl}", theirs, call, work)


def bench_gradient(setting: Setting) -> Iterator[Row]:
    """The gradients of both matrices over the dense matmuls that make them, and of the values over the dense one."""
    for case in setting.cases:
        data = random_data(case, setting)
        for usage in USAGES:
            yield from gradient_rows(case, setting, data, usage)


def gradient_rows(case: Case, setting: Setting, data: Data, usage: Usage) -> Iterator[Row]:
    """The rows of one case and one kind of code: float32 cotangents for the decoder, x as it is for the encoder."""
    values, indices = random_code(setting.tokens, case.f, case.k, usage=usage)
    of_values, _ = random_code(setting.tokens, case.f, case.k, usage=usage, seed=1)
    errors, x = jax.random.normal(jax.random.key(1), data.x.shape, jnp.float32), data.x
    row = partial(measure, setting, f"{case.name}, {usage}")
    code, of_code = (to_dense(v, indices, case.f, setting.dtype) for v in (values, of_values))
    dense = partial(dense_outers(), code, of_code, errors.astype(setting.dtype), x)
    chosen = picked(setting, outer._KERNELS, values, indices, errors, latents=case.f)
    for impl in implementations(setting, outer._KERNELS) if usage == "heavy" else (chosen,):
        ours = partial(outers(case.f, impl), values, of_values, indices, errors, x)
        yield from row(f"sparse_outer of both matrices, {impl} / dense matmuls", ours, dense)
    if usage == "heavy":
        sides = {"decoder": (values, errors, code), "encoder": (of_values, x, of_code)}
        for name, (weights, rows, dense_code) in sides.items():
            ours = partial(outer_of(case.f, chosen), weights, indices, rows)
            one = partial(dense_outer(), dense_code, rows.astype(setting.dtype))
            what = f"sparse_outer of the {name}, {chosen} / dense matmul"
            yield from row(what, ours, one, _moved(case, setting, rows))
    yield from _dot_rows(case, setting, errors, indices, data.w_dec, usage)


def _dot_rows(case: Case, setting: Setting, errors, indices, w_dec: jax.Array, usage: Usage) -> Iterator[Row]:
    dense = partial(dense_dot(), errors.astype(setting.dtype), w_dec)
    chosen = picked(setting, decoding._DOT_KERNELS, errors, indices, w_dec)
    for impl in implementations(setting, decoding._DOT_KERNELS) if usage == "heavy" else (chosen,):
        call, what = partial(dot(impl), errors, indices, w_dec), f"gather_dot, {impl} / dense matmul"
        yield from measure(setting, f"{case.name}, {usage}", what, call, dense, _rows_read(case, setting))


# Each of these is one jitted function however often it is asked for: cases and codes of a shape share a compilation.


@functools.cache
def matmul(dtype: Any) -> Callable[..., jax.Array]:
    """x @ w with its result stored in this dtype, at the encoder's precision."""
    return jax.jit(lambda x, w: jnp.matmul(x, w, precision=precision(x.dtype), preferred_element_type=dtype))


@functools.cache
def encoder(k: int, contract: Any, impl: str | None) -> Callable[..., Any]:
    """The jitted encoder (x, w_enc, b_enc) -> (values, indices)."""
    return jax.jit(partial(encoding.topk_encode, k=k, contract=contract, impl=impl))


@functools.cache
def top_k(k: int) -> Callable[..., Any]:
    """`lax.top_k` of pre-activations [n, f] that are there already."""
    return jax.jit(partial(jax.lax.top_k, k=k))


@functools.cache
def selector(k: int) -> Callable[..., Any]:
    """The same by the maxima of groups, as encoders without a matmul of their own do it on this platform."""

    def without_order(pre: jax.Array) -> Any:
        groups = pre.reshape(len(pre), -1, group_width(pre.shape[1], k))
        return cuda.largest(pre, groups.max(2), k)

    return jax.jit(without_order if device_of().platform == "gpu" else partial(select, k=k))


@functools.cache
def decoder(impl: str | None) -> Callable[..., jax.Array]:
    """The jitted decoder (values, indices, w_dec) -> [n, d]."""
    return jax.jit(partial(decoding.sparse_decode, impl=impl))


@functools.cache
def outer_of(latents: int, impl: str | None) -> Callable[..., Any]:
    """The jitted gradient (values, indices, rows) -> ([f, d], [f])."""
    return jax.jit(partial(outer.sparse_outer, latents=latents, impl=impl))


@functools.cache
def outers(latents: int, impl: str | None) -> Callable[..., Any]:
    """The gradients of both matrices in one program, which may sort the indices once for both."""
    one = outer_of(latents, impl)
    return jax.jit(
        lambda values, of_values, indices, errors, x: (one(values, indices, errors), one(of_values, indices, x))
    )


@functools.cache
def dot(impl: str | None) -> Callable[..., jax.Array]:
    """The jitted gradient of the values, (errors [n, d], indices [n, k], w_dec [f, d]) -> [n, k]."""
    return jax.jit(partial(decoding.gather_dot, impl=impl))


@functools.cache
def dense_encoder(k: int) -> Callable[..., Any]:
    """What one writes first: the matmul, all pre-activations in float32, `lax.top_k`."""

    def encode(x, w_enc, b_enc):
        pre = jnp.matmul(x, w_enc, precision=precision(x.dtype), preferred_element_type=jnp.float32) + b_enc
        values, indices = jax.lax.top_k(pre, k)
        return jax.nn.relu(values), indices

    return jax.jit(encode)


@functools.partial(jax.jit, static_argnums=(2, 3))
def to_dense(values: jax.Array, indices: jax.Array, latents: int, dtype: Any) -> jax.Array:
    """The code as [n, latents]."""
    dense = jnp.zeros((values.shape[0], latents), dtype)
    return dense.at[jnp.arange(values.shape[0])[:, None], indices].add(values.astype(dtype))


@functools.cache
def dense_outer() -> Callable[..., jax.Array]:
    """(code [n, f], rows [n, d]) -> code^T @ rows [f, d], float32."""
    return jax.jit(lambda code, rows: jnp.einsum("nf,nd->fd", code, rows, **_options(rows.dtype)))


@functools.cache
def dense_dot() -> Callable[..., jax.Array]:
    """(errors [n, d], w_dec [f, d]) -> errors @ w_dec^T [n, f], float32: the gradient of a dense code."""
    return jax.jit(lambda e, w: jnp.einsum("nd,fd->nf", e, w, **_options(w.dtype)))


@functools.cache
def dense_outers() -> Callable[..., Any]:
    """Both dense gradients in one program: (code, gradient of the code, errors, x) -> [f, d] twice."""
    one = dense_outer()
    return jax.jit(lambda code, of_code, errors, x: (one(code, errors), one(of_code, x)))


def _options(dtype: Any) -> dict[str, Any]:
    return {"precision": precision(dtype), "preferred_element_type": jnp.float32}


def _moved(case: Case, setting: Setting, rows: jax.Array) -> Work:
    """A row read per slot, the gradient written once."""
    read = float(setting.tokens * case.k * case.d * rows.dtype.itemsize)
    return Work(read + 4 * case.f * (case.d + 1), "B/s", copy_bandwidth(setting.sample))


def _rows_read(case: Case, setting: Setting) -> Work:
    size = float(setting.tokens * case.k * case.d * setting.dtype.itemsize)
    return Work(size, "B/s", copy_bandwidth(setting.sample))
