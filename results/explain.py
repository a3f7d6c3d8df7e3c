"""The picture at the head of the README: how padding is dropped, and what PCGrad does.

    python results/explain.py                draw results/explain.png again

attention.Packing says where each token goes, and pcgrad.py projects the gradients. [CLS], [SEP] and
the tokens that fill T up are left out. A small step against the update lowers each loss whose
gradient has a positive product with it: in the green wedge, both losses.
"""
import math
import sys
from pathlib import Path

import torch
from matplotlib import figure, patches, rc_context

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))
from attention import Packing  # noqa: E402
from pcgrad import gram_matrix, pcgrad, pcgrad_weights  # noqa: E402
from support.flags import Parser  # noqa: E402
from support.plots import save_figure  # noqa: E402
from support.run import exit_status  # noqa: E402

SENTENCES = ("how old are you ?", "pure joy !", "a warm , funny and very human film",
             "a cat is asleep .", "far too long", "dogs can swim")
J = torch.tensor([[3.0, -0.3], [-1.0, 1.1]], dtype=torch.float64)  # a row per task

# places and sizes are in units, of which the figure is 800 wide; save_figure has 110 dpi
UNIT, POINT = 2 / 110, 144 / 110  # in inches; in points, for text and lines
CELL, ROW, SCALE = 42, 24, 66  # a word's width and height; the length of a gradient of norm 1
INK, MUTED, PALE, PADDING, PAPER = "#1f2933", "#5f6b78", "#a3adb8", "#e9ebef", "#fbfbfa"
BLUE, ORANGE, PURPLE, GREEN, WEDGE = "#1f6fc4", "#d9631e", "#7a3fa8", "#13855a", "#e3f3ea"
COLOR_OF_LENGTH = {3: "#bfe3d0", 5: "#c9dbf7", 8: "#fbdcb5"}

# arrows: (vector, color, label, where the label stands from the tip); dashed lines between tips
SUM = ([("g1", BLUE, "g₁", (5, 6)), ("g2", ORANGE, "g₂", (-20, 1)),
        ("sum", PURPLE, "g₁ + g₂:\nloss 2 rises", (8, 2))],
       [("g1", "sum", PALE), ("g2", "sum", PALE)])
PCGRAD = ([("g1", "#a9c8e8", "g₁", (5, 6)), ("g2", "#f1c3a8", "g₂", (-20, 1)),
           ("g1'", BLUE, "g₁′", (12, 1)), ("g2'", ORANGE, "g₂′", (-25, 26)),
           ("update", GREEN, "g₁′ + g₂′:\nboth losses fall", (9, 10))],
          [("g1", "g1'", BLUE), ("g2", "g2'", ORANGE),
           ("g1'", "update", PALE), ("g2'", "update", PALE)])
ARROW = {"arrowstyle": "-|>,head_length=3.8,head_width=1.7", "mutation_scale": 2.5 * POINT,
         "lw": 2.5 * POINT, "shrinkA": 0, "shrinkB": 0, "joinstyle": "miter"}


