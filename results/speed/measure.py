"""Measure the speed of training on this machine, in less than eight minutes.

    python results/speed/measure.py --data_dir DIR [--use_gpu]
    python results/speed/tables.py             the tables of results/speed/README.md

First the ways to compute attention are checked against each other, and where they disagree nothing
is measured. Then, for the default encoder and on a GPU for the shape of bert-base too:

    steps        tokens per second of a training step, and its share of the rate of a large product,
                 at several batch sizes and in each precision; with one pass per task as in
                 training, with one pass for all tasks, and around transformers.BertModel
    ratios       PCGrad, Gradient Vaccine and SMART over a plain step
    peak_memory  of plain, PCGrad and SMART steps, on CUDA
    epoch        what report 1's system 1b takes at this speed, beside the report's ten hours

The two sentences of a pair are encoded separately, as in 1b. All figures go into DEVICE.json beside
this file, with the device's name for DEVICE. The variants take turns, and the medians of the rounds
count, as in results/benchmark.py, whose steps these are.
"""
import gc
import importlib.util
import json
import math
import re
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn import functional as F

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from attention import (Packing, attention, flash_attention, grouped_attention,  # noqa: E402
                       has_flash, padded_attention)
from bert import BertConfig, BertModel  # noqa: E402
from multitask_classifier import MultitaskBERT  # noqa: E402
from pcgrad import GradientBuffer  # noqa: E402
from results.benchmark import (WARM_UP, heads_of, load, machine, make_optimizer,  # noqa: E402
                               make_step, mean_tokens, median_times, own_rows, own_steps,
                               precisions, products, random_steps, share_of_product, smart_steps,
                               surgery_steps, training_flags, transformers_steps, turns)
from smart import Proximal, Smoothness  # noqa: E402
from support import flags  # noqa: E402
from support.devices import sparse_embedding  # noqa: E402
from support.files import InputError, write_atomically  # noqa: E402
from support.run import RunFailed, exit_status  # noqa: E402

SIZES = {"cpu": [8, 32]}  # examples per step of each task
SIZES_ON_GPU = [8, 32, 128]
BASE = "bert-base's shape"
# of system 1b: its batch size, and the examples of its longest set (report 1, sections 5.1 and 5.3)
REPORT = {"system": "1b", "batch_size": 8, "longest": 141506, "epochs": 10, "hours": 10}
# limit on norm(ours - expected) / norm(expected) of an output or a gradient: rounding is well
# below, and a key that is lost or seen by mistake well above
TOLERANCE = {"float32": 1e-4, "float16": 0.01, "bfloat16": 0.03}


# ---------------------------------------------------------------- attention, checked

def attention_paths(query):
    """Those of the three that can compute on queries like these."""
    paths = [grouped_attention, padded_attention]
    return paths + [flash_attention] if has_flash(query) else paths


def check_attention(device):
    """{"grouped_attention, float32, D = 32": its largest relative error}, against the written-out,
    padded, masked form in float32. Raises RunFailed where one is too large."""
    lengths, errors = torch.tensor([50, 2, 9, 31, 128, 9]), {}
    mask = torch.arange(128) < lengths[:, None]  # (B, L)
    torch.manual_seed(0)
    for D in (32, 64, 17):  # the heads of the default encoder, of bert-base, and of PAL
        qkv = torch.randn(3, len(mask), 12, 128, D)  # (3, B, A, L, D)
        for precision in precisions(device):
            inputs = qkv.to(device, getattr(torch, precision))
            for attend in attention_paths(inputs):
                name = f"{attend.__name__}, {precision}, D = {D}"
                errors[name] = attention_error(attend, inputs, mask)
                if not errors[name] < TOLERANCE[precision]:  # also nan
                    raise RunFailed(f"{name}: differs from padded, masked attention by "
                                    f"{errors[name]:.1e} of its norm; nothing was measured")
    return errors


def attention_error(attend, qkv, mask):
    """The largest relative error of the output and of the gradients. qkv: (3, B, A, L, D)"""
    real = mask.to(qkv.device)[:, :, None]  # (B, L, 1)
    weights = torch.randn(qkv.shape[1:]).transpose(1, 2).flatten(2).to(qkv.device)  # (B, L, A * D)

    # packed queries have no padding, so its output is left out here too
    inputs = qkv.float().requires_grad_()
    output = attention(*inputs, real.squeeze(-1)).transpose(1, 2).flatten(2) * real
    expected = output, *torch.autograd.grad((output * weights).sum(), inputs)[0]

    inputs = qkv.clone().requires_grad_()
    packing = Packing(mask, qkv.device)
    packed = [packing.pack(x.transpose(1, 2)) for x in inputs]  # (T, A, D) each
    output = packing.unpack(attend(*packed, packing).flatten(1)).float()
    ours = output, *torch.autograd.grad((output * weights).sum(), inputs)[0].float()
    return max(float((a - b).detach().norm() / b.detach().norm())
               for a, b in zip(ours, expected, strict=True))


# ---------------------------------------------------------------- one pass for all tasks

