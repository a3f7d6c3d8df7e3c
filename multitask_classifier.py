"""Multitask BERT: one encoder, three tasks at once (sentiment on SST, paraphrase on Quora,
similarity on STS).

    python multitask_classifier.py --option finetune --pcgrad        train; --help lists every flag
    torchrun --nproc_per_node 2 multitask_classifier.py ...          the same steps on two GPUs

A run leaves runs/NAME/ with the best encoder and heads, metrics.jsonl, curves.png, and predictions
in the course's submission format. A training system is a combination of independent choices:
schedule (data/batches.py), heads and losses (here), projected attention layers (attention.py),
gradient surgery (pcgrad.py), regularizers (smart.py). Read the function `train` first.

Dimensions: B examples in a batch, S sequences (B, or 2B where pairs are encoded separately), L
tokens in the longest, H hidden size, C outputs of a task.
"""
import argparse
import contextlib
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

from attention import ProjectedAttention, to_device
from bert import BertModel
from data.batches import SCHEDULES, Schedule, collate_shard, seed_of
from data.download import DEFAULT_ENCODER
from data.tasks import TASKS, auxiliary, data_digest, find_data_files, load_data
from data.tokenizer import fitting_tokenizer
from optimizer import ScheduledAdamW
from pcgrad import GradientBuffer
from smart import Proximal, Smoothness
from support import flags
from support.devices import (autocast, fetch_encoder_once, join_processes, make_scaler,
                             rank_and_world, sparse_embedding)
from support.evaluation import (best_lines, confusion_lines, encode_once, evaluate, output_paths,
                                predict, scores_header, scores_line, selection_score,
                                to_predictions, write_errors, write_predictions)
from support.fast_cpu import accelerate
from support.files import InputError
from support.flags import SST_LOSSES, number, per_task
from support.plots import plot_curves
from support.run import (Interruption, Run, StepLog, check_weights, exit_status,
                         not_a_run, null_stream, progress_bar, read_run, restoring)

HERE = Path(__file__).resolve().parent
MODEL_WITH_PAL = "bert_with_pal"  # model_type in config.json, where layers are not plain BERT's
LOG_EVERY = 10  # steps per line of metrics.jsonl, which has their means


# ---------------------------------------------------------------- flags

