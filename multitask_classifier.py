"""Multitask BERT: one encoder, three tasks at once (sentiment on SST, paraphrase on Quora, similarity on STS).

    python multitask_classifier.py --option finetune --pcgrad        train; `--help` lists every flag

A run leaves runs/NAME/ with the best encoder and heads, metrics.jsonl, curves.png, and the predictions in the course's
submission format. Each system of the five reports is a combination of these axes: schedule (data/batches.py), heads and
losses (here), gradient surgery (pcgrad.py).

Dimensions: B rows in a batch, S sequences (B, or 2B where pairs are encoded apart), H hidden size, C outputs of a task.
"""
import argparse
import contextlib
import json
import math
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import pearsonr
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from attention import to_device
from bert import BertModel
from checkpoint import Run, plot_curves
from data.batches import SCHEDULES, Schedule, collate, evaluation_batches, seed_of
from data.download import DEFAULT_ENCODER, InputError, fetch_encoder, replace
from data.tasks import TASKS, load_tokenizer, read_examples, tokenize
from optimizer import AdamW
from pcgrad import GradientBuffer

HERE = Path(__file__).resolve().parent
PAIR_HEADS = ("cross", "uv", "uv_diff", "cosine")
DEFAULT_BATCH_SIZE = {"sst": 16, "para": 32, "sts": 12, "cfimdb": 8}
TRAIN_SAMPLE = 2000  # rows a task of the train score: a full pass would cost more than a short run
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
        self.kind, self.top = kind, task.top
        self.dropout = nn.Dropout(hidden_dropout_prob)
        if kind != "cosine":
            width = {"uv": 2, "uv_diff": 3}.get(kind, 1) * hidden_size
            self.linear = nn.Linear(width, task.num_outputs)
            nn.init.normal_(self.linear.weight, std=0.02)
            # a regression starts at the middle of its scale, so that the first steps are not spent on the mean
            nn.init.constant_(self.linear.bias, task.top / 2 if task.kind == "similarity" else 0.0)
        elif task.kind == "binary":  # a scale that learning rates of fine-tuning could not reach from 1
            self.weight, self.bias = nn.Parameter(torch.tensor(10.0)), nn.Parameter(torch.tensor(-7.0))

    def forward(self, pooled):
        if self.kind in ("single", "cross"):
            return self.linear(self.dropout(pooled))
        u, v = pooled.chunk(2)  # (B, H) each
        if self.kind == "cosine":
            cosine = F.cosine_similarity(u, v).unsqueeze(-1)  # (B, 1)
            return self.weight * cosine + self.bias if hasattr(self, "weight") else self.top * cosine
        features = [u, v] if self.kind == "uv" else [u, v, (u - v).abs()]
        return self.linear(self.dropout(torch.cat(features, dim=-1)))


def task_loss(task, logits, labels):
    """The mean over the batch. (B, C) logits, (B,) labels."""
    if task.kind == "classes":
        return F.cross_entropy(logits, labels.long())
    if task.kind == "binary":
        return F.binary_cross_entropy_with_logits(logits.squeeze(-1), labels)
    return F.mse_loss(logits.squeeze(-1), labels)


