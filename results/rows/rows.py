"""The rows of the five reports' tables at one budget: 30,000 examples, after any pretraining, all-MiniLM-L6-v2, mean pooling;
and the search for the best system, at 60,000: the defaults, what is added to them, and what is taken from the best.

    python results/rows/rows.py run ROW ... --seeds 1 2 3 --data_dir DIR     train; results/rows/ROW-SEED/ keeps
                                                                             command, args, metrics and environment
    python results/rows/rows.py table                                        the README's tables, from what is kept
    python results/rows/rows.py figures                                      its pictures, likewise

Fine-tuned rows have the learning rate that was best on row 5c (5c-lr...), frozen ones 1e-3, the reports'. Rows that need data
which is not there (CFIMDB, Yelp) are missing. To train a row once more, remove its record or choose another seed.
"""
import argparse
import functools
import hashlib
import json
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from matplotlib.colors import TABLEAU_COLORS
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[1]
sys.path.insert(0, str(PROJECT))
from curves import read_metrics  # noqa: E402
from data.tasks import TASKS as TABLE  # noqa: E402
from evaluation import selection  # noqa: E402

TASKS = ("sst", "para", "sts")
RATES = ("1e-4", "2e-4", "4e-4")
STEPS = "--epochs 4 --epoch_length 125 --batch_size 20"  # all tasks in a step: 500 updates of 60 rows
ONE_TASK_STEPS = "--epochs 4 --epoch_length 375 --batch_size 20"  # one task in a step: 1,500 updates of 20 rows
FINETUNE = f"--option finetune --lr 2e-4 {STEPS}"
ONE_TASK = f"--option finetune --lr 2e-4 {ONE_TASK_STEPS}"
FROZEN = f"--option pretrain --lr 1e-3 {STEPS}"
SST = "--tasks sst --score_also para,sts"
REPORT_2 = f"{ONE_TASK} --schedule sequential"
MTDNN = f"{ONE_TASK} --schedule mtdnn --upsample --pair_head uv"
REPORT_3 = "--pair_head para=uv,sts=cosine --hidden_dropout_prob 0.1"
SMART = "--smart --proximal mu=0.8,beta=0.95"
ANNEALED = f"{ONE_TASK} --schedule annealed --pair_head cross --weight_decay 0.01 --hidden_dropout_prob 0.2"
LONG = "--option finetune --epochs 4 --epoch_length 250"  # the defaults: 1,000 updates of 16, 32 and 12 rows
MIXED = "--option finetune --lr 2e-4 --epochs 4 --epoch_length 125 --schedule mixed --batch_size 20 --pair_head cross"


@dataclass
class Row:
    what: str
    flags: str  # of multitask_classifier.py
    report: tuple = (None, None, None)  # its dev scores: sst, para, sts
    base: str = ""  # the rows that it adds something to
    start: str | None = None  # a row, or a pretraining below, whose result it starts from
    same_as: str | None = None  # a row that trains the same weights


