"""multitask_classifier.py: the flags and what they change, the training loop, heads and losses,
projected attention layers in a model, frozen encoders, auxiliary tasks, earlier runs as a start."""
import contextlib
import io
import itertools
import json
import math
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

import multitask_classifier
import optimizer
import pcgrad
import pretrain_mlm
import smart
from bert import BertModel
from data.batches import ONE_TASK_PER_STEP, SCHEDULES, collate
from data.tasks import TASKS, read_examples
from data.tokenizer import load_tokenizer, tokenize
from multitask_classifier import Head, MultitaskBERT, ordinal_log_loss, task_loss
from optimizer import AdamW, learning_rate
from pcgrad import GradientBuffer
from support import flags
from support.evaluation import encode_once, predict, score, to_predictions
from support.run import read_metrics
from tests.helpers import (KINDS, TINY, copy_of_tiny, heads_of, quietly, remains, run, same,
                           three_task_model, trained, without_curves, workspace)


def defaults(*argv):
    """{flag: value} of a new run with --option finetune."""
    return vars(flags.parse_flags(multitask_classifier.get_parser, flags.check_training_flags,
                                  ["--option", "finetune", *argv], "--name"))


def last_state(folder):
    return torch.load(folder / "last.pt", weights_only=True)


def run_from(source, *more, name):
    """A run of one step that starts from the encoder and heads of the run `source`, at a rate of 0
    unless `more` has another. Returns (exit status, what was printed, its folder)."""
    folder = source.with_name(f"{source.name}-{name}")
    status, printed = quietly(
        multitask_classifier.main, "--option", "finetune", "--init_from", source, "--lr", 0,
        "--epochs", 1, "--epoch_length", 1, "--data_dir", workspace() / "data", "--name", folder,
        *more)
    return status, printed, folder


def observed_run(*flags, steps):
    """Run, and note what reaches the optimizer, the gradient buffer and the model in training.

    updates: (rate of the tensors that decay, rate of the others, gradient norm) of each optimizer
    step. starts: (nothing is added up yet, the step ends an update) of each step. orders: the seeds
    of the projections. sums: row 0 of J after each `combine`. batches: (task, Batch, seed of the
    dropout masks).
    """
    seen = SimpleNamespace(updates=[], starts=[], orders=[], sums=[], batches=[])

    class RecordingAdamW(AdamW):
        def step(self):
            decay, plain = self.param_groups
            gradients = [p.grad for p in decay["params"] + plain["params"] if p.grad is not None]
            norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
            seen.updates.append((decay["lr"], plain["lr"], norm))
            super().step()

    class RecordingBuffer(GradientBuffer):
        def begin(self, tasks, is_update=True):
            super().begin(tasks, is_update)
            heads = [p.grad for own in self.heads.values() for p in own]
            empty = not self.J.any() and all(gradient is None for gradient in heads)
            seen.starts.append((empty, is_update))

        def combine(self, seed):
            super().combine(seed)
            seen.orders.append(seed)
            seen.sums.append(self.J[0].clone())

    real_logits = MultitaskBERT.logits

    def logits(model, task, batch, perturbation=None):
        if model.training:
            seen.batches.append((task, batch, torch.initial_seed()))
        return real_logits(model, task, batch, perturbation)

    with mock.patch.object(optimizer, "AdamW", RecordingAdamW), \
            mock.patch.object(multitask_classifier, "GradientBuffer", RecordingBuffer), \
            mock.patch.object(MultitaskBERT, "logits", logits):
        status, seen.printed, seen.folder = run(*flags, steps=steps)
    assert status == 0, seen.printed
    return seen


# ---------------------------------------------------------------- flags and what they change

def reason_to_reject(option, schedule, head, surgery):
    """A part of the message where a combination is rejected; None where it runs."""
    if option == "pretrain" and head == "cosine":
        return "nothing to train"
    if option == "pretrain" and surgery:
        return "no shared gradients"
    if schedule in ONE_TASK_PER_STEP and surgery:
        return "no two tasks"
    return None


@without_curves
def test_every_combination_runs_or_is_rejected():
    """All 160 of option, schedule, pair head (for both pair tasks), pooling, and surgery or none:
    86 train, evaluate, save and predict; 74 are rejected before anything is read.

    To be quick they train for one step with a batch of every task, or for three of one task, the
    fewest that --schedule sequential can divide among three; and no curves are drawn."""
    counts = {"ran": 0, "rejected": 0}
    for option, schedule, head, pooling, surgery in itertools.product(
            ("pretrain", "finetune"), SCHEDULES, ("cross", "uv", "uv_diff", "cosine"),
            ("cls", "mean"), ((), ("--pcgrad",))):
        combination = ["--schedule", schedule, "--pair_head", head, "--pooling", pooling, *surgery]
        steps = 3 if schedule in ONE_TASK_PER_STEP else 1
        status, printed, folder = run(*combination, option=option, steps=steps)

        reason = reason_to_reject(option, schedule, head, surgery)
        if reason:
            assert status == 2 and reason in printed and printed.count("\n") == 1, printed
            assert not folder.exists()
        else:
            assert status == 0 and "overall_2023" in printed, (option, combination, printed)
            assert (folder / "predictions" / "sts-test-output.csv").exists()
        counts["rejected" if reason else "ran"] += 1
    assert counts == {"ran": 86, "rejected": 74}


