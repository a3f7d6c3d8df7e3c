"""A lesson in a dozen properties, and then all other checks (tests/).

    python sanity_check.py             the lesson, and all checks that need no network
    python sanity_check.py --full      also those that take longer or fetch the default encoder
    python sanity_check.py pcgrad      those whose name contains a word
    pytest sanity_check.py tests       the same checks under pytest

Before each property of the lesson stands what would break without it. Read them beside the files
that they name: attention.py, bert.py, data/, optimizer.py, pcgrad.py, smart.py, pretrain_mlm.py.
"""
import contextlib
import importlib
import io
import math
import multiprocessing
import os
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import SkipTest

import numpy as np
import torch
from torch import nn

import attention
import pcgrad
from bert import BertModel
from data.batches import Schedule, collate
from data.download import DEFAULT_ENCODER, cache_folder, fetch_encoder
from data.tokenizer import build_sequence, load_tokenizer
from optimizer import AdamW
from pretrain_mlm import Vocabulary, mask_tokens
from smart import Smoothness
from tests.helpers import (FULL, KINDS, TINY, heads_of, random_batch, seed_check, three_task_model,
                           workspace)

SLOW = ("test_distributed", "test_results", "test_training", "test_smart", "test_resume",
        "test_device", "test_half_precision")


# A wrong transpose, a wrong LayerNorm eps or swapped segments would still train, only worse.
def test_published_weights_give_the_published_embedding():
    """Mean over the tokens, first six numbers, from transformers.BertModel on the same weights."""
    if not FULL and not (cache_folder() / DEFAULT_ENCODER / "model.safetensors").exists():
        raise SkipTest("the default encoder is not in the cache; --full fetches it")
    folder = fetch_encoder()
    ids = load_tokenizer(folder).encode("The film is a quiet triumph.").ids
    assert ids == [101, 1996, 2143, 2003, 1037, 4251, 10911, 1012, 102]

    input_ids = torch.tensor([ids])
    with torch.no_grad():
        model = BertModel.from_pretrained(folder).eval()
        hidden_states = model(input_ids, torch.ones_like(input_ids))["last_hidden_state"]
    expected = [-0.0309636, 0.1109137, 0.0930861, 0.0387746, -0.2119545, 0.1756335]
    assert (hidden_states[0].mean(dim=0)[:6] - torch.tensor(expected)).abs().max() < 1e-5


# If a token could see the padding, or another sentence, a prediction would depend on the batch.
def test_packed_attention_equals_padded_masked_attention():
    attention_mask = random_batch(TINY, [5, 12, 5, 1])[1]
    query, key, value = torch.randn(3, 4, 2, 12, 8)  # (B, A, L, D) each
    padded = attention.attention(query, key, value, attention_mask).transpose(1, 2).flatten(2)

    packing = attention.Packing(attention_mask)
    packed = [packing.pack(x.transpose(1, 2)) for x in (query, key, value)]
    unpacked = packing.unpack(attention.grouped_attention(*packed, packing).flatten(1))
    real = attention_mask.bool()
    assert (padded - unpacked)[real].abs().max() < 1e-5


# With token type 0 for both sentences, the encoder would not be told where the second one begins.
def test_the_two_sentences_of_a_pair_have_token_types_0_and_1():
    ids, first_segment = build_sequence([[7, 8], [9]], cls=1, sep=2, max_length=64)
    assert ids.tolist() == [1, 7, 8, 2, 9, 2] and first_segment == 4

    sep = load_tokenizer(workspace() / "tiny").token_to_id("[SEP]")
    _, examples = three_task_model(pair_head={"para": "cross"})
    batch = collate(examples["para"], np.arange(4))
    for ids, types in zip(batch.input_ids.tolist(), batch.token_type_ids.tolist()):
        first, second = [i for i, token in enumerate(ids) if token == sep]
        assert types == [0] * (first + 1) + [1] * (second - first) + [0] * (len(ids) - second - 1)


