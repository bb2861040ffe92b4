"""The layers behind one, run alone on its output, give what the whole model gives, in every family."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.backbone.forward import forward, forward_after
from tests.backbone.families import FAMILIES, HYBRIDS, QUICK, make_config, make_params, relative_l2, tokens_of

TOKENS = tokens_of(2, 9)
MASK = np.arange(9) < [[9], [7]]
IDS = (np.arange(9) >= [[4], [2]]).astype(np.int32)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_s_output_goes_on_to_the_same_end(family):
    config = make_config(family)
    params, layers = make_params(config), range(config.num_layers)
    whole = jax.jit(forward, static_argnums=1, static_argnames=("capture", "logits"), compiler_options=QUICK)
    out = whole(params, config, TOKENS, mask=MASK, segment_ids=IDS, capture=tuple(layers), logits="none")
    traces = []

    def after(params, h, layer):
        traces.append(layer)
        return forward_after(params, config, h, layer, mask=jnp.asarray(MASK), segment_ids=jnp.asarray(IDS))

    run = jax.jit(after, compiler_options=QUICK)
    for layer in layers:
        assert relative_l2(run(params, out.captured[layer], layer)[MASK], out.hidden[MASK]) < 1e-6
    assert len(traces) == 1
    assert (
        relative_l2(run(params, out.captured[2], 3)[MASK], out.hidden[MASK]) > 1e-3
    )  # a layer too few is another model


@pytest.mark.parametrize("family", HYBRIDS)
def test_rows_with_pads_inside_a_segment_are_not_a_number_where_linear_layers_run(family):
    config = make_config(family)
    gaps = jnp.arange(9) != jnp.array([[3], [9]])
    h = jnp.ones((2, 9, config.hidden_size))
    hidden = jax.jit(forward_after, static_argnums=1, compiler_options=QUICK)(
        make_params(config), config, h, 0, mask=gaps
    )
    assert jnp.isnan(hidden[0]).all()
    assert jnp.isfinite(hidden[1]).all()