class MultitaskBERT(nn.Module):
    """One BERT encoder and a head for each task.

    tasks: names in TASKS. pair_head: {pair task: one of PAIR_HEADS}. pooling: "cls" (pooler_output) or "mean" (over real
    tokens). option: "finetune", or "pretrain" for a frozen encoder, which then runs without dropout. amp: the encoder in
    bfloat16 autocast; heads and losses stay in float32.
    """

    def __init__(self, bert, tasks, pair_head, pooling, hidden_dropout_prob, option="finetune", amp=False):
        super().__init__()
        self.bert, self.pooling, self.pair_head, self.amp = bert, pooling, pair_head, amp
        self.frozen = option == "pretrain"
        bert.requires_grad_(not self.frozen)
        self.heads = nn.ModuleDict({
            name: Head(TASKS[name], pair_head.get(name, "single"), bert.config.hidden_size, hidden_dropout_prob)
            for name in tasks})

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

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        """Padded sequences (S, L) -> pooled (S, H), float32."""
        autocast = torch.autocast(self.device.type, torch.bfloat16) if self.amp else contextlib.nullcontext()
        with autocast:
            input_ids, token_type_ids, packing = self.bert.pack(input_ids, attention_mask, token_type_ids)
            hidden_states = self.bert.embed(input_ids, token_type_ids, packing.positions)
            hidden_states = self.bert.encode_packed(hidden_states, packing)
            pooled = (self.bert.pool(packing.first(hidden_states)) if self.pooling == "cls"
                      else packing.mean(hidden_states))
        return pooled.float()

    def logits(self, task, batch):  # -> (B, C)
        return self.heads[task](self(batch.input_ids, batch.attention_mask, batch.token_type_ids))

    def loss(self, task, batch):
        return task_loss(TASKS[task], self.logits(task, batch), to_device(batch.labels, self.device))

    def save(self, folder, encoder_folder):
        """The encoder in the published layout with its vocabulary, and the heads beside it."""
        self.bert.save_pretrained(folder)
        for name in ("vocab.txt", "tokenizer_config.json"):
            if (encoder_folder / name).exists():
                replace(folder / name, lambda path: shutil.copyfile(encoder_folder / name, path))
        replace(folder / "heads.safetensors", lambda path: save_file(self.heads.state_dict(), path))

    @classmethod
    def load(cls, folder):
        """The model of a run, its best epoch. Raises InputError where the folder is not a run's."""
        folder = Path(folder)
        try:
            args = json.loads((folder / "args.json").read_text(encoding="utf-8"))
            model = cls(BertModel.from_pretrained(folder), args["tasks"], args["pair_head"], args["pooling"],
                        args["hidden_dropout_prob"], args["option"], args["amp"])
            model.heads.load_state_dict(load_file(folder / "heads.safetensors"))
        except (OSError, KeyError, ValueError, RuntimeError) as error:
            raise InputError(f"{folder}: not a finished run of this script ({error})") from error
        return model.eval()


# ---------------------------------------------------------------- evaluation

@torch.no_grad()
def predict(model, task, examples, rows=None):
    """Predictions in the order of `rows` (all, if None): class, 0/1, or similarity. Leaves train or eval mode as it was."""
    rows = np.arange(len(examples)) if rows is None else rows
    training = model.training
    model.eval()
    predictions = np.zeros(len(examples), dtype=np.float32)
    for batch in evaluation_batches(examples, rows):
        logits = model.logits(task, batch)  # (B, C)
        kind = TASKS[task].kind
        decided = (logits.argmax(dim=-1) if kind == "classes" else logits.squeeze(-1) > 0 if kind == "binary"
                   else logits.squeeze(-1))
        predictions[batch.rows] = decided.float().cpu().numpy()
    model.train(training)
    return predictions[rows]


def score(task, predictions, labels):
    """Accuracy, or for similarity Pearson's r over the whole split; constant predictions count 0."""
    if TASKS[task].kind != "similarity":
        return float((predictions == labels).mean())
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        print(f"{task}: constant predictions or labels have no correlation; counted as 0")
        return 0.0
    return float(pearsonr(predictions, labels)[0])


def overall(scores):
    """The reports' two overall scores where the three tasks are there: the mean (2023), and with (r + 1) / 2 (2024)."""
    if not {"sst", "para", "sts"} <= scores.keys():
        return {}
    sst, para, sts = scores["sst"], scores["para"], scores["sts"]
    return {"overall_2023": (sst + para + sts) / 3, "overall_2024": (sst + para + (sts + 1) / 2) / 3}


def evaluate(model, data, seed):
    """{"dev": {task: score}, "train": {task: score on a seeded sample}, the overall scores of dev}."""
    scores = {"dev": {}, "train": {}}
    for task, splits in data.items():
        size = len(splits["train"])
        sample = np.random.default_rng(seed_of(seed, "sample", task)).permutation(size)[:TRAIN_SAMPLE]
        for split, rows in (("train", sample), ("dev", np.arange(len(splits["dev"])))):
            scores[split][task] = score(task, predict(model, task, splits[split], rows), splits[split].labels[rows])
    return {**scores, **overall(scores["dev"])}


