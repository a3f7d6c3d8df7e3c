"""Multitask BERT: one encoder, three tasks at once (sentiment on SST, paraphrase on Quora, similarity on STS).

    python multitask_classifier.py --option finetune --pcgrad        train; `--help` lists every flag
    torchrun --nproc_per_node 2 multitask_classifier.py ...          the same on two GPUs, or two processes of a CPU

A run leaves runs/NAME/ with the best encoder and heads, metrics.jsonl, curves.png, and the predictions in the course's
submission format. Each system of the five reports is a combination of these axes: schedule (data/batches.py), heads and
losses (here), projected attention layers (attention.py), gradient surgery (pcgrad.py), regularisers (smart.py).

Dimensions: B rows in a batch, S sequences (B, or 2B where pairs are encoded apart), L tokens in the longest,
H hidden size, C outputs of a task.
"""
import contextlib
import itertools
import json
import math
import os
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import distributed, nn
from torch.nn import functional as F
from tqdm import tqdm

from attention import ProjectedAttention, to_device
from bert import BertModel, read_checkpoint, to_float
from checkpoint import (Interruption, Meter, Run, RunFailed, autocast, exit_status, join_processes,
                        nowhere, rank_and_world)
from curves import plot_curves
from data.batches import Schedule, collate, seed_of
from data.download import InputError, fetch_encoder
from data.tasks import TASKS, auxiliary, data_digest, fitting_tokenizer, load_data, locate
from evaluation import (decide, describe, describe_confusion, encode_once, evaluate, predict,
                        selection, write_errors, write_predictions)
from flags import SST_LOSSES, resolve
from optimizer import AdamW, learning_rate, parameter_groups
from pcgrad import GradientBuffer, describe_gradients, diagnostics, mean_of, use_sparse_gradient
from smart import Proximal, Smoothness

HERE = Path(__file__).resolve().parent
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
        elif self.binary:  # 10 cos - 7: decides at a cosine of .7; from 1 and 0 small learning rates would not get there
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
        if batch.pooled is not None:
            return self.heads[task](batch.pooled)
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
        """Copy heads and projected attention layers from an earlier run, for the tasks that both have. Raises InputError
        where their shapes differ."""
        args, tensors = read_run(folder)
        if not tensors:
            raise InputError(f"--init_from {folder}: it holds no heads; to start from its encoder alone: --model {folder}")
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
            tasks = {name: task_of_run(name, tensors) for name in [*args["trained"], *args["score_also"]]}
            model = cls(encoder_of_run(folder, args, tensors), tasks, args["pair_head"], args["pooling"],
                        args["hidden_dropout_prob"], args["option"], args["amp"], args["sst_loss"], args["pal"])
            if model.own_state().keys() != tensors.keys():
                raise ValueError(f"it has not the tensors its flags ask for: {sorted(model.own_state().keys() ^ tensors)}")
            model.load_state_dict(tensors, strict=False)
            model.tokenizer = fitting_tokenizer(folder, model.bert.config,  # for support/predict.py
                                                pairs="cross" in args["pair_head"].values())
        except InputError:
            raise
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{folder}: not a run of this script ({' '.join(str(error).split())[:200]})") from error
        return model.eval()


def encoder_of_run(folder, args, tensors):  # args, tensors: of read_run
    return BertModel.from_pretrained(folder, elsewhere=tensors, model_type=MODEL_WITH_PAL if args["pal"] else "bert")


def task_of_run(name, tensors):
    """A row of the table, or an auxiliary task, whose number of classes its head alone tells."""
    return TASKS[name] if name in TASKS else replace(auxiliary(name), top=len(tensors[f"heads.{name}.linear.bias"]) - 1)