PRETRAINING = {"mlm": "--lr 1e-4 --epochs 3 --epoch_length 500", "mlm-fast": "--lr 1e-3 --epochs 3 --epoch_length 500"}
ROWS = {
    "1a": Row("sentiment alone", f"{ONE_TASK} {SST} --pair_head uv_diff", (.416, .376, .019)),
    "1b": Row("round robin, [u; v; abs(u - v)]", f"{FINETUNE} --pair_head uv_diff", (.485, .853, .635), "1a"),
    "1c": Row("1b after MLM pretraining", f"{FINETUNE} --pair_head uv_diff", (.509, .815, .677), "1b", "mlm"),
    "1d": Row("1b with PCGrad", f"{FINETUNE} --pair_head uv_diff --pcgrad", (.485, .840, .660), "1b"),
    "1e": Row("1c with PCGrad", f"{FINETUNE} --pair_head uv_diff --pcgrad", (.469, .844, .650), "1b 1c 1d", "mlm"),
    "1f": Row("1b, half the rate, twice the batch, dropout .5", "--option finetune --lr 1e-4 --epochs 4 --epoch_length 63 "
              "--batch_size 40 --hidden_dropout_prob 0.5 --pair_head uv_diff", (.506, .796, .632), "1b"),
    "2a": Row("sentiment alone", f"{ONE_TASK} {SST} --pair_head uv_diff", (.511, None, None), same_as="1a"),
    "2b": Row("sentiment alone", f"{ONE_TASK} {SST} --pair_head uv_diff", (.262, .375, .001), same_as="1a"),
    "2c": Row("in turn, [u; v]", f"{REPORT_2} --pair_head uv", (.478, .811, .403), "2b"),
    "2d": Row("MT-DNN's schedule, up-sampled", MTDNN, (.511, .522, .395), "2c"),
    "2e": Row("2c after MLM pretraining at 1e-3", f"{REPORT_2} --pair_head uv", (.506, .806, .442), "2c", "mlm-fast"),
    "2f": Row("2e with a cosine for sts", f"{REPORT_2} --pair_head para=uv,sts=cosine", (.502, .807, .403), "2e", "mlm-fast"),
    "3a": Row("frozen, sentiment alone", f"--option pretrain --lr 1e-3 {ONE_TASK_STEPS} {SST} {REPORT_3}", (.415, .609, -.072)),
    "3b": Row("sentiment alone, dropout .1", f"{ONE_TASK} {SST} {REPORT_3}", (.529, .381, .246), "3a"),
    "3c": Row("3b with SMART and the proximal term", f"{ONE_TASK} {SST} {REPORT_3} {SMART}", (.518, .371, .307), "3b"),
    "3d": Row("round robin, cosine for sts", f"{FINETUNE} {REPORT_3}", (.500, .695, .496), "3b"),
    "3e": Row("3d with SMART and the proximal term", f"{FINETUNE} {REPORT_3} {SMART}", (.505, .719, .567), "3d"),
    "4a": Row("frozen, pairs apart", f"{FROZEN} --pair_head uv --hidden_dropout_prob 0.2", (.383, .519, .101)),
    "4b": Row("4a cross-encoded", f"{FROZEN} --pair_head cross --hidden_dropout_prob 0.2", (.383, .622, .428), "4a"),
    "4c": Row("round robin, cross-encoded", f"{FINETUNE} --pair_head cross --weight_decay 0.01 --hidden_dropout_prob 0.2",
              (.451, .766, .813), "4b"),
    "4d": Row("4c, annealed", ANNEALED, (.469, .805, .822), "4c"),
    "4e": Row("4d with the heads of 4b", ANNEALED, (.488, .805, .841), "4d", "4b"),
    "4e-pal": Row("4e with PAL", f"{ANNEALED} --pal", (.492, .810, .843), "4e", "4b"),
    "4f": Row("4e-pal with SMART", f"{ANNEALED} --pal --smart eps=1e-6", (.506, .818, .875), "4e-pal", "4b"),
    "5a": Row("frozen, cross-encoded", f"{FROZEN} --pair_head cross", (.390, .702, .457)),
    "5b": Row("in turn, an optimizer each",
              f"{ONE_TASK} --tasks para,sst,sts --schedule sequential --optimizer_per_task --pair_head cross",
              (.510, .877, .830), "5a"),
    "5c": Row("in proportion to the sets", MIXED, (.524, .872, .855), "5b"),
    "5c-.5": Row("5c with dropout .5", f"{MIXED} --hidden_dropout_prob 0.5", (.505, .872, .849), "5c"),
    "5d": Row("5c with PCGrad", f"{MIXED} --pcgrad", (.515, .871, .849), "5c"),
    "5d-.5": Row("5d with dropout .5", f"{MIXED} --pcgrad --hidden_dropout_prob 0.5", (.513, .877, .855), "5c-.5"),
    "5f": Row("frozen, a cosine for para alone",
              f"--option pretrain --lr 1e-3 {ONE_TASK_STEPS} --tasks para --pair_head cosine"),
    **{f"{name}-{part}": Row(f"{name} with a share of {share} of para", f"{flags} --limit para={share}")
       for name, flags in (("2c", f"{REPORT_2} --pair_head uv"), ("2d", MTDNN))
       for part, share in (("half", 0.5), ("quarter", 0.25))},
    **{f"5c-lr{rate}": Row(f"5c at a rate of {rate}", MIXED.replace("2e-4", rate)) for rate in RATES},
}
SEARCH = {
    "default": Row("the defaults", LONG),
    "default+rate": Row("at a rate of 2e-4", f"{LONG} --lr 2e-4"),
    "default+longer": Row("2,000 updates", LONG.replace("250", "500")),
    "default+annealed": Row("annealed, 3,000 updates of 20 rows",
                            "--option finetune --epochs 4 --epoch_length 750 --schedule annealed --batch_size 20"),
    "default+pcgrad": Row("PCGrad", f"{LONG} --pcgrad"),
    "default+pal": Row("PAL", f"{LONG} --pal"),
    "default+proximal": Row("the proximal term", f"{LONG} --proximal"),
    "default+ordinal": Row("ordinal log loss", f"{LONG} --sst_loss oll1"),
    "default+mlm": Row("MLM pretraining", LONG, start="mlm"),
}
ALL = {**ROWS, **SEARCH}


