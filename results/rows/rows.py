"""The rows of the five reports' tables at one budget, 30,000 examples (after any pretraining), and
the search for the best system at a larger one: the defaults, and what is added to them. All use
all-MiniLM-L6-v2 with mean pooling.

    python results/rows/rows.py run ROW ... --seeds 1 2 3 --data_dir DIR
                                               train; results/rows/ROW-SEED/ keeps command, args,
                                               metrics and environment
    python results/rows/rows.py table          the README's tables, from these records
    python results/rows/rows.py figures        its figures, likewise

The fine-tuned rows of the reports have the learning rate that was best on row 5c with a seed of its
own (5c-lr...), 1f half of it; the frozen ones have the reports' 1e-3. Rows that need data which is
missing here (CFIMDB, Yelp) are left out. A row is not trained again while its record exists, or its
run in runs/rows/.
"""
import argparse
import functools
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from matplotlib.colors import TABLEAU_COLORS
from matplotlib.figure import Figure
from scipy.stats import t

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[1]
sys.path.insert(0, str(PROJECT))
from data.tasks import TASKS as TABLE  # noqa: E402
from results import records as recording  # noqa: E402
from support.evaluation import selection_score  # noqa: E402
from support.plots import plot_study  # noqa: E402
from support.run import read_metrics  # noqa: E402

TASKS = ("sst", "para", "sts")
RATES = ("1e-4", "2e-4", "4e-4")
# 500 updates with 20 examples of each of the three tasks, or 1,500 with 20 examples of one task
STEPS = "--epochs 4 --epoch_length 125 --batch_size 20"
ONE_TASK_STEPS = "--epochs 4 --epoch_length 375 --batch_size 20"

FINETUNE = f"--option finetune --lr 2e-4 {STEPS}"
ONE_TASK = f"--option finetune --lr 2e-4 {ONE_TASK_STEPS}"
FROZEN = f"--option pretrain --lr 1e-3 {STEPS}"
SST = "--tasks sst --score_also para,sts"
REPORT_2 = f"{ONE_TASK} --schedule sequential"
MTDNN = f"{ONE_TASK} --schedule mtdnn --upsample --pair_head uv"
REPORT_3 = "--pair_head para=uv,sts=cosine --hidden_dropout_prob 0.1"
SMART = "--smart --proximal --proximal_mu 0.8 --proximal_beta 0.95"
REPORT_4 = "--pair_head cross --weight_decay 0.01 --hidden_dropout_prob 0.2"
ANNEALED = f"{ONE_TASK} --schedule annealed {REPORT_4}"
MIXED = ("--option finetune --lr 2e-4 --epochs 4 --epoch_length 125 --schedule mixed "
         "--batch_size 20 --pair_head cross")

# the defaults: 1,000 updates of 16, 32 and 12 examples
LONG = "--option finetune --epochs 4 --epoch_length 250"
LONGER = LONG.replace("250", "500")
LONG_ANNEALED = ("--option finetune --epochs 4 --epoch_length 750 --schedule annealed "
                 "--batch_size 20")


@dataclass
class Row:
    what: str
    flags: str  # of multitask_classifier.py
    report: tuple = (None, None, None)  # its dev scores: sst, para, sts
    base: dict = field(default_factory=dict)  # {a row that it adds something to: what that is}
    start: str | None = None  # a row, or a pretraining below, whose result it starts from
    same_as: str | None = None  # a row that trains the same weights


