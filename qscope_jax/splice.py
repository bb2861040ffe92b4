"""What a model predicts when the output of one of its layers is replaced, against what it predicts by itself.

Pure functions of a batch: tokens, mask and segment ids, [b, t] each. Only the layers behind the replaced one run again;
which one that is, and whether an SAE's reconstruction or zeros stand there, is data: one compiled program serves all.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qscope_jax.backbone.config import ModelConfig
from qscope_jax.backbone.forward import Params, forward, forward_after
from qscope_jax.objectives.lm import Metrics, cross_entropy_loss, kl_loss, next_tokens, output_head


class Clean(NamedTuple):
    """The model's own pass: the residual stream of some layers, its final hidden state, and the sums of its loss."""

    captured: Float[Array, "l b t d"]
    hidden: Float[Array, "b t d"]
    sums: Metrics


def splice(
    h: Float[Array, "b t d"], replacement: Float[Array, "b t d"], keep: Bool[Array, "b t"]
) -> Float[Array, "b t d"]:
    """`replacement`, rounded to the dtype of the residual stream `h`, where `keep`; `h` itself elsewhere."""
    return jnp.where(keep[..., None], replacement.astype(h.dtype), h)


def run_clean(
    params: Params,
    config: ModelConfig,
    batch: Sequence[jax.Array],
    layers: tuple[int, ...],
    predict: bool | Bool[Array, ""] = True,
) -> Clean:
    """The model by itself; `sums` are those of `cross_entropy_loss`, over the positions that have a next token.

    Without `predict` they are 0, and the logits, which cost as much as many a layer, are not computed.
    """
    tokens, mask, segment_ids = batch
    out = forward(params, config, tokens, mask=mask, segment_ids=segment_ids, capture=layers, logits="none")
    assert out.hidden is not None  # there is no stop_after
    head, targets, hidden = output_head(params, config), next_tokens(tokens, mask, segment_ids), out.hidden
    sums = lambda: cross_entropy_loss(hidden, head, *targets, precision=config.precision)[1]  # noqa: E731
    none = {"cross_entropy": jnp.zeros(()), "tokens": jnp.zeros(())}
    return Clean(out.captured, hidden, jax.lax.cond(predict, sums, lambda: none))


def run_spliced(
    params: Params,
    config: ModelConfig,
    batch: Sequence[jax.Array],
    h: Float[Array, "b t d"],
    layer: int | Int[Array, ""],
    clean_hidden: Float[Array, "b t d"],
) -> Metrics:
    """The sums of `kl_loss` from the clean model to that whose `layer` gives `h`, at the positions of `run_clean`."""
    tokens, mask, segment_ids = batch
    hidden = forward_after(params, config, h, layer, mask=mask, segment_ids=segment_ids)
    head, targets = output_head(params, config), next_tokens(tokens, mask, segment_ids)
    return kl_loss(hidden, clean_hidden, head, *targets, precision=config.precision)[1]