@without_curves
def test_tasks_meet_in_accumulated_steps_of_one_task():
    for schedule in ("mtdnn", "annealed"):
        status, printed, folder = run("--schedule", schedule, "--pcgrad", "--accumulate", 4,
                                      steps=8)
        assert status == 0, printed
        gradients = read_metrics(folder, "step")[-1]["gradients"]
        assert "sst-para" in gradients["cosine"] and gradients["updates"] == 2


@without_curves
def test_each_flag_changes_the_run():
    """The flags that leave names and shapes of the tensors as they are; the others show in the
    shapes. The same flags give the same bits."""
    base = trained(steps=3)
    assert same(base, trained(steps=3))

    for changed in (
            ["--pcgrad"], ["--gradvac"], ["--pcgrad", "--surgery_scope", "tensor"],
            ["--pcgrad", "sst+para,sts"], ["--seed", 1], ["--lr", 1e-3], ["--clip", 0.1],
            ["--warmup", 0.5], ["--weight_decay", 10], ["--lr_schedule", "constant"],
            ["--accumulate", 2], ["--batch_size", 4], ["--schedule", "mixed"],
            ["--schedule", "sequential"], ["--schedule", "mtdnn"], ["--schedule", "annealed"],
            ["--hidden_dropout_prob", 0.7], ["--pooling", "cls"], ["--epochs", 2],
            ["--sst_loss", "oll1"], ["--limit", "para=.5"], ["--tasks", "sts,para,sst"],
            ["--sst_train", workspace() / "data" / "ids-sst-dev.csv"]):
        other = trained(*changed, steps=3)
        assert other.keys() == base.keys() and not same(base, other), changed


@without_curves
def test_gradient_vaccine_differs_from_pcgrad_once_its_targets_have_moved():
    assert not same(*(trained(surgery, "--batch_size", 4, steps=10)
                      for surgery in ("--pcgrad", "--gradvac")))


@without_curves
def test_measuring_gradients_changes_the_order_of_sums_and_nothing_else():
    base, measured = trained(steps=3), trained("--log_gradients", steps=3)
    assert max((measured[name] - base[name]).abs().max() for name in base) < 1e-6