# Without bias correction the first steps would be up to six times too large: m and v start at 0.
def test_adamw_is_its_formula():
    parameter = nn.Parameter(torch.randn(50, dtype=torch.float64))
    theta, m, v = parameter.detach().clone(), 0, 0
    optimizer = AdamW([parameter], lr=1e-2, weight_decay=0.1)
    for t in range(1, 101):
        g = torch.randn(50, dtype=torch.float64)
        parameter.grad = g.clone()
        optimizer.step()

        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g ** 2
        step_size = 1e-2 * math.sqrt(1 - 0.999 ** t) / (1 - 0.9 ** t)
        theta = theta - step_size * m / (v.sqrt() + 1e-6)
        theta = theta - 1e-2 * 0.1 * theta
    assert (parameter - theta).abs().max() < 1e-12


# If one projection used another's result, or the mean were taken, it would not be PCGrad.
def test_pcgrad_on_the_gram_matrix_is_the_loop_over_vectors():
    for seed in range(20):
        J = torch.randn(4, 9, dtype=torch.float64)
        W = pcgrad.pcgrad_weights(J @ J.T, seed)
        assert ((W @ J).sum(dim=0) - pcgrad.pcgrad(J, seed)).abs().max() < 1e-9


# What is left of a conflict after surgery would still pull against the other task.
def test_pcgrad_leaves_no_conflict_between_two():
    J = torch.tensor([[2.0, 1.0, -3.0], [-1.0, 0.5, 1.0]], dtype=torch.float64)
    assert J[0] @ J[1] < 0
    projected = pcgrad.pcgrad_weights(J @ J.T, seed=0) @ J
    assert abs(projected[0] @ J[1]) < 1e-9 and abs(projected[1] @ J[0]) < 1e-9


# An idle head that got a zero gradient instead of none would still be moved by momentum and decay.
def test_a_head_has_its_own_tasks_gradient_or_none():
    model, examples = three_task_model()
    gradients = pcgrad.GradientBuffer(model.shared_parameters(), heads_of(model), "pcgrad")
    gradients.begin(["sst", "sts"])
    for task in ("sst", "sts"):
        gradients.backward(task, model.loss(task, collate(examples[task], np.arange(4))))
    gradients.combine(seed=0)
    has_gradient = {task: all(p.grad is not None for p in head.parameters())
                    for task, head in model.heads.items()}
    assert has_gradient == {"sst": True, "para": False, "sts": True}


# Without the projection the true radius would be the step size, a hundred times eps here.
def test_smarts_perturbation_stays_in_its_ball():
    model, examples = three_task_model()
    smoothness = Smoothness(KINDS, eps=1e-3, sigma=1e-3, step_size=0.1)
    for task in KINDS:
        batch = collate(examples[task], np.arange(4))
        logits = model.logits(task, batch)
        moved = smoothness.adversarial_perturbation(model, task, batch, logits, seed=5)
        assert 0.999e-3 < moved.abs().max() <= 1e-3 * (1 + 1e-6)
        assert not moved[batch.attention_mask == 0].any()  # the padding stays


# Two draws (replaced or not, then by what) are easily nested wrongly, to 80 % of 80 %.
def test_masked_tokens_are_80_percent_mask_10_random_10_kept():
    tokenizer = load_tokenizer(workspace() / "tiny")
    vocabulary = Vocabulary.of(tokenizer, workspace() / "tiny")
    ids = torch.randint(5, 500, (400, 200))
    masked, chosen = mask_tokens(ids, vocabulary, False, np.random.default_rng(0))
    assert abs(chosen.float().mean() - 0.15) < 0.005 and torch.equal(masked[~chosen], ids[~chosen])

    is_mask, is_kept = masked[chosen] == vocabulary.mask, masked[chosen] == ids[chosen]
    assert abs(is_mask.float().mean() - 0.8) < 0.015
    assert abs(is_kept.float().mean() - 0.1) < 0.015  # a random token is its original in 1 of 500