def get_parser():
    parser = flags.Parser(description="Train one BERT on several tasks at once.")
    add = parser.add_argument_group("model").add_argument
    add("--option", choices=("pretrain", "finetune"), default="pretrain",
        help="pretrain: the encoder is frozen, only the heads learn; finetune: everything learns")
    add("--model", help="BERT folder, or name on the Hugging Face hub (default: "
        f"{DEFAULT_ENCODER}, or that of --init_from)")
    add("--init_from", type=Path, metavar="RUN",
        help="start from the encoder and heads of an earlier run; with --model from its heads")
    add("--pooling", choices=("cls", "mean"), default="mean",
        help="BERT's pooled [CLS], or the mean of the last hidden states over real tokens")
    add("--pair_head", type=per_task(str), metavar="|".join(flags.PAIR_HEADS),
        help="for all pair tasks, or for each: para=uv_diff,sts=cosine. cross: the pair as one "
             "sequence; uv: linear on [u; v]; uv_diff: on [u; v; |u - v|]; cosine: cos(u, v) "
             "(default: cosine for finetune, cross for pretrain)")
    add("--hidden_dropout_prob", type=number(float, 0, 1), default=0.3,
        help="dropout of the heads; the encoder's is in its config.json")
    add("--sst_loss", choices=SST_LOSSES, default="ce",
        help="cross entropy, or ordinal log loss with an exponent of 1, 1.5 or 2")
    add("--pal", action="store_true", help="projected attention layers for each task")
    add("--pal_size", type=number(int, 1, 10000), help="width of their projection (default: 204)")
    add("--pal_g", choices=("attention", "identity"),
        help="what they do between their projections (default: attention)")

    add = parser.add_argument_group("training").add_argument
    add("--tasks", default="sst,para,sts",
        help=f"tasks to train, of {','.join(TASKS)}; a step visits them in this order")
    add("--aux", type=flags.name_and_file, action="append", default=[], metavar="NAME=FILE",
        help="a further task to train, which counts in no score: classes of sentences, in a file "
             "like sst's. May be repeated")
    add("--score_also", metavar="TASKS", help="tasks that get a head and scores, but no training")
    add("--limit", type=per_task(number(float, 0)), metavar="para=0.25",
        help="train on this fraction of a task's examples (of each task, with one number)")
    add("--schedule", choices=SCHEDULES, default="round_robin",
        help="round_robin: a batch of each task per step; mixed: with batch sizes in proportion "
             "to the sets. With one batch of one task per step: sequential: task after task; "
             "mtdnn: all batches shuffled; annealed: tasks drawn, the large ones ever less often")
    add("--upsample", action="store_true",
        help="with --schedule mtdnn: repeat each set until it is as large as the largest")
    add("--epochs", type=number(int, 1), default=10, help="number of epochs")
    add("--epoch_length", default="longest", metavar="longest|shortest|STEPS",
        help="steps per epoch. longest, shortest: the batches of the set that has most or fewest; "
             "with one task per step: the batches of all sets, or the fewest times the tasks")
    add("--batch_size", type=per_task(number(int, 1)),
        help="examples per step of each task: one number, or sst=2,para=24,sts=2 (default: "
             "sst=16,para=32,sts=12,cfimdb=8; with --schedule mixed 20, the mean over the tasks)")
    add("--accumulate", type=number(int, 1), default=1, metavar="N",
        help="steps of the schedule per optimizer step. Their mean losses are summed: the "
             "gradient is N times that of one batch N times as large, so --clip takes effect N "
             "times earlier")
    add("--lr", type=number(float, 0),
        help="peak learning rate (default: 1e-4 for finetune, 1e-3 for pretrain)")
    add("--lr_schedule", choices=("linear", "constant"), default="linear",
        help="after the warm-up: down to 0, or constant")
    add("--warmup", type=number(float, 0, 1), default=0.1,
        help="share of the optimizer steps in which the rate rises from 0")
    add("--weight_decay", type=number(float, 0), default=0.0,
        help="of weights; biases and norms have none")
    add("--clip", type=number(float, 0), default=1.0, help="largest global gradient norm; 0: off")
    add("--optimizer_per_task", action="store_true",
        help="separate AdamW moments for each task, where a step has one task")
    add("--seed", type=number(int, 0, 2 ** 63), default=11711, help="seed of all random generators")

    add = parser.add_argument_group("gradient surgery").add_argument
    add("--pcgrad", nargs="?", const=True, metavar="GROUPS",
        help="project conflicting task gradients; tasks of a group share one: sst+para,sts")
    add("--gradvac", nargs="?", const=True, metavar="GROUPS",
        help="Gradient Vaccine, with groups as for --pcgrad")
    add("--surgery_scope", choices=("vector", "tensor"), default="vector",
        help="vector: all shared parameters as one; tensor: each separately")
    add("--log_gradients", action="store_true",
        help="measure norms and cosines of the tasks' gradients for the encoder, and conflicts, "
             "without surgery; surgery always does")

    add = parser.add_argument_group("regularizers (SMART, Jiang et al. 2020)").add_argument
    add("--smart", action="store_true", help="smoothness under perturbations of the embeddings")
    add("--smart_weight", type=number(float, 0), help="weight of the term (default: 5)")
    add("--smart_eps", type=number(float, 0), help="radius of the ball (default: 1e-5)")
    add("--smart_sigma", type=number(float, 0),
        help="standard deviation of the initial noise (default: 1e-5)")
    add("--smart_step_size", type=number(float, 0), help="step size of the ascent (default: 1e-3)")
    add("--smart_steps", type=number(int, 1), help="number of ascent steps (default: 1)")
    add("--smart_norm", choices=("inf", "2"), help="norm of the ball (default: inf)")
    add("--smart_tasks", metavar="TASKS", help="for these tasks only: sst,sts (default: all)")
    add("--proximal", action="store_true", help="stay near a running average of the weights")
    add("--proximal_mu", type=number(float, 0), help="weight of the term (default: 1)")
    add("--proximal_beta", type=number(float, 0, 1), help="of the running average (default: the "
        "paper's .99 in the first tenth of the optimizer steps, then .999)")

    add = parser.add_argument_group("machine and run").add_argument
    add("--use_gpu", action="store_true", help="train on CUDA, or on MPS of an Apple machine")
    add("--amp", action="store_true",
        help="encoder in half precision (CUDA, or a CPU with avx512_bf16)")
    add("--name", help="folder in runs/, or an absolute path (default: made of flags and time)")
    add("--resume", metavar="RUN", help="resume an interrupted run, with the flags it had")
    add("--save_every", type=number(float, 0), default=5.0, metavar="MINUTES",
        help="how often the state to resume from is saved, besides after each epoch")

    add = parser.add_argument_group("data").add_argument
    add("--data_dir", type=Path, help="folder with the course's files (default: data/ once "
        "`python data/download.py` has filled it, the demo sets in data/demo/ until then)")
    add("--skip_malformed", action="store_true",
        help="continue where more than 1 %% of a file is malformed")
    for task in TASKS:  # the course's path flags, explained in the epilog instead of in 20 lines
        for kind in flags.TASK_FILES:
            add(f"--{task}_{kind}", type=Path, help=argparse.SUPPRESS)
    parser.epilog = ("Single files: --TASK_train, --TASK_dev, --TASK_test FILE instead of the one "
                     "in the data folder; --TASK_dev_out, --TASK_test_out FILE for the predictions "
                     "(default: predictions/ in the run's folder).")
    return parser