def one_pass(model, gradients, batches, loss_of):
    """The passes of a step in which the sequences of all tasks are encoded together: the heads
    apart, and one backward pass. Not for surgery, which needs each task's gradient."""
    width = max(batch.input_ids.size(1) for _, _, batch in batches)

    def joined(name):
        parts = [getattr(batch, name) for _, _, batch in batches]
        return torch.cat([F.pad(part, (0, width - part.size(1))) for part in parts])

    pooled = model(joined("input_ids"), joined("attention_mask"), joined("token_type_ids"))
    parts = pooled.split([len(batch.input_ids) for _, _, batch in batches])
    losses = [loss_of(task, replace(batch, pooled=part))
              for (_, task, batch), part in zip(batches, parts, strict=True)]
    row, _, _ = batches[0]  # any: without surgery J has one row
    gradients.backward(row, sum(losses))


# ---------------------------------------------------------------- what is measured

def measure_steps(setup):
    """A line for each kind of step at one batch size: {"examples", "step", "milliseconds", ...};
    "milliseconds" is None where the device's memory is too small."""
    args, model = setup.args, setup.model
    steps = own_steps(args, model, {"one pass": one_pass})
    if importlib.util.find_spec("transformers"):
        steps.update(transformers_steps(args, model))
    batches, failed = random_steps(setup, own_rows(args)), set()
    variants = turns(those_that_fit(steps, failed), batches) | products(args.device)
    median = median_times(variants, setup.rounds, args.device)

    lines, (tokens, _) = [], mean_tokens(batches)
    for name in steps:
        line = {"examples": next(iter(args.batch_size.values())), "step": name,
                "milliseconds": None}
        if name not in failed:
            line |= {"milliseconds": rounded(1000 * median[name]),
                     "tokens_per_second": round(tokens / median[name]),
                     "share": rounded(share_of_product(model, tokens, median, name))}
        lines.append(line)
        print("  " + "  ".join(f"{key} {value}" for key, value in line.items()), flush=True)
    return lines


def those_that_fit(steps, failed):
    """The same steps; one that runs out of the device's memory joins `failed`, and does nothing
    from then on."""
    def guarded(name, step):
        def step_or_nothing(batches, seed):
            if name not in failed:
                try:
                    step(batches, seed)
                except torch.OutOfMemoryError:
                    failed.add(name)
        return step_or_nothing

    return {name: guarded(name, step) for name, step in steps.items()}


def measure_ratios(setup):
    """{name: its time over that of a plain step}, in float32: SMART's default radius is lost in
    half precision."""
    args, model = setup.args, setup.model
    optimizer = make_optimizer(args, model)
    steps = smart_steps(args, model, optimizer)
    del steps["smoothness, weights' gradients too"]
    surgeries = surgery_steps(args, model, optimizer, heads_of(args, model))
    del surgeries["plain sum"]  # the plain step of smart_steps

    batches = random_steps(setup, own_rows(args))
    median = median_times(turns({**steps, **surgeries}, batches), setup.rounds, args.device)
    ratios = {name: rounded(median[name] / median["plain"])
              for name in (*surgeries, *steps) if name != "plain"}
    print(f"  over a plain step: {ratios}", flush=True)
    return ratios


def measure_memory(setup):
    """{name: bytes}, the most that a training step in float32 holds on CUDA, model included."""
    batches = random_steps(setup, own_rows(setup.args))
    peaks = {"plain": peak_of(setup, batches)}
    peaks["PCGrad"] = peak_of(setup, batches, "pcgrad")
    peaks["smoothness and proximal"] = peak_of(setup, batches, smart=True)
    print(f"  peak memory: {peaks}", flush=True)
    return peaks


def peak_of(setup, batches, surgery=None, smart=False):
    args, model, regularizers = setup.args, setup.model, {}
    if smart:
        kinds = {task: model.tasks[task].kind for task in args.trained}
        regularizers = {"smart": Smoothness(kinds), "proximal": Proximal(model, kinds)}
    gradients = GradientBuffer(model.shared_parameters(), heads_of(args, model), surgery)
    step = make_step(args, model, gradients, make_optimizer(args, model), regularizers)
    torch.cuda.reset_peak_memory_stats()
    for i, batch in enumerate(batches):
        step(batch, i)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    model.zero_grad(set_to_none=True)  # they are views of J
    return peak


def epoch_of_report(encoder, lines):
    """What REPORT's system takes at the speed of its batch size, by precision; None where that was
    not measured. Without evaluations, reading and padding."""
    steps = math.ceil(REPORT["longest"] / REPORT["batch_size"])
    hours = {line["step"].split(", ")[1]:
             rounded(REPORT["epochs"] * steps * line["milliseconds"] / 3.6e6)
             for line in lines if line["examples"] == REPORT["batch_size"]
             and line["step"].startswith("packed") and line["milliseconds"]}
    return {**REPORT, "encoder": encoder, "steps": steps, "our_hours": hours} if hours else None


# ---------------------------------------------------------------- both encoders

