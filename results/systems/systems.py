"""Every system of the five reports at one budget: 30,000 training examples each, on the whole sets
(2g: on parts of the Quora pairs). Yelp's 2,000 in 5e and 5g, and what a system starts from, come on
top.

    python results/systems/systems.py show 4f            print the commands of a system, at its
                                                         report's own settings and at this budget
    python results/systems/systems.py run 5c 5d --seeds 1 2 3 --data_dir DIR
                                                         train, and keep a record per run

DIR holds the course's files, and yelp-train.csv (id, sentence, sentiment 0 to 4) for 5e and 5g. The
records are beside this file, NAME-SEED (results/study.py says what is in them); README.md has the
tables that tables.py makes from them.

All systems use the default encoder with mean pooling. The fine-tuned ones have a peak learning
rate of 2e-4 (the best of three in results/search/), 1f half of it; the frozen ones have the
reports' 1e-3. Two evaluations each, half way and at the end; annealed systems have four.
"""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]
from reports import REPORTS, SMART, SST_ALONE  # noqa: E402
from results import study  # noqa: E402
from results.study import System  # noqa: E402

# 500 updates with 20 examples of each of the three tasks, 750 with those of two, or 1,500 with 20
# examples of one task; annealed in four epochs, since the tasks' shares change with the epoch
STEPS = "--epochs 2 --epoch_length 250 --batch_size 20"
ONE_TASK_STEPS = "--epochs 2 --epoch_length 750 --batch_size 20"
TWO_TASK_STEPS = "--epochs 2 --epoch_length 375 --batch_size 20 --tasks sst,para --score_also sts"
ANNEALED_STEPS = "--epochs 4 --epoch_length 375 --batch_size 20"
# report 5's proportions, 2 / 24 / 2, at 60 examples per update
MIXED_STEPS = "--epochs 2 --epoch_length 250 --batch_size sst=4,para=52,sts=4"
# and 4 reviews per update beside them, of a quarter of the file
MIXED_YELP_STEPS = f"{MIXED_STEPS},yelp=4 --aux yelp=DATA/yelp-train.csv --limit yelp=0.25"

FINETUNE = "--option finetune --lr 2e-4"
FROZEN = "--option pretrain --lr 1e-3"
SEQUENTIAL = f"{FINETUNE} {ONE_TASK_STEPS} --schedule sequential"
MTDNN = f"{FINETUNE} {ONE_TASK_STEPS} --schedule mtdnn --upsample --pair_head uv"
REPORT_3 = "--pair_head para=uv,sts=cosine --hidden_dropout_prob 0.1"
REPORT_4 = "--weight_decay 0.01 --hidden_dropout_prob 0.2"
ANNEALED = f"{FINETUNE} {ANNEALED_STEPS} --schedule annealed --pair_head cross {REPORT_4}"
MIXED = f"{FINETUNE} {MIXED_STEPS} --schedule mixed --pair_head cross"
MIXED_YELP = f"{FINETUNE} {MIXED_YELP_STEPS} --schedule mixed --pair_head cross"