@without_curves
def test_new_heads_are_drawn_from_the_seed():
    first, again, other = (trained("--lr", 0, "--seed", seed)["heads.sst.linear.weight"]
                           for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@without_curves
def test_pretrain_trains_the_heads_alone():
    frozen, new = (trained(*rate, steps=3, option="pretrain") for rate in ((), ("--lr", 0)))
    encoder = load_file(workspace() / "tiny" / "model.safetensors")
    assert all(torch.equal(frozen["bert." + name], encoder[name]) for name in encoder)
    assert not torch.equal(frozen["heads.sst.linear.weight"], new["heads.sst.linear.weight"])


def test_defaults_are_those_of_the_papers_and_the_course():
    expected = {
        "lr": 1e-4, "lr_schedule": "linear", "warmup": 0.1, "weight_decay": 0.0, "clip": 1.0,
        "epochs": 10, "seed": 11711, "schedule": "round_robin", "epoch_length": "longest",
        "accumulate": 1, "batch_size": {"sst": 16, "para": 32, "sts": 12}, "pooling": "mean",
        "hidden_dropout_prob": 0.3, "pair_head": {"para": "cosine", "sts": "cosine"},
        "sst_loss": "ce", "surgery": None, "surgery_scope": "vector", "smart": False,
        "proximal": False, "pal": False, "limit": None, "save_every": 5.0,
        "trained": ["sst", "para", "sts"]}
    assert expected.items() <= defaults().items()
    assert defaults("--tasks", "cfimdb")["batch_size"] == {"cfimdb": 8}
    assert defaults("--schedule", "mixed")["batch_size"] == 20

    frozen = {"option": "pretrain", "lr": 1e-3, "pair_head": {"para": "cross", "sts": "cross"}}
    assert frozen.items() <= defaults("--option", "pretrain").items()
    assert multitask_classifier.get_parser().parse_args([]).option == "pretrain"
    assert pcgrad.VACCINE_BETA == 0.01
    assert AdamW([nn.Parameter(torch.zeros(1))]).defaults == {
        "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.0, "correct_bias": True}


def test_defaults_of_pretraining_are_berts():
    expected = {"epochs": 4, "batch_size": 32, "lr": 1e-4, "warmup": 0.1, "weight_decay": 0.01,
                "clip": 1.0, "whole_word": False, "seed": 11711, "tasks": ["sst", "para", "sts"],
                "save_every": 5.0}
    found = flags.parse_flags(pretrain_mlm.get_parser, pretrain_mlm.check_flags, ["--out", "x"],
                              "--out")
    assert expected.items() <= vars(found).items()


def test_settings_of_a_switch_are_the_papers():
    given = defaults("--smart", "--proximal", "--pal")
    smoothness = {"weight": 5.0, "eps": 1e-5, "sigma": 1e-5, "step_size": 1e-3, "steps": 1,
                  "norm": "inf"}
    proximal = {"mu": 1.0, "beta": None}  # None: .99, then .999
    expected = {**{f"smart_{name}": value for name, value in smoothness.items()},
                **{f"proximal_{name}": value for name, value in proximal.items()},
                "pal_size": 204, "pal_g": "attention"}
    assert expected.items() <= given.items()
    assert given["smart"] and given["proximal"] and given["pal"]

    # one that is given changes itself alone
    for switch, setting, value in (("smart", "eps", 1.0), ("smart", "step_size", 2.0),
                                   ("proximal", "mu", 2.0), ("pal", "size", 8)):
        found = defaults(f"--{switch}", f"--{switch}_{setting}", str(value))
        assert {name: found[name] for name in expected} == {**expected,
                                                            f"{switch}_{setting}": value}

    # the classes have the same defaults
    assert vars(smart.Smoothness(KINDS)) == vars(smart.Smoothness(KINDS, **smoothness))
    teacher = smart.Proximal(nn.Linear(1, 1), KINDS)
    assert {"mu": teacher.mu, "beta": teacher.beta} == proximal


def test_smart_and_surgery_are_for_auxiliary_tasks_too_by_default():
    found = defaults("--smart", "--pcgrad", "--aux", "stars=x.csv")
    assert found["smart_tasks"] == ["sst", "para", "sts", "stars"]
    assert found["gradient_rows"] == [["sst"], ["para"], ["sts"], ["stars"]]


@without_curves
def test_amp_is_bfloat16_or_is_rejected():
    status, printed, _ = run("--amp")
    if not torch.cpu._is_avx512_bf16_supported():
        assert status == 2 and "bfloat16" in printed, printed
        return
    assert status == 0, printed
    model, examples = three_task_model()
    batch = collate(examples["sst"], np.arange(8))
    whole = model.eval().logits("sst", batch)
    model.amp = True
    half = model.logits("sst", batch)
    assert half.dtype == torch.float32 and 0 < (half - whole).abs().max() < 0.02


@without_curves
def test_a_gpu_is_used_or_the_flag_is_rejected():
    status, printed, _ = run("--use_gpu")
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        assert status == 0, printed
    else:
        assert status == 2 and "--use_gpu" in printed, printed


# ---------------------------------------------------------------- the loop

@without_curves
def test_epochs_are_as_long_as_asked():
    """24 examples of each task; batches of sst=16, para=32, sts=12 by default."""
    for length, steps in ((["longest"], 2), (["shortest"], 1), ([5], 5),
                          (["longest", "--batch_size", 5], 5),
                          (["longest", "--batch_size", "sst=24,para=3,sts=7"], 8),
                          (["longest", "--schedule", "sequential"], 5),
                          (["longest", "--schedule", "mixed"], 2),
                          (["longest", "--tasks", "cfimdb"], 3)):
        status, printed, folder = run("--epoch_length", *length)
        assert status == 0, printed
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        assert last["step"] == steps, length


@without_curves
def test_the_training_loop_does_what_its_flags_say():
    """Seven steps per epoch, three per update: what reaches the optimizer, and what the model."""
    options = ["--accumulate", 3, "--epochs", 2, "--clip", 0.01, "--weight_decay", 0.1,
               "--warmup", 0.5, "--batch_size", 4]
    for surgery in ([], ["--pcgrad"]):
        seen = observed_run(*options, *surgery, steps=7)
        # the schedule's rate at six updates, and the global norm after surgery
        rates = [learning_rate(1e-4, update / 7, warmup=0.5) for update in range(1, 7)]
        assert [(decay, plain) for decay, plain, _ in seen.updates] == list(zip(rates, rates))
        assert all(abs(norm - 0.01) < 1e-5 for _, _, norm in seen.updates), seen.updates

        # an update ends after steps 3, 6 and 7 of an epoch, and the next starts from nothing
        empty, is_update = zip(*seen.starts)
        assert empty == (True, False, False, True, False, False, True) * 2
        assert is_update == (False, False, True, False, False, True, True) * 2

        # a batch of each task per step, with dropout masks and projection orders of their own
        assert [task for task, _, _ in seen.batches] == ["sst", "para", "sts"] * 14
        assert len({seed for _, _, seed in seen.batches}) == 42
        assert len(set(seen.orders)) == len(seen.orders) == 6

        # six batches of four are a pass over the 24 examples, shuffled anew for the next
        indices = [batch.indices.tolist() for task, batch, _ in seen.batches if task == "sst"]
        assert sorted(sum(indices[:6], [])) == sorted(sum(indices[6:12], [])) == list(range(24))
        assert indices[:6] != indices[6:12]

    other = observed_run(*options, "--pcgrad", "--seed", 1, steps=7)
    assert not {seed for *_, seed in seen.batches} & {seed for *_, seed in other.batches}
    assert not set(seen.orders) & set(other.orders)


@without_curves
def test_weight_decay_is_for_weights_alone():
    groups = []
    real = AdamW.step

    def step(self, closure=None):
        groups[:] = self.param_groups
        return real(self, closure)

    with mock.patch.object(AdamW, "step", step):
        status, printed, folder = run("--weight_decay", 0.1, "--pal", "--pal_size", 8)
    assert status == 0, printed
    decay, plain = groups
    assert decay["weight_decay"] == 0.1 and plain["weight_decay"] == 0
    assert all(p.ndim >= 2 for p in decay["params"]) and all(p.ndim < 2 for p in plain["params"])
    # together they are all that is trained: everything but the pooler, which mean pooling skips
    sizes = [p.numel() for p in decay["params"] + plain["params"]]
    assert sum(sizes) == sum(tensor.numel() for name, tensor in last_state(folder)["model"].items()
                             if "pooler" not in name)


@without_curves
def test_accumulated_steps_are_one_update_of_their_summed_losses():
    """Two steps of one example each: N times the gradient of one batch N times as large."""
    encoder = copy_of_tiny(hidden_dropout_prob=0.0)
    seen = observed_run("--tasks", "sst", "--accumulate", 2, "--batch_size", 1, "--model", encoder,
                        "--hidden_dropout_prob", 0, "--lr", 0, steps=2)
    assert len(seen.sums) == 1 and len(seen.batches) == 2

    model = MultitaskBERT.load(seen.folder)  # a rate of 0 has left the weights as they were
    batches = [batch for _, batch, _ in seen.batches]
    both = collate(batches[0].examples, np.concatenate([batch.indices for batch in batches]))
    for total in (sum(model.loss("sst", batch) for batch in batches),
                  2 * model.loss("sst", both)):
        gradients = torch.autograd.grad(total, model.shared_parameters())
        expected = torch.cat([gradient.flatten() for gradient in gradients])
        assert (seen.sums[0] - expected).norm() < 1e-5 * expected.norm()


@without_curves
def test_the_best_epoch_is_kept():
    """Of two epochs that are equal the first."""
    scores, encoders = iter((0.2, 0.5, 0.3, 0.5)), []

    def evaluate(model, data, seed):
        assert seed == 11711
        encoders.append(model.bert.pos_embedding.weight.detach().clone())
        value = next(scores)
        return {"dev": dict.fromkeys(data, value), "train": dict.fromkeys(data, value), "f1": {}}

    with mock.patch.object(multitask_classifier, "evaluate", evaluate):
        status, printed, folder = run("--epochs", 4)
    assert status == 0 and "best epoch: 2\n" in printed, printed

    saved = load_file(folder / "model.safetensors")["bert.embeddings.position_embeddings.weight"]
    assert torch.equal(saved, encoders[1]) and not torch.equal(saved, encoders[3])
    last = last_state(folder)
    assert last["epoch"] == 4
    assert torch.equal(last["model"]["bert.pos_embedding.weight"], encoders[3])


@without_curves
def test_an_optimizer_per_task_has_moments_and_a_schedule_of_its_own():
    options = "--schedule", "sequential", "--tasks", "para,sst,sts", "--batch_size", 8
    one, own = (run(*options, *more, steps=9)[2] for more in ((), ("--optimizer_per_task",)))
    assert not same(*(load_file(folder / "model.safetensors") for folder in (one, own)))

    # nine steps: three of each task, which alone has trained its head
    counts = []
    for folder in (one, own):
        optimizers = last_state(folder)["optimizers"]
        counts.append({task: ({int(state["step"]) for state in found["adamw"]["state"].values()},
                              found["done"]) for task, found in optimizers.items()})
    assert counts[0] == dict.fromkeys(("para", "sst", "sts"), ({9, 3}, 9)), counts
    assert counts[1] == dict.fromkeys(("para", "sst", "sts"), ({3}, 3)), counts

    progress = []
    with mock.patch.object(optimizer, "learning_rate",
                           lambda *args: progress.append(args[1]) or learning_rate(*args)):
        run(*options, "--optimizer_per_task", "--epochs", 2, steps=9)
    assert progress == [1 / 7, 2 / 7, 3 / 7] * 3 + [4 / 7, 5 / 7, 6 / 7] * 3


def test_a_small_batch_is_learned_by_heart():
    model, examples = three_task_model()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    batches = {task: collate(examples[task], np.arange(4)) for task in examples}
    buffer = GradientBuffer(model.shared_parameters(), heads_of(model), "pcgrad")
    adamw, losses = AdamW(model.parameters(), lr=5e-3), []

    for step in range(75):
        buffer.begin(batches)
        losses.append(0)
        for task, batch in batches.items():
            loss = model.loss(task, batch)
            buffer.backward(task, loss)
            losses[-1] += loss.item()
        buffer.combine(step)
        adamw.step()
    assert losses[0] > 2 and losses[-1] < 0.05, losses[::15]


# ---------------------------------------------------------------- runs that diverge

@without_curves
def test_a_diverged_run_fails():
    status, printed, _ = run("--lr", 1e30, "--clip", 0, steps=20)
    last = printed.splitlines()[-1]
    assert status == 1 and "the loss of " in last and "step" in last, printed
    assert "Traceback" not in printed


@without_curves
def test_a_loss_that_is_not_finite_is_located_and_the_last_checkpoint_is_intact():
    """The message names task, step of the run, epoch and examples."""
    batches, real_collate = [], multitask_classifier.collate_shard

    def collate_shard(examples, indices, rank, world):
        batches.append([examples.ids[i] for i in indices])
        return real_collate(examples, indices, rank, world)

    def nan_in_the_eighth_batch(task, *args):
        return task_loss(task, *args) * (math.nan if len(batches) == 8 else 1)

    # the eighth batch is the second of the third step's three. Losses are checked with every line
    # of the log, so before every save. saved: of the last checkpoint
    for minutes, steps, epoch, batches_run, saved in ((0, 20, 1, 9, {"epoch": 0, "step": 2}),
                                                      (0, 2, 2, 9, {"epoch": 1, "step": 0}),
                                                      (5, 20, 1, 30, None)):
        batches.clear()
        with mock.patch.multiple(multitask_classifier, task_loss=nan_in_the_eighth_batch,
                                 collate_shard=collate_shard):
            status, printed, folder = run("--save_every", minutes, "--epochs", 2, steps=steps)
        assert status == 1 and len(batches) == batches_run, printed
        ids = ", ".join(batches[7][:5])
        message = (f"the loss of para is nan at step 3 (epoch {epoch}), 24 examples of "
                   f"quora-train.csv with the ids {ids}, ...")
        assert message in printed, printed

        if saved:
            last = last_state(folder)
            assert saved.items() <= last.items()
            assert all(tensor.isfinite().all() for tensor in last["model"].values())
        assert (folder / "last.pt").exists() == (saved is not None)


@without_curves
def test_weights_that_are_not_finite_end_the_run():
    """Though every loss was finite."""
    status, printed, folder = run("--tasks", "sst", "--lr", 1e39, "--clip", 0, "--warmup", 0,
                                  "--lr_schedule", "constant", steps=1)
    assert status == 1 and "is not finite after step 1 of epoch 1" in printed, printed
    assert not (folder / "model.safetensors").exists() and not (folder / "last.pt").exists()


@without_curves
def test_outputs_that_are_not_finite_end_the_run():
    """After one step at such a rate loss and weights are finite, but not what they compute."""
    diverging = ["--lr", 1e15, "--clip", 0, "--warmup", 0, "--lr_schedule", "constant"]
    for tasks in ("sst", "sst,para,sts"):
        status, printed, folder = run(*diverging, "--tasks", tasks, steps=1)
        assert status == 1 and "are not finite" in printed.splitlines()[-1], printed
        assert not (folder / "model.safetensors").exists() and "Traceback" not in printed


# ---------------------------------------------------------------- logged gradients

@without_curves
def test_logged_gradients_are_means_since_the_last_line():
    real, measured = pcgrad.diagnostics, []

    def diagnostics(*args):
        measured.append(real(*args))
        return measured[-1]

    with mock.patch.object(pcgrad, "diagnostics", diagnostics):
        status, printed, folder = run("--pcgrad", steps=13)
    lines = [line["gradients"] for line in read_metrics(folder, "step")]
    assert status == 0 and len(measured) == 13, printed
    assert [line["updates"] for line in lines] == [10, 3]
    logged = [line["cosine"] for line in lines]
    for cosines, since in zip(logged, (measured[:10], measured[10:])):
        assert len(cosines) == 3
        for pair, cosine in cosines.items():
            assert abs(cosine - np.mean([record["cosine"][pair] for record in since])) < 1e-9
    for line, since in zip(lines, (measured[:10], measured[10:])):
        for pair, conflict in line["conflict"].items():
            assert abs(conflict - np.mean([each["cosine"][pair] < 0 for each in since])) < 1e-9


@without_curves
def test_gradients_are_logged_where_tasks_meet():
    for surgery, pairs in ((["--pcgrad"], 3), (["--log_gradients"], 3),
                           (["--gradvac", "sst+para,sts"], 1), ([], 0)):
        status, printed, folder = run(*surgery, "--batch_size", 4, steps=12)
        lines = read_metrics(folder, "step")
        assert status == 0 and len(lines) == 2, printed
        for line in lines:
            cosines = line["gradients"]["cosine"] if pairs else {}
            assert ("gradients" in line) == (pairs > 0) and len(cosines) == pairs
            assert all(-1 <= cosine <= 1 for cosine in cosines.values())
        targets = last_state(folder)["gradvac_targets"]
        assert (targets.abs().sum() > 0) == ("--gradvac" in surgery)


# ---------------------------------------------------------------- heads and losses

def test_heads_compute_their_formulas():
    u, v = torch.randn(2, 6, 16)
    pooled = torch.cat([u, v])
    for kind, features in (("uv", [u, v]), ("uv_diff", [u, v, (u - v).abs()])):
        head = Head(TASKS["para"], kind, 16, 0.0)
        expected = torch.cat(features, 1) @ head.linear.weight.T + head.linear.bias
        assert (head(pooled) - expected).abs().max() < 1e-6
    for task, kind in (("sst", "single"), ("para", "cross"), ("sts", "cross")):
        head = Head(TASKS[task], kind, 16, 0.0)
        expected = pooled @ head.linear.weight.T + head.linear.bias
        assert expected.shape == (12, TASKS[task].num_outputs)
        assert (head(pooled) - expected).abs().max() < 1e-6

    cosine = (u * v).sum(1) / u.norm(dim=1) / v.norm(dim=1)
    similarity = Head(TASKS["sts"], "cosine", 16, 0.0)
    assert (similarity(pooled)[:, 0] - 5 * cosine).abs().max() < 1e-5
    assert not list(similarity.parameters())
    logit = Head(TASKS["para"], "cosine", 16, 0.0)
    expected = logit.weight * cosine + logit.bias
    assert (logit(pooled)[:, 0] - expected).abs().max() < 1e-5
    assert logit.weight.requires_grad and logit.bias.requires_grad


def test_losses_are_those_of_their_kinds():
    labels = torch.tensor([0.0, 1.0])
    assert abs(task_loss(TASKS["sst"], torch.zeros(2, 5), labels) - math.log(5)) < 1e-6
    assert abs(task_loss(TASKS["para"], torch.zeros(2, 1), labels) - math.log(2)) < 1e-6
    assert task_loss(TASKS["sts"], torch.tensor([[2.0], [4.0]]), labels) == (4 + 9) / 2

    # away from zero a label must take its own class
    logits = torch.randn(2, 5)
    expected = -logits.log_softmax(dim=-1)[torch.arange(2), torch.arange(2)].mean()
    assert abs(task_loss(TASKS["sst"], logits, labels) - expected) < 1e-6
    expected = -(torch.sigmoid(-logits[0, 0]).log() + torch.sigmoid(logits[1, 0]).log()) / 2
    assert abs(task_loss(TASKS["para"], logits[:, :1], labels) - expected) < 1e-6


def test_heads_start_where_they_should():
    """A regression in the middle of its scale; the cosine's logit decides at .7."""
    assert Head(TASKS["sts"], "uv", 16, 0.0).linear.bias.tolist() == [2.5]
    cosine = Head(TASKS["para"], "cosine", 16, 0.0)
    assert (cosine.weight.item(), cosine.bias.item()) == (10, -7)
    linear = Head(TASKS["sst"], "single", 768, 0.0).linear
    assert abs(linear.weight.std() - 0.02) < 0.002 and not linear.bias.any()


def test_heads_have_dropout_in_training():
    for kind in ("cross", "uv", "uv_diff"):
        head, pooled = Head(TASKS["para"], kind, 16, 0.5), torch.randn(8, 16)
        assert not torch.equal(head(pooled), head(pooled))
        assert torch.equal(head.eval()(pooled), head(pooled))


# of the label 2 where all five classes are equally probable
ORDINAL = {"oll1": 1.339, "oll1.5": 1.709, "oll2": 2.231}


def test_ordinal_log_loss_is_its_formula():
    two = torch.tensor([2.0])
    for alpha, expected in zip((1.0, 1.5, 2.0), ORDINAL.values()):
        assert abs(ordinal_log_loss(torch.zeros(1, 5), two, alpha) - expected) < 5e-4

    logits = torch.randn(6, 5, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 4, 4], dtype=torch.float64)
    p = logits.softmax(dim=-1)
    terms = [abs(float(labels[n]) - i) ** 1.5 * (1 - p[n, i]).log()
             for n in range(6) for i in range(5)]
    assert abs(ordinal_log_loss(logits, labels, 1.5) + sum(terms) / 6) < 1e-12


def test_ordinal_log_loss_stays_finite_where_a_probability_rounds_to_one():
    logits = torch.tensor([[50.0, 0, 0, 0, 0]], requires_grad=True)
    loss = ordinal_log_loss(logits, torch.tensor([4.0]), 1.0)
    loss.backward()
    assert abs(loss - 194.5) < 0.1 and logits.grad.isfinite().all() and logits.grad[0, 0] > 1


@without_curves
def test_sst_loss_is_for_sst_alone():
    """Not for an auxiliary task of the same kind."""
    batch = mock.Mock(labels=torch.tensor([2.0]))
    for name, expected in {"ce": math.log(5), **ORDINAL}.items():
        model = MultitaskBERT(BertModel(TINY), dict.fromkeys(("sst", "stars"), TASKS["sst"]), {},
                              "mean", 0.0, sst_loss=name)
        losses = {task: float(model.loss(task, batch, torch.zeros(1, 5))) for task in model.tasks}
        assert abs(losses["sst"] - expected) < 5e-4, name
        assert abs(losses["stars"] - math.log(5)) < 5e-4, name
    assert run("--sst_loss", "oll2")[0] == 0


@without_curves
def test_pooling_is_the_poolers_or_the_mean():
    for pooling in ("cls", "mean"):
        model, examples = three_task_model(pooling=pooling)
        batch = collate(examples["para"], np.arange(6))
        sequences = batch.input_ids, batch.attention_mask, batch.token_type_ids
        outputs = model.eval().bert(*sequences)
        expected = outputs["pooler_output"]
        if pooling == "mean":
            counts = batch.attention_mask.sum(dim=1, keepdim=True)
            expected = outputs["last_hidden_state"].sum(dim=1) / counts
        assert (model(*sequences) - expected).abs().max() < 1e-6

        # the pooler is trained only where it pools
        reached = any(p is model.bert.pooler_dense.weight for p in model.shared_parameters())
        assert reached == (pooling == "cls")
        assert MultitaskBERT.load(run("--pooling", pooling)[2]).pooling == pooling


# ---------------------------------------------------------------- frozen encoder

def test_the_kept_outputs_of_a_frozen_encoder_are_what_it_computes():
    indices = np.array([3, 11, 5])
    for pair_head in ({"para": "cross", "sts": "uv"}, {"para": "cosine", "sts": "cross"}):
        model, examples = three_task_model(option="pretrain", pair_head=pair_head)
        expected = {task: model.logits(task, collate(examples[task], indices))
                    for task in examples}
        with contextlib.redirect_stdout(io.StringIO()):
            encode_once(model, {task: {"train": part} for task, part in examples.items()})
        with mock.patch.object(model, "forward", side_effect=AssertionError("it ran again")):
            for task in examples:
                logits = model.logits(task, collate(examples[task], indices))
                assert (logits - expected[task]).abs().max() < 1e-5


@without_curves
def test_a_frozen_encoder_runs_once():
    """Unless SMART or projected attention layers change what it computes."""
    calls, real = [], MultitaskBERT.forward

    def forward(self, *args, **kwargs):
        calls.append(self)
        return real(self, *args, **kwargs)

    for more, once in (([], True), (["--proximal"], True), (["--pal", "--pal_size", 8], False),
                       (["--smart"], False)):
        counts = []
        for epochs in (1, 3):
            calls.clear()
            with mock.patch.object(MultitaskBERT, "forward", forward):
                status, printed, _ = run("--pair_head", "cross", "--epochs", epochs, *more,
                                         option="pretrain")
            assert status == 0, printed
            assert ("the encoder is frozen: it runs once" in printed) == once, printed
            counts.append(len(calls))
        assert (counts[0] == counts[1]) == once, counts


def test_a_frozen_encoder_runs_without_dropout():
    frozen, _ = three_task_model(option="pretrain")
    assert frozen.training and not frozen.bert.training
    assert all(head.training for head in frozen.heads.values())
    assert not any(p.requires_grad for p in frozen.bert.parameters())


# ---------------------------------------------------------------- projected attention layers

def random_pal_model(g):
    """A model with projected attention layers whose parameters are all away from 0 and 1."""
    model, examples = three_task_model(pal={"g": g, "size": 8})
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    return model, {task: collate(examples[task], np.arange(8)) for task in examples}


def test_projected_attention_changes_no_output_before_training():
    for g in ("attention", "identity"):
        without, examples = three_task_model()
        model, _ = three_task_model(pal={"g": g, "size": 8})
        model.load_state_dict(without.state_dict(), strict=False)
        model.eval()
        without.eval()
        for task in examples:
            batch = collate(examples[task], np.arange(8))
            assert torch.equal(model.logits(task, batch), without.logits(task, batch))


def test_a_task_reads_its_own_projected_attention_layers():
    for g in ("attention", "identity"):
        model, batches = random_pal_model(g)
        model.eval()
        before = {task: model.logits(task, batch) for task, batch in batches.items()}
        for changed in batches:
            state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            for parameter in model.pal[changed].parameters():
                parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
            for task, batch in batches.items():
                unchanged = torch.equal(model.logits(task, batch), before[task])
                assert unchanged == (task != changed)
            model.load_state_dict(state)


def test_a_step_on_one_task_leaves_the_layers_of_the_others_alone():
    for g in ("attention", "identity"):
        model, batches = random_pal_model(g)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        own = {task: model.own_parameters(task) for task in model.tasks}
        buffer = GradientBuffer(model.shared_parameters(), own)
        buffer.begin(["para"])
        buffer.backward("para", model.train().loss("para", batches["para"]))
        buffer.combine(0)
        AdamW(model.parameters(), lr=1e-2, weight_decay=0.1).step()

        for name, tensor in model.own_state().items():
            moved = not torch.equal(tensor, before[name])
            if ".para." not in name:
                assert not moved, name
            elif not name.endswith("key.bias"):  # attention does not depend on it
                assert moved, name


@without_curves
def test_projected_attention_is_trained_from_its_zero_start():
    assert trained("--pal", "--pal_size", 8)["pal.sst.up.weight"].abs().max() > 0


@without_curves
def test_a_run_with_projected_attention_comes_back_with_its_scores():
    for g in ("attention", "identity"):
        status, printed, folder = run("--pal", "--pal_g", g, "--pal_size", 8, "--pair_head",
                                      "cross", option="pretrain", steps=3)
        assert status == 0, printed
        best = read_metrics(folder, "evaluation")[-1]
        model, task = MultitaskBERT.load(folder), TASKS["sst"]
        assert bool(model.pal["sts"].attentions) == (g == "attention")
        dev = read_examples(workspace() / "data" / task.filename("dev"), task)
        tokenize(dev, load_tokenizer(folder), 64, cross=False)
        predictions = to_predictions(task, predict(model, "sst", dev))
        assert score(task, predictions, dev.labels) == best["dev"]["sst"]


# ---------------------------------------------------------------- other tasks, other examples

@without_curves
def test_an_auxiliary_task_is_trained_and_counts_in_no_dev_score():
    stars = workspace() / "data" / "stars-train.csv"
    status, printed, folder = run("--aux", f"stars={stars}", "--pcgrad", "sst+para+sts,stars",
                                  "--batch_size", 4, steps=3)
    assert status == 0, printed
    gradients = read_metrics(folder, "step")[-1]["gradients"]
    assert list(gradients["cosine"]) == ["sst+para+sts-stars"]
    last = read_metrics(folder, "evaluation")[-1]
    assert set(last["dev"]) == {"sst", "para", "sts"} and "stars" in last["train"]
    assert set(read_metrics(folder, "step")[-1]["losses"]) == {"sst", "para", "sts", "stars"}
    # labels 0..4 are in the file
    assert MultitaskBERT.load(folder).tasks["stars"].num_outputs == 5

    # it changes what the others learn
    others = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items()
              if "stars" not in name}
    without = trained("--batch_size", 4, steps=3)
    assert without.keys() == others.keys() and not same(without, others)


