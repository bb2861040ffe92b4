"""Losses and gradients of one SAE equal dense ones of the same formulas, by torch and by JAX, and on every mesh."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from qscope_jax.mesh import make_mesh
from qscope_jax.sae.loss import Axes, Learned, Objective, Weights, judge, sae_gradients

D, F, N = 16, 64, 24
AUX = {"aux_k": 3, "aux_weight": 0.5, "dead_after": 100}
OBJECTIVES = {
    "token": Objective(F, 4, **AUX),
    "matryoshka": Objective(F, 6, prefixes=(8, 24), **AUX),
    "all at once": Objective(F, 3, "batch", prefixes=(16,), **AUX),
    "k=1": Objective(F, 1),
    "k=f": Objective(F, F, prefixes=(7,)),
}
FEW_DEAD, MORE_THAN_AUX_K, MORE_THAN_POOL, ALL_DEAD = 2, 8, 30, F
CASES = [(name, dead) for name in ("token", "all at once") for dead in (0, FEW_DEAD, MORE_THAN_AUX_K, MORE_THAN_POOL)]
CASES += [("token", ALL_DEAD), ("matryoshka", FEW_DEAD), ("k=1", 0), ("k=f", 0)]
learn = jax.jit(sae_gradients, static_argnums=4)


def draw(seed=0):
    """Weights of an SAE that has learned a little, and a batch of which a third does not count."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    w_dec = normal(F, D)
    w_dec /= np.linalg.norm(w_dec, axis=1, keepdims=True)
    weights = Weights(w_dec + 0.1 * normal(F, D), 0.1 * normal(F), w_dec, 0.3 * normal(D))
    return weights, normal(N, D), rng.random(N) < 2 / 3


def idle_for(dead, seed=1):
    """Idle counters of which `dead` are beyond the limit, with ties; the limit itself is not beyond it."""
    rng = np.random.default_rng(seed)
    idle = rng.integers(0, 101, F).astype(np.int32)
    idle[0] = 100
    idle[rng.permutation(np.arange(1, F) if dead < F else F)[:dead]] = rng.integers(101, 120, dead)
    return idle


def pool_of(idle, objective):
    """The documented rule: AuxK looks at the 4 aux_k dead latents that are idle for longest, ties to the lowest."""
    order = sorted(range(F), key=lambda latent: (-idle[latent], latent))
    return [latent for latent in order if idle[latent] > objective.dead_after][: 4 * objective.aux_k]


def chosen_codes(pre, keep, objective):
    """[n, f] bool in NumPy: which latents may fire, ties to the lowest index (of the batch: all that tie)."""
    pre, k = np.asarray(pre, np.float64), objective.k
    ranks = np.argsort(np.argsort(-pre, axis=1, kind="stable"), axis=1, kind="stable")
    if objective.selection == "token":
        return (ranks < k) & keep[:, None]
    candidates = np.where((ranks < 4 * k) & keep[:, None], np.maximum(pre, 0), 0)
    return (candidates > 0) & (candidates >= np.sort(candidates, axis=None)[-k * keep.sum()])


def dense_by_jax(weights, idle, x, keep, objective):
    """Loss, its parts, gradients and who fired, from formulas over dense codes and `jax.grad`."""
    x, count = x[keep], [0, *objective.prefixes, F]
    matmul = partial(jnp.matmul, precision="highest")
    active = chosen_codes(matmul(x, weights.w_enc.T) + weights.b_enc, np.ones(len(x), bool), objective)
    pool = pool_of(idle, objective) if objective.aux_k else []

    def of_weights(w, held_error=None):
        pre = matmul(x, w.w_enc.T) + w.b_enc
        codes = jnp.where(active, jax.nn.relu(pre), 0)
        errors = [x - w.b_dec - matmul(codes[:, :end], w.w_dec[:end]) for end in count[1:]]
        shares = [(error**2).sum() / (x**2).sum() for error in errors]
        loss, aux = sum(shares) / len(shares), 0.0
        if pool and held_error is not None:
            dead = pre[:, np.array(pool)]
            kth = jnp.sort(dead, axis=1)[:, -min(objective.aux_k, len(pool))][:, None]
            e_hat = matmul(jnp.where(dead >= kth, jax.nn.relu(dead), 0), w.w_dec[np.array(pool)])
            aux = ((held_error - e_hat) ** 2).sum() / (held_error**2).sum()
        return loss + objective.aux_weight * aux, (shares[-1], aux, errors[-1], codes)

    _, (*_, error, _) = of_weights(weights)
    (loss, (fvu, aux, _, codes)), gradients = jax.value_and_grad(of_weights, has_aux=True)(weights, error)
    return gradients, np.asarray(codes > 0).any(axis=0), {"loss": loss, "fvu": fvu, "aux": aux}


