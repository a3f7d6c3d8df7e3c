"""What a model predicts, and what that is worth: scores, F1, confusion matrix, the worst errors, submission files.

Dimensions: N rows, C outputs of a task (classes; or one logit, or one similarity).
"""
import csv

import numpy as np
import torch
from scipy.special import log_softmax
from scipy.stats import pearsonr
from tqdm import tqdm

from checkpoint import RunFailed, rank_and_world, sum_over_processes
from data.batches import evaluation_batches, seed_of
from data.download import write_whole

TRAIN_SAMPLE = 2000  # rows a task of the train score: a full pass would cost more than a short run
WORST = 50  # rows a task in errors.csv


@torch.no_grad()
def predict(model, task, examples, rows=None):
    """The outputs (N, C) in the order of `rows` (all, if None). Leaves train or eval mode as it was."""
    rows = np.arange(len(examples)) if rows is None else rows
    rank, world = rank_and_world()
    training = model.training
    model.eval()
    outputs = torch.zeros(len(examples), examples.task.num_outputs, device=model.device)
    for batch in evaluation_batches(examples, rows[rank::world]):
        outputs[torch.from_numpy(batch.rows).to(model.device)] = model.logits(task, batch).float()
    model.train(training)
    return sum_over_processes(outputs).cpu().numpy()[rows]


@torch.no_grad()
def encode_once(model, data):
    """Run a frozen encoder over every sequence of the data and keep what it pools, since no epoch would change it. Training
    and evaluation then run the heads alone."""
    rows = sum(len(examples) for splits in data.values() for examples in splits.values())
    print(f"the encoder is frozen: it runs once over {rows} rows, and then the heads alone")
    model.eval()
    with tqdm(total=rows, desc="encoding", unit="row", leave=False, disable=rank_and_world()[0] > 0) as bar:
        for splits in data.values():
            for examples in splits.values():
                sides = len(examples.tokens[0])
                pooled = torch.zeros(len(examples), sides, model.bert.config.hidden_size, device=model.device)
                for batch in evaluation_batches(examples, np.arange(len(examples))):
                    found = model(batch.input_ids, batch.attention_mask, batch.token_type_ids)  # (S, H)
                    pooled[torch.from_numpy(batch.rows).to(model.device)] = found.unflatten(0, (sides, -1)).transpose(0, 1)
                    bar.update(len(batch.rows))
                examples.pooled = pooled


def decide(task, outputs):
    """Class, 0/1, or similarity. (N, C) -> (N,)."""
    if task.kind == "classes":
        return outputs.argmax(axis=-1)
    return (outputs[:, 0] > 0).astype(int) if task.kind == "binary" else outputs[:, 0]


def score(task, predictions, labels):
    """Accuracy, or for similarity Pearson's r over the whole split; constant predictions count 0."""
    if task.kind != "similarity":
        return float((predictions == labels).mean())
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        print(f"{task.name}: constant predictions or labels have no correlation; counted as 0")
        return 0.0
    return float(pearsonr(predictions, labels)[0])


def confusion_matrix(task, predictions, labels):
    """(classes, classes): how many rows of class i (row) were taken for class j (column)."""
    counts = np.zeros((task.top + 1, task.top + 1), dtype=int)
    np.add.at(counts, (labels.astype(int), predictions.astype(int)), 1)
    return counts


def f1_scores(task, predictions, labels):
    """F1 = 2 TP / (2 TP + FP + FN): {"positive": of class 1} of a binary task, {"macro": mean, "0": ..., "1": ...} of
    classes, {} of a similarity. A class that neither occurs nor is predicted counts 0."""
    if task.kind == "similarity":
        return {}
    counts = confusion_matrix(task, predictions, labels)
    f1 = 2 * counts.diagonal() / np.maximum(counts.sum(axis=0) + counts.sum(axis=1), 1)  # 2 TP + FP, FN
    if task.kind == "binary":
        return {"positive": float(f1[1])}
    return {"macro": float(f1.mean()), **{str(i): float(value) for i, value in enumerate(f1)}}


def overall(scores):
    """The reports' two overall scores where the three tasks are there: the mean (2023), and with (r + 1) / 2 (2024)."""
    if not {"sst", "para", "sts"} <= scores.keys():
        return {}
    sst, para, sts = scores["sst"], scores["para"], scores["sts"]
    return {"overall_2023": (sst + para + sts) / 3, "overall_2024": (sst + para + (sts + 1) / 2) / 3}


