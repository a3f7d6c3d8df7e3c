"""Multitask BERT: one encoder, three tasks at once (sentiment on SST, paraphrase on Quora, similarity on STS).

    python multitask_classifier.py --option finetune --pcgrad        train; `--help` lists every flag
    torchrun --nproc_per_node 2 multitask_classifier.py ...          the same on two GPUs, or two processes of a CPU

A run leaves runs/NAME/ with the best encoder and heads, metrics.jsonl, curves.png, and the predictions in the course's
submission format. Each system of the five reports is a combination of these axes: schedule (data/batches.py), heads and
losses (here), projected attention layers (attention.py), gradient surgery (pcgrad.py), regularisers (smart.py).

Dimensions: B rows in a batch, S sequences (B, or 2B where pairs are encoded apart), L tokens in the longest,
H hidden size, C outputs of a task.
"""
import argparse
import contextlib
import itertools
import json
import math
import os
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import distributed, nn
from torch.nn import functional as F
from tqdm import tqdm

from attention import ProjectedAttention, to_device
from bert import BertModel, read_checkpoint
from checkpoint import (Interruption, Meter, Parser, Run, RunFailed, autocast, exit_status, for_each, get_device,
                        join_processes, mean_of, named_values, names, number, one_of, per_task, plot_curves,
                        rank_and_world, resumed, settings)
from data.batches import ONE_TASK_A_STEP, SCHEDULES, Schedule, collate, seed_of
from data.download import DEFAULT_ENCODER, InputError, fetch_encoder, write_whole
from data.tasks import TASKS, auxiliary, digest, load_data, load_tokenizer, locate, task_names
from evaluation import (answers, checked_rows, decide, describe, describe_answer, describe_confusion, evaluate, predict,
                        read_input, selection, write_errors, write_predictions)
from optimizer import AdamW, learning_rate, parameter_groups
from pcgrad import GradientBuffer, diagnostics
from smart import Proximal, Smoothness

HERE = Path(__file__).resolve().parent
PAIR_HEADS = ("cross", "uv", "uv_diff", "cosine")
DEFAULT_BATCH_SIZE = {"sst": 16, "para": 32, "sts": 12, "cfimdb": 8}
SST_LOSSES = {"ce": None, "oll1": 1.0, "oll1.5": 1.5, "oll2": 2.0}  # ordinal log loss: its alpha
MODEL_WITH_PAL = "bert_with_pal"  # in config.json: transformers shall not take the encoder for the whole
LOG_EVERY = 10  # steps between two step lines of metrics.jsonl


# ---------------------------------------------------------------- model: heads and losses

class Head(nn.Module):
    """From pooled sequences to a task's outputs. (S, H) -> (B, C).

    single, cross  dropout, linear on the pooled sentence, or on the pooled pair read as one sequence
    uv             dropout, linear on [u; v], the two sentences pooled apart
    uv_diff        dropout, linear on [u; v; |u - v|] (Reimers & Gurevych 2019, section 3)
    cosine         similarity: 5 cos(u, v). Binary: the logit w cos(u, v) + b
    """

    def __init__(self, task, kind, hidden_size, hidden_dropout_prob):
        super().__init__()
        self.kind, self.top, self.binary = kind, task.top, task.kind == "binary"
        self.dropout = nn.Dropout(hidden_dropout_prob)
        if kind != "cosine":
            width = {"uv": 2, "uv_diff": 3}.get(kind, 1) * hidden_size
            self.linear = nn.Linear(width, task.num_outputs)
            nn.init.normal_(self.linear.weight, std=0.02)
            # a regression starts at the middle of its scale, so that the first steps are not spent on the mean
            nn.init.constant_(self.linear.bias, task.top / 2 if task.kind == "similarity" else 0.0)
        elif self.binary:  # a scale that learning rates of fine-tuning could not reach from 1
            self.weight, self.bias = nn.Parameter(torch.tensor(10.0)), nn.Parameter(torch.tensor(-7.0))

    def forward(self, pooled):
        if self.kind in ("single", "cross"):
            return self.linear(self.dropout(pooled))
        u, v = pooled.chunk(2)  # (B, H) each
        if self.kind == "cosine":
            cosine = F.cosine_similarity(u, v).unsqueeze(-1)  # (B, 1)
            return self.weight * cosine + self.bias if self.binary else self.top * cosine
        features = [u, v] if self.kind == "uv" else [u, v, (u - v).abs()]
        return self.linear(self.dropout(torch.cat(features, dim=-1)))


def ordinal_log_loss(logits, labels, alpha):
    """-sum_i |y - i|^alpha log(1 - p_i), the mean over the batch (Castagnos et al. 2022). (B, C), (B,).

    log(1 - p_i) is the log-sum-exp of the other classes' logits less that of all, which stays finite where p_i rounds to 1.
    """
    C = logits.size(-1)
    others = logits.unsqueeze(1).masked_fill(torch.eye(C, dtype=torch.bool, device=logits.device), -math.inf)  # (B, C, C)
    log_not = others.logsumexp(dim=-1) - logits.logsumexp(dim=-1, keepdim=True)  # (B, C)
    distance = (labels.unsqueeze(1) - torch.arange(C, device=logits.device)).abs()  # (B, C)
    return -(distance ** alpha * log_not).sum(dim=-1).mean()


