"""support/evaluation.py and support/plots.py: what is predicted, scored, drawn and written; and
what a run leaves in its folder."""
import contextlib
import csv
import io
import json
import math
import re
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from data.tasks import TASKS, read_examples
from data.tokenizer import load_tokenizer, tokenize
from multitask_classifier import MultitaskBERT
from support import evaluation, plots
from support.files import InputError
from support.run import read_metrics
from tests.helpers import KINDS, raises, run, three_task_model, without_curves, workspace


def dev_examples(task):
    return read_examples(workspace() / "data" / TASKS[task].filename("dev"), TASKS[task])


# ---------------------------------------------------------------- predictions

def test_prediction_restores_train_mode_and_follows_the_indices():
    model, examples = three_task_model()
    for training in (True, False):
        model.train(training)
        whole = evaluation.predict(model, "sts", examples["sts"])
        assert model.training == model.bert.training == training
        some = evaluation.predict(model, "sts", examples["sts"], np.array([7, 2, 11]))
        assert np.abs(some - whole[[7, 2, 11]]).max() < 1e-5


def test_prediction_has_no_dropout_and_no_gradient():
    model, examples = three_task_model(pair_head={"sts": "uv"})
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    first, again = (evaluation.predict(model, "sts", examples["sts"]) for _ in range(2))
    assert (first == again).all()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_predictions_are_the_most_probable():
    """The largest logit; a probability above one half; the similarity as it is."""
    logits = np.array([[0.0, 2, 1, -1, 0], [1, 0, 0, 0, 3]])
    assert evaluation.to_predictions(TASKS["sst"], logits).tolist() == [1, 4]
    logits = np.array([[-3.0], [-0.01], [0.01], [0.39], [3.0]])
    assert evaluation.to_predictions(TASKS["para"], logits).tolist() == [0, 0, 1, 1, 1]
    similarities = np.array([-0.5, 2.25, 5.5])
    found = evaluation.to_predictions(TASKS["sts"], similarities[:, None])
    assert (found == similarities).all()


def test_predictions_are_written_in_the_courses_format():
    _, examples = three_task_model()
    path = workspace() / "submission.csv"
    outputs = {"sst": np.eye(5)[[3, 0]], "para": np.array([[-0.1], [0.1]]),
               "sts": np.array([[2.25], [-0.5]])}
    written = {"sst": ("Predicted_Sentiment", "3", "0"),
               "para": ("Predicted_Is_Paraphrase", "0.0", "1.0"),
               "sts": ("Predicted_Similiary", "2.25", "-0.5")}
    for task, (header, *values) in written.items():
        two = examples[task].take(np.array([4, 2]))
        evaluation.write_predictions(path, two, outputs[task])
        lines = [f"id \t {header} ", *(f"{i} , {value} " for i, value in zip(two.ids, values))]
        assert path.read_text() == "\n".join(lines) + "\n"


def test_predictions_go_where_they_are_asked_to():
    folder = Path(tempfile.mkdtemp(dir=workspace()))
    status, printed, run_folder = run("--sst_dev_out", folder / "a.csv",
                                      "--sts_test_out", folder / "b.csv")
    assert status == 0, printed
    assert sorted(path.name for path in folder.iterdir()) == ["a.csv", "b.csv"]
    assert len((folder / "a.csv").read_text().splitlines()) == 9  # the header and eight examples
    assert len(list((run_folder / "predictions").iterdir())) == 4

    # what the last line names is there, and predictions/ only where something is in it
    elsewhere = [f"--sst_{split}_out={folder / split}.csv" for split in ("dev", "test")]
    for more, named in (([], ["predictions/"]), (elsewhere, [])):
        status, printed, run_folder = run("--tasks", "sst", *more)
        names = printed.splitlines()[-1].strip().split(", ")
        assert status == 0, printed
        assert names == ["encoder", "heads", "metrics.jsonl", "curves.png", "errors.csv", *named]
        assert all((run_folder / name).exists() for name in names[2:]), printed
        assert (run_folder / "predictions").exists() == bool(named)
    assert (folder / "dev.csv").exists() and (folder / "test.csv").exists()