@without_curves
def test_a_task_can_be_scored_without_training():
    """A baseline: trained on one task, scored on all. The other heads stay as they were drawn."""
    status, printed, folder = run("--tasks", "sst", "--score_also", "para,sts", "--pair_head", "uv",
                                  "--epochs", 2, steps=3)
    assert status == 0, printed
    evaluations = read_metrics(folder, "evaluation")
    assert "overall_2023" in evaluations[0]
    assert set(read_metrics(folder, "step")[0]["losses"]) == {"sst"}

    # the best epoch is that of the task that is trained
    best = max(evaluations, key=lambda line: line["dev"]["sst"])
    assert f"best epoch: {best['epoch']}\n" in printed
    seed = ["--tasks", "sst", "--score_also", "para,sts", "--pair_head", "uv", "--lr", 0]
    drawn, kept = trained(*seed), load_file(folder / "model.safetensors")
    for task in ("para", "sts"):
        for name in (f"heads.{task}.linear.weight", f"heads.{task}.linear.bias"):
            assert torch.equal(drawn[name], kept[name])
            assert torch.equal(last_state(folder)["model"][name], kept[name])
    assert not torch.equal(drawn["heads.sst.linear.weight"], kept["heads.sst.linear.weight"])


@without_curves
def test_the_best_epoch_does_not_depend_on_tasks_that_are_not_trained():
    """The score of sst falls, and that of sts, which is scored alone, rises."""
    scores = iter(({"sst": 0.5, "sts": 0.1}, {"sst": 0.4, "sts": 0.9}))

    def evaluate(model, data, seed):
        dev = next(scores)
        return {"dev": dev, "train": dev, "f1": {}}

    with mock.patch.object(multitask_classifier, "evaluate", evaluate):
        status, printed, _ = run("--tasks", "sst", "--score_also", "sts", "--epochs", 2)
    assert status == 0 and "best epoch: 1\n" in printed, printed