def task_loss(task, logits, labels, alpha=None):
    """The mean over the batch. (B, C) logits, (B,) labels. alpha: of the ordinal log loss, in place of cross entropy."""
    if alpha is not None:
        return ordinal_log_loss(logits, labels, alpha)
    if task.kind == "classes":
        return F.cross_entropy(logits, labels.long())
    if task.kind == "binary":
        return F.binary_cross_entropy_with_logits(logits.squeeze(-1), labels)
    return F.mse_loss(logits.squeeze(-1), labels)


class MultitaskBERT(nn.Module):
    """One BERT encoder and a head for each task.

    tasks: {name: Task}. pair_head: {pair task: one of PAIR_HEADS}. pooling: "cls" (pooler_output) or "mean" (over real
    tokens). option: "finetune", or "pretrain" for a frozen encoder, which then runs without dropout. amp: the encoder in
    bfloat16 autocast; heads and losses stay in float32. sst_loss: one of SST_LOSSES. pal: {"g", "size"} of a
    ProjectedAttention for each task, or None.
    """

    def __init__(self, bert, tasks, pair_head, pooling, hidden_dropout_prob, option="finetune", amp=False, sst_loss="ce",
                 pal=None):
        super().__init__()
        config = bert.config
        self.bert, self.tasks, self.pooling, self.pair_head, self.amp = bert, tasks, pooling, pair_head, amp
        self.frozen, self.alpha = option == "pretrain", {"sst": SST_LOSSES[sst_loss]}
        bert.requires_grad_(not self.frozen)
        self.heads = nn.ModuleDict({
            name: Head(task, pair_head.get(name, "single"), config.hidden_size, hidden_dropout_prob)
            for name, task in tasks.items()})
        self.pal = nn.ModuleDict({
            name: ProjectedAttention(config.hidden_size, num_attention_heads=config.num_attention_heads,
                                     num_layers=config.num_hidden_layers, **pal) for name in (tasks if pal else ())})

    def train(self, mode=True):
        super().train(mode)
        self.bert.train(mode and not self.frozen)
        return self

    @property
    def device(self):
        return self.bert.word_embedding.weight.device

    def shared_parameters(self):
        """The parameters that every task reaches: the encoder's, its pooler only where it pools."""
        return [p for name, p in self.bert.named_parameters()
                if p.requires_grad and (self.pooling == "cls" or not name.startswith("pooler_dense."))]

    def own_parameters(self, task):
        """Those that this task alone reaches: its head's, and its projected attention layers'."""
        return [p for modules in (self.heads, self.pal) if task in modules for p in modules[task].parameters()]

    def forward(self, input_ids, attention_mask, token_type_ids=None, perturbation=None, adapter=None):
        """Padded sequences (S, L) -> pooled (S, H). perturbation: (S, L, H), added to the embeddings. adapter: a
        ProjectedAttention."""
        with autocast(self.device, self.amp):
            input_ids, token_type_ids, packing = self.bert.pack(input_ids, attention_mask, token_type_ids)
            hidden_states = self.bert.embed(input_ids, token_type_ids, packing.positions)
            if perturbation is not None:
                hidden_states = hidden_states + packing.pack(perturbation)
            hidden_states = self.bert.encode_packed(hidden_states, packing, adapter)
            pooled = (self.bert.pool(packing.first(hidden_states)) if self.pooling == "cls"
                      else packing.mean(hidden_states))
        return pooled.float() if self.amp else pooled  # not without amp: a model in float64 stays in float64

    def logits(self, task, batch, perturbation=None):  # -> (B, C)
        adapter = self.pal[task] if task in self.pal else None
        return self.heads[task](self(batch.input_ids, batch.attention_mask, batch.token_type_ids, perturbation, adapter))

    def loss(self, task, batch, logits=None):
        logits = self.logits(task, batch) if logits is None else logits
        return task_loss(self.tasks[task], logits, to_device(batch.labels, self.device), self.alpha.get(task))

    def own_state(self):
        """What is not the encoder's: {"heads.sst.linear.weight": ..., "pal.sst.encode.weight": ...}."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("bert.")}

    def save(self, folder, encoder_folder):
        """The encoder in the published layout with its vocabulary, and heads and projected attention layers beside it."""
        self.bert.save_pretrained(folder, encoder_folder, self.own_state(), MODEL_WITH_PAL if self.pal else "bert")

    def take_over(self, folder):
        """The heads, and the projected attention layers, of an earlier run, where both have them. Raises InputError."""
        args, tensors = read_run(folder)
        own, new = self.own_state(), []
        for prefix in (f"{kind}.{task}." for kind in ("heads", "pal") for task in self.tasks):
            ours = {name: tensor.shape for name, tensor in own.items() if name.startswith(prefix)}
            theirs = {name: tensor.shape for name, tensor in tensors.items() if name.startswith(prefix)}
            if ours and not theirs:
                new.append(prefix[:-1])
            elif ours != theirs:
                raise InputError(f"--init_from {folder}: its {prefix[:-1]} is of another shape ({args['pair_head']}, "
                                 f"--pal {args['pal']})")
        self.load_state_dict({name: tensor for name, tensor in tensors.items() if name in own}, strict=False)
        print(f"{folder}: its heads are taken over" + (f"; new are {', '.join(new)}" if new else ""))

    @classmethod
    def load(cls, folder):
        """The model of a run, its best epoch. Raises InputError where the folder is not a run's."""
        args, tensors = read_run(folder)
        try:
            tasks = {name: TASKS.get(name) or replace(auxiliary(name), top=len(tensors[f"heads.{name}.linear.bias"]) - 1)
                     for name in [*args["trained"], *args["score_also"]]}
            bert = BertModel.from_pretrained(folder, tensors, MODEL_WITH_PAL if args["pal"] else "bert")
            model = cls(bert, tasks, args["pair_head"], args["pooling"], args["hidden_dropout_prob"], args["option"],
                        args["amp"], args["sst_loss"], args["pal"])
            if model.own_state().keys() != tensors.keys():
                raise ValueError(f"it has not the tensors its flags ask for: {sorted(model.own_state().keys() ^ tensors)}")
            model.load_state_dict(tensors, strict=False)
            model.tokenizer = load_tokenizer(folder)  # for evaluation.answers
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{folder}: not a run of this script ({' '.join(str(error).split())[:200]})") from error
        return model.eval()