PRETRAINING = {
    "mlm": "--lr 1e-4 --epochs 3 --epoch_length 500",
    "mlm-fast": "--lr 1e-3 --epochs 3 --epoch_length 500",
}
ROWS = {
    "1a": Row("sentiment alone", f"{ONE_TASK} {SST} --pair_head uv_diff", (.416, .376, .019)),
    "1b": Row("round robin, [u; v; abs(u - v)]", f"{FINETUNE} --pair_head uv_diff",
              (.485, .853, .635), {"1a": "the pair tasks"}),
    "1c": Row("1b after MLM pretraining", f"{FINETUNE} --pair_head uv_diff",
              (.509, .815, .677), {"1b": "MLM pretraining"}, "mlm"),
    "1d": Row("1b with PCGrad", f"{FINETUNE} --pair_head uv_diff --pcgrad",
              (.485, .840, .660), {"1b": "PCGrad"}),
    "1e": Row("1c with PCGrad", f"{FINETUNE} --pair_head uv_diff --pcgrad",
              (.469, .844, .650), {"1b": "both", "1c": "PCGrad", "1d": "MLM pretraining"}, "mlm"),
    "1f": Row("1b, half the rate, twice the batch, dropout .5",
              "--option finetune --lr 1e-4 --epochs 4 --epoch_length 63 --batch_size 40 "
              "--hidden_dropout_prob 0.5 --pair_head uv_diff",
              (.506, .796, .632), {"1b": "rate, batch, dropout"}),
    "2a": Row("sentiment alone", "", (.511, None, None), same_as="1a"),
    "2b": Row("sentiment alone", "", (.262, .375, .001), same_as="1a"),
    "2c": Row("in turn, [u; v]", f"{REPORT_2} --pair_head uv",
              (.478, .811, .403), {"2b": "the pair tasks"}),
    "2d": Row("MT-DNN's schedule, up-sampled", MTDNN,
              (.511, .522, .395), {"2c": "MT-DNN's schedule"}),
    "2e": Row("2c after MLM pretraining at 1e-3", f"{REPORT_2} --pair_head uv",
              (.506, .806, .442), {"2c": "MLM pretraining"}, "mlm-fast"),
    "2f": Row("2e with a cosine for sts", f"{REPORT_2} --pair_head para=uv,sts=cosine",
              (.502, .807, .403), {"2e": "a cosine for sts"}, "mlm-fast"),
    "3a": Row("frozen, sentiment alone",
              f"--option pretrain --lr 1e-3 {ONE_TASK_STEPS} {SST} {REPORT_3}",
              (.415, .609, -.072)),
    "3b": Row("sentiment alone, dropout .1", f"{ONE_TASK} {SST} {REPORT_3}",
              (.529, .381, .246), {"3a": "fine-tuning"}),
    "3c": Row("3b with SMART and the proximal term", f"{ONE_TASK} {SST} {REPORT_3} {SMART}",
              (.518, .371, .307), {"3b": "SMART, proximal term"}),
    "3d": Row("round robin, cosine for sts", f"{FINETUNE} {REPORT_3}",
              (.500, .695, .496), {"3b": "the pair tasks"}),
    "3e": Row("3d with SMART and the proximal term", f"{FINETUNE} {REPORT_3} {SMART}",
              (.505, .719, .567), {"3d": "SMART, proximal term"}),
    "4a": Row("frozen, pairs apart: [u; v], a cosine for sts",
              "--option pretrain --lr 1e-3 --epochs 4 --epoch_length 188 --batch_size 20 "
              "--tasks sst,para --score_also sts --pair_head para=uv,sts=cosine "
              "--hidden_dropout_prob 0.2 --weight_decay 0.01", (.383, .519, .101)),
    "4b": Row("4a cross-encoded",
              f"{FROZEN} --pair_head cross --hidden_dropout_prob 0.2 --weight_decay 0.01",
              (.383, .622, .428), {"4a": "cross-encoding"}),
    "4c": Row("round robin, cross-encoded", f"{FINETUNE} {REPORT_4}",
              (.451, .766, .813), {"4b": "fine-tuning"}),
    "4d": Row("4c, annealed", ANNEALED, (.469, .805, .822), {"4c": "annealing"}),
    "4e": Row("4d with the heads of 4b", ANNEALED,
              (.488, .805, .841), {"4d": "the heads of 4b"}, "4b"),
    "4e-pal": Row("4e with PAL", f"{ANNEALED} --pal --pal_g identity",
                  (.492, .810, .843), {"4e": "PAL"}, "4b"),
    "4f": Row("4e-pal with SMART", f"{ANNEALED} --pal --pal_g identity --smart --smart_eps 1e-6",
              (.506, .818, .875), {"4e-pal": "SMART"}, "4b"),
    "5a": Row("frozen, cross-encoded", f"{FROZEN} --pair_head cross", (.390, .702, .457)),
    "5b": Row("in turn, an optimizer each",
              f"{ONE_TASK} --tasks para,sst,sts --schedule sequential --optimizer_per_task "
              "--pair_head cross", (.510, .877, .830), {"5a": "fine-tuning"}),
    "5c": Row("in proportion to the sets", MIXED,
              (.524, .872, .855), {"5b": "mixed batches, one optimizer"}),
    "5c-.5": Row("5c with dropout .5", f"{MIXED} --hidden_dropout_prob 0.5",
                 (.505, .872, .849), {"5c": "dropout .5"}),
    "5d": Row("5c with PCGrad", f"{MIXED} --pcgrad", (.515, .871, .849), {"5c": "PCGrad"}),
    "5d-.5": Row("5d with dropout .5", f"{MIXED} --pcgrad --hidden_dropout_prob 0.5",
                 (.513, .877, .855), {"5c-.5": "PCGrad", "5d": "dropout .5"}),
    "5f": Row("frozen, a cosine for para alone",
              f"--option pretrain --lr 1e-3 {ONE_TASK_STEPS} --tasks para --pair_head cosine"),
    **{f"{name}-{part}": Row(f"{name} with a fraction of {fraction} of para",
                             f"{flags} --limit para={fraction}")
       for name, flags in (("2c", f"{REPORT_2} --pair_head uv"), ("2d", MTDNN))
       for part, fraction in (("half", 0.5), ("quarter", 0.25))},
    **{f"5c-lr{rate}": Row(f"5c at a rate of {rate}", MIXED.replace("2e-4", rate))
       for rate in RATES},
}
SEARCH = {
    "default": Row("the defaults", LONG),
    "default+rate": Row("at a rate of 2e-4", f"{LONG} --lr 2e-4"),
    "default+longer": Row("2,000 updates", LONGER),
    "default+annealed": Row("annealed, batches of one task", LONG_ANNEALED),
    "default+cross": Row("para cross-encoded", f"{LONG} --pair_head para=cross,sts=cosine"),
    "default+pcgrad": Row("PCGrad", f"{LONG} --pcgrad"),
    "default+pal": Row("PAL", f"{LONG} --pal"),
    "default+proximal": Row("the proximal term", f"{LONG} --proximal"),
    "default+ordinal": Row("ordinal log loss", f"{LONG} --sst_loss oll1"),
    "default+mlm": Row("MLM pretraining", LONG, start="mlm"),
    "annealed+pal": Row("annealed with PAL", f"{LONG_ANNEALED} --pal"),
    "longer+pal": Row("2,000 updates with PAL", f"{LONGER} --pal"),
}
ALL = {**ROWS, **SEARCH}


