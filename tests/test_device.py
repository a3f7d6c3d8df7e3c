"""Whole runs of the scripts on the pretend accelerator of pretend_device.py: they end with the
weights of the same runs on the CPU, no tensor is left on the wrong device, and a training step
makes the host wait for the device only where it must.

Everything runs once, in one process, before the first check; `report` is what that process prints.
"""
import contextlib
import functools
import io
import json
import os
import re
import subprocess
import sys
from collections import Counter
from unittest import SkipTest, mock

import torch
from torch.utils import backend_registration

import multitask_classifier
import pretrain_mlm
from data.batches import evaluation_batches
from results.speed import measure
from support import predict
from tests.helpers import PROJECT, TINY, killed_after, quietly, workspace
from tests.test_speed import new_folder, small_products, tiny_flags


# ---------------------------------------------------------------- in a process with the device

STEPS = 4
KILLED_AFTER = 2  # steps of the run that is killed and resumed on the device
FINETUNE = ("--option", "finetune")
RUNS = {  # name -> flags of multitask_classifier.py
    "plain": (*FINETUNE, "--pair_head", "cross", "--pooling", "cls", "--sst_loss", "oll1.5"),
    "pcgrad": (*FINETUNE, "--pair_head", "para=uv_diff,sts=cosine", "--pcgrad"),
    "vaccine by tensor, resumed": (
        *FINETUNE, "--pair_head", "para=cosine,sts=uv", "--pooling", "cls", "--gradvac",
        "--surgery_scope", "tensor", "--proximal", "--save_every", 0),
    "smart and proximal": (
        *FINETUNE, "--pair_head", "para=cross,sts=uv", "--proximal", "--smart", "--smart_eps", 0.1,
        "--smart_sigma", 0.01, "--smart_step_size", 0.1),
    "pal": (*FINETUNE, "--pair_head", "cross", "--pal", "--pal_size", 8, "--pcgrad",
            "--schedule", "annealed", "--accumulate", 2),
    "pal identity": ("--option", "pretrain", "--pal", "--pal_size", 8, "--pal_g", "identity",
                     "--schedule", "mtdnn", "--optimizer_per_task"),
    "frozen": ("--option", "pretrain", "--pair_head", "para=uv_diff,sts=cross"),
    "mlm": ()}  # of pretrain_mlm.py


def train(name, device):
    """One of RUNS on "cpu" or "pretend". Returns its folder."""
    root = workspace()
    folder = root / device / name.replace(" ", "-")
    main, folder_flag = multitask_classifier.main, "--name"
    if name == "mlm":
        main, folder_flag = pretrain_mlm.main, "--out"
    flags = ["--model", root / "tiny", "--data_dir", root / "data", "--epochs", 1, "--lr", 1e-3,
             "--epoch_length", STEPS, "--batch_size", 6, *RUNS[name], folder_flag, folder]
    if device == "pretend":
        flags.append("--use_gpu")
        if name.endswith("resumed"):
            killed_after(KILLED_AFTER, main, *flags)
            flags = ["--resume", folder]
    status, printed = quietly(main, *flags)
    assert status == 0, f"{name} on {device}: {printed}"
    return folder


def numbers(found):
    """All numbers in nested dicts and lists; no speeds, which differ from run to run."""
    if isinstance(found, dict):
        found = [value for key, value in found.items() if not key.endswith("_per_second")]
    if isinstance(found, list):
        return [x for value in found for x in numbers(value)]
    return [found] if isinstance(found, (int, float)) else []