# ---------------------------------------------------------------- heads and losses

class Head(nn.Module):
    """From pooled sequences to a task's outputs. (S, H) -> (B, C).

    single, cross  dropout, linear on the pooled sentence, or on the pair pooled as one sequence
    uv             dropout, linear on [u; v], the two sentences pooled separately
    uv_diff        dropout, linear on [u; v; |u - v|] (Reimers & Gurevych 2019, section 3)
    cosine         regression: 5 cos(u, v). Binary: the logit w cos(u, v) + b. Not for classes
    """

    def __init__(self, task, form, hidden_size, hidden_dropout_prob):
        super().__init__()
        self.form, self.max_label, self.binary = form, task.max_label, task.kind == "binary"
        self.dropout = nn.Dropout(hidden_dropout_prob)
        if form != "cosine":
            width = {"uv": 2, "uv_diff": 3}.get(form, 1) * hidden_size
            self.linear = nn.Linear(width, task.num_outputs)
            nn.init.normal_(self.linear.weight, std=0.02)
            # a regression starts in the middle of its scale, to spend no steps on the mean
            middle = task.max_label / 2 if task.kind == "regression" else 0.0
            nn.init.constant_(self.linear.bias, middle)
        elif self.binary:
            # 10 cos - 7 decides at a cosine of .7; small rates would not get there from 1 and 0
            self.weight, self.bias = (nn.Parameter(torch.tensor(x)) for x in (10.0, -7.0))

    def forward(self, pooled):
        if self.form in ("single", "cross"):
            return self.linear(self.dropout(pooled))

        # two sentences per example: first all first ones, then all second ones
        u, v = pooled.chunk(2)  # (B, H) each
        if self.form == "cosine":
            cosine = F.cosine_similarity(u, v).unsqueeze(-1)  # (B, 1)
            return self.weight * cosine + self.bias if self.binary else self.max_label * cosine
        features = [u, v] if self.form == "uv" else [u, v, (u - v).abs()]
        return self.linear(self.dropout(torch.cat(features, dim=-1)))


def ordinal_log_loss(logits, labels, alpha):
    """-sum_i |y - i|^alpha log(1 - p_i), mean over the batch (Castagnos et al. 2022). (B, C), (B,).

    log(1 - p_i) is computed as the log-sum-exp of the other classes' logits minus that of all
    classes, which stays finite where p_i rounds to 1.
    """
    C = logits.size(-1)
    own = torch.eye(C, dtype=torch.bool, device=logits.device)
    others = logits.unsqueeze(1).masked_fill(own, -math.inf)  # (B, C, C)
    log_not = others.logsumexp(dim=-1) - logits.logsumexp(dim=-1, keepdim=True)  # (B, C)
    distance = (labels.unsqueeze(1) - torch.arange(C, device=logits.device)).abs()  # (B, C)
    return -(distance ** alpha * log_not).sum(dim=-1).mean()


