"""The table of released sets and the language of their names."""

import pytest

from qscope_jax.sae.release import RELEASED, SetName, parse_name


def test_the_table_is_that_of_the_report():
    assert len(RELEASED) == 14
    assert len({row.name for row in RELEASED}) == 14
    assert {row.backbone for row in RELEASED if row.kind == "instruct"} == {"Qwen3.5-27B"}
    assert {row.d_sae for row in RELEASED} == {32768, 65536, 81920, 131072}
    assert {row.expansion for row in RELEASED} == {16, 64}
    assert sum(row.layers for row in RELEASED) == 544
    assert {row.k for row in RELEASED if row.mixture_of_experts and row.expansion == 64} == {100}


def test_sizes_are_those_of_the_files():
    sizes = {row.name: row for row in RELEASED}
    small = sizes["SAE-Res-Qwen3-1.7B-Base-W32K-L0_50"]
    assert small.layer_bytes == 4 * (2 * 2048 * 32768 + 2048 + 32768)
    assert round(small.layer_bytes / 1e6) == 537
    assert round(sizes["SAE-Res-Qwen3.5-27B-W80K-L0_50"].repo_bytes / 1e9, 1) == 214.8


@pytest.mark.parametrize("row", RELEASED, ids=lambda row: row.name)
def test_every_released_name_leads_back_to_its_row(row):
    name = parse_name(f"https://hub/{row.repo}/tree/main")
    assert name == SetName(row.name, row.backbone, row.d_sae, row.k)
    assert name.released is row


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("SAE-Res-Qwen3-Tiny-W768-L0_8", ("Qwen3-Tiny", 768, 8)),
        ("models--Qwen--SAE-Res-Qwen3-8B-Base-W64K-L0_100", ("Qwen3-8B-Base", 65536, 100)),
        ("SAE-Res-Qwen3___5-2B-Base-W32K-L0_50", ("Qwen3.5-2B-Base", 32768, 50)),
        ("SAE-Res-Qwen3-1.7B-Base-W32K-L0_50-bf16", ("Qwen3-1.7B-Base", 32768, 50)),
    ],
)
def test_names_like_the_releases_are_read(text, expected):
    name = parse_name(text)
    assert name is not None
    assert name[1:] == expected


@pytest.mark.parametrize(
    "text", ["", "Qwen3-1.7B-Base", "SAE-Res-Qwen3-W32K", "SAE-Res--W32K-L0_50", "SAE-Res-X-W32M-L0_5"]
)
def test_other_names_say_nothing(text):
    assert parse_name(text) is None


def test_a_name_of_our_own_is_no_released_set():
    name = parse_name("SAE-Res-Qwen3-1.7B-Base-W768-L0_50")
    assert name is not None
    assert name.released is None
