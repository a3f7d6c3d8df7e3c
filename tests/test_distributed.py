"""Several processes: shards of a batch, dropout masks, two against one, a killed process."""
import contextlib
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import torch

import multitask_classifier
from data.batches import collate_shard
from multitask_classifier import MultitaskBERT
from support.run import read_metrics
from tests.helpers import PROJECT, KINDS, killed_after, run, three_task_model, workspace


# ---------------------------------------------------------------- processes

def start_processes(*flags, patch=""):
    """The training script as two processes, started as torchrun starts them. patch: code that runs
    before it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    setting = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    code = f"import sys\n{patch}\nimport multitask_classifier as m\nsys.exit(m.exit_status(m.main))"
    command = [sys.executable, "-c", code, *map(str, flags)]
    return [subprocess.Popen(command, env={**setting, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                             cwd=PROJECT, text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT)
            for rank in range(2)]


def finish(processes):
    """[(exit status, what was printed)]. No process outlives this, so a deadlock fails the check.
    """
    try:
        printed = [process.communicate(timeout=60)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, printed)]


def encoder_without_dropout():
    """A folder with the tiny encoder. Two processes draw other dropout masks than one, so they are
    compared without."""
    folder = workspace() / "tiny-without-dropout"
    if not folder.exists():
        shutil.copytree(workspace() / "tiny", folder)
        config = json.loads((folder / "config.json").read_text())
        config["hidden_dropout_prob"] = 0.0
        (folder / "config.json").write_text(json.dumps(config))
    return folder


# ---------------------------------------------------------------- shards

def test_the_shards_of_a_batch_are_a_partition_of_it():
    _, examples = three_task_model()
    for size in (1, 2, 7):
        indices = np.random.permutation(20)[:size]
        shards = [collate_shard(examples["para"], indices, rank, 3) for rank in range(3)]
        assert [shard is None for shard in shards] == [rank >= size for rank in range(3)]
        shards = [shard for shard in shards if shard]
        own = np.concatenate([shard.indices for shard in shards])
        assert sorted(own) == sorted(indices)
        for shard in shards:
            assert math.isclose(shard.share, len(shard.indices) / size)
            assert torch.equal(shard.labels, torch.tensor(examples["para"].labels[shard.indices]))


def first_step_of(rank, world):
    """[(indices, share, seed of the dropout masks)] of the tasks in the first step, as process
    `rank` of `world` computes them."""
    root, seen, real = workspace(), [], MultitaskBERT.logits

    def logits(model, task, batch, *args):
        seen.append((batch.indices.tolist(), batch.share, torch.initial_seed()))
        return real(model, task, batch, *args)

    flags = ["--option", "finetune", "--model", root / "tiny", "--data_dir", root / "data",
             "--batch_size", 7, "--name", root / "runs" / f"step-of-{rank}-of-{world}"]
    with mock.patch.object(multitask_classifier, "rank_and_world", lambda: (rank, world)), \
            mock.patch.object(MultitaskBERT, "logits", logits):
        killed_after(1, multitask_classifier.main, *flags)
    return seen


def test_processes_share_a_batch_but_no_dropout_mask():
    whole, first, second = first_step_of(0, 1), first_step_of(0, 2), first_step_of(1, 2)
    assert len(whole) == len(first) == len(second) == len(KINDS)
    for (indices, share, _), (even, *_), (odd, *_) in zip(whole, first, second):
        assert share == 1 and len(indices) == 7
        assert (even, odd) == (indices[::2], indices[1::2])
    assert [share for _, share, _ in first + second] == [4 / 7] * 3 + [3 / 7] * 3

    seeds = {seed for *_, seed in first + second}
    assert len(seeds) == 6, "each process and task has dropout masks of its own"


# ---------------------------------------------------------------- two processes against one

def assert_equal_runs(alone, together):
    """The folders of two runs hold the same weights, scores, predictions and losses, up to
    rounding."""
    last, other = (torch.load(folder / "last.pt", weights_only=True)
                   for folder in (alone, together))
    model, other_model = last["model"], other["model"]
    difference, scale = (
        math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))
        for tensors in ([model[name] - other_model[name] for name in model], model.values()))
    assert difference < 1e-6 * scale, difference / scale
    assert (last["gradvac_targets"] - other["gradvac_targets"]).abs().max() < 1e-6

    scores, other_scores = (read_metrics(folder, "evaluation") for folder in (alone, together))
    assert len(scores) == len(other_scores) == 2
    for a, b in zip(scores, other_scores):
        assert all(abs(a["dev"][task] - b["dev"][task]) < 1e-4 for task in KINDS)
    assert np.abs(similarities(alone) - similarities(together)).max() < 1e-4

    # Adam would hide a gradient of a wrong scale, the losses do not
    lines, other_lines = (read_metrics(folder, "step") for folder in (alone, together))
    assert len(lines) == len(other_lines) > 0
    for a, b in zip(lines, other_lines):
        assert a["losses"].keys() == b["losses"].keys()
        for task in a["losses"]:
            assert abs(a["losses"][task] - b["losses"][task]) < 1e-4, (a, b)


def similarities(folder):
    lines = (folder / "predictions" / "sts-dev-output.csv").read_text().splitlines()[1:]
    return np.array([float(line.split(" , ")[1]) for line in lines])


def assert_two_processes_equal_one(name, *flags):
    """Twenty steps on half batches against whole ones, without dropout."""
    root = workspace()
    flags = ["--option", "finetune", "--model", encoder_without_dropout(), "--data_dir",
             root / "data", "--hidden_dropout_prob", 0, "--epochs", 2, "--epoch_length", 10,
             "--lr", 1e-3, *flags]
    alone, together = (root / "runs" / f"{name}-{n}" for n in (1, 2))
    processes = start_processes(*flags, "--name", together)
    status, printed, _ = run(*flags, name=str(alone))
    assert status == 0, printed

    (status, printed), (other_status, other_printed) = finish(processes)
    assert (status, other_status) == (0, 0), printed + other_printed
    assert printed.count("best epoch") == 1
    assert "epoch" not in other_printed, "only the first process prints"
    assert_equal_runs(alone, together)


def test_two_processes_equal_one():
    assert_two_processes_equal_one("groups", "--pcgrad", "sst+para,sts", "--batch_size", 5)


def test_two_processes_equal_one_where_one_of_them_has_an_empty_shard():
    # a batch of one example; gradients added up over three steps
    assert_two_processes_equal_one(
        "gradvac", "--gradvac", "--batch_size", "sst=5,para=23,sts=1", "--accumulate", 3,
        "--proximal", "--proximal_mu", .5, "--proximal_beta", .9)


def test_two_processes_equal_one_in_steps_of_one_task():
    assert_two_processes_equal_one("annealed", "--schedule", "annealed", "--accumulate", 3,
                                   "--pcgrad", "--batch_size", 5)


def test_two_processes_equal_one_with_an_optimizer_per_task():
    assert_two_processes_equal_one("own", "--schedule", "mtdnn", "--optimizer_per_task", "--pal",
                                   "--pal_size", 8, "--batch_size", 5)


# ---------------------------------------------------------------- a killed process

def wait_for_a_step(folder):
    deadline = time.perf_counter() + 60
    while time.perf_counter() < deadline:
        with contextlib.suppress(FileNotFoundError):
            if read_metrics(folder, "step"):
                return
        time.sleep(0.2)
    raise AssertionError("no step in a minute")


def test_a_killed_process_ends_the_run():
    """Without torchrun, which would end the others by itself: the survivor notices, reports it in
    one line, and ends."""
    root = workspace()
    for victim in (0, 1):
        folder = root / "runs" / f"killed-{victim}"
        processes = start_processes("--option", "finetune", "--model", root / "tiny", "--data_dir",
                                    root / "data", "--epoch_length", 100000, "--name", folder)
        try:
            wait_for_a_step(folder)
            start = time.perf_counter()
            processes[victim].kill()
        finally:
            status, printed = finish(processes)[1 - victim]
        assert time.perf_counter() - start < 60 and status == 1, printed
        last = printed.splitlines()[-1]
        assert "lost the connection to another process of this run" in last, printed
        assert "Traceback" not in printed, printed


def test_processes_whose_clocks_differ_save_without_a_deadlock():
    """A save writes the pending line of metrics, which is a sum over the processes: one that finds
    it due alone would wait for the others forever."""
    root = workspace()
    folder = root / "runs" / "clocks"
    patch = ("import os, support.run\n"
             "support.run.Run.due = lambda run, minutes: os.environ['RANK'] == '0'")
    flags = ["--option", "finetune", "--model", root / "tiny", "--data_dir", root / "data",
             "--epochs", 1, "--epoch_length", 23, "--name", folder]
    finished = finish(start_processes(*flags, patch=patch))
    assert [status for status, _ in finished] == [0, 0], finished
    assert [line["step"] for line in read_metrics(folder, "step")] == [10, 20, 23]