def write_predictions(path, task, examples, predictions):
    """The course's submission format: a heading, then `id , prediction` a row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = predictions.astype(int) if TASKS[task].kind == "classes" else predictions
    lines = [f"id \t {TASKS[task].heading} \n"] + [f"{i} , {value} \n" for i, value in zip(examples.ids, values)]
    replace(path, lambda part: part.write_text("".join(lines), encoding="utf-8"))


# ---------------------------------------------------------------- training

def learning_rate(args, progress):
    """progress: share of all optimizer steps done. Warm-up from 0, then constant or linearly down to 0."""
    if progress < args.warmup:
        return args.lr * progress / args.warmup
    return args.lr if args.lr_schedule == "constant" else args.lr * (1 - progress) / (1 - args.warmup)


def train(args, model, data, run, encoder_folder):
    """args.epochs epochs of the one training step. Saves the best epoch by dev scores. Returns its evaluation."""
    sizes = {task: len(splits["train"]) for task, splits in data.items()}
    schedule = Schedule(args.schedule, sizes, args.batch_size, args.epoch_length, args.seed)
    shared = model.shared_parameters()
    in_shared = set(map(id, shared))
    trainable = [p for p in model.parameters() if p.requires_grad]
    gradients = GradientBuffer(shared, [p for p in trainable if id(p) not in in_shared], args.tasks,
                               "pcgrad" if args.pcgrad else None)
    # its gradient then touches, in J, only the rows of words that occur; MPS has no sparse tensors
    model.bert.word_embedding.sparse = args.device != "mps"
    optimizer = AdamW([{"params": [p for p in trainable if p.ndim >= 2], "weight_decay": args.weight_decay},
                       {"params": [p for p in trainable if p.ndim < 2]}],  # no decay of biases and LayerNorm
                      lr=args.lr)
    updates_per_epoch = math.ceil(schedule.steps_per_epoch / args.accumulate)
    best, update = None, 0
    for epoch in range(args.epochs):
        model.train()
        losses, tokens, start = {}, 0, time.perf_counter()
        steps = tqdm(schedule.epoch(epoch), desc=f"epoch {epoch + 1}/{args.epochs}", total=schedule.steps_per_epoch,
                     unit="step", leave=False)
        gradients.zero()
        for step, batches in enumerate(steps, start=1):
            for task, rows in batches:
                torch.manual_seed(seed_of(args.seed, epoch, step, task))  # for dropout
                batch = collate(data[task]["train"], rows)
                loss = model.loss(task, batch)
                gradients.backward(task, loss)
                losses.setdefault(task, []).append(loss.detach())
                tokens += int(batch.attention_mask.sum())
            if step % args.accumulate == 0 or step == schedule.steps_per_epoch:
                gradients.combine(seed_of(args.seed, epoch, step, "order of the projections"))
                if args.clip:
                    nn.utils.clip_grad_norm_(trainable, args.clip)
                update += 1
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(args, update / (args.epochs * updates_per_epoch + 1))
                optimizer.step()
                gradients.zero()

            if step % LOG_EVERY == 0 or step == schedule.steps_per_epoch:
                means = {task: torch.stack(values).mean().item() for task, values in losses.items()}
                speed = tokens / (time.perf_counter() - start)
                run.log("step", epoch=epoch + 1, step=epoch * schedule.steps_per_epoch + step, losses=means,
                        lr=optimizer.param_groups[0]["lr"], tokens_per_second=round(speed))
                steps.set_postfix_str(" ".join(f"{task} {mean:.3f}" for task, mean in means.items())
                                      + f", {speed:.0f} tokens/s")
                losses, tokens, start = {}, 0, time.perf_counter()

        scores = evaluate(model, data, args.seed)
        run.log("evaluation", epoch=epoch + 1, step=(epoch + 1) * schedule.steps_per_epoch, **scores)
        improved = best is None or selection(scores) > selection(best)
        if improved:
            best = {"epoch": epoch + 1, **scores}
            model.save(run.folder, encoder_folder)
        print(f"epoch {epoch + 1}/{args.epochs}  {describe(scores)}{'  best so far, saved' if improved else ''}", flush=True)
        plot_curves(run.folder)
    return best


def selection(scores):
    """What the best epoch is chosen by: the mean of the dev scores, which is overall_2023 for the three tasks."""
    return sum(scores["dev"].values()) / len(scores["dev"])


def describe(scores):
    tasks = [f"{task} {dev:.3f} (train {scores['train'][task]:.3f})" for task, dev in scores["dev"].items()]
    return "  ".join(["dev"] + tasks + [f"{name} {value:.3f}" for name, value in scores.items() if name.startswith("overall")])


# ---------------------------------------------------------------- flags and files

class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line instead of the usage
        raise InputError(message)


def per_task(convert):
    """A flag's type: one value for all tasks, or NAME=value,NAME=value."""
    def parse(text):
        if "=" not in text:
            return convert(text)
        return {name.strip(): convert(value) for name, value in (part.split("=", 1) for part in text.split(","))}
    parse.__name__ = convert.__name__  # argparse names it in its message
    return parse


