"""Adam with a clipped gradient, unit-norm decoder rows and a schedule: equal to torch's Adam with these by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.sae.loss import Weights
from qscope_jax.training import optimizer
from qscope_jax.training.optimizer import Schedule, apply_gradients, default_rate, init_adam

D, F, STEPS, CLIP = 8, 12, 5, 1.0
RATES = (1e-2, 3e-2, 2e-2, 1e-2, 5e-3)


@partial(jax.jit, static_argnames="clip")
def step(weights, gradients, adam, rate, *, clip):
    """Of one SAE, which is the second of three side by side."""
    stacks = jax.tree.map(lambda a: jnp.stack([jnp.zeros_like(a), jnp.asarray(a), jnp.ones_like(a)]), (weights, adam))
    found = apply_gradients(*stacks, 1, gradients, rate, clip=clip, sound=jnp.array(True))
    return *jax.tree.map(lambda a: a[1], (found.weights, found.adam)), found.norm


def draw():
    """Weights, and gradients of some steps: latent 2 has one in the first step alone, latent 3 never."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    w_dec = normal(F, D)
    w_dec /= np.linalg.norm(w_dec, axis=1, keepdims=True)
    gradients = [
        Weights(*(size * normal(*s) for s in ((F, D), (F,), (F, D), (D,)))) for size in (3, 1e-3, 100, 0.05, 1)
    ]
    for number, gradient in enumerate(gradients):
        for leaf in gradient[:3]:
            leaf[3] = 0
            leaf[2] *= number == 0
    return Weights(w_dec.copy(), normal(F), w_dec, normal(D)), gradients


def trained(weights, gradients):
    """All steps of the library: weights, moments and norms after each."""
    adam, seen = init_adam(weights), []
    for gradient, rate in zip(gradients, RATES, strict=True):
        weights, adam, norm = step(weights, gradient, adam, jnp.float32(rate), clip=CLIP)
        seen.append((weights, adam, norm))
    return seen


def projected(gradient, w_dec):
    along = (gradient.w_dec.astype(np.float64) * w_dec).sum(axis=1, keepdims=True)
    return gradient._replace(w_dec=gradient.w_dec - along * w_dec)


@pytest.mark.parity
def test_several_steps_equal_those_of_torch():
    torch = pytest.importorskip("torch")
    weights, gradients = draw()
    leaves = Weights(*(torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in weights))
    adam = torch.optim.Adam(leaves, betas=(0.9, 0.999), eps=6.25e-10)
    for gradient, rate, (found, _, norm) in zip(gradients, RATES, trained(weights, gradients), strict=True):
        for leaf, part in zip(leaves, projected(gradient, leaves.w_dec.detach().numpy()), strict=True):
            leaf.grad = torch.tensor(part, dtype=torch.float64)
        np.testing.assert_allclose(norm, torch.nn.utils.clip_grad_norm_(leaves, CLIP).item(), rtol=1e-6)
        adam.param_groups[0]["lr"] = rate
        adam.step()
        with torch.no_grad():
            leaves.w_dec.div_(leaves.w_dec.norm(dim=1, keepdim=True))
        for name, leaf in leaves._asdict().items():  # torch divides by the norm + 1e-6
            np.testing.assert_allclose(getattr(found, name), leaf.detach(), rtol=0, atol=2e-6, err_msg=name)


def test_several_steps_equal_the_formulas_in_float64():
    weights, gradients = draw()
    seen = trained(weights, gradients)
    weights = Weights(*(a.astype(np.float64) for a in weights))
    mean, square = (Weights(*(np.zeros(a.shape) for a in weights)) for _ in range(2))
    for number, (gradient, rate, (found, adam, norm)) in enumerate(zip(gradients, RATES, seen, strict=True), start=1):
        g = projected(gradient, weights.w_dec)
        length = np.sqrt(sum((part**2).sum() for part in g))
        g = Weights(*(part * min(1, CLIP / length) for part in g))
        mean = Weights(*(0.9 * m + 0.1 * part for m, part in zip(mean, g, strict=True)))
        square = Weights(*(0.999 * v + 0.001 * part**2 for v, part in zip(square, g, strict=True)))
        weights = Weights(*(
            w - rate * (m / (1 - 0.9**number)) / (np.sqrt(v / (1 - 0.999**number)) + 6.25e-10)
            for w, m, v in zip(weights, mean, square, strict=True)
        ))  # fmt: skip
        weights = weights._replace(w_dec=weights.w_dec / np.linalg.norm(weights.w_dec, axis=1, keepdims=True))
        np.testing.assert_allclose(norm, length, rtol=1e-6)
        for name, expected in weights._asdict().items():
            np.testing.assert_allclose(getattr(found, name), expected, rtol=0, atol=2e-6, err_msg=name)
            for kept, by_hand in ((adam.mu, mean), (adam.nu, square)):
                by_hand = getattr(by_hand, name)
                atol = 1e-5 * np.abs(by_hand).max()
                np.testing.assert_allclose(getattr(kept, name), by_hand, rtol=1e-5, atol=atol, err_msg=name)


