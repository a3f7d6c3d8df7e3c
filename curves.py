"""Pictures of runs, from their metrics.jsonl.

    python curves.py RUN                            draw RUN/curves.png again
    python curves.py RUN RUN ... --out study.png    best dev scores against --limit, a line for each set of other flags
"""
import itertools
import json
import sys
from pathlib import Path

from matplotlib.colors import TABLEAU_COLORS
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from checkpoint import exit_status
from data.download import InputError, write_whole
from flags import Parser


def read_metrics(folder, kind):
    """The lines of a kind, "step" or "evaluation". The last line may be torn, where a run was killed."""
    with open(Path(folder) / "metrics.jsonl", encoding="utf-8") as file:
        return [line for line in (json.loads(text) for text in file if text.endswith("\n")) if line["kind"] == kind]


def plot_curves(folder):
    """curves.png: each task's loss over the steps, its score on the train sample (dashed) and on dev by epoch, and the
    cosines between the tasks' gradients where they were logged."""
    steps, evaluations = (read_metrics(folder, kind) for kind in ("step", "evaluation"))
    measured = [line for line in steps if "gradients" in line]
    figure = Figure(figsize=(15 if measured else 10, 4), layout="constrained")
    losses, scores, *gradients = figure.subplots(1, 3 if measured else 2)
    for color, task in zip(itertools.cycle(TABLEAU_COLORS), evaluations[0]["train"]):
        points = [(line["step"], line["losses"][task]) for line in steps if task in line["losses"]]
        if points:  # a task may be scored alone
            losses.plot(*zip(*points), color=color, label=task)
        for split, style in (("dev", "o-"), ("train", "--")):
            points = [(line["epoch"], line[split][task]) for line in evaluations if task in line[split]]
            if points:  # an auxiliary task has no dev set
                scores.plot(*zip(*points), style, ms=3, color=color, label=f"{task} {split}")
    losses.set(xlabel="step", ylabel="loss (mean since the last point)", title="training loss")
    scores.set(xlabel="epoch", ylabel="accuracy; Pearson r for sts", title="scores")
    scores.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in gradients:
        for pair in dict.fromkeys(pair for line in measured for pair in line["gradients"]["cosine"]):
            points = [(line["step"], line["gradients"]["cosine"][pair]) for line in measured
                      if pair in line["gradients"]["cosine"]]
            axes.plot(*zip(*points), lw=1, label=pair)
        axes.axhline(0, color="black", lw=0.5)
        axes.set(xlabel="step", ylabel="cosine (mean since the last point)", title="between the tasks' gradients")
    for axes in (losses, scores, *gradients):
        axes.grid(alpha=0.3)
        axes.legend()
    write_whole(Path(folder) / "curves.png", lambda path: figure.savefig(path, dpi=110, format="png"))


def plot_study(folders, path):
    """The best dev scores of several runs against the share of a task's rows that they were trained on (--limit); the runs
    that agree in all other flags make a line. Returns {other flags: [(share, dev scores)]}. Raises InputError where the runs
    differ in no --limit, or in several."""
    try:
        flags = {folder: json.loads((folder / "args.json").read_text(encoding="utf-8")) for folder in folders}
        best = {folder: max(read_metrics(folder, "evaluation"),
                            key=lambda line: sum(line["dev"].get(task, 0) for task in flags[folder]["trained"]))
                for folder in folders}
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"not a finished run ({error})") from None
    limits = {folder: args["limit"] or {} for folder, args in flags.items()}
    limited = [task for task in best[folders[0]]["dev"] if len({limit.get(task, 1.0) for limit in limits.values()}) > 1]
    if len(limited) != 1:
        raise InputError(f"the runs differ in --limit of {', '.join(limited) or 'no task'}, and one is wanted")
    task, = limited
    others = [name for name in flags[folders[0]] if name not in ("limit", "name", "argv", "resume")
              and len({json.dumps(args.get(name)) for args in flags.values()}) > 1]
    lines = {}
    for folder, args in flags.items():
        label = ", ".join(f"{name} {args[name]}" for name in others)
        lines.setdefault(label, []).append((limits[folder].get(task, 1.0), best[folder]["dev"]))
    scored = list(best[folders[0]]["dev"])
    figure = Figure(figsize=(4 * len(scored), 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(scored), squeeze=False)[0], scored):
        for label, points in lines.items():
            axes.plot(*zip(*sorted((share, dev[name]) for share, dev in points)), "o-", label=label)
        axes.set(xlabel=f"share of the {task} rows", ylabel="best dev score", title=name)
        axes.grid(alpha=0.3)
    if others:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", fontsize="small")
    write_whole(path, lambda part: figure.savefig(part, dpi=110, format="png"))
    return lines


def plot_losses(folder):
    """curve.png of pretraining: the training loss over the steps, and the held-out loss of each evaluation."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for kind, style, label in (("step", "-", "train (mean since the last point)"), ("evaluation", "o-", "held out")):
        axes.plot(*zip(*((line["step"], line["loss"]) for line in read_metrics(folder, kind))), style, label=label)
    axes.set(xlabel="step", ylabel="masked-LM loss; its exponential is the perplexity")
    axes.grid(alpha=0.3)
    axes.legend()
    write_whole(Path(folder) / "curve.png", lambda path: figure.savefig(path, dpi=110, format="png"))


def main(argv=None):
    parser = Parser(description="Draw a run's curves.png from its metrics.jsonl, or compare runs of several --limit.")
    parser.add_argument("run", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=None, help="of several runs: the picture to write")
    args = parser.parse_args(argv)
    for folder in args.run:
        if not (folder / "metrics.jsonl").is_file() or not read_metrics(folder, "evaluation"):
            raise InputError(f"{folder}: no metrics.jsonl there, or no evaluation in it yet")
    if len(args.run) > 1 and not args.out:
        raise InputError("several runs: give --out PICTURE")
    if args.out:
        plot_study(args.run, args.out)
    elif "dev" in read_metrics(args.run[0], "evaluation")[0]:
        plot_curves(args.run[0])
    else:
        plot_losses(args.run[0])  # of pretrain_mlm.py
    print(args.out or args.run[0])


if __name__ == "__main__":
    sys.exit(exit_status(main))
