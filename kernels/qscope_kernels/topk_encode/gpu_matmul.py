"""A Hopper matmul that stores pre-activations and, from its registers, the maximum of every group of columns.

pre = x @ w_enc + b_enc;    maxima[j] = max of pre over the columns GROUP*j .. GROUP*(j+1) - 1
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

GROUP = 32  # columns per maximum


class Tiling(NamedTuple):
    """How the product is cut; the defaults are those that measured best."""

    rows: int = 64  # of one compute warpgroup; a block has two of them, one below the other
    columns: int = 256
    inner: int = 64
    stages: int = 4
    cluster: int = 2  # blocks one below the other that read a tile of w_enc once for all
    by_rows: bool = True  # walk down the rows first
    panel: int = 8  # tiles of the walked axis before turning
    staged: bool = True


def matmul_maxima(
    x: jax.Array, w_enc: jax.Array, b_enc: jax.Array, *, sms: int, dtype=jnp.float32, tiling: Tiling = Tiling()
) -> tuple[jax.Array, jax.Array]:
    """Pre-activations [n, f] in `dtype` and the float32 group maxima [f / GROUP, n] of what is stored."""
    (n, _), f = x.shape, w_enc.shape[1]
    out = jax.ShapeDtypeStruct((n, f), dtype), jax.ShapeDtypeStruct((f // GROUP, n), jnp.float32)
    run = plgpu.kernel(
        lambda *refs: _kernel(*refs, tiling=tiling),
        out_type=out,
        grid=(sms // tiling.cluster,),
        grid_names=("block",),
        cluster=(tiling.cluster,),
        cluster_names=("cluster",),
        num_threads=3,  # two that multiply, one that fetches
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    return run(x, w_enc, b_enc)


def _kernel(x, w_enc, b_enc, pre, maxima, *, tiling: Tiling):
    (n, d), f = x.shape, w_enc.shape[1]
    rows, columns, inner = tiling.rows, tiling.columns, tiling.inner
    block_rows = 2 * rows
    down, across = n // (block_rows * tiling.cluster), f // columns
    operand = _swizzled(inner, x.dtype)

    def pipeline(body, context):
        return plgpu.emit_pipeline_warp_specialized(
            body,
            grid=(d // inner,),
            memory_registers=40,
            in_specs=[
                plgpu.BlockSpec((block_rows, inner), lambda i: (0, i), transforms=operand, memory_space=plgpu.SMEM),
                plgpu.BlockSpec(
                    (inner, columns),
                    lambda i: (i, 0),
                    transforms=operand,
                    memory_space=plgpu.SMEM,
                    collective_axes=("cluster",) if tiling.cluster > 1 else (),
                ),
            ],
            wg_axis="warpgroup",
            num_compute_wgs=2,
            max_concurrent_steps=tiling.stages,
            compute_context=context,
        )

    def nothing(*_, **__):
        pass

    def tiles(buffers, stored, bias, arrived):
        warpgroup, member = lax.axis_index("warpgroup"), lax.axis_index("cluster")

        @plgpu.nd_loop((down * across,), collective_axes="block")
        def _(loop):
            i, j = plgpu.planar_snake(loop.index[0], (down, across), 0 if tiling.by_rows else 1, tiling.panel)
            first = (i * tiling.cluster + member) * block_rows
            mine = pl.ds(warpgroup * rows, rows)

            def multiply(_, x_tile, w_tile, acc):
                plgpu.wgmma(acc, x_tile.at[mine], w_tile)
                plgpu.wgmma_wait(0)
                return acc

            def finish(run):
                def with_sum(acc):
                    plgpu.copy_gmem_to_smem(
                        b_enc.at[pl.ds(j * columns, columns)], bias.at[warpgroup], arrived.at[warpgroup]
                    )
                    run(acc)
                    plgpu.barrier_wait(arrived.at[warpgroup])
                    _store(
                        acc[...],
                        bias.at[warpgroup],
                        pre.at[pl.ds(first + warpgroup * rows, rows), pl.ds(j * columns, columns)],
                        maxima.at[pl.ds(j * (columns // GROUP), columns // GROUP), pl.ds(first + warpgroup * rows, rows)],
                        stored and stored.at[warpgroup],
                    )

                pl.run_scoped(with_sum, plgpu.ACC((rows, columns), jnp.float32))

            pipeline(multiply, finish)(
                x.at[pl.ds(first, block_rows)], w_enc.at[:, pl.ds(j * columns, columns)], allocations=buffers
            )

    pl.run_scoped(
        tiles,
        pipeline(nothing, nothing).get_allocations(x, w_enc),
        plgpu.SMEM((2, 2, rows, GROUP), pre.dtype, transforms=_swizzled(GROUP, pre.dtype)) if tiling.staged else None,
        plgpu.SMEM((2, columns), b_enc.dtype),
        plgpu.Barrier(num_barriers=2),
        collective_axes="warpgroup",
    )
    plgpu.wait_smem_to_gmem(0)


def _store(acc, bias, pre, maxima, buffers):
    """Adds the bias, reduces each group of columns, and sends the group's tile on its way while the next is made."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for group in range(acc.shape[1] // GROUP):
        columns = slice(group * GROUP, (group + 1) * GROUP)
        offset = bias[pl.ds(group * GROUP, GROUP)]
        tile = (acc[:, columns] + lax.broadcast_in_dim(offset.astype(jnp.float32), (acc.shape[0], GROUP), (1,))).astype(
            pre.dtype
        )
        maxima[group, :] = jnp.max(tile.astype(jnp.float32), axis=1)
        if buffers is None:
            pre[:, pl.ds(group * GROUP, GROUP)] = tile
            continue
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the buffer of the group before the last is free again
        buffers[group % 2] = tile
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffers.at[group % 2], pre.at[:, pl.ds(group * GROUP, GROUP)])


def _swizzled(width: int, dtype) -> tuple:
    """The layout in shared memory of rows of `width` elements, as the tensor cores and the copy engine want it."""
    swizzle = plgpu.find_swizzle(width * jnp.dtype(dtype).itemsize * 8)
    return plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(swizzle)
