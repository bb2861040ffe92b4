"""Checks and times variants of the Hopper kernels on the GPU at hand: other tiles, other numbers of rows in flight.

    python scripts/hopper_variants.py [--cases d2048-f32768-k50 ...] [--budget SECONDS_PER_ROW] [--out FILE.json]

What wins here becomes the kernels' default, and a kernel that wins over XLA's form is made the automatic choice.
"""

import argparse
import itertools
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from qscope_kernels.dispatch import device_of
from qscope_kernels.pallas_gpu import not_hopper
from qscope_kernels.sparse_decode import gpu as decode_gpu
from qscope_kernels.sparse_decode import xla as decode_xla
from qscope_kernels.sparse_outer import gpu as outer_gpu
from qscope_kernels.sparse_outer import xla as outer_xla
from qscope_kernels.topk_encode import cuda
from qscope_kernels.topk_encode.gpu_matmul import GROUP, Tiling, matmul_maxima

from qscope_jax.benchmarks.codes import random_code
from qscope_jax.benchmarks.rows import Row, Setting, markdown, measure, relative_l2, setting_of
from qscope_jax.benchmarks.sparse import matmul, random_data
from qscope_jax.jobs.bench import all_versions

TILINGS = [
    Tiling(),
    *(Tiling(cluster=1, panel=panel) for panel in (8, 16)),
    *(Tiling(panel=panel) for panel in (4, 16, 32)),
    Tiling(columns=128, stages=6),
    Tiling(rows=128, columns=128, stages=3),
    Tiling(inner=32, stages=8),
]
AGREE = 3e-3  # relative L2 that orders of summation, and one rounding to bfloat16, may make


def main() -> None:
    """Prints a table and, if asked, writes it; ends with an error where a kernel disagrees with XLA's form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=["d2048-f32768-k50", "d4096-f65536-k50"])
    parser.add_argument("--budget", type=float, default=1.0, help="seconds per row")
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    options = parser.parse_args()
    if why := not_hopper(device_of()):
        parser.error(f"{why}; run it on the GPU whose kernels are to be tuned")
    setting, rows = setting_of(cases=options.cases, budget=options.budget), []
    print(jax.devices()[0].device_kind, all_versions())
    for row in itertools.chain.from_iterable(part(setting) for part in (pieces, tilings, decodes, outers)):
        print("\n".join(markdown([row])[2 if rows else 0 :]), f"relative L2 {row.get('difference', 0):.1e}", flush=True)
        rows.append(row)
        if options.out:
            options.out.write_text(json.dumps(rows, indent=1))
    if wrong := [row["what"] for row in rows if "failed" in row or not row.get("difference", 0) <= AGREE]:
        raise SystemExit(f"these failed, or differ from XLA's form: {', '.join(wrong)}")


def compared(setting: Setting, case: str, what: str, variant, usual, wanted) -> Iterator[Row]:
    """Time of a variant over the usual, with how far its results lie from those wanted."""
    for row in measure(setting, case, what, variant, usual):
        if "failed" not in row:
            found = map(relative_l2, jax.tree.leaves(variant()), jax.tree.leaves(wanted))
            row["difference"] = float(np.max(list(found)))  # unlike max, NaN if one is
        yield row


def pieces(setting: Setting) -> Iterator[Row]:
    """What each step of the encode takes, over the bare matmul with its result in float32."""
    for case in setting.cases:
        data = random_data(case, setting)
        bare = partial(matmul(jnp.float32), data.x, data.w_enc)
        pre = bare()
        maxima = jax.jit(lambda pre: jnp.max(pre.reshape(len(pre), -1, GROUP), axis=2))
        choose = jax.jit(cuda.largest, static_argnums=2)
        steps = {
            "matmul stored in bfloat16": partial(matmul(jnp.bfloat16), data.x, data.w_enc),
            "maxima of groups": partial(maxima, pre),
            "top-k of maxima": partial(jax.jit(partial(jax.lax.top_k, k=case.k, is_stable=False)), maxima(pre)),
            "selection from maxima": partial(choose, pre, maxima(pre), case.k),
        }
        for name, step in steps.items():
            yield from measure(setting, case.name, f"{name} / matmul", step, bare)


def tilings(setting: Setting) -> Iterator[Row]:
    """The matmul with group maxima over the bare one, for each tiling and both types of what it stores."""
    cores = device_of().cores or 132
    for case, dtype in itertools.product(setting.cases, (jnp.float32, jnp.bfloat16)):
        data = random_data(case, setting)
        bare = partial(matmul(dtype), data.x, data.w_enc)
        wanted = (jnp.dot(data.x, data.w_enc, preferred_element_type=jnp.float32) + data.b_enc).astype(dtype)
        groups = jnp.max(wanted.astype(jnp.float32).reshape(len(wanted), -1, GROUP), axis=2).T
        for tiling in TILINGS:
            variant = jax.jit(partial(matmul_maxima, cores=cores, dtype=dtype, tiling=tiling))
            what = f"{tuple(tiling)} storing {jnp.dtype(dtype).name} / matmul"
            yield from compared(setting, case.name, what, partial(variant, *data[:3]), bare, (wanted, groups))


def decodes(setting: Setting) -> Iterator[Row]:
    """Decode and gather_dot in variants over XLA's form."""
    for case in setting.cases:
        data, (values, indices) = random_data(case, setting), random_code(setting.tokens, *case[1:], usage="heavy")
        usual = partial(jax.jit(decode_xla.sparse_decode), values, indices, data.w_dec)
        wanted = usual()
        for columns, unroll in ((2048, 5), (2048, 10), (1024, 5), (1024, 10), (4096, 5)):
            variant = jax.jit(partial(decode_gpu.sparse_decode, columns=columns, unroll=unroll))
            what = f"decode, {columns} columns, {unroll} rows in flight / xla"
            yield from compared(setting, case.name, what, partial(variant, *usual.args), usual, wanted)
        usual = partial(jax.jit(decode_xla.gather_dot), wanted, indices, data.w_dec)
        products = usual()
        for unroll in (2, 4, 5, 8, 10):
            variant = jax.jit(partial(decode_gpu.gather_dot, unroll=unroll))
            what = f"gather_dot, {unroll} rows in flight / xla"
            yield from compared(setting, case.name, what, partial(variant, *usual.args), usual, products)


def outers(setting: Setting) -> Iterator[Row]:
    """sparse_outer in variants over XLA's form, for rows of both types."""
    for case, dtype in itertools.product(setting.cases, (jnp.bfloat16, jnp.float32)):
        values, indices = random_code(setting.tokens, *case[1:], usage="heavy")
        rows = random_data(case, setting).x.astype(dtype)
        usual = partial(jax.jit(partial(outer_xla.sparse_outer, latents=case.f)), values, indices, rows)
        wanted = usual()
        for piece, unroll, row_bytes in ((128, 8, 2048), (128, 4, 2048), (64, 8, 2048), (256, 8, 2048), (128, 8, 4096)):
            options = {"piece": piece, "unroll": unroll, "row_bytes": row_bytes}
            variant = jax.jit(partial(outer_gpu.sparse_outer, latents=case.f, **options))
            what = f"sparse_outer of {jnp.dtype(dtype).name}, {options} / xla"
            yield from compared(setting, case.name, what, partial(variant, *usual.args), usual, wanted)


if __name__ == "__main__":
    main()
