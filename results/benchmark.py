"""What a training step costs, in five tables. README.md has figures of them.

    python results/benchmark.py --data_dir DIR               all tables
    python results/benchmark.py --only step --tasks sts --batch_size 32

    step       a training step: packed, padded, in half precision, around transformers.BertModel
    surgery    PCGrad and Gradient Vaccine over the plain sum
    smart      SMART's two terms over a plain step
    adamw      optimizer.py beside the three of torch.optim.AdamW
    cost       surgery on K copies of a task, for K = 2, 4, 8

All other flags are those of multitask_classifier.py, but --option is finetune and pairs are encoded
as one sequence unless --pair_head says otherwise. --amp changes surgery, smart and cost; step has
both precisions anyway, where the machine has a half precision that is fast.

A machine's speed drifts, so the variants of a table take turns: each round runs every variant once
on the same batches. A table has the medians of the rounds. The rows that need the package
`transformers` are left out where it is not installed. results/speed/measure.py has a part of these
for several sizes, and for a GPU.
"""
import copy
import dataclasses
import importlib.util
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from attention import to_device  # noqa: E402
from data.batches import collate  # noqa: E402
from data.download import fetch_encoder  # noqa: E402
from data.tasks import TASKS, find_data_files, task_names  # noqa: E402
from multitask_classifier import build, get_parser, regularized_loss, task_loss  # noqa: E402
from optimizer import AdamW, ScheduledAdamW  # noqa: E402
from pcgrad import GradientBuffer  # noqa: E402
from results.study import processor  # noqa: E402
from smart import Proximal, Smoothness  # noqa: E402
from support import flags  # noqa: E402
from support.devices import autocast, half_precision, make_scaler  # noqa: E402
from support.fast_cpu import Linear  # noqa: E402
from support.files import InputError  # noqa: E402
from support.run import StepLog, exit_status  # noqa: E402

WARM_UP = 2  # rounds before the first that counts
COPIES = (2, 4, 8)  # K of the table `cost`
SURGERIES = {"plain sum": None, "PCGrad": "pcgrad", "Gradient Vaccine": "gradvac"}


@dataclass
class Setup:
    """What the tables share."""
    args: object  # the flags, of multitask_classifier.py
    rounds: int
    model: nn.Module
    train: dict  # {task: its training Examples}


# ---------------------------------------------------------------- timing

def median_times(variants, rounds, device):
    """{name: median seconds} of functions of the round's number, interleaved."""
    synchronize = torch.get_device_module(device).synchronize
    times = {name: [] for name in variants}
    for i in range(WARM_UP + rounds):
        for name, function in variants.items():
            start = time.perf_counter()
            function(i)
            synchronize()  # a GPU may still be computing
            times[name].append(time.perf_counter() - start)
    return {name: float(np.median(values[WARM_UP:])) for name, values in times.items()}


def turns(steps, batches):
    """{name: function of the round's number} of training steps. batches: of each round's step."""
    return {name: lambda i, step=step: step(batches[i], i) for name, step in steps.items()}


def random_steps(setup, rows):
    """The batches of a step for each round: lists of (row, task, batch) with random examples.

    rows: {row: task}; a row is what the GradientBuffer knows the task as. All batches are full, as
    those at the end of a set would not be.
    """
    generator = np.random.default_rng(setup.args.seed)

    def random_batch(task):
        examples = setup.train[task]
        order = generator.permutation(len(examples))
        return collate(examples, order[:setup.args.batch_size[task]])

    return [[(row, task, random_batch(task)) for row, task in rows.items()]
            for _ in range(WARM_UP + setup.rounds)]


def own_rows(args):
    """The tasks under their own names, as `rows` of random_steps."""
    return {task: task for task in args.trained}


def precisions(device):
    """The names of float32 and of the device's half precision, where it has one that is fast."""
    half = half_precision(device)
    return ["float32"] + ([] if half is None else [str(half).removeprefix("torch.")])