def measure_encoder(setup, sizes):
    """{"steps", "ratios", "peak_memory"} of one encoder. The last two at the first size."""
    first = with_size(setup, sizes[0])
    figures = {"steps": [], "ratios": then_free(measure_ratios, first), "peak_memory": None}
    if setup.args.device == "cuda":
        figures["peak_memory"] = then_free(measure_memory, first)
    for size in sizes:
        figures["steps"] += then_free(measure_steps, with_size(setup, size))
    return figures


def with_size(setup, size):
    """The Setup with so many examples per task."""
    for task, examples in setup.train.items():
        if len(examples) < size:
            raise InputError(f"{task}: {len(examples)} examples, fewer than the {size} of a step; "
                             "give other --sizes, or a --data_dir with larger sets")
    batch_size = dict.fromkeys(setup.args.trained, size)
    return replace(setup, args=Namespace(**{**vars(setup.args), "batch_size": batch_size}))


def then_free(measure, setup):
    """The result of a measurement, in float32 unless it changes that. What it leaves on the device
    is freed."""
    setup.model.amp = False
    result = measure(setup)
    setup.model.zero_grad(set_to_none=True)  # they are views of J
    gc.collect()
    if setup.args.device == "cuda":
        torch.cuda.empty_cache()
    return result


def has_base_shape(device):
    """bert-base is measured on a GPU alone; on a CPU it would take too long."""
    return device != "cpu"


def base_shape_model(args, tasks, vocab_size):
    """As in the reports, but with random weights, and with the vocabulary of the encoder that was
    measured first: bert-base, pooled by [CLS]."""
    config = replace(BertConfig(), vocab_size=vocab_size)
    model = MultitaskBERT(BertModel(config), tasks, args.pair_head, "cls",
                          args.hidden_dropout_prob)
    sparse_embedding(model, args.device)
    return model.to(args.device).train()


def rounded(number):
    return float(f"{number:.4g}")


# ---------------------------------------------------------------- main

def parse(argv):
    """(this script's flags, multitask_classifier.py's). Raises InputError."""
    parser = flags.Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data_dir", help="folder with the course's files (default: as multitask_classifier.py)")
    add("--use_gpu", action="store_true", help="measure CUDA, or MPS of an Apple machine")
    add("--model", help="BERT folder, or name on the Hugging Face hub, in place of the default")
    add("--rounds", type=flags.number(int, 1), default=10,
        help=f"rounds that count; {WARM_UP} more warm up")
    add("--sizes", type=flags.number(int, 1), nargs="+",
        help="examples per step of each task (default: 8 32, on a GPU 128 too)")
    add("--out", type=Path, default=HERE, help="folder of DEVICE.json")
    own = parser.parse_args(argv)

    argv = ["--pair_head", "uv_diff"]
    for name in ("data_dir", "model"):
        if getattr(own, name) is not None:
            argv += [f"--{name}", getattr(own, name)]
    args = training_flags(argv + ["--use_gpu"] * own.use_gpu)
    own.sizes = own.sizes or SIZES.get(args.device, SIZES_ON_GPU)
    return own, args


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    own, args = parse(argv)
    # the record does not publish the user's paths
    words = ["DIR" if before in ("--data_dir", "--out") else word
             for before, word in zip(["", *argv], argv)]
    with_transformers = importlib.util.find_spec("transformers") is not None
    record = {"device": machine(args.device), "kind": args.device,
              "command": " ".join(["python results/speed/measure.py", *words]),
              "torch": torch.__version__, "threads": torch.get_num_threads(),
              "rounds": own.rounds, "precisions": precisions(args.device),
              "transformers": with_transformers, "attention": check_attention(args.device)}
    print("\n".join(f"{key}: {value}" for key, value in record.items() if key != "attention"))
    print(f"attention: the paths agree, to {max(record['attention'].values()):.1e} at worst")
    if not with_transformers:
        print("left out: transformers, which is not installed")

    # one after the other, so that the memory of the first is free again
    setup = load(args, own.rounds)
    tasks, name = setup.model.tasks, Path(args.model).name
    vocab_size = setup.model.bert.config.vocab_size
    print(name)
    record["encoders"] = {name: measure_encoder(setup, own.sizes)}
    if has_base_shape(args.device):
        setup.model = None
        setup.model, name = base_shape_model(args, tasks, vocab_size), BASE
        print(name)
        record["encoders"][name] = measure_encoder(setup, own.sizes)
    # of the encoder that was measured last
    record["epoch"] = epoch_of_report(name, record["encoders"][name]["steps"])
    print(f"system 1b: {record['epoch']}")

    stem = re.sub(r"[^A-Za-z0-9]+", "-", record["device"]).strip("-") or args.device
    own.out.mkdir(parents=True, exist_ok=True)
    path = own.out / f"{stem}.json"
    text = json.dumps(record, indent=1) + "\n"
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))
    print(f"{path}: written; python results/speed/tables.py puts it on the page")


if __name__ == "__main__":
    sys.exit(exit_status(main))