def task_loss(task, logits, labels, alpha=None):
    """Mean over the batch. (B, C), (B,). alpha: of ordinal log loss, instead of cross entropy."""
    if alpha is not None:
        return ordinal_log_loss(logits, labels, alpha)
    if task.kind == "classification":
        return F.cross_entropy(logits, labels.long())
    if task.kind == "binary":
        return F.binary_cross_entropy_with_logits(logits.squeeze(-1), labels)
    return F.mse_loss(logits.squeeze(-1), labels)


# ---------------------------------------------------------------- model

class MultitaskBERT(nn.Module):
    """One BERT encoder, and a head for each task.

    tasks: {name: Task}. pair_head: {pair task: one of PAIR_HEADS}. pooling: "cls" or "mean".
    option: "finetune", or "pretrain" for a frozen encoder, which then runs without dropout. amp:
    the encoder in half precision; heads and losses stay in float32. hidden_dropout_prob: of the
    heads alone; the encoder's is in its config. sst_loss: one of SST_LOSSES. pal: {"size", "g"}
    of a ProjectedAttention for each task, or None.
    """

    def __init__(self, bert, tasks, pair_head, pooling, hidden_dropout_prob, option="finetune",
                 amp=False, sst_loss="ce", pal=None):
        super().__init__()
        config = bert.config
        self.bert = accelerate(bert)  # the same products, faster on a CPU
        self.tasks, self.pair_head = tasks, pair_head
        self.pooling, self.amp = pooling, amp
        self.ordinal_alpha = {"sst": SST_LOSSES[sst_loss]}  # None: cross entropy
        self.frozen = option == "pretrain"
        bert.requires_grad_(not self.frozen)

        # what each task has for itself
        self.heads = nn.ModuleDict({
            name: Head(task, pair_head.get(name, "single"), config.hidden_size, hidden_dropout_prob)
            for name, task in tasks.items()})
        self.pal = accelerate(nn.ModuleDict({
            name: ProjectedAttention(config.hidden_size, pal["size"], config.num_attention_heads,
                                     config.num_hidden_layers, pal["g"])
            for name in (tasks if pal else ())}))

    def train(self, mode=True):
        super().train(mode)
        self.bert.train(mode and not self.frozen)
        return self

    @property
    def device(self):
        return self.bert.word_embedding.weight.device

    def shared_parameters(self):
        """The parameters that every task reaches: the encoder's, its pooler only with
        --pooling cls."""
        return [p for name, p in self.bert.named_parameters() if p.requires_grad
                and (self.pooling == "cls" or not name.startswith("pooler_dense."))]

    def own_parameters(self, task):
        """Those that only this task reaches: its head and its projected attention layers."""
        return [p for modules in (self.heads, self.pal) if task in modules
                for p in modules[task].parameters()]

    def forward(self, input_ids, attention_mask, token_type_ids=None, perturbation=None, pal=None):
        """Padded sequences (S, L) -> pooled (S, H).

        perturbation: (S, L, H), added to the embeddings (smart.py). pal: a ProjectedAttention.
        """
        with autocast(self.device, self.amp):
            # from here on T packed tokens, without padding
            ids, types, packing = self.bert.pack(input_ids, attention_mask, token_type_ids)
            hidden_states = self.bert.embed(ids, types, packing.positions)  # (T, H)
            if perturbation is not None:
                hidden_states = hidden_states + packing.pack(perturbation)
            hidden_states = self.bert.encode_packed(hidden_states, packing, pal)

            # one vector per sequence, in the order of the batch
            if self.pooling == "cls":
                pooled = self.bert.pool(packing.first(hidden_states))
            else:
                pooled = packing.mean(hidden_states)
        return pooled.float() if self.amp else pooled  # a model in float64 stays in float64

    def logits(self, task, batch, perturbation=None):
        """The handout's predict_sentiment, predict_paraphrase and predict_similarity. -> (B, C)"""
        if batch.pooled is not None:
            return self.heads[task](to_device(batch.pooled, self.device))
        pal = self.pal[task] if task in self.pal else None
        return self.heads[task](self(batch.input_ids, batch.attention_mask, batch.token_type_ids,
                                     perturbation, pal))

    def loss(self, task, batch, logits=None):
        logits = self.logits(task, batch) if logits is None else logits
        labels = to_device(batch.labels, self.device)
        return task_loss(self.tasks[task], logits, labels, self.ordinal_alpha.get(task))

    def own_state(self):
        """All but the encoder: {"heads.sst.linear.weight": ..., "pal.sst.down.weight": ...}"""
        return {name: tensor for name, tensor in self.state_dict().items()
                if not name.startswith("bert.")}

    def save(self, folder, encoder_folder):
        """The encoder in the published layout with its vocabulary, and heads and projected
        attention layers in the same file."""
        model_type = MODEL_WITH_PAL if self.pal else "bert"
        self.bert.save_pretrained(folder, encoder_folder, self.own_state(), model_type)

    def load_task_modules(self, folder):
        """Copy heads and projected attention layers from an earlier run, for the tasks that both
        have. Raises InputError where their shapes differ."""
        args, tensors = read_run(folder)
        if not tensors:
            raise InputError(f"--init_from {folder}: it holds no heads; to start from its encoder "
                             f"alone: --model {folder}")

        # each head, and each task's projected attention layers, fit as a whole or not at all
        own, new = self.own_state(), []
        for prefix in (f"{kind}.{task}." for kind in ("heads", "pal") for task in self.tasks):
            ours = {name: x.shape for name, x in own.items() if name.startswith(prefix)}
            theirs = {name: x.shape for name, x in tensors.items() if name.startswith(prefix)}
            if ours and not theirs:
                new.append(prefix[:-1])
            elif ours != theirs:
                raise InputError(f"--init_from {folder}: its {prefix[:-1]} has another shape "
                                 f"({args['pair_head']}, --pal {args['pal']})")
        own_tensors = {name: tensor for name, tensor in tensors.items() if name in own}
        self.load_state_dict(own_tensors, strict=False)
        print(f"{folder}: its heads are loaded" + (f"; new are {', '.join(new)}" if new else ""))

    @classmethod
    def load(cls, folder):
        """The model of a run, its best epoch. Raises InputError where the folder is not a run's."""
        args, tensors = read_run(folder)
        try:
            tasks = {name: task_of_run(name, tensors)
                     for name in [*args["trained"], *args["score_also"]]}
            pal = {"size": args["pal_size"], "g": args["pal_g"]} if args["pal"] else None
            model = cls(encoder_of_run(folder, args, tensors), tasks, args["pair_head"],
                        args["pooling"], args["hidden_dropout_prob"], args["option"], args["amp"],
                        args["sst_loss"], pal)
            differing = sorted(set(model.own_state()) ^ set(tensors))
            if differing:
                raise ValueError(f"its tensors do not fit its flags: {differing}")
            model.load_state_dict(tensors, strict=False)
            # for support/predict.py
            model.tokenizer = fitting_tokenizer(folder, model.bert.config,
                                                pairs="cross" in args["pair_head"].values())
        except InputError:
            raise
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise not_a_run(folder, error) from error
        return model.eval()


