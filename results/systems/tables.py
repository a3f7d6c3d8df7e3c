"""Write the tables and draw the pictures of results/systems/README.md from the records beside it,
and the table of scores of the project's README.md.

    python results/systems/tables.py
"""
import sys
from pathlib import Path
from statistics import mean

import numpy as np
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]
from claims import CLAIMS  # noqa: E402
from results.scores import (TASKS, cell, difference, examples_seen,  # noqa: E402
                            least_difference, overall, read_records, scores, spread, table,
                            verdict, write_tables)
from systems import QUORA_PARTS, SIZES, SYSTEMS  # noqa: E402

PAGE = HERE / "README.md"
FRONT_PAGE = HERE.parents[1] / "README.md"
FRONT = {"5a": "frozen encoder, each pair as one sequence",
         "4a-cosine": "frozen encoder, cosine of u and v (for sts without any training)",
         "1b-uv": "fine-tuned, linear layer on [u; v]",
         "1b": "fine-tuned, linear layer on [u; v; abs(u - v)]",
         "1d": "the same, with gradient surgery (PCGrad)",
         "1b-cosine": "fine-tuned, cosine of u and v (the default)",
         "1b-cross": "fine-tuned, each pair as one sequence"}
QUORA_SHARES = {"": 1, **{f"-{part}th": 1 / part for part in QUORA_PARTS}}  # of 2c and 2d
PAIRS = ("sst-para", "sst-sts", "para-sts")
BEST_OF_REPORTS = (0.513, 0.877, 0.870)  # report 5's figures of the leaderboard, on dev
COLORS = {"sst": "tab:blue", "para": "tab:orange", "sts": "tab:green"}


def read_all(folder=HERE):
    """{system: its records}, of the systems that have one."""
    found = {name: read_records(folder, system.same_as or name)
             for name, system in SYSTEMS.items()}
    return {name: records for name, records in found.items() if records}


def is_finetuned(name):
    return "--option finetune" in SYSTEMS[SYSTEMS[name].same_as or name].flags


# ---------------------------------------------------------------- tables

def scores_table(found):
    """Every system on the three tasks, beside its report."""
    rows = []
    for name, records in found.items():
        if "cfimdb" in name:
            continue
        system = SYSTEMS[name]
        cells = [score_cell(system, records, task) for task in TASKS]
        report = ["-" if score is None else f"{score:.3f}" for score in system.report]
        seen = examples_seen(records[0].args, SIZES)
        thousands = [f"{seen[task] / 1000:.1f}" if task in seen else "-" for task in TASKS]
        rows.append((name, system.what, " / ".join(thousands), len(records), *cells,
                     cell(overall(records)), " / ".join(report)))
    return table(("system", "what it is", "thousands of examples: sst / para / sts", "seeds",
                  *TASKS, "overall_2023", "report: sst / para / sts"), rows)


def front_table(found):
    """A few systems, for a reader who does not know the reports."""
    rows = [(what, *(cell(scores(found[name], task)) for task in TASKS))
            for name, what in FRONT.items() if name in found]
    rows.append(("for comparison, not run here: report 5's leaderboard entry, with "
                 "bert-base-uncased (110M) and ten epochs",
                 *(f"{score:.3f}" for score in BEST_OF_REPORTS)))
    return table(("", "sentiment (`sst`), accuracy", "paraphrase (`para`), accuracy",
                  "similarity (`sts`), Pearson r"), rows)


def score_cell(system, records, task):
    """A score, in brackets where the task is not trained."""
    if records[0].trains(task):
        return cell(scores(records, task))
    # a system that has the weights of another one would have other untrained heads
    untrained = [] if system.same_as else scores(records, task)
    return f"({cell(untrained)})" if untrained else ""


def cfimdb_table(found):
    rows = [(name, SYSTEMS[name].what, len(records), cell(scores(records, "cfimdb")),
             f"{SYSTEMS[name].report[0]:.3f}")
            for name, records in found.items() if "cfimdb" in name]
    return table(("system", "what it is", "seeds", "cfimdb", "report 3"), rows)