def command_of(name, seed):
    """The command of a row, or of a pretraining, as typed in the project's folder."""
    if name in PRETRAINING:
        return f"python pretrain_mlm.py {PRETRAINING[name]} --amp --seed {seed} --out runs/rows/{name}-{seed}"
    row = ALL[name]
    start = f" --{'model' if row.start in PRETRAINING else 'init_from'} runs/rows/{row.start}-{seed}" if row.start else ""
    amp = "" if "--smart" in row.flags else " --amp"  # a perturbation of 1e-5 would be lost in bfloat16
    return f"python multitask_classifier.py {row.flags}{start}{amp} --seed {seed} --name rows/{name}-{seed}"


def environment(data_dir):
    commit = subprocess.run(["git", "-C", str(PROJECT), "describe", "--always", "--dirty"], capture_output=True, text=True)
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), "") if Path("/proc/cpuinfo").exists() else platform.processor()
    files = [data_dir / TABLE[task].filename(split) for task in TASKS for split in ("train", "dev")]
    return {"commit": commit.stdout.strip(), "python": platform.python_version(), "torch": torch.__version__,
            "numpy": np.__version__, "cpu": cpu, "threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}}


def run(name, seed, data_dir):
    """Train a row, after what it starts from, and keep its record; where that is there and the weights are not wanted,
    nothing. A run that was interrupted goes on."""
    kept = HERE / f"{name}-{seed}"
    if kept.exists():
        return print(f"{name}, seed {seed}: {kept} is there")
    folder = train(name, seed, data_dir)
    flags = json.loads((folder / "args.json").read_text())
    for machine in ("data_dir", "folder", "argv"):  # what is this machine's; command.txt has the flags as typed
        flags.pop(machine, None)
    new = kept.with_name(f"{kept.name}.part")  # a row's name may have a dot
    new.mkdir(exist_ok=True)
    (new / "args.json").write_text(json.dumps(flags, indent=2) + "\n")
    (new / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text())
    (new / "command.txt").write_text(command_of(name, seed) + "\n")
    (new / "environment.json").write_text((folder / "environment.json").read_text())
    new.rename(kept)


def train(name, seed, data_dir):
    """The folder of the run of a row or a pretraining, trained if it is not there. environment.json says that it has ended."""
    folder = PROJECT / f"runs/rows/{name}-{seed}"
    if (folder / "environment.json").exists():
        return folder
    if name in ALL and ALL[name].start:
        train(ALL[name].start, seed, data_dir)
    command, surroundings, before = command_of(name, seed), environment(data_dir), time.time()
    flags = ["--resume", str(folder)] if folder.exists() else command.split()[2:]
    print(command, flush=True)
    subprocess.run([sys.executable, command.split()[1], *flags, "--data_dir", data_dir], cwd=PROJECT, check=True)
    surroundings["minutes"] = round((time.time() - before) / 60, 1)
    (folder / "environment.json").write_text(json.dumps(surroundings, indent=2) + "\n")
    return folder


# ---------------------------------------------------------------- tables

@functools.cache
def records(name):
    """[(trained tasks, evaluations, steps)] of a row, one for each seed that is there."""
    folders = sorted(HERE.glob(f"{ALL[name].same_as or name}-[0-9]*"))
    return [(json.loads((folder / "args.json").read_text())["trained"], read_metrics(folder, "evaluation"),
             read_metrics(folder, "step")) for folder in folders]


def scores(name, split="dev"):
    """{task: [score of each seed, at its best evaluation on dev]}."""
    best = [max(evaluations, key=lambda line: selection(line, trained)) for trained, evaluations, _ in records(name)]
    return {task: [line[split][task] for line in best if task in line[split]] for task in TASKS}


def trains(name, task):
    return all(task in trained for trained, *_ in records(name))


def cell(values):
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "") if values else ""


def spread(task):
    """The standard deviation over seeds of a fine-tuned row, pooled over the rows that have several."""
    several = [scores(name)[task] for name, row in ALL.items()
               if not row.same_as and "finetune" in row.flags and trains(name, task) and len(records(name)) > 1]
    squares = sum((len(values) - 1) * stdev(values) ** 2 for values in several)
    return (squares / sum(len(values) - 1 for values in several)) ** 0.5 if several else None


def tables():
    there = {name: row for name, row in ROWS.items() if records(name)}
    print("| row | what it is | seeds | updates | sst | para | sts | overall_2023 | report: sst / para / sts |\n" + "|---" * 9 + "|")
    for name, row in there.items():
        ours = scores(name)
        cells = [cell(ours[task]) if trains(name, task) else f"({cell(ours[task])})" for task in TASKS]
        print(f"| {name} | {row.what} | {len(records(name))} | {updates(name)} | {' | '.join(cells)} | {overall(ours)} | "
              + " / ".join("-" if value is None else f"{value:.3f}" for value in row.report) + " |")
    spreads = {task: spread(task) for task in TASKS}
    print("\nstandard deviation over seeds: " + ", ".join(f"{task} {value:.4f}" for task, value in spreads.items() if value))
    print("\n| from, to | what is added | sst: report, here | para: report, here | sts: report, here |\n" + "|---" * 5 + "|")
    for name, row in there.items():
        for base in (base for base in row.base.split() if base in there):
            print(f"| {base}, {name} | {row.what} | "
                  + " | ".join(verdict(base, name, task, spreads[task]) for task in TASKS) + " |")
    print("\n| run | what it is | seeds | updates | sst (train) | para (train) | sts (train) | overall_2023 |\n" + "|---" * 8 + "|")
    for name, row in SEARCH.items():
        if records(name):
            dev, train = scores(name), scores(name, "train")
            cells = [f"{cell(dev[task])} ({mean(train[task]):.3f})" for task in TASKS]
            print(f"| {name} | {row.what} | {len(records(name))} | {updates(name)} | {' | '.join(cells)} | {overall(dev)} |")