# ---------------------------------------------------------------- training

def command_of(name, seed, machine=" --amp"):
    """The command of a row or a pretraining, as typed in the project's folder.

    machine: the flags that depend on the machine.
    """
    if name in PRETRAINING:
        return (f"python pretrain_mlm.py {PRETRAINING[name]}{machine} --seed {seed} "
                f"--out runs/rows/{name}-{seed}")
    row, start = ALL[name], ""
    if row.start:
        flag = "--model" if row.start in PRETRAINING else "--init_from"
        start = f" {flag} runs/rows/{row.start}-{seed}"
    if "--smart" in row.flags:  # a perturbation of 1e-5 would be lost in bfloat16
        machine = machine.replace(" --amp", "")
    return (f"python multitask_classifier.py {row.flags}{start}{machine} --seed {seed} "
            f"--name rows/{name}-{seed}")


def data_files(folder):
    return [folder / TABLE[task].filename(split) for task in TASKS for split in ("train", "dev")]


def run(name, seed, data_dir, machine):
    """Train a row, after what it starts from, and keep its record, unless the record exists. An
    interrupted run is resumed."""
    kept = HERE / f"{name}-{seed}"
    if kept.exists():
        print(f"{name}, seed {seed}: the record exists: {kept}")
        return
    folder = train(name, seed, data_dir, machine)
    recording.keep(folder, kept, command_of(name, seed, machine), data_dir)


