"""Scores of recorded runs, their spread over seeds, and tables of them, for the studies that keep
records (results/study.py)."""
import json
import re
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from scipy.stats import t

from data.batches import Schedule
from support.evaluation import selection_score
from support.run import read_metrics

TASKS = ("sst", "para", "sts")


@dataclass
class Record:
    """One recorded run."""
    args: dict
    evaluations: list  # lines of metrics.jsonl
    steps: list

    @property
    def best(self):
        """The evaluation whose model the run kept."""
        return max(self.evaluations, key=lambda line: selection_score(line, self.args["trained"]))

    def trains(self, *tasks):
        return set(tasks) <= set(self.args["trained"])

    def counts(self, task):
        """True where the task is trained, and for sts with a cosine: that head has no weights, so
        its score is the encoder's own."""
        return self.trains(task) or (task == "sts"
                                     and self.args["pair_head"].get("sts") == "cosine")


def read_records(folder, name):
    """The records NAME-SEED in a folder, in the order of their seeds."""
    folders = [path for path in Path(folder).glob(f"{name}-*")
               if path.name.removeprefix(f"{name}-").isdigit()]
    folders.sort(key=lambda path: int(path.name.rpartition("-")[2]))
    return [Record(json.loads((path / "args.json").read_text()), read_metrics(path, "evaluation"),
                   read_metrics(path, "step")) for path in folders]


def scores(records, task, split="dev"):
    """The score of each run that has one."""
    found = [record.best[split].get(task) for record in records]
    return [score for score in found if score is not None]


def overall(records):
    """overall_2023 of each run, the mean of the three scores; none where a task is not trained."""
    return [record.best["overall_2023"] for record in records if record.trains(*TASKS)]


def examples_seen(args, sizes):
    """{task: how many examples a run trains on, repetitions counted}. args: its flags. sizes:
    {task: examples in its training set}."""
    sizes = {task: round((args["limit"] or {}).get(task, 1) * sizes[task])
             for task in args["trained"]}
    schedule = Schedule(args["schedule"], sizes, args["batch_size"], args["epoch_length"],
                        args["seed"], args["epochs"], args["upsample"])
    seen = dict.fromkeys(sizes, 0)
    for epoch in range(args["epochs"]):
        for step in schedule.epoch(epoch):
            for task, indices in step:
                seen[task] += len(indices)
    return seen


# ---------------------------------------------------------------- their spread over seeds

def spread(groups):
    """(standard deviation, degrees of freedom) over seeds, pooled over the systems that have
    several. groups: one list of scores per system."""
    several = [values for values in groups if len(values) > 1]
    freedom = sum(len(values) - 1 for values in several)
    squares = sum((len(values) - 1) * stdev(values) ** 2 for values in several)
    return (squares / freedom) ** 0.5 if several else None, freedom


def least_difference(deviation, freedom, seeds, other_seeds):
    """The smallest difference between the means of two systems that a two-sided t-test at 5 %
    finds significant."""
    return t.ppf(0.975, freedom) * deviation * (1 / seeds + 1 / other_seeds) ** 0.5


def difference(ours, theirs, deviation, freedom):
    """(mean(ours) - mean(theirs), the least difference that is significant; None where no system
    has several seeds)."""
    least = None
    if freedom:
        least = least_difference(deviation, freedom, len(ours), len(theirs))
    return mean(ours) - mean(theirs), least


# ---------------------------------------------------------------- tables

def cell(values):
    """Mean ± standard deviation over the seeds; empty without a value."""
    if not values:
        return ""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def verdict(found, least):
    """A difference and its 95 % interval, `+0.012 [-0.008, +0.032]`; the difference in bold where
    it is significant, that is where the interval leaves out 0."""
    if least is None:
        return f"{found:+.3f}"
    bold = "**" if abs(found) > least else ""
    return f"{bold}{found:+.3f}{bold} [{found - least:+.3f}, {found + least:+.3f}]"


def with_train(records):
    """The number of seeds, the three scores on dev with those on train in brackets, and
    overall_2023: cells of a row."""
    both = [f"{cell(scores(records, task))} ({mean(scores(records, task, 'train')):.3f})"
            for task in TASKS]
    return len(records), *both, cell(overall(records))


def table(head, rows):
    """The lines of a Markdown table."""
    return [f"| {' | '.join(map(str, cells))} |" for cells in (head, ["---"] * len(head), *rows)]


def table_over(base, systems, found):
    """A table of the systems of a study that have records, with their difference in overall_2023
    from the system `base`. systems: {name: System}. found: {name: its records}."""
    pooled = spread([overall(found[name]) for name in systems])
    rows = []
    for name, system in systems.items():
        if found[name]:
            over = "" if name == base else verdict(*difference(
                overall(found[name]), overall(found[base]), *pooled))
            rows.append((name, system.what, *with_train(found[name]), over))
    return table(("system", "what it is", "seeds", *(f"{task} (train)" for task in TASKS),
                  "overall_2023", f"overall_2023 over {base}"), rows)


def write_tables(page, tables):
    """Replace the table below each line `<!-- NAME -->` of a page. tables: {NAME: its lines}."""
    text = page.read_text(encoding="utf-8")
    for name, lines in tables.items():
        below = re.compile(rf"(?<=<!-- {name} -->\n)(\|.*\n)*")
        if not below.search(text):
            raise ValueError(f"{page} has no line <!-- {name} -->")
        text = below.sub(lambda _: "".join(f"{line}\n" for line in lines), text, count=1)
    page.write_text(text, encoding="utf-8")
