"""What a model predicts, and how good that is: scores, F1, confusion matrix, the largest errors,
submission files.

Dimensions: N examples, C outputs of a task (classes; or one logit, or one similarity).
"""
import csv

import numpy as np
import torch
from scipy.special import log_softmax
from scipy.stats import pearsonr
from tqdm import tqdm

from data.batches import evaluation_batches, seed_of
from support.devices import rank_and_world, sum_over_processes
from support.files import InputError, write_atomically
from support.run import RunFailed

TRAIN_SAMPLE = 2000  # examples per task of the train score: all would cost more than a short run
MAX_ERRORS = 50  # examples per task in errors.csv


# ---------------------------------------------------------------- predictions

@torch.no_grad()
def predict(model, task, examples, indices=None):
    """The outputs (N, C) in the order of `indices` (default: all). Leaves train or eval mode as it
    was."""
    indices = np.arange(len(examples)) if indices is None else indices
    # each process predicts its share; the others' outputs are zero in the sum
    rank, world = rank_and_world()
    training = model.training
    model.eval()
    outputs = torch.zeros(len(examples), examples.task.num_outputs, device=model.device)
    share, where, found = indices[rank::world], [], []
    # the bar appears where a set takes longer than three seconds
    with tqdm(total=len(share), desc=f"predicting {task}", unit="example", leave=False, delay=3,
              disable=rank > 0) as bar:
        for batch in evaluation_batches(examples, share):
            where.append(batch.indices)
            found.append(model.logits(task, batch).float())
            bar.update(len(batch.indices))
    if found:  # written once: a GPU would have to be waited for at each write
        outputs[np.concatenate(where)] = torch.cat(found)
    model.train(training)
    return sum_over_processes(outputs).cpu().numpy()[indices]


@torch.no_grad()
def encode_once(model, data):
    """Run a frozen encoder over every sequence of the data and keep the pooled outputs, which no
    epoch would change. Training and evaluation then run only the heads."""
    total = sum(len(examples) for splits in data.values() for examples in splits.values())
    print(f"the encoder is frozen: it runs once over {total} examples, then only the heads run")
    model.eval()
    with tqdm(total=total, desc="encoding", unit="example", leave=False,
              disable=rank_and_world()[0] > 0) as bar:
        for splits in data.values():
            for examples in splits.values():
                sides = len(examples.tokens[0])
                where, found = [], []
                for batch in evaluation_batches(examples, np.arange(len(examples))):
                    pooled = model(batch.input_ids, batch.attention_mask, batch.token_type_ids)
                    # (S, H) -> (B, sides, H)
                    found.append(pooled.unflatten(0, (sides, -1)).transpose(0, 1))
                    where.append(batch.indices)
                    bar.update(len(batch.indices))
                # in the order of the examples, on the CPU, where `collate` takes those of a batch
                examples.pooled = torch.cat(found).cpu()[np.argsort(np.concatenate(where))]


def to_predictions(task, outputs):
    """Class, 0/1, or similarity. (N, C) -> (N,)."""
    if task.kind == "classification":
        return outputs.argmax(axis=-1)
    if task.kind == "binary":
        return (outputs[:, 0] > 0).astype(int)
    return outputs[:, 0]


# ---------------------------------------------------------------- scores

def score(task, predictions, labels):
    """Accuracy; for a regression Pearson's r over the whole split, 0 for constant predictions."""
    if task.kind != "regression":
        return float((predictions == labels).mean())
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        print(f"{task.name}: constant predictions or labels have no correlation; counted as 0")
        return 0.0
    return float(pearsonr(predictions, labels)[0])


def confusion_matrix(task, predictions, labels):
    """(classes, classes): how many examples of class i (row) were predicted as class j (column)."""
    counts = np.zeros((task.max_label + 1, task.max_label + 1), dtype=int)
    np.add.at(counts, (labels.astype(int), predictions.astype(int)), 1)
    return counts


