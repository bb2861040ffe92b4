"""Metrics folded over batches equal their definitions in float64 over everything at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.sae.model import Sae, SaeConfig, SaeParams, decode, encode, init_sae
from qscope_jax.sae.quality import (
    density,
    init_quality,
    measure,
    merge_quality,
    sink_threshold,
    summarize,
    update_quality,
)

CONFIG = SaeConfig(d_model=12, d_sae=40, k=4)
SAE = init_sae(jax.random.key(0), CONFIG)
update = jax.jit(update_quality)


def residuals(n, seed=0, *, offset=0.0):
    return np.random.default_rng(seed).normal(offset, 1.0, (n, CONFIG.d_model)).astype(np.float32)


def definition(x, sae=SAE, groups=None):
    """Every metric from its definition, in float64 NumPy, all tokens at once."""
    x, (w_enc, b_enc, w_dec, b_dec) = np.asarray(x, np.float64), (np.asarray(p, np.float64) for p in sae.params)
    pre = x @ w_enc + b_enc
    kth = np.sort(pre, axis=1)[:, -sae.config.k, None]
    code = np.where(pre >= kth, np.maximum(pre, 0), 0)
    x_hat = code @ w_dec + b_dec
    error = np.square(x - x_hat).sum()
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(x_hat, axis=1)
    expected = {
        "fvu": error / np.square(x - x.mean(axis=0)).sum(),
        "l0": (code > 0).sum() / len(x),
        "cosine": ((x * x_hat).sum(axis=1) / norms).mean(),
        "dead_fraction": 1 - (code > 0).any(axis=0).mean(),
        "tokens": len(x),
    }
    if groups is not None:
        within = sum(np.square(x[groups == g] - x[groups == g].mean(axis=0)).sum() for g in np.unique(groups))
        expected["fvu_within_groups"] = error / within
    return expected


def check(found, expected, rel=2e-6):
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=rel)
    assert found["explained_variance"] == 1 - found["fvu"]


def test_batches_of_any_shape_give_the_metrics_of_all_tokens_at_once():
    x = residuals(43)
    quality = update(init_quality(CONFIG), SAE, x[:3])
    quality = update(quality, SAE, x[3:23].reshape(5, 4, 12))
    quality = update(quality, SAE, x[23:])
    check(summarize(quality), definition(x) | {"sink_fraction": 0.0})


def test_a_mean_far_from_zero_does_not_eat_the_variance():
    x = residuals(2000, offset=3000.0)
    sae = Sae(SAE.params._replace(b_dec=jnp.full(12, 3000.0)), CONFIG)
    quality = init_quality(CONFIG)
    for batch in np.split(x, 100):
        quality = update(quality, sae, batch)
    check(summarize(quality), definition(x, sae), rel=1e-4)


def test_explained_variance_is_that_about_the_corpus_mean_not_about_zero_nor_per_batch():
    # The SAE gives the corpus mean for every token: exactly no variance is explained, whatever the batches are.
    x = np.concatenate([residuals(20, offset=2.0), residuals(20, seed=1, offset=-5.0)])
    zeros = jnp.zeros((12, 40)), jnp.zeros(40), jnp.zeros((40, 12))
    sae = Sae(SaeParams(*zeros, jnp.asarray(x.mean(axis=0))), CONFIG)
    quality = init_quality(CONFIG)
    for batch in np.split(x, 2):
        quality = update(quality, sae, batch)
    found = summarize(quality)
    assert found["explained_variance"] == pytest.approx(0, abs=1e-5)
    assert found["l0"] == 0
    assert found["dead_fraction"] == 1


def test_shards_merge_in_any_order():
    x = residuals(60)
    shards = [update(init_quality(CONFIG), SAE, part) for part in (x[:20], x[20:40], x[40:])]
    forward = merge_quality(merge_quality(shards[0], shards[1]), shards[2])
    backward = merge_quality(shards[2], merge_quality(shards[1], shards[0]))
    check(summarize(forward), definition(x))
    check(summarize(backward), definition(x))
    assert summarize(merge_quality(forward, init_quality(CONFIG))) == summarize(forward)


@pytest.mark.parametrize("junk", [1e6, np.nan, np.inf])
def test_masked_tokens_never_count_whatever_they_hold(junk):
    x = residuals(20)
    mask = np.random.default_rng(1).random(20) < 0.6
    spoiled = np.where(mask[:, None], x, junk).astype(np.float32)
    check(summarize(update(init_quality(CONFIG), SAE, spoiled, mask)), definition(x[mask]))


def test_sinks_are_left_out_at_any_position_and_their_share_is_reported():
    x = residuals(20)
    sinks, pads = [3, 7, 19], [5, 6]
    loud, mask = x.copy(), np.ones(20, bool)
    loud[sinks] *= 500
    loud[19] = np.inf
    mask[pads] = False
    threshold = sink_threshold(np.linalg.norm(x, axis=1))
    found = summarize(update(init_quality(CONFIG), SAE, loud, mask, sink_threshold=threshold))
    check(found, definition(np.delete(x, sinks + pads, axis=0)) | {"sink_fraction": 3 / 18})


def test_groups_give_the_variance_within_groups_and_the_same_total():
    groups = np.random.default_rng(2).integers(0, 2, 60)
    x = residuals(60) + 4 * np.eye(2, 12, dtype=np.float32)[groups]
    quality = init_quality(CONFIG, num_groups=2)
    for part in np.split(np.arange(60), 3):
        quality = update(quality, SAE, x[part], groups=groups[part])
    check(summarize(quality), definition(x, groups=groups))
    assert summarize(quality)["fvu_within_groups"] > summarize(quality)["fvu"]


def test_tokens_of_no_group_do_not_count():
    x, groups = residuals(20), np.arange(20) % 4 - 1  # -1, 0, 1, 2
    quality = update(init_quality(CONFIG, num_groups=2), SAE, x, groups=groups)
    kept = (groups >= 0) & (groups < 2)
    check(summarize(quality), definition(x[kept], groups=groups[kept]))


def test_totals_do_not_stall_where_float32_would():
    # 2^24 tokens plus one is 2^24 in float32.
    one = update(init_quality(CONFIG), SAE, residuals(20), np.arange(20) == 0)
    many = one._replace(tokens=one.tokens._replace(high=jnp.full(1, 2.0**24)))
    merge = jax.jit(merge_quality)
    for _ in range(5):
        many = merge(many, one)
    assert summarize(many)["tokens"] == 2**24 + 5


def test_the_l0_of_a_code_with_fewer_than_k_positive_counts_the_positive_alone():
    weights = jnp.zeros((12, 40)), jnp.zeros(40).at[7].set(1.0), SAE.params.w_dec, jnp.zeros(12)
    found = summarize(update(init_quality(CONFIG), Sae(SaeParams(*weights), CONFIG), residuals(20)))
    assert found["l0"] == 1
    assert found["dead_fraction"] == pytest.approx(39 / 40)


def test_bfloat16_inputs_are_measured_in_float32():
    x = jnp.asarray(residuals(20, offset=5.0), jnp.bfloat16)
    check(summarize(update(init_quality(CONFIG), SAE, x)), definition(x.astype(jnp.float32)), rel=1e-5)


def test_equal_tokens_have_no_variance_to_explain():
    found = summarize(update(init_quality(CONFIG), SAE, np.zeros((20, 12), np.float32)))
    assert np.isnan(found["fvu"])
    assert np.isnan(found["explained_variance"])


def test_nothing_seen_is_an_error_not_a_number():
    with pytest.raises(ValueError, match="no token counted"):
        summarize(update(init_quality(CONFIG), SAE, residuals(20), np.zeros(20, bool)))


def test_a_batch_of_the_same_shape_never_recompiles():
    traces = []

    @jax.jit
    def counted(quality, sae, x, mask, threshold):
        traces.append(x.shape)
        return update_quality(quality, sae, x, mask, sink_threshold=threshold)

    quality = init_quality(CONFIG)
    for seed, threshold in ((0, 50.0), (1, 60.0)):
        other = init_sae(jax.random.key(seed), CONFIG)
        quality = counted(quality, other, residuals(20, seed), np.ones(20, bool), threshold)
    assert traces == [(20, 12)]


def test_the_sink_threshold_is_ten_times_the_median_norm():
    assert sink_threshold(np.array([1.0, 2.0, 900.0])) == 20.0
    with pytest.raises(ValueError, match="finite"):
        sink_threshold(np.array([1.0, np.nan]))
    with pytest.raises(ValueError, match="at least one token"):
        sink_threshold(np.array([]))


def test_firings_are_counted_per_latent_and_become_a_histogram_of_rates():
    x = residuals(1000)
    quality = init_quality(CONFIG)
    for part in np.split(x, 10):
        quality = update(quality, SAE, part, np.arange(100) < 97)
    kept = np.concatenate([part[:97] for part in np.split(x, 10)])
    pre = kept.astype(np.float64) @ np.asarray(SAE.params.w_enc, np.float64)
    fires = (pre >= np.sort(pre, axis=1)[:, -4, None]) & (pre > 0)
    np.testing.assert_array_equal(quality.counts.high, fires.sum(axis=0))
    found = density(quality)
    rates = np.log10(fires.mean(axis=0)[fires.any(axis=0)])
    assert found["latents"] == np.histogram(rates, found["edges"])[0].tolist()
    assert sum(found["latents"]) + found["never"] == 40
    assert found["median"] == pytest.approx(np.median(rates))
    assert (found["edges"][0], found["edges"][-1]) == (-3.0, 0.0)  # one firing in 970 tokens; every token
    assert np.diff(found["edges"]) == pytest.approx(0.25)


def test_latents_that_fire_always_once_or_never_have_their_places_in_the_histogram():
    # Latent 7 always fires, its bias sees to that; latent 3 only where the first coordinate is large.
    w_enc = jnp.zeros((12, 40)).at[0, 3].set(1.0)
    weights = w_enc, jnp.zeros(40).at[7].set(1.0), SAE.params.w_dec, jnp.zeros(12)
    x = np.zeros((10_000, 12), np.float32)
    x[17, 0] = 5
    found = density(update(init_quality(CONFIG), Sae(SaeParams(*weights), CONFIG), x))
    assert (found["latents"][0], found["latents"][-1], found["never"]) == (1, 1, 38)
    assert (found["edges"][0], found["median"]) == (-4.0, -2.0)
    with pytest.raises(ValueError, match="no token counted"):
        density(init_quality(CONFIG))


def test_counts_of_firings_do_not_stall_where_float32_would():
    one = update(init_quality(CONFIG), SAE, residuals(1))
    many = one._replace(counts=one.counts._replace(high=jnp.full(40, 2.0**24)))
    for _ in range(3):
        many = merge_quality(many, one)
    total = np.asarray(many.counts.high, np.float64) + np.asarray(many.counts.low)
    np.testing.assert_array_equal(total, 2.0**24 + 3 * np.asarray(one.counts.high, np.float64))


def test_what_was_measured_of_a_batch_is_its_code_and_reconstruction():
    x = residuals(20)
    _, seen = measure(init_quality(CONFIG), SAE, x, np.arange(20) % 2 == 0, sink_threshold=3.5)
    np.testing.assert_array_equal(seen.keep, (np.arange(20) % 2 == 0) & (np.linalg.norm(x, axis=1) <= 3.5))
    kept = np.asarray(seen.keep)
    np.testing.assert_allclose(seen.x_hat[kept], decode(SAE, encode(SAE, x))[kept], rtol=1e-6)
