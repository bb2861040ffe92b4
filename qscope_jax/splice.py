"""What a model predicts when the output of one of its layers is replaced, against what it predicts by itself.

Pure functions of a batch: tokens, mask and segment ids, [b, t] each. The replacement is data of a tap, so that another
layer, an SAE's reconstruction or zeros all run in the same compiled program.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from qscope_jax.backbone.config import ModelConfig
from qscope_jax.backbone.forward import Params, forward
from qscope_jax.objectives.lm import Metrics, cross_entropy_loss, kl_loss, next_tokens, output_head
from qscope_jax.taps import Tap


class Clean(NamedTuple):
    """The model's own pass: the residual stream of some layers, its final hidden state, and the sums of its loss."""

    captured: Float[Array, "l b t d"]
    hidden: Float[Array, "b t d"]
    sums: Metrics


def splice(layer: int, num_layers: int, replacement: Float[Array, "b t d"], keep: Bool[Array, "b t"]) -> Tap:
    """A tap that puts `replacement` in the place of the layer's output where `keep`; another layer does not recompile.

    Raises:
      ValueError: the model has no such layer.
    """
    if not 0 <= layer < num_layers:
        raise ValueError(f"layer = {layer}; the model has the layers 0..{num_layers - 1}")
    return Tap(_replace, np.arange(num_layers) == layer, (replacement, keep))


def run_clean(params: Params, config: ModelConfig, batch: Sequence[jax.Array], layers: tuple[int, ...]) -> Clean:
    """The model by itself; `sums` are those of `cross_entropy_loss`, over the positions that have a next token."""
    tokens, mask, segment_ids = batch
    out = forward(params, config, tokens, mask=mask, segment_ids=segment_ids, capture=layers, logits="none")
    assert out.hidden is not None  # there is no stop_after
    head, targets = output_head(params, config), next_tokens(tokens, mask, segment_ids)
    return Clean(
        out.captured, out.hidden, cross_entropy_loss(out.hidden, head, *targets, precision=config.precision)[1]
    )


def run_spliced(
    params: Params, config: ModelConfig, batch: Sequence[jax.Array], tap: Tap, clean_hidden: Float[Array, "b t d"]
) -> Metrics:
    """The sums of `kl_loss`, from the clean model's hidden state to that under the tap; the positions are the same."""
    tokens, mask, segment_ids = batch
    out = forward(params, config, tokens, mask=mask, segment_ids=segment_ids, tap=tap, logits="none")
    assert out.hidden is not None
    head, targets = output_head(params, config), next_tokens(tokens, mask, segment_ids)
    return kl_loss(out.hidden, clean_hidden, head, *targets, precision=config.precision)[1]


def _replace(h, chosen, shared, ctx):
    replacement, keep = shared
    return jnp.where(chosen & keep[..., None], replacement.astype(h.dtype), h), ()