def train(name, seed, data_dir, machine):
    """Train a row or a pretraining. Returns the folder of the run."""
    folder = PROJECT / f"runs/rows/{name}-{seed}"
    if not recording.has_ended(folder):
        if name in ALL and ALL[name].start:
            train(ALL[name].start, seed, data_dir, machine)
        command = f"{command_of(name, seed, machine)} --data_dir DATA"
        recording.train(folder, command, data_dir, data_files(data_dir))
    return folder


# ---------------------------------------------------------------- scores and their spread

@functools.cache
def records(name):
    """[(trained tasks, evaluations, steps)] of a row, one for each seed that is recorded."""
    folders = sorted(HERE.glob(f"{ALL[name].same_as or name}-[0-9]*"))
    return [(json.loads((folder / "args.json").read_text())["trained"],
             read_metrics(folder, "evaluation"), read_metrics(folder, "step"))
            for folder in folders]


def scores(name, split="dev"):
    """{task: [the score of each seed, at its best evaluation on dev]}."""
    best = [max(evaluations, key=lambda line: selection_score(line, trained))
            for trained, evaluations, _ in records(name)]
    return {task: [line[split][task] for line in best if task in line[split]] for task in TASKS}


def trains(name, *tasks):
    return all(task in trained for trained, *_ in records(name) for task in tasks)


def overall(name):
    """overall_2023 of every seed; none where a head is not trained."""
    if not trains(name, *TASKS):
        return []
    return [mean(of_seed) for of_seed in zip(*scores(name).values())]


def updates(name):
    return records(name)[0][1][-1]["step"]


def spread(rows, of):
    """(standard deviation over seeds, pooled over the fine-tuned rows that have several; its
    degrees of freedom). of(name): the row's value for each seed."""
    several = [of(name) for name, row in rows.items()
               if "finetune" in row.flags and len(of(name)) > 1]
    freedom = sum(len(values) - 1 for values in several)
    squares = sum((len(values) - 1) * stdev(values) ** 2 for values in several)
    return (squares / freedom) ** 0.5 if several else None, freedom


def least_difference(deviation, freedom, seeds, other_seeds):
    """The smallest difference between the means of two rows that a t-test at 5 % finds significant.
    """
    return t.ppf(0.975, freedom) * deviation * (1 / seeds + 1 / other_seeds) ** 0.5


def difference(ours, theirs, deviation, freedom):
    """(mean(ours) - mean(theirs), whether that is significant; None where no row has several
    seeds)."""
    here = mean(ours) - mean(theirs)
    if not freedom:
        return here, None
    return here, bool(abs(here) > least_difference(deviation, freedom, len(ours), len(theirs)))


# ---------------------------------------------------------------- tables

def cell(values):
    """Mean and standard deviation over the seeds."""
    if not values:
        return ""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def print_row(*cells):
    print("| " + " | ".join(map(str, cells)) + " |")


def print_head(*cells):
    print()
    print_row(*cells)
    print("|---" * len(cells) + "|")


def tables():
    recorded = {name: row for name, row in ROWS.items() if records(name)}
    spreads = {task: spread(recorded, functools.partial(trained_scores, task)) for task in TASKS}
    spreads["overall_2023"] = spread(ALL, overall)
    print_scores(recorded)
    if all(freedom for _, freedom in spreads.values()):
        print_spreads(spreads)
    print_differences(recorded, spreads)
    print_search(spreads["overall_2023"])