def encoder_of_run(folder, args, tensors):  # args, tensors: of read_run
    model_type = MODEL_WITH_PAL if args["pal"] else "bert"
    return BertModel.from_pretrained(folder, ignore=tensors, model_type=model_type)


def task_of_run(name, tensors):
    """From the table, or an auxiliary task, whose number of classes only its head tells."""
    if name in TASKS:
        return TASKS[name]
    return replace(auxiliary(name), max_label=len(tensors[f"heads.{name}.linear.bias"]) - 1)


# ---------------------------------------------------------------- training

def train(args, model, data, schedule, run, encoder_folder):
    """Train for args.epochs, or for the rest of them where `run` is resumed. Saves the best epoch,
    and returns its evaluation. Raises RunFailed where a loss is not finite, and Interrupted."""
    rank, world = rank_and_world()
    scaler = make_scaler(model.device, args.amp)
    gradients = GradientBuffer(
        model.shared_parameters(), {task: model.own_parameters(task) for task in args.trained},
        args.surgery, args.gradient_rows, args.surgery_scope, scaler)
    optimizers = make_optimizers(args, model, schedule, scaler)  # {task: its optimizer}
    regularizers = make_regularizers(args, model)
    log = StepLog(run, args.trained, regularizers, model.device)

    # epochs and steps that are done; last.pt holds this, and the tensors of model, gradients,
    # optimizers and regularizers
    state = {"epoch": 0, "step": 0, "best": None}
    if run.last:
        load_state(run.last, state, model, gradients, optimizers, regularizers)
    run.start()

    with Interruption() as interruption:
        for epoch in range(state["epoch"], args.epochs):
            model.train()
            log.clear()  # its clock starts anew: the evaluation was no step
            bar = progress_bar(schedule, epoch, state["step"], args.epochs)
            for step in bar:  # a step is a list of (task, indices)
                # all tasks have one optimizer; or each its own, where a step has one task
                optimizer = optimizers[step[0][0]]
                state["step"] = n = state["step"] + 1
                at_end = n == schedule.steps_per_epoch
                is_update = at_end or n % args.accumulate == 0  # --accumulate: every N-th step

                # one backward pass per task, so that memory holds the activations of one task
                gradients.begin([task for task, _ in step], is_update)
                for task, indices in step:
                    batch = collate_shard(data[task]["train"], indices, rank, world)
                    seed = seed_of(args.seed, epoch, n, task, rank)  # for the dropout masks
                    loss = regularized_loss(model, task, batch, regularizers, log, seed)
                    gradients.backward(task, loss)

                # the sum of the tasks' gradients, PCGrad or Vaccine; then AdamW
                if is_update:
                    gradients.combine(seed_of(args.seed, epoch, n, "order of the projections"))
                    if optimizer.step():
                        update_teacher(model, regularizers, optimizers)
                    else:  # an overflow in float16: no weight has moved
                        gradients.undo()
                        log.skipped += 1
                log.end_step(gradients.diagnostics() if is_update else None)

                # save where no gradient is pending. Clocks of several processes differ: they save
                # only where log.write, which sums over them, has made all wait anyway
                global_step = epoch * schedule.steps_per_epoch + n
                write = n % LOG_EVERY == 0 or at_end
                due = run.due(args.save_every) and (write or world == 1)
                save = is_update and not at_end and (due or interruption.asked)
                if write or save:
                    bar.set_postfix_str(log.write(epoch + 1, global_step, lr=optimizer.lr))
                if save:
                    save_state(run, state, model, gradients, optimizers, regularizers)
                    interruption.check(run)

            end_epoch(args, model, data, run, state, encoder_folder, global_step)
            save_state(run, state, model, gradients, optimizers, regularizers)
            interruption.check(run)
    return state["best"]


