"""Every row of the five reports' tables at one budget: 30,000 examples, all-MiniLM-L6-v2, one learning rate.

    python results/rows/rows.py run ROW ... --seeds 1 2 3 --data_dir DIR     train; results/rows/ROW-SEED/ keeps
                                                                             command, args, metrics and environment
    python results/rows/rows.py table                                        the README's tables, from what is kept
    python results/rows/rows.py figures                                      its pictures, likewise
"""
import argparse
import json
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch
from matplotlib.colors import TABLEAU_COLORS
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[1]
sys.path.insert(0, str(PROJECT))
from curves import read_metrics  # noqa: E402
from evaluation import selection  # noqa: E402

# 4 x 125 steps of 20 + 20 + 20 rows; a step that has one task has 20 rows, so there are three times as many
FINETUNE = "--option finetune --lr 2e-4 --epochs 4 --epoch_length 125 --batch_size 20"
ONE_TASK = "--option finetune --lr 2e-4 --epochs 4 --epoch_length 375 --batch_size 20"
MIXED = "--option finetune --lr 2e-4 --epochs 4 --epoch_length 125 --schedule mixed --batch_size 20 --pair_head cross"
FROZEN = "--option pretrain --lr 1e-3 --epochs 4 --epoch_length 125 --batch_size 20"
SST = "--tasks sst --score_also para,sts"
ANNEALED = f"{ONE_TASK} --schedule annealed --pair_head cross --weight_decay 0.01 --hidden_dropout_prob 0.2"
SMART = "--smart --proximal mu=0.8,beta=0.95"
SEQUENTIAL = f"{ONE_TASK} --schedule sequential --pair_head uv"
MTDNN = f"{ONE_TASK} --schedule mtdnn --upsample --pair_head uv"
RATES = ("1e-4", "2e-4", "4e-4")  # one of them was chosen, on row 5c


@dataclass
class Row:
    what: str
    flags: str  # of multitask_classifier.py
    report: tuple | None = None  # its dev scores: sst, para, sts
    base: str | None = None  # the row that it adds something to
    first: str | None = None  # a row, or a pretraining below, whose result it starts from


PRETRAINING = {"mlm": "--lr 1e-4 --epochs 3 --epoch_length 500", "mlm-fast": "--lr 1e-3 --epochs 3 --epoch_length 500"}
ROWS = {
    "1a": Row("sentiment alone", f"{ONE_TASK} {SST} --pair_head uv_diff", (.416, .376, .019)),
    "1b": Row("round robin, [u; v; abs(u - v)]", f"{FINETUNE} --pair_head uv_diff", (.485, .853, .635), "1a"),
    "1c": Row("1b after MLM pretraining", f"{FINETUNE} --pair_head uv_diff", (.509, .815, .677), "1b", "mlm"),
    "1d": Row("1b with PCGrad", f"{FINETUNE} --pair_head uv_diff --pcgrad", (.485, .840, .660), "1b"),
    "1e": Row("1c with PCGrad", f"{FINETUNE} --pair_head uv_diff --pcgrad", (.469, .844, .650), "1b", "mlm"),
    "1f": Row("1b, half the rate, twice the batch, more dropout",
              "--option finetune --lr 1e-4 --epochs 4 --epoch_length 63 --batch_size 40 --hidden_dropout_prob 0.5 "
              "--pair_head uv_diff", (.506, .796, .632), "1b"),
    "2a": Row("sentiment alone", f"{ONE_TASK} {SST}", (.511, None, None)),
    "2b": Row("sentiment alone, [u; v]", f"{ONE_TASK} {SST} --pair_head uv", (.262, .375, .001)),
    "2c": Row("in turn, [u; v]", SEQUENTIAL, (.478, .811, .403), "2b"),
    "2d": Row("MT-DNN's schedule, up-sampled", MTDNN, (.511, .522, .395), "2c"),
    "2e": Row("2c after MLM pretraining at 1e-3", SEQUENTIAL, (.506, .806, .442), "2c", "mlm-fast"),
    "2f": Row("2e with a cosine for sts", SEQUENTIAL.replace("uv", "para=uv,sts=cosine"), (.502, .807, .403), "2e",
              "mlm-fast"),
    "2c-half": Row("2c with half of para", f"{SEQUENTIAL} --limit para=0.5"),
    "2c-quarter": Row("2c with a quarter of para", f"{SEQUENTIAL} --limit para=0.25"),
    "2d-half": Row("2d with half of para", f"{MTDNN} --limit para=0.5"),
    "2d-quarter": Row("2d with a quarter of para", f"{MTDNN} --limit para=0.25"),
    "3a": Row("frozen, sentiment alone", f"{FROZEN.replace('125', '375')} {SST} --pair_head para=uv,sts=cosine", (.415, .609, -.072)),
    "3b": Row("sentiment alone", f"{ONE_TASK} {SST} --pair_head para=uv,sts=cosine --hidden_dropout_prob 0.1",
              (.529, .381, .246), "3a"),
    "3c": Row("3b with SMART and the proximal term",
              f"{ONE_TASK} {SST} --pair_head para=uv,sts=cosine --hidden_dropout_prob 0.1 {SMART}",
              (.518, .371, .307), "3b"),
    "3d": Row("round robin, cosine for sts", f"{FINETUNE} --pair_head para=uv,sts=cosine --hidden_dropout_prob 0.1",
              (.500, .695, .496), "3b"),
    "3e": Row("3d with SMART and the proximal term",
              f"{FINETUNE} --pair_head para=uv,sts=cosine --hidden_dropout_prob 0.1 {SMART}", (.505, .719, .567), "3d"),
    "4a": Row("frozen, pairs apart", f"{FROZEN} --pair_head uv --hidden_dropout_prob 0.2", (.383, .519, .101)),
    "4b": Row("4a cross-encoded", f"{FROZEN} --pair_head cross --hidden_dropout_prob 0.2", (.383, .622, .428), "4a"),
    "4c": Row("round robin, cross-encoded",
              f"{FINETUNE} --pair_head cross --weight_decay 0.01 --hidden_dropout_prob 0.2", (.451, .766, .813), "4b"),
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
    "5f": Row("5c, a cosine for para", MIXED.replace("cross", "para=cosine,sts=cross"), None, "5c"),
    **{f"5c-lr{rate}": Row(f"5c at {rate}", MIXED.replace("2e-4", rate)) for rate in RATES},
}


