"""How sites are written, and the order in which they act."""

from __future__ import annotations

import pytest

from steer_bake.errors import RecipeError
from steer_bake.sites import Site, parse_site, parse_sites


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("resid_post.3", [3]),
        ("resid_post.-1", [11]),
        ("resid_post.2-4", [2, 3, 4]),
        ("resid_post.7,2-3", [2, 3, 7]),
        ("resid_post", list(range(12))),
        (["resid_post.5", "resid_post.1", "resid_post.5"], [1, 5]),
    ],
)
def test_sites_are_read(text: str | list[str], layers: list[int]) -> None:
    assert parse_sites(text, 12) == [Site("resid_post", layer) for layer in layers]


@pytest.mark.parametrize("text", ["writes", "writers", "resid_mid.3", "attn_out.0"])
def test_a_site_is_written_as_it_is_read(text: str) -> None:
    assert str(parse_site(text, 12)) == text
    assert Site.named(text) == parse_site(text, 12)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("resid_pots.3", "did you mean 'resid_post'"),
        ("resid_post.12", "layers 0 to 11"),
        ("resid_post.-13", "layers 0 to 11"),
        ("resid_post.5-3", "backwards"),
        ("resid_post.x", "not a layer"),
        ("writes.3", "takes no layer"),
        ([], "no site"),
    ],
)
def test_a_wrong_site_gets_a_sentence(text: str | list[str], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        parse_sites(text, 12)


def test_one_site_is_asked_for_where_one_is_needed() -> None:
    with pytest.raises(RecipeError, match="2 sites"):
        parse_site("resid_post.1-2", 12)


def test_sites_sort_in_forward_order() -> None:
    forward = ["writes", "resid_pre.1", "attn_out.1", "resid_mid.1", "mlp_out.1", "resid_post.1", "resid_pre.2"]
    assert [str(site) for site in parse_sites(forward[::-1], 4)] == forward
