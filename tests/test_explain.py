"""results/explain.py: the picture at the head of the README shows what the code computes."""
import tempfile
from pathlib import Path

import torch

from attention import Packing
from results import explain
from tests.helpers import quietly, workspace


def test_the_picture_is_written():
    path = Path(tempfile.mkdtemp(dir=workspace())) / "explain.png"
    status, printed = quietly(explain.main, "--out", path)
    assert status == 0, printed
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 50_000


def test_the_packed_words_are_those_of_the_batch_in_groups_of_one_length():
    padded, packed, packing = explain.pack_batch(explain.SENTENCES)
    words = [len(sentence.split()) for sentence in explain.SENTENCES]
    assert isinstance(packing, Packing) and len(packed) == sum(words)
    assert len({len(row) for row in padded}) == 1 and len(padded[0]) == max(words)

    # sequence after sequence, from short to long, each with its own words
    rows = list(dict.fromkeys(row for row, _ in packed))
    assert [words[row] for row in rows] == sorted(words)
    for row in rows:
        assert [word for other, word in packed if other == row] == explain.SENTENCES[row].split()
    groups = packing.groups[:-1] if packing.fill else packing.groups
    assert groups == [(words.count(length), length) for length in sorted(set(words))]


def test_the_arrows_are_two_conflicting_gradients_and_what_pcgrad_makes_of_them():
    vectors = explain.project(explain.J)
    g1, g2 = vectors["g1"], vectors["g2"]
    assert g1 @ g2 < 0
    assert abs(vectors["g1'"] @ g2) < 1e-12 and abs(vectors["g2'"] @ g1) < 1e-12
    assert torch.allclose(vectors["update"], vectors["g1'"] + vectors["g2'"])
    assert torch.equal(vectors["sum"], g1 + g2)
    # the update lowers both losses; the plain sum does not
    assert min(vectors["update"] @ g1, vectors["update"] @ g2) > 0 > vectors["sum"] @ g2
