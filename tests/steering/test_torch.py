"""Steering equals forward hooks on transformers' model: every mode and rule, in prefill and in every decode step."""

from dataclasses import replace
from itertools import pairwise

import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.backbone.cache import init_cache
from qscope_jax.backbone.weights import Backbone, save_backbone
from qscope_jax.steering import MODES, steer
from tests.steering.conftest import LENGTHS, NEW, PROMPT, RULES
from tests.steering.reference import steer_layer
from tests.steering.test_tap import POSITIONS, entry

pytestmark = pytest.mark.parity


class Hooked:
    """transformers' model with a forward hook on every decoder layer that steers its output."""

    def __init__(self, folder, saes):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float().eval()
        self.saes, self.rows, self.columns, self.mask = saes, [], slice(None), np.ones(())
        for layer, module in enumerate(self.model.model.layers):
            module.register_forward_hook(lambda _, __, out, layer=layer: self.steer(out, layer))

    def steer(self, out, layer):
        import torch

        positions, mask = POSITIONS[:, self.columns], self.mask[:, self.columns]
        steered, _ = steer_layer(out.numpy(), self.rows, layer, self.saes, positions, LENGTHS, mask)
        return torch.from_numpy(steered).to(out.dtype)

    def run(self, rows, tokens, mask):
        """Logits [b, t, v]: the prompts in one call, every further token in its own, with transformers' cache."""
        import torch

        self.rows, self.mask, cache, logits = rows, mask, None, []
        bounds = [0, *range(PROMPT, PROMPT + NEW + 1)]
        for low, high in pairwise(bounds):
            self.columns = slice(low, high)
            with torch.inference_mode():
                # By position: versions of transformers name the cache differently.
                out = self.model(
                    torch.from_numpy(tokens[:, low:high]),
                    torch.from_numpy(mask[:, :high]).long(),
                    torch.from_numpy(POSITIONS[:, low:high]),
                    cache,
                    use_cache=True,
                )
            cache = out.past_key_values
            logits.append(out.logits.numpy())
        return np.concatenate(logits, axis=1)


@pytest.fixture(scope="module")
def hooked(model, tmp_path_factory):
    pytest.importorskip("torch").set_num_threads(1)
    folder = tmp_path_factory.mktemp("model")
    save_backbone(Backbone(model.config, model.params), folder)
    return Hooked(folder, model.saes)


def ours(model, run, rows):
    tap, cache = steer(rows, model.saes), init_cache(model.config, model.rows, PROMPT + NEW)
    logits = []
    for low, high in [(0, PROMPT), *((t, t + 1) for t in range(PROMPT, PROMPT + NEW))]:
        options = {"mask": model.mask[:, low:high], "prompt_lengths": jnp.asarray(LENGTHS)}
        out = run(model.params, model.config, model.tokens[:, low:high], cache=cache, tap=tap, **options)
        cache = out.cache
        logits.append(out.logits)
    return np.concatenate(logits, axis=1)


@pytest.mark.parametrize("mode", [None, *MODES])
def test_logits_equal_those_of_hooks(model, run, hooked, mode):
    entries = [] if mode is None else [entry(mode, 1), entry(mode, 1, feature=21), entry(mode, 3, preserve_norm=True)]
    rows = [[replace(item, positions=rule) for item in entries] for rule in RULES]
    expected = hooked.run(rows, model.tokens, model.mask)
    if mode is not None:
        assert not np.allclose(expected[model.mask], hooked.run([[]] * len(rows), model.tokens, model.mask)[model.mask])
    np.testing.assert_allclose(ours(model, run, rows)[model.mask], expected[model.mask], rtol=1e-4, atol=1e-4)