def dense_by_torch(weights, idle, x, keep, objective):
    """The same in float64 by torch's autograd, written from the papers' formulas alone."""
    torch = pytest.importorskip("torch")
    w_enc, b_enc, w_dec, b_dec = leaves = [torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in weights]
    x, kept = torch.tensor(x, dtype=torch.float64), torch.tensor(keep)
    pre = torch.nn.functional.linear(x, w_enc, b_enc)
    allowed = torch.tensor(chosen_codes(pre.detach().numpy(), keep, objective))
    z = pre.clamp(min=0) * allowed
    total = x[kept].square().sum()
    losses = []
    for width in (*objective.prefixes, F):
        e = (x - torch.nn.functional.linear(z[:, :width], w_dec[:width].T, b_dec))[kept]
        losses.append(e.square().sum() / total)
    loss, aux = torch.stack(losses).mean(), torch.zeros((), dtype=torch.float64)
    if objective.aux_k and (pool := pool_of(idle, objective)):
        mine = pre[kept][:, pool]
        values, places = mine.topk(min(objective.aux_k, len(pool)), dim=1)
        sparse = torch.zeros_like(mine).scatter(1, places, values.relu())
        aux = (e.detach() - sparse @ w_dec[pool]).square().sum() / e.detach().square().sum()
    (loss + objective.aux_weight * aux).backward()
    gradients = Weights(*(leaf.grad.numpy() for leaf in leaves))
    found = {"loss": loss + objective.aux_weight * aux, "fvu": losses[-1], "aux": aux}
    return gradients, (z > 0).any(dim=0).numpy(), {name: value.item() for name, value in found.items()}


def assert_learned(found, gradients, fired, numbers, *, rtol=1e-5):
    """Gradients to float32 rounding of their largest entry."""
    for name, value in gradients._asdict().items():
        value = np.asarray(value)
        atol = rtol * np.abs(value).max()
        np.testing.assert_allclose(getattr(found.gradients, name), value, rtol=0, atol=atol, err_msg=name)
    np.testing.assert_array_equal(found.fired, fired)
    for name, value in numbers.items():
        np.testing.assert_allclose(getattr(found.report, name), value, rtol=rtol, err_msg=name)


WITHOUT_TORCH = [("token", FEW_DEAD), ("all at once", MORE_THAN_POOL), ("matryoshka", MORE_THAN_AUX_K), ("k=f", 0)]


def check_against(reference, name, dead):
    objective, idle, (weights, x, keep) = OBJECTIVES[name], idle_for(dead), draw()
    found = learn(weights, idle, x, keep, objective)
    gradients, fired, numbers = reference(weights, idle, x, keep, objective)
    assert_learned(found, gradients, fired, numbers)
    assert (found.report.aux > 0) == (dead > 0)
    assert found.report.tokens == keep.sum()
    if objective.selection == "batch":
        assert round(float(found.report.l0 * keep.sum())) == objective.k * keep.sum()
    if objective.aux_k:
        assert found.report.dead == dead / F
    if dead == ALL_DEAD:  # they are taught all the same
        assert np.abs(np.asarray(gradients.w_dec)[~fired]).max() > 0


@pytest.mark.parity
@pytest.mark.parametrize(("name", "dead"), CASES)
def test_loss_and_gradients_equal_those_of_torch(name, dead):
    check_against(dense_by_torch, name, dead)


@pytest.mark.parametrize(("name", "dead"), WITHOUT_TORCH)
def test_loss_and_gradients_equal_dense_formulas(name, dead):
    check_against(dense_by_jax, name, dead)


@pytest.mark.parametrize("name", ["token", "all at once"])
def test_what_does_not_count_never_matters(name):
    idle, (weights, x, keep) = idle_for(MORE_THAN_AUX_K), draw()
    hostile = np.where(keep[:, None], x, np.resize([np.nan, np.inf, -np.inf, 3e38], x.shape)).astype(np.float32)
    expected, found = (learn(weights, idle, each, keep, OBJECTIVES[name]) for each in (x, hostile))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_batch_without_tokens_teaches_nothing():
    weights, x, keep = draw()
    found = learn(weights, idle_for(FEW_DEAD), x, np.zeros_like(keep), OBJECTIVES["all at once"])
    assert not any(np.any(leaf) for leaf in (*found.gradients, found.fired))
    assert found.report == (0, 0, 0, 0, np.float32(FEW_DEAD / F), 0)