def environment():
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), "") if Path("/proc/cpuinfo").exists() else platform.processor()
    commit = subprocess.run(["git", "-C", str(PROJECT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout
    return {"commit": commit.strip(), "python": platform.python_version(), "torch": torch.__version__,
            "machine": f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}", "cpu": cpu}


def command_of(name, seed):
    """The command of a row, or of a pretraining, as typed in the project's folder."""
    if name in PRETRAINING:
        return f"python pretrain_mlm.py {PRETRAINING[name]} --amp --seed {seed} --out runs/rows/{name}-{seed}"
    row = ROWS[name]
    start = f" --{'model' if row.first in PRETRAINING else 'init_from'} runs/rows/{row.first}-{seed}" if row.first else ""
    amp = "" if "--smart" in row.flags else " --amp"  # a perturbation of 1e-5 would be lost in bfloat16
    return f"python multitask_classifier.py {row.flags}{start}{amp} --seed {seed} --name rows/{name}-{seed}"


def run(name, seed, data_dir):
    """Train one row, after what it starts from. Its record is kept when it has ended; one that is there stands."""
    kept, folder = HERE / f"{name}-{seed}", PROJECT / f"runs/rows/{name}-{seed}"
    if kept.exists():
        return
    if name in ROWS and ROWS[name].first and not (PROJECT / f"runs/rows/{ROWS[name].first}-{seed}").exists():
        run(ROWS[name].first, seed, data_dir)
    command, surroundings = command_of(name, seed), environment()
    print(command, flush=True)
    subprocess.run([sys.executable, *command.split()[1:], "--data_dir", data_dir], cwd=PROJECT, check=True)
    kept.mkdir()
    flags = json.loads((folder / "args.json").read_text())
    for machine in ("data_dir", "folder", "argv"):  # what is this machine's; command.txt has the flags as typed
        flags.pop(machine, None)
    (kept / "args.json").write_text(json.dumps(flags, indent=2) + "\n")
    shutil.copy(folder / "metrics.jsonl", kept)
    (kept / "command.txt").write_text(command + "\n")
    (kept / "environment.json").write_text(json.dumps(surroundings, indent=2) + "\n")


# ---------------------------------------------------------------- tables

TASKS = ("sst", "para", "sts")


def records(name):
    """[(folder, best evaluation)] of a row, one for each seed that is there."""
    found = []
    for folder in sorted(HERE.glob(f"{name}-[0-9]*")):
        trained = json.loads((folder / "args.json").read_text())["trained"]
        found.append((folder, max(read_metrics(folder, "evaluation"), key=lambda line: selection(line, trained))))
    return found


def scores(name):
    """{task: [best dev score of each seed]}, with "overall" for their mean."""
    best = [{task: line["dev"].get(task) for task in TASKS} for _, line in records(name)]
    for line in best:
        line["overall"] = mean(line.values()) if None not in line.values() else None
    return {task: [line[task] for line in best if line[task] is not None] for task in (*TASKS, "overall")}


def cell(values):
    if not values:
        return ""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def number(value):
    return "" if value is None else f"{value:.3f}"


def spread(task):
    """The standard deviation over seeds, pooled over the rows that have several."""
    variances = [stdev(values) ** 2 for name in ROWS if len(values := scores(name)[task]) > 1]
    return mean(variances) ** 0.5 if variances else float("nan")


def tables():
    print("| row | what it is | seeds | sst | para | sts | overall_2023 | report: sst / para / sts |\n" + "|---" * 8 + "|")
    for name, row in ROWS.items():
        ours = scores(name)
        if ours["sst"]:
            report = " / ".join(number(value) or "-" for value in row.report) if row.report else ""
            print(f"| {name} | {row.what} | {len(ours['sst'])} | " + " | ".join(cell(ours[task]) for task in ours)
                  + f" | {report} |")
    print("\nspread: " + ", ".join(f"{task} {spread(task):.3f}" for task in TASKS))
    print("\n| what is added | " + " | ".join(f"{task}: report, here" for task in TASKS) + " |\n" + "|---" * 4 + "|")
    for name, row in ROWS.items():
        ours, base = scores(name), scores(row.base) if row.base else None
        if base and ours["sst"] and base["sst"]:
            print(f"| {row.base} to {name}: {row.what} | " + " | ".join(verdict(name, row, task, ours, base) for task in TASKS)
                  + " |")


def verdict(name, row, task, ours, base):
    """The report's difference, ours, and whether ours has its sign by more than two standard errors of the spread."""
    ours, base = ours[task], base[task]
    if not ours or not base:
        return ""
    here, error = mean(ours) - mean(base), spread(task) * (1 / len(ours) + 1 / len(base)) ** 0.5
    clear = abs(here) > 2 * error
    before, after = (ROWS[row.base].report or (None,) * 3)[TASKS.index(task)], (row.report or (None,) * 3)[TASKS.index(task)]
    if before is None or after is None:
        return f"-, {here:+.3f}{'' if clear else ' (within the spread)'}"
    claim = after - before
    word = "within the spread" if not clear else "holds" if claim * here > 0 else "does not hold"
    return f"{claim:+.3f}, {here:+.3f}: {word}"


# ---------------------------------------------------------------- pictures

MAIN = ("1b", "1d", "3e", "4d", "5c", "5d")


def over_examples(name, value):
    """(examples seen, mean over the seeds, standard deviation or 0) of value(evaluation) at every evaluation."""
    runs = [read_metrics(folder, "evaluation") for folder, _ in records(name)]
    last = runs[0][-1]["step"]
    columns = [[value(line) for line in lines] for lines in zip(*runs)]
    return ([30_000 * line["step"] / last for line in runs[0]], [mean(column) for column in columns],
            [stdev(column) if len(column) > 1 else 0 for column in columns])


def panels(titles, path, draw, ylabel, xlabel="examples seen"):
    """A picture with a panel for each title; draw(axes, title)."""
    figure = Figure(figsize=(4.5 * len(titles), 4), layout="constrained")
    for axes, title in zip(figure.subplots(1, len(titles), squeeze=False)[0], titles):
        draw(axes, title)
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=110)
    print(path.relative_to(PROJECT))


def figures():
    names = [name for name in MAIN if records(name)]

    def dev(axes, task):
        for name in names:
            seen, means, errors = over_examples(name, lambda line: line["dev"][task])
            axes.errorbar(seen, means, errors, marker="o", ms=3, capsize=2, label=f"{name}: {ROWS[name].what}")
    panels(TASKS, HERE / "scores.png", dev, "dev score, mean and spread over seeds")

    def gap(axes, task):
        for color, name in zip(TABLEAU_COLORS, names):
            for split, style in (("train", "--"), ("dev", "-")):
                seen, means, _ = over_examples(name, lambda line: line[split][task])
                axes.plot(seen, means, style, color=color, label=f"{name}, {split}")
    panels(TASKS, HERE / "overfitting.png", gap, "score, mean over seeds")

    def cosine(axes, pair):
        for name in ("1d", "5d"):
            runs = [[(line["step"], line["gradients"]["cosine"][pair]) for line in read_metrics(folder, "step")]
                    for folder, _ in records(name)]
            for color, run in zip(TABLEAU_COLORS, runs):
                axes.plot(*zip(*run), color=color, lw=0.7, ls="-" if name == "5d" else ":")
            axes.plot([], [], color="black", ls="-" if name == "5d" else ":", label=f"{name}, a color a seed")
        axes.axhline(0, color="black", lw=0.5)
    if records("1d") and records("5d"):
        panels(("sst-para", "sst-sts", "para-sts"), HERE / "cosines.png", cosine, "cosine, mean of ten steps", "step")

    shares = {"": 1.0, "-half": 0.5, "-quarter": 0.25}
    if all(records(name + part) for name in ("2c", "2d") for part in shares):
        def study(axes, task):
            for name in ("2c", "2d"):
                axes.plot(shares.values(), [mean(scores(name + part)[task]) for part in shares], "o-",
                          label=f"{name}: {ROWS[name].what}")
        panels(TASKS, HERE / "quora.png", study, "best dev score", "share of the Quora rows")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("run", "table", "figures"))
    parser.add_argument("rows", nargs="*", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--data_dir", type=lambda path: Path(path).resolve(), default=PROJECT / "data")
    args = parser.parse_args()
    if unknown := [name for name in args.rows if name not in ROWS]:
        parser.error(f"no such row: {', '.join(unknown)}")
    if args.what == "run":
        for seed in args.seeds:
            for name in args.rows:
                run(name, seed, args.data_dir)
    else:
        {"table": tables, "figures": figures}[args.what]()