def pack_batch(sentences):
    """B sentences -> their words with padding, (B, L), None for padding; the packed sequences, each
    [(row of the batch, word)]; and the Packing."""
    tokens = [sentence.split() for sentence in sentences]
    L = max(map(len, tokens))
    padded = [words + [None] * (L - len(words)) for words in tokens]
    packing = Packing(torch.tensor([[word is not None for word in words] for words in padded]))
    packed = [(i // L, padded[i // L][i % L]) for i in packing.indices.tolist()]
    bounds = packing.cu_seqlens.tolist()[:len(sentences) + 1]
    return padded, [packed[start:end] for start, end in zip(bounds, bounds[1:])], packing


def project(J):
    """{name: vector}: the gradients, what PCGrad makes of each, and both sums. J: (2, 2)."""
    projected = pcgrad_weights(gram_matrix(J), seed=0) @ J
    return {"g1": J[0], "g2": J[1], "g1'": projected[0], "g2'": projected[1],
            "sum": J.sum(dim=0), "update": pcgrad(J, seed=0)}


def titles(packing, vectors):
    """The line above each of the four panels."""
    real = len(packing.indices)
    dots = [vectors[a] @ vectors[b] for a, b in (("g1", "g2"), ("g1'", "g2"), ("g2'", "g1"))]
    dots = [round(float(dot), 2) + 0 for dot in dots]  # + 0 makes 0.0 of -0.0
    conflict, first, second = (f"{dot:g}".replace("-", "−") for dot in dots)
    return (f"padded batch: {math.prod(packing.padded_shape)} cells, {real} real tokens",
            f"packed: {real} tokens by length, lettered by row",
            f"plain sum: g₁ · g₂ = {conflict}, a conflict",
            f"PCGrad: g₁′ · g₂ = {first}, g₂′ · g₁ = {second}")


def write(axes, x, y, text, size=11, color=INK, **kwargs):
    axes.text(x, y, text, fontsize=size * POINT, color=color, va="baseline", **kwargs)


def draw_cell(axes, x, y, text, color, width=CELL):
    axes.add_patch(patches.Rectangle((x, y), width, ROW, fc=color, ec=PAPER, lw=1.2 * POINT))
    write(axes, x + width / 2, y + 15.5, text, 10, ha="center")


def draw_sequence(axes, x, y, row, words):
    """The letter of a row of the batch, its words, and its padding."""
    color = COLOR_OF_LENGTH[sum(word is not None for word in words)]
    write(axes, x + 6, y + 15.5, "abcdef"[row], color=MUTED, ha="center")
    for i, word in enumerate(words):
        draw_cell(axes, x + 16 + i * CELL, y, word or "", color if word else PADDING)


def draw_packed(axes, x, y, sequences, groups):
    """The packed tokens in a line, and below it the three groups."""
    for i, (row, length) in enumerate((row, len(s)) for s in sequences for row, _ in s):
        draw_cell(axes, x + i * CELL / 3, y, "abcdef"[row], COLOR_OF_LENGTH[length], CELL / 3)

    write(axes, x, y + 46, "attention: one dense block per length, no mask")
    left = iter(sequences)
    for (n, length), (x, y) in zip(groups, ((x, y + 74), (x + 152, y + 74), (x, y + 174))):
        write(axes, x + 17, y - 6, f"{n} sequence{'s' * (n > 1)} of {length} tokens", 10, MUTED)
        for k in range(n):
            rows, words = zip(*next(left))
            draw_sequence(axes, x, y + k * ROW, rows[0], words)


def draw_gradients(axes, x, y, vectors, arrows, dashes):
    """Arrows from (x, y) and, between g1' and g2', the directions that lower both losses."""
    tips = {name: (x + SCALE * float(a), y - SCALE * float(b)) for name, (a, b) in vectors.items()}
    edges = [math.degrees(math.atan2(b - y, a - x)) for a, b in (tips["g2'"], tips["g1'"])]
    axes.add_patch(patches.Wedge((x, y), 2.9 * SCALE, *edges, fc=WEDGE))

    for start, end, color in dashes:
        axes.plot(*zip(tips[start], tips[end]), color=color, lw=1.2 * POINT, ls=(0, (3, 2.5)))
    for name, color, label, (right, down) in arrows:
        axes.annotate("", tips[name], (x, y), arrowprops={**ARROW, "color": color})
        write(axes, tips[name][0] + right, tips[name][1] + down, label, 12, color)


@rc_context({"font.family": "DejaVu Sans"})  # which comes with matplotlib
def main(argv=None):
    parser = Parser(description="Draw the picture at the head of the README.")
    parser.add_argument("--out", type=Path, default=PROJECT / "results" / "explain.png")
    path = parser.parse_args(argv).out
    (padded, sequences, packing), vectors = pack_batch(SENTENCES), project(J)

    picture = figure.Figure(figsize=(800 * UNIT, 580 * UNIT), facecolor=PAPER)
    axes = picture.add_axes((0, 0, 1, 1), xlim=(0, 800), ylim=(580, 0))  # y points down
    axes.axis("off")
    write(axes, 18, 30, "Padding is dropped", 14, weight="bold")
    write(axes, 18, 304, "Conflicting gradients are projected (a step goes against the arrow)", 14,
          weight="bold")
    for i, title in enumerate(titles(packing, vectors)):
        print(title)
        write(axes, (18, 404)[i % 2], (56, 330)[i // 2], title)

    for row, words in enumerate(padded):
        draw_sequence(axes, 18, 68 + row * ROW, row, words)
    draw_packed(axes, 404, 68, sequences, packing.groups)
    draw_gradients(axes, 106, 544, vectors, *SUM)
    write(axes, 167, 400, "both losses fall", 10, GREEN, ha="center")
    draw_gradients(axes, 492, 544, vectors, *PCGRAD)
    save_figure(picture, path)


if __name__ == "__main__":
    sys.exit(exit_status(main))