# ---------------------------------------------------------------- scores

def test_scores_are_accuracy_and_pearsons_r():
    labels = np.array([0, 1, 2, 3], dtype=np.float32)
    assert evaluation.score(TASKS["sst"], np.array([0, 1, 0, 0]), labels) == 0.5
    assert abs(evaluation.score(TASKS["sts"], 3 * labels - 1, labels) - 1) < 1e-6
    # in the order of the labels, and not in proportion to them: not a rank correlation
    bent = np.array([0.0, 1, 2, 10])
    pearson = evaluation.score(TASKS["sts"], bent, labels)
    assert abs(pearson - np.corrcoef(bent, labels)[0, 1]) < 1e-6 and pearson < 0.9


def test_constant_predictions_score_zero_and_are_reported():
    labels = np.array([0, 1, 2, 3], dtype=np.float32)
    for predictions, reference in ((np.ones(4), labels), (labels, np.ones(4))):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert evaluation.score(TASKS["sts"], predictions, reference) == 0
        assert "constant" in printed.getvalue()


def test_overall_scores_are_the_reports():
    overall = evaluation.overall({"sst": 0.5, "para": 0.8, "sts": 0.2})
    assert abs(overall["overall_2023"] - 0.5) < 1e-9
    assert abs(overall["overall_2024"] - 1.9 / 3) < 1e-9
    assert evaluation.overall({"sst": 0.5}) == {}


def test_f1_and_confusion_matrix_are_counted_by_hand():
    """Class 0: two right, one missed, one taken for it. Class 1: one, one and two. Class 2: one
    missed. Classes 3 and 4 do not occur."""
    labels, predictions = np.array([0.0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 0, 1])
    f1 = evaluation.f1_scores(TASKS["sst"], predictions, labels)
    assert [round(f1[str(i)], 4) for i in range(5)] == [0.6667, 0.4, 0, 0, 0]
    assert abs(f1["macro"] - (2 / 3 + 0.4) / 5) < 1e-9
    counts = evaluation.confusion_matrix(TASKS["sst"], predictions, labels)
    assert counts[:3, :3].tolist() == [[2, 1, 0], [1, 1, 0], [0, 1, 0]] and counts.sum() == 6

    found = evaluation.f1_scores(TASKS["para"], np.array([1, 1, 0, 0]), np.array([1.0, 0, 1, 1]))
    assert found == {"positive": 0.4}
    assert evaluation.f1_scores(TASKS["sts"], labels, labels) == {}


def sampled_data():
    """3000 training and 20 dev examples per task; an auxiliary task has no dev set."""
    _, examples = three_task_model()
    data = {task: {"train": part.take(np.arange(3000) % 24), "dev": part.take(np.arange(20))}
            for task, part in examples.items()}
    return {**data, "aux": {"train": data["sst"]["train"]}}


def evaluate_a_perfect_memory(data, seed):
    """(scores, {task: the training examples that were predicted}) of a model that is always right
    on training examples and predicts 1 for every dev example."""
    samples = {}

    def predict(model, task, part, indices=None):
        answers = np.ones(20) if indices is None else part.labels[indices]
        if indices is not None:
            samples[task] = indices.tolist()
        if part.task.kind == "classification":
            return np.eye(5)[answers.astype(int)]
        return answers[:, None] * 2.0 - (part.task.kind == "binary")

    with mock.patch.object(evaluation, "predict", predict), \
            contextlib.redirect_stdout(io.StringIO()):
        return evaluation.evaluate(None, data, seed), samples


def test_train_scores_are_those_of_a_seeded_sample():
    data = sampled_data()
    scores, samples = evaluate_a_perfect_memory(data, seed=1)
    assert evaluate_a_perfect_memory(data, seed=1) == (scores, samples)
    assert set(scores["train"]) == set(samples) == set(data)
    assert all(abs(value - 1) < 1e-6 for value in scores["train"].values()), scores

    # 2000 examples, none twice, from the whole set; others with another seed or for another task
    _, others = evaluate_a_perfect_memory(data, seed=2)
    for task, indices in samples.items():
        assert len(indices) == len(set(indices)) == 2000, task
        assert max(indices) > 2900 and min(indices) < 100, task
        assert sorted(others[task]) != sorted(indices)
    assert len({tuple(sorted(indices)) for indices in samples.values()}) == len(data)