def evaluate(model, data, seed):
    """{"dev": {task: score}, "train": {task: score on a seeded sample}, "f1": {task: of dev}, and
    the overall scores of dev}.

    Raises RunFailed where an output is not finite: its score would mean nothing, or be NaN, which
    no later epoch can beat.
    """
    scores = {"dev": {}, "train": {}, "f1": {}}
    for name, splits in data.items():
        size = len(splits["train"])
        sample = np.random.default_rng(seed_of(seed, "sample", name)).permutation(size)[:TRAIN_SAMPLE]
        for split, rows in (("train", sample), ("dev", None)):
            if split in splits:  # an auxiliary task has no dev set
                examples = splits[split]
                outputs = predict(model, name, examples, rows)
                if not np.isfinite(outputs).all():
                    raise RunFailed(f"the outputs for {name} {split} are not finite; what was "
                                    "saved before is intact; try a lower --lr, or --clip 1")
                predictions = decide(examples.task, outputs)
                labels = examples.labels if rows is None else examples.labels[rows]
                scores[split][name] = score(examples.task, predictions, labels)
                f1 = f1_scores(examples.task, predictions, labels)
                if f1 and split == "dev":
                    scores["f1"][name] = f1
    return {**scores, **overall(scores["dev"])}


def selection(scores, trained):
    """What the best epoch is chosen by: the mean dev score of the tasks that are trained (overall_2023 for the three)."""
    dev = [score for task, score in scores["dev"].items() if task in trained]
    return sum(dev) / len(dev)


def describe(scores):
    parts = ["dev"]
    for task, dev in scores["dev"].items():
        f1 = scores["f1"].get(task, {})
        notes = [f"train {scores['train'][task]:.3f}"]
        notes += [f"{name} {f1[key]:.3f}" for key, name in (("macro", "macro F1"), ("positive", "F1")) if key in f1]
        parts.append(f"{task} {dev:.3f} ({', '.join(notes)})")
    return "  ".join(parts + [f"{name} {value:.3f}" for name, value in overall(scores["dev"]).items()])


def describe_confusion(task, predictions, labels):
    lines = [f"{task.name}: rows of each label by what was predicted (0..{task.top} from left to right)"]
    for label, row in enumerate(confusion_matrix(task, predictions, labels)):
        lines.append(f"  label {label}  " + " ".join(f"{count:5d}" for count in row))
    return "\n".join(lines)


def wrongness(task, outputs, labels):
    """-log p(label), or the distance of a similarity from its label. (N, C), (N,) -> (N,)."""
    if task.kind == "similarity":
        return np.abs(outputs[:, 0] - labels)
    if task.kind == "binary":
        outputs = np.concatenate([np.zeros_like(outputs), outputs], axis=1)
    return -log_softmax(outputs, axis=1)[np.arange(len(labels)), labels.astype(int)]


def write_errors(path, results):
    """errors.csv: the rows of each task that went most wrong. results: [(examples, outputs)]."""
    def write(part):
        with open(part, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t")
            writer.writerow(["task", "id", "label", "predicted", "wrongness", "sentence1", "sentence2"])
            for examples, outputs in results:
                wrong, predictions = wrongness(examples.task, outputs, examples.labels), decide(examples.task, outputs)
                for i in np.argsort(-wrong, kind="stable")[:WORST]:
                    if examples.task.kind == "similarity" or predictions[i] != examples.labels[i]:
                        writer.writerow([examples.task.name, examples.ids[i], f"{examples.labels[i]:g}",
                                         f"{predictions[i]:.3g}", f"{wrong[i]:.3f}", *examples.texts[i]])
    write_whole(path, write)


def write_predictions(path, examples, outputs):
    """The course's submission format: a heading, then `id , prediction` a row."""
    values = decide(examples.task, outputs)
    if examples.task.kind == "binary":
        values = values.astype(float)
    lines = [f"id \t {examples.task.heading} \n"] + [f"{i} , {value} \n" for i, value in zip(examples.ids, values)]
    write_whole(path, lambda part: part.write_text("".join(lines), encoding="utf-8"))
