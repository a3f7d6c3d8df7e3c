"""The folder of a run: what was asked (args.json), what was measured (metrics.jsonl), and how it looks (curves.png).

    python checkpoint.py RUN       draw RUN/curves.png again from RUN/metrics.jsonl
"""
import json
import sys
from pathlib import Path

from matplotlib.colors import TABLEAU_COLORS
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from data.download import replace


class Run:
    """A run's folder, made new. Raises FileExistsError where one of this name is there."""

    def __init__(self, folder, args):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True)
        text = json.dumps(args, indent=2) + "\n"
        replace(self.folder / "args.json", lambda path: path.write_text(text, encoding="utf-8"))
        self.metrics = open(self.folder / "metrics.jsonl", "a", encoding="utf-8")

    def log(self, kind, **fields):
        """Append one line to metrics.jsonl; kind is "step" or "evaluation"."""
        self.metrics.write(json.dumps({"kind": kind, **fields}) + "\n")
        self.metrics.flush()


def read_metrics(folder, kind):
    with open(Path(folder) / "metrics.jsonl", encoding="utf-8") as file:
        return [line for line in map(json.loads, file) if line["kind"] == kind]


def plot_curves(folder):
    """curves.png: each task's loss over the steps, and its score on the train sample (dashed) and on dev by epoch."""
    steps, evaluations = (read_metrics(folder, kind) for kind in ("step", "evaluation"))
    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, scores = figure.subplots(1, 2)
    tasks = list(dict.fromkeys(task for line in steps for task in line["losses"]))
    for color, task in zip(TABLEAU_COLORS, tasks):
        points = [(line["step"], line["losses"][task]) for line in steps if task in line["losses"]]
        losses.plot(*zip(*points), color=color, label=task)
        for split, style in (("dev", "o-"), ("train", "--")):
            points = [(line["epoch"], line[split][task]) for line in evaluations]
            scores.plot(*zip(*points), style, ms=3, color=color, label=f"{task} {split}")
    losses.set(xlabel="step", ylabel="loss (mean since the last point)", title="training loss")
    scores.set(xlabel="epoch", ylabel="accuracy; Pearson r for sts", title="scores")
    scores.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (losses, scores):
        axes.grid(alpha=0.3)
        axes.legend()
    replace(Path(folder) / "curves.png", lambda path: figure.savefig(path, dpi=110, format="png"))


if __name__ == "__main__":
    plot_curves(sys.argv[1])
    print(Path(sys.argv[1]) / "curves.png")