# If a schedule skipped or repeated examples, a model would be trained on other data than it says.
def test_an_epoch_holds_every_example_once_where_the_schedule_says_so():
    sizes = {"sst": 50, "para": 203, "sts": 31}
    for name in ("sequential", "mixed", "mtdnn"):
        steps = list(Schedule(name, sizes, 8, "longest", seed=1).epoch(0))
        for task, size in sizes.items():
            drawn = [i for step in steps for t, indices in step if t == task for i in indices]
            assert sorted(drawn) == list(range(size)), (name, task)
    # round robin lasts as long as the largest set, and the small ones start over
    steps = list(Schedule("round_robin", sizes, 8, "longest", seed=1).epoch(0))
    drawn = [i for step in steps for task, indices in step if task == "para" for i in indices]
    assert sorted(drawn) == list(range(203)) and all(len(step) == 3 for step in steps)


# N^a / sum N^a with a = 1 in the first epoch and .2 in the last, or it is another schedule.
def test_annealed_sampling_has_the_published_probabilities():
    sizes = {"para": 283010, "sst": 8544, "sts": 6040}
    schedule = Schedule("annealed", sizes, 8, 100, seed=1, epochs=10)
    assert np.abs(schedule.probabilities(0) - [.951, .029, .020]).max() < 6e-4
    assert np.abs(schedule.probabilities(9) - [.510, .253, .236]).max() < 6e-4


# If any part between the words and the loss were cut off, a batch could not be overfitted.
def test_a_tiny_model_overfits_one_batch():
    model, examples = three_task_model()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    gradients = pcgrad.GradientBuffer(model.shared_parameters(), heads_of(model), "pcgrad")
    optimizer, losses = AdamW(model.parameters(), lr=3e-3), []
    for step in range(150):
        gradients.begin(list(examples))
        losses.append(0.0)
        for task in examples:
            loss = model.loss(task, collate(examples[task], np.arange(4)))
            gradients.backward(task, loss)
            losses[-1] += loss.item()
        gradients.combine(seed=step)
        optimizer.step()
    assert losses[0] > 2 and losses[-1] < 0.05, losses[::30]


# ---------------------------------------------------------------- the runner

def run_check(title, name, check):
    """Run one check and print a line. Returns "passed", "failed" or "skipped"."""
    start, printed = time.perf_counter(), io.StringIO()
    shown = f"{title}: {name[5:].replace('_', ' ')}"
    seed_check(name)
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            check()
    except SkipTest as reason:
        print(f"skip  {shown}: {reason}", flush=True)
        return "skipped"
    except Exception:
        print(f"FAIL  {shown}\n{printed.getvalue()}{traceback.format_exc()}", flush=True)
        return "failed"
    print(f"ok    {shown} ({time.perf_counter() - start:.1f} s)", flush=True)
    return "passed"


def run_file(title, module, words):
    """Run the checks of one file whose name, or whose file's name, contains all words."""
    outcomes = []
    for name, check in list(vars(importlib.import_module(module)).items()):
        own = name.startswith("test_") and getattr(check, "__module__", "") == module
        if own and all(word in name or word in title for word in words):
            outcomes.append(run_check(title, name, check))
    return outcomes


def main(words):
    outcomes = run_file("lesson", "__main__", words)

    # the files of tests/ on two processes, those first that take longest
    files = sorted((Path(__file__).parent / "tests").glob("test_*.py"),
                   key=lambda path: (path.stem not in SLOW, path.stem))
    os.environ["OMP_NUM_THREADS"] = "1"  # of each process
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        running = [pool.submit(run_file, path.stem, f"tests.{path.stem}", words) for path in files]
        for done in running:
            outcomes += done.result()
    print(f"{outcomes.count('skipped')} skipped\n{outcomes.count('passed')} passed, "
          f"{outcomes.count('failed')} failed")
    return 1 if "failed" in outcomes or "passed" not in outcomes else 0


if __name__ == "__main__":
    sys.exit(main([word for word in sys.argv[1:] if not word.startswith("--")]))
