"""The search for a recipe that a student can run overnight on a CPU and that beats the reports.

    python results/recipe/recipe.py show phrases         print the commands of a system
    python results/recipe/recipe.py run phrases --seeds 2 --data_dir DIR
                                                         train, and keep a record per run

DIR holds the course's files, and ids-sst-phrases-train.csv, the labelled phrases of the treebank's
training sentences. All systems use the default encoder with mean pooling.
"""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from results import study  # noqa: E402
from results.study import System  # noqa: E402

PHRASES = "--sst_train DATA/ids-sst-phrases-train.csv"
# with these batches, two passes over the pairs, nearly as many over the phrases, and six over sts
LONG = "--option finetune --lr 2e-4 --epochs 4 --epoch_length 1132"
BATCHES = "--batch_size sst=64,para=64,sts=8"
HEADS = "--pair_head para=cross,sts=cosine"
SYSTEMS = {
    "phrases": System("phrases in place of sentences, para cross-encoded, two passes",
                      f"{LONG} {BATCHES} {HEADS} {PHRASES}"),
}
STUDY = study.Study(HERE, SYSTEMS)


if __name__ == "__main__":
    study.main(STUDY, __doc__.split("\n\n")[0])
