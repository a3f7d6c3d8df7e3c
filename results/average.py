"""Dev scores of several runs, of the mean of their outputs and, where their models have the same
parts, of the mean of their weights (a model soup: Wortsman et al. 2022).

    python results/average.py RUN RUN ... --data_dir DIR                the scores
    python results/average.py RUN RUN ... --data_dir DIR --out FOLDER   and the mean's predictions

FOLDER gets scores.json and, in the course's submission format, the predictions of the mean of the
outputs for the dev and test files. To predict with the mean of the outputs takes all the models,
with the mean of the weights only one.

Dimensions: N examples, C outputs of a task.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from scipy.special import log_softmax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.tasks import TASKS, find_data_files, load_data  # noqa: E402
from multitask_classifier import MultitaskBERT  # noqa: E402
from support.evaluation import (overall, predict, score, to_predictions,  # noqa: E402
                                write_predictions)
from support.files import InputError  # noqa: E402
from support.run import exit_status  # noqa: E402

# the flags in which runs must agree for a mean of their weights to be a model
MUST_AGREE = ("option", "model", "pooling", "pair_head", "pal", "pal_size", "pal_g", "trained",
              "score_also")


# ---------------------------------------------------------------- means

def mean_of_outputs(outputs):
    """Means over the runs: of the log-probabilities of sst, the logits of para, the similarities.
    [{(task, split): (N, C)}] -> {(task, split): (N, C)}."""
    # logits of classes are comparable between runs only once they are normalized
    comparable = [{key: log_softmax(values, axis=1) if values.shape[1] > 1 else values
                   for key, values in run.items()} for run in outputs]
    return {key: np.mean([run[key] for run in comparable], axis=0) for key in outputs[0]}


def mean_of_weights(models):
    """The first model, which gets the mean of all models' weights."""
    states = [model.state_dict() for model in models]
    means = {name: torch.stack([state[name] for state in states]).mean(dim=0)
             for name in states[0]}
    models[0].load_state_dict(means)
    return models[0]


def differing_flags(runs):
    """The names in MUST_AGREE of which two runs have different values."""
    flags = [json.loads((Path(run) / "args.json").read_text(encoding="utf-8")) for run in runs]
    return [name for name in MUST_AGREE if any(each[name] != flags[0][name] for each in flags)]


# ---------------------------------------------------------------- what is read, predicted, written

def load_sets(run, model, args):
    """{task: {split: Examples}}, tokenized as the run needs them."""
    cross = [name for name, head in model.pair_head.items() if head == "cross"]
    splits = ("dev", "test") if args.out else ("dev",)
    return load_data(find_data_files(args, splits), run, model.bert.config, cross,
                     skip_malformed=False)


def outputs_of(model, data):
    """{(task, split): (N, C)}"""
    return {(name, split): predict(model, name, examples)
            for name, splits in data.items() for split, examples in splits.items()}


def dev_scores(outputs, data):
    """{task: score}, and the overall scores where all three tasks are scored."""
    scores = {}
    for name, splits in data.items():
        values = to_predictions(splits["dev"].task, outputs[name, "dev"])
        scores[name] = score(splits["dev"].task, values, splits["dev"].labels)
    return scores | overall(scores)


def write_mean(folder, outputs, data, scores):
    """Write predictions and scores.json."""
    folder.mkdir(parents=True)
    for (name, split), values in outputs.items():
        write_predictions(folder / f"{name}-{split}-output.csv", data[name][split], values)
    (folder / "scores.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Dev scores of runs and of their means.")
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--data_dir", type=Path)
    parser.add_argument("--out", type=Path, metavar="FOLDER",
                        help="a new folder for the scores and for the predictions of the mean of "
                             "the outputs")
    args = parser.parse_args(argv)
    if args.out and args.out.exists():
        raise InputError(f"--out {args.out}: exists already; name a new folder")

    models = [MultitaskBERT.load(run) for run in args.runs]
    args.tasks = [name for name in models[0].tasks if name in TASKS]  # an --aux task has no dev set
    for run, model in zip(args.runs, models):
        if args.tasks != [name for name in model.tasks if name in TASKS]:
            raise InputError(f"{run} has other tasks than {args.runs[0]}, so there is no mean")

    scores, outputs = {}, []

    def report(what, values, data):
        scores[what] = dev_scores(values, data)
        print(f"{what}: " + "  ".join(f"{name} {value:.3f}"
                                      for name, value in scores[what].items()), flush=True)

    for run, model in zip(args.runs, models):
        data = load_sets(run, model, args)
        outputs.append(outputs_of(model, data))
        report(run, outputs[-1], data)
    # from here on `data` is the last run's: the labels are the same for all
    mean = mean_of_outputs(outputs)
    report("the mean of their outputs", mean, data)

    differing = differing_flags(args.runs)
    if differing:
        print(f"the runs differ in {', '.join(differing)}, so their weights have no mean")
    else:  # then all runs read the data alike
        dev = {name: {"dev": splits["dev"]} for name, splits in data.items()}
        report("the mean of their weights", outputs_of(mean_of_weights(models), dev), dev)
    if args.out:
        write_mean(args.out, mean, data, scores)
        predicted = ", ".join(f"{name} {split}" for name, split in mean)
        print(f"{args.out}: scores.json, predictions for {predicted}")


if __name__ == "__main__":
    sys.exit(exit_status(main))
