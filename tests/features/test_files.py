"""Statistics go to files and come back; those of the embedded SAEs ship along and are really theirs."""

import hashlib

import numpy as np
import pytest

from qscope_jax.analysis.contexts import Tokens, add_contexts, init_contexts
from qscope_jax.analysis.statistics import LayerStatistics, host_tally, init_tally, summarize_tally, update_tally
from qscope_jax.features.count import init_counted
from qscope_jax.features.files import load_statistics, put_aside, save_statistics, statistics_path, take_up
from qscope_jax.files.recognise import FormatError
from qscope_jax.files.source import SourceNotFoundError, resolve
from qscope_jax.files.tensors import open_tensors, write_tensors
from qscope_jax.sae.formats import load_saes, open_sae


@pytest.fixture(scope="module")
def statistics():
    rng = np.random.default_rng(0)
    values, indices = rng.lognormal(0, 1, (500, 3)), np.argsort(rng.random((500, 20)), axis=1)[:, :3]
    tally = update_tally(
        init_tally(20), values.astype(np.float32), indices, np.ones(500, bool), rng.lognormal(3, 0.2, 500)
    )
    return summarize_tally(host_tally(tally), sink_threshold=90.5, sae="f00d")


def equal(a: LayerStatistics, b: LayerStatistics):
    for name in LayerStatistics._fields:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


def test_what_is_saved_is_loaded(statistics, tmp_path):
    save_statistics(tmp_path, {3: statistics, 0: statistics})
    found = load_statistics(tmp_path)
    assert list(found) == [0, 3]
    equal(found[3], statistics)
    np.testing.assert_array_equal(found[0].quantile(0.123), statistics.quantile(0.123))
    assert list(load_statistics(str(tmp_path), [3])) == [3]
    assert list(load_statistics(statistics_path(tmp_path, 3))) == [3]


def test_without_histograms_a_layer_takes_six_numbers_a_feature(statistics, tmp_path):
    (path,) = save_statistics(tmp_path, {1: statistics}, histograms=False)
    found = load_statistics(tmp_path)[1]
    equal(found, statistics._replace(histogram=None))
    assert sum(open_tensors(path).info(name).nbytes for name in open_tensors(path).names) == 20 * 6 * 4


def test_a_missing_layer_and_a_folder_of_something_else_are_named(statistics, tmp_path):
    save_statistics(tmp_path, {1: statistics})
    with pytest.raises(ValueError, match=r"no statistics of layer 7; it holds the layers \[1\]"):
        load_statistics(tmp_path, [1, 7])
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="qscope features build"):
        load_statistics(tmp_path / "other")
    with pytest.raises(SourceNotFoundError, match="Statistics are a folder"):
        load_statistics("./nowhere")


@pytest.mark.parametrize(
    ("change", "arrays", "message"),
    [
        ({"layer": "2"}, {}, "of layer 1, found qscope-statistics-1 of 2"),
        ({"median_norm": "much"}, {}, "damaged metadata"),
        ({}, {"max": np.zeros(3, np.float32)}, "finite numbers"),
        ({}, {"mean": np.full(20, np.nan, np.float32)}, "finite numbers"),
    ],
)
def test_damaged_files_are_refused(statistics, tmp_path, change, arrays, message):
    (path,) = save_statistics(tmp_path, {1: statistics})
    file = open_tensors(path)
    whole = {name: np.array(file.array(name)) for name in file.names}
    write_tensors(path, {**whole, **arrays}, {**file.metadata, **change})
    with pytest.raises(FormatError, match=message):
        load_statistics(tmp_path)


def test_what_is_put_aside_is_taken_up_to_the_bit(tmp_path):
    state = init_counted((20, 30), contexts=2)
    rng = np.random.default_rng(1)
    values, rows = rng.random((50, 4)).astype(np.float32), np.arange(50)
    indices = np.argsort(rng.random((50, 20)), axis=1)[:, :4]
    tally = update_tally(state.tallies[0], values, indices, np.ones(50, bool), np.ones(50))
    zero = np.zeros(50, np.int64)
    add_contexts(state.contexts[0], values, indices, Tokens(rows // 5, rows % 5, rows, rows, zero, zero + 50))
    state = state._replace(part=4, batches=2, tokens=999, tallies=(tally, state.tallies[1]))
    put_aside(tmp_path / "aside.safetensors", state, {"a": 1})
    found = take_up(tmp_path / "aside.safetensors", {"a": 1})
    assert (found.part, found.batches, found.tokens) == (4, 2, 999)
    for given, back in zip((*state.tallies, *state.totals), (*found.tallies, *found.totals), strict=True):
        for name in given._fields:
            np.testing.assert_array_equal(getattr(back, name), getattr(given, name), err_msg=name)
    for given, back in zip(state.contexts, found.contexts, strict=True):
        for name in given._fields:
            np.testing.assert_array_equal(getattr(back, name), getattr(given, name), err_msg=name)
        assert back.value.flags.writeable
    assert init_contexts(3, 2).value.dtype == found.contexts[0].value.dtype
    with pytest.raises(ValueError, match="other input or options"):
        take_up(tmp_path / "aside.safetensors", {"a": 2})


def test_the_shipped_statistics_are_those_of_the_shipped_saes():
    found, saes = load_statistics("demo"), load_saes("demo")
    assert list(found) == list(saes)
    for layer, one in found.items():
        assert one.sae == hashlib.sha256(open_sae("demo", layer).path.read_bytes()).hexdigest(), (
            "qscope_jax/assets/statistics belongs to other SAEs: scripts/assets/build makes it"
        )
        assert one.max.shape == (saes[layer].config.d_sae,)
        assert one.tokens > 100_000
        assert one.density.sum() == pytest.approx(saes[layer].config.k, rel=0.01)
        assert (one.max > 0).mean() > 0.95
        p50, p90, p99 = map(one.quantile, (0.5, 0.9, 0.99))
        assert ((p50 <= p90) & (p90 <= p99) & (p99 <= one.max)).all()
        assert 10 * one.median_norm == pytest.approx(one.sink_threshold, rel=0.1)


def test_the_shipped_statistics_are_small():
    source = resolve("demo", what="statistics")
    assert sum(source.fetch(name).stat().st_size for name in source.names()) < 300_000