def print_rows(median, baseline):
    """A line per variant: milliseconds, and how many times the baseline they are."""
    print(f"  {'':36} {'median':>12}  over {baseline}")
    for name, seconds in median.items():
        ratio = seconds / median[baseline]
        print(f"  {name:36} {1000 * seconds:9.1f} ms  {ratio:{len(baseline) + 5}.2f}")


# ---------------------------------------------------------------- a training step

def pass_per_task(model, gradients, batches, loss_of):
    """The passes of a step: forward and backward for each task in turn. loss_of(task, batch)"""
    for row, task, batch in batches:
        gradients.backward(row, loss_of(task, batch))


def make_step(args, model, gradients, optimizer, regularizers=None, passes=pass_per_task):
    """A function of a step's batches and a seed that makes one step of
    multitask_classifier.train."""
    regularizers = regularizers or {}
    # collects, as in training; is never written
    log = StepLog(None, args.trained, regularizers, model.device)

    def step(batches, seed):
        gradients.begin([row for row, _, _ in batches])
        passes(model, gradients, batches, lambda task, batch: regularized_loss(
            model, task, batch, regularizers, log, seed))
        gradients.combine(seed)
        if not optimizer.step():  # an overflow in float16
            gradients.undo()
        elif "proximal" in regularizers:
            regularizers["proximal"].update(model, progress=1.0)
        log.end_step(gradients.diagnostics())
        log.clear()

    return step


def make_optimizer(args, model):
    """Of a small constant rate, at which no weight goes far."""
    parameters = model.shared_parameters()
    for task in args.trained:
        parameters += model.own_parameters(task)
    return ScheduledAdamW(parameters, updates=1, lr=1e-5, warmup=0.0, lr_schedule="constant",
                          weight_decay=args.weight_decay, clip=args.clip)


def heads_of(args, model):
    return {task: model.own_parameters(task) for task in args.trained}


# ---------------------------------------------------------------- table: step

def step_table(setup):
    """This project's training step, and one around transformers.BertModel.

    "of product" is the share of the rate of a large matrix product in the same precision.
    """
    args, missing = setup.args, []
    if len(precisions(args.device)) == 1:
        missing.append("half precision: no fast one on this device")
    steps = own_steps(args, setup.model)
    steps["with its padding, float32"] = with_padding(steps["packed, float32"])
    if importlib.util.find_spec("transformers"):
        steps.update(transformers_steps(args, setup.model))
    else:
        missing.append("transformers: not installed")

    batches = random_steps(setup, own_rows(args))
    variants = turns(steps, batches) | products(args.device)
    median = median_times(variants, setup.rounds, args.device)

    tokens, padded = mean_tokens(batches)
    print(f"\nstep: a training step of {examples_per_step(args)} examples, {tokens:.0f} tokens, "
          f"{tokens / padded:.0%} of the padded batches")
    print(f"  {'':36} {'median':>12}  over packed float32  of product")
    for name in steps:
        print(f"  {name:36} {1000 * median[name]:9.1f} ms  "
              f"{median[name] / median['packed, float32']:19.2f}  "
              f"{share_of_product(setup.model, tokens, median, name):10.0%}")
    for reason in missing:
        print(f"  left out: {reason}")


def own_steps(args, model, passes=None):
    """{"packed, float32": a training step} of this project in each of the device's precisions, on
    one model. passes: further ways to make a step's passes, {name: like pass_per_task}."""
    gradients = GradientBuffer(model.shared_parameters(), heads_of(args, model))
    optimizer = make_optimizer(args, model)

    def step_in(precision, passes):
        step = make_step(args, model, gradients, optimizer, passes=passes)
        scaler = make_scaler(model.device, precision != "float32")

        def step_in_precision(batches, seed):
            model.amp = precision != "float32"
            gradients.scaler = optimizer.scaler = scaler
            step(batches, seed)

        return step_in_precision

    return {f"{name}, {precision}": step_in(precision, how)
            for name, how in {"packed": pass_per_task, **(passes or {})}.items()
            for precision in precisions(args.device)}