def regularized_loss(model, task, batch, regularizers, log, seed):
    """A task's loss on this process's shard of a batch, with its regularizers, weighted by the
    shard's share of the batch. A scalar; None for an empty shard."""
    if batch is None:
        return None
    torch.manual_seed(seed)  # the regularizers start from it too, for the same dropout masks
    logits = model.logits(task, batch)
    loss = model.loss(task, batch, logits)
    log.add(task, loss, len(batch.indices), batch)
    for name, regularizer in regularizers.items():
        if task in regularizer.kinds:
            term = regularizer(model, task, batch, logits, seed)
            log.add(f"{task} {name}", term, len(batch.indices))
            loss = loss + term
    return loss * batch.share


def make_regularizers(args, model):
    """{"smart": Smoothness, "proximal": Proximal}, those that the flags ask for."""
    kinds = {task: model.tasks[task].kind for task in args.trained}
    regularizers = {}
    if args.smart:
        regularizers["smart"] = Smoothness(
            {task: kinds[task] for task in args.smart_tasks}, args.smart_weight, args.smart_eps,
            args.smart_sigma, args.smart_step_size, args.smart_steps, args.smart_norm)
    if args.proximal:
        regularizers["proximal"] = Proximal(model, kinds, args.proximal_mu, args.proximal_beta)
    return regularizers