def updates(name):
    return records(name)[0][1][-1]["step"]


def overall(scores):  # overall_2023, of every seed
    return cell([mean(seed) for seed in zip(*scores.values())])


def verdict(base, name, task, spread):
    """The report's difference, ours, and whether ours has its sign and is more than two standard errors from 0."""
    if not (trains(base, task) and trains(name, task)):
        return "not trained in both"
    ours, theirs = scores(name)[task], scores(base)[task]
    claim = [ALL[row].report[TASKS.index(task)] for row in (base, name)]
    claim = None if None in claim else claim[1] - claim[0]
    here = mean(ours) - mean(theirs)
    said = f"{'-' if claim is None else f'{claim:+.3f}'}, {here:+.3f}"
    if spread is None:
        return said
    if abs(here) <= 2 * spread * (1 / len(ours) + 1 / len(theirs)) ** 0.5:
        return f"{said}: not told apart"
    if claim is None or abs(claim) < .0005:
        return f"{said}: a difference"
    return f"{said}: {'same' if claim * here > 0 else 'other'} sign"


# ---------------------------------------------------------------- pictures

def panels(titles, path, draw, ylabel, xlabel="examples seen"):
    """A picture with a panel for each title; draw(axes, title)."""
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
    return ([30_000 * line["step"] / runs[0][-1]["step"] for line in runs[0]], [mean(column) for column in columns],
            [stdev(column) if len(column) > 1 else 0 for column in columns])


def figures():
    main = {name: color for name, color in zip(("1b", "1d", "3e", "4d", "5c", "5d"), TABLEAU_COLORS) if records(name)}

    def dev(axes, task):
        for name, color in main.items():
            seen, means, errors = over_examples(name, "dev", task)
            axes.errorbar(seen, means, errors, marker="o", ms=3, capsize=2, color=color, label=f"{name}: {ROWS[name].what}")

    def train_and_dev(axes, task):
        for name, color in main.items():
            for split, style in (("train", "--"), ("dev", "-")):
                seen, means, _ = over_examples(name, split, task)
                axes.plot(seen, means, style, color=color, label=f"{name}, {split}")

    def cosine(axes, pair):
        for name, style in (("1d", ":"), ("5d", "-")):
            for color, (*_, lines) in zip(TABLEAU_COLORS, records(name)):
                axes.plot(*zip(*((line["step"], line["gradients"]["cosine"][pair]) for line in lines)), style, color=color, lw=0.8)
            axes.plot([], [], style, color="black", label=f"{name}, a color a seed")
        axes.axhline(0, color="black", lw=0.5)

    def study(axes, task):
        for name in ("2c", "2d"):
            axes.plot((1, 0.5, 0.25), [mean(scores(name + part)[task]) for part in ("", "-half", "-quarter")], "o-",
                      label=f"{name}: {ROWS[name].what}")

    panels(TASKS, HERE / "scores.png", dev, "dev score, mean and deviation over seeds")
    panels(TASKS, HERE / "overfitting.png", train_and_dev, "score, mean over seeds")
    panels(("sst-para", "sst-sts", "para-sts"), HERE / "cosines.png", cosine, "cosine, mean of ten steps", "step")
    if all(records(name + part) for name in ("2c", "2d") for part in ("", "-half", "-quarter")):
        panels(TASKS, HERE / "quora.png", study, "best dev score", "share of the Quora rows")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_subparsers(dest="what", required=True)
    what.add_parser("table")
    what.add_parser("figures")
    runs = what.add_parser("run")
    runs.add_argument("rows", nargs="+", choices=[name for name, row in ALL.items() if not row.same_as], metavar="ROW")
    runs.add_argument("--seeds", type=int, nargs="+", default=[1])
    runs.add_argument("--data_dir", type=lambda path: Path(path).resolve(), default=PROJECT / "data")
    args = parser.parse_args()
    if args.what == "run":
        for seed in args.seeds:
            for name in args.rows:
                run(name, seed, args.data_dir)
    else:
        {"table": tables, "figures": figures}[args.what]()
