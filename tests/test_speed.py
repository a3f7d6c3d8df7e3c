"""results/speed: the measurement of speed, its tables, the arithmetic of memory; and that
results/benchmark.py, whose steps it takes, runs."""
import copy
import dataclasses
import json
import tempfile
from argparse import Namespace
from pathlib import Path
from unittest import SkipTest, mock

import torch
from torch.nn import functional as F

from attention import Packing
from bert import BertModel
from data.batches import collate
from data.download import DEFAULT_ENCODER, cache_folder
from data.tasks import TASKS
from multitask_classifier import MultitaskBERT
from pcgrad import GradientBuffer
from results import benchmark
from results.speed import measure, memory, tables
from smart import Proximal, Smoothness
from support import devices
from support.devices import half_precision
from tests.helpers import (KINDS, TINY, heads_of, quietly, raises, three_task_model,
                           workspace)

RECORD = {
    "device": "a processor", "kind": "cpu", "command": "python measure.py", "torch": "2.13.0",
    "threads": 3, "rounds": 7, "precisions": ["float32", "bfloat16"], "transformers": False,
    "attention": {"grouped_attention, float32, D = 32": 2e-7},
    "encoders": {"small": {
        "steps": [{"examples": 8, "step": "packed, float32", "milliseconds": 50.0,
                   "tokens_per_second": 12345, "share": 0.47},
                  {"examples": 8, "step": "one pass, bfloat16", "milliseconds": 40.0,
                   "tokens_per_second": 23456, "share": 0.33},
                  {"examples": 32, "step": "packed, float32", "milliseconds": None}],
        "ratios": {"PCGrad": 1.034, "smoothness": 2.96}, "peak_memory": None}},
    "epoch": {**measure.REPORT, "encoder": "small", "steps": 17689,
              "our_hours": {"float32": 4.5, "bfloat16": 3.0}}}


def tiny_flags(out):
    return ("--data_dir", workspace() / "data", "--model", workspace() / "tiny", "--rounds", 1,
            "--sizes", 2, 8, "--out", out)


def small_products(check):
    """Let the yardstick be a small matrix product: the large one would take half of the time."""
    return mock.patch.object(benchmark, "product_size", lambda device: 64)(check)


def new_folder():
    return Path(tempfile.mkdtemp(dir=workspace()))


def batches_of(examples, first, last):
    """A step's batches: [(row, task, batch)], of different sizes, as the sets could have them."""
    return [(task, task, collate(examples[task], list(range(first, last + i))))
            for i, task in enumerate(KINDS)]


# ---------------------------------------------------------------- the measurement

@small_products
def test_one_command_measures_and_writes_all_figures():
    # bert-base's shape, which is for GPUs, in the tiny shape
    out = new_folder()
    with mock.patch.object(measure, "has_base_shape", lambda device: True), \
            mock.patch.object(measure, "BertConfig", lambda: TINY):
        status, printed = quietly(measure.main, *tiny_flags(out))
    assert status == 0, printed
    path, = out.iterdir()
    record = json.loads(path.read_text())
    assert record["device"] == benchmark.machine("cpu") and record["kind"] == "cpu"
    assert record["threads"] == torch.get_num_threads() and record["rounds"] == 1
    assert record["torch"] == torch.__version__ and "--data_dir DIR" in record["command"]

    halves = 1 if half_precision("cpu") is None else 2
    assert len(record["precisions"]) == halves
    assert len(record["attention"]) == 2 * 3 * halves  # two paths, three widths of a head
    kinds = {"packed", "one pass"} | ({"transformers"} if record["transformers"] else set())
    assert list(record["encoders"]) == ["tiny", measure.BASE]
    for figures in record["encoders"].values():
        assert set(figures["ratios"]) == {"PCGrad", "Gradient Vaccine", "smoothness", "proximal",
                                          "smoothness and proximal"}
        steps = {(line["examples"], *line["step"].split(", ")) for line in figures["steps"]}
        assert steps == {(size, kind, precision) for size in (2, 8) for kind in kinds
                         for precision in record["precisions"]}
        assert all(line["tokens_per_second"] > 0 and line["share"] > 0
                   for line in figures["steps"])
        assert figures["peak_memory"] is None  # CUDA alone counts it

    # 141,506 / 8 steps, rounded up, ten times
    line = next(line for line in record["encoders"][measure.BASE]["steps"]
                if line["examples"] == 8 and line["step"] == "packed, float32")
    assert record["epoch"]["encoder"] == measure.BASE and record["epoch"]["steps"] == 17689
    hours = 10 * 17689 * line["milliseconds"] / 1000 / 3600
    assert abs(record["epoch"]["our_hours"]["float32"] / hours - 1) < 1e-3