def update_teacher(model, regularizers, optimizers):
    """After an optimizer step: the proximal term's running average of the weights."""
    if "proximal" in regularizers:
        each = set(optimizers.values())
        done = sum(optimizer.done for optimizer in each)
        planned = sum(optimizer.updates for optimizer in each)
        regularizers["proximal"].update(model, done / planned)


def make_optimizers(args, model, schedule, scaler):
    """{task: the optimizer of its steps}: one for all tasks, or with --optimizer_per_task one each,
    whose learning-rate schedule counts the steps of its task alone."""
    def optimizer_of(tasks, updates):
        parameters = [*model.shared_parameters(),
                      *(p for task in tasks for p in model.own_parameters(task))]
        return ScheduledAdamW(parameters, updates, args.lr, args.warmup, args.lr_schedule,
                              args.weight_decay, args.clip, scaler)

    if args.optimizer_per_task:
        steps = Counter(task for epoch in range(args.epochs) for step in schedule.tasks(epoch)
                        for task in step)
        return {task: optimizer_of([task], steps[task]) for task in args.trained}
    updates = args.epochs * math.ceil(schedule.steps_per_epoch / args.accumulate)
    return dict.fromkeys(args.trained, optimizer_of(args.trained, updates))


def end_epoch(args, model, data, run, state, encoder_folder, global_step):
    """Evaluate, and save the model if the epoch is the best so far.

    The best epoch has the highest mean dev score over the trained tasks (`selection_score`); of
    two that are equal, the earlier one is kept.
    """
    check_weights(model, state["epoch"] + 1, state["step"])
    scores, best = evaluate(model, data, args.seed), state["best"]
    improved = best is None or (selection_score(scores, args.trained)
                                > selection_score(best, args.trained))
    state["epoch"], state["step"] = state["epoch"] + 1, 0
    if improved:
        state["best"] = {"epoch": state["epoch"], **scores}
    print(f"{scores_line(state['epoch'], args.epochs, scores)}"
          f"{'  best, saved' if improved else ''}", flush=True)
    run.log("evaluation", epoch=state["epoch"], step=global_step, **scores)

    if run.writes:
        if improved:
            model.save(run.folder, encoder_folder)
        plot_curves(run.folder)


def save_state(run, state, model, gradients, optimizers, regularizers):
    """Write last.pt, from which --resume continues. Only after an update: no gradient is pending.
    Raises RunFailed where a weight is not finite."""
    check_weights(model, state["epoch"] + 1, state["step"])
    proximal = regularizers.get("proximal")
    run.save({**state, "model": model.state_dict(), "gradvac_targets": gradients.targets,
              "optimizers": {task: each.state_dict() for task, each in optimizers.items()},
              "teacher": proximal.teacher.state_dict() if proximal else None})


def load_state(last, state, model, gradients, optimizers, regularizers):
    """Restore what save_state wrote. Raises InputError for the state of another script."""
    with restoring():
        state.update({name: last[name] for name in state})
        model.load_state_dict(last["model"])
        gradients.targets = last["gradvac_targets"]
        for task, optimizer in optimizers.items():
            optimizer.load_state_dict(last["optimizers"][task])
        if "proximal" in regularizers:
            regularizers["proximal"].teacher.load_state_dict(last["teacher"])


# ---------------------------------------------------------------- main

def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    args = flags.parse_flags(get_parser, flags.check_training_flags, argv, "--name")
    join_processes(args.device)
    rank, _ = rank_and_world()
    # only the first process prints
    with contextlib.redirect_stdout(null_stream()) if rank else contextlib.nullcontext():
        train_and_predict(args, rank)