@without_curves
def test_auxiliary_tasks_are_one_flag_each_and_their_files_have_any_name():
    root = Path(tempfile.mkdtemp(dir=workspace()))
    files = [root / name for name in ("stars,more=1.csv", "a=b,c=d.csv")]
    for path in files:
        shutil.copy(workspace() / "data" / "stars-train.csv", path)
    options = ["--aux", f"stars={files[0]}", "--aux", f"again={files[1]}", "--batch_size", 4]
    status, printed, folder = run("--tasks", "sst", *options)
    assert status == 0, printed
    assert "stars: 20 train examples" in printed and "again: 20 train examples" in printed, printed
    assert {"stars", "again"} < set(read_metrics(folder, "step")[-1]["losses"])

    # --resume reads the flags of the run; a path may be typed again, but no task added
    evaluations = remains(folder)[0]
    for typed in ((), options, options[:2]):
        status, printed = quietly(multitask_classifier.main, "--resume", folder, *typed)
        assert status == 0 and remains(folder)[0] == evaluations, printed
    status, printed = quietly(multitask_classifier.main, "--resume", folder, "--aux",
                              f"other={files[0]}")
    assert status == 2 and "--aux other is not in the run: leave it out" in printed, printed


def ids_seen(seen, task):
    return {batch.examples.ids[i] for name, batch, _ in seen.batches if name == task
            for i in batch.indices}


