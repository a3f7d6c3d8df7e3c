"""The commands of every system of the five reports at the reports' own settings: bert-base-uncased
at its [CLS] token, ten epochs (2g: five; 5f: mean pooling). They have not been run at full size
here; README.md says what differs from the reports. To print them:

    python results/systems/systems.py show 4f

The course's training script has a constant learning rate, no warm-up and no clipping; only report
5 mentions a decay (5b). Where a report is silent, the default stands. The Yelp reviews of 5e and 5g
cannot be passed on: a demo file stands in their place.
"""
TRAIN = ("python multitask_classifier.py --model bert-base-uncased --pooling cls "
         "--lr_schedule constant --warmup 0 --clip 0")
FINETUNE = f"{TRAIN} --option finetune"

REPORT_1 = f"{FINETUNE} --pair_head uv_diff --lr 1e-5 --batch_size 8"
MLM = "python pretrain_mlm.py --model bert-base-uncased --out runs/mlm"
TENSOR = "--pcgrad --surgery_scope tensor"  # report 1 projects parameter by parameter

SST_ALONE = "--tasks sst --score_also para,sts"
SEQUENTIAL = f"{FINETUNE} --schedule sequential --pair_head uv --lr 1e-5 --batch_size 32"
# as many steps as the course's Quora set has batches of 32
MTDNN = (f"{FINETUNE} --schedule mtdnn --upsample --epoch_length {{}} --pair_head uv --lr 1e-5 "
         "--batch_size 32")
MLM_FAST = "python pretrain_mlm.py --model bert-base-uncased --lr 1e-3 --out runs/mlm-fast"
QUORA_SIZES = {"2c-whole": f"{SEQUENTIAL} --epochs 5 --limit para=1",
               "2c-half": f"{SEQUENTIAL} --epochs 5 --limit para=0.5",
               "2c-quarter": f"{SEQUENTIAL} --epochs 5 --limit para=0.25",
               "2d-whole": f"{MTDNN.format(4423)} --epochs 5 --limit para=1",
               "2d-half": f"{MTDNN.format(2212)} --epochs 5 --limit para=0.5",
               "2d-quarter": f"{MTDNN.format(1106)} --epochs 5 --limit para=0.25"}
PLOT = ("python support/plots.py " + " ".join(f"runs/{name}" for name in QUORA_SIZES)
        + " --out runs/quora.png")

HEADS_3 = "--pair_head para=uv,sts=cosine"
DROPOUT_3 = "--hidden_dropout_prob 0.1"
ROUND_ROBIN_3 = (f"{FINETUNE} {HEADS_3} --epoch_length shortest --lr 1e-5 {DROPOUT_3} "
                 "--batch_size 8")
SMART = "--smart --proximal --proximal_mu 0.8 --proximal_beta 0.95"

REPORT_4 = "--weight_decay 0.01 --hidden_dropout_prob 0.2 --batch_size 32"
ANNEALED = f"{FINETUNE} --schedule annealed --pair_head cross --lr 1e-5 {REPORT_4}"
TRAINED_HEADS = f"{TRAIN} --pair_head cross --lr 1e-3 {REPORT_4} --name 4b"
PAL = f"{ANNEALED} --init_from runs/4b --pal --pal_g identity"
BEST_4 = f"{PAL} --smart --smart_eps 1e-6 --smart_sigma 3.2e-3"

MIXED = (f"{FINETUNE} --schedule mixed --batch_size sst=2,para=24,sts=2 --pair_head cross "
         "--lr 1e-5")
YELP = (f"{FINETUNE} --schedule mixed --aux yelp=data/demo/stars-train.csv "
        "--batch_size sst=2,para=24,sts=2,yelp=2 --pair_head cross --lr 1e-5")
DROPOUT_5 = "--hidden_dropout_prob 0.5"