def test_nothing_is_measured_where_attention_is_wrong():
    def without_mask(query, key, value, packing):
        B, L = packing.padded_shape
        q, k, v = (packing.unpack(x.flatten(1)).view(B, L, *x.shape[1:]).transpose(1, 2)
                   for x in (query, key, value))
        return packing.pack(F.scaled_dot_product_attention(q, k, v).transpose(1, 2))

    out = new_folder()
    with mock.patch.object(measure, "padded_attention", without_mask):
        status, printed = quietly(measure.main, *tiny_flags(out))
    assert status == 1 and not list(out.iterdir())
    assert printed.count("\n") == 1 and "without_mask, float32, D = 32: differs" in printed


def test_a_step_larger_than_a_set_is_rejected():
    setup = benchmark.Setup(Namespace(trained=["sst"]), 1, None, {"sst": range(24)})
    assert measure.with_size(setup, 24).args.batch_size == {"sst": 24}
    raises(ValueError, "24 examples, fewer than the 25", measure.with_size, setup, 25)


def test_a_step_out_of_memory_is_left_out_and_not_tried_again():
    tried = []

    def step(batches, seed):
        tried.append(seed)
        raise torch.OutOfMemoryError

    failed = set()
    steps = measure.those_that_fit({"large": step, "small": lambda batches, seed: None}, failed)
    for i in range(3):
        for function in steps.values():
            function([], i)
    assert failed == {"large"} and tried == [0]


def test_one_pass_for_all_tasks_gives_the_gradients_of_one_pass_per_task():
    for pair_head in ({}, {"para": "uv_diff", "sts": "cosine"}):
        model, examples = three_task_model(pair_head=pair_head)
        model.eval()  # no dropout: its masks would differ
        batches, results = batches_of(examples, 0, 5), []
        for passes in (benchmark.pass_per_task, measure.one_pass):
            gradients = GradientBuffer(model.shared_parameters(), heads_of(model))
            gradients.begin(list(KINDS))
            passes(model, gradients, batches, lambda task, batch: model.loss(
                task, batch, model.logits(task, batch)))
            gradients.combine(seed=0)
            results.append([gradients.J.clone(),
                            *(p.grad.clone() for own in heads_of(model).values() for p in own)])
        for ours, expected in zip(*results, strict=True):
            assert expected.any() and (ours - expected).abs().max() < 1e-5


def test_a_step_in_float16_scales_the_losses_and_one_in_float32_does_not():
    args = Namespace(trained=list(KINDS), weight_decay=0.0, clip=0.0, device="cpu")
    scaled, found, unscale = [], {}, torch.amp.GradScaler.unscale_

    def unscale_(scaler, optimizer):
        scaled.append(scaler.is_enabled())
        unscale(scaler, optimizer)

    with mock.patch.object(devices, "half_precision", lambda device: torch.float16), \
            mock.patch.object(benchmark, "half_precision", lambda device: torch.float16), \
            mock.patch.object(torch.amp.GradScaler, "unscale_", unscale_):
        for name in ("packed, float32", "packed, float16"):
            model, examples = three_task_model()
            model.eval()  # the same without dropout
            benchmark.own_steps(args, model)[name](batches_of(examples, 0, 4), 0)
            found[name] = torch.cat([p.grad.flatten() for p in model.shared_parameters()])

    assert scaled == [False, True]
    single, half = found.values()
    assert 0 < (half - single).norm() < 0.02 * single.norm()


@small_products
def test_the_benchmark_runs():
    status, printed = quietly(
        benchmark.main, "--data_dir", workspace() / "data", "--model", workspace() / "tiny",
        "--rounds", 1, "--batch_size", 3)
    assert status == 0, printed
    for line in ("packed, float32", "with its padding, float32", "Gradient Vaccine",
                 "smoothness and proximal", "torch, fused", "cost: K copies of sts"):
        assert line in printed, line


# ---------------------------------------------------------------- tables

def test_the_tables_hold_the_numbers_of_the_files():
    folder = new_folder()
    (folder / "a-processor.json").write_text(json.dumps(RECORD))
    made = tables.make_tables(tables.read_devices(folder))
    none = tables.NO_GPU
    for name, row in (
            ("devices", f"| half precision | bfloat16 | {none} |"),
            ("devices", f"| transformers | not installed, left out | {none} |"),
            ("steps", f"| small | 8 | packed | float32 | 1.00 (47%) | {none} |"),
            ("steps", f"| small | 8 | one pass | half precision | 1.25 (33%) | {none} |"),
            ("steps", f"| small | 32 | packed | float32 | out of memory | {none} |"),
            ("ratios", f"| small | PCGrad | 1.03 | {none} |"),
            ("peaks", f"| - | - | - | {none} |"),
            ("epoch", f"| - | - | {none} |")):
        assert row in made[name], (row, made[name])

    # beside a GPU, with what it alone has
    gpu = {**copy.deepcopy(RECORD), "device": "a GPU", "kind": "cuda",
           "precisions": ["float32", "float16"]}
    figures = gpu["encoders"]["small"]
    figures["steps"][1]["step"] = "one pass, float16"
    figures["steps"][2] = {"examples": 128, "step": "packed, float32", "milliseconds": 9.0,
                           "tokens_per_second": 34567, "share": 0.5}
    figures["peak_memory"] = {"plain": 2345678901}
    (folder / "a-GPU.json").write_text(json.dumps(gpu))
    made = tables.make_tables(tables.read_devices(folder))
    assert made["steps"][0].endswith("| a processor | a GPU |")
    assert none not in "".join(sum(made.values(), []))
    rows = made["steps"]
    assert "| small | 8 | one pass | half precision | 1.25 (33%) | 23,456 (33%) |" in rows
    assert "| small | 128 | packed | float32 | - | 34,567 (50%) |" in rows
    assert "| small | plain | - | 2,346 MB |" in made["peaks"]
    assert "| 10 epochs, float32 | - | 4.5 h |" in made["epoch"]
    assert "| one epoch, half precision | - | 18 min |" in made["epoch"]


