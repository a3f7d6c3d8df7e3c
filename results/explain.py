"""The picture at the head of the README: how padding is dropped, and what PCGrad does.

    python results/explain.py                draw results/explain.png again

Nothing in it is placed by hand: attention.Packing says where each token of the batch goes, and
pcgrad.py projects the gradients. [CLS], [SEP], word pieces and the tokens that fill T up are left
out. The arrows are gradients of the tasks' losses; a training step goes against them, so that a
loss falls where the update has a positive product with its gradient (for a small step).

Dimensions: B sequences in the batch, L tokens in the longest, T packed tokens, n sequences of one
length. The rows of J are the two gradients, here for two parameters.
"""
import math
import sys
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle, Wedge

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))
from attention import Packing  # noqa: E402
from pcgrad import gram_matrix, pcgrad, pcgrad_weights  # noqa: E402
from support.flags import Parser  # noqa: E402
from support.plots import save_figure  # noqa: E402
from support.run import exit_status  # noqa: E402

SENTENCES = ("how old are you ?", "pure joy !", "a warm , funny and very human film",
             "a cat is asleep .", "far too long", "dogs can swim")
J = torch.tensor([[3.0, -0.3], [-1.0, 1.1]], dtype=torch.float64)

# all places and sizes are in units, two pixels at save_figure's 110 dpi
WIDTH, HEIGHT = 800, 580
UNIT = 2 / 110  # inches: 2 pixels
POINT = 72 * UNIT  # points: for sizes of text and widths of lines
CELL, ROW = 42, 24
SCALE = 72  # of the gradients
INK, MUTED, PALE, PADDING, PAPER = "#1f2933", "#5f6b78", "#aab3bd", "#eceef1", "#fbfbfa"
COLOR_OF_LENGTH = {3: "#bfe3d0", 5: "#c9dbf7", 8: "#fbdcb5"}
BLUE, ORANGE, PURPLE, GREEN, GOOD = "#1f6fc4", "#d9631e", "#7a3fa8", "#13855a", "#e3f3ea"


# ---------------------------------------------------------------- what is drawn

def pack_batch(sentences):
    """The words of the padded batch, (B, L), None for padding; (row, word) of each packed token;
    and the Packing that ordered them."""
    tokens = [sentence.split() for sentence in sentences]
    L = max(map(len, tokens))
    padded = [words + [None] * (L - len(words)) for words in tokens]
    packing = Packing(torch.tensor([[word is not None for word in words] for words in padded]))
    places = [divmod(index, L) for index in packing.indices.tolist()]
    return padded, [(row, padded[row][column]) for row, column in places], packing


def project(J):
    """{name: vector} of the gradients, the projected ones, and both updates. J: (2, 2)."""
    projected = pcgrad_weights(gram_matrix(J), seed=0) @ J
    return {"g1": J[0], "g2": J[1], "g1'": projected[0], "g2'": projected[1],
            "sum": J.sum(dim=0), "update": pcgrad(J, seed=0)}


# ---------------------------------------------------------------- the batch

def write(axes, x, y, text, size=11, color=INK, **kwargs):
    axes.text(x, y, text, fontsize=size * POINT, color=color, va="baseline", **kwargs)


def draw_cell(axes, x, y, text, color, width=CELL, text_color=INK):
    axes.add_patch(Rectangle((x, y), width, ROW, facecolor=color, edgecolor=PAPER,
                             linewidth=1.2 * POINT))
    write(axes, x + width / 2, y + 15.5, text, 10, text_color, ha="center")


def draw_sequence(axes, x, y, row, words):
    """One sequence: the letter of its row in the batch, its words, and its padding."""
    color = COLOR_OF_LENGTH[sum(word is not None for word in words)]
    write(axes, x + 6, y + 15.5, "abcdef"[row], color=MUTED, ha="center")
    for i, word in enumerate(words):
        if word is None:
            draw_cell(axes, x + 16 + i * CELL, y, "\u00b7", PADDING, text_color=PALE)
        else:
            draw_cell(axes, x + 16 + i * CELL, y, word, color)


def draw_padded(axes, x, y, padded):
    for row, words in enumerate(padded):
        draw_sequence(axes, x, y + row * ROW, row, words)


def draw_packed(axes, x, y, packed, packing):
    """The packed tokens in a line, and below it the groups, two of them side by side."""
    real_groups = packing.groups[:-1] if packing.fill else packing.groups
    colors = [COLOR_OF_LENGTH[length] for n, length in real_groups for _ in range(n * length)]
    for i, ((row, _), color) in enumerate(zip(packed, colors)):
        draw_cell(axes, x + 14 * i, y, "abcdef"[row], color, width=14)

    start, left, top = 0, x, y + 58
    for n, length in real_groups:
        if left + 16 + length * CELL > x + 27 * 14:
            left, top = x, top + 3 * ROW + 32
        what = f"{n} sequence{'s' * (n > 1)} of {length} tokens"
        write(axes, left + 17, top - 6, what, 10, MUTED)
        for k in range(n):
            tokens = packed[start:start + length]
            draw_sequence(axes, left, top + k * ROW, tokens[0][0], [word for _, word in tokens])
            start += length
        left += 16 + length * CELL + 10


