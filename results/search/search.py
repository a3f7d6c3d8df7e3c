"""The first search for the best system, on a part of the Quora set: the defaults at 60,000 training
examples (120,000 where it says 2,000 updates), and what is added to them.

    python results/search/search.py show annealed+pal    print the commands of a system
    python results/search/search.py run default+pal --seeds 2 --data_dir DIR
                                                         train, and keep a record per run
    python results/search/search.py table                write the tables of README.md

DIR holds the course's files. All systems use the default encoder with mean pooling.
"""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from results import study  # noqa: E402
from results.scores import (TASKS, read_records, table, table_over, with_train,  # noqa: E402
                            write_tables)
from results.study import System  # noqa: E402

# the defaults: 1,000 updates of 16, 32 and 12 examples
DEFAULT = "--option finetune --epochs 4 --epoch_length 250"
LONGER = DEFAULT.replace("250", "500")
ANNEALED = "--option finetune --epochs 4 --epoch_length 750 --schedule annealed --batch_size 20"
SEARCH = {
    "default": System("the defaults", DEFAULT),
    "default+rate": System("at a rate of 2e-4", f"{DEFAULT} --lr 2e-4"),
    "default+longer": System("2,000 updates", LONGER),
    "default+annealed": System("annealed, batches of one task", ANNEALED),
    "default+cross": System("para cross-encoded", f"{DEFAULT} --pair_head para=cross,sts=cosine"),
    "default+pcgrad": System("PCGrad", f"{DEFAULT} --pcgrad"),
    "default+pal": System("PAL", f"{DEFAULT} --pal"),
    "default+proximal": System("the proximal term", f"{DEFAULT} --proximal"),
    "default+ordinal": System("ordinal log loss", f"{DEFAULT} --sst_loss oll1"),
    "default+mlm": System("MLM pretraining", DEFAULT, start="mlm"),
    "annealed+pal": System("annealed with PAL", f"{ANNEALED} --pal"),
    "longer+pal": System("2,000 updates with PAL", f"{LONGER} --pal"),
}
# report 5's mixed batches at three peak learning rates, 500 updates of 3 x 20 examples
MIXED = ("--option finetune --lr {} --epochs 4 --epoch_length 125 --schedule mixed "
         "--batch_size 20 --pair_head cross")
RATES = {f"5c-lr{rate}": System(f"a peak rate of {rate}", MIXED.format(rate))
         for rate in ("1e-4", "2e-4", "4e-4")}
STUDY = study.Study(HERE, {**SEARCH, **RATES}, {"mlm": "--lr 1e-4 --epochs 3 --epoch_length 500"})


def tables(folder=HERE):
    """{name in README.md: the lines of a table}."""
    found = {name: read_records(folder, name) for name in STUDY.systems}
    rates = [(RATES[name].what, *with_train(found[name])) for name in RATES if found[name]]
    head = ("what it is", "seeds", *(f"{task} (train)" for task in TASKS), "overall_2023")
    return {"search": table_over("default", SEARCH, found), "rates": table(head, rates)}


if __name__ == "__main__":
    study.main(STUDY, __doc__.split("\n\n")[0],
               write_tables=lambda: write_tables(HERE / "README.md", tables()))
