"""A matmul for Hopper GPUs that stores pre-activations and, while they are in registers, every group's maximum.

pre = x @ w_enc + b_enc,    maxima[j] = max of pre over the columns GROUP * j .. GROUP * (j + 1) - 1

One warpgroup fetches tiles, two multiply. Blocks stay on their processor and take tile after tile; those of a cluster
lie one below the other and fetch a tile of w_enc once for all.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qscope_kernels.pallas_gpu import call, pl, plgpu

GROUP = 32  # columns per maximum
_SMALLEST = 128  # bytes that the copy engine and the tensor cores read at once


class Tiling(NamedTuple):
    """How the product is cut: sizes of the tiles and the order in which they are taken."""

    rows: int = 64  # of each of the two warpgroups that multiply, one below the other
    columns: int = 256
    inner: int = 64
    stages: int = 4  # of float32 results one fewer: shared memory holds their way out too
    cluster: int = 2
    panel: int = 8  # tiles one below the other before the next to the right

    @property
    def height(self) -> int:
        """Rows that a cluster makes at once; it must divide the number of rows."""
        return 2 * self.rows * self.cluster


def matmul_maxima(
    x: jax.Array, w_enc: jax.Array, b_enc: jax.Array, *, cores: int, dtype: Any, tiling: Tiling
) -> tuple[jax.Array, jax.Array]:
    """Pre-activations [n, f], rounded from float32 to `dtype`, and the maxima [f / GROUP, n] of the rounded."""
    n, f = x.shape[0], w_enc.shape[1]
    tiles = (n // tiling.height) * (f // tiling.columns)

    def matmul(*refs):  # its name is the kernel's
        _Program(*refs, tiling=tiling).run()

    pre, maxima = call(
        matmul,
        *(x, w_enc, b_enc),
        out=[((n, f), dtype), ((f // GROUP, n), jnp.float32)],
        blocks=min(cores // tiling.cluster, tiles),
        cluster=(tiling.cluster,),
        cluster_names=("member",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    return pre, maxima


class _Program(NamedTuple):
    """What one block does, with the refs it works on."""

    x: Any
    w_enc: Any
    b_enc: Any
    pre: Any
    maxima: Any
    tiling: Tiling

    def run(self) -> None:
        """Takes tiles until none is left. What lies in shared memory stays there from tile to tile."""
        rows, columns = self.tiling.rows, self.tiling.columns
        pl.run_scoped(
            self.tiles,
            self.pipeline(_nothing, _nothing).get_allocations(self.x, self.w_enc),
            plgpu.SMEM((2, 2, rows, GROUP), self.pre.dtype, transforms=_transforms(GROUP, self.pre.dtype)),
            plgpu.SMEM((2, columns), self.b_enc.dtype),
            plgpu.Barrier(num_barriers=2),
            collective_axes="warpgroup",
        )
        plgpu.wait_smem_to_gmem(0)

    def pipeline(self, step: Callable[..., Any], around: Callable[..., Any]) -> Any:
        """`step` over all tiles of the inner dimension, fetched ahead; `around` holds what else a tile needs."""
        t = self.tiling
        tile = partial(plgpu.BlockSpec, transforms=_transforms(t.inner, self.x.dtype), memory_space=plgpu.SMEM)
        together = ("member",) if t.cluster > 1 else ()
        return plgpu.emit_pipeline_warp_specialized(
            step,
            grid=(self.x.shape[1] // t.inner,),
            memory_registers=40,
            in_specs=[
                tile((2 * t.rows, t.inner), lambda i: (0, i)),
                tile((t.inner, t.columns), lambda i: (i, 0), collective_axes=together),
            ],
            wg_axis="warpgroup",
            num_compute_wgs=2,
            max_concurrent_steps=t.stages - (self.pre.dtype == jnp.float32),
            compute_context=around,
        )

    def tiles(self, fetched: Any, leaving: Any, bias: Any, arrived: Any) -> None:
        """Multiplies this block's share of the tiles, one after the other."""
        t, warpgroup = self.tiling, lax.axis_index("warpgroup")
        down, across = self.pre.shape[0] // t.height, self.pre.shape[1] // t.columns
        mine = pl.ds(warpgroup * t.rows, t.rows)

        def multiply(_, x, w, total):
            plgpu.wgmma(total, x.at[mine], w)
            plgpu.wgmma_wait(0)
            return total

        @plgpu.nd_loop((down * across,), collective_axes="block")
        def _(loop):
            i, j = plgpu.planar_snake(loop.index[0], (down, across), 0, t.panel)
            first = (i * t.cluster + lax.axis_index("member")) * 2 * t.rows
            columns, groups = pl.ds(j * t.columns, t.columns), pl.ds(j * (t.columns // GROUP), t.columns // GROUP)
            own = pl.ds(first + warpgroup * t.rows, t.rows)

            def around(run):
                def summed(total):
                    plgpu.copy_gmem_to_smem(self.b_enc.at[columns], bias.at[warpgroup], arrived.at[warpgroup])
                    run(total)
                    plgpu.barrier_wait(arrived.at[warpgroup])
                    out = self.pre.at[own, columns], self.maxima.at[groups, own]
                    _store(total[...], bias.at[warpgroup], *out, leaving.at[warpgroup])

                pl.run_scoped(summed, plgpu.WGMMAAccumulatorRef((t.rows, t.columns), jnp.float32))

            arrays = self.x.at[pl.ds(first, 2 * t.rows)], self.w_enc.at[:, columns]
            self.pipeline(multiply, around)(*arrays, allocations=fetched)


def _store(total: jax.Array, bias: Any, pre: Any, maxima: Any, buffers: Any) -> None:
    """Adds the bias to [rows, columns], and per group of columns stores the maxima and sends the tile on its way."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for group in range(total.shape[1] // GROUP):
        columns, buffer = pl.ds(group * GROUP, GROUP), buffers.at[group % 2]
        part = total[:, group * GROUP : (group + 1) * GROUP]
        tile = (part + lax.broadcast_in_dim(bias[columns].astype(jnp.float32), part.shape, (1,))).astype(pre.dtype)
        maxima[group, :] = jnp.max(tile.astype(jnp.float32), axis=1)
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # this buffer has left; the other may be on its way
        buffer[...] = tile
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffer, pre.at[:, columns])


def _transforms(width: int, dtype: Any) -> tuple[Any, ...]:
    """How rows of `width` elements lie in shared memory, so that no two threads ask one bank."""
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = min(_SMALLEST, width * itemsize)
    tiling: Any = plgpu.TilingTransform  # type checkers take both for abstract in JAX 0.12
    swizzling: Any = plgpu.SwizzleTransform
    return tiling((8, swizzle // itemsize)), swizzling(swizzle)


def _nothing(*_: Any, **__: Any) -> None:
    """Stands for a step where only the memory of a pipeline is asked for."""