# ---------------------------------------------------------------- the gradients

def draw_gradients(axes, x, y, vectors):
    """The two gradients, and the directions whose product with both is positive. Returns the
    function that places a vector's tip."""
    def place(vector):
        return x + 96 + SCALE * vector[0], y + 200 - SCALE * vector[1]

    # between the two projected gradients, each of which is at a right angle to the other gradient
    first, last = (math.degrees(math.atan2(-vectors[name][1], vectors[name][0]))
                   for name in ("g2'", "g1'"))
    axes.add_patch(Wedge(place((0, 0)), 2.6 * SCALE, first, last, facecolor=GOOD, zorder=1))
    return place


def draw_arrow(axes, place, tip, color, label, shift, pale=False):
    axes.add_patch(FancyArrowPatch(
        place((0, 0)), place(tip), arrowstyle="-|>,head_length=3.8,head_width=1.7", color=color,
        mutation_scale=2.5 * POINT, linewidth=2.5 * POINT, alpha=0.35 if pale else 1, shrinkA=0,
        shrinkB=0, joinstyle="miter", zorder=2 if pale else 3))
    x, y = place(tip)
    write(axes, x + shift[0], y + shift[1], label, 13, color, ha="center",
          alpha=0.6 if pale else 1)


def draw_dashed(axes, place, start, end, color):
    axes.plot(*zip(place(start), place(end)), color=color, linewidth=1.2 * POINT,
              linestyle=(0, (3, 2.5)), zorder=2)


def draw_sum(axes, x, y, vectors):
    """The plain sum, which points against one of the two."""
    place = draw_gradients(axes, x, y, vectors)
    for name in ("g1", "g2"):
        draw_dashed(axes, place, vectors[name], vectors["sum"], PALE)
    draw_arrow(axes, place, vectors["g1"], BLUE, "g\u2081", (14, 6))
    draw_arrow(axes, place, vectors["g2"], ORANGE, "g\u2082", (-14, 2))
    draw_arrow(axes, place, vectors["sum"], PURPLE, "g\u2081 + g\u2082", (36, 0))
    for i, line in enumerate(("a step against", "these lowers", "both losses")):
        write(axes, *place((1.0, 2.05 - 0.2 * i)), line, 10, GREEN, ha="center")


def draw_pcgrad(axes, x, y, vectors):
    """The projected gradients, and PCGrad's update."""
    place = draw_gradients(axes, x, y, vectors)
    draw_arrow(axes, place, vectors["g1"], BLUE, "g\u2081", (14, 6), pale=True)
    draw_arrow(axes, place, vectors["g2"], ORANGE, "g\u2082", (-14, 2), pale=True)
    for name, color in (("g1", BLUE), ("g2", ORANGE)):
        draw_dashed(axes, place, vectors[name], vectors[f"{name}'"], color)
        draw_dashed(axes, place, vectors[f"{name}'"], vectors["update"], PALE)
    draw_arrow(axes, place, vectors["g1'"], BLUE, "g\u2081\u2032", (16, 8))
    draw_arrow(axes, place, vectors["g2'"], ORANGE, "g\u2082\u2032", (-4, -10))
    draw_arrow(axes, place, vectors["update"], GREEN, "g\u2081\u2032 + g\u2082\u2032", (42, 4))


# ---------------------------------------------------------------- main

def draw():
    """The figure."""
    padded, packed, packing = pack_batch(SENTENCES)
    vectors = {name: vector.tolist() for name, vector in project(J).items()}
    figure = Figure(figsize=(WIDTH * UNIT, HEIGHT * UNIT), facecolor=PAPER)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(HEIGHT, 0))
    axes.axis("off")

    left, right = 18, 414
    write(axes, left, 26, "Padding is dropped", 14, weight="bold")
    cells = sum(map(len, padded))
    write(axes, left, 54, f"padded: {cells} cells, {len(packed)} of them real tokens")
    draw_padded(axes, left, 66, padded)
    write(axes, left, 268, f"packed: {len(packed)} tokens, ordered by length")
    draw_packed(axes, left, 280, packed, packing)

    write(axes, right, 26, "Conflicting gradients are projected", 14, weight="bold")
    write(axes, right, 54, "the plain sum")
    draw_sum(axes, right, 66, vectors)
    write(axes, right, 318, "PCGrad")
    draw_pcgrad(axes, right, 330, vectors)
    return figure


def main(argv=None):
    parser = Parser(description="Draw the picture at the head of the README.")
    parser.add_argument("--out", type=Path, default=PROJECT / "results" / "explain.png")
    args = parser.parse_args(argv)
    with matplotlib.rc_context({"font.family": "DejaVu Sans"}):
        save_figure(draw(), args.out)
    print(args.out)


if __name__ == "__main__":
    sys.exit(exit_status(main))