def test_decoder_rows_stay_unit_and_gradients_along_them_do_nothing():
    weights, gradients = draw()
    for moved, _, _ in trained(weights, gradients):
        np.testing.assert_allclose(np.linalg.norm(moved.w_dec, axis=1), 1, rtol=1e-6)
    alone = Weights(*(np.zeros_like(a) for a in weights))._replace(w_dec=1000 * weights.w_dec)
    _, _, norm = step(weights, alone, init_adam(weights), jnp.float32(1e-2), clip=CLIP)
    assert norm < 1e-2  # float32's share of 1000 sqrt(12)
    _, both, _ = step(weights, gradients[0], init_adam(weights), jnp.float32(1e-2), clip=CLIP)
    with_more = gradients[0]._replace(w_dec=gradients[0].w_dec + 5 * weights.w_dec)
    _, more, _ = step(weights, with_more, init_adam(weights), jnp.float32(1e-2), clip=CLIP)
    np.testing.assert_allclose(more.mu.w_dec, both.mu.w_dec, rtol=0, atol=1e-6)
    np.testing.assert_allclose(np.sum(both.mu.w_dec * weights.w_dec, axis=1), 0, atol=1e-6)


def test_moments_of_silent_latents_decay_and_move_them_still():
    weights, gradients = draw()
    first, *later = trained(weights, gradients)
    before = first
    for after in later:
        np.testing.assert_allclose(after[1].mu.w_enc[2], 0.9 * before[1].mu.w_enc[2], rtol=1e-6)
        np.testing.assert_allclose(after[1].nu.w_enc[2], 0.999 * before[1].nu.w_enc[2], rtol=1e-6)
        assert np.all(after[0].w_enc[2] != before[0].w_enc[2])
        before = after
    last = later[-1]
    np.testing.assert_array_equal(last[0].w_enc[3], weights.w_enc[3])  # never had a gradient
    np.testing.assert_array_equal(last[1].nu.w_enc[3], 0)


def test_a_spike_is_cut_to_the_clip_and_a_small_gradient_left_alone():
    weights, gradients = draw()
    for size, expected in ((1e6, CLIP), (1e-6, None)):
        gradient = jax.tree.map(lambda a, size=size: np.float32(size) * a, gradients[0])
        _, adam, norm = step(weights, gradient, init_adam(weights), jnp.float32(1e-2), clip=CLIP)
        taken = np.sqrt(sum(np.square(10 * np.asarray(m, np.float64)).sum() for m in adam.mu))
        np.testing.assert_allclose(taken, norm if expected is None else expected, rtol=1e-5)


@pytest.mark.parametrize("numbers", [5 * D, 1])  # blocks of five rows and a rest of two, or of one row
def test_an_sae_moves_in_blocks_and_in_its_place_alone(monkeypatch, numbers):
    weights, gradients = draw()
    expected = step(weights, gradients[0], init_adam(weights), jnp.float32(1e-2), clip=CLIP)
    monkeypatch.setattr(optimizer, "_CACHED", numbers)
    stacks = jax.tree.map(lambda a: jnp.stack([a + 1, a, a + 2]), (weights, init_adam(weights)))
    for sound in (True, False):
        found = jax.jit(apply_gradients, static_argnames="clip")(
            *stacks, 1, gradients[0], jnp.float32(1e-2), clip=CLIP, sound=jnp.array(sound)
        )
        assert found.taken == sound
        for ours, before, after in zip(
            *map(jax.tree.leaves, ((found.weights, found.adam), stacks, expected[:2])), strict=True
        ):
            np.testing.assert_array_equal(ours[::2], before[::2])
            np.testing.assert_allclose(ours[1], after if sound else before[1], rtol=1e-5, atol=1e-7)


def test_the_rate_rises_stays_and_falls():
    schedule = Schedule(2e-3, 100, warmup=10, decay=0.2)
    at = {0: 0.1, 4: 0.5, 9: 1, 10: 1, 79: 1, 80: 1, 81: 0.95, 90: 0.5, 99: 0.05, 100: 0, 120: 0}
    for number, share in at.items():
        np.testing.assert_allclose(schedule(jnp.int32(number)), 2e-3 * share, rtol=1e-6)
    flat = Schedule(1.0, 3, decay=0)
    assert [float(flat(jnp.int32(number))) for number in range(4)] == [1, 1, 1, 0]
    assert default_rate(2**14) == 2e-4
    assert default_rate(2**16) == 1e-4


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"peak": 0.0}, "learning rate of 0.0"),
        ({"peak": float("nan")}, "learning rate of nan"),
        ({"steps": 0}, "0 steps"),
        ({"warmup": -1}, "-1 of warmup"),
        ({"decay": 1.5}, "share of 1.5"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(wrong, told):
    with pytest.raises(ValueError, match=told):
        Schedule(**{"peak": 1e-3, "steps": 10, **wrong})
