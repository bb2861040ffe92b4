"""What rises on the tokens in question, and which tokens those are."""

import dataclasses

import numpy as np
import pytest

from qscope_jax.backbone.weights import load_backbone
from qscope_jax.data.tokenizer import load_tokenizer, make_encoder
from qscope_jax.explorer.tokens import token_bytes
from qscope_jax.extract import extract_documents
from qscope_jax.features.diagnosis import Complaint, find_suspects, judge_answer
from qscope_jax.sae.formats import load_saes
from qscope_jax.sae.model import row_norms_of, without_decoder

pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(scope="module")
def parts(tiny_release):
    """Model, SAEs and an answer that loops."""
    backbone, saes = load_backbone(tiny_release / "model", dtype="float32"), load_saes(tiny_release / "sae")
    tokenizer = load_tokenizer(tiny_release / "model")
    (ids,) = make_encoder(tokenizer)(["a dog the quick 習慣 fox the quick 習慣 fox the quick 習慣 fox"])
    answer = judge_answer(Complaint("loop"), ids[:0], ids, token_bytes(tokenizer, ids.tolist()))
    assert answer is not None
    assert answer.loop is not None
    return backbone, saes, answer


@pytest.mark.parametrize("layer", [0, 1])
def test_a_loops_token_counts_neither_at_last_nor_at_first_if_one_of_them_is_a_sink(parts, layer):
    backbone, saes, answer = parts
    (code,) = extract_documents(backbone, saes, [answer.ids])
    norms, dense = code.norms[layer], np.zeros((len(answer.ids), 64))
    np.put_along_axis(dense, code.codes[layer].indices, code.codes[layer].values, axis=1)
    both = np.sort(np.concatenate([norms[answer.wrong], norms[answer.others]]))
    threshold = float(both[-2:].mean())  # one token lies above
    kept = (norms[answer.wrong] <= threshold) & (norms[answer.others] <= threshold)
    assert kept.sum() == len(kept) - 1
    config = dataclasses.replace(saes[layer].config, sink_threshold=threshold)
    found, _ = find_suspects(backbone, {layer: saes[layer]._replace(config=config)}, [answer], top=5)
    difference = dense[answer.wrong[kept]].mean(axis=0) - dense[answer.others[kept]].mean(axis=0)
    assert [s.difference for s in found[layer]] == pytest.approx(
        [d for d in np.sort(difference)[::-1][:5] if d > 0], rel=1e-4
    )


def test_encoders_and_the_norms_of_decoder_rows_are_enough(parts):
    backbone, saes, answer = parts
    light = {n: without_decoder(sae) for n, sae in saes.items()}
    norms = {n: row_norms_of(sae) for n, sae in saes.items()}
    found, _ = find_suspects(backbone, light, [answer], row_norms=norms)
    assert found == find_suspects(backbone, saes, [answer])[0]
    with pytest.raises(ValueError, match="without its decoder"):
        find_suspects(backbone, light, [answer])