SIZES = {"sst": 8544, "para": 144903, "sts": 6040, "cfimdb": 1707, "yelp": 9998}  # to train on
QUORA_PARTS = (4, 16, 64)  # 2g: this part of the Quora pairs, 1/4 and so on
PRETRAINING = {
    "mlm": "--lr 1e-4 --epochs 3 --epoch_length 500",
    "mlm-fast": "--lr 1e-3 --epochs 3 --epoch_length 500",
}
SYSTEMS = {
    "1a": System("sentiment alone", f"{FINETUNE} {ONE_TASK_STEPS} {SST_ALONE} --pair_head uv_diff",
                 (.416, .376, .019)),
    "1b": System("round robin, [u; v; abs(u - v)]", f"{FINETUNE} {STEPS} --pair_head uv_diff",
                 (.485, .853, .635)),
    # NOT_IN_THE_REPORTS: other heads in 1b and 4a, for the first table of the project's README
    "4a-cosine": System("4a with a cosine for para too",
                        f"{FROZEN} {TWO_TASK_STEPS} --pair_head cosine {REPORT_4}"),
    "1b-uv": System("1b with [u; v]", f"{FINETUNE} {STEPS} --pair_head uv"),
    "1b-cosine": System("1b with cosines", f"{FINETUNE} {STEPS} --pair_head cosine"),
    "1b-cross": System("1b cross-encoded", f"{FINETUNE} {STEPS} --pair_head cross"),
    "1c": System("1b after MLM pretraining", f"{FINETUNE} {STEPS} --pair_head uv_diff",
                 (.509, .815, .677), start="mlm"),
    "1d": System("1b with PCGrad", f"{FINETUNE} {STEPS} --pair_head uv_diff --pcgrad",
                 (.485, .840, .660)),
    "1e": System("1c with PCGrad", f"{FINETUNE} {STEPS} --pair_head uv_diff --pcgrad",
                 (.469, .844, .650), start="mlm"),
    "1f": System("1b, half the rate, twice the batch, dropout .5",
                 "--option finetune --lr 1e-4 --epochs 2 --epoch_length 125 --batch_size 40 "
                 "--hidden_dropout_prob 0.5 --pair_head uv_diff",
                 (.506, .796, .632)),
    "2a": System("sentiment alone", "", (.511, None, None), same_as="1a"),
    "2a-frozen": System("frozen, sentiment alone", f"{FROZEN} {ONE_TASK_STEPS} --tasks sst",
                        (.416, None, None)),
    # report 2 has no scores of CFIMDB: these are report 3's
    "2a-cfimdb": System("CFIMDB alone", f"{FINETUNE} {ONE_TASK_STEPS} --tasks cfimdb",
                 (.963, None, None)),
    "2a-cfimdb-frozen": System("frozen, CFIMDB alone", f"{FROZEN} {ONE_TASK_STEPS} --tasks cfimdb",
                 (.780, None, None)),
    "2b": System("sentiment alone", "", (.262, .375, .001), same_as="1a"),
    "2c": System("sequential, [u; v]", f"{SEQUENTIAL} --pair_head uv", (.478, .811, .403)),
    "2d": System("MT-DNN's schedule, up-sampled", MTDNN, (.511, .522, .395)),
    "2e": System("2c after MLM pretraining at 1e-3", f"{SEQUENTIAL} --pair_head uv",
                 (.506, .806, .442), start="mlm-fast"),
    "2f": System("2e with a cosine for sts", f"{SEQUENTIAL} --pair_head para=uv,sts=cosine",
                 (.502, .807, .403), start="mlm-fast"),
    # 2g: 2c and 2d as the Quora set shrinks
    **{f"{name}-{part}th": System(f"{name}, 1/{part} of the pairs",
                                  f"{flags} --limit para={1 / part}")
       for name, flags in (("2c", f"{SEQUENTIAL} --pair_head uv"), ("2d", MTDNN))
       for part in QUORA_PARTS},
    "3a": System("frozen, sentiment alone, dropout .1",
                 f"{FROZEN} {ONE_TASK_STEPS} {SST_ALONE} {REPORT_3}",
                 (.415, .609, -.072)),
    "3b": System("sentiment alone, dropout .1",
                 f"{FINETUNE} {ONE_TASK_STEPS} {SST_ALONE} {REPORT_3}",
                 (.529, .381, .246)),
    "3c": System("3b with SMART and the proximal term",
                 f"{FINETUNE} {ONE_TASK_STEPS} {SST_ALONE} {REPORT_3} {SMART}",
                 (.518, .371, .307)),
    "3d": System("round robin, cosine for sts", f"{FINETUNE} {STEPS} {REPORT_3}",
                 (.500, .695, .496)),
    "3e": System("3d with SMART and the proximal term", f"{FINETUNE} {STEPS} {REPORT_3} {SMART}",
                 (.505, .719, .567)),
    "4a": System("frozen, pairs apart: [u; v], a cosine for sts",
                 f"{FROZEN} {TWO_TASK_STEPS} --pair_head para=uv,sts=cosine {REPORT_4}",
                 (.383, .519, .101)),
    "4b": System("4a cross-encoded", f"{FROZEN} {STEPS} --pair_head cross {REPORT_4}",
                 (.383, .622, .428)),
    "4c": System("round robin, cross-encoded", f"{FINETUNE} {STEPS} --pair_head cross {REPORT_4}",
                 (.451, .766, .813)),
    "4d": System("4c, annealed", ANNEALED, (.469, .805, .822)),
    "4e": System("4d with the heads of 4b", ANNEALED, (.488, .805, .841), start="4b"),
    "4e-pal": System("4e with projected layers per task", f"{ANNEALED} --pal --pal_g identity",
                     (.492, .810, .843), start="4b"),
    "4f": System("4e-pal with SMART",
                 f"{ANNEALED} --pal --pal_g identity --smart --smart_eps 1e-6 --smart_sigma 3.2e-3",
                 (.506, .818, .875), start="4b"),
    "5a": System("frozen, cross-encoded", f"{FROZEN} {STEPS} --pair_head cross",
                 (.390, .702, .457)),
    "5b": System("sequential, cross-encoded, an optimizer per task",
                 f"{SEQUENTIAL} --tasks para,sst,sts --optimizer_per_task --pair_head cross",
                 (.510, .877, .830)),
    "5c": System("mixed batches, cross-encoded", MIXED, (.524, .872, .855)),
    "5c-.5": System("5c with dropout .5", f"{MIXED} --hidden_dropout_prob 0.5", (.505, .872, .849)),
    "5d": System("5c with PCGrad", f"{MIXED} --pcgrad", (.515, .871, .849)),
    "5d-.5": System("5d with dropout .5", f"{MIXED} --pcgrad --hidden_dropout_prob 0.5",
                 (.513, .877, .855)),
    "5e": System("5c with Yelp reviews", MIXED_YELP, (.510, .875, .851)),
    "5e-.5": System("5e with dropout .5", f"{MIXED_YELP} --hidden_dropout_prob 0.5",
                 (.501, .877, .846)),
    "5f": System("frozen, a cosine for para alone",
                 f"{FROZEN} {ONE_TASK_STEPS} --tasks para --pair_head cosine"),
    "5g": System("5e with PCGrad on four gradients", f"{MIXED_YELP} --pcgrad"),
    "5g-sum": System("5e with PCGrad on two gradients: the sum of the three, Yelp",
                   f"{MIXED_YELP} --pcgrad sst+para+sts,yelp"),
}
NOT_IN_THE_REPORTS = ("4a-cosine", "1b-uv", "1b-cosine", "1b-cross")
STUDY = study.Study(HERE, SYSTEMS, PRETRAINING)


def show(study_, name, seed):
    """Print the commands of a system, at its report's settings and at the budget of this study."""
    what, commands = REPORTS[name[:2]]
    if name not in NOT_IN_THE_REPORTS:
        print(f"# {name[:2]}, {what}, at its report's settings; not run here at this size")
        print("\n".join(commands))
    print("# at the budget of results/systems/README.md")
    shrunk = [f"{base}-{part}th" for base in ("2c", "2d") for part in QUORA_PARTS]
    for each in shrunk if name == "2g" else [name]:
        study.show(study_, each, seed)


if __name__ == "__main__":
    study.main(STUDY, __doc__.splitlines()[0], show, [*SYSTEMS, "2g"])