def positive_int(text):
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def non_negative_float(text):
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError
    return value


def probability(text):
    value = float(text)
    if not 0 <= value < 1:
        raise ValueError
    return value


def get_parser():
    parser = Parser(description="Train one BERT on several tasks at once.", allow_abbrev=False,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    group = parser.add_argument_group("model")
    group.add_argument("--option", choices=("pretrain", "finetune"), default="pretrain",
                       help="pretrain: the encoder is frozen, only the heads learn; finetune: everything learns")
    group.add_argument("--model", default=DEFAULT_ENCODER, help="BERT folder, or name on the Hugging Face hub")
    group.add_argument("--pooling", choices=("cls", "mean"), default="mean",
                       help="what a sequence becomes: BERT's pooled [CLS], or the mean of its tokens' last states")
    group.add_argument("--pair_head", type=per_task(str), default="cross", metavar="|".join(PAIR_HEADS),
                       help="for both pair tasks or each, para=uv_diff,sts=cosine; cross reads a pair as one sequence")
    group.add_argument("--hidden_dropout_prob", type=probability, default=0.3,
                       help="dropout of the heads; the encoder's is in its config.json")
    group = parser.add_argument_group("training")
    group.add_argument("--tasks", default="sst,para,sts", help=f"those to train, of {','.join(TASKS)}, in this order")
    group.add_argument("--schedule", choices=SCHEDULES, default="round_robin",
                       help="sequential: task after task; round_robin: a batch of each task a step; mixed: the same "
                            "with batch sizes in proportion to the sets")
    group.add_argument("--epochs", type=positive_int, default=10, help="number of epochs")
    group.add_argument("--epoch_length", default="longest", metavar="longest|shortest|STEPS",
                       help="the set that ends an epoch, or a number of steps")
    group.add_argument("--batch_size", type=per_task(positive_int), default=None,
                       help="rows a step, for all tasks or each: sst=2,para=24,sts=2 (default: sst=16,para=32,sts=12, "
                            "cfimdb=8; 20 with --schedule mixed)")
    group.add_argument("--accumulate", type=positive_int, default=1,
                       help="steps of the schedule that add up to one optimizer step")
    group.add_argument("--lr", type=non_negative_float, default=None,
                       help="peak learning rate (default: 1e-4 for finetune, 1e-3 for pretrain)")
    group.add_argument("--lr_schedule", choices=("linear", "constant"), default="linear",
                       help="after the warm-up: down to 0, or constant")
    group.add_argument("--warmup", type=probability, default=0.1, help="share of the steps in which the rate rises from 0")
    group.add_argument("--weight_decay", type=non_negative_float, default=0.0, help="of weights; biases and norms have none")
    group.add_argument("--clip", type=non_negative_float, default=1.0, help="largest global gradient norm; 0: no clipping")
    group.add_argument("--pcgrad", action="store_true", help="project conflicting task gradients (Yu et al. 2020)")
    group.add_argument("--seed", type=int, default=11711, help="of everything random")
    group = parser.add_argument_group("machine and run")
    group.add_argument("--use_gpu", action="store_true", help="train on CUDA, or on MPS of an Apple machine")
    group.add_argument("--amp", action="store_true", help="the encoder in bfloat16 (CUDA, or a CPU with avx512_bf16)")
    group.add_argument("--name", default=None,
                       help="the run's folder in runs/, or a path (default: what the run is, and the time)")
    group = parser.add_argument_group("data")
    group.add_argument("--data_dir", type=Path, default=None, help="folder with the course's files (default: data/ once "
                       "`python data/download.py` has filled it, the demo sets in data/demo/ until then)")
    group.add_argument("--skip_malformed", action="store_true", help="go on where more than 1 %% of a file is malformed")
    for task in TASKS.values():  # the course's path flags
        for split in ("train", "dev", "test"):
            group.add_argument(f"--{task.name}_{split}", type=Path, help=argparse.SUPPRESS)
        for split in ("dev", "test"):
            group.add_argument(f"--{task.name}_{split}_out", type=Path, help=argparse.SUPPRESS)
    parser.epilog = ("One file each: --TASK_train, --TASK_dev, --TASK_test FILE in place of the one in the data folder; "
                     "--TASK_dev_out, --TASK_test_out FILE for the predictions (default: predictions/ in the run's folder).")
    return parser


def for_each(value, tasks, flag):
    """A flag's value as {task: value}. Raises InputError for a task it does not apply to, or one left without a value."""
    if not isinstance(value, dict):
        return dict.fromkeys(tasks, value)
    for name in [*value, *tasks]:
        if name not in tasks:
            raise InputError(f"argument {flag}: {name!r} is none of the tasks it applies to here ({', '.join(tasks)})")
        if name not in value:
            raise InputError(f"argument {flag}: no value for {name}")
    return {name: value[name] for name in tasks}


def resolve(argv):
    """The flags, checked against each other, with every default filled in. Raises InputError."""
    parser = get_parser()
    args = parser.parse_args(argv)
    args.tasks = [name.strip() for name in args.tasks.split(",")]
    for name in args.tasks:
        if name not in TASKS:
            raise InputError(f"argument --tasks: unknown task {name!r}; the tasks are {', '.join(TASKS)}")
    if len(set(args.tasks)) < len(args.tasks):
        raise InputError("argument --tasks: a task is named twice")

    pair_tasks = [name for name in args.tasks if TASKS[name].is_pair]
    if not pair_tasks and args.pair_head != parser.get_default("pair_head"):
        raise InputError(f"argument --pair_head: no pair task among {', '.join(args.tasks)}")
    args.pair_head = for_each(args.pair_head, pair_tasks, "--pair_head")
    for head in args.pair_head.values():
        if head not in PAIR_HEADS:
            raise InputError(f"argument --pair_head: unknown head {head!r}; the heads are {', '.join(PAIR_HEADS)}")

    if args.batch_size is None:
        args.batch_size = 20 if args.schedule == "mixed" else {name: DEFAULT_BATCH_SIZE[name] for name in args.tasks}
    elif isinstance(args.batch_size, dict) or args.schedule != "mixed":
        args.batch_size = for_each(args.batch_size, args.tasks, "--batch_size")
    if args.epoch_length not in ("longest", "shortest"):
        if not args.epoch_length.isdigit() or int(args.epoch_length) < 1:
            raise InputError(f"argument --epoch_length: {args.epoch_length!r} is not longest, shortest or a number of steps")
        args.epoch_length = int(args.epoch_length)
    if args.lr is None:
        args.lr = 1e-4 if args.option == "finetune" else 1e-3

    if args.pcgrad and args.option == "pretrain":
        raise InputError("--pcgrad with --option pretrain: a frozen encoder has no shared gradients to project; "
                         "use --option finetune")
    if args.pcgrad and len(args.tasks) < 2:
        raise InputError("--pcgrad with one task: there is no second gradient to be in conflict with")
    if args.pcgrad and args.schedule == "sequential":
        raise InputError("--pcgrad with --schedule sequential: a step holds one task, so no two gradients meet; "
                         "use round_robin or mixed")

    if args.option == "pretrain" and args.pair_head.get("sts") == "cosine":
        raise InputError("--pair_head cosine for sts with --option pretrain: 5 cos(u, v) has no parameters and the encoder "
                         "is frozen, so there is nothing to train; leave sts out of --tasks or use another head")

    args.device = "cpu"
    if args.use_gpu:
        args.device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else None
    if args.device is None:
        raise InputError("--use_gpu: torch sees neither a CUDA device nor an Apple GPU; leave the flag out to use the CPU")
    # a private name, but the only test that torch 2.11 has too
    bfloat16 = {"cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False),
                "cpu": torch.cpu._is_avx512_bf16_supported, "mps": lambda: False}
    if args.amp and not bfloat16[args.device]():
        raise InputError(f"--amp: this {args.device} device has no bfloat16 arithmetic (a CPU needs avx512_bf16)")
    if args.name is None:
        surgery = "-pcgrad" if args.pcgrad else ""
        args.name = f"{args.option}-{args.schedule}{surgery}-{time.strftime('%Y%m%d-%H%M%S')}"
    return args


def locate(args):
    """{task: {split: path}}; test only where there is one. Raises InputError for a missing file."""
    given = {(task, split): getattr(args, f"{task}_{split}") for task in args.tasks for split in ("train", "dev", "test")}
    folder = args.data_dir
    needed = [HERE / "data" / TASKS[task].filename(split)
              for (task, split), path in given.items() if path is None and split != "test"]
    if folder is None:
        folder = HERE / "data"
        if not all(path.exists() for path in needed):
            folder = HERE / "data" / "demo"
            print("*** The real sets are not in data/: this run uses the small demo sets in data/demo/, and its scores are\n"
                  "*** no results. For the real ones: python data/download.py", flush=True)
    paths = {task: {} for task in args.tasks}
    for (task, split), path in given.items():
        default = folder / TASKS[task].filename(split)
        if path is None and not default.exists():
            if split != "test":
                raise InputError(f"{default}: no such file; give --data_dir, or --{task}_{split} FILE")
            print(f"{default}: no such file, so no predictions for {task} test")
        else:
            paths[task][split] = path or default
    return paths


def load_data(args, paths, encoder_folder, config):
    """{task: {split: tokenised Examples}}. Raises InputError."""
    tokenizer = load_tokenizer(encoder_folder)
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise InputError(f"{encoder_folder}: vocab.txt has {tokenizer.get_vocab_size()} word pieces, "
                         f"the encoder {config.vocab_size} embeddings")
    data = {}
    for task, splits in paths.items():
        cross = args.pair_head.get(task) == "cross"
        data[task] = {split: tokenize(read_examples(path, TASKS[task], split != "test", args.skip_malformed),
                                      tokenizer, config.max_position_embeddings, cross) for split, path in splits.items()}
        print(f"{task}: " + ", ".join(f"{len(examples)} {split}" for split, examples in data[task].items()) + " rows")
    return data


def main(argv=None):
    try:
        args = resolve(argv)
        folder = HERE / "runs" / args.name
        if folder.exists():
            raise InputError(f"{folder}: there is a run of this name; choose another --name")
        paths = locate(args)
        encoder_folder = fetch_encoder(args.model)
        torch.manual_seed(args.seed)  # for the new heads
        bert = BertModel.from_pretrained(encoder_folder)
        data = load_data(args, paths, encoder_folder, bert.config)
        model = MultitaskBERT(bert, args.tasks, args.pair_head, args.pooling, args.hidden_dropout_prob, args.option,
                              args.amp).to(args.device)
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        best = train(args, model, data, Run(folder, settings), encoder_folder)

        model = MultitaskBERT.load(folder).to(args.device)
        for task, splits in data.items():
            for split in ("dev", "test"):
                if split in splits:
                    path = getattr(args, f"{task}_{split}_out") or folder / "predictions" / f"{task}-{split}-output.csv"
                    write_predictions(path, task, splits[split], predict(model, task, splits[split]))
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 2
    print(f"best epoch {best['epoch']}: {describe(best)}\n{folder}: encoder, heads, metrics.jsonl, curves.png, predictions/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
