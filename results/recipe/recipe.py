"""The search for a recipe that a student can run overnight on a CPU and whose overall_2023 is above
that of every report.

    python results/recipe/recipe.py show full            print the command of a system
    python results/recipe/recipe.py run full --seeds 2 --data_dir DIR
                                                         train with seed 2, and keep a record
    python results/recipe/recipe.py table                write the tables of README.md

DIR (DATA in what `show` prints) holds the course's files, and ids-sst-phrases-train.csv, the
labelled phrases of the treebank's training sentences (python data/phrases.py). All systems use the
default encoder with mean pooling.
"""
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from results import study  # noqa: E402
from results.scores import TASKS, cell, read_records, table, table_over, write_tables  # noqa: E402
from results.study import System  # noqa: E402

PHRASES = "--sst_train DATA/ids-sst-phrases-train.csv"
HEADS = "--pair_head para=cross,sts=cosine"
FULL = ("--option finetune --epochs 4 --epoch_length 2000 --schedule annealed "
        "--batch_size sst=64,para=96,sts=64 --lr 2e-4")
# one task per step: a batch of phrases, of Quora pairs or of STS pairs
ONE_TASK = "--schedule annealed --batch_size sst=64,para=64,sts=32"
# short runs, to choose between settings
SHORT = f"--option finetune --epochs 2 --epoch_length 1250 {ONE_TASK}"
BATCHES = ("--option finetune --epochs 2 --epoch_length 1000 --schedule annealed "
           "--batch_size sst=32,para=96,sts=64 --lr 2e-4")
TOGETHER = ("--option finetune --epochs 2 --epoch_length 560 "  # with the default, round_robin
            "--batch_size sst=64,para=64,sts=8 --lr 2e-4")
SYSTEMS = {
    "short+cosine": System("the short run, with the settings above",
                           f"{SHORT} --lr 2e-4 {HEADS} {PHRASES}"),
    "short+cross": System("STS pairs as one sequence too",
                          f"{SHORT} --lr 2e-4 --pair_head cross {PHRASES}"),
    "short+cosines": System("Quora pairs by a cosine too",
                            f"{SHORT} --lr 2e-4 --pair_head cosine {PHRASES}"),
    "short+sentences": System("the treebank's sentences instead of its phrases",
                              f"{SHORT} --lr 2e-4 {HEADS}"),
    "short+rate": System("a learning rate of 1e-4", f"{SHORT} --lr 1e-4 {HEADS} {PHRASES}"),
    "short+pal": System("with projected attention layers (PAL)",
                        f"{SHORT} --lr 2e-4 {HEADS} --pal {PHRASES}"),
    "short+batches": System("2,000 steps of 32 phrases, 96 Quora pairs or 64 STS pairs",
                            f"{BATCHES} {HEADS} {PHRASES}"),
    "short+together": System("1,120 steps of all three tasks: 64 phrases, 64 Quora pairs and 8 STS "
                             "pairs", f"{TOGETHER} {HEADS} {PHRASES}"),
    "full": System("8,000 steps of 64 phrases, 96 Quora pairs or 64 STS pairs",
                   f"{FULL} {HEADS} {PHRASES}"),
    "annealed": System("10,000 steps, a learning rate of 1e-4, STS pairs as one sequence too",
                       f"--option finetune --epochs 4 --epoch_length 2500 {ONE_TASK} --lr 1e-4 "
                       f"--pair_head cross {PHRASES}"),
    "cfimdb": System("annealed, then the reviews of CFIMDB alone",
                     "--option finetune --tasks cfimdb --epochs 3 --batch_size 16 --lr 5e-5",
                     start="annealed"),
}
RECIPE = ("annealed", "short+cosine")  # the systems whose outputs are averaged
STUDY = study.Study(HERE, SYSTEMS)


def mean_table(folder):
    """The two runs of the recipe and the mean of their outputs, over the seeds that have a
    mean-SEED.json, the scores.json of results/average.py."""
    kept = {path.stem.removeprefix("mean-"): json.loads(path.read_text())
            for path in sorted(folder.glob("mean-*.json"))}
    names = {name: f"runs/recipe/{name}-SEED" for name in RECIPE}
    names |= {"the mean of their outputs": "the mean of their outputs"}
    rows = []
    for what, name in names.items():
        found = [scores[name.replace("SEED", seed)] for seed, scores in kept.items()]
        columns = [cell([scores[column] for scores in found])
                   for column in (*TASKS, "overall_2023")]
        rows.append((what, len(kept), *columns))
    return table(("", "seeds", *TASKS, "overall_2023"), rows)


def tables(folder=HERE):
    """{name in README.md: the lines of a table}."""
    multitask = {name: system for name, system in SYSTEMS.items() if name != "cfimdb"}
    found = {name: read_records(folder, name) for name in multitask}
    return {"mean": mean_table(folder), "recipe": table_over("short+cosine", multitask, found)}


if __name__ == "__main__":
    study.main(STUDY, __doc__.split("\n\n")[0],
               write_tables=lambda: write_tables(HERE / "README.md", tables()))
