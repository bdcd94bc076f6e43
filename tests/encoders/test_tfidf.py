from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nc_audit.encoders.tfidf import DIMS, Tfidf

PLACES = ["airport", "beach", "bridge", "forest", "harbor", "stadium", "river", "farmland"]
COLOURS = ["green", "grey", "blue", "white"]
CAPTIONS = sorted(
    f"{a} {c} {p} beside {q}" for a in ("a", "the") for c in COLOURS for p in PLACES for q in PLACES if p != q
)


def test_unit_vectors_that_tell_captions_apart():
    encoder = Tfidf(0).fit(CAPTIONS, "set")
    vectors = encoder.encode(CAPTIONS)
    assert vectors.shape == (len(CAPTIONS), encoder.dim)
    assert vectors.dtype == torch.float32
    assert encoder.dim <= DIMS
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(CAPTIONS)))
    same, related, other = encoder.encode(
        ["the green forest beside river", "the green forests beside rivers", "a white stadium beside harbor"]
    )
    assert same @ related > same @ other + 0.2


def test_the_same_set_gives_the_same_bits_and_the_seed_counts_in_the_digest():
    one, two = Tfidf(0).fit(CAPTIONS, "set"), Tfidf(0).fit(CAPTIONS, "set")
    assert torch.equal(one.encode(CAPTIONS), two.encode(CAPTIONS))
    assert one.digest == two.digest == Tfidf(0).digest_for("set")
    assert len({one.digest, Tfidf(1).digest_for("set"), Tfidf(0).digest_for("another set")}) == 3


def test_a_caption_is_encoded_alike_alone_and_among_others():
    encoder = Tfidf(0).fit(CAPTIONS, "set")
    together = encoder.encode(CAPTIONS[:50])
    alone = torch.cat([encoder.encode([caption]) for caption in CAPTIONS[:50]])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)


def test_scripts_without_spaces_are_carried_by_characters():
    for captions in (
        ["一座机场旁边有许多飞机", "机场里停着许多飞机", "海滩旁边是蓝色的大海", "蓝色的大海和黄色的海滩"],
        ["สนามบินมีเครื่องบินหลายลำ", "เครื่องบินจอดที่สนามบิน", "ชายหาดติดกับทะเลสีฟ้า", "ทะเลสีฟ้าและชายหาดสีเหลือง"],
    ):
        vectors = Tfidf(0).fit(captions, "set").encode(captions)
        cosines = vectors @ vectors.T
        assert cosines[0, 1] > cosines[0, 2] + 0.1
        assert cosines[2, 3] > cosines[2, 1] + 0.1


@pytest.mark.parametrize("captions", [["a"], ["!!!"], ["."], ["a", "b"], ["same word", "same words", "!"]])
def test_tiny_sets(captions):
    vectors = Tfidf(0).fit(captions, "set").encode([*captions, "never seen 未见"])
    assert vectors.shape[0] == len(captions) + 1
    assert torch.isfinite(vectors).all()


@given(st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=12, unique=True))
def test_any_captions_give_finite_vectors_of_length_one_or_zero(captions):
    vectors = Tfidf(0).fit(sorted(captions), "set").encode(captions)
    lengths = vectors.norm(dim=1)
    assert torch.isfinite(vectors).all()
    assert ((lengths - 1).abs() < 1e-4).logical_or(lengths == 0).all()


def test_nothing_is_truncated():
    encoder = Tfidf(0).fit(CAPTIONS, "set")
    assert encoder.truncated(["word " * 1000, "a"]) == [False, False]


def test_it_learns_only_when_a_caption_is_to_be_encoded_where_its_dimensions_are_known(monkeypatch):
    learnt = []
    once = Tfidf._learn
    monkeypatch.setattr(Tfidf, "_learn", lambda self, captions: learnt.append(1) or once(self, captions))
    known = Tfidf(0).fit(CAPTIONS, "set")
    assert learnt == [1]
    later = Tfidf(0).fit(CAPTIONS, "set", known.dim)
    assert (later.digest, later.dim, learnt) == (known.digest, known.dim, [1])
    assert torch.equal(later.encode(CAPTIONS), known.encode(CAPTIONS))
    assert torch.equal(later.encode(CAPTIONS[:1]), known.encode(CAPTIONS[:1]))
    assert learnt == [1, 1]