def values_of(records, what):
    """A quantity of each run, none where its score of the task does not count (Record.counts).

    what: "sst", "para", "sts" or "overall_2023"; "sst gap": train minus dev, how much it over-fits;
    "F1 of para"; "F1 of sst 0": of that class.
    """
    if what == "overall_2023":
        return overall(records)
    if what.startswith("F1 of "):
        task, *label = what.split()[2:]
        return [record.best["f1"][task][label[0] if label else "positive"]
                for record in records if record.counts(task)]
    task, _, gap = what.partition(" ")
    counted = [record for record in records if record.counts(task)]
    if not gap:
        return scores(counted, task)
    return [on_train - on_dev for on_train, on_dev in zip(scores(counted, task, "train"),
                                                          scores(counted, task))]


def spread_of(found, what):
    """(standard deviation over seeds, degrees of freedom) of a quantity, pooled over the fine-tuned
    systems that have several seeds."""
    return spread([values_of(records, what) for name, records in found.items()
                   if is_finetuned(name) and not SYSTEMS[name].same_as])


def spread_table(found):
    pooled = {what: spread_of(found, what) for what in (*TASKS, "overall_2023")}
    if not all(freedom for _, freedom in pooled.values()):
        return []
    rows = [("standard deviation over seeds", *(f"{value:.4f}" for value, _ in pooled.values())),
            ("degrees of freedom", *(freedom for _, freedom in pooled.values()))]
    for what, seeds in (("one seed each", (1, 1)), ("one seed and three", (1, 3)),
                        ("three each", (3, 3))):
        least = [least_difference(*each, *seeds) for each in pooled.values()]
        rows.append((f"least significant difference, {what}", *(f"{x:.3f}" for x in least)))
    return table(("", *pooled), rows)


def claims_table(found):
    """What the reports conclude, beside what these runs show."""
    rows = []
    for claim in CLAIMS:
        if claim.base in found and claim.system in found:
            there = {what: claimed(claim, what) for what in claim.what}
            here = {what: measured(found, claim, what) for what in claim.what}
            rows.append((claim.report, claim.says, f"{claim.base}, {claim.system}",
                         lines_of_cell(there), lines_of_cell(here), claim.here))
    return table(("report", "it says", "from, to", "difference there",
                  "difference here [95 % interval]", "what these runs show"), rows)


def lines_of_cell(differences):
    return "<br>".join(f"{what} {value}" for what, value in differences.items() if value)


def claimed(claim, what):
    """The report's difference: of its two scores, or as it stands in the claim; else empty."""
    before, after = (report_score(SYSTEMS[name], what) for name in (claim.base, claim.system))
    there = claim.theirs.get(what)
    if before is not None and after is not None:
        there = after - before
    return "" if there is None else f"{there:+.3f}"


def report_score(system, what):
    if what == "overall_2023":
        return None if None in system.report else mean(system.report)
    return system.report[TASKS.index(what)] if what in TASKS else None


def measured(found, claim, what):
    """Our difference and its interval; empty where the score of one of the two does not count. No
    interval where the second is frozen, as the first then is too: the spread over seeds is that of
    fine-tuned systems."""
    before, after = (values_of(found[name], what) for name in (claim.base, claim.system))
    if not before or not after:
        return ""
    ours, least = difference(after, before, *spread_of(found, what))
    return verdict(ours, least if is_finetuned(claim.system) else None)


def quora_table(found):
    """Report 2's study: sequential training (2c) and MT-DNN's schedule (2d) as the Quora set
    shrinks."""
    rows = []
    for suffix, share in QUORA_SHARES.items():
        pair = [found.get(f"{name}{suffix}") for name in ("2c", "2d")]
        if all(pair):
            accuracy = [mean(scores(records, "para")) for records in pair]
            f1 = [mean(values_of(records, "F1 of para")) for records in pair]
            others = [mean(scores(records, task)) for records in pair for task in ("sst", "sts")]
            rows.append((f"1/{round(1 / share)}", *(f"{x:.3f}" for x in accuracy + f1),
                         f"{f1[0] - f1[1]:+.3f}", *(f"{x:.3f}" for x in others)))
    return table(("share of the pairs", "para 2c", "para 2d", "F1 2c", "F1 2d", "F1 2c - 2d",
                  "sst 2c", "sts 2c", "sst 2d", "sts 2d"), rows)


