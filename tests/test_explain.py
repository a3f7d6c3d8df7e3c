"""results/explain.py draws what attention.Packing and pcgrad.py compute."""
import tempfile
from pathlib import Path
from unittest import mock

import torch
from matplotlib.patches import Rectangle
from matplotlib.text import Annotation

from pcgrad import pcgrad
from results import explain
from tests.helpers import PROJECT, quietly, workspace


def picture():
    """(what the script prints, the bytes that it writes)"""
    path = Path(tempfile.mkdtemp(dir=workspace())) / "explain.png"
    status, printed = quietly(explain.main, "--out", path)
    assert status == 0, printed
    return printed, path.read_bytes()


def test_the_script_draws_the_same_picture_each_time():
    printed, png = picture()
    assert png.startswith(b"\x89PNG") and len(png) > 10_000
    assert picture() == (printed, png)
    for line in ("padded batch: 48 cells, 27 real tokens",
                 "packed: 27 tokens by length, lettered by row",
                 "plain sum: g₁ · g₂ = −3.33, a conflict", "PCGrad: g₁′ · g₂ = 0, g₂′ · g₁ = 0"):
        assert line in printed, printed
    assert (PROJECT / "results" / "explain.png").stat().st_size < 200_000


def test_the_packed_sequences_are_the_sentences_in_order_of_length():
    padded, sequences, packing = explain.pack_batch(explain.SENTENCES)
    words = [sentence.split() for sentence in explain.SENTENCES]
    assert [[word for word in row if word] for row in padded] == words
    assert {len(row) for row in padded} == {max(map(len, words))}

    # sequences of one length stay in their order in the batch
    order = sorted(range(len(words)), key=lambda row: len(words[row]))
    assert sequences == [[(row, word) for word in words[row]] for row in order]
    drawn = [len(sequence) for sequence in sequences]
    grouped = [length for n, length in packing.groups for _ in range(n)]
    assert drawn + [1] * packing.fill == grouped


def test_the_arrows_are_pcgrads_and_their_labels_hold():
    v = explain.project(explain.J)
    for own, other in (("g1", "g2"), ("g2", "g1")):
        assert v[own] @ v[other] < 0
        # orthogonal to the other gradient, and what was taken away is parallel to it
        assert abs(v[f"{own}'"] @ v[other]) < 1e-12
        removed = v[own] - v[f"{own}'"]
        assert abs(removed[0] * v[other][1] - removed[1] * v[other][0]) < 1e-12
    torch.testing.assert_close(v["g1'"] + v["g2'"], v["update"])
    torch.testing.assert_close(v["update"], pcgrad(explain.J, seed=1))
    torch.testing.assert_close(v["sum"], v["g1"] + v["g2"])

    # "loss 2 rises", "both losses fall"
    assert v["sum"] @ v["g2"] < 0
    assert v["update"] @ v["g1"] > 0 and v["update"] @ v["g2"] > 0


def test_every_token_is_drawn_and_every_arrow_ends_where_its_vector_does():
    with mock.patch.object(explain, "save_figure") as save:
        quietly(explain.main)
    axes, = save.call_args.args[0].axes
    cells = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    assert len(cells) == 48 + 27 + 27  # padded, in a line, in groups

    v, units = explain.project(explain.J), torch.tensor([explain.SCALE, -explain.SCALE])
    arrows = [text for text in axes.texts if isinstance(text, Annotation)]
    names = ["g1", "g2", "sum", "g1", "g2", "g1'", "g2'", "update"]
    assert len(arrows) == len(names)
    for arrow, name in zip(arrows, names):
        drawn = torch.tensor(arrow.xy, dtype=torch.float64) - torch.tensor(arrow.xyann)
        torch.testing.assert_close(drawn, v[name] * units)