def with_padding(step):
    """The step on batches whose padding is computed as if it were text, by a mask of ones."""
    def padded_step(batches, seed):
        step([(row, task, replace(batch, attention_mask=torch.ones_like(batch.input_ids)))
              for row, task, batch in batches], seed)
    return padded_step


def transformers_steps(args, model):
    """{"transformers, float32": a training step} the usual way in each precision: padded batches,
    torch's optimizer, gradients in .grad. Of the model's shape, with random weights, and with no
    more to do: no dropout on the attention probabilities, no weight decay."""
    import transformers

    config = transformers.BertConfig(**dataclasses.asdict(model.bert.config),
                                     attention_probs_dropout_prob=0.0)
    encoder = transformers.BertModel(config).to(model.device).train()
    heads = copy.deepcopy(model.heads).train()
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0)
    return {f"transformers, {precision}": transformers_step(
        model, encoder, heads, optimizer, precision != "float32")
        for precision in precisions(args.device)}


def transformers_step(model, encoder, heads, optimizer, amp):
    """model: has the tasks, and how they are pooled."""
    device, scaler = model.device, make_scaler(model.device, amp)
    parameters = [*encoder.parameters(), *heads.parameters()]

    def pooled(batch):
        ids, mask, types = (to_device(x, device) for x in (
            batch.input_ids, batch.attention_mask, batch.token_type_ids))
        with autocast(device, amp):
            output = encoder(ids, mask, types)
            if model.pooling == "cls":
                return output.pooler_output.float()
            states = output.last_hidden_state * mask.unsqueeze(-1)
        return states.float().sum(dim=1) / mask.sum(dim=1, keepdim=True)

    def step(batches, seed):
        torch.manual_seed(seed)
        optimizer.zero_grad()
        for _, task, batch in batches:
            logits, labels = heads[task](pooled(batch)), to_device(batch.labels, device)
            loss = task_loss(model.tasks[task], logits, labels, model.ordinal_alpha.get(task))
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        scaler.step(optimizer)
        scaler.update()

    return step


def product_size(device):
    """Rows and columns of the matrices whose product is the yardstick: enough to keep a GPU
    busy."""
    return 2048 if device == "cpu" else 8192


def products(device):
    """{"product, float32": a function of the round's number} in each precision: a product of two
    square matrices, by what the encoder's linear layers call."""
    def product(dtype):
        size = product_size(device)
        x = torch.randn(size, size, device=device, dtype=dtype)
        linear = Linear(size, size, bias=False, device=device, dtype=dtype)
        linear.requires_grad_(False)
        return lambda i: linear(x)

    return {f"product, {precision}": product(getattr(torch, precision))
            for precision in precisions(device)}


def mean_tokens(batches):
    """(real tokens, tokens with padding) per step."""
    masks = [batch.attention_mask for step in batches for _, _, batch in step]
    return (sum(int(mask.sum()) for mask in masks) / len(batches),
            sum(mask.numel() for mask in masks) / len(batches))


def share_of_product(model, tokens, median, name):
    """A step's rate over that of the product in the same precision. A step counts as 6 operations
    per parameter of the layers and real token: 2 forward, 4 backward."""
    weights = sum(p.numel() for p in model.bert.bert_layers.parameters())
    precision = name.split(", ")[1]
    rate = 2 * product_size(model.device.type) ** 3 / median[f"product, {precision}"]
    return 6 * weights * tokens / median[name] / rate


# ---------------------------------------------------------------- table: surgery

def surgery_table(setup):
    """Surgery on the tasks of --tasks, over the plain sum of their gradients."""
    args, model = setup.args, setup.model
    if len(args.trained) < 2:
        print(f"\nsurgery: left out, since {args.trained[0]} alone has no second gradient")
        return
    steps = surgery_steps(args, model, make_optimizer(args, model), heads_of(args, model))
    batches = random_steps(setup, own_rows(args))
    median = median_times(turns(steps, batches), setup.rounds, args.device)
    print(f"\nsurgery: a training step of {examples_per_step(args)} examples, "
          f"{millions(model.shared_parameters())} shared parameters")
    print_rows(median, "plain sum")