def trained_scores(task, name):
    """The scores of a row's seeds; none where it does not train the task."""
    return scores(name)[task] if trains(name, task) else []


def print_scores(recorded):
    print_head("row", "what it is", "seeds", "updates", *TASKS, "overall_2023",
               "report: sst / para / sts")
    for name, row in recorded.items():
        cells = []
        for task, values in scores(name).items():
            text = cell(values)
            if values and not trains(name, task):
                # a row that shares another's weights has no untrained heads of its own
                text = "" if row.same_as else f"({text})"
            cells.append(text)
        report = " / ".join("-" if value is None else f"{value:.3f}" for value in row.report)
        print_row(name, row.what, len(records(name)), updates(name), *cells, cell(overall(name)),
                  report)


def print_spreads(spreads):
    print_head("", *spreads)
    print_row("standard deviation over seeds",
              *(f"{deviation:.4f}" for deviation, _ in spreads.values()))
    print_row("degrees of freedom", *(freedom for _, freedom in spreads.values()))
    for what, seeds in (("one seed each", (1, 1)), ("one seed and three", (1, 3)),
                        ("three each", (3, 3))):
        least = [least_difference(*found, *seeds) for found in spreads.values()]
        print_row(f"least significant difference, {what}", *(f"{value:.3f}" for value in least))


def print_differences(recorded, spreads):
    print_head("from, to", "what is added", *(f"{task}: report, here" for task in TASKS))
    for name, row in recorded.items():
        for base, added in row.base.items():
            if base in recorded:
                verdicts = (verdict(base, name, task, *spreads[task]) for task in TASKS)
                print_row(f"{base}, {name}", added, *verdicts)


def verdict(base, name, task, deviation, freedom):
    """The report's difference, ours, and whether ours is significant and has its sign."""
    if not (trains(base, task) and trains(name, task)):
        return "not trained in both"
    here, significant = difference(scores(name)[task], scores(base)[task], deviation, freedom)
    before, after = (ROWS[row].report[TASKS.index(task)] for row in (base, name))
    claim = None if before is None or after is None else after - before
    both = f"{'-' if claim is None else f'{claim:+.3f}'}, {here:+.3f}"

    # the spread is that of fine-tuned rows; frozen ones have another
    if significant is None or "finetune" not in ROWS[name].flags:
        return both
    if not significant:
        return f"{both}: n.s."
    if claim is None or abs(claim) < .0005:
        return f"{both}: significant"
    return f"{both}: significant, {'same' if claim * here > 0 else 'other'} sign"


def print_search(spread_of_overall):
    print_head("run", "what it is", "seeds", "updates", *(f"{task} (train)" for task in TASKS),
               "overall_2023", "over the defaults")
    for name, row in SEARCH.items():
        if not records(name):
            continue
        on_dev, on_train = scores(name), scores(name, "train")
        cells = [f"{cell(on_dev[task])} ({mean(on_train[task]):.3f})" for task in TASKS]
        over = ""
        if name != "default":
            more, significant = difference(overall(name), overall("default"), *spread_of_overall)
            words = {None: "", False: ": n.s.", True: ": significant"}
            over = f"{more:+.3f}{words[significant]}"
        print_row(name, row.what, len(records(name)), updates(name), *cells, cell(overall(name)),
                  over)


# ---------------------------------------------------------------- figures

SHOWN = {"1b": "[u; v; |u - v|]", "1d": "the same with PCGrad",
         "3e": "[u; v], a cosine for sts, SMART", "4d": "cross-encoded, annealed",
         "5c": "cross-encoded, in proportion", "5d": "the same with PCGrad"}


def panels(titles, path, draw, ylabel, xlabel="examples seen"):
    """A figure with a panel for each title; draw(axes, title)."""
    figure = Figure(figsize=(4.5 * len(titles) + 3, 4), layout="constrained")
    for axes, title in zip(figure.subplots(1, len(titles), squeeze=False)[0], titles):
        draw(axes, title)
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=110)
    print(path.relative_to(PROJECT))