def left_by(folder):
    """What a run leaves, as two flat tensors: its weights (and the proximal term's teacher), and
    all numbers of its metrics and predictions."""
    last = torch.load(folder / "last.pt", weights_only=True)
    weights = [*last["model"].values(), *(last.get("teacher") or {}).values()]
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    predicted = [float(line.split(",")[-1]) for path in sorted(folder.glob("predictions/*.csv"))
                 for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    return (torch.cat([x.flatten() for x in weights]),
            torch.tensor(numbers([*map(json.loads, lines), *predicted])))


def compared(name):
    """One of RUNS on both devices: the largest differences, and what was counted on the device."""
    from tests.pretend_device import copies, waits  # in this process alone, since it changes torch
    on_cpu = left_by(train(name, "cpu"))
    copies.clear()
    waits.clear()
    on_device = left_by(train(name, "pretend"))
    return {"weights": largest_difference(on_cpu[0], on_device[0]),
            "scores": largest_difference(on_cpu[1], on_device[1]),
            "waits": dict(waits), "copies": dict(copies)}


def largest_difference(a, b):
    return (a - b).abs().max().item()


def answers(device):
    """What support/predict.py makes of a pair of sentences, with the model of a run."""
    flags = [workspace() / "pretend" / "pcgrad", "A quiet film.", "It is a loud one."]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        predict.main([*map(str, flags), *(["--use_gpu"] if device == "pretend" else [])])
    return torch.tensor(numbers(json.loads(printed.getvalue())))


def small_operations():
    """{what is done: how often the host waited, or "refused"}, to see that the device notices."""
    from tests.pretend_device import waits
    x, i = torch.arange(4.0, device="pretend"), torch.tensor([0, 1])
    own = x[:2].long()
    operations = {
        "arithmetic": lambda: (x + 1) @ x, "item": lambda: x.sum().item(), "tolist": x.tolist,
        "if": lambda: bool(x.sum() > 1), "nonzero": x.nonzero, "boolean index": lambda: x[x > 1],
        "boolean assignment": lambda: x.index_put((x > 1,), x[:2]),
        "own index": lambda: x[own], "CPU index": lambda: x[i], "to the CPU": x.cpu,
        "blocking copy": lambda: i.to("pretend"),
        "torch.tensor": lambda: torch.tensor([1.0], device="pretend"),
        "non-blocking copy": lambda: i.to("pretend", non_blocking=True),
        "number from the CPU": lambda: x + torch.tensor(1.0), "CPU tensor": lambda: x[:2] + i,
        "stacked with a number from the CPU": lambda: torch.stack([x[0], torch.tensor(1.0)]),
        "assigned from the CPU": lambda: x.index_put((own,), torch.ones(2)),
        "index_select with CPU index": lambda: x.index_select(0, i),
        "CPU weights": lambda: torch.nn.Linear(4, 2)(x[None])}
    found = {}
    for name, operation in operations.items():
        waits.clear()
        try:
            operation()
            found[name] = sum(waits.values())
        except RuntimeError as error:
            assert "tensors on two devices" in str(error), error
            found[name] = "refused"
    return found


@small_products
def measured():
    """The encoders that results/speed/measure.py measures on the device, in small."""
    out = new_folder()
    with mock.patch.object(measure, "BertConfig", lambda: TINY):
        status, printed = quietly(measure.main, *tiny_flags(out), "--use_gpu")
    assert status == 0, printed
    path, = out.iterdir()
    return list(json.loads(path.read_text())["encoders"])


def print_report():
    # small batches in evaluation, so that each set has several
    with mock.patch.object(evaluation_batches, "__defaults__", (250,)):
        runs = {name: compared(name) for name in RUNS}
    print(json.dumps({"operations": small_operations(), "runs": runs, "measured": measured(),
                      "answers": largest_difference(answers("cpu"), answers("pretend"))}))


# ---------------------------------------------------------------- the checks

@functools.cache
def report():
    """What the process with the pretend device found."""
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        raise SkipTest("this torch has no devices in Python")
    code = ("from tests import pretend_device, test_device\n"  # in this order
            "test_device.print_report()")
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, text=True, capture_output=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# What moves a whole model to or from the device, tensor by tensor: started, loaded, saved.
MOVES = {"multitask_classifier.py build", "multitask_classifier.py load_state",
         "multitask_classifier.py train_and_predict", "optimizer.py load_state_dict",
         "pretrain_mlm.py main", "bert.py <lambda>", "support/run.py <lambda>"}
# What waits between steps: a line of metrics, a save, an evaluation.
BETWEEN_STEPS = {"support/run.py write", "support/run.py check_losses",
                 "support/run.py check_weights", "support/evaluation.py predict",
                 "support/evaluation.py encode_once", "pretrain_mlm.py evaluate"}


def function_of(place):  # "file:line function" -> "file function"
    return re.sub(r":\d+", "", place)


def by_function(counts, functions):
    """{"file function": n} of {"file:line function": n}, for these functions."""
    found = Counter()
    for place, n in counts.items():
        if function_of(place) in functions:
            found[function_of(place)] += n
    return found


def test_the_device_refuses_tensors_of_the_cpu_and_counts_waits():
    operations = report()["operations"]
    for found, names in ((0, ["arithmetic", "own index", "non-blocking copy",
                              "number from the CPU"]),
                         ("refused", ["CPU tensor", "CPU weights", "index_select with CPU index",
                                      "assigned from the CPU",
                                      "stacked with a number from the CPU"])):
        assert all(operations[name] == found for name in names), (found, operations)
        operations = {name: n for name, n in operations.items() if name not in names}
    assert set(operations.values()) == {1}, operations  # all others


def test_runs_end_as_on_the_cpu():
    """The weights, the metrics and the predictions; also of the run that was killed and resumed.
    Rounding differs, of the Gram matrix for example, and Adam's eps keeps it small."""
    for name, run in report()["runs"].items():
        assert run["weights"] < 1e-6 and run["scores"] < 1e-4, (name, run)
    assert report()["answers"] < 1e-5


def test_a_step_waits_for_the_device_once_under_surgery_and_never_without():
    surgery = "pcgrad.py gram_matrices_on_gpu"
    updates = {"pcgrad": STEPS, "vaccine by tensor, resumed": STEPS, "pal": STEPS // 2}
    for name, run in report()["runs"].items():
        others = {place: n for place, n in run["waits"].items()
                  if function_of(place) not in MOVES | BETWEEN_STEPS | {surgery}}
        assert not others, (name, others)
        assert by_function(run["waits"], {surgery})[surgery] == updates.get(name, 0), name

    # the labels are copied in every step, and not waited for
    labels = "multitask_classifier.py loss"
    assert by_function(report()["runs"]["plain"]["copies"], {labels})[labels] == 3 * STEPS


def test_between_steps_it_waits_for_a_line_of_metrics_a_save_and_each_set_that_is_evaluated():
    for name, run in report()["runs"].items():
        # the resumed run writes a line and saves after each step
        lines = saves = STEPS if name.endswith("resumed") else 1
        expected = {"support/run.py write": 2 * lines, "support/run.py check_losses": lines,
                    "support/run.py check_weights": saves + 1}  # and at the end of an epoch
        if name == "mlm":
            expected["pretrain_mlm.py evaluate"] = 2  # before training and after
        else:
            # each of train, dev; and then of dev, test: where the outputs go, and their copy back
            expected["support/evaluation.py predict"] = 3 * (2 + 2) * 2
        if name == "frozen":
            expected["support/evaluation.py encode_once"] = 3 * 3
        found = by_function(run["waits"], BETWEEN_STEPS)
        assert found == expected, (name, found)


def test_the_speed_is_measured_on_the_device_for_both_encoders():
    assert report()["measured"] == ["tiny", measure.BASE]
