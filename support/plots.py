"""Pictures of runs, from their metrics.jsonl.

    python support/plots.py RUN                            draw RUN/curves.png again
    python support/plots.py RUN RUN ... --out study.png    best dev scores against --limit, a line
                                                           for each set of other flags
"""
import itertools
import json
import sys
from pathlib import Path

from matplotlib.colors import TABLEAU_COLORS
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

if not __package__:  # run as `python support/plots.py`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support.evaluation import selection_score  # noqa: E402
from support.files import InputError, write_atomically  # noqa: E402
from support.flags import Parser  # noqa: E402
from support.run import exit_status, read_metrics  # noqa: E402


def save_figure(figure, path):
    write_atomically(path, lambda part: figure.savefig(part, dpi=110, format="png"))


def plot_curves(folder):
    """curves.png: each task's loss over the steps, its score on the train sample (dashed) and on
    dev by epoch, and the cosines between the tasks' gradients where they were logged."""
    steps, evaluations = read_metrics(folder, "step"), read_metrics(folder, "evaluation")
    measured = [line for line in steps if "gradients" in line]
    figure = Figure(figsize=(15 if measured else 10, 4), layout="constrained")
    losses, scores, *cosines = figure.subplots(1, 3 if measured else 2)

    # one color per task in both panels
    for color, task in zip(itertools.cycle(TABLEAU_COLORS), evaluations[0]["train"]):
        plot_task(losses, scores, task, color, steps, evaluations)
    losses.set(xlabel="step", ylabel="loss (mean since the last point)", title="training loss")
    scores.set(xlabel="epoch", ylabel="accuracy; Pearson r for sts", title="scores")
    scores.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in cosines:
        plot_cosines(axes, measured)

    for axes in (losses, scores, *cosines):
        axes.grid(alpha=0.3)
        axes.legend()
    save_figure(figure, Path(folder) / "curves.png")


def plot_task(losses, scores, task, color, steps, evaluations):
    """A task's training loss, and its scores. A task may be scored without being trained, and an
    auxiliary task has no dev set."""
    points = [(line["step"], line["losses"][task]) for line in steps if task in line["losses"]]
    if points:
        losses.plot(*zip(*points), color=color, label=task)
    for split, style in (("dev", "o-"), ("train", "--")):
        points = [(line["epoch"], line[split][task]) for line in evaluations if task in line[split]]
        if points:
            scores.plot(*zip(*points), style, ms=3, color=color, label=f"{task} {split}")


def plot_cosines(axes, measured):
    """The cosines between the tasks' gradients over the steps."""
    for pair in dict.fromkeys(pair for line in measured for pair in line["gradients"]["cosine"]):
        points = [(line["step"], line["gradients"]["cosine"][pair]) for line in measured
                  if pair in line["gradients"]["cosine"]]
        axes.plot(*zip(*points), lw=1, label=pair)
    axes.axhline(0, color="black", lw=0.5)
    axes.set(xlabel="step", ylabel="cosine (mean since the last point)",
             title="between the tasks' gradients")


def plot_losses(folder):
    """curve.png of pretraining: the training loss over the steps, and the held-out loss."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for kind, style, label in (("step", "-", "train (mean since the last point)"),
                               ("evaluation", "o-", "held out")):
        points = [(line["step"], line["loss"] if "loss" in line else line["losses"]["text"])
                  for line in read_metrics(folder, kind)]
        axes.plot(*zip(*points), style, label=label)
    axes.set(xlabel="step", ylabel="masked-LM loss; its exponential is the perplexity")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, Path(folder) / "curve.png")


# ---------------------------------------------------------------- several runs

def plot_study(folders, path):
    """The best dev scores of several runs against the fraction of a task's examples that they were
    trained on (--limit). Runs that agree in all other flags make a line.

    Returns {other flags: [(fraction, dev scores)]}. Raises InputError where the runs differ in no
    --limit, or in several.
    """
    flags, best = {}, {}
    for folder in folders:
        try:
            flags[folder] = json.loads((folder / "args.json").read_text(encoding="utf-8"))
            trained = flags[folder]["trained"]
            best[folder] = max(read_metrics(folder, "evaluation"),
                               key=lambda line: selection_score(line, trained))["dev"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{folder}: not a run of multitask_classifier.py "
                             f"({error})") from None
    limits = {folder: args["limit"] or {} for folder, args in flags.items()}
    task = limited_task(limits.values())

    # a line for each set of other flags; some only say where a run was started
    ignored = ("limit", "name", "argv", "resume", "folder", "data_dir", "data_digest", "device")
    others = [name for name in flags[folders[0]] if name not in ignored
              and len({json.dumps(args.get(name)) for args in flags.values()}) > 1]
    lines = {}
    for folder, args in flags.items():
        label = ", ".join(f"{name} {args.get(name)}" for name in others)
        lines.setdefault(label, []).append((limits[folder].get(task, 1.0), best[folder]))

    # a panel per score that all have
    scored = [name for name in best[folders[0]] if all(name in dev for dev in best.values())]
    figure = Figure(figsize=(4 * len(scored), 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(scored), squeeze=False)[0], scored):
        for label, points in lines.items():
            scores = sorted((fraction, dev[name]) for fraction, dev in points)
            axes.plot(*zip(*scores), "o-", label=label)
        axes.set(xlabel=f"fraction of the {task} examples", ylabel="best dev score", title=name)
        axes.grid(alpha=0.3)
    if others:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center",
                      fontsize="small")
    save_figure(figure, path)
    return lines


def limited_task(limits):
    """The one task in whose --limit the runs differ. limits: a dict {task: fraction} per run."""
    tasks = dict.fromkeys(task for limit in limits for task in limit)
    limited = [task for task in tasks if len({limit.get(task, 1.0) for limit in limits}) > 1]
    if len(limited) != 1:
        raise InputError(f"the runs differ in --limit of {', '.join(limited) or 'no task'}; "
                         "they must differ in that of one task")
    return limited[0]


def main(argv=None):
    parser = Parser(description="Draw a run's curves.png from its metrics.jsonl, or compare runs "
                                "of several --limit.")
    parser.add_argument("run", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=None,
                        help="the picture, where several runs are given: FILE.png")
    args = parser.parse_args(argv)
    for folder in args.run:
        try:
            evaluated = read_metrics(folder, "evaluation")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{folder}: its metrics.jsonl cannot be read ({error}); name a run's "
                             "folder, as in runs/NAME") from None
        if not evaluated:
            raise InputError(f"{folder}: no evaluation in its metrics.jsonl yet")
    if args.out and args.out.suffix != ".png":
        raise InputError(f"--out {args.out}: not a file FILE.png")
    if len(args.run) > 1 and not args.out:
        raise InputError("several runs: give --out PICTURE")
    if len(args.run) == 1 and args.out:
        raise InputError("--out: is for several runs; that of one run is its curves.png")

    if args.out:
        plot_study(args.run, args.out)
    elif "dev" in read_metrics(args.run[0], "evaluation")[0]:
        plot_curves(args.run[0])
    else:
        plot_losses(args.run[0])  # of pretrain_mlm.py
    print(args.out or args.run[0])


if __name__ == "__main__":
    sys.exit(exit_status(main))