@without_curves
def test_limit_trains_on_a_seeded_fraction_of_the_examples():
    found = {}
    for fraction, seed in ((0.5, 11711), (0.25, 11711), (0.5, 1)):
        seen = observed_run("--limit", f"para={fraction}", "--batch_size", 4, "--seed", seed,
                            steps=12)
        expected = f"para: trained on {round(24 * fraction)} of its 24 examples"
        assert expected in seen.printed, seen.printed
        found[fraction, seed] = ids_seen(seen, "para")
        assert len(found[fraction, seed]) == 24 * fraction and len(ids_seen(seen, "sst")) == 24

    # a smaller fraction is a part of a larger one; drawn from the whole file, by the seed
    assert found[0.25, 11711] < found[0.5, 11711]
    in_order = read_examples(workspace() / "data" / "quora-train.csv", TASKS["para"]).ids
    assert {*in_order[:12]} != found[0.5, 11711] != found[0.5, 1]

    # one number is for every task, and at least one example is left
    status, printed, _ = run("--limit", 0.001)
    assert status == 0, printed
    for task in KINDS:
        assert f"{task}: trained on 1 of its 24 examples" in printed, printed


# ---------------------------------------------------------------- starting from an earlier run

@without_curves
def test_init_from_copies_the_heads_of_the_tasks_that_both_have():
    status, printed, source = run("--pair_head", "cross", "--tasks", "sst,sts", option="pretrain",
                                  steps=4)
    assert status == 0, printed
    theirs = {name: tensor for name, tensor in load_file(source / "model.safetensors").items()
              if name.startswith("heads.")}
    still = trained("--pair_head", "cross", "--init_from", source, "--lr", 0)
    assert len(theirs) == 4
    assert all(torch.equal(still[name], tensor) for name, tensor in theirs.items())

    # what the earlier run does not have is new, and reported
    status, printed, _ = run("--pair_head", "cross", "--init_from", source, "--pal", "--pal_size",
                             8)
    assert status == 0, printed
    assert "new are heads.para, pal.sst, pal.para, pal.sts" in printed, printed
    status, printed, _ = run("--init_from", source)  # with cosine heads
    assert status == 2 and "heads.sts has another shape" in printed, printed


@without_curves
def test_init_from_without_model_starts_from_the_earlier_runs_encoder_too():
    """At a rate of 0 the run stays what it started from, with projected attention layers too."""
    for more in ((), ("--pal", "--pal_size", 8)):
        source = run(*more, steps=4)[2]
        status, printed, folder = run_from(source, *more, name="continued")
        assert status == 0 and "its heads are loaded" in printed, printed
        assert "new are" not in printed, printed
        assert same(*(load_file(path / "model.safetensors") for path in (source, folder)))


@without_curves
def test_init_from_rejects_what_holds_no_heads():
    status, printed, _ = run("--init_from", workspace() / "tiny")
    assert status == 2 and "not a run" in printed, printed
    status, printed, _ = run("--init_from", run("--tasks", "sts")[2])  # a cosine has no parameters
    assert status == 2, printed
    assert "it holds no heads; to start from its encoder alone: --model" in printed, printed