def gradients_table(found):
    """What surgery measured between the tasks' gradients: means over updates and seeds. The first
    of the two epochs is the first half."""
    rows = []
    for name in ("1d", "5d"):
        lines = [line for record in found.get(name, []) for line in record.steps]
        halves = [[line for line in lines if line["epoch"] == epoch] for epoch in (1, 2)]
        for pair in PAIRS if all(halves) else ():
            cosines = [mean_over_updates(half, "cosine", pair) for half in halves]
            others = [mean_over_updates(lines, key, pair)
                      for key in ("conflict", "magnitude_similarity")]
            rows.append((name, pair, *(f"{x:.3f}" for x in cosines),
                         *(f"{x:.2f}" for x in others)))
    return table(("system", "tasks", "cosine, first half", "cosine, second half",
                  "share of steps in conflict", "magnitude similarity"), rows)


def mean_over_updates(lines, key, pair):
    """Of what surgery measured. A line of metrics.jsonl is a mean itself, over its `updates`: ten,
    or fewer before a save; the oldest records, which have ten throughout, do not say it."""
    measured = [line["gradients"] for line in lines]
    return np.average([each[key][pair] for each in measured],
                      weights=[each.get("updates", 10) for each in measured])


def all_tables(found):
    """{name in README.md: the lines of a table}."""
    return {"scores": scores_table(found), "cfimdb": cfimdb_table(found),
            "spread": spread_table(found), "claims": claims_table(found),
            "quora": quora_table(found), "gradients": gradients_table(found)}


# ---------------------------------------------------------------- pictures

def draw_systems(found):
    """Each system's dev scores here, a dot per seed, and its report's, hollow. Without the smaller
    Quora sets, which have a picture of their own."""
    names = [name for name in found if "cfimdb" not in name and not SYSTEMS[name].same_as
             and not name.startswith(("2c-", "2d-"))]
    figure = Figure(figsize=(11, 0.24 * len(names) + 1), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for axes, task in zip(panels, TASKS):
        for i, name in enumerate(names):
            values = values_of(found[name], task)
            axes.plot(values, [i] * len(values), "o", ms=5, alpha=0.8, color=COLORS[task])
            report = SYSTEMS[name].report[TASKS.index(task)]
            if values and report is not None:
                axes.plot(report, i, "o", ms=5, mfc="none", color="gray")
        axes.set(title=f"{task}, {'Pearson r' if task == 'sts' else 'accuracy'}")
        axes.grid(alpha=0.3)
        axes.set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()  # the three share it
    panels[2].plot([], [], "o", color="black", label="here, a dot per seed")
    panels[2].plot([], [], "o", mfc="none", color="gray", label="the report")
    panels[2].legend(loc="lower left", fontsize="small")
    return figure


def draw_quora(found):
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axes, task in zip(figure.subplots(1, 3), TASKS):
        for name, style, what in (("2c", "o-", "sequential"), ("2d", "s--", "MT-DNN's schedule")):
            points = [(share, mean(scores(found[f"{name}{suffix}"], task)))
                      for suffix, share in QUORA_SHARES.items() if f"{name}{suffix}" in found]
            if points:
                axes.plot(*zip(*points), style, label=f"{name}: {what}")
        axes.set(xscale="log", title=task, xlabel="share of the Quora pairs", ylabel="dev score")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure


def draw_cosines(found):
    """The cosines between the tasks' gradients under PCGrad, a line per seed."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axes, pair in zip(figure.subplots(1, 3, sharey=True), PAIRS):
        for name, color in (("1d", "tab:purple"), ("5d", "tab:brown")):
            for i, record in enumerate(found.get(name, [])):
                lines = [line for line in record.steps if pair in line["gradients"]["cosine"]]
                steps = [line["step"] for line in lines]
                cosines = [line["gradients"]["cosine"][pair] for line in lines]
                axes.plot(moving_average(steps), moving_average(cosines), color=color, lw=0.9,
                          label=f"{name}, a line per seed" if i == 0 else None)
        axes.axhline(0, color="black", lw=0.5)
        axes.set(title=pair, xlabel="step", ylabel="cosine, mean over about 100 steps")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure


def moving_average(values, n=10):
    """Over n values, each of which is a mean over ten steps (or fewer). (N,) -> (N - n + 1,)."""
    return np.convolve(values, np.ones(n) / n, "valid")


PICTURES = {"systems.png": draw_systems, "quora.png": draw_quora, "cosines.png": draw_cosines}


def main():
    found = read_all()
    write_tables(PAGE, all_tables(found))
    write_tables(FRONT_PAGE, {"scores": front_table(found)})
    print("the tables of this folder's README.md and of the project's")
    for name, draw in PICTURES.items():
        draw(found).savefig(HERE / name, dpi=100)
        print(name)


if __name__ == "__main__":
    main()