def read_run(folder):
    """(flags, tensors beside the encoder's) of a run. Raises InputError where the folder is not a run's."""
    try:
        args = dict(json.loads((Path(folder) / "args.json").read_text(encoding="utf-8")))
        if not {"trained", "score_also", "pair_head", "pal"} <= args.keys() or not isinstance(args["pair_head"], dict):
            raise ValueError("its args.json is not of this script")
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{folder}: not a run of this script ({' '.join(str(error).split())[:200]})") from error
    path, tensors = read_checkpoint(folder)
    return args, {name: to_float(path, name, tensor) for name, tensor in tensors.items()
                  if name.startswith(("heads.", "pal."))}


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
        use_sparse_gradient(model.bert.word_embedding)

        self.optimizer_of = {task: task if args.optimizer_per_task else "all" for task in args.trained}  # of a task's steps
        self.trainable = {name: [*shared, *(p for task in own if self.optimizer_of[task] == name for p in own[task])]
                          for name in self.optimizer_of.values()}
        self.optimizers = {name: AdamW(parameter_groups(parameters, args.weight_decay), lr=args.lr)
                           for name, parameters in self.trainable.items()}
        self.updates_planned = {"all": args.epochs * math.ceil(self.schedule.steps_per_epoch / args.accumulate)}
        if args.optimizer_per_task:
            steps = itertools.chain.from_iterable(map(self.schedule.tasks, range(args.epochs)))
            self.updates_planned = Counter(task for step in steps for task in step)
        self.updates_done, self.lr = dict.fromkeys(self.optimizers, 0), 0.0  # optimizer steps; the rate of the last
        self.epoch = self.step = 0  # epochs that are done, and steps of the one under way
        self.best = None  # the best evaluation so far
        self.meter = Meter([*sizes, *(f"{task} {name}" for name, term in self.regularisers.items()
                                      for task in term.kinds)], model.device)
        self.data_digest = data_digest(data)
        self.unchecked_losses = []  # (step, task, rows, loss) since the last check that all are finite
        self.diagnosed, self.logged = [], 0  # of the gradients in this epoch, and how many of these have been logged

    def ends_update(self, step):  # an optimizer step follows
        return step % self.args.accumulate == 0 or step == self.schedule.steps_per_epoch

    def train_step(self, batches):
        """batches: [(task, rows)]. With --accumulate some steps end without an optimizer step."""
        rank, world = rank_and_world()
        self.step += 1
        ends_update = self.ends_update(self.step)
        for i, (task, rows) in enumerate(batches):
            share, loss = rows[rank::world], None  # of this process
            if len(share):
                batch = collate(self.data[task]["train"], share)
                loss = self.loss(task, batch, seed_of(self.args.seed, self.epoch, self.step, task, rank))
                self.unchecked_losses.append((self.step, task, share, loss.detach()))
                loss = loss * (len(share) / len(rows))
            # a row of J can be sent to the other processes as soon as no later task of the update adds to it
            still_to_come = [name for name, _ in batches[i + 1:]] if ends_update else None
            self.gradients.backward(task, loss, still_to_come)
        self.meter.steps += 1
        if ends_update:
            self.gradients.combine(seed_of(self.args.seed, self.epoch, self.step, "order of the projections"))
            if self.gradients.gram is not None:
                self.diagnosed.append(diagnostics(self.gradients.gram, self.row_names))
            self.optimizer_step(self.optimizer_of[batches[-1][0]])  # one for each task only where a step has one task
            self.gradients.zero()

    def loss(self, task, batch, seed):
        """A task's loss and its regularisers. seed: for dropout."""
        torch.manual_seed(seed)
        logits = self.model.logits(task, batch)
        loss = self.model.loss(task, batch, logits)
        self.meter.add(task, loss, len(batch.rows), int(batch.attention_mask.sum()))
        for name, regulariser in self.regularisers.items():
            if task in regulariser.kinds:
                term = regulariser(self.model, task, batch, logits, seed)
                self.meter.add(f"{task} {name}", term, len(batch.rows))
                loss = loss + term
        return loss

    def optimizer_step(self, name):
        args = self.args
        if args.clip:
            nn.utils.clip_grad_norm_(self.trainable[name], args.clip)
        self.updates_done[name] += 1
        progress = self.updates_done[name] / (self.updates_planned[name] + 1)  # the + 1: no step has rate 0
        self.lr = learning_rate(args.lr, progress, args.warmup, args.lr_schedule)
        for group in self.optimizers[name].param_groups:
            group["lr"] = self.lr
        self.optimizers[name].step()
        if self.proximal:
            self.proximal.update(self.model, sum(self.updates_done.values()) / sum(self.updates_planned.values()))

    def step_line(self):
        """A step line for metrics.jsonl: the means since the last one. Raises RunFailed where a loss is not finite."""
        self.check_losses()
        means, speed = self.meter.read()
        losses = {task: means[task] for task in self.optimizer_of if task in means}
        others = {"regularisers": {name: mean for name, mean in means.items() if name not in losses},
                  "gradients": mean_of(self.diagnosed[self.logged:])}
        self.logged = len(self.diagnosed)
        return {"epoch": self.epoch + 1, "step": self.steps_of_run(), "losses": losses, "lr": self.lr, **speed,
                **{name: values for name, values in others.items() if values}}

    def check_losses(self):
        """Raises RunFailed that names task, step and rows of the first loss since the last check that is not finite."""
        recent, self.unchecked_losses = self.unchecked_losses, []
        losses = torch.stack([loss for *_, loss in recent]).tolist() if recent else []  # here the host waits, once
        for (step, task, rows, _), loss in zip(recent, losses):
            if not math.isfinite(loss):
                examples = self.data[task]["train"]
                ids = ", ".join(examples.ids[row] for row in rows[:5]) + (", ..." if len(rows) > 5 else "")
                raise RunFailed(f"the loss of {task} is {loss} at step {step} of epoch {self.epoch + 1}, {len(rows)} rows of "
                                f"{examples.path.name} with the ids {ids}; what was saved before is intact; try a lower "
                                "--lr, or --clip 1")

    def check_weights(self):
        """Raises RunFailed where one is not finite."""
        for name, parameter in self.model.named_parameters():
            if not parameter.isfinite().all():
                raise RunFailed(f"{name} is not finite after {self.steps_of_run()} steps; what was saved before is intact; "
                                "try a lower --lr, or --clip 1")

    def steps_of_run(self):
        return self.epoch * self.schedule.steps_per_epoch + self.step

    def end_epoch(self):
        self.epoch, self.step, self.diagnosed, self.logged = self.epoch + 1, 0, [], 0
        self.meter.clear()

    def state(self):
        """Tensors and plain values. To be asked for where no gradient is pending, after an update. Raises RunFailed where
        that is nothing to go on from."""
        self.check_losses()
        self.check_weights()
        return {"data": self.data_digest, "epoch": self.epoch, "step": self.step, "best": self.best,
                "updates_done": self.updates_done, "lr": self.lr,
                "model": self.model.state_dict(), "gradvac_targets": self.gradients.targets,
                "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
                "teacher": self.proximal.teacher.state_dict() if self.proximal else None,
                "meter": self.meter.state(), "diagnosed": self.diagnosed, "logged": self.logged}

    def load_state(self, state):
        """Raises InputError where the data is another one, or the state is not one of this script."""
        if state.get("data") != self.data_digest:
            raise InputError("--resume: the data files or the vocabulary are not those that the run was started with")
        try:
            self.take_state(state)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise InputError("--resume: last.pt is not what this script saves "
                             f"({' '.join(str(error).split())[:120]})") from error

    def take_state(self, state):
        for name in ("epoch", "step", "best", "updates_done", "lr", "diagnosed", "logged"):
            setattr(self, name, state[name])
        self.model.load_state_dict(state["model"])
        self.gradients.targets = state["gradvac_targets"]
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        if self.proximal:
            self.proximal.teacher.load_state_dict(state["teacher"])
        if rank_and_world()[0] == 0:  # the other processes' part of a mean that was under way is not there
            self.meter.load_state(state["meter"])