def test_dev_scores_are_those_of_all_dev_examples():
    data = sampled_data()
    scores, _ = evaluate_a_perfect_memory(data, seed=1)
    ones = {task: float((data[task]["dev"].labels == 1).mean()) for task in ("sst", "para")}
    assert scores["dev"] == {**ones, "sts": 0.0} and 0 < ones["sst"] < 1
    assert scores["overall_2023"] == sum(scores["dev"].values()) / 3

    # where all is predicted as class 1, precision is its share and recall 1
    f1 = {task: 2 * share / (1 + share) for task, share in ones.items()}
    assert abs(scores["f1"]["para"]["positive"] - f1["para"]) < 1e-9
    assert abs(scores["f1"]["sst"]["1"] - f1["sst"]) < 1e-9
    assert set(scores["f1"]) == {"sst", "para"}



def test_the_printed_lines_hold_the_scores_below_their_names():
    data = sampled_data()
    data["a task of a long name"] = data.pop("aux")
    scores = {"dev": {"sst": 0.125, "para": 0.25, "sts": -0.5},
              "train": {"sst": 0.5, "para": 0.625, "sts": 0.75, "a task of a long name": 0.875},
              "f1": {"sst": {"macro": 0.1}, "para": {"positive": 0.2}}}
    names, header = evaluation.scores_header(data).splitlines()
    line = evaluation.scores_line(3, 10, scores)
    assert names.split() == ["sst", "para", "sts", "a", "task", "of", "a", "l", "overall"]
    assert header.split() == ["epoch", *["dev", "train"] * 3, "train", "2023", "2024"]
    assert line.split() == ["3/10", "0.125", "0.500", "0.250", "0.625", "-0.500", "0.750", "0.875",
                            "-0.042", "0.208"]
    # columns end where their headings do
    ends = [[word.end() for word in re.finditer(r"\S+", text)] for text in (header, line)]
    assert ends[0] == ends[1] and len(line) < 90

    best = evaluation.best_lines({"epoch": 3, **scores}, data).splitlines()
    assert [text.split() for text in best] == [
        ["best", "epoch:", "3"], ["sst", "0.125", "accuracy,", "macro", "F1", "0.100"],
        ["para", "0.250", "accuracy,", "F1", "0.200"], ["sts", "-0.500", "Pearson", "r"],
        ["overall_2023", "-0.042"], ["overall_2024", "0.208"]]


# ---------------------------------------------------------------- errors.csv