def f1_scores(task, predictions, labels):
    """F1 = 2 TP / (2 TP + FP + FN).

    binary: {"positive": of class 1}. classification: {"macro": mean, "0": ..., "1": ...}; a class
    that neither occurs nor is predicted counts 0. regression: {}.
    """
    if task.kind == "regression":
        return {}
    # a diagonal entry is a class's true positives; its row and column hold the rest
    counts = confusion_matrix(task, predictions, labels)
    denominators = counts.sum(axis=0) + counts.sum(axis=1)  # 2 TP + FP + FN
    f1 = 2 * counts.diagonal() / np.maximum(denominators, 1)
    if task.kind == "binary":
        return {"positive": float(f1[1])}
    return {"macro": float(f1.mean()), **{str(i): float(value) for i, value in enumerate(f1)}}


def overall(scores):
    """The reports' two overall scores where all three tasks are scored: the mean (2023), and the
    mean with (r + 1) / 2 for sts (2024)."""
    if not {"sst", "para", "sts"} <= scores.keys():
        return {}
    sst, para, sts = scores["sst"], scores["para"], scores["sts"]
    return {"overall_2023": (sst + para + sts) / 3,
            "overall_2024": (sst + para + (sts + 1) / 2) / 3}


def evaluate(model, data, seed):
    """{"dev": {task: score}, "train": {task: score on a seeded sample}, "f1": {task: on dev}, and
    the overall scores on dev}. Raises RunFailed where an output is not finite."""
    scores = {"dev": {}, "train": {}, "f1": {}}
    for name, splits in data.items():
        # the train score is of the same random examples in every epoch
        order = np.random.default_rng(seed_of(seed, "sample", name)).permutation(
            len(splits["train"]))
        for split, indices in (("train", order[:TRAIN_SAMPLE]), ("dev", None)):
            if split not in splits:  # an auxiliary task has no dev set
                continue
            examples = splits[split]
            outputs = predict(model, name, examples, indices)

            # the score of such outputs would be meaningless, or NaN, which no epoch beats
            if not np.isfinite(outputs).all():
                raise RunFailed(f"the outputs for {name} {split} are not finite; what was saved "
                                "before is intact; start a new run with a lower --lr")
            predictions = to_predictions(examples.task, outputs)
            labels = examples.labels if indices is None else examples.labels[indices]
            scores[split][name] = score(examples.task, predictions, labels)
            f1 = f1_scores(examples.task, predictions, labels)
            if f1 and split == "dev":
                scores["f1"][name] = f1
    return {**scores, **overall(scores["dev"])}


def selection_score(scores, trained):
    """What the best epoch is selected by: the mean dev score of the tasks that are trained
    (overall_2023 for the three)."""
    dev = [score for task, score in scores["dev"].items() if task in trained]
    return sum(dev) / len(dev)


# ---------------------------------------------------------------- what is printed and written

def scores_header(data):
    """Two lines over the columns of `scores_line`. data: {task: {split: Examples}}."""
    names = "".join(f"{name[:13]:>14}" for name in data)
    columns = "".join(f"{'dev':>7}{'train':>7}" if "dev" in splits else f"{'train':>14}"
                      for splits in data.values())
    lines = [f"{'':7}{names}", f"{'epoch':>7}{columns}"]
    if {"sst", "para", "sts"} <= data.keys():
        lines = [f"{lines[0]}{'overall':>16}", f"{lines[1]}{'2023':>8}{'2024':>8}"]
    return "\n".join(lines)


def scores_line(epoch, epochs, scores):
    """Scores of an epoch on dev and on the train sample, and the overall scores on dev."""
    line = f"{f'{epoch}/{epochs}':>7}"
    for task, on_train in scores["train"].items():
        if task in scores["dev"]:
            line += f"{scores['dev'][task]:7.3f}{on_train:7.3f}"
        else:
            line += f"{on_train:14.3f}"
    return line + "".join(f"{value:8.3f}" for value in overall(scores["dev"]).values())


