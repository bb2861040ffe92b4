"""The benchmark of statistics times two things that see the same tokens."""

from qscope_jax.benchmarks.statistics import bench_statistics


def test_statistics_are_compared_with_extraction_of_the_same_texts():
    found = bench_statistics(rounds=5, documents=4)
    assert found["tokens"] > 100
    assert found["ratio"] > 0
    assert found["contexts"] == 8
