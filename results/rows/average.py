"""Dev scores of several runs, of the mean of their outputs, and of the mean of their weights (a model soup: Wortsman et
al. 2022). The last costs no more to use than one run.

    python results/rows/average.py RUN RUN ... --data_dir DIR     runs of the same flags, that differ in their seed
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from scipy.special import log_softmax

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from checkpoint import exit_status  # noqa: E402
from data.download import InputError  # noqa: E402
from data.tasks import TASKS, load_data, locate  # noqa: E402
from evaluation import decide, overall, predict, score  # noqa: E402
from multitask_classifier import MultitaskBERT  # noqa: E402

MUST_AGREE = ("option", "model", "pooling", "pair_head", "pal", "trained", "score_also")  # else a mean of weights is none


def dev_scores(outputs, data):
    """{task: (N, C)} -> {task: score}, and the overall scores where the three tasks are there."""
    scores = {name: score(data[name]["dev"].task, decide(data[name]["dev"].task, values), data[name]["dev"].labels)
              for name, values in outputs.items()}
    return scores | overall(scores)


def mean_of_outputs(outputs):
    """Means over the runs: of the log-probabilities of sst, the logits of para, the similarities. [{task: (N, C)}]."""
    comparable = [{name: log_softmax(values, axis=1) if values.shape[1] > 1 else values for name, values in run.items()}
                  for run in outputs]
    return {name: np.mean([run[name] for run in comparable], axis=0) for name in outputs[0]}


def mean_of_weights(models):
    """The first model, with the mean of all models' weights."""
    states = [model.state_dict() for model in models]
    models[0].load_state_dict({name: torch.stack([state[name] for state in states]).mean(dim=0) for name in states[0]})
    return models[0]


def main(argv=None):
    parser = argparse.ArgumentParser(description="Dev scores of runs, of their mean outputs and of their mean weights.")
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--data_dir", type=Path, default=None)
    args = parser.parse_args(argv)
    models = [MultitaskBERT.load(run) for run in args.runs]
    flags = [json.loads((Path(run) / "args.json").read_text(encoding="utf-8")) for run in args.runs]
    for run, theirs in zip(args.runs, flags):
        for name in MUST_AGREE:
            if theirs[name] != flags[0][name]:
                raise InputError(f"{run}: {name} is {theirs[name]} there and {flags[0][name]} in {args.runs[0]}; only runs "
                                 "that differ in their seed alone can be averaged")
    args.tasks = [name for name in models[0].tasks if name in TASKS]  # auxiliary tasks have no dev set
    cross = [name for name, head in models[0].pair_head.items() if head == "cross"]
    data = load_data(locate(args, splits=("dev",)), args.runs[0], models[0].bert.config, cross, skip_malformed=False)

    def outputs_of(model):
        return {name: predict(model, name, data[name]["dev"]) for name in args.tasks}

    outputs = [outputs_of(model) for model in models]
    rows = [*zip(args.runs, outputs), ("the mean of their outputs", mean_of_outputs(outputs)),
            ("the mean of their weights", outputs_of(mean_of_weights(models)))]
    for what, values in rows:
        print(f"{what}: " + "  ".join(f"{name} {value:.3f}" for name, value in dev_scores(values, data).items()))


if __name__ == "__main__":
    sys.exit(exit_status(main))