def train(training, run, encoder_folder):
    """Train for args.epochs, from where `run` stopped if it did. Saves the best epoch by dev scores, returns its
    evaluation.

    run: on every process; the first one writes. Raises RunFailed where a loss is not finite, and Interrupted.
    """
    args, model, data = training.args, training.model, training.data
    if run.last:
        training.load_state(run.last)
    run.start()
    with Interruption() as interruption:
        while training.epoch < args.epochs:
            train_epoch(training, run, interruption)
            training.check_weights()
            scores = evaluate(model, data, args.seed)
            best = training.best
            improved = best is None or selection(scores, args.trained) > selection(best, args.trained)
            training.best = {"epoch": training.epoch + 1, **scores} if improved else best
            print(f"epoch {training.epoch + 1}/{args.epochs}  {describe(scores)}"
                  f"{'  best so far, saved' if improved else ''}", flush=True)
            if training.diagnosed:
                print(f"           {describe_gradients(mean_of(training.diagnosed))}", flush=True)
            run.log("evaluation", epoch=training.epoch + 1, step=training.steps_of_run(), **scores)
            if run.writes:
                if improved:
                    model.save(run.folder, encoder_folder)
                plot_curves(run.folder)
            training.end_epoch()
            run.save(training.state())
            interruption.check(run)
    return training.best