def over_examples(name, split, task):
    """(examples seen, mean over the seeds, standard deviation or 0) at every evaluation."""
    runs = [evaluations for _, evaluations, _ in records(name)]
    columns = [[line[split][task] for line in lines] for lines in zip(*runs)]
    seen = [30_000 * line["step"] / runs[0][-1]["step"] for line in runs[0]]
    deviations = [stdev(column) if len(column) > 1 else 0 for column in columns]
    return seen, [mean(column) for column in columns], deviations


def mean_of_ten(values):
    return np.convolve(values, np.ones(10) / 10, "valid")


def shown_rows():
    """{row: its color}, of the rows in the figures that are recorded."""
    return {name: color for name, color in zip(SHOWN, TABLEAU_COLORS) if records(name)}


def draw_dev(axes, task):
    for shift, (name, color) in enumerate(shown_rows().items()):
        seen, means, errors = over_examples(name, "dev", task)
        # shifted a little, so that the error bars do not cover each other
        axes.errorbar(np.add(seen, 200 * shift - 500), means, errors, marker="o", ms=3, capsize=2,
                      color=color, label=f"{name}: {SHOWN[name]}")


def draw_train_and_dev(axes, task):
    for name, color in shown_rows().items():
        for split, style in (("train", "--"), ("dev", "-")):
            seen, means, _ = over_examples(name, split, task)
            axes.plot(seen, means, style, color=color, label=f"{name}, {split}")


def draw_cosine(axes, pair):
    for name, color in zip(("1d", "5d"), TABLEAU_COLORS):
        for n, (*_, lines) in enumerate(records(name)):
            steps = [line["step"] for line in lines]
            cosines = [line["gradients"]["cosine"][pair] for line in lines]
            axes.plot(mean_of_ten(steps), mean_of_ten(cosines), color=color, lw=0.8,
                      label=f"{name}, a line per seed" if n == 0 else None)
    axes.axhline(0, color="black", lw=0.5)


def figures():
    panels(TASKS, HERE / "scores.png", draw_dev, "dev score, mean and deviation over seeds")
    panels(TASKS, HERE / "overfitting.png", draw_train_and_dev, "score, mean over seeds")
    panels(("sst-para", "sst-sts", "para-sts"), HERE / "cosines.png", draw_cosine,
           "cosine, mean over 100 steps", "step")
    shares = [HERE / f"{name}{part}-1" for name in ("2c", "2d")
              for part in ("", "-half", "-quarter")]
    if all(folder.exists() for folder in shares):
        plot_study(shares, HERE / "quora.png")
        print((HERE / "quora.png").relative_to(PROJECT))


# ---------------------------------------------------------------- main

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    what = parser.add_subparsers(dest="what", required=True)
    what.add_parser("table", help="print the README's tables")
    what.add_parser("figures", help="draw its figures")
    runs = what.add_parser("run", help="train rows and keep their records")
    runs.add_argument("rows", nargs="+", choices=ALL, metavar="ROW")
    runs.add_argument("--seeds", type=int, nargs="+", default=[1])
    runs.add_argument("--data_dir", type=lambda path: Path(path).resolve(),
                      default=PROJECT / "data")
    runs.add_argument("--float32", action="store_true",
                      help="without --amp, for a machine that has no bfloat16")
    runs.add_argument("--use_gpu", action="store_true")
    args = parser.parse_args(argv)
    if args.what == "table":
        tables()
        return
    if args.what == "figures":
        figures()
        return

    for path in data_files(args.data_dir):
        if not path.exists():
            parser.error(f"{path}: no such file; --data_dir names the folder with the course's "
                         "files")
    machine = (" --use_gpu" if args.use_gpu else "") + ("" if args.float32 else " --amp")
    for seed in args.seeds:
        for name in args.rows:
            run(ALL[name].same_as or name, seed, args.data_dir, machine)


if __name__ == "__main__":
    main()