# {system, named after its report: (what it is, its commands in their order)}
REPORTS = {
    "1a": ("trained on sentiment only, scored on all three",
           [f"{REPORT_1} {SST_ALONE}"]),
    "1b": ("round robin over the longest set, [u; v; abs(u - v)]", [REPORT_1]),
    "1c": ("1b after MLM pretraining", [MLM, f"{REPORT_1} --model runs/mlm"]),
    "1d": ("1b with gradient surgery, parameter by parameter", [f"{REPORT_1} {TENSOR}"]),
    "1e": ("1c with gradient surgery", [MLM, f"{REPORT_1} {TENSOR} --model runs/mlm"]),
    "1f": ("1b, smaller rate, larger batch, more dropout",
           [f"{FINETUNE} --pair_head uv_diff --lr 5e-6 --batch_size 16 "
            "--hidden_dropout_prob 0.5"]),
    "2a": ("one task alone, frozen and fine-tuned",
           [f"{TRAIN} --tasks sst --lr 1e-3 --batch_size 64",
            f"{TRAIN} --tasks cfimdb --lr 1e-3 --batch_size 8",
            f"{FINETUNE} --tasks sst --lr 1e-5 --batch_size 64",
            f"{FINETUNE} --tasks cfimdb --lr 1e-5 --batch_size 8"]),
    "2b": ("trained on sentiment only",
           [f"{FINETUNE} {SST_ALONE} --pair_head uv --lr 1e-5 --batch_size 32"]),
    "2c": ("sequential, [u; v]", [SEQUENTIAL]),
    "2d": ("MT-DNN's schedule, small sets up-sampled", [MTDNN.format(4423)]),
    "2e": ("2c after MLM pretraining", [MLM_FAST, f"{SEQUENTIAL} --model runs/mlm-fast"]),
    "2f": ("2e with a cosine for similarity",
           [MLM_FAST, f"{FINETUNE} --schedule sequential {HEADS_3} --lr 1e-5 --batch_size 32 "
                      "--model runs/mlm-fast"]),
    "2g": ("2c against 2d as the Quora set shrinks",
           [*(f"{command} --name {name}" for name, command in QUORA_SIZES.items()), PLOT]),
    "3a": ("frozen, sentiment head only",
           [f"{TRAIN} {SST_ALONE} {HEADS_3} --lr 1e-3 {DROPOUT_3} --batch_size 64"]),
    "3b": ("fine-tuned on sentiment only",
           [f"{FINETUNE} {SST_ALONE} {HEADS_3} --lr 1e-5 {DROPOUT_3} --batch_size 64"]),
    "3c": ("3b with SMART and its proximal term",
           [f"{FINETUNE} {SST_ALONE} {HEADS_3} --lr 1e-5 {DROPOUT_3} --batch_size 8 {SMART}"]),
    "3d": ("round robin as long as the shortest set, cosine for similarity", [ROUND_ROBIN_3]),
    "3e": ("3d with SMART and its proximal term", [f"{ROUND_ROBIN_3} {SMART}"]),
    "4a": ("frozen, pairs encoded apart, a cosine for similarity",
           [f"{TRAIN} --tasks sst,para --score_also sts {HEADS_3} --lr 1e-3 {REPORT_4}"]),
    "4b": ("4a cross-encoded", [TRAINED_HEADS]),
    "4c": ("fine-tuned, cross-encoded, round robin; long and short epochs",
           [f"{FINETUNE} --pair_head cross --lr 1e-5 {REPORT_4}{length}"
            for length in ("", " --epoch_length shortest")]),
    "4d": ("4c with annealed sampling", [ANNEALED]),
    "4e": ("4d with the heads of 4b, without and with low-rank layers per task",
           [TRAINED_HEADS, f"{ANNEALED} --init_from runs/4b", PAL]),
    "4f": ("4e with SMART; tried besides: ordinal log loss, surgery, vaccine, PAL with attention",
           [TRAINED_HEADS, BEST_4, *(f"{BEST_4} {more}" for more in (
               "--sst_loss oll1", "--pcgrad --accumulate 3", "--gradvac --accumulate 3",
               "--pal_g attention"))]),
    "5a": ("frozen, cross-encoded", [f"{TRAIN} --pair_head cross --lr 1e-3 --batch_size 32"]),
    "5b": ("sequential (para, sst, sts), an optimizer with a decay for each",
           [f"{FINETUNE} --tasks para,sst,sts --schedule sequential --optimizer_per_task "
            "--lr_schedule linear --pair_head cross --lr 1e-5 --batch_size 32"]),
    "5c": ("batches in proportion to the sets; dropout .3 and .5",
           [MIXED, f"{MIXED} {DROPOUT_5}"]),
    "5d": ("5c with gradient surgery", [f"{MIXED} --pcgrad", f"{MIXED} --pcgrad {DROPOUT_5}"]),
    "5e": ("5c with 2,500 Yelp reviews as a fourth task", [YELP, f"{YELP} {DROPOUT_5}"]),
    "5f": ("its first attempt: frozen, paraphrase alone, a cosine of means",
           [f"{TRAIN} --tasks para --pooling mean --pair_head cosine --lr 1e-3 --batch_size 32"]),
    "5g": ("surgery with four gradients, or with the sum of three against Yelp's",
           [f"{YELP} --pcgrad", f"{YELP} --pcgrad sst+para+sts,yelp"]),
}