def train_epoch(training, run, interruption):
    """From the step that the epoch stands at to its last."""
    args = training.args
    training.model.train()
    training.gradients.zero()
    total = training.schedule.steps_per_epoch
    steps = itertools.islice(training.schedule.epoch(training.epoch), training.step, None)
    bar = tqdm(steps, desc=f"epoch {training.epoch + 1}/{args.epochs}", total=total, initial=training.step, unit="step",
               leave=False, disable=rank_and_world()[0] > 0)
    for batches in bar:
        training.train_step(batches)
        if training.step % LOG_EVERY == 0 or training.step == total:
            line = training.step_line()
            shown = " ".join(f"{task} {loss:.3f}" for task, loss in line["losses"].items())
            bar.set_postfix_str(f"{shown}, {line['tokens_per_second']} tokens/s")
            run.log("step", **line)
        if training.ends_update(training.step) and training.step < total:
            if interruption.asked or run.due(args.save_every):
                run.save(training.state())
            interruption.check(run)


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
    """Train as the flags say."""
    args = resolve(sys.argv[1:] if argv is None else list(argv))
    join_processes(args.device)
    rank, _ = rank_and_world()
    # only the first process prints
    with contextlib.redirect_stdout(nowhere()) if rank else contextlib.nullcontext():
        train_and_predict(args, rank)


def build(args, paths, encoder_folder):
    """(a new model on args.device, {task: {split: Examples}}) of resolved flags. Raises InputError."""
    torch.manual_seed(args.seed)  # for the new heads
    of_run = args.init_from and args.model == str(args.init_from)
    bert = (encoder_of_run(encoder_folder, *read_run(encoder_folder)) if of_run
            else BertModel.from_pretrained(encoder_folder))
    heads = bert.config.num_attention_heads
    if args.pal and args.pal["g"] == "attention" and args.pal["size"] % heads:
        raise InputError(f"argument --pal: size {args.pal['size']} is no multiple of the encoder's {heads} attention heads")
    cross = [task for task, head in args.pair_head.items() if head == "cross"]
    data = load_data(paths, encoder_folder, bert.config, cross, args.skip_malformed)
    for task, share in (args.limit or {}).items():
        size = len(data[task]["train"])
        order = np.random.default_rng(seed_of(args.seed, "limit", task)).permutation(size)
        data[task]["train"] = data[task]["train"].take(np.sort(order[:max(1, round(share * size))]))
        print(f"{task}: trained on {len(data[task]['train'])} of its {size} rows")
    tasks = {name: splits["train"].task for name, splits in data.items()}
    model = MultitaskBERT(bert, tasks, args.pair_head, args.pooling, args.hidden_dropout_prob, args.option, args.amp,
                          args.sst_loss, args.pal)
    return model.to(args.device), data


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
    model, data = build(args, paths, encoder_folder)
    if args.init_from:
        model.take_over(args.init_from)
    if distributed.is_initialized():
        for tensor in model.state_dict().values():
            distributed.broadcast(tensor, src=0)
    if model.frozen and not (args.pal or args.smart):  # both change what the encoder computes
        encode_once(model, data)
    folder, training = HERE / "runs" / args.name, Training(args, model, data)
    best = train(training, Run(folder, vars(args), args.resume, writes=rank == 0), encoder_folder)

    if distributed.is_initialized():
        distributed.barrier()  # the best epoch is on the disk
    model = MultitaskBERT.load(folder).to(args.device)
    predicted = {(task, split): predict(model, task, data[task][split]) for task, split in outputs}
    if rank == 0:
        for (task, split), path in outputs.items():
            path.parent.mkdir(exist_ok=True)  # predictions/, unless each was given a path
            write_predictions(path, data[task][split], predicted[task, split])
        write_errors(folder / "errors.csv", [(data[task]["dev"], made) for (task, split), made in predicted.items()
                                             if split == "dev"])
    if "sst" in data:
        dev = data["sst"]["dev"]
        print(describe_confusion(dev.task, decide(dev.task, predicted["sst", "dev"]), dev.labels))
    left = ["encoder", "heads", "metrics.jsonl", "curves.png", "errors.csv"]
    left += ["predictions/"] if (folder / "predictions").is_dir() else []
    print(f"best epoch {best['epoch']}: {describe(best)}")
    print(f"{os.path.relpath(folder)}: {', '.join(left)}")


if __name__ == "__main__":
    sys.exit(exit_status(main))