def surgery_steps(args, model, optimizer, heads):
    """{name: a training step} of each of SURGERIES. heads: {row: parameters}."""
    shared = model.shared_parameters()
    plain, separate = GradientBuffer(shared, heads), GradientBuffer(shared, heads, "pcgrad")

    def make(surgery):
        gradients = separate if surgery else plain  # J is large: the two surgeries share one
        step = make_step(args, model, gradients, optimizer)

        def step_with_surgery(batches, seed):
            gradients.surgery = surgery
            step(batches, seed)

        return step_with_surgery

    return {name: make(surgery) for name, surgery in SURGERIES.items()}


# ---------------------------------------------------------------- table: smart

class WithAllGradients(Smoothness):
    """What the ascent would cost if it computed the weights' gradients too, which it does not
    need."""

    def adversarial_perturbation(self, model, task, batch, logits, seed):
        grad, parameters = torch.autograd.grad, list(model.parameters())

        def all_gradients(total, perturbation):
            return grad(total, [perturbation, *parameters], allow_unused=True)[:1]

        with mock.patch("torch.autograd.grad", all_gradients):
            return super().adversarial_perturbation(model, task, batch, logits, seed)


def smart_table(setup):
    """SMART's terms over a plain step."""
    args, model = setup.args, setup.model
    steps = smart_steps(args, model, make_optimizer(args, model))
    batches = random_steps(setup, own_rows(args))
    median = median_times(turns(steps, batches), setup.rounds, args.device)
    print(f"\nsmart: a training step of {examples_per_step(args)} examples")
    print_rows(median, "plain")


def smart_steps(args, model, optimizer):
    """{name: a training step} with SMART's terms, in the paper's settings, of which only the number
    of ascent steps changes the time."""
    kinds = {task: model.tasks[task].kind for task in args.trained}
    smart, proximal = Smoothness(kinds), Proximal(model, kinds)
    variants = {"plain": {},
                "smoothness": {"smart": smart},
                "smoothness, weights' gradients too": {"smart": WithAllGradients(kinds)},
                "proximal": {"proximal": proximal},
                "smoothness and proximal": {"smart": smart, "proximal": proximal}}
    gradients = GradientBuffer(model.shared_parameters(), heads_of(args, model))
    return {name: make_step(args, model, gradients, optimizer, regularizers)
            for name, regularizers in variants.items()}


# ---------------------------------------------------------------- table: adamw

def adamw_table(setup):
    """A step of the optimizer alone, on random tensors of the encoder's shapes. No weight
    decay."""
    device = setup.args.device
    parameters = [nn.Parameter(torch.randn(p.shape, device=device))
                  for p in setup.model.bert.parameters()]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)

    # the same parameters for all; what each optimizer has of its own are the moments
    torch_adamw = torch.optim.AdamW
    optimizers = {"optimizer.py": AdamW(parameters),
                  "torch, fused": torch_adamw(parameters, weight_decay=0.0, fused=True),
                  "torch, foreach": torch_adamw(parameters, weight_decay=0.0, foreach=True),
                  "torch, loop": torch_adamw(parameters, weight_decay=0.0, foreach=False)}
    variants = {name: lambda i, optimizer=optimizer: optimizer.step()
                for name, optimizer in optimizers.items()}
    median = median_times(variants, setup.rounds, device)
    print(f"\nadamw: a step of the optimizer alone on {millions(parameters)} parameters")
    print_rows(median, "torch, fused")


# ---------------------------------------------------------------- table: cost