def errors_of(folder):
    with open(folder / "errors.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_the_loss_of_an_example_is_that_of_its_kind():
    """-log p(label), or the distance from the label."""
    logits = np.array([[0.0, 0, 0, 0, 0], [9, 0, 0, 0, 0]])
    losses = evaluation.example_loss(TASKS["sst"], logits, np.array([1.0, 1]))
    assert abs(losses[0] - math.log(5)) < 1e-6 and 9 < losses[1] < 9.1
    logits, labels = np.array([[2.0], [-2.0], [2.0]]), np.array([1.0, 1, 0])
    losses = evaluation.example_loss(TASKS["para"], logits, labels)
    assert np.abs(losses - np.log1p(np.exp([-2.0, 2.0, 2.0]))).max() < 1e-6
    outputs, labels = np.array([[2.0], [2.0]]), np.array([4.5, 1.0])
    assert evaluation.example_loss(TASKS["sts"], outputs, labels).tolist() == [2.5, 1.0]


@without_curves
def test_errors_and_confusion_matrix_are_of_the_dev_sets():
    status, printed, folder = run()
    assert status == 0, printed
    rows = errors_of(folder)
    assert {row["task"] for row in rows} == set(KINDS)
    for task in KINDS:
        losses = [float(row["loss"]) for row in rows if row["task"] == task]
        assert losses == sorted(losses, reverse=True)

    # what was right is no error
    best = read_metrics(folder, "evaluation")[-1]
    for task in ("sst", "para"):
        wrong = round(8 * (1 - best["dev"][task]))
        assert sum(row["task"] == task for row in rows) == wrong

    # a line of the matrix for each label, with the dev set's counts
    assert "examples of each label (line) by predicted label (column)" in printed, printed
    lines = printed.split("sst dev, examples")[1].splitlines()
    assert re.split("  +", lines[1].strip()) == list(TASKS["sst"].label_names)
    for name, line in zip(TASKS["sst"].label_names, lines[2:], strict=False):
        assert line.strip().startswith(name)
    matrix = [[int(n) for n in re.findall(r"\d+", line)] for line in lines[2:7]]
    labels = dev_examples("sst").labels.astype(int)
    assert np.sum(matrix, axis=1).tolist() == np.bincount(labels, minlength=5).tolist()
    assert np.trace(matrix) == round(8 * best["dev"]["sst"])


def test_errors_are_wrong_however_large_the_losses_of_the_right_ones_are():
    """100 right examples with a probability of .21, and one wrong one with .4 for its label."""
    examples = three_task_model()[1]["sst"].take(np.zeros(101, dtype=int))
    examples.ids, label = [str(i) for i in range(101)], int(examples.labels[0])
    probabilities = np.full((101, 5), 0.1975)
    probabilities[:, label] = 0.21
    probabilities[100] = 0.05
    probabilities[100, label], probabilities[100, label - 1] = 0.4, 0.45
    folder = Path(tempfile.mkdtemp(dir=workspace()))
    evaluation.write_errors(folder / "errors.csv", [(examples, np.log(probabilities))])
    assert [row["id"] for row in errors_of(folder)] == ["100"]


def test_errors_are_the_examples_with_the_largest_loss():
    """Of 120 wrong similarities and 120 wrong classes fifty each, with texts and labels."""
    _, examples = three_task_model()
    examples = {task: examples[task].take(np.arange(120) % 24) for task in ("sts", "sst")}
    off = np.random.default_rng(0).permutation(120)
    for task in examples:
        examples[task].ids = [f"{task} off by {n}" for n in off]
    logits = np.zeros((120, 5))
    logits[np.arange(120), (examples["sst"].labels + 1).astype(int) % 5] = off + 1.0
    similarities = (examples["sts"].labels + off / 100)[:, None]

    folder = Path(tempfile.mkdtemp(dir=workspace()))
    evaluation.write_errors(folder / "errors.csv",
                            [(examples["sts"], similarities), (examples["sst"], logits)])
    rows = errors_of(folder)
    assert [row["id"] for row in rows] == [f"{task} off by {119 - n}" for task in examples
                                           for n in range(50)]
    for row in rows:
        part = examples[row["task"]]
        i = part.ids.index(row["id"])
        assert tuple(filter(None, (row["sentence1"], row["sentence2"]))) == part.texts[i]
        assert float(row["label"]) == float(f"{part.labels[i]:g}")
        assert row["predicted"] == (f"{similarities[i, 0]:.3g}" if row["task"] == "sts"
                                    else str(logits[i].argmax()))


# ---------------------------------------------------------------- what a run leaves

def submitted(path, task):
    """(ids, predictions) of a submission file. In float32, as they were before they were written:
    Pearson's r of predictions that are nearly constant depends on it."""
    header, *lines = path.read_text().splitlines()
    assert header == f"id \t {TASKS[task].header} "
    ids, values = zip(*(line.split(" , ") for line in lines))
    return list(ids), np.array([np.float32(value) for value in values])


def test_a_run_leaves_what_it_promises():
    """The model of the best epoch; its predictions, read back from the submission, have its scores
    and are what the model predicts."""
    status, printed, folder = run("--epochs", 2, "--pair_head", "para=cosine,sts=uv_diff",
                                  "--pooling", "cls", steps=2)
    assert status == 0, printed
    assert {path.name for path in folder.iterdir()} == {
        "args.json", "metrics.jsonl", "config.json", "model.safetensors", "vocab.txt", "last.pt",
        "curves.png", "errors.csv", "predictions"}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["step", "evaluation"] * 2
    best = max(lines[1::2], key=lambda line: line["overall_2023"])
    assert f"best epoch: {best['epoch']}\n" in printed
    # what is printed from the header of the scores on; the bar and warnings are no part of it
    lines = printed.split("overall\n")[1].splitlines()
    lines = [line.strip() for line in lines
             if not any(word in line for word in ("step", "arning", folder.name))]
    assert len(lines) > 15 and max(map(len, lines)) <= 100, printed

    model, tokenizer = MultitaskBERT.load(folder), load_tokenizer(folder)
    for task in KINDS:
        examples = dev_examples(task)
        ids, predictions = submitted(folder / "predictions" / f"{task}-dev-output.csv", task)
        assert ids == examples.ids
        assert evaluation.score(TASKS[task], predictions, examples.labels) == best["dev"][task]
        tokenize(examples, tokenizer, 64, cross=False)
        outputs = evaluation.predict(model, task, examples)
        again = evaluation.to_predictions(TASKS[task], outputs)
        assert np.abs(again - predictions).max() < 1e-5


@without_curves
def test_a_damaged_run_is_not_loaded():
    folder = run()[2]
    path = folder / "model.safetensors"
    whole, encoder = path.read_bytes(), workspace() / "tiny" / "model.safetensors"
    for damaged, reason in ((b"", "is damaged"), (whole[:-9], "is damaged"),
                            (encoder.read_bytes(), "not a run")):
        path.write_bytes(damaged)
        raises(InputError, reason, MultitaskBERT.load, folder)
    raises(InputError, "not a run", MultitaskBERT.load, workspace() / "tiny")
    path.write_bytes(whole)
    assert MultitaskBERT.load(folder).tasks.keys() == KINDS.keys()


# ---------------------------------------------------------------- pictures

def drawn(folder):
    """What plot_curves draws: {label: points} of each panel."""
    with mock.patch.object(plots, "save_figure") as save:
        plots.plot_curves(folder)
    figure, path = save.call_args.args
    assert path == folder / "curves.png"
    return [{line.get_label(): list(map(tuple, line.get_xydata().tolist()))
             for line in axes.get_lines() if not line.get_label().startswith("_")}
            for axes in figure.axes]


def write_metrics(lines):
    """A run's folder with these lines in its metrics.jsonl."""
    folder = Path(tempfile.mkdtemp(dir=workspace()))
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    return folder


def test_curves_show_the_numbers_of_the_metrics():
    """Of a task that is trained, one that is scored alone, and an auxiliary one."""
    lines = [{"kind": "step", "epoch": 1, "step": 10, "losses": {"sst": 1.5, "aux": 0.75}},
             {"kind": "step", "epoch": 1, "step": 20, "losses": {"sst": 1.25}},
             {"kind": "evaluation", "epoch": 1, "step": 20, "dev": {"sst": 0.5, "sts": 0.0},
              "train": {"sst": 0.625, "sts": 0.125, "aux": 0.25}},
             {"kind": "evaluation", "epoch": 2, "step": 40, "dev": {"sst": 0.375, "sts": -0.5},
              "train": {"sst": 0.875, "sts": 0.25, "aux": 0.75}}]
    losses, scores = drawn(write_metrics(lines))
    assert losses == {"sst": [(10, 1.5), (20, 1.25)], "aux": [(10, 0.75)]}
    assert scores == {"sst dev": [(1, 0.5), (2, 0.375)], "sst train": [(1, 0.625), (2, 0.875)],
                      "sts dev": [(1, 0.0), (2, -0.5)], "sts train": [(1, 0.125), (2, 0.25)],
                      "aux train": [(1, 0.25), (2, 0.75)]}

    # a third panel where the gradients were measured; a pair may not meet in every line
    lines[0]["gradients"] = {"cosine": {"sst-aux": -0.25, "sst-sts": 0.5}}
    lines[1]["gradients"] = {"cosine": {"sst-sts": 0.75}}
    assert drawn(write_metrics(lines)) == [losses, scores, {
        "sst-aux": [(10, -0.25)], "sst-sts": [(10, 0.5), (20, 0.75)]}]


@without_curves
def test_a_study_of_limit_has_a_line_for_each_set_of_other_flags():
    round_robin = [run("--limit", f"para={fraction}", "--batch_size", 4, steps=12)[2]
                   for fraction in (0.5, 0.25)]
    mtdnn = [run("--limit", f"para={fraction}", "--schedule", "mtdnn")[2]
             for fraction in (1, 0.5, 0.25)]
    picture = workspace() / "study.png"
    lines = plots.plot_study([*round_robin, *mtdnn], picture)

    batch_sizes = {"sst": 4, "para": 4, "sts": 4}, {"sst": 16, "para": 32, "sts": 12}
    assert list(lines) == [
        f"schedule round_robin, epoch_length 12, batch_size {batch_sizes[0]}",
        f"schedule mtdnn, epoch_length 2, batch_size {batch_sizes[1]}"], list(lines)
    for found, fractions, folders in zip(lines.values(), ((0.5, 0.25), (1, 0.5, 0.25)),
                                         (round_robin, mtdnn)):
        dev = [read_metrics(folder, "evaluation")[0]["dev"] for folder in folders]
        assert found == list(zip(fractions, dev))
    assert picture.stat().st_size > 5000


def study_of(*runs):
    """plot_study of runs made by hand. runs: (--limit, [dev scores of each epoch])."""
    folders = []
    for limit, epochs in runs:
        folders.append(write_metrics([{"kind": "evaluation", "epoch": n, "dev": dev}
                                      for n, dev in enumerate(epochs, start=1)]))
        args = {"trained": ["sst", "para"], "limit": limit, "seed": 1, "name": str(folders[-1])}
        (folders[-1] / "args.json").write_text(json.dumps(args))
    return plots.plot_study(folders, folders[0] / "study.png")


def test_a_study_has_the_best_epoch_of_each_run():
    """The one with the best mean of the trained tasks; sts is scored alone. Without --limit the
    fraction is 1."""
    rising, best = {"sst": 0.25, "para": 0.5, "sts": 0.0}, {"sst": 0.5, "para": 0.5, "sts": 0.0}
    falling = {"sst": 0.5, "para": 0.25, "sts": 0.875}
    lines = study_of(({"para": 0.5}, [rising, best, falling]), (None, [falling, rising]))
    assert lines == {"": [(0.5, best), (1.0, falling)]}

    one = [best]
    lines = study_of(({"para": 0.5}, one), ({"para": 0.25}, [{"para": 0.5}]))
    assert lines == {"": [(0.5, best), (0.25, {"para": 0.5})]}, "drawn for para alone"
    raises(InputError, "differ in --limit of para, sst", study_of,
           ({"para": 0.5, "sst": 0.5}, one), ({"para": 0.25, "sst": 0.25}, one))


@without_curves
def test_the_command_of_the_plots_draws_and_rejects():
    half, whole = (run("--limit", f"para={fraction}")[2] for fraction in (0.5, 1))
    picture = workspace() / "command.png"
    with contextlib.redirect_stdout(io.StringIO()):
        plots.main([str(half), str(whole), "--out", str(picture)])
        plots.main([str(half)])
    for path in (picture, half / "curves.png"):
        assert path.stat().st_size > 5000 and path.read_bytes().startswith(b"\x89PNG")

    # a line that was cut short when the run was killed is left out
    raises(InputError, "differ in --limit of no task", plots.main,
           [str(whole), str(whole), "--out", str(picture)])
    raises(InputError, "give --out", plots.main, [str(half), str(whole)])
    raises(InputError, "--out: is for several runs", plots.main,
           [str(whole), "--out", str(picture)])
    for name in (".", "study.pdf"):
        raises(InputError, "not a file FILE.png", plots.main,
               [str(half), str(whole), "--out", name])
    raises(InputError, "metrics.jsonl cannot be read", plots.main, [str(workspace() / "tiny")])
    (half / "metrics.jsonl").write_text("[]\n")
    raises(InputError, "metrics.jsonl cannot be read", plots.main, [str(half)])
    (half / "metrics.jsonl").write_text('{"kind": "step", "torn')
    raises(InputError, "no evaluation in its metrics.jsonl yet", plots.main, [str(half)])
