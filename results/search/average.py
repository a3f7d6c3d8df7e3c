"""Dev scores of several runs, of the mean of their outputs, and of the mean of their weights (a
model soup: Wortsman et al. 2022). The last costs no more to use than one run.

    python results/search/average.py RUN RUN ... --data_dir DIR     runs that differ in their seed

Dimensions: N examples, C outputs of a task.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from scipy.special import log_softmax

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.tasks import TASKS, find_data_files, load_data  # noqa: E402
from multitask_classifier import MultitaskBERT  # noqa: E402
from support.evaluation import overall, predict, score, to_predictions  # noqa: E402
from support.files import InputError  # noqa: E402
from support.run import exit_status  # noqa: E402

# the flags in which runs must agree for a mean of their weights to be a model
MUST_AGREE = ("option", "model", "pooling", "pair_head", "pal", "pal_size", "pal_g", "trained",
              "score_also")


def dev_scores(outputs, data):
    """{task: (N, C)} -> {task: score}, and the overall scores where all three tasks are scored."""
    scores = {}
    for name, values in outputs.items():
        dev = data[name]["dev"]
        scores[name] = score(dev.task, to_predictions(dev.task, values), dev.labels)
    return scores | overall(scores)


def mean_of_outputs(outputs):
    """Means over the runs: of the log-probabilities of sst, the logits of para, the similarities.
    [{task: (N, C)}] -> {task: (N, C)}."""
    # logits of classes are comparable between runs only once they are normalized
    comparable = [{name: log_softmax(values, axis=1) if values.shape[1] > 1 else values
                   for name, values in run.items()} for run in outputs]
    return {name: np.mean([run[name] for run in comparable], axis=0) for name in outputs[0]}


def mean_of_weights(models):
    """The first model, with the mean of all models' weights."""
    states = [model.state_dict() for model in models]
    means = {name: torch.stack([state[name] for state in states]).mean(dim=0)
             for name in states[0]}
    models[0].load_state_dict(means)
    return models[0]


def check_agreement(runs):
    """Raises InputError where two runs differ in more than their seed."""
    flags = [json.loads((Path(run) / "args.json").read_text(encoding="utf-8")) for run in runs]
    for run, theirs in zip(runs, flags):
        for name in MUST_AGREE:
            if theirs[name] != flags[0][name]:
                raise InputError(f"{run}: {name} is {theirs[name]} there and {flags[0][name]} in "
                                 f"{runs[0]}; only runs that differ in their seed alone can be "
                                 "averaged")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="Dev scores of runs, of their mean outputs and of their mean weights.")
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--data_dir", type=Path, default=None)
    args = parser.parse_args(argv)
    models = [MultitaskBERT.load(run) for run in args.runs]
    check_agreement(args.runs)

    args.tasks = [name for name in models[0].tasks if name in TASKS]  # an auxiliary has no dev set
    cross = [name for name, head in models[0].pair_head.items() if head == "cross"]
    data = load_data(find_data_files(args, splits=("dev",)), args.runs[0], models[0].bert.config,
                     cross, skip_malformed=False)

    def outputs_of(model):
        return {name: predict(model, name, data[name]["dev"]) for name in args.tasks}

    outputs = [outputs_of(model) for model in models]
    lines = [*zip(args.runs, outputs),
             ("the mean of their outputs", mean_of_outputs(outputs)),
             ("the mean of their weights", outputs_of(mean_of_weights(models)))]
    for what, values in lines:
        scores = dev_scores(values, data)
        print(f"{what}: " + "  ".join(f"{name} {value:.3f}" for name, value in scores.items()))


if __name__ == "__main__":
    sys.exit(exit_status(main))