def best_lines(best, data):
    """The scores of the best epoch on dev, one task per line, with what they are."""
    lines = [f"best epoch: {best['epoch']}"]
    for task, value in best["dev"].items():
        is_regression = data[task]["dev"].task.kind == "regression"
        notes = ["Pearson r" if is_regression else "accuracy"]
        f1 = best["f1"].get(task, {})
        notes += [f"{name} {f1[key]:.3f}" for key, name in (("macro", "macro F1"),
                                                            ("positive", "F1")) if key in f1]
        lines.append(f"  {task:8} {value:.3f}  {', '.join(notes)}")
    lines += [f"  {name:12} {value:.3f}" for name, value in overall(best["dev"]).items()]
    return "\n".join(lines)


def confusion_lines(task, predictions, labels):
    """The confusion matrix: a line per label, a column per predicted label."""
    names = task.class_names
    width = max(map(len, names)) + 2
    lines = [f"{task.name} dev, examples of each label (line) by predicted label (column)",
             " " * width + "".join(f"{name:>{width}}" for name in names)]
    for name, counts in zip(names, confusion_matrix(task, predictions, labels)):
        lines.append(f"{name:>{width}}" + "".join(f"{count:{width}d}" for count in counts))
    return "\n".join(lines)


def example_loss(task, outputs, labels):
    """-log p(label), or the distance of a similarity from its label. (N, C), (N,) -> (N,)."""
    if task.kind == "regression":
        return np.abs(outputs[:, 0] - labels)
    # a logit z against 0 is the pair of logits (0, z)
    if task.kind == "binary":
        outputs = np.concatenate([np.zeros_like(outputs), outputs], axis=1)
    return -log_softmax(outputs, axis=1)[np.arange(len(labels)), labels.astype(int)]


def write_errors(path, results):
    """errors.csv: of each task the wrong examples with the largest loss; of sts, where none is
    right or wrong, those with the largest error. results: [(examples, outputs)]."""
    def write(part):
        with open(part, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t")
            writer.writerow(["task", "id", "label", "predicted", "loss", "sentence1", "sentence2"])
            for examples, outputs in results:
                losses = example_loss(examples.task, outputs, examples.labels)
                predictions = to_predictions(examples.task, outputs)
                order = np.argsort(-losses, kind="stable")
                if examples.task.kind != "regression":
                    order = order[predictions[order] != examples.labels[order]]
                for i in order[:MAX_ERRORS]:
                    sentence1, sentence2 = (*examples.texts[i], "")[:2]
                    writer.writerow([examples.task.name, examples.ids[i],
                                     f"{examples.labels[i]:g}", f"{predictions[i]:.3g}",
                                     f"{losses[i]:.3f}", sentence1, sentence2])
    write_atomically(path, write)


def output_paths(args, paths, run_folder):
    """{(task, split): path} of the predictions. Raises InputError where one cannot be written."""
    outputs, folder = {}, run_folder / "predictions"
    inputs = {path.resolve() for files in paths.values() for path in files.values()}
    for task in (*args.tasks, *args.score_also):
        for split in ("dev", "test"):
            flag = f"{task}_{split}_out"
            given = getattr(args, flag)
            if given and split not in paths[task]:
                raise InputError(f"--{flag}: there is no {task} {split} file to predict")
            if given and (given.is_dir() or not given.absolute().parent.is_dir()):
                raise InputError(f"--{flag} {given}: not a file in an existing folder")
            if given and given.absolute() in {path.absolute() for path in outputs.values()}:
                raise InputError(f"--{flag} {given}: is the file of other predictions too")
            if given and given.resolve() in inputs:
                raise InputError(f"--{flag} {given}: is a data file that the run reads; name "
                                 "another file")
            if split in paths[task]:
                outputs[task, split] = given or folder / f"{task}-{split}-output.csv"
    return outputs


def write_predictions(path, examples, outputs):
    """The course's submission format: a header, then `id , prediction` per line."""
    values = to_predictions(examples.task, outputs)
    if examples.task.kind == "binary":
        values = values.astype(float)
    lines = [f"id \t {examples.task.header} \n"]
    lines += [f"{i} , {value} \n" for i, value in zip(examples.ids, values)]
    write_atomically(path, lambda part: part.write_text("".join(lines), encoding="utf-8"))