def train_and_predict(args, rank):
    if args.init_from and not args.init_from.is_dir():
        raise InputError(f"--init_from {args.init_from}: no such folder; name a run's folder, as "
                         "in runs/NAME")
    paths = find_data_files(args)
    outputs = output_paths(args, paths, HERE / "runs" / args.name)
    encoder_folder = fetch_encoder_once(args)
    model, data = build(args, paths, encoder_folder)

    # all processes start from the first one's weights
    if distributed.is_initialized():
        for tensor in model.state_dict().values():
            distributed.broadcast(tensor, src=0)

    # the folder is made when nothing that the user gave can be wrong any more
    sizes = {task: len(data[task]["train"]) for task in args.trained}
    schedule = Schedule(args.schedule, sizes, args.batch_size, args.epoch_length, args.seed,
                        args.epochs, args.upsample)
    folder = HERE / "runs" / args.name
    run = Run(folder, vars(args), data_digest(data), args.resume, writes=rank == 0)

    # a frozen encoder always gives the same, unless PAL or SMART change what it computes
    if model.frozen and not (args.pal or args.smart):
        encode_once(model, data)
    print(scores_header(data), flush=True)
    best = train(args, model, data, schedule, run, encoder_folder)
    if distributed.is_initialized():
        distributed.barrier()  # the first process has written the best epoch

    # predict with the best epoch, which is not always the last
    model = MultitaskBERT.load(folder).to(args.device)
    predicted = {(task, split): predict(model, task, data[task][split]) for task, split in outputs}
    if rank == 0:
        for (task, split), path in outputs.items():
            path.parent.mkdir(exist_ok=True)  # predictions/, unless a path was given
            write_predictions(path, data[task][split], predicted[task, split])
        write_errors(folder / "errors.csv", [(data[task]["dev"], predicted[task, split])
                                             for task, split in outputs if split == "dev"])

    if "sst" in data:
        dev = data["sst"]["dev"]
        predictions = to_predictions(dev.task, predicted["sst", "dev"])
        print(confusion_lines(dev.task, predictions, dev.labels))
    left = ["encoder", "heads", "metrics.jsonl", "curves.png", "errors.csv"]
    left += ["predictions/"] if (folder / "predictions").is_dir() else []
    print(f"{best_lines(best, data)}\n{os.path.relpath(folder)}\n  {', '.join(left)}")


def build(args, paths, encoder_folder):
    """(a new model on args.device, {task: {split: Examples}}). Raises InputError."""
    torch.manual_seed(args.seed)  # for the new heads
    # --init_from without --model: the encoder of that run too
    if args.init_from and args.model == str(args.init_from):
        bert = encoder_of_run(encoder_folder, *read_run(encoder_folder))
    else:
        bert = BertModel.from_pretrained(encoder_folder)
    pal = {"size": args.pal_size, "g": args.pal_g} if args.pal else None
    attention_heads = bert.config.num_attention_heads
    if pal and pal["g"] == "attention" and pal["size"] % attention_heads:
        raise InputError(f"argument --pal_size: {args.pal_size} is no multiple of the encoder's "
                         f"{attention_heads} attention heads")

    cross = [task for task, head in args.pair_head.items() if head == "cross"]
    data = load_data(paths, encoder_folder, bert.config, cross, args.skip_malformed)

    # --limit: a random subset; that of a smaller fraction is a part of it
    for task, fraction in (args.limit or {}).items():
        size = len(data[task]["train"])
        order = np.random.default_rng(seed_of(args.seed, "limit", task)).permutation(size)
        chosen = np.sort(order[:max(1, round(fraction * size))])
        data[task]["train"] = data[task]["train"].take(chosen)
        print(f"{task}: trained on {len(chosen)} of its {size} examples")

    # the examples know their task: the number of classes of an auxiliary task is in its file
    tasks = {name: splits["train"].task for name, splits in data.items()}
    model = MultitaskBERT(bert, tasks, args.pair_head, args.pooling, args.hidden_dropout_prob,
                          args.option, args.amp, args.sst_loss, pal)
    sparse_embedding(model, args.device)
    if args.init_from:
        model.load_task_modules(args.init_from)
    return model.to(args.device), data


if __name__ == "__main__":
    sys.exit(exit_status(main))