def read_run(folder):
    """(flags, tensors beside the encoder's) of a run. Raises InputError where the folder is not a run's."""
    try:
        args = json.loads((Path(folder) / "args.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: not a run of this script ({' '.join(str(error).split())[:200]})") from error
    return args, {name: x for name, x in read_checkpoint(folder)[1].items() if name.startswith(("heads.", "pal."))}


# ---------------------------------------------------------------- training

class Training:
    """The one training step, and all that goes on from step to step. `state` is what a run needs to go on."""

    def __init__(self, args, model, data):
        self.args, self.model, self.data = args, model, data
        sizes = {task: len(data[task]["train"]) for task in args.trained}
        self.schedule = Schedule(args.schedule, sizes, args.batch_size, args.epoch_length, args.seed, args.epochs,
                                 args.upsample)
        shared, own = model.shared_parameters(), {task: model.own_parameters(task) for task in args.trained}
        self.gradients = GradientBuffer(shared, own, args.surgery, args.gradient_rows, args.surgery_scope)
        self.row_names = ["+".join(group) for group in self.gradients.groups]
        kinds = {task: model.tasks[task].kind for task in args.trained}
        smart = Smoothness({task: kinds[task] for task in args.smart_tasks}, **args.smart) if args.smart else None
        self.proximal = Proximal(model, kinds, **args.proximal) if args.proximal else None
        self.regularisers = {name: term for name, term in (("smart", smart), ("proximal", self.proximal)) if term}
        # the word embedding's gradient then touches, in J, only the rows of words that occur; MPS has no sparse tensors
        model.bert.word_embedding.sparse = args.device != "mps"

        self.owner = {task: task if args.optimizer_per_task else "all" for task in args.trained}  # of a task's steps
        self.trainable = {name: [*shared, *(p for task in own if self.owner[task] == name for p in own[task])]
                          for name in self.owner.values()}
        self.optimizers = {name: AdamW(parameter_groups(parameters, args.weight_decay), lr=args.lr)
                           for name, parameters in self.trainable.items()}
        self.updates = {"all": args.epochs * math.ceil(self.schedule.steps_per_epoch / args.accumulate)}
        if args.optimizer_per_task:
            steps = itertools.chain.from_iterable(map(self.schedule.tasks, range(args.epochs)))
            self.updates = Counter(task for step in steps for task in step)
        self.done, self.lr = dict.fromkeys(self.optimizers, 0), 0.0  # optimizer steps; the rate of the last
        self.epoch = self.step = 0  # epochs that are done, and steps of the one under way
        self.best = None  # the best evaluation so far
        self.measured = Meter([*sizes, *(f"{task} {name}" for name, term in self.regularisers.items()
                                         for task in term.kinds)], model.device)
        self.digest = digest(data)
        self.recent = []  # (step, task, rows, loss) since the last check that all are finite
        self.diagnosed, self.logged = [], 0  # of the gradients in this epoch, and how many of these have been logged

    def closing(self, step):  # an optimizer step follows
        return step % self.args.accumulate == 0 or step == self.schedule.steps_per_epoch

    def train_step(self, batches):
        """batches: [(task, rows)]. Every closing step ends in an optimizer step."""
        rank, world = rank_and_world()
        self.step += 1
        closing = self.closing(self.step)
        for i, (task, rows) in enumerate(batches):
            own, loss = rows[rank::world], None  # this process's share of the rows
            if len(own):
                batch = collate(self.data[task]["train"], own)
                loss = self.loss(task, batch, seed_of(self.args.seed, self.epoch, self.step, task, rank))
                self.recent.append((self.step, task, own, loss.detach()))
                loss = loss * (len(own) / len(rows))
            self.gradients.backward(task, loss, [name for name, _ in batches[i + 1:]] if closing else None)
        self.measured.steps += 1
        if closing:
            self.gradients.combine(seed_of(self.args.seed, self.epoch, self.step, "order of the projections"))
            if self.gradients.gram is not None:
                self.diagnosed.append(diagnostics(self.gradients.gram, self.row_names))
            self.optimizer_step(self.owner[batches[-1][0]])
            self.gradients.zero()

    def loss(self, task, batch, seed):
        """A task's loss and its regularisers. seed: for dropout."""
        torch.manual_seed(seed)
        logits = self.model.logits(task, batch)
        loss = self.model.loss(task, batch, logits)
        self.measured.add(task, loss, len(batch.rows), int(batch.attention_mask.sum()))
        for name, regulariser in self.regularisers.items():
            if task in regulariser.kinds:
                term = regulariser(self.model, task, batch, logits, seed)
                self.measured.add(f"{task} {name}", term, len(batch.rows))
                loss = loss + term
        return loss

    def optimizer_step(self, name):
        args = self.args
        if args.clip:
            nn.utils.clip_grad_norm_(self.trainable[name], args.clip)
        self.done[name] += 1  # the + 1: neither the first nor the last step has rate 0
        self.lr = learning_rate(args.lr, self.done[name] / (self.updates[name] + 1), args.warmup, args.lr_schedule)
        for group in self.optimizers[name].param_groups:
            group["lr"] = self.lr
        self.optimizers[name].step()
        if self.proximal:
            self.proximal.update(self.model, sum(self.done.values()) / sum(self.updates.values()))

    def read(self):
        """A step line for metrics.jsonl: the means since the last one. Raises RunFailed where a loss is not finite."""
        self.check_finite()
        means, speed = self.measured.read()
        losses = {task: means[task] for task in self.owner if task in means}
        others = {"regularisers": {name: mean for name, mean in means.items() if name not in losses},
                  "gradients": mean_of(self.diagnosed[self.logged:])}
        self.logged = len(self.diagnosed)
        return {"epoch": self.epoch + 1, "step": self.steps(), "losses": losses, "lr": self.lr, **speed,
                **{name: values for name, values in others.items() if values}}

    def check_finite(self):
        """Raises RunFailed that names task, step and rows of the first loss since the last check that is not finite."""
        recent, self.recent = self.recent, []
        losses = torch.stack([loss for *_, loss in recent]).tolist() if recent else []  # here the host waits, once
        for (step, task, rows, _), loss in zip(recent, losses):
            if not math.isfinite(loss):
                examples = self.data[task]["train"]
                ids = ", ".join(examples.ids[row] for row in rows[:5]) + (", ..." if len(rows) > 5 else "")
                raise RunFailed(f"the loss of {task} is {loss} at step {step} of epoch {self.epoch + 1}, {len(rows)} rows of "
                                f"{examples.path.name} with the ids {ids}; what was saved before is intact; try a lower "
                                "--lr, or --clip 1")

    def steps(self):  # of the run
        return self.epoch * self.schedule.steps_per_epoch + self.step

    def end_epoch(self):
        self.epoch, self.step, self.diagnosed, self.logged = self.epoch + 1, 0, [], 0
        self.measured.clear()

    def state(self):
        """Tensors and plain values. To be asked for where no gradient is pending, after a closing step. Raises RunFailed
        where that is nothing to go on from."""
        self.check_finite()
        for name, parameter in self.model.named_parameters():
            if not parameter.isfinite().all():
                raise RunFailed(f"{name} is not finite after step {self.step} of epoch {self.epoch + 1}; what was saved "
                                "before is intact; try a lower --lr, or --clip 1")
        return {"data": self.digest, "epoch": self.epoch, "step": self.step, "best": self.best, "done": self.done, "lr": self.lr,
                "model": self.model.state_dict(), "gradvac_targets": self.gradients.targets,
                "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
                "teacher": self.proximal.teacher.state_dict() if self.proximal else None,
                "measured": self.measured.state(), "diagnosed": self.diagnosed, "logged": self.logged}

    def load_state(self, state):
        if state["data"] != self.digest:
            raise InputError("--resume: the data files or the vocabulary are not those that the run was started with")
        self.epoch, self.step, self.best, self.done, self.lr, self.diagnosed, self.logged = (
            state[name] for name in ("epoch", "step", "best", "done", "lr", "diagnosed", "logged"))
        self.model.load_state_dict(state["model"])
        self.gradients.targets = state["gradvac_targets"]
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        if self.proximal:
            self.proximal.teacher.load_state_dict(state["teacher"])
        if rank_and_world()[0] == 0:  # the other processes' part of a mean that was under way is not there
            self.measured.load_state(state["measured"])


def train(args, model, data, run, encoder_folder):
    """Train for args.epochs, from where `run` stopped if it did. Saves the best epoch by dev scores, returns its
    evaluation.

    run: on every process; the first one writes. Raises RunFailed where a loss is not finite, and Interrupted.
    """
    rank, world = rank_and_world()
    training = Training(args, model, data)
    if run.last:
        training.load_state(run.last)
    with Interruption() as interruption:
        while training.epoch < args.epochs:
            train_epoch(args, training, run, interruption)
            scores = evaluate(model, data, args.seed)
            best = training.best
            improved = best is None or selection(scores, args.trained) > selection(best, args.trained)
            training.best = {"epoch": training.epoch + 1, **scores} if improved else best
            print(f"epoch {training.epoch + 1}/{args.epochs}  {describe(scores)}"
                  f"{'  best so far, saved' if improved else ''}", flush=True)
            if training.diagnosed:
                print(f"           {describe_gradients(mean_of(training.diagnosed))}", flush=True)
            run.log("evaluation", epoch=training.epoch + 1, step=training.steps(), **scores)
            if improved and rank == 0:
                model.save(run.folder, encoder_folder)
            training.end_epoch()
            run.save(training.state())
            if rank == 0:
                plot_curves(run.folder)
            interruption.check(run.folder)
    return training.best


def train_epoch(args, training, run, interruption):
    """From the step that the epoch stands at to its last."""
    training.model.train()
    training.gradients.zero()
    total = training.schedule.steps_per_epoch
    steps = itertools.islice(training.schedule.epoch(training.epoch), training.step, None)
    bar = tqdm(steps, desc=f"epoch {training.epoch + 1}/{args.epochs}", total=total, initial=training.step, unit="step",
               leave=False, disable=rank_and_world()[0] > 0)
    for batches in bar:
        training.train_step(batches)
        if training.step % LOG_EVERY == 0 or training.step == total:
            line = training.read()
            shown = " ".join(f"{task} {loss:.3f}" for task, loss in line["losses"].items())
            bar.set_postfix_str(f"{shown}, {line['tokens_per_second']} tokens/s")
            run.log("step", **line)
        if training.closing(training.step) and training.step < total:
            if interruption.asked or run.due(args.save_every):
                run.save(training.state())
            interruption.check(run.folder)


def describe_gradients(mean):
    pairs = [f"{pair} cosine {cosine:.3f}, in conflict {mean['conflict'][pair]:.0%}, magnitude similarity "
             f"{mean['magnitude_similarity'][pair]:.2f}" for pair, cosine in mean["cosine"].items()]
    return "gradients  " + ("\n" + " " * 22).join(pairs)


# ---------------------------------------------------------------- flags

def get_parser():
    parser = Parser(description="Train one BERT on several tasks at once.")
    group = parser.add_argument_group("model")
    group.add_argument("--option", choices=("pretrain", "finetune"), default="pretrain",
                       help="pretrain: the encoder is frozen, only the heads learn; finetune: everything learns")
    group.add_argument("--model", default=None, help="BERT folder, or name on the Hugging Face hub (default: "
                       f"{DEFAULT_ENCODER}, or that of --init_from)")
    group.add_argument("--pooling", choices=("cls", "mean"), default="mean",
                       help="what a sequence becomes: BERT's pooled [CLS], or the mean of its tokens' last states")
    group.add_argument("--pair_head", type=per_task(str), default=None, metavar="|".join(PAIR_HEADS),
                       help="for both pair tasks or each, para=uv_diff,sts=cosine; cross reads a pair as one sequence "
                            "(default: cosine for finetune, cross for pretrain)")
    group.add_argument("--hidden_dropout_prob", type=number(float, 0, 1), default=0.3,
                       help="dropout of the heads; the encoder's is in its config.json")
    group.add_argument("--sst_loss", choices=SST_LOSSES, default="ce",
                       help="cross entropy, or ordinal log loss with an exponent of 1, 1.5 or 2 (Castagnos et al. 2022)")
    group.add_argument("--pal", nargs="?", const="", metavar="NAME=VALUE,...", type=settings(
        g=(one_of("attention", "identity"), "attention"), size=(number(int, 1), 204)),
                       help="projected attention layers for each task (Stickland & Murray 2019): g=attention,size=204; "
                            "g=identity for a low-rank map alone")
    group.add_argument("--init_from", type=Path, default=None, metavar="RUN",
                       help="take over encoder and heads of an earlier run; with --model the heads alone")
    group = parser.add_argument_group("training")
    group.add_argument("--tasks", default="sst,para,sts", help=f"those to train, of {','.join(TASKS)}, in this order")
    group.add_argument("--aux", type=named_values, default={}, metavar="NAME=FILE,...",
                       help="further tasks to train: classes of sentences, in a file like sst's; they count in no score")
    group.add_argument("--score_also", default=None, metavar="TASKS",
                       help="tasks that get a head and scores, and no training: how far does sst alone carry?")
    group.add_argument("--limit", type=per_task(number(float, 0)), default=None, metavar="para=0.25",
                       help="train on this share of a task's rows (of each task, with one number)")
    group.add_argument("--schedule", choices=SCHEDULES, default="round_robin",
                       help="round_robin: a batch of each task a step; mixed: the same with batch sizes in proportion to "
                            "the sets. With one batch of one task a step: sequential: task after task; mtdnn: all batches "
                            "shuffled; annealed: tasks drawn, the large ones ever less often")
    group.add_argument("--upsample", action="store_true",
                       help="with --schedule mtdnn: repeat the small sets until they are as large as the largest")
    group.add_argument("--epochs", type=number(int, 1), default=10, help="number of epochs")
    group.add_argument("--epoch_length", default="longest", metavar="longest|shortest|STEPS",
                       help="the set that ends an epoch, or a number of steps")
    group.add_argument("--batch_size", type=per_task(number(int, 1)), default=None,
                       help="rows a step, for all tasks or each: sst=2,para=24,sts=2 (default: sst=16,para=32,sts=12, "
                            "cfimdb=8; 20 with --schedule mixed)")
    group.add_argument("--accumulate", type=number(int, 1), default=1,
                       help="steps of the schedule whose gradients are added up for one optimizer step")
    group.add_argument("--lr", type=number(float, 0), default=None,
                       help="peak learning rate (default: 1e-4 for finetune, 1e-3 for pretrain)")
    group.add_argument("--lr_schedule", choices=("linear", "constant"), default="linear",
                       help="after the warm-up: down to 0, or constant")
    group.add_argument("--warmup", type=number(float, 0, 1), default=0.1,
                       help="share of the steps in which the rate rises from 0")
    group.add_argument("--weight_decay", type=number(float, 0), default=0.0, help="of weights; biases and norms have none")
    group.add_argument("--clip", type=number(float, 0), default=1.0, help="largest global gradient norm; 0: no clipping")
    group.add_argument("--optimizer_per_task", action="store_true",
                       help="AdamW moments of its own for each task; where a step has one task")
    group.add_argument("--seed", type=number(int, 0, 2 ** 63), default=11711, help="of everything random")
    group = parser.add_argument_group("gradient surgery")
    group.add_argument("--pcgrad", nargs="?", const=True, metavar="GROUPS",
                       help="project conflicting task gradients (Yu et al. 2020); GROUPS of tasks share one: sst+para,sts")
    group.add_argument("--gradvac", nargs="?", const=True, metavar="GROUPS",
                       help="Gradient Vaccine (Wang et al. 2021), with groups like --pcgrad")
    group.add_argument("--surgery_scope", choices=("vector", "tensor"), default="vector",
                       help="vector: all shared parameters as one, as in the papers; tensor: each parameter by itself")
    group.add_argument("--log_gradients", action="store_true",
                       help="measure the tasks' gradients (cosines, conflicts, norms) without surgery; surgery always does")
    group = parser.add_argument_group("regularisers (Jiang et al. 2020)")
    group.add_argument("--smart", nargs="?", const="", metavar="NAME=VALUE,...", type=settings(
        weight=(number(float, 0), 5.0), eps=(number(float, 0), 1e-5), sigma=(number(float, 0), 1e-5),
        step=(number(float, 0), 1e-3), steps=(number(int, 1), 1), norm=(one_of("inf", "2"), "inf"), tasks=(names, None)),
                       help="smoothness under small perturbations of the embeddings; what is not given is as in the paper: "
                            "weight=5,eps=1e-5,sigma=1e-5,step=1e-3,steps=1,norm=inf; tasks=sst+sts for these tasks only. A "
                            "perturbation that is as large as the embeddings: eps=1,step=1")
    group.add_argument("--proximal", nargs="?", const="", metavar="NAME=VALUE,...", type=settings(
        mu=(number(float, 0), 1.0), beta=(number(float, 0, 1), None)),
                       help="stay near a running average of the weights: mu=1, and beta one number, or what the paper has: "
                            ".99 in the first tenth of the steps, then .999")
    group = parser.add_argument_group("machine and run")
    group.add_argument("--use_gpu", action="store_true", help="train on CUDA, or on MPS of an Apple machine")
    group.add_argument("--amp", action="store_true", help="the encoder in bfloat16 (CUDA, or a CPU with avx512_bf16)")
    group.add_argument("--name", default=None,
                       help="the run's folder in runs/, or a path (default: what the run is, and the time)")
    group.add_argument("--resume", default=None, metavar="RUN",
                       help="go on with a run that was stopped or killed, with the flags it had")
    group.add_argument("--save_every", type=number(float, 0), default=5.0, metavar="MINUTES",
                       help="how often the state to go on from is saved; after each epoch it always is")
    group = parser.add_argument_group("use of a run, without training")
    group.add_argument("--predict", nargs="+", metavar=("RUN", "SENTENCE"),
                       help="the sentiment of a sentence; with a second one paraphrase and similarity too. JSON lines where "
                            "the output is no terminal")
    group.add_argument("--input", metavar="FILE", help="with --predict RUN: a sentence a line, or two with a tab between; "
                       "- for standard input")
    group = parser.add_argument_group("data")
    group.add_argument("--data_dir", type=Path, default=None, help="folder with the course's files (default: data/ once "
                       "`python data/download.py` has filled it, the demo sets in data/demo/ until then)")
    group.add_argument("--skip_malformed", action="store_true", help="go on where more than 1 %% of a file is malformed")
    for task in TASKS:  # the course's path flags, explained in the epilog instead of in 20 lines
        for kind in ("train", "dev", "test", "dev_out", "test_out"):
            group.add_argument(f"--{task}_{kind}", type=Path, help=argparse.SUPPRESS)
    parser.epilog = ("One file each: --TASK_train, --TASK_dev, --TASK_test FILE in place of the one in the data folder; "
                     "--TASK_dev_out, --TASK_test_out FILE for the predictions (default: predictions/ in its folder).")
    return parser


def resolve(argv):
    """The flags, checked against each other, with every default filled in. Raises InputError."""
    args, args_of_run = get_parser().parse_args(argv), resumed(resolve, argv, "--name")
    if args_of_run:
        return args_of_run
    args.argv = argv  # for --resume
    if args.predict:
        if (len(args.predict) > 1) == (args.input is not None):
            raise InputError("--predict RUN: give one or two sentences, or --input FILE (- for standard input)")
        args.device = get_device(args.use_gpu, amp=False)
        return args
    if args.input is not None:
        raise InputError("--input: only with --predict RUN")
    args.tasks = task_names(args.tasks)
    args.score_also = task_names(args.score_also, "--score_also") if args.score_also is not None else []
    args.trained = [*args.tasks, *args.aux]
    for name in args.score_also:
        if name in args.tasks:
            raise InputError(f"argument --score_also: {name} is among --tasks, which are scored anyway")
    for name in args.aux:
        if name in TASKS or not name.isidentifier():
            raise InputError(f"argument --aux: {name!r} is {'a task already' if name in TASKS else 'no plain name'}; "
                             "choose another")
    args.model = args.model or str(args.init_from or DEFAULT_ENCODER)
    if args.limit is not None:
        args.limit = args.limit if isinstance(args.limit, dict) else dict.fromkeys(args.trained, args.limit)
        for name, share in args.limit.items():
            if name not in args.trained or not 0 < share <= 1:
                raise InputError(f"argument --limit: {name}={share:g}: not a share above 0 and up to 1 of one of "
                                 f"{', '.join(args.trained)}")
    if args.upsample and args.schedule != "mtdnn":
        raise InputError("--upsample without --schedule mtdnn: round_robin and mixed repeat the small sets anyway, and "
                         "sequential and annealed take each set as it is")
    if args.optimizer_per_task and (args.schedule not in ONE_TASK_A_STEP or args.accumulate > 1):
        raise InputError(f"--optimizer_per_task: needs steps of one task: one of --schedule {', '.join(ONE_TASK_A_STEP)}, "
                         "and no --accumulate")

    pair_tasks = [name for name in [*args.tasks, *args.score_also] if TASKS[name].is_pair]
    if not pair_tasks and args.pair_head is not None:
        raise InputError(f"argument --pair_head: no pair task among {', '.join(args.tasks)}")
    if args.sst_loss != "ce" and "sst" not in args.tasks:
        raise InputError(f"--sst_loss {args.sst_loss}: sst is not among --tasks {','.join(args.tasks)}")
    if args.pair_head is None:
        args.pair_head = "cosine" if args.option == "finetune" else "cross"
    args.pair_head = for_each(args.pair_head, pair_tasks, "--pair_head")
    for task, head in args.pair_head.items():
        if head not in PAIR_HEADS:
            raise InputError(f"argument --pair_head: unknown head {head!r}; the heads are {', '.join(PAIR_HEADS)}")
        if head == "cosine" and TASKS[task].kind == "similarity" and args.option == "pretrain" and task in args.tasks:
            raise InputError(f"--pair_head cosine for {task} with --option pretrain: 5 cos(u, v) has no parameters and the "
                             f"encoder is frozen, so there is nothing to train; use another head, or leave {task} out")

    if args.batch_size is None:
        args.batch_size = 20 if args.schedule == "mixed" else {name: DEFAULT_BATCH_SIZE.get(name, 16)
                                                                          for name in args.trained}
    elif isinstance(args.batch_size, dict) or args.schedule != "mixed":
        args.batch_size = for_each(args.batch_size, args.trained, "--batch_size")
    if args.epoch_length not in ("longest", "shortest"):
        try:
            args.epoch_length = number(int, 1)(args.epoch_length)
        except argparse.ArgumentTypeError as error:
            raise InputError(f"argument --epoch_length: not longest, shortest or a number of steps ({error})") from None
    if args.lr is None:
        args.lr = 1e-4 if args.option == "finetune" else 1e-3
    resolve_surgery(args)
    resolve_smart(args)

    args.device = get_device(args.use_gpu, args.amp)
    if args.name is None:
        args.name = "-".join(filter(None, (args.option, args.schedule, args.surgery, time.strftime("%Y%m%d-%H%M%S"))))
    elif not args.name:
        raise InputError("argument --name: empty")
    return args


def resolve_surgery(args):
    """args.surgery ("pcgrad", "gradvac" or None) and args.gradient_rows (the tasks of each row of J; None: all in one)."""
    args.surgery = "pcgrad" if args.pcgrad is not None else "gradvac" if args.gradvac is not None else None
    flag = f"--{args.surgery}" if args.surgery else "--log_gradients"
    groups = getattr(args, args.surgery) if args.surgery else True
    args.gradient_rows = None
    if args.pcgrad is not None and args.gradvac is not None:
        raise InputError("--pcgrad with --gradvac: one or the other")
    if args.surgery_scope == "tensor" and not args.surgery:
        raise InputError("--surgery_scope tensor: there is no surgery; add --pcgrad or --gradvac")
    if not args.surgery and not args.log_gradients:
        return
    if args.option == "pretrain":
        raise InputError(f"{flag} with --option pretrain: a frozen encoder has no shared gradients; use --option finetune")
    if args.schedule == "sequential":
        raise InputError(f"{flag} with --schedule sequential: one task's batches follow each other, so no two tasks' "
                         "gradients meet; use round_robin or mixed")
    if args.schedule in ONE_TASK_A_STEP and args.accumulate == 1:
        raise InputError(f"{flag} with --schedule {args.schedule}: a step has one task, so no two tasks' gradients meet; "
                         "give --accumulate N to let N steps meet")
    groups_given = args.trained if groups is True else groups.split(",")
    args.gradient_rows = [[name.strip() for name in group.split("+")] for group in groups_given]
    if sorted(sum(args.gradient_rows, [])) != sorted(args.trained):
        raise InputError(f"argument {flag}: {groups!r} does not name each of {', '.join(args.trained)} once, "
                         "as in sst+para,sts")
    if len(args.gradient_rows) < 2:
        raise InputError(f"{flag} with one {'task' if groups is True else 'group'}: there is no second gradient")


def resolve_smart(args):
    """args.smart (the settings of Smoothness, or None) and args.smart_tasks (those it is for)."""
    args.smart_tasks = []
    if not args.smart:
        return
    args.smart_tasks = args.smart.pop("tasks") or args.trained
    for name in args.smart_tasks:
        if name not in args.trained:
            raise InputError(f"argument --smart: tasks: {name!r} is not among --tasks {','.join(args.trained)}")
    if args.smart["sigma"] == 0:
        raise InputError("argument --smart: sigma: 0; the ascent could not start, since the divergence has no slope there")
    moves = min(args.smart["eps"], args.smart["steps"] * args.smart["step"])
    if args.amp and moves < 0.01:
        raise InputError(f"--smart with --amp: bfloat16 has three digits, and a perturbation of {moves:g} "
                         "would be lost in rounding; leave out --amp, or give --smart an eps and a step of .01 or more")


def output_paths(args, paths):
    """{(task, split): path} of the predictions. Raises InputError where one cannot be written."""
    outputs = {}
    for task in (*args.tasks, *args.score_also):
        for split in ("dev", "test"):
            given = getattr(args, f"{task}_{split}_out")
            if split in paths[task]:
                outputs[task, split] = given or HERE / "runs" / args.name / "predictions" / f"{task}-{split}-output.csv"
            elif given:
                raise InputError(f"--{task}_{split}_out: there is no {task} {split} file to predict")
            if given and (given.is_dir() or not given.absolute().parent.is_dir()):
                raise InputError(f"--{task}_{split}_out {given}: not a file in a folder that is there")
    return outputs


def main(argv=None):
    """Train as the flags say, or answer with what was trained."""
    args = resolve(sys.argv[1:] if argv is None else list(argv))
    if args.predict:
        answer(args)
        return
    join_processes(args.device)
    rank, _ = rank_and_world()
    with contextlib.redirect_stdout(open(os.devnull, "w")) if rank else contextlib.nullcontext():
        train_and_predict(args, rank)


def answer(args):
    run, *sentences = args.predict
    rows = read_input(args.input) if args.input else checked_rows([sentences], "--predict")
    model = MultitaskBERT.load(run).to(args.device)
    for row, made in zip(rows, answers(model, rows)):
        print(describe_answer(row, made) if sys.stdout.isatty() else json.dumps({"text": row, **made}, ensure_ascii=False))


def train_and_predict(args, rank):
    paths = locate(args)
    outputs = output_paths(args, paths)
    if rank == 0:
        encoder_folder = fetch_encoder(args.model)
    if distributed.is_initialized():
        run_name = [args.name]  # the first process's, since the time is in it
        distributed.broadcast_object_list(run_name)
        args.name, = run_name
    if rank:
        encoder_folder = fetch_encoder(args.model)  # in the cache by now
    torch.manual_seed(args.seed)  # for the new heads
    bert = BertModel.from_pretrained(encoder_folder)
    cross = [task for task, head in args.pair_head.items() if head == "cross"]
    if args.pal and args.pal["g"] == "attention" and args.pal["size"] % bert.config.num_attention_heads:
        raise InputError(f"argument --pal: size {args.pal['size']} is no multiple of the encoder's "
                         f"{bert.config.num_attention_heads} attention heads")
    data = load_data(paths, encoder_folder, bert.config, cross, args.skip_malformed)
    for task, share in (args.limit or {}).items():
        size = len(data[task]["train"])
        order = np.random.default_rng(seed_of(args.seed, "limit", task)).permutation(size)
        data[task]["train"] = data[task]["train"].take(np.sort(order[:max(1, round(share * size))]))
        print(f"{task}: trained on {len(data[task]['train'])} of its {size} rows")
    model = MultitaskBERT(bert, {name: splits["train"].task for name, splits in data.items()}, args.pair_head,
                          args.pooling, args.hidden_dropout_prob, args.option, args.amp, args.sst_loss, args.pal)
    if args.init_from and not args.resume:
        model.take_over(args.init_from)
    model.to(args.device)
    if distributed.is_initialized():
        for tensor in model.state_dict().values():
            distributed.broadcast(tensor, src=0)
    folder = HERE / "runs" / args.name
    run = Run(folder, vars(args), args.resume, writes=rank == 0)
    best = train(args, model, data, run, encoder_folder)

    if distributed.is_initialized():
        distributed.barrier()  # the best epoch is on the disk
    model = MultitaskBERT.load(folder).to(args.device)
    predicted = {key: predict(model, key[0], data[key[0]][key[1]]) for key in outputs}
    if rank == 0:
        (folder / "predictions").mkdir(exist_ok=True)
        for (task, split), path in outputs.items():
            write_predictions(path, data[task][split], predicted[task, split])
        write_errors(folder / "errors.csv", [(data[task]["dev"], made) for (task, split), made in predicted.items()
                                             if split == "dev"])
    if "sst" in data:
        dev = data["sst"]["dev"]
        print(describe_confusion(dev.task, decide(dev.task, predicted["sst", "dev"]), dev.labels))
    print(f"best epoch {best['epoch']}: {describe(best)}\n"
          f"{os.path.relpath(folder)}: encoder, heads, metrics.jsonl, curves.png, errors.csv, predictions/")


if __name__ == "__main__":
    sys.exit(exit_status(main))