def cost_table(setup):
    """Time per example, and the size of J, against the number of gradients K: copies of a task."""
    args, model, task = setup.args, setup.model, setup.args.trained[-1]
    optimizer, shared = make_optimizer(args, model), model.shared_parameters()
    rows = {f"copy {k}": task for k in range(max(COPIES))}
    batches = random_steps(setup, rows)

    # a smaller K has the first of the batches; the copies' one head belongs to the first
    variants = {}
    for K in COPIES:
        heads = dict.fromkeys(list(rows)[:K], ()) | {"copy 0": model.own_parameters(task)}
        for name, step in surgery_steps(args, model, optimizer, heads).items():
            variants[K, name] = lambda i, K=K, step=step: step(batches[i][:K], i)
    median = median_times(variants, setup.rounds, args.device)

    print(f"\ncost: K copies of {task} with {args.batch_size[task]} examples each; time per "
          f"example, 1 for the plain sum at K = {COPIES[0]}")
    print(f"  {'K':>3}  {'  '.join(f'{name:>16}' for name in SURGERIES)}  {'J':>8}")
    unit = median[COPIES[0], "plain sum"] / COPIES[0]
    megabytes = 4e-6 * sum(p.numel() for p in shared)
    for K in COPIES:
        times = "  ".join(f"{median[K, name] / K / unit:16.2f}" for name in SURGERIES)
        print(f"  {K:3}  {times}  {K * megabytes:5.0f} MB")
    print(f"  For the plain sum J has one row, {megabytes:.0f} MB, whatever K is.")


TABLES = {"step": step_table, "surgery": surgery_table, "smart": smart_table,
          "adamw": adamw_table, "cost": cost_table}


# ---------------------------------------------------------------- main

def examples_per_step(args):
    return " + ".join(str(args.batch_size[task]) for task in args.trained)


def millions(parameters):
    return f"{sum(p.numel() for p in parameters) / 1e6:.1f}M"


def machine(device):
    """The processor's or the GPU's name."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{processor()}, its GPU" if device == "mps" else processor()


def parse(argv):
    """(this script's flags, multitask_classifier.py's). Raises InputError."""
    parser = flags.Parser(description=__doc__.splitlines()[0],
                          epilog="All other flags are those of multitask_classifier.py.")
    parser.add_argument("--only", nargs="+", choices=TABLES, metavar="TABLE",
                        help=f"of {', '.join(TABLES)} (default: all)")
    parser.add_argument("--rounds", type=flags.number(int, 1), default=15,
                        help=f"rounds that count; {WARM_UP} more warm up")
    own, others = parser.parse_known_args(argv)
    return own, training_flags(others)


def training_flags(argv):
    """Those of multitask_classifier.py, checked. Raises InputError."""
    return flags.parse_flags(get_parser, check_flags, ["--option", "finetune", *argv], "--name")


def check_flags(args):
    """The training script's check, on flags of a step that has a batch of every task."""
    if args.option != "finetune" or args.schedule != "round_robin":
        raise InputError("the benchmark times --option finetune with --schedule round_robin; "
                         "leave these two flags out")
    has_pairs = any(TASKS[name].is_pair for name in task_names(args.tasks))
    if args.pair_head is None and has_pairs:
        args.pair_head = "cross"
    return flags.check_training_flags(args)


def load(args, rounds):
    """The Setup of checked flags: the model, and the training sets."""
    # cuDNN's attention prepares itself for every new shape, and nearly every padded batch has one
    torch.backends.cuda.enable_cudnn_sdp(False)
    paths = find_data_files(args, splits=("train",))
    model, data = build(args, paths, fetch_encoder(args.model))
    train = {task: splits["train"] for task, splits in data.items()}
    return Setup(args, rounds, model.train(), train)


def main(argv=None):
    own, args = parse(sys.argv[1:] if argv is None else list(argv))
    print(f"{machine(args.device)}; torch {torch.__version__}; CPU threads: "
          f"{torch.get_num_threads()}; rounds: {own.rounds}", flush=True)
    setup = load(args, own.rounds)
    for name in own.only or TABLES:
        # on a copy of the model, whose gradients, which are views of J, are freed with it
        TABLES[name](replace(setup, model=copy.deepcopy(setup.model)))
        sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(exit_status(main))