@pytest.mark.parametrize("name", ["token", "batch"])
def test_ties_go_to_the_lowest_latents_and_zeros_do_not_fire(name):
    """Whole numbers, of which float32 makes no rounding errors: latents come in eights of equal ones."""
    rng = np.random.default_rng(3)
    few = rng.integers(-1, 2, (F // 8, D)).astype(np.float32)
    w_enc, w_dec = np.repeat(few, 8, axis=0), rng.integers(-1, 2, (F, D)).astype(np.float32)
    weights = Weights(w_enc, np.zeros(F, np.float32), w_dec, np.zeros(D, np.float32))
    x = rng.integers(-2, 3, (N, D)).astype(np.float32)
    x[0], x[1] = 0, -10 * few.sum(axis=0)  # nothing fires, few do
    objective, keep = Objective(F, 3, "batch" if name == "batch" else "token"), np.ones(N, bool)
    found = learn(weights, np.zeros(F, np.int32), x, keep, objective)
    assert_learned(found, *dense_by_jax(weights, None, x, keep, objective))
    if name == "token":
        assert not np.any(np.asarray(found.fired).reshape(-1, 8)[:, 3:])


def test_reconstruction_without_learning_is_the_same():
    (weights, x, keep), idle, objective = draw(), idle_for(FEW_DEAD), OBJECTIVES["token"]
    learned = learn(weights, idle, x, keep, objective).report
    looked = jax.jit(judge, static_argnums=4)(weights, idle, x, keep, objective)
    np.testing.assert_allclose(looked, learned._replace(loss=learned.fvu, aux=np.float32(0)), rtol=1e-6)


def test_products_of_bfloat16_are_those_of_rounded_arrays():
    """Their sums are float32; only gradients are rounded, to the 8 bits of bfloat16."""
    idle, (weights, x, keep) = idle_for(MORE_THAN_AUX_K), draw()
    rounded = lambda a: np.asarray(jnp.asarray(a, jnp.bfloat16), np.float32)  # noqa: E731
    exact = weights._replace(w_enc=rounded(weights.w_enc), b_enc=rounded(weights.b_enc), w_dec=rounded(weights.w_dec))
    x = rounded(x)
    fast = Objective(F, 4, **AUX, dtype=jnp.bfloat16, contract="fast")
    found, expected = learn(exact, idle, x, keep, fast), learn(exact, idle, x, keep, OBJECTIVES["token"])
    np.testing.assert_array_equal(found.fired, expected.fired)
    np.testing.assert_allclose(found.report.fvu, expected.report.fvu, rtol=1e-5)
    for name, value in expected.gradients._asdict().items():
        atol = 2.0**-7 * np.abs(value).max()
        np.testing.assert_allclose(getattr(found.gradients, name), value, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("token", (8, 1)), ("all at once", (2, 4)), pytest.param("matryoshka", (1, 8), marks=pytest.mark.slow)],
)
def test_a_mesh_changes_nothing(name, shape):
    """To float32 rounding: sums over tokens, and over latents, are taken in another order."""
    objective, idle, (weights, x, keep) = OBJECTIVES[name], idle_for(MORE_THAN_AUX_K), draw()
    of_weights = Weights(*(PartitionSpec("model"),) * 3, PartitionSpec())
    spread = jax.shard_map(
        partial(sae_gradients, objective=objective, axes=Axes("data", "model")),
        mesh=make_mesh(*shape),
        in_specs=(of_weights, PartitionSpec("model"), PartitionSpec("data"), PartitionSpec("data")),
        out_specs=Learned(of_weights, PartitionSpec("model"), PartitionSpec()),
    )
    found, alone = jax.jit(spread)(weights, idle, x, keep), learn(weights, idle, x, keep, objective)
    assert_learned(found, alone.gradients, alone.fired, alone.report._asdict(), rtol=2e-6)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"k": 0}, "k = 0"),
        ({"k": F + 1}, "k = 65"),
        ({"prefixes": (24, 8)}, "ascending"),
        ({"prefixes": (F,)}, "ascending"),
        ({"aux_k": F + 1}, "aux_k = 65"),
        ({"dead_after": 0}, "dead_after = 0"),
        ({"aux_weight": float("nan")}, "aux_weight = nan"),
    ],
)
def test_objectives_that_make_no_sense_are_refused(wrong, told):
    with pytest.raises(ValueError, match=told):
        Objective(**{"d_sae": F, "k": 2, **wrong})