def test_the_page_has_the_tables_of_the_files_beside_it():
    page = tables.PAGE.read_text(encoding="utf-8")
    for name, lines in tables.make_tables(tables.read_devices()).items():
        text = "\n".join(lines)
        assert f"<!-- {name} -->\n{text}\n\n" in page, name

    # the parts of a step's memory, on a device where tensors have shapes and no numbers
    if not (cache_folder() / DEFAULT_ENCODER / "model.safetensors").exists():
        raise SkipTest("the default encoder, whose vocabulary it takes, is not in the cache")
    with torch.device("meta"):
        model = memory.base_model()
    text = "\n".join(memory.memory_table(model, memory.largest_batch()[1]))
    assert f"<!-- memory -->\n{text}\n\n" in page


# ---------------------------------------------------------------- memory

def test_the_arithmetic_of_memory_agrees_with_the_tensors():
    model, examples = three_task_model(pair_head={"para": "uv_diff", "sts": "uv_diff"})
    args = Namespace(trained=list(KINDS), weight_decay=0.0, clip=1.0)
    parts = memory.parameter_bytes(model, KINDS, rows=3, teacher=True)
    gradients = GradientBuffer(model.shared_parameters(), heads_of(model), "pcgrad")
    assert parts["J"] == gradients.J.nbytes
    assert parts["weights"] == sum(p.nbytes for p in model.parameters())
    assert parts["teacher"] == sum(p.nbytes for p in Proximal(model, {}).teacher.parameters())

    optimizer = benchmark.make_optimizer(args, model)
    sizes, real = [], torch._foreach_sqrt

    def denominators(vs):
        sizes.append(sum(v.nbytes for v in vs))
        return real(vs)

    # one call per group of parameters, as on a GPU; a CPU has one per piece of a tensor
    benchmark.make_step(args, model, gradients, optimizer)(batches_of(examples, 0, 4), 0)
    with mock.patch.object(torch, "_foreach_sqrt", denominators):
        optimizer.adamw.step()
    moments = sum(state[name].nbytes for state in optimizer.adamw.state.values()
                  for name in ("exp_avg", "exp_avg_sq"))
    assert parts["two moments of AdamW"] == moments == 2 * sum(sizes)
    matrices = sum(p.nbytes for p in optimizer.adamw.param_groups[0]["params"])
    assert parts["denominators of AdamW"] == matrices

    # without surgery and teacher
    plain = memory.parameter_bytes(model, KINDS)
    assert plain["J"] == GradientBuffer(model.shared_parameters(), heads_of(model)).J.nbytes
    assert plain["teacher"] == 0


def test_the_formula_of_activations_agrees_with_what_autograd_keeps():
    # wide enough that index tensors and heads do not matter
    config = dataclasses.replace(TINY, hidden_size=64, intermediate_size=256)
    _, examples = three_task_model(pair_head={"para": "uv_diff", "sts": "uv_diff"})
    tasks, heads = {task: TASKS[task] for task in KINDS}, dict.fromkeys(("para", "sts"), "uv_diff")
    model = MultitaskBERT(BertModel(config), tasks, heads, "cls", 0.3).train()
    smoothness = Smoothness(dict.fromkeys(KINDS, "regression"))
    for task in KINDS:
        batch = collate(examples[task], list(range(8)))
        formula = memory.activation_bytes(config, Packing(batch.attention_mask), "cpu")
        kept = memory.kept_bytes(model, lambda: model.loss(task, batch))
        assert abs(kept / formula - 1) < 0.03, (task, kept, formula)

        # the smoothness term keeps a second graph
        def regularized():
            logits = model.logits(task, batch)
            moved = torch.zeros(*batch.input_ids.shape, 64)
            return smoothness.divergences(model, task, batch, logits, 0, moved).mean()

        assert abs(memory.kept_bytes(model, regularized) / formula - 2) < 0.06, task
