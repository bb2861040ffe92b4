"""Root-mean-square norms of the families: x / rms(x) in float32, times a weight (Qwen3) or one plus it (Qwen3.5)."""

import flax.linen as nn
import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, scale: jax.Array, eps: float, *, zero_centred: bool = False) -> jax.Array:
    """scale * x / rms(x), cast back before the weight product as Qwen3 does.

    Zero-centred (Qwen3.5): (1 + scale) * x / rms(x), all in float32, then cast.
    """
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    if zero_centred:
        return (normed * (1 + scale.astype(jnp.float32))).astype(x.dtype)
    return scale * normed.astype(x.dtype)


class RMSNorm(nn.Module):
    """`rms_norm` over the last axis with its weight."""

    eps: float
    zero_centred: bool = False

    @nn.compact
    def __call__(self, x):
        start = nn.initializers.zeros if self.zero_centred else nn.initializers.ones
        return rms_norm(x, self.param("scale", start, (x.shape[-1],)), self.eps, zero_centred=self.zero_centred)
