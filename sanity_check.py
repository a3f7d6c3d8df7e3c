"""The checks: one function a property, grouped by file. Every one asserts a number or a property that can fail.

    python sanity_check.py             all that need no network, in under two minutes on two cores
    python sanity_check.py --full      also those that take longer or fetch the default encoder
    python sanity_check.py pcgrad      those whose name contains a word
    pytest sanity_check.py             the same checks under pytest

Checks against `transformers` run where it is installed, and those of CUDA where there is one; else they count as skipped.
"""
import contextlib
import csv
import dataclasses
import fnmatch
import functools
import http.server
import importlib.util
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from pathlib import Path
from unittest import SkipTest, mock

import huggingface_hub
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import ttest_ind
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from torch import nn
from torch.nn import functional as F

import attention
import curves
import evaluation
import flags as flags_of
import multitask_classifier
import pcgrad
import pretrain_mlm
import smart
from bert import BertConfig, BertModel, Dropout, our_name, published_name
from checkpoint import Meter, Run, exit_status, median_times
from curves import read_metrics
from data import download, tasks
from data.batches import ONE_TASK_A_STEP, SCHEDULES, Schedule, Stream, collate, evaluation_batches, seed_of
from data.download import DEFAULT_ENCODER, InputError, cache_folder, fetch_encoder
from data.tasks import TASKS, load_tokenizer, read_examples, tokenize
from multitask_classifier import MultitaskBERT
from optimizer import CHUNK, AdamW, learning_rate
from support import predict

HERE = Path(__file__).resolve().parent
DEMO = HERE / "data" / "demo"
TINY = BertConfig(vocab_size=500, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
                  max_position_embeddings=64)
FULL = "--full" in sys.argv


# ---------------------------------------------------------------- helpers

def raises(kind, part, function, *args, **kwargs):
    """The function raises `kind` with `part` in a message of one line."""
    try:
        function(*args, **kwargs)
    except kind as error:
        assert part in str(error) and "\n" not in str(error), f"the message is: {error}"
    else:
        raise AssertionError(f"no {kind.__name__} with {part!r}")


@functools.cache
def workspace():
    """A temporary folder with a tiny random encoder, and the demo sets cut to a few rows. Gone at exit."""
    folder = tempfile.TemporaryDirectory(prefix="sanity-check-")
    workspace.keep = folder
    root = Path(folder.name)
    torch.manual_seed(0)
    BertModel(TINY).save_pretrained(root / "tiny")
    text = " ".join(path.read_text(encoding="utf-8").lower() for path in DEMO.glob("*-train.csv"))
    letters = sorted({c for c in text if c.isalpha()}) + list("0123456789.,?!'\"-:;()$%&/")
    words = sorted({w for w in text.split() if w.isalpha()}, key=lambda w: (-text.count(f" {w} "), w))
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + c for c in letters), *words]
    (root / "tiny" / "vocab.txt").write_text("\n".join(vocabulary[:TINY.vocab_size]) + "\n", encoding="utf-8")
    (root / "data").mkdir()
    for path in DEMO.glob("*.csv"):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        (root / "data" / path.name).write_text("".join(lines[:25 if "train" in path.name else 9]), encoding="utf-8")
    return root


def run(*flags, steps=2, option="finetune", name=None):
    """main() on the tiny encoder and the cut demo sets. Returns (exit status, what it said, the run's folder)."""
    root = workspace()
    name = name or str(root / "runs" / f"{time.time_ns()}")
    said = io.StringIO()
    defaults = ["--option", option, "--model", str(root / "tiny"), "--data_dir", str(root / "data"), "--epochs", "1",
                "--epoch_length", str(steps), "--name", name]
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = exit_status(multitask_classifier.main, [*defaults, *map(str, flags)])
    return status, said.getvalue(), Path(name)


def trained(*flags, **kwargs):
    """The tensors a run leaves: encoder and heads."""
    status, said, folder = run(*flags, **kwargs)
    assert status == 0, said
    return load_file(folder / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def copy_of_tiny(**config):
    """A folder with the tiny encoder, to be changed. config: fields of its config.json to set; its
    weights then have the shapes that follow."""
    folder = Path(tempfile.mkdtemp(dir=workspace())) / "encoder"
    shutil.copytree(workspace() / "tiny", folder)
    if config:
        torch.manual_seed(0)
        BertModel(dataclasses.replace(TINY, **config)).save_pretrained(folder)
    return folder


def shard(folder):
    """Split a folder's weights into three files and an index, as transformers saves large ones."""
    tensors = load_file(folder / "model.safetensors")
    shards = [folder / f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    shard_of = {name: shards[i % 3] for i, name in enumerate(tensors)}
    for path in shards:
        save_file({name: x for name, x in tensors.items() if shard_of[name] == path}, path,
                  metadata={"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": {n: p.name for n, p in shard_of.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    return shards


def as_tokenizer_json(folder, normalizer=None, max_length=None):
    """Put tokenizer.json in the place of a folder's vocab.txt, as transformers 5 and
    sentence-transformers 6 do. normalizer: its settings. max_length: cut and pad to it."""
    lines = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    vocabulary = {token: i for i, token in enumerate(lines)}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.add_special_tokens([token for token in tasks.SPECIAL if token in vocabulary])
    tokenizer.normalizer = BertNormalizer(**(normalizer or {}))
    tokenizer.pre_tokenizer = BertPreTokenizer()
    if max_length:
        tokenizer.enable_truncation(max_length)
        tokenizer.enable_padding(length=max_length)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "vocab.txt").unlink()


def random_batch(config, lengths, seed=0):
    """input_ids, attention_mask, token_type_ids, each (B, L)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    mask = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(5, config.vocab_size, shape, generator=generator) * mask
    return ids, mask, torch.randint(0, 2, shape, generator=generator) * mask


def largest_gradient_difference(ours, theirs):
    """The largest norm of a difference of two parameters' gradients, relative to the largest gradient norm."""
    scale = max(gradient.norm() for gradient in theirs.values())
    assert ours.keys() == theirs.keys()
    return max(((ours[name] - theirs[name]).norm() / scale).item() for name in theirs)


# ---------------------------------------------------------------- attention.py

def test_packed_attention_equals_padded_masked_attention():
    torch.manual_seed(0)
    mask = torch.rand(7, 20) < 0.6  # with holes, so that the order of tokens and the padding are independent
    mask[:, 3] = True
    packing = attention.Packing(mask)
    query, key, value = (torch.randn(7, 4, 20, 8, requires_grad=True) for _ in range(3))
    theirs = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None]).transpose(1, 2).flatten(2)
    weights = torch.randn(7, 20, 32) * mask[..., None]
    expected = torch.autograd.grad((theirs * weights).sum(), (query, key, value))
    packed = [packing.pack(x.transpose(1, 2)) for x in (query, key, value)]
    ours = packing.unpack(attention.grouped_attention(*packed, packing).flatten(1))
    assert (ours - theirs * mask[..., None]).abs().max() < 1e-5
    for gradient, reference in zip(torch.autograd.grad((ours * weights).sum(), (query, key, value)), expected):
        assert (gradient - reference * mask[:, None, :, None]).abs().max() < 1e-5


def test_flash_attention_hands_over_the_right_bounds():
    """On the CPU the fused kernel is replaced by one that computes from cu_seqlens sequence by sequence."""
    def kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k):
        assert cu_seq_q.dtype == torch.int32 and max_q == max_k == max(cu_seq_q.diff())
        pieces = [x.split(cu_seq_q.diff().tolist()) for x in (query, key, value)]
        return torch.cat([F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in qkv)).transpose(0, 1)
                          for qkv in zip(*pieces)])

    packing = attention.Packing(random_batch(TINY, [5, 2, 9, 5, 1])[1])
    query, key, value = torch.randn(3, 32, 4, 8)  # 22 real tokens and 10 to fill up
    with mock.patch.object(attention, "varlen_attn", kernel):
        flash = attention.flash_attention(query, key, value, packing)
    assert (flash - attention.grouped_attention(query, key, value, packing)).abs().max() < 1e-5


def test_flash_attention_on_cuda():
    if not torch.cuda.is_available():
        raise SkipTest("no CUDA device")
    packing = attention.Packing(random_batch(TINY, [50, 2, 9, 31, 128])[1], "cuda")
    query, key, value = torch.randn(3, 224, 12, 32, device="cuda", dtype=torch.bfloat16).requires_grad_()
    outputs = [attend(query, key, value, packing) for attend in (attention.flash_attention, attention.grouped_attention)]
    gradients = [torch.autograd.grad(output.float().square().sum(), query)[0] for output in outputs]
    for a, b in (outputs, gradients):
        assert (a - b).float().norm() < 0.02 * b.float().norm()


def test_packing_comes_back_in_the_callers_order():
    lengths = [4, 1, 6, 4, 2]
    mask = random_batch(TINY, lengths)[1]
    packing = attention.Packing(mask)
    padded = torch.randn(5, 6, 3)
    packed = packing.pack(padded)
    assert packed.shape == (32, 3) and not packed[17:].any() and torch.equal(packing.unpack(packed), padded * mask[..., None])
    assert torch.equal(packing.first(packed), padded[:, 0])
    means = torch.stack([row[:n].mean(dim=0) for row, n in zip(padded, lengths)])
    assert (packing.mean(packed) - means).abs().max() < 1e-6
    assert packing.groups == [(1, 1), (1, 2), (2, 4), (1, 6), (15, 1)]
    assert packing.cu_seqlens.tolist() == [0, 1, 3, 7, 11, 17, *range(18, 33)] and packing.max_length == 6
    assert attention.Packing(torch.ones(4, 8)).groups == [(4, 8)]  # nothing to fill up
    raises(ValueError, "sequence 1", attention.Packing, torch.tensor([[1, 1], [0, 0]]))
    raises(ValueError, "tokens (5, 7) beside an attention mask (5, 6)", packing.pack, torch.zeros(5, 7))


def test_every_linear_layer_computes_real_tokens_only():
    model, computed = BertModel(TINY).eval(), []
    for name, module in model.bert_layers.named_modules():
        if isinstance(module, (nn.Linear, nn.LayerNorm)):
            module.register_forward_hook(lambda module, inputs, output: computed.append(output.numel() // output.size(-1)))
    model.embed_layer_norm.register_forward_hook(lambda module, inputs, output: computed.append(output.shape[0]))
    model(*random_batch(TINY, [3, 30, 7, 11]))
    assert len(computed) == 1 + 2 * 8 and set(computed) == {64}, computed  # 51 rounded up; padded they would be 120


def test_linear_equals_torch_linear():
    """Values and gradients of both ways to compute it, and that oneDNN computes what it should."""
    torch.manual_seed(0)
    theirs, ours, convolution = nn.Linear(24, 40), attention.Linear(24, 40), mock.Mock(wraps=F.conv2d)
    for shape, avx512, dtype, amp, convolved in (
            ((128, 24), True, torch.float32, False, True), ((128, 24), False, torch.float32, False, False),
            ((128, 24), True, torch.float64, False, False), ((128, 24), True, torch.float32, True, False),
            ((0, 24), True, torch.float32, False, False), ((17, 24), True, torch.float32, False, False),
            ((136, 24), True, torch.float32, False, False), ((128, 3, 24), True, torch.float32, False, False)):
        x, weights = torch.randn(shape).requires_grad_(), torch.randn(*shape[:-1], 40)
        expected = theirs(x), *torch.autograd.grad((theirs(x) * weights).sum(), (x, theirs.weight, theirs.bias))
        ours.load_state_dict(theirs.state_dict())
        ours, input = ours.to(dtype), x.detach().to(dtype).requires_grad_()
        with mock.patch.object(attention, "AVX512", avx512), torch.autocast("cpu", torch.bfloat16, enabled=amp), \
                mock.patch.object(F, "conv2d", convolution):
            output = ours(input)
        assert convolution.called == convolved and output.shape == expected[0].shape and output.is_contiguous()
        if attention.AVX512 and convolved:  # with one thread too
            backend = torch._C._select_conv_backend(*convolution.call_args.args, (1, 1), (0, 0), (1, 1), False, (0, 0), 1)
            assert backend == torch._C._ConvBackend.Mkldnn
        convolution.reset_mock()
        got = output, *torch.autograd.grad((output * weights).sum(), (input, ours.weight, ours.bias))
        for a, b in zip(got, expected):
            assert (a - b).norm() <= (1e-2 if amp else 1e-6) * b.norm()


def test_attention_is_float32_under_autocast():
    torch.manual_seed(0)
    packing = attention.Packing(random_batch(TINY, [5, 2, 9, 5, 1])[1])
    qkv = torch.randn(3, 32, 4, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        output = attention.grouped_attention(*qkv, packing)
    assert torch.equal(output, attention.grouped_attention(*qkv.float(), packing).bfloat16())


def test_dropout_drops_its_share():
    torch.manual_seed(0)
    x = (torch.rand(1001, 997) + 1).requires_grad_()  # never 0, which could not be told from what is dropped
    dropout = Dropout(0.1).train()
    torch.manual_seed(0)
    output = dropout(x)
    zeros = output == 0
    n = zeros.numel()
    assert abs(zeros.sum() - 0.1 * n) < 5 * math.sqrt(0.09 * n)
    for i in range(4):  # four numbers share 64 random bits: each place has its share, and no two go together
        assert abs(zeros.flatten()[i::4].sum() - 0.1 * n / 4) < 5 * math.sqrt(0.09 * n / 4)
        both = (zeros.flatten()[:-3] & zeros.flatten()[i:n - 3 + i]).sum()
        assert i == 0 or abs(both - 0.01 * n) < 5 * math.sqrt(0.0099 * n)
    assert (output - (x / 0.9).masked_fill(zeros, 0)).abs().max() < 1e-3
    gradient, = torch.autograd.grad(output.sum(), x)
    assert torch.equal(gradient == 0, zeros) and (gradient[~zeros] - 1 / 0.9).abs().max() < 1e-3
    assert not torch.equal(dropout(x) == 0, zeros)
    torch.manual_seed(0)
    assert torch.equal(dropout(x), output)
    assert torch.equal(dropout.eval()(x), x) and torch.equal(Dropout(0.0).train()(x), x)
    assert Dropout(0.5).train()(x.bfloat16()).dtype == torch.bfloat16
    assert not Dropout(1.0).train()(x).any() and not Dropout(1 - 1e-9).train()(x).any()


# ---------------------------------------------------------------- bert.py

def test_encoder_equals_torch_transformer_encoder():
    """Outputs and gradients, against torch's own post-norm encoder with the same weights."""
    torch.manual_seed(1)
    model = BertModel(TINY).eval()
    for parameter in model.parameters():  # biases and norms away from 0 and 1, so that each counts
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, activation=F.gelu, layer_norm_eps=1e-12, batch_first=True)
    peer = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    names = {"self_attn.out_proj": "attention_dense", "linear1": "interm_dense", "linear2": "out_dense",
             "norm1": "attention_layer_norm", "norm2": "out_layer_norm"}

    def in_peer_names(values):
        result = {}
        for i, kind in itertools.product(range(2), ("weight", "bias")):
            qkv = [values[f"bert_layers.{i}.self_attention.{part}.{kind}"] for part in ("query", "key", "value")]
            result[f"layers.{i}.self_attn.in_proj_{kind}"] = torch.cat(qkv)
            for theirs, ours in names.items():
                result[f"layers.{i}.{theirs}.{kind}"] = values[f"bert_layers.{i}.{ours}.{kind}"]
        return result

    peer.load_state_dict(in_peer_names(model.state_dict()))
    ids, mask, types = random_batch(TINY, [12, 3, 1, 12, 7])
    embedded = model.embed(ids, types).detach()
    expected = peer(embedded, src_key_padding_mask=mask == 0) * mask[..., None]
    ours = model(ids, mask, types)["last_hidden_state"]
    assert (ours - expected).abs().max() < 1e-5
    weights = torch.randn_like(ours)
    (expected * weights).sum().backward()
    (model.encode(embedded, mask) * weights).sum().backward()
    gradients = in_peer_names({name: p.grad for name, p in model.named_parameters()})
    assert largest_gradient_difference(gradients, {name: p.grad for name, p in peer.named_parameters()}) < 1e-5


def compare_with_transformers(folder, lengths):
    """Outputs to 1e-5, gradients to 1e-5 of the largest gradient norm, on one folder and one batch."""
    try:
        from transformers import BertModel as Peer
    except ImportError:
        raise SkipTest("transformers is not installed") from None
    model, peer = BertModel.from_pretrained(folder).eval(), Peer.from_pretrained(folder).eval()
    ids, mask, types = random_batch(model.config, lengths)
    ours, theirs = model(ids, mask, types), peer(ids, mask, types)
    hidden = theirs.last_hidden_state * mask[..., None]
    assert (ours["last_hidden_state"] - hidden).abs().max() < 1e-5
    assert (ours["pooler_output"] - theirs.pooler_output).abs().max() < 1e-5
    weights, pooler_weights = torch.randn_like(hidden), torch.randn_like(theirs.pooler_output)
    for states, pooled in ((ours["last_hidden_state"], ours["pooler_output"]), (hidden, theirs.pooler_output)):
        ((states * weights).sum() + (pooled * pooler_weights).sum()).backward()
    gradients = {published_name(name): p.grad for name, p in model.named_parameters()}
    assert largest_gradient_difference(gradients, {name: p.grad for name, p in peer.named_parameters()}) < 1e-5


def test_tiny_encoder_equals_transformers():
    for lengths in ([9, 40, 3, 40], [1], [64, 64]):
        compare_with_transformers(workspace() / "tiny", lengths)


def test_full_encoders_equal_transformers():
    if not FULL:
        raise SkipTest("with --full")
    compare_with_transformers(fetch_encoder(), [9, 40, 3, 40, 22])
    compare_with_transformers(fetch_encoder(), [512, 512])
    for config in (BertConfig(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512),
                   BertConfig()):
        folder = workspace() / f"bert-{config.hidden_size}"
        BertModel(config).save_pretrained(folder)
        for lengths in ([5, 33, 17], [1], [512]):
            compare_with_transformers(folder, lengths)


def test_default_encoder_gives_the_stored_embeddings():
    """Computed with transformers.BertModel 5.23.0 on the same weights: [CLS] and mean over tokens, first six values."""
    if not FULL and not (cache_folder() / DEFAULT_ENCODER / "model.safetensors").exists():
        raise SkipTest("the default encoder is not in the cache; with --full it is fetched")
    folder = fetch_encoder()
    sentences = ["The film is a quiet triumph.", "Nobody asked for this sequel, did they?"]
    encodings = load_tokenizer(folder).encode_batch(sentences)
    ids = torch.zeros(2, max(len(e.ids) for e in encodings), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, e in enumerate(encodings):
        ids[i, :len(e.ids)], mask[i, :len(e.ids)] = torch.tensor(e.ids), 1
    assert ids.tolist() == STORED_IDS
    with torch.no_grad():
        outputs = BertModel.from_pretrained(folder).eval()(ids, mask)
    hidden = outputs["last_hidden_state"]
    assert (hidden[:, 0, :6] - torch.tensor(STORED_CLS)).abs().max() < 1e-5
    assert (hidden.sum(1)[:, :6] / mask.sum(1, keepdim=True) - torch.tensor(STORED_MEAN)).abs().max() < 1e-5
    assert (outputs["pooler_output"][:, :6] - torch.tensor(STORED_POOLER)).abs().max() < 1e-5


def test_a_row_does_not_depend_on_its_batch():
    model = BertModel(TINY).eval()
    ids, mask, types = random_batch(TINY, [6, 14, 6, 30, 1])
    together = model(ids, mask, types)
    for i, length in enumerate([6, 14, 6, 30, 1]):
        for width in (length, 64):  # alone, and alone but padded further
            row = [F.pad(x[i:i + 1, :length], (0, width - length)) for x in (ids, mask, types)]
            alone = model(*row)
            difference = alone["last_hidden_state"][0, :length] - together["last_hidden_state"][i, :length]
            assert difference.abs().max() < 1e-6
            assert (alone["pooler_output"][0] - together["pooler_output"][i]).abs().max() < 1e-6


def test_embed_and_encode_make_up_forward():
    model = BertModel(TINY).eval()
    ids, mask, _ = random_batch(TINY, [6, 14, 6])
    whole = model(ids, mask)["last_hidden_state"]
    assert (model.encode(model.embed(ids), mask) - whole).abs().max() < 1e-6
    assert torch.equal(model(ids, mask, torch.zeros_like(ids))["last_hidden_state"], whole)  # token types default to 0
    assert not torch.equal(model(ids, mask, mask)["last_hidden_state"], whole)
    assert (whole * (1 - mask)[..., None]).abs().max() == 0
    raises(ValueError, "64 positions", model, torch.ones(1, 65, dtype=torch.long), torch.ones(1, 65))


def test_checkpoints_of_every_age_load():
    """Names of 2018 and of now, with and without prefix, pooler and MLM head, safetensors and pickle; nothing silently."""
    torch.manual_seed(2)
    model = BertModel(TINY)
    published = {published_name(name): tensor.clone() for name, tensor in model.state_dict().items()}
    assert len(published) == 39 and {our_name(name) for name in published} == set(model.state_dict())

    def load(tensors, pickled=False):
        folder = Path(tempfile.mkdtemp(dir=workspace()))
        TINY.save(folder)
        torch.save(tensors, folder / "pytorch_model.bin") if pickled else save_file(tensors, folder / "model.safetensors")
        with contextlib.redirect_stdout(io.StringIO()) as said:
            return BertModel.from_pretrained(folder).state_dict(), said.getvalue()

    old = {"bert." + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
           for name, tensor in published.items()}
    for tensors in (published, old, {**old, "bert.embeddings.position_ids": torch.arange(64)[None]},
                    {name: tensor.double() for name, tensor in published.items()}):
        for pickled in (False, True):
            loaded, said = load(tensors, pickled)
            assert same(loaded, model.state_dict()) and said == "", said
    loaded, said = load({**old, "cls.predictions.bias": torch.zeros(500)})
    assert same(loaded, model.state_dict()) and "left unused: cls.predictions.bias" in said
    loaded, said = load({name: tensor for name, tensor in published.items() if "pooler" not in name})
    assert "no pooler" in said and torch.equal(loaded["word_embedding.weight"], model.word_embedding.weight)
    raises(InputError, "no tensor for embed_layer_norm.weight", load,
           {name: tensor for name, tensor in published.items() if name != "embeddings.LayerNorm.weight"})
    raises(InputError, "has shape (499, 16)", load,
           {**published, "embeddings.word_embeddings.weight": torch.zeros(499, 16)})
    raises(InputError, "two tensors for ", load,
           {**published, "bert.embeddings.LayerNorm.weight": torch.ones(16)})
    raises(InputError, "position_ids is not", load, {**published, "embeddings.position_ids": torch.arange(64)[None] + 1})


def test_a_pickle_with_a_payload_is_not_run():
    folder = Path(tempfile.mkdtemp(dir=workspace()))
    TINY.save(folder)

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(folder / "owned"),)

    with open(folder / "pytorch_model.bin", "wb") as file:
        pickle.dump({"embeddings.LayerNorm.weight": Payload()}, file, protocol=2)
    raises(InputError, "cannot be read as named tensors", BertModel.from_pretrained, folder)
    assert not (folder / "owned").exists()


def test_weights_in_shards_load():
    """In the layout of transformers: an index names the file of each tensor."""
    folder = copy_of_tiny()
    shards = shard(folder)
    whole = BertModel.from_pretrained(workspace() / "tiny").state_dict()
    assert len(shards) == 3 and not (folder / "model.safetensors").exists()
    assert same(BertModel.from_pretrained(folder).state_dict(), whole)
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    for broken in ("[]", "{}", "{", '{"weight_map": {"a": "../model.safetensors"}}',
                   '{"weight_map": {"a": 1}}', '{"weight_map": ["a"]}'):
        index.write_text(broken)
        raises(InputError, str(index), BertModel.from_pretrained, folder)
    index.write_text(json.dumps(listed))
    tensors = load_file(shards[0])
    save_file({**tensors, **load_file(shards[1])}, shards[0])
    raises(InputError, "is in two of its files", BertModel.from_pretrained, folder)
    save_file(tensors, shards[0])
    shards[1].write_bytes(shards[1].read_bytes()[:-10])
    raises(InputError, f"{shards[1]}: cannot be read", BertModel.from_pretrained, folder)
    shards[1].unlink()
    raises(InputError, f"{shards[1].name}, which holds", BertModel.from_pretrained, folder)


def test_integer_weights_and_decoders_are_rejected_by_name():
    folder = copy_of_tiny()
    tensors = load_file(folder / "model.safetensors")
    for name, dtype in (("encoder.layer.0.output.dense.weight", torch.int8),
                        ("embeddings.LayerNorm.bias", torch.int64),
                        ("pooler.dense.bias", torch.bool)):
        save_file({**tensors, name: tensors[name].to(dtype)}, folder / "model.safetensors")
        raises(InputError, f"{name} holds {dtype}", BertModel.from_pretrained, folder)
    # a tensor that is not used may hold what it likes
    save_file({**tensors, "cls.counts": torch.ones(2).long()}, folder / "model.safetensors")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        BertModel.from_pretrained(folder)
    assert "left unused: cls.counts" in said.getvalue()
    status, said, taken = run("--tasks", "sst", steps=1)
    assert status == 0, said
    head = load_file(taken / "model.safetensors")
    name = "heads.sst.linear.weight"
    save_file({**head, name: head[name].to(torch.int32)}, taken / "model.safetensors")
    raises(InputError, f"{name} holds torch.int32", MultitaskBERT.load, taken)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "is_decoder": True}))
    raises(InputError, "is_decoder is True", BertModel.from_pretrained, folder)
    (folder / "config.json").write_text(json.dumps({**fields, "is_decoder": False}))
    BertConfig.from_folder(folder)


def test_transformers_opens_what_a_run_saves():
    status, said, folder = run("--pooling", "cls")
    assert status == 0, said
    compare_with_transformers(folder, [4, 9])
    from transformers import AutoModel

    assert type(AutoModel.from_pretrained(folder)).__name__ == "BertModel"
    status, said, folder = run("--pal", "size=8")  # transformers has no such layers, and shall not take the encoder alone
    assert status == 0, said
    try:
        AutoModel.from_pretrained(folder)
    except ValueError as error:
        assert "bert_with_pal" in str(error)
    else:
        raise AssertionError("the encoder was taken for the whole")


# ---------------------------------------------------------------- optimizer.py

def test_adamw_is_the_written_out_formula():
    torch.manual_seed(3)
    for correct_bias, weight_decay in itertools.product((True, False), (0.0, 0.1)):
        parameter = nn.Parameter(torch.randn(300, dtype=torch.float64))
        theta, m, v = parameter.detach().clone(), 0, 0
        optimizer = AdamW([parameter], lr=1e-2, weight_decay=weight_decay, correct_bias=correct_bias)
        for t in range(1, 1001):
            g = torch.randn(len(theta), dtype=torch.float64)
            parameter.grad = g.clone()
            optimizer.step()
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            a = 1e-2 * math.sqrt(1 - 0.999 ** t) / (1 - 0.9 ** t) if correct_bias else 1e-2
            theta = theta - a * m / (v.sqrt() + 1e-6)
            theta = theta - 1e-2 * weight_decay * theta
        assert (parameter - theta).abs().max() < 1e-12


def test_adamw_works_in_chunks():
    """A parameter longer than a chunk, and one whose memory is not contiguous, move like their numbers one by one."""
    torch.manual_seed(3)
    long, turned = nn.Parameter(torch.randn(CHUNK + 1000)), nn.Parameter(torch.randn(4, 6).t())
    for parameter in (long, turned):
        g = torch.randn(parameter.shape)
        expected = parameter.detach() - 0.1 * math.sqrt(0.001) / 0.1 * 0.1 * g / ((0.001 * g * g).sqrt() + 1e-6)
        parameter.grad = g
        AdamW([parameter], lr=0.1).step()
        assert (parameter - expected).abs().max() < 1e-5


def test_adamw_equals_torch_where_both_are_the_same_step():
    """Weight decay 0, torch's eps = eps / sqrt(1 - b2^t)."""
    torch.manual_seed(4)
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 50, dtype=torch.float64)) for _ in range(2))
    optimizer, peer = AdamW([ours], lr=1e-2), torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.0)
    for t in range(1, 101):
        ours.grad = torch.randn(50, dtype=torch.float64)
        theirs.grad = ours.grad.clone()
        peer.param_groups[0]["eps"] = 1e-6 / math.sqrt(1 - 0.999 ** t)
        optimizer.step()
        peer.step()
    assert (ours - theirs).abs().max() < 1e-12


def test_adamw_leaves_a_parameter_without_gradient_alone():
    moved, idle = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = AdamW([moved, idle], lr=0.1, weight_decay=0.1)
    for parameter in (moved, idle):
        parameter.grad = torch.ones(3)
    optimizer.step()
    before = [torch.as_tensor(x).clone() for x in (idle.detach(), *optimizer.state[idle].values())]
    idle.grad = None
    optimizer.step()
    after = [torch.as_tensor(x) for x in (idle.detach(), *optimizer.state[idle].values())]
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    assert optimizer.state[moved]["step"] == 2
    raises(ValueError, "invalid lr", AdamW, [moved], lr=-1.0)


def test_learning_rate_rises_and_falls():
    assert [learning_rate(2.0, progress, 0.25) for progress in (0, 0.125, 0.25, 0.625, 1)] == [0, 1, 2, 1, 0]
    assert learning_rate(2.0, 0.9, 0.25, "constant") == learning_rate(2.0, 0, 0, "constant") == 2


def test_adamw_state_survives_saving():
    def build():
        torch.manual_seed(5)
        parameters = [nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(4, 6).t())]  # one not contiguous
        return parameters, AdamW([{"params": parameters[:1], "weight_decay": 0.1}, {"params": parameters[1:]}], lr=0.1)

    def steps(parameters, optimizer, seeds):
        for seed in seeds:
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            optimizer.step()

    whole, optimizer = build()
    steps(whole, optimizer, range(6))
    parameters, optimizer = build()
    steps(parameters, optimizer, range(3))
    buffer = io.BytesIO()
    torch.save((optimizer.state_dict(), [p.data for p in parameters]), buffer)
    buffer.seek(0)
    state, values = torch.load(buffer, weights_only=True)
    parameters, optimizer = build()
    optimizer.load_state_dict(state)
    for parameter, value in zip(parameters, values):
        parameter.data.copy_(value)
    steps(parameters, optimizer, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole, parameters))


# ---------------------------------------------------------------- pcgrad.py

def double_loop(gradients, seed, change):
    """The sum of the g_i after change(i, j, g_i', g_j) for every other j: both papers' algorithm, on whole vectors."""
    shuffle = random.Random(seed).shuffle
    update = torch.zeros_like(gradients[0])
    for i in range(len(gradients)):
        g = gradients[i].clone()
        others = [j for j in range(len(gradients)) if j != i]
        shuffle(others)
        for j in others:
            g = change(i, j, g, gradients[j])
        update = update + g
    return update


def pcgrad_reference(gradients, seed):
    """Yu et al. 2020."""
    return double_loop(gradients, seed, lambda i, j, g, other: g - (g @ other) / (other @ other) * other
                       if g @ other < 0 else g)


def buffered_update(gradients, surgery="pcgrad", seed=0, scope="vector", targets=None):
    """The update that GradientBuffer makes of given gradients: the loss of task i is g_i . theta. Moves targets."""
    sizes = [3, len(gradients[0]) - 3]
    shared = [nn.Parameter(torch.randn(size)) for size in sizes]
    tasks = [f"task{i}" for i in range(len(gradients))]
    buffer = pcgrad.GradientBuffer(shared, dict.fromkeys(tasks, ()), surgery, scope=scope)
    buffer.targets = buffer.targets if targets is None else targets
    buffer.zero()
    for task, g in zip(tasks, gradients):
        buffer.backward(task, sum((p * piece).sum() for p, piece in zip(shared, g.split(sizes))))
    J = buffer.J.double()
    buffer.combine(seed)
    assert not surgery or (buffer.gram - J @ J.T).abs().max() <= 1e-5 * (J @ J.T).abs().max()
    return torch.cat([p.grad for p in shared])


def test_pcgrad_agrees_with_a_double_loop():
    generator = torch.Generator().manual_seed(6)
    for K, case in itertools.product(range(2, 7), range(100)):
        gradients = torch.randn(K, 12, generator=generator) * 10 ** torch.randn(K, 1, generator=generator)
        ours = buffered_update(gradients, seed=case)
        expected = pcgrad_reference(gradients.double(), seed=case)
        assert (ours - expected).norm() < 1e-5 * gradients.norm(), (K, case)


def test_pcgrad_leaves_no_conflict_between_two():
    g = torch.tensor([[2.0, 1.0, -3.0, 1.0], [-1.0, 0.5, 1.0, 2.0]])
    projected = pcgrad.pcgrad(pcgrad.gram_matrix(g), seed=0).float() @ g
    assert g[0] @ g[1] < 0 and abs(projected[0] @ g[1]) < 1e-5 and abs(projected[1] @ g[0]) < 1e-5


def test_gram_matrices_add_up_over_blocks():
    """On the CPU and off it, with a last block that is not full; products of 10,000 numbers."""
    J = torch.randn(3, 10_000, generator=torch.Generator().manual_seed(18)) + 1
    expected = J.double() @ J.double().T
    for block in (1000, 3000, 1 << 20):
        with mock.patch.object(pcgrad, "BLOCK", block):
            for gram in (pcgrad.gram_matrix(J), pcgrad.gram_matrix_on_gpu(J)):
                assert gram.dtype == torch.float64 and gram.device.type == "cpu"
                assert (gram - expected).abs().max() < 1e-5 * expected.max(), block


def test_pcgrad_without_conflict_is_the_plain_sum():
    g = torch.rand(4, 9)  # all products positive
    assert torch.equal(buffered_update(g), buffered_update(g, surgery=None))
    assert torch.equal(buffered_update(g), g[0] + g[1] + g[2] + g[3])


def test_pcgrad_works_on_the_whole_vector():
    """By tensor (the first three numbers, the last two) the first pieces conflict; as a whole nothing does."""
    g = torch.tensor([[1.0, 1.0, 0.0, 5.0, 5.0], [-1.0, 0.0, 0.0, 5.0, 5.0]])
    assert torch.equal(buffered_update(g), g.sum(0))
    by_tensor = buffered_update(g, scope="tensor")
    assert (by_tensor[:3] - pcgrad_reference(g[:, :3], 0)).abs().max() < 1e-6 and torch.equal(by_tensor[3:], g.sum(0)[3:])
    assert not torch.equal(by_tensor, g.sum(0))


def test_pcgrad_order_is_drawn_for_each_task():
    """Three tasks: other seeds, other orders, for each task its own; equal seeds, equal updates."""
    g = torch.tensor([[1.0, 0.2, 0.0], [-1.0, 1.0, 0.3], [-0.5, -1.0, 1.0]])
    W = [pcgrad.pcgrad(pcgrad.gram_matrix(g), seed) for seed in range(40)]
    assert torch.equal(W[0], pcgrad.pcgrad(pcgrad.gram_matrix(g), 0))
    patterns = {tuple(tuple(round(x, 6) for x in row) for row in w.tolist()) for w in W}
    assert len(patterns) == 8, "one order shuffled for all tasks gives only six"


def test_pcgrad_of_a_zero_gradient():
    g = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0], [-1.0, -2.0, 1.0, 0.0]])
    update = buffered_update(g)
    assert update.isfinite().all() and (update - pcgrad_reference(g[[0, 2]].double(), 0)).abs().max() < 1e-5


def test_the_gram_matrix_is_exact_to_four_digits():
    """Relative to the norms, for gradients as long as a small encoder's: also where two are nearly antiparallel and their
    length is odd, which float32 sums least well."""
    generator = torch.Generator().manual_seed(14)
    for P in (3_000_001, 3 << 20):
        first, noise, other = torch.randn(3, P, generator=generator)
        J = torch.stack([first, 1e-4 * noise - first, other])
        exact = J.double() @ J.double().T
        norms = exact.diagonal().sqrt()
        assert ((pcgrad.gram_matrix(J) - exact) / (norms[:, None] * norms)).abs().max() < 1e-4


def vaccine_reference(gradients, targets, seed, beta=0.01):
    """Wang et al. 2021. Moves targets in place."""
    def change(i, j, g, other):
        phi, target = F.cosine_similarity(g, other, dim=0), targets[i, j].clone()
        targets[i, j] = (1 - beta) * target + beta * phi
        if phi >= target:
            return g
        factor = g.norm() * (target * (1 - phi ** 2).sqrt() - phi * (1 - target ** 2).sqrt())
        return g + factor / (other.norm() * (1 - target ** 2).sqrt()) * other

    return double_loop(gradients, seed, change)


def test_vaccine_agrees_with_a_double_loop():
    """Over 20 steps, so that the targets have moved; targets too."""
    generator = torch.Generator().manual_seed(10)
    for K, case in itertools.product(range(2, 7), range(5)):
        ours, theirs = torch.zeros(K, K, dtype=torch.float64), torch.zeros(K, K, dtype=torch.float64)
        drift = torch.randn(12, generator=generator) * (case - 2)  # from mostly opposed to mostly alike
        for step in range(20):
            g = (torch.randn(K, 12, generator=generator) + drift).double()
            W = pcgrad.vaccine(g @ g.T, ours, seed=step)
            expected = vaccine_reference(g, theirs, seed=step)
            assert ((W @ g).sum(0) - expected).norm() < 1e-8 * g.norm() and (ours - theirs).abs().max() < 1e-9, (K, case)


def test_vaccine_through_the_buffer():
    generator = torch.Generator().manual_seed(11)
    for K, case, scope in itertools.product(range(2, 7), range(100), ("vector", "tensor")):
        g = torch.randn(K, 12, generator=generator) * 10 ** torch.randn(K, 1, generator=generator)
        pieces = [g] if scope == "vector" else [g[:, :3], g[:, 3:]]
        ours = torch.rand(len(pieces), K, K, generator=generator, dtype=torch.float64) * 1.8 - 0.9
        theirs = ours.clone()
        update = buffered_update(g, "gradvac", case, scope, ours)
        expected = torch.cat([vaccine_reference(p.double(), t, case) for p, t in zip(pieces, theirs)])
        assert (update - expected).norm() < 1e-3 * max(expected.norm(), g.norm()), (K, case, scope)
        assert (ours - theirs).abs().max() < 1e-5, (K, case, scope)
    # the targets start at 0, one of each pair for each tensor
    expected = torch.cat([vaccine_reference(p.double(), torch.zeros(6, 6).double(), 0)
                          for p in (g[:, :3], g[:, 3:])])
    assert (buffered_update(g, "gradvac", 0, "tensor") - expected).norm() < 1e-3 * g.norm()


def test_vaccine_reaches_its_target():
    g = torch.tensor([[1.0, 0.0, 0.0], [-0.3, 1.0, 0.2]], dtype=torch.float64)
    targets = torch.tensor([[0.0, 0.4], [0.4, 0.0]], dtype=torch.float64)
    before = targets.clone()
    changed = pcgrad.vaccine(g @ g.T, targets, seed=0) @ g
    for i, j in ((0, 1), (1, 0)):
        phi = F.cosine_similarity(g[0], g[1], dim=0)
        assert abs(F.cosine_similarity(changed[i], g[j], dim=0) - 0.4) < 1e-9
        assert abs(targets[i, j] - (0.99 * before[i, j] + 0.01 * phi)) < 1e-12
    above = torch.full((2, 2), -0.9, dtype=torch.float64)  # the target moves up too, when no change is made
    assert torch.equal(pcgrad.vaccine(g @ g.T, above, seed=0), torch.eye(2, dtype=torch.float64)) and above[0, 1] > -0.9


def test_vaccine_with_targets_held_at_zero_is_pcgrad():
    generator = torch.Generator().manual_seed(12)
    for case in range(50):
        g = torch.randn(4, 9, generator=generator).double()
        W = pcgrad.vaccine(g @ g.T, torch.zeros(4, 4, dtype=torch.float64), seed=case, beta=0.0)
        assert (W - pcgrad.pcgrad(g @ g.T, case)).abs().max() < 1e-9


def test_vaccine_of_parallel_and_opposed_gradients_is_finite():
    a, b = torch.randn(2, 10000, generator=torch.Generator().manual_seed(13))
    for rows in ([a, a], [a, -a], [a, -a, a], [a, 0 * a], [a, -(1 + 1e-6) * a], [a, -a + 1e-4 * b]):
        g = torch.stack(rows)
        for target in (-0.5, 0.0, 0.999, 1.0):
            targets = torch.full((len(g), len(g)), target, dtype=torch.float64)
            W = pcgrad.vaccine(pcgrad.gram_matrix(g), targets, seed=0)
            assert W.isfinite().all() and targets.abs().max() <= 1
            assert target == 1.0 or (W.float() @ g).norm() < 10 * g.norm()


def test_groups_share_a_row():
    shared = [nn.Parameter(torch.zeros(3))]
    g = torch.tensor([[1.0, 0.0, 1.0], [0.0, 2.0, 0.0], [-1.0, -3.0, 0.5]])
    tasks = ["sst", "para", "yelp"]
    buffer = pcgrad.GradientBuffer(shared, dict.fromkeys(tasks, ()), "pcgrad", [["sst", "para"], ["yelp"]])
    for task, gradient in zip(tasks, g):
        buffer.backward(task, (shared[0] * gradient).sum())
    buffer.combine(0)
    expected = pcgrad_reference(torch.stack([g[0] + g[1], g[2]]), 0)
    assert (shared[0].grad - expected).abs().max() < 1e-6 and not torch.equal(expected, g.sum(0))


def test_gradient_diagnostics():
    g = torch.tensor([[3.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, 0.0]])
    found = pcgrad.diagnostics(pcgrad.gram_matrix(g), ["a", "b", "c", "d"])
    assert found["norm"] == {"a": 3, "b": 1, "c": 1, "d": 0} and found["cosine"] == {"a-b": 0, "a-c": -1, "b-c": 0}
    assert found["conflict"] == {"a-b": 0, "a-c": 1, "b-c": 0}
    assert abs(found["magnitude_similarity"]["a-b"] - 0.6) < 1e-9 and found["magnitude_similarity"]["b-c"] == 1


def heads_of(model):
    return {task: list(head.parameters()) for task, head in model.heads.items()}


def three_task_model(**kwargs):
    """A tiny model of three tasks, in train mode, and their tokenised demo examples."""
    root = workspace()
    torch.manual_seed(7)
    pair_head = {"para": "cross", "sts": "cross", **kwargs.pop("pair_head", {})}
    model = MultitaskBERT(BertModel.from_pretrained(root / "tiny"), {task: TASKS[task] for task in ("sst", "para", "sts")},
                          pair_head, kwargs.pop("pooling", "mean"), 0.0, **kwargs)
    tokenizer = load_tokenizer(root / "tiny")
    examples = {name: tokenize(read_examples(root / "data" / TASKS[name].filename("train"), TASKS[name]), tokenizer, 64,
                               pair_head.get(name) == "cross") for name in ("sst", "para", "sts")}
    return model.train(), examples


def test_heads_keep_their_own_gradient_and_idle_ones_none():
    model, examples = three_task_model()
    shared = model.shared_parameters()
    buffer = pcgrad.GradientBuffer(shared, heads_of(model), "pcgrad")
    for tasks in (["sst", "para", "sts"], ["sst"]):
        buffer.zero()
        expected = {}
        for task in tasks:
            torch.manual_seed(8)
            loss = model.loss(task, collate(examples[task], np.arange(4)))
            expected[task] = torch.autograd.grad(loss, list(model.heads[task].parameters()))
            torch.manual_seed(8)
            buffer.backward(task, model.loss(task, collate(examples[task], np.arange(4))))
        buffer.combine(0)
        for task, head in model.heads.items():
            for parameter, gradient in zip(head.parameters(), expected.get(task, [None, None])):
                assert parameter.grad is None if gradient is None else torch.equal(parameter.grad, gradient)
    assert model.bert.pooler_dense.weight.grad is None  # mean pooling: no task reaches the pooler


def test_sparse_embedding_gradients_are_the_dense_bits():
    rows = []
    for sparse in (False, True):
        model, examples = three_task_model()
        model.bert.embed_dropout.p = 0.0
        model.bert.word_embedding.sparse = sparse
        buffer = pcgrad.GradientBuffer(model.shared_parameters(), heads_of(model), "pcgrad")
        for task in ("sst", "para"):
            torch.manual_seed(9)
            buffer.backward(task, model.loss(task, collate(examples[task], np.arange(8))))
        rows.append(buffer.J[:2].clone())
    assert rows[0].abs().sum(1).min() > 0 and torch.equal(*rows)


def test_embedding_gradients_are_dense_on_an_apple_gpu():
    """There torch has no sparse tensors."""
    for device in ("cpu", "cuda", "mps"):
        embedding = mock.Mock(weight=mock.Mock(device=torch.device(device)))
        pcgrad.use_sparse_gradient(embedding)
        assert embedding.sparse == (device != "mps"), device


def test_timings_wait_for_the_gpu():
    for device in ("cuda", "mps"):  # the function returns at once, and what it started takes 10 ms
        module = torch.get_device_module(device)
        with mock.patch.object(module, "synchronize", lambda: time.sleep(0.01)):
            assert median_times({"kernel": lambda i: None}, 3, device)["kernel"] >= 0.01, device
    assert median_times({"nothing": lambda i: None}, 3, "cpu")["nothing"] < 0.01


# ---------------------------------------------------------------- smart.py

KINDS = {"sst": "classes", "para": "binary", "sts": "similarity"}
ENCODINGS = ({"para": "cross", "sts": "cross"}, {"para": "uv_diff", "sts": "cosine"})


def smart_setting(pair_head, rows=6, **kwargs):
    """(model in train mode with dropout in encoder and heads, {task: batch}, {task: logits of seed 5})."""
    model, examples = three_task_model(pair_head=pair_head, **kwargs)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
    for head in model.heads.values():  # away from the small start, so that outputs depend on the sentence
        for parameter in head.parameters():
            parameter.data.mul_(10)
    batches = {task: collate(examples[task], np.arange(rows)) for task in KINDS}
    logits = {}
    for task, batch in batches.items():
        torch.manual_seed(5)
        logits[task] = model.logits(task, batch)
    return model, batches, logits


def test_divergences_are_the_papers():
    torch.manual_seed(11)
    a, b = 3 * torch.randn(2, 40, 5, dtype=torch.float64)
    p, q = (torch.distributions.Categorical(logits=x) for x in (a, b))
    kl = torch.distributions.kl_divergence
    assert (smart.divergence("classes", a, b) - kl(p, q) - kl(q, p)).abs().max() < 1e-12
    a, b = a[:, :1], b[:, :1]
    p, q = (torch.distributions.Bernoulli(logits=x.squeeze(-1)) for x in (a, b))
    assert (smart.divergence("binary", a, b) - kl(p, q) - kl(q, p)).abs().max() < 1e-12  # no softmax over one logit
    assert torch.equal(smart.divergence("similarity", a, b), (a - b).squeeze(-1) ** 2)
    for kind in KINDS.values():
        for shapes in (((4, 1), (4,)), ((4,), (4,)), ((4, 5), (4, 1))):
            raises(ValueError, "should be (B, C)", smart.divergence, kind, *map(torch.zeros, shapes))
    # float32 still resolves what a perturbation of the paper's size leaves
    a = torch.tensor([[2.0, -1.0, 0.5, 0.0, 1.0]])
    b = a + 1e-5 * torch.tensor([[1.0, -1, 1, -1, 0]])
    exact = smart.divergence("classes", a.double(), b.double())
    assert abs(smart.divergence("classes", a, b) / exact - 1) < 0.05 and exact < 1e-9


def test_smoothness_compares_passes_with_the_same_dropout():
    for pair_head in ENCODINGS:
        model, batches, logits = smart_setting(pair_head)
        for task, batch in batches.items():
            none = smart.Smoothness(KINDS, eps=0.0)
            assert none(model, task, batch, logits[task], seed=5) == 0, "the same masks and nothing moved"
            assert none(model, task, batch, logits[task], seed=6) > 1e-4, "other masks"
            assert smart.Proximal(model, KINDS)(model, task, batch, logits[task], seed=5) == 0
            assert smart.Proximal(model, KINDS)(model, task, batch, logits[task], seed=6) > 1e-4
            seeds, forward = [], model.logits
            with mock.patch.object(model, "logits", lambda *args: seeds.append(torch.initial_seed()) or forward(*args)):
                smart.Smoothness(KINDS, steps=2)(model, task, batch, logits[task], seed=5)
            assert seeds == [5, 5, 5], "the passes of the ascent too"


def test_the_perturbation_stays_in_its_ball():
    for pair_head, norm, eps in itertools.product(ENCODINGS, ("inf", "2"), (1e-5, 0.1)):
        model, batches, logits = smart_setting(pair_head)
        for task, batch in batches.items():
            smoothness = smart.Smoothness(KINDS, eps=eps, sigma=eps, step=100 * eps, steps=2, norm=norm)
            perturbation = smoothness.ascend(model, task, batch, logits[task], seed=5)
            assert perturbation.shape == (*batch.attention_mask.shape, 16)
            assert (perturbation[batch.attention_mask == 0] == 0).all() and (batch.attention_mask == 0).any()
            assert not perturbation.requires_grad
            moved = perturbation[batch.attention_mask == 1]
            assert (moved != 0).float().mean() > 0.9
            sizes = (moved.abs() if norm == "inf" else  # both sentences of a pair in one ball
                     perturbation.unflatten(0, (-1, len(batch.labels))).square().sum(dim=(0, 2, 3)).sqrt())
            assert eps * 0.999 < sizes.max() <= eps * (1 + 1e-6)


def test_the_ascent_is_algorithm_1():
    """Against the algorithm written out for one example at a time; a pair that is encoded apart is one example."""
    for pair_head, norm in itertools.product(ENCODINGS, ("inf", "2")):
        model, batches, logits = smart_setting(pair_head, rows=3)
        model.double()
        for task, batch in batches.items():
            smoothness = smart.Smoothness(KINDS, eps=2e-2, sigma=1e-2, step=1e-2, steps=2, norm=norm)
            torch.manual_seed(5)
            clean = model.logits(task, batch).detach()
            torch.manual_seed(12)
            found = smoothness.ascend(model, task, batch, clean, seed=5)
            torch.manual_seed(12)
            noise = 1e-2 * torch.randn(*batch.attention_mask.shape, 16) * batch.attention_mask[..., None]
            for row in range(3):
                own = torch.arange(row, len(noise), 3)
                delta = noise[own].double()
                for _ in range(2):
                    delta.requires_grad_()
                    whole = torch.zeros(len(noise), *delta.shape[1:], dtype=torch.float64).index_copy(0, own, delta)
                    torch.manual_seed(5)  # of the dropout masks, which every pass shares
                    moved = smart.divergence(KINDS[task], model.logits(task, batch, whole), clean)[row]
                    gradient, = torch.autograd.grad(moved, delta)
                    delta = delta.detach() + 1e-2 * gradient / torch.linalg.vector_norm(gradient.flatten(), float(norm))
                    if norm == "inf":
                        delta = delta.clamp(-2e-2, 2e-2)
                    else:
                        delta = delta * min(1.0, 2e-2 / float(delta.norm()))
                assert (found[own] - delta).abs().max() < 1e-8


def test_ascent_beats_noise_of_its_size():
    for pair_head in ENCODINGS:
        model, batches, logits = smart_setting(pair_head)
        smoothness, ratios = smart.Smoothness(KINDS, weight=1.0, eps=1e-2, sigma=1e-2, step=1.0), []
        for task, batch in batches.items():
            for i in range(10):
                torch.manual_seed(i)
                ascent = smoothness.ascend(model, task, batch, logits[task], seed=5)
                noise = 1e-2 * torch.randn_like(ascent).sign() * batch.attention_mask[..., None]
                found = [smoothness.divergences(model, task, batch, logits[task], 5, delta).mean() for delta in (ascent, noise)]
                ratios.append(float(found[0] / found[1]))
        assert min(ratios) > 1 and np.median(ratios) > 2, ratios


def test_smoothness_reaches_the_encoder_and_the_ascent_does_not():
    for pair_head in ENCODINGS:
        model, batches, logits = smart_setting(pair_head)
        smoothness = smart.Smoothness(KINDS, eps=0.1, step=1.0)
        for task, batch in batches.items():
            smoothness.ascend(model, task, batch, logits[task], seed=5)
            assert all(p.grad is None for p in model.parameters())
            smoothness(model, task, batch, logits[task], seed=5).backward()
            for name in ("word_embedding.weight", "bert_layers.0.self_attention.query.weight", "bert_layers.1.out_dense.bias"):
                assert model.bert.get_parameter(name).grad.abs().sum() > 0
            assert sum(p.grad.abs().sum() for p in model.heads[task].parameters()) > 0 or pair_head.get(task) == "cosine"
            model.zero_grad()


def test_smoothness_gradient_is_that_of_its_formula():
    """Central differences in float64, along random directions, of KL(p || q) + KL(q || p) or (p - q)^2 as written in the
    paper, with the perturbation held."""
    def formula(kind, a, b):
        if kind == "similarity":
            return (a - b).square().mean()
        family = torch.distributions.Categorical if kind == "classes" else torch.distributions.Bernoulli
        p, q = (family(logits=x if kind == "classes" else x.squeeze(-1)) for x in (a, b))
        return (torch.distributions.kl_divergence(p, q) + torch.distributions.kl_divergence(q, p)).mean()

    for pair_head in ENCODINGS:
        model, batches, _ = smart_setting(pair_head)
        model.double()
        smoothness = smart.Smoothness(KINDS, weight=3.0, eps=0.3, step=1.0)
        for task, batch in batches.items():
            def clean():
                torch.manual_seed(5)
                return model.logits(task, batch)

            held = smoothness.ascend(model, task, batch, clean(), seed=5)
            with mock.patch.object(smoothness, "ascend", lambda *args: held):
                value = smoothness(model, task, batch, clean(), seed=5)
            parameters = [p for name, p in model.named_parameters() if "pooler" not in name
                          and not (name.startswith("heads.") and not name.startswith(f"heads.{task}."))]
            gradient = torch.autograd.grad(value, parameters, allow_unused=True)

            def at(shift):
                with torch.no_grad():
                    for p, v in zip(parameters, direction):
                        p.add_(v, alpha=shift)
                    torch.manual_seed(5)
                    moved = model.logits(task, batch, held)
                    result = 3.0 * formula(KINDS[task], moved, clean())
                    for p, v in zip(parameters, direction):
                        p.sub_(v, alpha=shift)
                return float(result)

            torch.manual_seed(13)
            direction = [torch.randn_like(p) * (g is not None) for p, g in zip(parameters, gradient)]
            assert abs(at(0.0) - value) < 1e-10 * value
            slope = sum(float((g * v).sum()) for g, v in zip(gradient, direction) if g is not None)
            assert abs((at(1e-6) - at(-1e-6)) / 2e-6 - slope) < 1e-5 * abs(slope) + 1e-6, (task, slope)


def test_smoothness_does_not_depend_on_the_batch():
    """With the same noise for each example: a batch twice, or in another order, has the same R."""
    for pair_head in ENCODINGS:
        model, _, _ = smart_setting(pair_head)
        model.double().eval()
        _, examples = three_task_model(pair_head=pair_head)
        smoothness = smart.Smoothness(KINDS, eps=1e-2, sigma=1e-2, step=1e-2)
        for task in KINDS:
            def R(rows):
                batch = collate(examples[task], np.array(rows))
                S, L = batch.attention_mask.shape
                noise = torch.zeros(S, L, 16)
                for s in range(S):
                    generator = torch.Generator().manual_seed(100 * rows[s % len(rows)] + s // len(rows))
                    noise[s] = torch.randn(64, 16, generator=generator)[:L]
                with mock.patch.object(torch, "randn", lambda *shape, **kwargs: noise):
                    return float(smoothness(model, task, batch, model.logits(task, batch), seed=5).detach())

            assert R([0, 1, 2, 3]) > 0
            for rows in ([0, 1, 2, 3] * 2, [2, 0, 3, 1]):
                assert abs(R(rows) / R([0, 1, 2, 3]) - 1) < 1e-9


def test_the_teacher_is_a_running_average():
    for beta, betas in ((0.95, [0.95] * 20), (None, [0.99] * 2 + [0.999] * 18)):
        model, batches, _ = smart_setting(ENCODINGS[0])
        proximal = smart.Proximal(model, KINDS, beta=beta)
        pairs = list(zip(proximal.teacher.parameters(), model.parameters()))
        assert all(a.data_ptr() != b.data_ptr() and torch.equal(a, b) and not a.requires_grad for a, b in pairs)
        expected = [p.detach().double() for p in model.parameters()]
        for n, b in enumerate(betas, start=1):
            for p in model.parameters():
                p.data.add_(torch.randn_like(p), alpha=0.1)
            proximal.update(model, n / 20)
            expected = [b * x + (1 - b) * p.detach().double() for x, p in zip(expected, model.parameters())]
        assert all((a - x).abs().max() < 1e-5 for a, x in zip(proximal.teacher.parameters(), expected))
        for task, batch in batches.items():
            torch.manual_seed(5)
            logits = model.logits(task, batch)
            torch.manual_seed(5)
            target = proximal.teacher.logits(task, batch).detach()
            value = proximal(model, task, batch, logits, seed=5)
            assert value > 0 and torch.equal(value, smart.divergence(KINDS[task], logits, target).mean())
            value.backward()
        assert model.bert.word_embedding.weight.grad.abs().sum() > 0
        assert all(p.grad is None for p in proximal.teacher.parameters())


def test_regularisers_in_training():
    """With every schedule, head and surgery; weight 0 gives the bits of a run without; dropped or kept is not the same."""
    strong = "--smart", "weight=50,eps=1,step=1"
    for flags in ([], ["--pair_head", "para=uv_diff,sts=cosine", "--schedule", "mixed", "--pcgrad"],
                  ["--pair_head", "cross", "--schedule", "sequential"], ["--accumulate", 2, "--gradvac", "--pooling", "cls"]):
        base = trained(*flags, steps=3)
        assert same(base, trained(*flags, "--smart", "weight=0,eps=1,step=1", "--proximal", "mu=0", steps=3)), flags
        found = [base, trained(*flags, *strong, steps=3), trained(*flags, "--proximal", "mu=50", steps=3),
                 trained(*flags, *strong, "--proximal", "mu=50,beta=.5", steps=3)]
        assert not any(same(a, b) for a, b in itertools.combinations(found, 2)), flags
    base = trained(*strong, steps=3)
    for setting in ("weight=5,eps=1,step=1", "weight=50,eps=.5,step=1", "weight=50,eps=1,step=.5",
                    *(f"{strong[1]},{other}" for other in ("sigma=.5", "steps=2", "norm=2", "tasks=sst+sts"))):
        assert not same(base, trained("--smart", setting, steps=3)), setting
    assert not same(*(trained("--proximal", text, steps=3) for text in ("mu=9", "mu=9,beta=.5")))
    frozen = trained(*strong, "--proximal", option="pretrain", steps=3)
    assert not same(frozen, trained(option="pretrain", steps=3))
    status, said, folder = run(*strong, "--proximal", "mu=.8,beta=.95", steps=12)
    lines = read_metrics(folder, "step")
    assert status == 0 and len(lines) == 2
    for line in lines:
        assert set(line["regularisers"]) == {f"{task} {name}" for task in KINDS for name in ("smart", "proximal")}
        assert all(value > 0 for value in line["regularisers"].values()), line
    _, _, still = run("--smart", "eps=0", "--proximal", "--lr", 0, steps=2)  # nothing moves, and the masks are the same
    assert set(read_metrics(still, "step")[0]["regularisers"].values()) == {0.0}
    _, _, followed = run("--smart", "eps=0", "--proximal", "beta=0", steps=12)  # the teacher is the model after each step
    assert all(set(line["regularisers"].values()) == {0.0} for line in read_metrics(followed, "step"))
    seen = []

    class Recorder(smart.Proximal):
        def update(self, model, progress):
            seen.append(progress)
            super().update(model, progress)

    with mock.patch.object(multitask_classifier, "Proximal", Recorder):
        assert run("--proximal", "--accumulate", 3, "--epochs", 2, steps=7)[0] == 0
        assert seen == [n / 6 for n in range(1, 7)], "once after each optimizer step"
        seen.clear()
        assert run("--proximal", "--optimizer_per_task", "--schedule", "mtdnn", steps=6)[0] == 0
    assert seen == [n / 6 for n in range(1, 7)], "whichever task's optimizer it is"
    last = torch.load(folder / "last.pt", weights_only=True)
    assert not torch.equal(last["teacher"]["bert.pos_embedding.weight"], last["model"]["bert.pos_embedding.weight"])


def test_regularisers_are_added_to_the_loss():
    training = training_of("--smart", "tasks=sst+sts", "--proximal", "mu=2")
    assert training.proximal.kinds == KINDS
    assert training.regularisers["smart"].kinds == {task: KINDS[task] for task in ("sst", "sts")}
    for term, value in ((smart.Smoothness, 3.0), (smart.Proximal, 5.0)):
        mock.patch.object(term, "__call__", lambda *args, value=value: torch.tensor(value)).start()
    try:
        for task, added in (("sst", 8), ("para", 5), ("sts", 8)):
            batch = collate(training.data[task]["train"], np.arange(6))
            torch.manual_seed(23)
            alone = training.model.loss(task, batch)
            assert abs(training.loss(task, batch, 23) - alone - added) < 1e-5, task
    finally:
        mock.patch.stopall()
    means, _ = training.meter.read()
    assert (means["sst smart"], means["sst proximal"], means["para proximal"]) == (3, 5, 5)


def test_smoothness_goes_down_when_it_is_asked_to():
    """Thirty steps on R alone of one batch: what is added to the loss is what its gradient lowers."""
    for pair_head in ENCODINGS:
        model, batches, _ = smart_setting(pair_head)
        smoothness, optimizer = smart.Smoothness(KINDS, weight=1.0, eps=0.1, step=1.0), AdamW(model.parameters(), lr=1e-2)
        values = []
        for _ in range(30):
            optimizer.zero_grad()
            values.append(0)
            for task, batch in batches.items():
                torch.manual_seed(5)
                R = smoothness(model, task, batch, model.logits(task, batch), seed=5)
                R.backward()
                values[-1] += float(R)
            optimizer.step()
        assert values[-1] < 0.1 * values[0], values


# ---------------------------------------------------------------- data/

def write(name, text):
    path = Path(tempfile.mkdtemp(dir=workspace())) / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_demo_sets_are_whole():
    for task, least in (("sst", (160, 40, 40)), ("para", (160, 40, 40)), ("sts", (160, 40, 40)), ("cfimdb", (20, 1, 1))):
        seen = {}
        for split, rows in zip(("train", "dev", "test"), least):
            examples = read_examples(DEMO / TASKS[task].filename(split), TASKS[task], labelled=split != "test")
            assert len(examples) >= rows and not examples.malformed
            assert len(set(examples.ids)) == len(examples)
            for text in itertools.chain(*examples.texts):
                assert seen.setdefault(text.lower(), split) == split, f"in {seen[text.lower()]} and {split}: {text}"
            if examples.labels is not None and task != "sts":
                assert np.bincount(examples.labels.astype(int)).min() >= 0.9 * len(examples) / (TASKS[task].top + 1)
    assert len(read_examples(DEMO / "stars-train.csv", TASKS["sst"])) == 20


def test_reading_counts_and_names_malformed_rows():
    def rows(n, extra=""):
        return "\tid\tsentence\tsentiment\n" + "".join(f"{i}\tx{i}\t film {i}\t{i % 5}\n" for i in range(n)) + extra

    with contextlib.redirect_stdout(io.StringIO()) as said:
        examples = read_examples(write("a.csv", rows(200, "200\tx\tgood\t7\n201\ty\tgood\tbad\n")), TASKS["sst"])
    assert len(examples) == 200 and examples.labels[6] == 1 and examples.texts[3] == ("film 3",)
    assert ("left out 2 malformed of 202 rows: line 202: sentiment 7 is outside 0..4; line 203: sentiment 'bad'"
            in said.getvalue())
    few = write("b.csv", rows(20, "20\tx\tgood\n21\ty\t \t1\n22\tz\tgood\t1.5\n23\tz\tgood\tnan\n"))
    raises(InputError, "4 of 24 rows are malformed: line 22: 3 fields where the header has 4",
           read_examples, few, TASKS["sst"])
    with contextlib.redirect_stdout(io.StringIO()):
        assert len(read_examples(few, TASKS["sst"], skip_malformed=True)) == 20
    for text, part in ((rows(3).replace("sentiment", "label"), "no column 'sentiment'"), ("", "the file is empty"),
                       (rows(0), "no rows"),
                       (b"\tid\tsentence\tsentiment\n0\tx\t\xff\t1\n", "line 2: byte 0xff is not UTF-8"),
                       (rows(9).replace(" film 3", '"film 3'), "row that starts in line 5"),
                       (rows(9).replace(" film 3", '"film" 3'), "row that starts in line 5"),
                       (rows(9).replace(" film 3", '"film 3').replace("film 6\t1", 'film 6"\t1'),
                        "quote opened in line 5")):
        raises(InputError, part, read_examples, write("c.csv", text), TASKS["sst"])
    raises(InputError, "no such file", read_examples, Path("nowhere.csv"), TASKS["sst"])
    with contextlib.redirect_stdout(io.StringIO()) as said:
        plain = read_examples(write("d.csv", rows(9)), TASKS["sst"])
        for variant in ("\ufeff" + rows(9), rows(9).replace("\n", "\r\n"), rows(9).rstrip("\n"), rows(9) + "\n\n"):
            other = read_examples(write("e.csv", variant), TASKS["sst"])
            assert other.texts == plain.texts and (other.labels == plain.labels).all()
    text = 'sentiment\tid\tmore\tsentence\n3\tx\t-\t"He said ""no"",\nthen left."\n'
    quoted = read_examples(write("f.csv", text), TASKS["sst"])
    assert quoted.texts == [('He said "no",\nthen left.',)] and quoted.labels.tolist() == [3]
    test = read_examples(write("g.csv", "0\t\tid\tsentence\n1\t0.0\tx\tA film.\n"), TASKS["cfimdb"], labelled=False)
    assert test.ids == ["x"] and test.labels is None


def test_a_column_name_twice_is_an_error_and_an_empty_id_a_malformed_row():
    header, row = "\tid\tsentence\tsentiment", "0\tx\tA film.\t1"
    for name in ("id", "sentence", "sentiment", "note"):
        path = write("a.csv", f"{header}\tnote\t{name}\n{row}\t2\t3\n")
        raises(InputError, f"2 columns of its header are named {name!r}", read_examples, path,
               TASKS["sst"])
    path = write("a.csv", f"\t{header}\n9\t{row}\n")  # row numbers of row numbers: no names
    assert read_examples(path, TASKS["sst"]).texts == [("A film.",)]
    path = write("b.csv", f"{header}\n{row}\n1\t  \tA film.\t1\n")
    raises(InputError, "1 of 2 rows are malformed: line 3: id is empty", read_examples, path,
           TASKS["sst"])
    assert read_examples(path, TASKS["sst"], skip_malformed=True).ids == ["x"]


def test_every_id_of_a_file_without_labels_is_kept():
    for name, task in TASKS.items():
        columns = "\t".join(task.text_columns)
        text = ["How are you?", "Who?"][:len(task.text_columns)]
        rows = [["a", *text], ["b", *text[:-1], ""], ["c", *[" "] * len(text)],
                ["d", *text[:-1], "W\0ho?"], ["e\0", *text], ["f", *text, "", ""]]

        def table(rows):
            lines = [f"{i}\t" + "\t".join(row) for i, row in enumerate(rows)]
            return write(task.filename("test"), "\n".join([f"\tid\t{columns}", *lines]) + "\n")

        with contextlib.redirect_stdout(io.StringIO()) as said:
            found = read_examples(table(rows), task, labelled=False)
        assert found.ids == ["a", "b", "c", "d", "e\0", "f"] and not found.malformed, name
        assert found.texts[2] == ("",) * len(text) and found.texts[5] == tuple(text)
        assert "5 of 6 rows are predicted as they are: line 3: " in said.getvalue()

        # where it is not known which field is which, or whose the prediction is, nothing is guessed
        for row, part in ((["", *text], "line 4: id is empty"), (["g", *text[:-1]], "line 4: "),
                          (["g", *text, "", "Why?"], "line 4: ")):
            for skip in (False, True):
                raises(InputError, part, read_examples, table([rows[0], rows[0], row]), task,
                       labelled=False, skip_malformed=skip)


def test_a_text_without_tokens_is_encoded_as_cls_and_sep():
    tokenizer = load_tokenizer(workspace() / "tiny")
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    path = write("a.csv", "\tid\tsentence1\tsentence2\n0\tx\t\t\n1\ty\t\0\t\0\n")
    with contextlib.redirect_stdout(io.StringIO()):
        examples = read_examples(path, TASKS["sts"], labelled=False)
    for row in tokenize(examples, tokenizer, 64, cross=True).tokens:
        assert [(ids.tolist(), first) for ids, first in row] == [([cls, sep, sep], 2)]
    for row in tokenize(examples, tokenizer, 64, cross=False).tokens:
        assert [(ids.tolist(), first) for ids, first in row] == [([cls, sep], 2)] * 2


def test_a_long_field_is_cut_aloud_and_an_open_quote_is_still_found():
    tokenizer, words = load_tokenizer(workspace() / "tiny"), "a film " * 30000
    header = "\tid\tsentence\tsentiment\n"
    path = write("a.csv", header + f"0\tx\t{words}\t1\n1\ty\tA film.\t2\n")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        examples = tokenize(read_examples(path, TASKS["sst"]), tokenizer, 64, cross=True)
    assert len(examples.texts[0][0]) == 209999 and examples.labels.tolist() == [1, 2]
    assert len(examples.tokens[0][0][0]) == 64 and "cut 1 of 2 rows to 64 tokens" in said.getvalue()
    rows = "".join(f"{i}\tx{i}\tA film.\t1\n" for i in range(20000))
    for end in ("", '9\tx\tA film."\t1\n'):  # never closed, and closed 20,000 rows below
        path = write("b.csv", header + '0\tx\t"A film.\t1\n' + rows + end)
        raises(InputError, "quote", read_examples, path, TASKS["sst"], skip_malformed=True)
        raises(InputError, " in line 2", read_examples, path, TASKS["sst"], skip_malformed=True)


def test_a_file_is_without_labels_by_its_whole_name_or_its_header():
    for task in TASKS.values():
        texts = "\t".join(task.text_columns)
        bare, labelled = f"\tid\t{texts}\n", f"\tid\t{texts}\t{task.label_column}\n"
        assert not tasks.has_labels(write(task.filename("test"), labelled), task)
        assert tasks.has_labels(write(task.filename("dev"), bare), task)  # and is then refused
        for name in (f"{task.stem}-latest.csv", f"{task.stem}-test-mine.csv", "contest.csv"):
            assert tasks.has_labels(write(name, labelled), task)
            assert not tasks.has_labels(write(name, bare), task)


def rows_by_quotes(text):
    """How many rows there are below the header, told from where quotes open and close alone; a blank line is no row."""
    count, inside, before, empty = 0, False, "\n", True  # a quote opens at the start of a field, and closes anywhere
    for c in text.replace("\r\n", "\n").replace("\r", "\n") + "\n":
        if c == '"' and (inside or before in "\t\n"):
            inside = not inside  # a doubled one closes and opens
            before = "\t" if not inside else c
        else:
            before = c
        if c == "\n" and not inside:
            count, empty = count + (not empty), True
        else:
            empty = False
    return count - 1


def test_two_thousand_mutated_files_lose_no_row():
    generator = random.Random(0)
    originals = [(TASKS[name], (DEMO / TASKS[name].filename("train")).read_bytes().split(b"\n")[:121])
                 for name in ("sst", "para", "sts")]
    path, read, refused = workspace() / "mutated.csv", 0, 0
    hostile = [b'"', b"\t", b"\n", b"\r", b"\r\n", b"\0", b"\xff", b"\xc3\xa9", b'""', b"'", b",", b"-", b" ", b"9", b"\xef\xbb\xbf"]
    for n in range(2000):
        task, lines = originals[n % 3]
        raw = bytearray(b"\n".join(generator.sample(lines[1:], 40)))
        raw[:0] = lines[0] + b"\n"
        for _ in range(generator.randrange(1, 4)):
            at, kind = generator.randrange(len(raw)), generator.randrange(5)
            if kind < 2:
                raw[at:at] = generator.choice(hostile)
            elif kind == 2:
                raw[at] = generator.randrange(256)
            elif kind == 3:
                del raw[at:at + generator.choice((1, 1, 5, 300))]
            else:
                raw[at:at] = raw[at:at + generator.randrange(200)]
        path.write_bytes(raw)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                examples = read_examples(path, task, skip_malformed=generator.random() < 0.7)
        except InputError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
            continue
        assert len(examples) + len(examples.malformed) == rows_by_quotes(bytes(raw).decode("utf-8-sig")), bytes(raw)
        assert len(examples.ids) == len(examples.texts) == len(examples.labels)
        read += 1
    assert read > 500 and refused > 200, (read, refused)


def test_tokens_are_berts_and_are_cut_aloud():
    tokenizer = load_tokenizer(workspace() / "tiny")
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    header = "\tid\tsentence1\tsentence2\tsimilarity\n"
    path = write("a.csv", header + "0\tx\tThe cat a a a a\tthe dog\t1\n1\ty\tthe\tthe cat\t2\n")
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in ("the cat a a a a", "the dog")]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        (whole, first), = tokenize(read_examples(path, TASKS["sts"]), tokenizer, 64, cross=True).tokens[0]
        assert whole.tolist() == [cls, *ids[0], sep, *ids[1], sep] and first == len(ids[0]) + 2
        limit = len(ids[1]) * 2 + 3
        (cut, first), = tokenize(read_examples(path, TASKS["sts"]), tokenizer, limit, cross=True).tokens[0]
        assert cut.tolist() == [cls, *ids[0][:len(ids[1])], sep, *ids[1], sep]  # the longer side gives way
        apart = tokenize(read_examples(path, TASKS["sts"]), tokenizer, 64, cross=False).tokens
    assert [ids.tolist() for ids, _ in apart[0]] == [[cls, *side, sep] for side in ids]
    assert f"cut 1 of 2 rows to {limit} tokens" in said.getvalue()
    examples = tokenize(read_examples(path, TASKS["sts"]), tokenizer, 64, cross=True)
    batch, (((ids, first),), ((ids_2, first_2),)) = collate(examples, np.array([1, 0])), examples.tokens
    assert batch.labels.tolist() == [2, 1] and batch.attention_mask.sum(1).tolist() == [len(ids_2), len(ids)]
    assert batch.token_type_ids.sum(1).tolist() == [len(ids_2) - first_2, len(ids) - first]
    examples.tokens = apart
    assert collate(examples, np.array([0, 1])).input_ids.shape[0] == 4


def vocabulary_folder(words, config=None, normalizer=None):
    """A folder with a vocabulary, in tokenizer.json if there is a normalizer, and its settings."""
    folder = Path(tempfile.mkdtemp(dir=workspace()))
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
    if normalizer is not None:
        as_tokenizer_json(folder, normalizer)
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_token_ids_equal_those_of_transformers_under_each_setting():
    """sanity_check_tokens.json holds 40 strings of ten languages, 6 settings, and the ids that
    transformers.BertTokenizer gave them, with its version and the call."""
    stored = json.loads((HERE / "sanity_check_tokens.json").read_text(encoding="utf-8"))
    words = " ".join(stored["vocabulary"]).split()
    assert len(stored["strings"]) == 40 and len(stored["settings"]) == len(stored["ids"]) == 6
    assert len({str(ids) for ids in stored["ids"]}) == 6, "each setting has an effect"
    for settings, ids in zip(stored["settings"], stored["ids"]):
        in_normalizer = {"lowercase": settings.get("do_lower_case", True),
                         "strip_accents": settings.get("strip_accents"),
                         "handle_chinese_chars": settings.get("tokenize_chinese_chars", True)}
        for folder in (vocabulary_folder(words, settings),
                       vocabulary_folder(words, normalizer=in_normalizer),
                       vocabulary_folder(words, settings, in_normalizer)):
            tokenizer = load_tokenizer(folder)
            encodings = tokenizer.encode_batch(stored["strings"], add_special_tokens=False)
            assert [encoding.ids for encoding in encodings] == ids, (settings, folder)
        try:
            from transformers import BertTokenizer
        except ImportError:
            continue
        peer = BertTokenizer.from_pretrained(vocabulary_folder(words, settings))
        assert peer(stored["strings"], add_special_tokens=False).input_ids == ids


def test_settings_are_followed_or_rejected_by_name():
    words = [*tasks.SPECIAL, "film", "##s", "a"]
    for config, part in (
            ({"do_lower_case": None}, "do_lower_case is null, and can be true or false only"),
            ({"do_lower_case": "false"}, 'do_lower_case is "false", and can be true or false only'),
            ({"do_lower_case": 0}, "do_lower_case is 0"),
            ({"strip_accents": "no"}, 'strip_accents is "no"'),
            ({"strip_accents": 1}, "strip_accents is 1, and can be true or false or null only"),
            ({"tokenize_chinese_chars": None}, "tokenize_chinese_chars is null"),
            ({"tokenizer_class": "BertJapaneseTokenizer"}, 'tokenizer_class is "BertJapanese'),
            ({"do_basic_tokenize": False}, "do_basic_tokenize is false"),
            ({"never_split": ["film"]}, 'never_split is ["film"]'),
            ({"unk_token": "<unk>"}, 'unk_token is "<unk>"'),
            ({"cls_token": {"content": "<s>", "lstrip": False}}, 'cls_token is "<s>"'),
            ({"added_tokens_decoder": {"9": {"content": "<user>"}}}, 'adds "<user>" to the word'),
            ([], "cannot be read as a JSON object")):
        raises(InputError, "tokenizer_config.json: " + part, load_tokenizer,
               vocabulary_folder(words, config))
    kept = {"do_lower_case": True, "strip_accents": None, "never_split": None,
            "do_basic_tokenize": True, "tokenizer_class": "BertTokenizer", "model_max_length": 8,
            "cls_token": {"content": "[CLS]", "lstrip": False},
            "added_tokens_decoder": {"4": {"content": "[MASK]"}}}
    assert load_tokenizer(vocabulary_folder(words, kept)).encode("Films").ids == [2, 5, 6, 3]

    folder = vocabulary_folder(words, normalizer={"lowercase": False})
    path = folder / "tokenizer.json"
    fields = json.loads(path.read_text())
    added = {**fields["added_tokens"][0], "id": 8, "content": "<user>"}
    normalizer, model = fields["normalizer"], fields["model"]
    for change, part in (
            ({"normalizer": None}, "no normalizer in it"),
            ({"normalizer": {"type": "Lowercase"}}, 'normalizer: type is "Lowercase"'),
            ({"normalizer": {**normalizer, "clean_text": False}}, "clean_text is false"),
            ({"normalizer": {**normalizer, "lowercase": "yes"}}, 'lowercase is "yes"'),
            ({"pre_tokenizer": {"type": "Whitespace"}}, 'pre_tokenizer: type is "Whitespace"'),
            ({"model": {**model, "type": "Unigram"}}, 'model: type is "Unigram"'),
            ({"model": {**model, "continuing_subword_prefix": "@"}}, 'subword_prefix is "@"'),
            ({"model": {**model, "vocab": {"[CLS]": -1}}}, "not word pieces with an id each"),
            ({"model": {**model, "vocab": {"[CLS]": 0, "a": 0}}}, "not word pieces with an id"),
            ({"model": {**model, "vocab": [["a", 0.5]]}}, "not word pieces with an id each"),
            ({"model": {**model, "vocab": {"[CLS]": 0}}}, "no [SEP] in the vocabulary"),
            ({"added_tokens": [*fields["added_tokens"], added]}, 'adds "<user>"')):
        path.write_text(json.dumps({**fields, **change}))
        raises(InputError, part, load_tokenizer, folder)
    path.write_text(json.dumps(fields))
    assert load_tokenizer(folder).encode("Film film").ids == [2, 1, 5, 3]
    # where the two differ, transformers follow tokenizer_config.json
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert load_tokenizer(folder).encode("Film film").ids == [2, 5, 5, 3]
    assert "lowercase is false, and do_lower_case in tokenizer_config.json is" in said.getvalue()


def test_a_cased_vocabulary_without_a_setting_is_warned_about():
    cased, uncased = ([*tasks.SPECIAL, "[unused1]", "##S", *words] for words in
                      (("Haus", "haus"), ("haus", "\u00df")))
    for words, config, normalizer, warned in (
            (cased, None, None, True), (cased, {"strip_accents": False}, None, True),
            (cased, {"do_lower_case": True}, None, False),
            (cased, {"do_lower_case": False}, None, False),
            (cased, None, {"lowercase": False}, False), (uncased, None, None, False)):
        with contextlib.redirect_stdout(io.StringIO()) as said:
            load_tokenizer(vocabulary_folder(words, config, normalizer))
        said = said.getvalue()
        assert ("words with capitals (Haus), but do_lower_case is not set" in said) == warned, said
        assert warned or said == "", said


def test_an_encoder_must_fit_its_vocabulary_and_its_task():
    """In training, prediction and pretraining alike; the tiny vocabulary has 500 word pieces."""
    def fails(part, status_said_folder):
        assert status_said_folder[0] == 2 and part in status_said_folder[1], status_said_folder[1]
        assert "Traceback" not in status_said_folder[1]

    few_words, one_type = copy_of_tiny(vocab_size=499), copy_of_tiny(type_vocab_size=1)
    fails("499 word embeddings", run("--model", few_words))
    fails("499 word embeddings", mlm("--model", few_words))
    fails("499 word embeddings", mlm("--model", few_words, "--fill", "a [MASK]"))
    fails("one token type", run("--model", one_type, "--pair_head", "cross"))
    fails("one token type", mlm("--model", one_type))
    for positions, pairs in ((4, True), (2, False)):
        small = copy_of_tiny(max_position_embeddings=positions)
        part = f"{positions} positions (max_position_embeddings), too few for [CLS] a [SEP]"
        head = ["--pair_head", "cross"] if pairs else ["--tasks", "sst"]
        fails(part, run("--model", small, *head))
        fails(part, mlm("--model", small, "--tasks", "sts" if pairs else "sst"))
    fails("2 positions", mlm("--model", small, "--fill", "[MASK]"))

    # what needs less asks for less
    for folder, flags in ((one_type, ["--pair_head", "uv"]),
                          (copy_of_tiny(max_position_embeddings=3), ["--pair_head", "uv"]),
                          (copy_of_tiny(max_position_embeddings=5), ["--pair_head", "cross"])):
        status, said, _ = run("--model", folder, *flags, steps=1)
        assert status == 0, said
    for flags in (["--fill", "a [MASK]"], ["--tasks", "sst", "--epochs", 1, "--epoch_length", 1]):
        status, said, _ = mlm("--model", one_type, *flags)
        assert status == 0, said

    # a run whose folder was changed afterwards
    status, said, folder = run("--tasks", "sts", "--pair_head", "cross", steps=1)
    assert status == 0, said
    for change in ({"vocab_size": 499}, {"type_vocab_size": 1}, {"max_position_embeddings": 4}):
        changed = shutil.copytree(folder, folder.with_name(f"{folder.name}-{next(iter(change))}"))
        smaller = BertModel(dataclasses.replace(TINY, **change)).state_dict()
        tensors = load_file(folder / "model.safetensors")
        tensors.update({f"bert.{published_name(name)}": x for name, x in smaller.items()})
        save_file(tensors, changed / "model.safetensors")
        fields = json.loads((folder / "config.json").read_text())
        (changed / "config.json").write_text(json.dumps({**fields, **change}))
        raises(InputError, next(iter(change)), MultitaskBERT.load, changed)


def test_evaluation_batches_hold_every_row_once():
    _, examples = three_task_model()
    for tokens in (1, 50, 10 ** 6):
        batches = list(evaluation_batches(examples["para"], np.arange(len(examples["para"])), tokens))
        assert sorted(np.concatenate([batch.rows for batch in batches]).tolist()) == list(range(len(examples["para"])))
        assert all(len(batch.rows) == 1 or batch.attention_mask.sum() <= tokens for batch in batches)


def test_schedules_hold_what_they_say():
    sizes = {"sst": 50, "para": 203, "sts": 31}

    def epoch(name, batch_size=8, epoch_length="longest", e=0, seed=1):
        return list(Schedule(name, sizes, batch_size, epoch_length, seed).epoch(e))

    def rows(steps, task):
        return [row for step in steps for name, rows in step if name == task for row in rows.tolist()]

    steps = epoch("sequential")
    assert [[name for name, _ in step] for step in steps] == [["sst"]] * 7 + [["para"]] * 26 + [["sts"]] * 4
    assert all(sorted(rows(steps, task)) == list(range(size)) for task, size in sizes.items())
    assert [step[0][0] for step in epoch("sequential", epoch_length=10)] == ["sst"] * 2 + ["para"] * 7 + ["sts"]
    assert len(epoch("sequential", epoch_length="shortest")) == 12
    steps = epoch("round_robin")
    assert len(steps) == 26 and all([name for name, _ in step] == list(sizes) for step in steps)
    assert sorted(rows(steps, "para")) == list(range(203)) and len(rows(steps, "sts")) == 6 * 31 + 2 * 8
    assert sorted(rows(steps[:7], "sst")) == list(range(50)) == sorted(rows(steps[7:14], "sst"))  # others start over
    assert len(epoch("round_robin", epoch_length="shortest")) == 4 and len(epoch("round_robin", epoch_length=9)) == 9
    own = epoch("round_robin", batch_size={"sst": 2, "para": 24, "sts": 2})
    assert [len(r) for _, r in own[0]] == [2, 24, 2] and len(own) == 25
    mixed = epoch("mixed")
    assert len(mixed) == 12 and all(sorted(rows(mixed, task)) == list(range(size)) for task, size in sizes.items())
    assert all(abs(len(r) - sizes[name] / 12) < 1 for step in mixed for name, r in step)
    few = list(Schedule("mixed", {"a": 3, "b": 100}, 2, "longest", 1).epoch(0))
    assert len(few) == 3 and all(len(r) >= 1 for step in few for _, r in step)
    # the batches of the next epoch, and those of another seed, are composed anew; the same ones come again
    for name in SCHEDULES:
        first = {frozenset(r.tolist()) for step in epoch(name) for _, r in step}
        assert first == {frozenset(r.tolist()) for step in epoch(name) for _, r in step}
        for other in (epoch(name, e=1), epoch(name, seed=2)):
            assert len(first & {frozenset(r.tolist()) for step in other for _, r in step}) < 0.2 * len(first)


def test_mtdnn_shuffles_the_union():
    sizes = {"sst": 50, "para": 203, "sts": 31}

    def epochs(epoch_length="longest", upsample=False, n=2):
        schedule = Schedule("mtdnn", sizes, 8, epoch_length, 1, upsample=upsample)
        return [list(schedule.epoch(e)) for e in range(n)]

    for steps in epochs():  # every row of every task once
        assert len(steps) == 37 and all(len(step) == 1 for step in steps)
        for task, size in sizes.items():
            assert sorted(row for (name, rows), in steps for row in rows.tolist() if name == task) == list(range(size))
    orders = [[name for (name, _), in steps] for steps in epochs()]
    assert orders[0] != orders[1] and orders[0] != sorted(orders[0], key=list(sizes).index)
    other_seed = Schedule("mtdnn", sizes, 8, "longest", 2)
    assert [name for name, in other_seed.tasks(0)] not in orders
    # epochs of another length are cut from the same passes, and no batch is left out or comes twice
    whole, parts = sum(epochs(), []), sum(epochs(10, n=7), [])
    assert [(name, rows.tolist()) for (name, rows), in parts] == [(name, rows.tolist()) for (name, rows), in whole[:70]]
    assert [len(steps) for steps in epochs("shortest")] == [12, 12]
    for task in sizes:  # repeated until it has the rows of the largest, to a batch
        assert 203 <= sum(len(rows) for (name, rows), in epochs(upsample=True)[0] if name == task) < 203 + 8


def test_annealed_draws_as_published():
    sizes = {"para": 283010, "sst": 8544, "sts": 6040}
    schedule = Schedule("annealed", sizes, 8, 20000, 1, epochs=10)
    for epoch, expected in ((0, (0.951, 0.029, 0.020)), (9, (0.510, 0.253, 0.236))):
        assert np.abs(schedule.probabilities(epoch) - expected).max() < 6e-4
        drawn = Counter(task for step in schedule.tasks(epoch) for task in step)
        assert np.abs(np.array([drawn[task] / 20000 for task in sizes]) - expected).max() < 0.015
    alone = Schedule("annealed", sizes, 8, 10, 1, epochs=1)
    assert np.abs(alone.probabilities(0) - np.array([0.951, 0.029, 0.020])).max() < 6e-4, "a = 1 where there is one epoch"
    even = Schedule("annealed", {"a": 20, "b": 20}, 5, 30, 1, epochs=4)
    assert even.tasks(0) != even.tasks(1), "drawn anew in every epoch"
    other_seed = Schedule("annealed", {"a": 20, "b": 20}, 5, 30, 2, epochs=4)
    assert even.tasks(0) != other_seed.tasks(0)
    small = Schedule("annealed", {"a": 30, "b": 20}, 5, 15, 1, epochs=4)
    rows = [(name, r.tolist()) for e in range(4) for (name, r), in small.epoch(e)]
    for name in "ab":  # each task's batches follow each other over the epochs, as its own stream has them
        batches = [r for task, r in rows if task == name]
        assert len(batches) > 10 and batches == [small.streams[name].rows(n).tolist() for n in range(len(batches))]


def test_a_stream_is_a_function_of_its_position():
    forwards = [Stream(10, 3, 1, "sst").rows(n).tolist() for n in range(12)]
    stream = Stream(10, 3, 1, "sst")
    assert [stream.rows(n).tolist() for n in reversed(range(12))] == forwards[::-1]
    assert [len(batch) for batch in forwards[:4]] == [3, 3, 3, 1]
    assert [Stream(10, 3, 1, "para").rows(n).tolist() for n in range(12)] != forwards
    assert seed_of(1, 2, "sst") != seed_of(12, "sst") and 0 <= seed_of("x") < 2 ** 63


def test_git_blob_ids_are_gits():
    assert download.git_blob(b"") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
    assert download.git_blob(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"
    names = {task.filename(split) for task in TASKS.values() for split in ("train", "dev", "test")}
    assert set(download.GIT_BLOBS) == names and len(set(download.GIT_BLOBS.values())) == 12


def test_download_resumes_and_keeps_whatever_is_served():
    """From a server on this machine that breaks off in the middle of a file, or tells no length."""
    served = Path(tempfile.mkdtemp(dir=workspace()))
    rows = "".join(f"{i}\tx{i}\t film\t1\n" for i in range(5000))
    body = f"\tid\tsentence\tsentiment\n{rows}".encode()
    requests, lengths, ends = [], True, [30000]  # ends: where each answer breaks off, else whole

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            start = int(self.headers.get("Range", "bytes=0-")[6:-1])
            requests.append(start)
            self.send_response(206 if start else 200)
            if lengths:
                self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            self.wfile.write(body[start:ends.pop() if ends else None])

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}/"

    def fetch(name, blob):
        """(the failures, what was said) for a set of one file."""
        with mock.patch.object(download, "GIT_BLOBS", {name: blob}), \
                contextlib.redirect_stdout(io.StringIO()) as said, \
                contextlib.redirect_stderr(io.StringIO()):
            return download.download_sets(base, served), said.getvalue()

    own = download.git_blob(body)
    try:
        failed, _ = fetch("a.csv", own)
        assert len(failed) == 1 and f"after 30000 of {len(body)}" in failed[0]
        assert not (served / "a.csv").exists()
        failed, said = fetch("a.csv", own)
        assert failed == [] and (served / "a.csv").read_bytes() == body
        assert f"{len(body)} bytes, the course's own file" in said and requests == [0, 30000]
        assert fetch("a.csv", own)[0] == [] and len(requests) == 2  # what is there stays

        # other bytes, if only one: kept and said, whether they were fetched or were there before
        other = download.git_blob(body[:-1])
        for _ in range(2):
            failed, said = fetch("b.csv", other)
            assert failed == [] and (served / "b.csv").read_bytes() == body and len(requests) == 3
            assert said.count("\n") == 1 and own in said and other in said
            assert "cut short" not in said

        # without a length a whole file is known by its id alone, and a cut one is doubted
        lengths = False
        failed, said = fetch("c.csv", own)
        assert failed == [] and "the course's own file" in said and "not" not in said
        ends.append(30000)
        failed, said = fetch("d.csv", own)
        assert failed == [] and "30000 bytes" in said and "may be cut short" in said
        (served / "d.csv").unlink()
        assert "cut short" not in fetch("d.csv", own)[1]
    finally:
        server.shutdown()
        server.server_close()


# ---------------------------------------------------------------- multitask_classifier.py

def test_every_combination_runs_or_is_refused():
    ran = refused = 0
    for option, schedule, head, pooling, surgery in itertools.product(
            ("pretrain", "finetune"), SCHEDULES, ("cross", "uv", "uv_diff", "cosine"),
            ("cls", "mean"), ((), ("--pcgrad",))):
        flags = ["--schedule", schedule, "--pair_head", head, "--pooling", pooling, *surgery]
        status, said, folder = run(*flags, option=option, steps=3)
        reason = ("nothing to train" if option == "pretrain" and head == "cosine" else "no shared gradients"
                  if surgery and option == "pretrain" else "no two tasks" if surgery and schedule in ONE_TASK_A_STEP else None)
        if reason:
            assert status == 2 and said.count("\n") == 1 and reason in said, said
            refused += 1
        else:
            assert status == 0, (option, flags, said)
            assert "overall_2023" in said and (folder / "predictions" / "sts-test-output.csv").exists()
            ran += 1
    assert (ran, refused) == (86, 74)
    for schedule in ("mtdnn", "annealed"):  # steps that are added up do let tasks meet
        status, said, _ = run("--schedule", schedule, "--pcgrad", "--accumulate", 4, steps=8)
        assert status == 0 and "sst-para cosine" in said, said


def test_each_flag_changes_the_run():
    """Flags that leave names and shapes of the tensors alone must change their values."""
    base = trained(steps=3)
    assert same(base, trained(steps=3)), "the same flags give the same bits"
    for flags in (["--pcgrad"], ["--gradvac"], ["--pcgrad", "--surgery_scope", "tensor"], ["--pcgrad", "sst+para,sts"],
                  ["--seed", 1], ["--lr", 1e-3], ["--clip", 0.1], ["--warmup", 0.5], ["--weight_decay", 10],
                  ["--lr_schedule", "constant"], ["--accumulate", 2], ["--batch_size", 4], ["--schedule", "mixed"],
                  ["--schedule", "sequential"], ["--hidden_dropout_prob", 0.7], ["--pooling", "cls"], ["--epochs", 2],
                  ["--schedule", "mtdnn"], ["--schedule", "annealed"], ["--sst_loss", "oll1"], ["--limit", "para=.5"],
                  ["--tasks", "sts,para,sst"], ["--sst_train", workspace() / "data" / "ids-sst-dev.csv"]):
        other = trained(*flags, steps=3)
        assert other.keys() == base.keys() and not same(base, other), flags
    assert not same(trained("--pcgrad", steps=30), trained("--gradvac", steps=30)), "targets that have moved"
    measured = trained("--log_gradients", steps=3)  # changes the order of the sums, and nothing else
    assert all((measured[name] - base[name]).abs().max() < 1e-6 for name in base)
    drawn, again, other = (trained("--lr", 0, "--seed", seed)["heads.sst.linear.weight"]
                           for seed in (1, 1, 2))
    assert torch.equal(drawn, again) and not torch.equal(drawn, other), "new heads have the seed"
    frozen = trained(steps=3, option="pretrain")
    encoder = load_file(workspace() / "tiny" / "model.safetensors")
    assert all(torch.equal(frozen["bert." + name], encoder[name]) for name in encoder)
    assert not torch.equal(frozen["heads.sst.linear.weight"], base["heads.sst.linear.weight"])


def test_defaults_are_those_of_the_papers_and_the_course():
    def defaults(*argv):
        return vars(multitask_classifier.resolve(["--option", "finetune", *argv]))

    expected = {
        "lr": 1e-4, "lr_schedule": "linear", "warmup": 0.1, "weight_decay": 0.0, "clip": 1.0,
        "epochs": 10, "seed": 11711, "schedule": "round_robin", "epoch_length": "longest",
        "accumulate": 1, "batch_size": {"sst": 16, "para": 32, "sts": 12}, "pooling": "mean",
        "hidden_dropout_prob": 0.3, "pair_head": {"para": "cosine", "sts": "cosine"},
        "sst_loss": "ce", "surgery": None, "surgery_scope": "vector", "smart": None,
        "proximal": None, "pal": None, "limit": None, "save_every": 5.0,
        "trained": ["sst", "para", "sts"]}
    assert expected.items() <= defaults().items()
    assert defaults("--tasks", "cfimdb")["batch_size"] == {"cfimdb": 8}
    assert defaults("--schedule", "mixed")["batch_size"] == 20
    assert vars(multitask_classifier.resolve([])).items() >= {
        "option": "pretrain", "lr": 1e-3, "pair_head": {"para": "cross", "sts": "cross"}}.items()
    given = defaults("--smart", "--proximal", "--pal")
    assert given["smart"] == {"weight": 5.0, "eps": 1e-5, "sigma": 1e-5, "step": 1e-3, "steps": 1,
                              "norm": "inf"}
    auxiliary = defaults("--smart", "--pcgrad", "--aux", "stars=x.csv")
    assert auxiliary["smart_tasks"] == ["sst", "para", "sts", "stars"]
    assert auxiliary["gradient_rows"] == [["sst"], ["para"], ["sts"], ["stars"]]
    assert given["proximal"] == {"mu": 1.0, "beta": None}  # None: .99, then .999
    assert given["pal"] == {"g": "attention", "size": 204}
    for option, flag in (("smart", "eps=1"), ("proximal", "mu=2"), ("pal", "size=8")):
        name, value = flag.split("=")
        assert defaults(f"--{option}", flag)[option] == {**given[option], name: float(value)}
    # the classes have the same
    assert vars(smart.Smoothness(KINDS)) == vars(smart.Smoothness(KINDS, **given["smart"]))
    proximal = smart.Proximal(nn.Linear(1, 1), KINDS)
    assert {"mu": proximal.mu, "beta": proximal.beta} == given["proximal"]
    assert pcgrad.VACCINE_BETA == 0.01
    assert AdamW([nn.Parameter(torch.zeros(1))]).defaults == {
        "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.0, "correct_bias": True}
    expected = {"epochs": 4, "batch_size": 32, "lr": 1e-4, "warmup": 0.1, "weight_decay": 0.01,
                "clip": 1.0, "whole_word": False, "seed": 11711, "tasks": ["sst", "para", "sts"],
                "save_every": 5.0}
    assert expected.items() <= vars(pretrain_mlm.resolve(["--out", "x"])).items()


def test_epochs_are_as_long_as_asked():
    """24 rows of each task; sst=16, para=32, sts=12 by default."""
    for flags, steps in ((["longest"], 2), (["shortest"], 1), ([5], 5), (["longest", "--batch_size", 5], 5),
                         (["longest", "--batch_size", "sst=24,para=3,sts=7"], 8),
                         (["longest", "--schedule", "sequential"], 5),
                         (["longest", "--schedule", "mixed"], 2), (["longest", "--tasks", "cfimdb"], 3)):
        status, said, folder = run("--epoch_length", *flags)
        assert status == 0, said
        assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"] == steps, flags


def test_the_training_loop_does_what_its_flags_say():
    """Seven steps an epoch, three to an update: what reaches the optimizer, and what reaches the model."""
    seen, zeroed, batches, orders = [], [], [], []

    class Recorder(AdamW):
        def step(self):
            decay, plain = self.param_groups
            parameters = decay["params"] + plain["params"]
            norm = math.sqrt(sum(float(p.grad.square().sum()) for p in parameters if p.grad is not None))
            seen.append((decay["lr"], plain["lr"], norm))
            assert decay["weight_decay"] == 0.1 and plain["weight_decay"] == 0
            assert all(p.ndim >= 2 for p in decay["params"]) and all(p.ndim < 2 for p in plain["params"])
            super().step()

    class Buffer(pcgrad.GradientBuffer):
        def zero(self):
            zeroed.append(len(seen))
            super().zero()

        def combine(self, seed):
            orders.append(seed)
            super().combine(seed)

    def recorded(examples, rows):
        batches.append((examples.task.name, tuple(rows), torch.initial_seed()))
        return collate(examples, rows)

    flags = ["--accumulate", 3, "--epochs", 2, "--clip", 0.01, "--weight_decay", 0.1, "--warmup", 0.5, "--batch_size", 4]
    with mock.patch.multiple(multitask_classifier, AdamW=Recorder, GradientBuffer=Buffer, collate=recorded):
        for surgery in ([], ["--pcgrad"]):
            del seen[:], zeroed[:], batches[:], orders[:]
            status, said, _ = run(*flags, *surgery, steps=7)
            assert status == 0, said
            rates = [learning_rate(1e-4, u / 7, warmup=0.5) for u in range(1, 7)]
            assert [(a, b) for a, b, _ in seen] == [(rate, rate) for rate in rates]
            assert all(abs(norm - 0.01) < 1e-5 for _, _, norm in seen), seen  # the global norm, after surgery
            assert zeroed == [0, 1, 2, 3, 3, 4, 5, 6]  # at each epoch's start, and after each update
            assert [task for task, _, _ in batches] == ["sst", "para", "sts"] * 14
            masks = {seed for _, _, seed in batches}
            assert len(masks) == 42, "every batch has dropout masks of its own"
            assert len(set(orders)) == len(orders) == 6, "projections in an order of their own"
            rows = [rows for task, rows, _ in batches if task == "sst"]
            assert sorted(sum(rows[:6], ())) == list(range(24)) == sorted(sum(rows[6:12], ())) and rows[:6] != rows[6:12]
        first, first_orders = masks, set(orders)
        del batches[:], orders[:]
        assert run(*flags, "--pcgrad", "--seed", 1, steps=7)[0] == 0
        assert not first & {seed for _, _, seed in batches} and not first_orders & set(orders)


def training_of(*flags):
    """A Training of the tiny encoder and the cut demo sets, before its first step."""
    root = workspace()
    args = multitask_classifier.resolve([*map(str, (
        "--option", "finetune", "--model", root / "tiny", "--data_dir", root / "data", *flags))])
    with contextlib.redirect_stdout(io.StringIO()):
        model, data = multitask_classifier.build(args, tasks.locate(args), root / "tiny")
    return multitask_classifier.Training(args, model.train(), data)


def test_processes_share_a_batch_and_no_dropout_mask():
    seen, real = {0: [], 1: []}, multitask_classifier.Training.loss
    batches = [(task, np.arange(7)) for task in KINDS]
    for rank in seen:
        def recorded(examples, rows):
            seen[rank].append(rows.tolist())
            return collate(examples, rows)

        def loss(training, task, batch, seed):
            seen[rank].append(seed)
            return real(training, task, batch, seed)

        training = training_of()
        with mock.patch.multiple(multitask_classifier, rank_and_world=lambda: (rank, 2),
                                 collate=recorded), \
                mock.patch.object(multitask_classifier.Training, "loss", loss):
            training.train_step(batches)
    assert (seen[0][::2], seen[1][::2]) == ([[0, 2, 4, 6]] * 3, [[1, 3, 5]] * 3)
    assert len({*seen[0][1::2], *seen[1][1::2]}) == 6, "dropout masks of their own"


def test_the_best_epoch_is_kept():
    scores, encoders = iter((0.2, 0.5, 0.3, 0.5)), []

    def evaluate(model, data, seed):
        assert seed == 11711
        encoders.append(model.bert.pos_embedding.weight.detach().clone())
        score = next(scores)
        return {"dev": dict.fromkeys(data, score), "train": dict.fromkeys(data, score), "f1": {}}

    with mock.patch.object(multitask_classifier, "evaluate", evaluate):
        status, said, folder = run("--epochs", 4)
    assert status == 0 and "best epoch 2" in said, said  # of two that are equal the first
    saved = load_file(folder / "model.safetensors")["bert.embeddings.position_embeddings.weight"]
    assert torch.equal(saved, encoders[1]) and not torch.equal(saved, encoders[3])
    last = torch.load(folder / "last.pt", weights_only=True)
    assert last["epoch"] == 4
    assert torch.equal(last["model"]["bert.pos_embedding.weight"], encoders[3])


def test_regressions_start_in_the_middle_and_heads_drop_out():
    assert multitask_classifier.Head(TASKS["sts"], "uv", 16, 0.0).linear.bias.tolist() == [2.5]
    cosine = multitask_classifier.Head(TASKS["para"], "cosine", 16, 0.0)
    assert (float(cosine.weight), float(cosine.bias)) == (10, -7), "decides at a cosine of .7"
    torch.manual_seed(20)
    linear = multitask_classifier.Head(TASKS["sst"], "single", 768, 0.0).linear
    assert abs(linear.weight.std() - 0.02) < 0.002 and not linear.bias.any()
    for kind in ("cross", "uv", "uv_diff"):
        head, pooled = multitask_classifier.Head(TASKS["para"], kind, 16, 0.5), torch.randn(8, 16)
        assert not torch.equal(head(pooled), head(pooled)) and torch.equal(head.eval()(pooled), head(pooled))


def test_a_diverged_run_fails():
    status, said, folder = run("--lr", 1e30, "--clip", 0, steps=20)
    last = said.splitlines()[-1]
    assert status == 1 and "the loss of " in last and "step" in last and "Traceback" not in said, said
    # which task, step and rows; what was saved before is intact
    real_loss, real_collate, batches = multitask_classifier.task_loss, multitask_classifier.collate, []

    def task_loss(task, *args):
        return real_loss(task, *args) * (math.nan if task.name == "para" and len(batches) == 8 else 1)

    def collate_and_note(examples, rows):
        batches.append([examples.ids[row] for row in rows])
        return real_collate(examples, rows)

    with mock.patch.multiple(multitask_classifier, task_loss=task_loss, collate=collate_and_note):
        status, said, folder = run("--save_every", 0, steps=20)
    assert status == 1 and len(batches) == 9, said  # the third step's second task
    assert f"the loss of para is nan at step 3 of epoch 1, 24 rows of quora-train.csv with the ids {', '.join(batches[7][:5])}" in said
    last = torch.load(folder / "last.pt", weights_only=True)
    assert last["step"] == 2 and all(tensor.isfinite().all() for tensor in last["model"].values())
    # weights that are not finite, though every loss was
    status, said, folder = run("--tasks", "sst", "--lr", 1e39, "--clip", 0, "--warmup", 0, "--lr_schedule", "constant", steps=1)
    assert status == 1 and "is not finite after 1 steps" in said, said
    assert not (folder / "model.safetensors").exists() and not (folder / "last.pt").exists()


def test_outputs_that_are_not_finite_end_the_run():
    """After one step of such a rate loss and weights are finite, but not what they compute."""
    diverging = ["--lr", 1e15, "--clip", 0, "--warmup", 0, "--lr_schedule", "constant"]
    for tasks in ("sst", "sst,para,sts"):
        status, said, folder = run(*diverging, "--tasks", tasks, steps=1)
        assert status == 1 and "are not finite" in said.splitlines()[-1], said
        assert not (folder / "model.safetensors").exists() and "Traceback" not in said


def test_logged_gradients_are_means_since_the_last_line():
    real, noted = multitask_classifier.diagnostics, []

    def diagnostics(*args):
        noted.append(real(*args))
        return noted[-1]

    with mock.patch.object(multitask_classifier, "diagnostics", diagnostics):
        status, said, folder = run("--pcgrad", steps=13)
    found = [line["gradients"]["cosine"] for line in read_metrics(folder, "step")]
    assert len(noted) == 13 and len(found) == 2, said
    for cosines, records in zip(found, (noted[:10], noted[10:])):
        for pair, cosine in cosines.items():
            assert abs(cosine - np.mean([record["cosine"][pair] for record in records])) < 1e-9
    # on the screen those of the epoch
    for pair in found[0]:
        cosine = np.mean([record["cosine"][pair] for record in noted])
        conflict = np.mean([record["cosine"][pair] < 0 for record in noted])
        assert f"{pair} cosine {cosine:.3f}, in conflict {conflict:.0%}, " in said, said


def test_gradients_are_logged():
    for flags, pairs in ((["--pcgrad"], 3), (["--log_gradients"], 3), (["--gradvac", "sst+para,sts"], 1), ([], 0)):
        status, said, folder = run(*flags, steps=12)
        assert status == 0, said
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        lines = [line for line in lines if line["kind"] == "step"]
        assert len(lines) == 2 and said.count("in conflict") == pairs
        for line in lines if pairs else ():
            found = line["gradients"]
            assert len(found["cosine"]) == pairs and all(-1 <= value <= 1 for value in found["cosine"].values())
        targets = torch.load(folder / "last.pt", weights_only=True)["gradvac_targets"]
        assert (targets.abs().sum() > 0) == (flags[:1] == ["--gradvac"])


def test_two_processes_equal_one():
    """Twenty steps on half batches against whole ones, dropout off; also with batches of one row, of which one process
    has none, and with gradients added up over three steps."""
    root = workspace()
    still = shutil.copytree(root / "tiny", root / "tiny-without-dropout")
    config = json.loads((still / "config.json").read_text())
    (still / "config.json").write_text(json.dumps({**config, "hidden_dropout_prob": 0.0}))
    common = ["--option", "finetune", "--model", still, "--data_dir", root / "data", "--hidden_dropout_prob", 0,
              "--epochs", 2, "--epoch_length", 10, "--lr", 1e-3]
    for name, flags in (("groups", ["--pcgrad", "sst+para,sts", "--batch_size", 5]),
                        ("gradvac", ["--gradvac", "--batch_size", "sst=5,para=23,sts=1", "--accumulate", 3,
                                     "--proximal", "mu=.5,beta=.9"]),
                        ("annealed", ["--schedule", "annealed", "--accumulate", 3, "--pcgrad", "--batch_size", 5]),
                        ("own", ["--schedule", "mtdnn", "--optimizer_per_task", "--pal", "size=8", "--batch_size", 5])):
        folders = [root / "runs" / f"{name}-{i}" for i in (1, 2)]
        status, said, _ = run(*common, *flags, name=str(folders[0]))
        assert status == 0, said
        printed = finish(start_processes(*common, *flags, "--name", folders[1]))
        assert [status for status, _ in printed] == [0, 0], printed
        assert printed[0][1].count("best epoch") == 1 and "epoch" not in printed[1][1], "only the first process prints"
        alone, together = (torch.load(folder / "last.pt", weights_only=True) for folder in folders)
        difference, scale = (math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors)) for tensors in (
            [alone["model"][key] - together["model"][key] for key in alone["model"]], alone["model"].values()))
        assert difference < 1e-6 * scale, difference / scale
        assert (alone["gradvac_targets"] - together["gradvac_targets"]).abs().max() < 1e-6
        for a, b in zip(*(read_metrics(folder, "evaluation") for folder in folders)):
            assert all(abs(a["dev"][task] - b["dev"][task]) < 1e-4 for task in a["dev"])
        outputs = [[float(line.split(" , ")[1]) for line in
                    (folder / "predictions" / "sts-dev-output.csv").read_text().splitlines()[1:]]
                   for folder in folders]
        assert np.abs(np.subtract(*outputs)).max() < 1e-4
        for a, b in zip(*(read_metrics(folder, "step") for folder in folders)):  # Adam would hide a wrong scale
            assert all(abs(a["losses"][task] - b["losses"][task]) < 1e-4 for task in a["losses"]), (a, b)


def test_a_killed_process_ends_the_run():
    """Without torchrun, which would end the others by itself: the survivor notices, says so in a line, and ends."""
    root = workspace()
    for victim in (0, 1):
        folder = root / "runs" / f"killed-{victim}"
        processes = start_processes("--option", "finetune", "--model", root / "tiny", "--data_dir", root / "data",
                                    "--epoch_length", 100000, "--name", folder)
        deadline = time.perf_counter() + 60
        while time.perf_counter() < deadline and not (
                (folder / "metrics.jsonl").exists() and read_metrics(folder, "step")):
            time.sleep(0.2)
        start = time.perf_counter()
        processes[victim].kill()
        status, said = finish(processes)[1 - victim]
        assert time.perf_counter() - start < 60 and status == 1, said
        assert "lost touch with another process" in said.splitlines()[-1] and "Traceback" not in said, said


def start_processes(*flags):
    """The training script as two processes that torchrun could have started."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    setting = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, multitask_classifier.__file__, *map(str, flags)]
    return [subprocess.Popen(command, env={**setting, "RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for rank in range(2)]


def finish(processes):
    """[(exit status, what it said)]; none outlives this, so a deadlock fails the check."""
    try:
        said = [process.communicate(timeout=60)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, said)]


def test_folders_of_current_libraries_train_to_the_same_bits():
    """transformers 5 and sentence-transformers 6 leave tokenizer.json and no vocab.txt, and large
    weights in shards. A run from such a folder is that from vocab.txt, and so is one from it."""
    plain, current = copy_of_tiny(), copy_of_tiny()
    for folder in (plain, current):  # a cased vocabulary with accents
        lines = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()[:-2]
        (folder / "vocab.txt").write_text("\n".join([*lines, "A", "caf\u00e9"]) + "\n",
                                          encoding="utf-8")
    (plain / "tokenizer_config.json").write_text(
        '{"do_lower_case": false, "strip_accents": false}')
    as_tokenizer_json(current, {"lowercase": False, "strip_accents": False}, max_length=8)
    shard(current)
    (current / "modules.json").write_text("[]")
    (_, _, of_plain), (status, said, folder) = run("--model", plain), run("--model", current)
    assert status == 0, said
    assert same(*(load_file(path / "model.safetensors") for path in (of_plain, folder)))
    left = WordPiece.read_file(str(folder / "vocab.txt"))
    left.pop("", None)  # for the first of a word that is in the tiny vocabulary twice
    assert left == WordPiece.read_file(str(plain / "vocab.txt"))
    assert same(*(trained("--model", path, steps=1) for path in (of_plain, folder)))
    text = "A caf\u00e9 film."
    ids = [load_tokenizer(path).encode(text).ids for path in (plain, current, folder)]
    assert ids[0] == ids[1] == ids[2]
    assert MultitaskBERT.load(folder).tokenizer.encode(text).ids == ids[0]
    status, said, pretrained = mlm("--model", current, "--epochs", 1, "--epoch_length", 1)
    assert status == 0 and load_tokenizer(pretrained).encode(text).ids == ids[0], said

    # ids without a word, and words that no text matches, leave the ids of the others as they are
    path, folder = current / "tokenizer.json", current.with_name("gaps")
    fields = json.loads(path.read_text())
    fields["model"]["vocab"] = {"[CLS]": 1, "[SEP]": 3, "[UNK]": 4, "a": 7, "b c": 8, "d\n": 5,
                                "e": 9}
    path.write_text(json.dumps({**fields, "added_tokens": []}))
    BertModel(TINY).save_pretrained(folder, current)
    (folder / "tokenizer.json").unlink()
    assert load_tokenizer(folder).encode("a b c d e").ids == [1, 7, 4, 4, 4, 9, 3]


def test_the_hubs_cache_gives_folders_of_current_libraries():
    cache = Path(tempfile.mkdtemp(dir=workspace()))
    for name, change in (("whole", Path.exists), ("json", as_tokenizer_json), ("shards", shard)):
        snapshot = cache / f"models--owner--{name}" / "snapshots" / ("0" * 40)
        shutil.copytree(workspace() / "tiny", snapshot)
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
        change(snapshot)
    asked = []

    def snapshot_download(name, **kwargs):  # the hub's client, without the network
        asked.append((kwargs["allow_patterns"], kwargs["local_files_only"]))
        return original(name, **{**kwargs, "local_files_only": True, "cache_dir": cache})

    original = huggingface_hub.snapshot_download
    vocabulary = load_tokenizer(workspace() / "tiny").get_vocab()
    with mock.patch.object(huggingface_hub, "snapshot_download", snapshot_download):
        for name in ("whole", "json", "shards"):
            folder = fetch_encoder(f"owner/{name}")
            assert same(BertModel.from_pretrained(folder).state_dict(),
                        BertModel.from_pretrained(workspace() / "tiny").state_dict())
            assert load_tokenizer(folder).get_vocab() == vocabulary
        assert len(asked) == 3 and all(offline for _, offline in asked)
        wanted = asked[0][0]
        for file in ("tokenizer.json", "vocab.txt", "model-00001-of-00002.safetensors",
                     "model.safetensors.index.json"):
            assert any(fnmatch.fnmatch(file, pattern) for pattern in wanted), file
        (folder / "model-00002-of-00003.safetensors").unlink()  # a download that was broken off
        raises(InputError, "no weights or no vocabulary in it", fetch_encoder, "owner/shards")
        assert asked[-1][1] is False


def test_the_demo_is_used_aloud_and_only_where_nothing_was_asked_for():
    real = Path(tempfile.mkdtemp(dir=workspace()))
    shutil.copytree(DEMO, real / "demo")

    def locate(*flags):
        args = multitask_classifier.resolve(list(map(str, flags)))
        with contextlib.redirect_stdout(io.StringIO()) as said:
            return tasks.locate(args), said.getvalue()

    with mock.patch.object(tasks, "DATA", real):
        paths, said = locate()
        assert "are not in" in said and "download.py" in said
        assert paths["sst"]["train"] == real / "demo" / "ids-sst-train.csv"
        raises(InputError, "ids-sst-train.csv: no such file", locate, "--data_dir", real)
        raises(InputError, "x.csv: no such file", locate, "--sst_train", real / "x.csv")
        raises(InputError, "cfimdb is not among --tasks", locate, "--cfimdb_dev", real / "demo" / "ids-cfimdb-dev.csv")
        shutil.copytree(DEMO, real, ignore=shutil.ignore_patterns("*test*"), dirs_exist_ok=True)
        paths, said = locate("--sst_dev", real / "demo" / "ids-sst-dev.csv")
        assert "are not in" not in said and paths["sts"] == {split: real / f"sts-{split}.csv" for split in ("train", "dev")}
        assert paths["sst"]["dev"] == real / "demo" / "ids-sst-dev.csv" and "no predictions for sts test" in said


def test_predictions_go_where_they_are_asked_to():
    folder = Path(tempfile.mkdtemp(dir=workspace()))
    status, said, run_folder = run("--sst_dev_out", folder / "a.csv", "--sts_test_out", folder / "b.csv")
    assert status == 0, said
    assert sorted(path.name for path in folder.iterdir()) == ["a.csv", "b.csv"]
    assert len((folder / "a.csv").read_text().splitlines()) == 9  # the heading and eight rows
    assert len(list((run_folder / "predictions").iterdir())) == 4
    # what the last line names is there
    elsewhere = [f"--sst_{split}_out={folder / split}.csv" for split in ("dev", "test")]
    for flags, announced in (([], True), (elsewhere, False)):
        status, said, run_folder = run("--tasks", "sst", *flags)
        named = said.splitlines()[-1].split(": ")[1].split(", ")
        assert status == 0 and named[:2] == ["encoder", "heads"], said
        assert ("predictions/" in named) == announced, said
        assert all((run_folder / name).exists() for name in named[2:]), said
    assert (folder / "dev.csv").exists() and (folder / "test.csv").exists()


def test_predictions_are_in_the_courses_format():
    _, examples = three_task_model()
    path = workspace() / "submission.csv"
    outputs = {"sst": np.eye(5)[[3, 0]], "para": np.array([[-0.1], [0.1]]),
               "sts": np.array([[2.25], [-0.5]])}
    written = {"sst": ("Predicted_Sentiment", "3", "0"),
               "para": ("Predicted_Is_Paraphrase", "0.0", "1.0"),
               "sts": ("Predicted_Similiary", "2.25", "-0.5")}
    for task, (heading, *values) in written.items():
        two = examples[task].take(np.array([4, 2]))
        evaluation.write_predictions(path, two, outputs[task])
        lines = [f"id \t {heading} ", *(f"{i} , {value} " for i, value in zip(two.ids, values))]
        assert path.read_text() == "\n".join(lines) + "\n"


def test_amp_is_bfloat16_or_is_refused():
    status, said, _ = run("--amp")
    if not torch.cpu._is_avx512_bf16_supported():
        assert status == 2 and "bfloat16" in said, said
        return
    assert status == 0, said
    model, examples = three_task_model()
    batch = collate(examples["sst"], np.arange(8))
    whole = model.eval().logits("sst", batch)
    model.amp = True
    half = model.logits("sst", batch)
    assert half.dtype == torch.float32 and 0 < (half - whole).abs().max() < 0.02


def test_gpu_is_used_or_refused():
    status, said, _ = run("--use_gpu")
    at_hand = torch.cuda.is_available() or torch.backends.mps.is_available()
    assert status == 0 if at_hand else (status == 2 and "--use_gpu" in said), said


def test_accumulated_steps_add_up():
    """Two steps of one row each, added, are one update: that of the summed losses. Of a buffer
    alone, and in training."""
    training, updates = training_of("--tasks", "sst", "--accumulate", 2), []
    model, data = training.model.eval(), training.data  # no dropout
    training.optimizer_step = lambda name: updates.append(training.gradients.J[0].clone())
    for row in (0, 1):
        training.train_step([("sst", np.array([row]))])
    losses = [model.loss("sst", collate(data["sst"]["train"], np.array([row]))) for row in (0, 1)]
    expected = torch.cat([gradient.to_dense().flatten() for gradient in torch.autograd.grad(
        sum(losses), model.shared_parameters())])
    assert len(updates) == 1 and (updates[0] - expected).norm() < 1e-5 * expected.norm()
    model, examples = three_task_model()
    model.eval()  # no dropout
    buffer = pcgrad.GradientBuffer(model.shared_parameters(), heads_of(model))
    for row in (0, 1):
        buffer.backward("sst", model.loss("sst", collate(examples["sst"], np.array([row]))))
    buffer.combine(0)
    twice = 2 * model.loss("sst", collate(examples["sst"], np.array([0, 1])))
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(twice, model.shared_parameters())])
    assert (buffer.J[0] - expected).norm() < 1e-5 * expected.norm()


def test_heads_compute_their_formulas():
    u, v = torch.randn(2, 6, 16)
    pooled = torch.cat([u, v])
    for kind, features in (("uv", [u, v]), ("uv_diff", [u, v, (u - v).abs()])):
        head = multitask_classifier.Head(TASKS["para"], kind, 16, 0.0)
        expected = torch.cat(features, 1) @ head.linear.weight.T + head.linear.bias
        assert (head(pooled) - expected).abs().max() < 1e-6
    cosine = (u * v).sum(1) / u.norm(dim=1) / v.norm(dim=1)
    assert (multitask_classifier.Head(TASKS["sts"], "cosine", 16, 0.0)(pooled)[:, 0] - 5 * cosine).abs().max() < 1e-5
    head = multitask_classifier.Head(TASKS["para"], "cosine", 16, 0.0)
    assert (head(pooled)[:, 0] - head.weight * cosine - head.bias).abs().max() < 1e-5 and head.weight.requires_grad
    loss, labels = multitask_classifier.task_loss, torch.tensor([0.0, 1.0])
    assert abs(loss(TASKS["sst"], torch.zeros(2, 5), labels) - math.log(5)) < 1e-6
    assert abs(loss(TASKS["para"], torch.zeros(2, 1), labels) - math.log(2)) < 1e-6
    assert loss(TASKS["sts"], torch.tensor([[2.0], [4.0]]), labels) == (4 + 9) / 2


def test_ordinal_log_loss():
    loss, two = multitask_classifier.ordinal_log_loss, torch.tensor([2.0])
    for alpha, expected in ((1.0, 1.339), (1.5, 1.709), (2.0, 2.231)):
        assert abs(loss(torch.zeros(1, 5), two, alpha) - expected) < 5e-4
    logits, labels = torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4, 4], dtype=torch.float64)
    p = logits.softmax(dim=-1)
    written = -sum((1 - p[n, i]).log() * abs(float(labels[n]) - i) ** 1.5 for n in range(6) for i in range(5)) / 6
    assert abs(loss(logits, labels, 1.5) - written) < 1e-12
    saturated = torch.tensor([[50.0, 0, 0, 0, 0]], requires_grad=True)
    value = loss(saturated, torch.tensor([4.0]), 1.0)
    value.backward()
    assert abs(value - 194.5) < 0.1 and saturated.grad.isfinite().all() and saturated.grad[0, 0] > 1
    table = {"ce": math.log(5), "oll1": 1.339, "oll1.5": 1.709, "oll2": 2.231}
    for name, expected in table.items():
        model = MultitaskBERT(BertModel(TINY), dict.fromkeys(("sst", "stars"), TASKS["sst"]), {},
                              "mean", 0.0, sst_loss=name)
        found = [float(model.loss(task, mock.Mock(labels=two), torch.zeros(1, 5)))
                 for task in model.tasks]
        assert np.abs(np.array(found) - [expected, table["ce"]]).max() < 5e-4, name
    assert run("--sst_loss", "oll2")[0] == 0


def test_a_frozen_encoder_runs_once():
    for pair_head in ({"para": "cross", "sts": "uv"}, {"para": "cosine", "sts": "cross"}):
        model, examples = three_task_model(option="pretrain", pair_head=pair_head)
        batches = {task: collate(examples[task], np.array([3, 11, 5])) for task in examples}
        expected = {task: model.logits(task, batch) for task, batch in batches.items()}
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation.encode_once(model, {task: {"train": part} for task, part in examples.items()})
        with mock.patch.object(model, "forward", side_effect=AssertionError("the encoder ran again")):
            for task in examples:
                logits = model.logits(task, collate(examples[task], np.array([3, 11, 5])))
                assert (logits - expected[task]).abs().max() < 1e-5
    calls, real = [], MultitaskBERT.forward

    def forward(self, *args, **kwargs):
        calls.append(self)
        return real(self, *args, **kwargs)

    for flags, once in (([], True), (["--proximal"], True), (["--pal", "size=8"], False), (["--smart"], False)):
        counts = []
        for epochs in (1, 3):
            calls.clear()
            with mock.patch.object(MultitaskBERT, "forward", forward):
                status, said, _ = run("--pair_head", "cross", "--epochs", epochs, *flags, option="pretrain")
            assert status == 0 and ("the encoder is frozen: it runs once" in said) == once, said
            counts.append(len(calls))
        assert (counts[0] == counts[1]) == once, counts


def test_projected_attention_layers():
    base = BertModel(BertConfig(hidden_size=768, num_hidden_layers=0, num_attention_heads=12, intermediate_size=8,
                                vocab_size=8))
    adapter = attention.ProjectedAttention(base.config.hidden_size, 204, 12, 12)
    assert sum(p.numel() for p in adapter.parameters()) == 1819836  # a task's, for bert-base
    identity = attention.ProjectedAttention(768, 204, 12, 12, g="identity")
    assert sum(p.numel() for p in identity.parameters()) == 2 * 768 * 204 + 768 + 204
    for g in ("attention", "identity"):
        without, examples = three_task_model()
        model, _ = three_task_model(pal={"g": g, "size": 8})
        model.load_state_dict(without.state_dict(), strict=False)
        batches = {task: collate(examples[task], np.arange(8)) for task in examples}
        for task, batch in batches.items():
            assert torch.equal(model.eval().logits(task, batch), without.eval().logits(task, batch))
        # against the equation, written out on one sentence; every parameter away from 0 and 1, so
        # that the layer's input h, LayerNorm(h) and the attention block's output differ
        torch.manual_seed(19)
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
        sentence = torch.tensor([examples["sst"].tokens[0][0][0]])
        hidden = model.bert.embed(sentence)[0]
        packing = attention.Packing(torch.ones_like(sentence))
        pal = model.pal["sts"]
        for i, layer in enumerate(model.bert.bert_layers):
            attended = layer.self_attention(packing.pack(hidden[None]), packing)[:len(hidden)]
            a = layer.attention_layer_norm(hidden + layer.attention_dense(attended))
            projected = hidden @ pal.encode.weight.T + pal.encode.bias
            if g == "attention":
                q, k, v = (linear(projected).unflatten(-1, (4, 2)).transpose(0, 1) for linear in (
                    pal.attentions[i].query, pal.attentions[i].key, pal.attentions[i].value))  # (A, L, D)
                projected = F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)
            added = projected @ pal.decode.weight.T + pal.decode.bias
            hidden = layer.out_layer_norm(a + layer.out_dense(F.gelu(layer.interm_dense(a))) + added)
        pooled = model(sentence, torch.ones_like(sentence), adapter=pal)
        assert (pooled - hidden.mean(dim=0)).abs().max() < 1e-5
        # a step on one task leaves the others' layers alone
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        buffer = pcgrad.GradientBuffer(model.shared_parameters(), {t: model.own_parameters(t) for t in model.tasks})
        buffer.zero()
        buffer.backward("para", model.train().loss("para", batches["para"]))
        buffer.combine(0)
        AdamW(model.parameters(), lr=1e-2, weight_decay=0.1).step()
        for name, tensor in model.state_dict().items():
            if "pal." in name or "heads." in name:
                # attention weights do not depend on what is added to every key
                moved = ".para." in name and not name.endswith("key.bias")
                assert torch.equal(tensor, before[name]) or ".para." in name, name
                assert not torch.equal(tensor, before[name]) or not moved, name
    # the zero start still lets V_D learn, and a run with --pal comes back
    assert trained("--pal", "size=8")["pal.sst.decode.weight"].abs().max() > 0
    status, said, folder = run("--pal", "g=identity,size=8", "--option", "pretrain", "--pair_head", "cross", steps=3)
    assert status == 0, said
    best = read_metrics(folder, "evaluation")[-1]
    model, (_, examples) = MultitaskBERT.load(folder), three_task_model()
    dev = read_examples(workspace() / "data" / TASKS["sst"].filename("dev"), TASKS["sst"])
    tokenize(dev, load_tokenizer(folder), 64, cross=False)
    predictions = evaluation.decide(TASKS["sst"], evaluation.predict(model, "sst", dev))
    assert evaluation.score(TASKS["sst"], predictions, dev.labels) == best["dev"]["sst"]


def test_auxiliary_tasks_and_tasks_without_training():
    stars = workspace() / "data" / "stars-train.csv"
    status, said, folder = run("--aux", f"stars={stars}", "--pcgrad", "sst+para+sts,stars", "--batch_size", 4, steps=3)
    assert status == 0 and "sst+para+sts-stars cosine" in said, said
    last = read_metrics(folder, "evaluation")[-1]
    assert set(last["dev"]) == {"sst", "para", "sts"} and "stars" in last["train"]
    assert set(read_metrics(folder, "step")[-1]["losses"]) == {"sst", "para", "sts", "stars"}
    assert MultitaskBERT.load(folder).tasks["stars"].num_outputs == 5  # labels 0..4 are in the file
    assert not same(trained("--batch_size", 4, steps=3), {
        name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if "stars" not in name})
    # a baseline: trained on one task, scored on all; the other heads stay as they were drawn
    status, said, folder = run("--tasks", "sst", "--score_also", "para,sts", "--pair_head", "uv", "--epochs", 2, steps=3)
    assert status == 0, said
    evaluations = read_metrics(folder, "evaluation")
    assert "overall_2023" in evaluations[0] and set(read_metrics(folder, "step")[0]["losses"]) == {"sst"}
    best = max(evaluations, key=lambda line: line["dev"]["sst"])
    assert f"best epoch {best['epoch']}:" in said, "chosen by the task that is trained"
    drawn = {name: p for name, p in torch.load(folder / "last.pt", weights_only=True)["model"].items() if "para" in name}
    kept = load_file(folder / "model.safetensors")
    assert all(torch.equal(drawn[name], kept[name]) for name in drawn) and drawn


def test_auxiliary_tasks_are_one_flag_each_and_their_files_have_any_name():
    root = Path(tempfile.mkdtemp(dir=workspace()))
    files = [root / name for name in ("stars,more=1.csv", "a=b,c=d.csv")]
    for path in files:
        shutil.copy(workspace() / "data" / "stars-train.csv", path)
    flags = ["--aux", f"stars={files[0]}", "--aux", f"again={files[1]}", "--batch_size", 4]
    status, said, folder = run("--tasks", "sst", *flags)
    assert status == 0 and "stars: 20 train rows" in said and "again: 20 train rows" in said, said
    assert {"stars", "again"} < set(read_metrics(folder, "step")[-1]["losses"])

    # --resume reads the flags of the run; a path may be typed again, and a task may not be added
    before = remains(folder)
    for typed in ((), flags, flags[:2]):
        status, said = quietly(multitask_classifier.main, "--resume", folder, *typed)
        assert status == 0 and remains(folder)[0] == before[0], said
    other = flags[1].replace("stars=", "other=", 1)
    status, said = quietly(multitask_classifier.main, "--resume", folder, "--aux", other)
    assert status == 2 and "--aux other is not in the run: leave it out" in said, said


def test_every_id_of_the_test_files_is_predicted():
    """With texts that are empty, encoded together and apart, by an encoder that trains or not."""
    root = Path(tempfile.mkdtemp(dir=workspace()))
    rows = {"sst": ["", "A film.", "\0", "a\0 film"],
            "para": ["Why?\t", "\tWhy?", "\t", "Why?\tWho?", "\0\t"],
            "sts": ["A man.\t\t", "\t", "\0\t\0", "A man.\tA dog."]}
    for name, texts in rows.items():
        header = "\tid\t" + "\t".join(TASKS[name].text_columns)
        lines = [f"{i}\tid{i}\t{text}" for i, text in enumerate(texts)]
        text = "\n".join([header, *lines]) + "\n"
        (root / f"{name}.csv").write_text(text, encoding="utf-8")
    flags = [part for name in rows for part in (f"--{name}_test", root / f"{name}.csv")]
    for option, head, pooling in (("finetune", "cross", "mean"), ("finetune", "cosine", "mean"),
                                  ("pretrain", "cross", "cls"), ("pretrain", "uv_diff", "mean")):
        status, said, folder = run("--pair_head", head, "--pooling", pooling, *flags, option=option)
        assert status == 0, said
        assert "line 2: sentence is empty" in said and "line 4: sentence holds a NUL byte" in said
        for name, texts in rows.items():
            lines = (folder / "predictions" / f"{name}-test-output.csv").read_text().splitlines()
            found = dict(line.split(" , ") for line in lines[1:])
            assert list(found) == [f"id{i}" for i in range(len(texts))], (name, lines)
            assert all(math.isfinite(float(value)) for value in found.values())
        assert abs(float(found["id1"]) - float(found["id2"])) < 1e-5  # of sts: no text, both times


def test_heads_are_taken_over():
    status, said, source = run("--pair_head", "cross", "--tasks", "sst,sts", option="pretrain", steps=4)
    assert status == 0, said
    theirs = {name: x for name, x in load_file(source / "model.safetensors").items() if name.startswith("heads.")}
    still = trained("--pair_head", "cross", "--init_from", source, "--lr", 0)
    assert len(theirs) == 4
    assert all(torch.equal(still[name], tensor) for name, tensor in theirs.items())
    status, said, folder = run("--pair_head", "cross", "--init_from", source, "--pal", "size=8", "--epochs", 1)
    assert status == 0 and "new are heads.para, pal.sst, pal.para, pal.sts" in said, said
    # a run with projected attention layers gives encoder, heads and layers
    source_with_pal = run("--pal", "size=8")[2]
    status, said = quietly(multitask_classifier.main, "--option", "finetune", "--init_from", source_with_pal, "--pal", "size=8",
                           "--lr", 0, "--epochs", 1, "--epoch_length", 1, "--data_dir", workspace() / "data", "--name",
                           str(source_with_pal) + "-on")
    assert status == 0 and same(*(load_file(Path(str(source_with_pal) + end) / "model.safetensors") for end in ("", "-on")))
    status, said, _ = run("--init_from", workspace() / "tiny")
    assert status == 2 and "not a run" in said, said
    status, said, _ = run("--init_from", run("--tasks", "sts")[2])  # a cosine has no parameters
    assert status == 2 and "it holds no heads; to start from its encoder alone: --model" in said, said
    # without --model the encoder too
    tuned = run(steps=4)[2]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        multitask_classifier.main(["--option", "finetune", "--init_from", str(tuned), "--lr", "0", "--epochs", "1",
                                   "--epoch_length", "1", "--data_dir", str(workspace() / "data"), "--name",
                                   str(tuned) + "-on"])
    assert same(load_file(Path(str(tuned) + "-on") / "model.safetensors"), load_file(tuned / "model.safetensors"))
    status, said, _ = run("--init_from", source)
    assert status == 2 and "heads.sts is of another shape" in said, said


def test_an_optimizer_for_each_task():
    flags = "--schedule", "sequential", "--tasks", "para,sst,sts", "--batch_size", 8
    one, own = (run(*flags, *more, steps=9)[2] for more in ((), ("--optimizer_per_task",)))
    states = [torch.load(folder / "last.pt", weights_only=True)["optimizers"] for folder in (one, own)]
    steps = [{name: {int(state["step"]) for state in found[name]["state"].values()} for name in found} for found in states]
    assert steps == [{"all": {9, 3}}, {"para": {3}, "sst": {3}, "sts": {3}}], steps
    rates = []
    with mock.patch.object(multitask_classifier, "learning_rate",
                           lambda *args: rates.append(args[1]) or learning_rate(*args)):
        run(*flags, "--optimizer_per_task", "--epochs", 2, steps=9)
    assert rates == ([1 / 7, 2 / 7, 3 / 7] * 3 + [4 / 7, 5 / 7, 6 / 7] * 3), "each task has a schedule of its own"
    assert not same(*(load_file(folder / "model.safetensors") for folder in (one, own)))


def test_a_share_of_the_rows():
    seen, real = {}, multitask_classifier.collate

    def collate_and_note(examples, rows):
        seen.setdefault(examples.task.name, set()).update(examples.ids[row] for row in rows)
        return real(examples, rows)

    ids = []
    for share, seed in ((0.5, 11711), (0.25, 11711), (0.5, 1)):
        seen.clear()
        flags = ["--limit", f"para={share}", "--batch_size", 4, "--seed", seed]
        with mock.patch.object(multitask_classifier, "collate", collate_and_note):
            status, said, folder = run(*flags, steps=12)
        assert status == 0 and f"para: trained on {round(24 * share)} of its 24 rows" in said, said
        assert (len(seen["para"]), len(seen["sst"])) == (24 * share, 24)
        ids.append((seen["para"], folder))
    assert ids[1][0] < ids[0][0], "the smaller share is a part of the larger"
    in_order = read_examples(workspace() / "data" / "quora-train.csv", TASKS["para"]).ids
    assert {*in_order[:12]} != ids[0][0] != ids[2][0], "drawn from the whole file, by the seed"
    del ids[2]
    assert "para: trained on 1 of its 24 rows" in run("--limit", "para=.001")[1]
    folders = [folder for _, folder in ids]
    folders += [run("--limit", f"para={share}", "--schedule", "mtdnn")[2] for share in (1, 0.5, 0.25)]
    picture = workspace() / "study.png"
    lines = curves.plot_study(folders, picture)
    dev = {folder: read_metrics(folder, "evaluation")[0]["dev"] for folder in folders}
    assert list(lines) == ["schedule round_robin, epoch_length 12, batch_size {'sst': 4, 'para': 4, 'sts': 4}",
                           "schedule mtdnn, epoch_length 2, batch_size {'sst': 16, 'para': 32, 'sts': 12}"], list(lines)
    assert list(lines.values())[1] == [(share, dev[folder]) for share, folder in zip((1, 0.5, 0.25), folders[2:])]
    with contextlib.redirect_stdout(io.StringIO()):
        curves.main([*map(str, folders), "--out", str(picture)])
    assert picture.stat().st_size > 5000
    (folders[0] / "metrics.jsonl").write_text('{"kind": "step", "torn')
    raises(InputError, "no evaluation in it yet", curves.main, [str(folders[0])])
    folders = folders[1:]
    raises(InputError, "differ in --limit of no task", curves.main, [str(folders[0])] * 2 + ["--out", str(picture)])


def test_pooling_is_the_poolers_or_the_mean():
    for pooling in ("cls", "mean"):
        model, examples = three_task_model(pooling=pooling)
        model.eval()
        batch = collate(examples["para"], np.arange(6))
        outputs = model.bert(batch.input_ids, batch.attention_mask, batch.token_type_ids)
        expected = (outputs["pooler_output"] if pooling == "cls" else
                    outputs["last_hidden_state"].sum(1) / batch.attention_mask.sum(1, keepdim=True))
        pooled = model(batch.input_ids, batch.attention_mask, batch.token_type_ids)
        assert (pooled - expected).abs().max() < 1e-6
        reached = any(p is model.bert.pooler_dense.weight for p in model.shared_parameters())
        assert reached == (pooling == "cls")
        assert MultitaskBERT.load(run("--pooling", pooling)[2]).pooling == pooling


def test_evaluation_restores_train_mode_and_order():
    model, examples = three_task_model()
    for training in (True, False):
        model.train(training)
        whole = evaluation.predict(model, "sts", examples["sts"])
        assert model.training == model.bert.training == training
        some = evaluation.predict(model, "sts", examples["sts"], np.array([7, 2, 11]))
        assert np.abs(some - whole[[7, 2, 11]]).max() < 1e-5
    frozen, _ = three_task_model(option="pretrain")
    assert frozen.training and not frozen.bert.training, "a frozen encoder runs without dropout"


def test_scores():
    labels = np.array([0, 1, 2, 3], dtype=np.float32)
    assert evaluation.score(TASKS["sst"], np.array([0, 1, 0, 0]), labels) == 0.5
    assert abs(evaluation.score(TASKS["sts"], 3 * labels - 1, labels) - 1) < 1e-6
    bent = np.array([0.0, 1, 2, 10])  # in the order of the labels, and not in proportion to them
    pearson = evaluation.score(TASKS["sts"], bent, labels)
    assert abs(pearson - np.corrcoef(bent, labels)[0, 1]) < 1e-6 and pearson < 0.9
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert evaluation.score(TASKS["sts"], np.ones(4), labels) == 0 and "constant" in said.getvalue()
    overall = evaluation.overall({"sst": 0.5, "para": 0.8, "sts": 0.2})
    assert abs(overall["overall_2023"] - 0.5) < 1e-9 and abs(overall["overall_2024"] - 1.9 / 3) < 1e-9
    assert evaluation.overall({"sst": 0.5}) == {}
    # by hand: class 0 has 2 right, 1 missed, 1 taken for it; class 1 one of each; class 2 one missed; 3 and 4 do not occur
    labels, predictions = np.array([0.0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 0, 1])
    f1 = evaluation.f1_scores(TASKS["sst"], predictions, labels)
    assert [round(f1[str(i)], 4) for i in range(5)] == [0.6667, 0.4, 0, 0, 0] and abs(f1["macro"] - (2 / 3 + 0.4) / 5) < 1e-9
    assert evaluation.confusion_matrix(TASKS["sst"], predictions, labels)[:3, :3].tolist() == [[2, 1, 0], [1, 1, 0], [0, 1, 0]]
    assert evaluation.f1_scores(TASKS["para"], np.array([1, 1, 0, 0]), np.array([1.0, 0, 1, 1])) == {"positive": 0.4}
    assert evaluation.f1_scores(TASKS["sts"], labels, labels) == {}


def test_decisions():
    found = evaluation.decide(TASKS["para"], np.array([[-3.0], [-0.01], [0.01], [0.39], [3.0]]))
    assert found.tolist() == [0, 0, 1, 1, 1], "a probability above one half"
    logits = np.array([[0.0, 2, 1, -1, 0], [1, 0, 0, 0, 3]])
    similarities = np.array([-0.5, 2.25, 5.5])
    assert evaluation.decide(TASKS["sst"], logits).tolist() == [1, 4]
    assert (evaluation.decide(TASKS["sts"], similarities[:, None]) == similarities).all()


def test_train_scores_are_those_of_a_seeded_sample():
    """Of a model that is always right on the training rows and says 1 of every dev row."""
    model, examples = three_task_model()
    data = {task: {"train": part.take(np.arange(3000) % 24), "dev": part.take(np.arange(20))}
            for task, part in examples.items()}
    data["aux"] = {"train": data["sst"]["train"]}  # an auxiliary task has no dev set
    samples = {}

    def right(model, task, part, rows=None):
        answers = np.ones(20) if rows is None else part.labels[rows]
        if rows is not None:
            samples[task] = rows.tolist()
        return np.eye(5)[answers.astype(int)] if part.task.kind == "classes" else (
            answers[:, None] * 2.0 - (part.task.kind == "binary"))

    with mock.patch.object(evaluation, "predict", right), contextlib.redirect_stdout(io.StringIO()):
        scores = evaluation.evaluate(model, data, seed=1)
        first = dict(samples)
        assert evaluation.evaluate(model, data, seed=1) == scores and samples == first
        evaluation.evaluate(model, data, seed=2)
    assert all(abs(score - 1) < 1e-6 for score in scores["train"].values()), scores
    ones = {task: float((data[task]["dev"].labels == 1).mean()) for task in ("sst", "para")}
    assert scores["dev"] == {**ones, "sts": 0.0} and 0 < ones["sst"] < 1
    assert set(scores["train"]) == set(data)
    f1 = {task: 2 * share / (1 + share) for task, share in ones.items()}
    assert abs(scores["f1"]["para"]["positive"] - f1["para"]) < 1e-9
    assert abs(scores["f1"]["sst"]["1"] - f1["sst"]) < 1e-9 and set(scores["f1"]) == {"sst", "para"}
    assert scores["overall_2023"] == sum(scores["dev"].values()) / 3
    shown = evaluation.describe({**scores, "dev": {"para": 0.25}})
    assert shown == f"dev  para 0.250 (train 1.000, F1 {f1['para']:.3f})", shown
    for task, rows in first.items():  # no row twice, and from the whole set
        assert len(rows) == len(set(rows)) == 2000 and max(rows) > 2900 and min(rows) < 100, task
        assert samples[task] != rows and sorted(samples[task]) != sorted(rows), "another seed"
    assert sorted(first["sst"]) != sorted(first["para"]) != sorted(first["sts"])


def test_errors_are_the_worst_rows():
    wrong = evaluation.wrongness(TASKS["sst"], np.array([[0.0, 0, 0, 0, 0], [9, 0, 0, 0, 0]]), np.array([1.0, 1]))
    assert abs(wrong[0] - math.log(5)) < 1e-6 and 9 < wrong[1] < 9.1
    wrong = evaluation.wrongness(TASKS["para"], np.array([[2.0], [-2.0]]), np.array([1.0, 1]))
    assert np.abs(wrong - np.log1p(np.exp([-2.0, 2.0]))).max() < 1e-6
    assert evaluation.wrongness(TASKS["sts"], np.array([[2.0]]), np.array([4.5]))[0] == 2.5
    status, said, folder = run()
    with open(folder / "errors.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert {row["task"] for row in rows} == {"sst", "para", "sts"}
    for task in ("sst", "sts"):
        found = [float(row["wrongness"]) for row in rows if row["task"] == task]
        assert found == sorted(found, reverse=True)
    best = read_metrics(folder, "evaluation")[-1]
    assert sum(row["task"] == "sst" for row in rows) == round(8 * (1 - best["dev"]["sst"])), "what was right is no error"
    assert "rows of each label by what was predicted" in said
    counts = [[int(n) for n in row.split()] for row in re.findall(r"label \d ((?: +\d+)+)", said)]
    sst = read_examples(workspace() / "data" / "ids-sst-dev.csv", TASKS["sst"])
    of_labels = np.bincount(sst.labels.astype(int), minlength=5)
    assert np.sum(counts, axis=1).tolist() == of_labels.tolist(), "a row for each label"
    # of 120 wrong similarities and 120 wrong classes the worst fifty
    _, examples = three_task_model()
    examples = {task: examples[task].take(np.arange(120) % 24) for task in ("sts", "sst")}
    off = np.random.default_rng(0).permutation(120)
    for task in examples:
        examples[task].ids = [f"{task} off by {n}" for n in off]
    logits = np.zeros((120, 5))
    logits[np.arange(120), (examples["sst"].labels + 1).astype(int) % 5] = off + 1.0
    similarities = (examples["sts"].labels + off / 100)[:, None]
    results = [(examples["sts"], similarities), (examples["sst"], logits)]
    evaluation.write_errors(folder / "errors.csv", results)
    with open(folder / "errors.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [row["id"] for row in rows] == [f"{task} off by {119 - n}" for task in examples
                                           for n in range(50)]
    for row in rows:
        part = examples[row["task"]]
        i = part.ids.index(row["id"])
        assert tuple(filter(None, (row["sentence1"], row["sentence2"]))) == part.texts[i]
        assert float(row["label"]) == float(f"{part.labels[i]:g}")


def test_a_run_leaves_what_it_promises():
    status, said, folder = run("--epochs", 2, "--pair_head", "para=cosine,sts=uv_diff",
                               "--pooling", "cls", steps=2)
    assert status == 0, said
    files = {path.name for path in folder.iterdir()}
    assert files == {"args.json", "metrics.jsonl", "config.json", "model.safetensors", "vocab.txt",
                     "last.pt", "curves.png", "errors.csv", "predictions"}, files
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["step", "evaluation"] * 2
    best = max((line for line in lines if line["kind"] == "evaluation"), key=lambda line: line["overall_2023"])
    assert f"best epoch {best['epoch']}:" in said
    # the saved model is that of the best epoch, and its predictions, read back from the submission, have its scores
    model = MultitaskBERT.load(folder)
    tokenizer = load_tokenizer(folder)
    for task in ("sst", "para", "sts"):
        examples = read_examples(workspace() / "data" / TASKS[task].filename("dev"), TASKS[task])
        text = (folder / "predictions" / f"{task}-dev-output.csv").read_text().splitlines()
        assert text[0] == f"id \t {TASKS[task].heading} "
        assert [line.split(" , ")[0] for line in text[1:]] == examples.ids
        # in float32 as in training, since a tiny model's similarities differ in their last digits only
        predictions = np.array([float(line.split(" , ")[1]) for line in text[1:]], dtype=np.float32)
        assert abs(evaluation.score(TASKS[task], predictions, examples.labels) - best["dev"][task]) < 1e-6
        tokenize(examples, tokenizer, 64, cross=False)
        assert np.abs(evaluation.decide(TASKS[task], evaluation.predict(model, task, examples)) - predictions).max() < 1e-5
    raises(InputError, "not a run", MultitaskBERT.load, workspace() / "tiny")
    whole, other = (folder / "model.safetensors").read_bytes(), (workspace() / "tiny" / "model.safetensors").read_bytes()
    flipped = bytearray(whole)
    flipped[-5000] ^= 1  # one bit of one number
    for damage, reason in ((b"", "is damaged"), (whole[:-9], "is damaged"), (bytes(flipped), "is damaged"),
                           (other, "not a run")):
        (folder / "model.safetensors").write_bytes(damage)
        raises(InputError, reason, MultitaskBERT.load, folder)


def test_a_small_batch_is_learnt_by_heart():
    model, examples = three_task_model()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    buffer = pcgrad.GradientBuffer(model.shared_parameters(), heads_of(model), "pcgrad")
    optimizer, losses = AdamW([p for p in model.parameters()], lr=3e-3), []
    for step in range(150):
        buffer.zero()
        total = 0
        for task in examples:
            loss = model.loss(task, collate(examples[task], np.arange(4)))
            buffer.backward(task, loss)
            total += loss.item()
        buffer.combine(step)
        optimizer.step()
        losses.append(total)
    assert losses[0] > 2 and losses[-1] < 0.05, losses[::30]


def commands_of(cell):
    """The commands of a cell of the README's table: "`a`, then `b`, and with `--flag`" -> [a, b, b --flag]."""
    commands = []
    for command in re.findall("`(.*?)`", cell):
        commands.append(f"{full} {command}" if command.startswith("--") else command)
        full = command if not command.startswith("--") else full
    return commands


def test_rows_of_the_readme_run():
    """Every command of the README's table of the five reports, on the tiny encoder and a few steps of the demo set."""
    root, readme = workspace() / "rows", (HERE / "README.md").read_text(encoding="utf-8")
    table = readme.split("## Every system of the five reports")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| (\d\w) \|.*?\| (`.*) \|$", table, flags=re.MULTILINE))
    assert sorted(rows) == sorted(f"{report}{letter}" for report, letters in enumerate(
        ("abcdef", "abcdefg", "abcde", "abcdef", "abcdefg"), start=1) for letter in letters)
    small, train = ["--data_dir", str(workspace() / "data")], re.search('^TRAIN="(.*)"$', readme, re.MULTILINE)[1]
    for row, cell in rows.items():
        for i, command in enumerate(commands_of(cell)):
            command = command.replace("$TRAIN", train).replace("--name ", "--name runs/")
            python, script, *flags = command.replace("bert-base-uncased", str(workspace() / "tiny")).replace(
                "runs/", f"{root}/").replace("data/demo", str(workspace() / "data")).split()
            main = {"multitask_classifier.py": multitask_classifier, "pretrain_mlm.py": pretrain_mlm,
                    "curves.py": curves}[script].main
            if script == "multitask_classifier.py":
                if "--model" not in flags and "--init_from" not in flags:
                    flags += ["--model", str(workspace() / "tiny")]
                if "--name" not in flags:
                    flags += ["--name", f"{root}/{row}-{i}"]
                flags += [*small, "--epochs", "1", *(() if "shortest" in flags else ("--epoch_length", "6"))]
                leaves = Path(flags[flags.index("--name") + 1]) / "metrics.jsonl"
            elif script == "pretrain_mlm.py":
                flags += [*small, "--epochs", "1", "--epoch_length", "2", "--batch_size", "4"]
                leaves = Path(flags[flags.index("--out") + 1]) / "metrics.jsonl"
            else:
                leaves = Path(flags[-1])
            said = io.StringIO()
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                status = exit_status(main, flags)
            assert status == 0 and leaves.exists(), (row, command, said.getvalue())
            if leaves.suffix == ".jsonl":
                assert read_metrics(leaves.parent, "evaluation"), (row, command)


def script_of_the_results(name):
    specification = importlib.util.spec_from_file_location(name, HERE / "results" / "rows" / f"{name}.py")
    script = importlib.util.module_from_spec(specification)
    sys.modules[name] = script  # dataclasses look there
    specification.loader.exec_module(script)
    return script


def test_averages_of_runs():
    """results/rows/average.py: the scores of the runs are theirs, and means are means."""
    average = script_of_the_results("average")
    flags = ("--pair_head", "para=cross,sts=cosine")
    folders = [run(*flags, "--seed", seed, steps=4)[2] for seed in (1, 2)]

    def said(*folders):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            average.main([*map(str, folders), "--data_dir", str(workspace() / "data")])
        return dict(line.split(": ") for line in out.getvalue().splitlines() if "overall_2023" in line)

    scores = said(*folders)
    for folder in folders:
        best = max(read_metrics(folder, "evaluation"), key=lambda line: line["overall_2023"])
        assert f"sts {best['dev']['sts']:.3f}  overall_2023 {best['overall_2023']:.3f}" in scores[str(folder)]
    models = [MultitaskBERT.load(folder) for folder in folders]
    examples = tokenize(read_examples(workspace() / "data" / "sts-dev.csv", TASKS["sts"]), models[0].tokenizer, 64, cross=False)
    similarity = sum(evaluation.predict(model, "sts", examples)[:, 0] for model in models) / 2
    assert f"sts {np.corrcoef(similarity, examples.labels)[0, 1]:.3f}" in scores["the mean of their outputs"]
    states = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in models]
    mean = average.mean_of_weights(models)
    for name, tensor in mean.state_dict().items():
        torch.testing.assert_close(tensor, (states[0][name] + states[1][name]) / 2)
    averaged = shutil.copytree(folders[0], workspace() / "averaged")
    mean.save(averaged, folders[0])
    assert said(averaged)[str(averaged)] == scores["the mean of their weights"]
    logits = [{"sst": np.log([[.5, .25, .25]]) + shift, "para": np.array([[z]])} for shift, z in ((0, 1.), (7, 3.))]
    means = average.mean_of_outputs(logits)  # a constant added to logits of classes changes nothing
    np.testing.assert_allclose(means["sst"], np.log([[.5, .25, .25]]))
    assert means["para"] == 2.0
    other = run("--pair_head", "uv_diff")[2]
    raises(InputError, "in their seed alone", said, folders[0], other)


def test_rows_of_the_results():
    """Every command of results/rows/rows.py is understood, and its table says what its records hold."""
    rows = script_of_the_results("rows")
    sizes = {"sst": 8544, "para": 16169, "sts": 6040}
    budgets = dict.fromkeys(rows.ROWS, 30_000) | {name: 120_000 if "longer" in name else 60_000 for name in rows.SEARCH}
    for name, row in rows.ALL.items():
        if row.same_as:
            continue
        python, script, *given = rows.command_of(name, 3, machine="").split()
        args = multitask_classifier.resolve(given)
        assert (python, script, args.seed, args.name) == ("python", "multitask_classifier.py", 3, f"rows/{name}-3")
        schedule = Schedule(args.schedule, {task: sizes[task] for task in args.trained}, args.batch_size, args.epoch_length,
                            3, args.epochs, args.upsample)
        seen = sum(len(drawn) for epoch in range(args.epochs) for step in schedule.epoch(epoch) for _, drawn in step)
        assert math.isclose(seen, budgets[name], rel_tol=0.01), (name, seen)
        assert set(row.base) < set(rows.ROWS), name
    for name in rows.PRETRAINING:
        pretrain_mlm.get_parser().parse_args(rows.command_of(name, 3).split()[2:])
    records = [folder for folder in rows.HERE.iterdir() if (folder / "command.txt").exists()]
    for folder in records:  # each was made by the command that the row has now
        name, _, seed = folder.name.rpartition("-")
        args = json.loads((folder / "args.json").read_text())
        machine = " --use_gpu" * args["use_gpu"] + " --amp" * args["amp"]
        assert (folder / "command.txt").read_text().strip() == rows.command_of(name, seed, machine), folder
    assert records

    def table():
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            rows.tables()
        return said.getvalue().splitlines()

    readme = (HERE / "README.md").read_text(encoding="utf-8").splitlines()
    assert set(table()) <= set(readme), "the README has other tables than `python results/rows/rows.py table`"
    root = Path(tempfile.mkdtemp(dir=workspace()))
    for name, seed, mean in (("1a", 1, .41), ("1a", 2, .43), ("1b", 1, .50), ("1b", 2, .52), ("1d", 1, .60), ("1d", 2, .62),
                             ("4b", 1, .10), ("4b", 2, .30),
                             ("default", 1, .50), ("default", 2, .52), ("default+pal", 1, .53), ("default+rate", 1, .60)):
        folder = root / f"{name}-{seed}"
        folder.mkdir()
        (folder / "args.json").write_text(json.dumps({"trained": ["sst"] if name == "1a" else ["sst", "para", "sts"]}))
        # the first evaluation has the best mean on dev, the second the best sst there, and all that is best on train
        scores = [{"dev": {"sst": mean - .1, "para": mean, "sts": mean + .1}, "train": dict.fromkeys(sizes, .8)},
                  {"dev": {"sst": mean, "para": mean - .2, "sts": mean}, "train": dict.fromkeys(sizes, .9)}]
        lines = [{"kind": "evaluation", "step": step} | line for step, line in enumerate(scores, start=1)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with mock.patch.object(rows, "HERE", root):
        rows.records.cache_clear()
        said = table()
    rows.records.cache_clear()
    for line in (
            "| 1a | sentiment alone | 2 | 2 | 0.420 ± 0.014 | (0.220 ± 0.014) | (0.420 ± 0.014) |  | 0.416 / 0.376 / 0.019 |",
            "| 2a | sentiment alone | 2 | 2 | 0.420 ± 0.014 |  |  |  | 0.511 / - / - |",
            "| 1d | 1b with PCGrad | 2 | 2 | 0.510 ± 0.014 | 0.610 ± 0.014 | 0.710 ± 0.014 | 0.610 ± 0.014 | "
            "0.485 / 0.840 / 0.660 |",
            "| standard deviation over seeds | 0.0141 | 0.0141 | 0.0141 | 0.0141 |",  # without the frozen 4b
            "| degrees of freedom | 3 | 2 | 2 | 3 |",  # 1a, 2a and 2b are one run
            "| 1b, 1d | PCGrad | +0.000, +0.100: a difference | -0.013, +0.100: other sign | +0.025, +0.100: same sign |",
            "| 1a, 1b | the pair tasks | +0.069, -0.010: not told apart | not trained in both | not trained in both |",
            "| default+pal | PAL | 1 | 2 | 0.430 (0.800) | 0.530 (0.800) | 0.630 (0.800) | 0.530 | +0.020: not told apart |",
            "| default+rate | at a rate of 2e-4 | 1 | 2 | 0.500 (0.800) | 0.600 (0.800) | 0.700 (0.800) | 0.600 | +0.090 |"):
        assert line in said, line
    generator, told_apart = np.random.default_rng(0), []
    for _ in range(200):  # with two rows alone it is Student's test
        values = {"1b": generator.normal(0, 1, 3).tolist(), "1d": generator.normal(1.5, 1, 4).tolist()}
        deviation, freedom = rows.spread({name: rows.ROWS[name] for name in values}, values.get)
        told_apart.append(rows.difference(values["1d"], values["1b"], deviation, freedom)[1])
        assert told_apart[-1] == (ttest_ind(values["1b"], values["1d"]).pvalue < 0.05)
    assert {*told_apart} == {True, False}


def test_bad_input_gives_one_line_and_status_2():
    root = workspace()
    broken = shutil.copytree(root / "data", root / "data-without-sts-dev")
    (broken / "sts-dev.csv").unlink()
    no_config = Path(tempfile.mkdtemp(dir=root))
    wrong_shape = shutil.copytree(root / "tiny", root / "tiny-of-wrong-shape")
    config = json.loads((wrong_shape / "config.json").read_text())
    (wrong_shape / "config.json").write_text(json.dumps({**config, "intermediate_size": 33}))
    taken = run()[2]
    files, encoders = root / "hostile-files", root / "hostile-encoders"
    files.mkdir()
    for name, content in (("binary", bytes(range(256)) * 4), ("utf16", "\tid\tsentence\tsentiment\n".encode("utf-16")),
                          ("header", b"\tid\tsentence\tsentiment\n"), ("comma", b"id,sentence,sentiment\nx,good,1\n"),
                          ("nul", b"\tid\tsentence\tsentiment\n0\tx\tgo\0od\t1\n"),
                          ("spaces", b"\tid\tsentence\tsentiment\n0\tx\t   \t1\n"),
                          ("open", b'\tid\tsentence\tsentiment\n0\tx\t"good\t1\n1\ty\tbad\t0\n'),
                          ("half", b"\tid\tsentence1\tsentence2\tis_duplicate\n0\tx\ta\tb\t0.5\n"),
                          ("six", b"\tid\tsentence1\tsentence2\tsimilarity\n0\tx\ta\tb\t6\n")):
        (files / f"{name}.csv").write_bytes(content)
    for name in ("no-vocab", "other-vocab", "long-vocab", "no-weights", "cut-weights", "flipped-weights", "gpt", "heads",
                 "words", "dropout"):
        shutil.copytree(root / "tiny", encoders / name)
    (encoders / "no-vocab" / "vocab.txt").unlink()
    (encoders / "other-vocab" / "vocab.txt").write_text("<s>\n</s>\nhello\n")
    with open(encoders / "long-vocab" / "vocab.txt", "a") as file:
        file.write("".join(f"word{i}\n" for i in range(2000)))
    weights = (root / "tiny" / "model.safetensors").read_bytes()
    (encoders / "no-weights" / "model.safetensors").unlink()
    (encoders / "cut-weights" / "model.safetensors").write_bytes(weights[:-100])
    (encoders / "flipped-weights" / "model.safetensors").write_bytes(weights[:-100] + bytes([weights[-100] ^ 4]) + weights[-99:])
    for name, field, value in (("gpt", "model_type", "gpt2"), ("heads", "num_attention_heads", 5),
                               ("words", "hidden_size", "many"), ("dropout", "hidden_dropout_prob", 1.0)):
        (encoders / name / "config.json").write_text(json.dumps({**config, field: value}))
    (root / "empty.csv").write_text("")
    (root / "labels.csv").write_text("\tid\tsentence\tsentiment\n0\tx\tgood\t9\n")
    table = [
        (["--tasks", "sst,imdb"], "unknown task 'imdb'"),
        (["--tasks", "sst,sst"], "named twice"),
        (["--schedule", "alternating"], "invalid choice: 'alternating'"),
        (["--option", "freeze"], "invalid choice: 'freeze'"),
        (["--pair_head", "concat"], "unknown head 'concat'"),
        (["--pair_head", "sst=uv,para=uv,sts=uv"], "'sst' is none of the tasks it applies to here (para, sts)"),
        (["--pair_head", "para=uv"], "no value for sts"),
        (["--tasks", "sst", "--pair_head", "uv"], "no pair task"),
        (["--batch_size", "sst=2,yelp=3"], "'yelp' is none of the tasks"),
        (["--batch_size", "0"], "argument --batch_size"),
        (["--batch_size", "sst=2,para=x,sts=2"], "argument --batch_size"),
        (["--epoch_length", "long"], "not longest, shortest or a number"),
        (["--epoch_length", "0"], "not longest, shortest or a number"),
        (["--lr", "-1"], "argument --lr"),
        (["--lr", "nan"], "argument --lr"),
        (["--hidden_dropout_prob", "1"], "argument --hidden_dropout_prob"),
        (["--epochs", "0"], "argument --epochs"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--pcgrad", "--tasks", "sst"], "--pcgrad with one task"),
        (["--pcgrad", "sst+para+sts"], "--pcgrad with one group"),
        (["--gradvac", "sst,para"], "does not name each of sst, para, sts once"),
        (["--pcgrad", ""], "does not name each of sst, para, sts once"),
        (["--pcgrad", "--gradvac"], "one or the other"),
        (["--surgery_scope", "tensor"], "there is no surgery"),
        (["--log_gradients", "--option", "pretrain"], "--log_gradients with --option pretrain"),
        (["--pcgrad", "--schedule", "sequential", "--accumulate", "4"], "batches follow each other"),
        (["--schedule", "sequential", "--epoch_length", "2"], "left without a step"),
        (["--smart", "radius=1"], "'radius' is none of weight=, eps=,"),
        (["--smart", "eps=small"], "argument --smart: eps: 'small' is not a number"),
        (["--smart", "eps=1,eps=2"], "'eps=2' is not one more NAME=value"),
        (["--smart", "sigma=0"], "the ascent could not start"),
        (["--smart", "norm=1"], "norm: '1' is none of inf, 2"),
        (["--smart", "tasks=sst+yelp"], "tasks: 'yelp' is not among --tasks sst,para,sts"),
        (["--smart", "tasks=sst+"], "'sst+' is not one or more different names"),
        (["--smart", "--amp"], "would be lost in rounding"),
        (["--smart", "eps=1", "--amp"], "would be lost in rounding"),
        (["--smart", "eps=.009,step=1", "--amp"], "would be lost in rounding"),
        (["--proximal", "beta=1"], "argument --proximal: beta: '1' is not a number of at least 0 and below 1"),
        (["--seed", str(2 ** 70)], "argument --seed"),
        (["--epoch_length", "\u00b2"], "not longest, shortest or a number"),
        (["--name", ""], "argument --name: empty"),
        (["--batch_size", "sst=2,sst=3,para=2,sts=2"], "is not one more NAME=value"),
        (["--sst_dev_out", str(root)], "not a file in a folder"),
        (["--sst_dev_out", str(root / "nowhere" / "a.csv")], "not a file in a folder"),
        (["--name", str(root / "tiny" / "vocab.txt" / "x")], "this folder cannot be made"),
        (["--sst_train", str(root / "empty.csv")], "the file is empty"),
        (["--sst_train", str(root / "labels.csv")], "labels.csv: 1 of 1 rows are malformed: line 2: sentiment 9"),
        (["--model", str(root / "nowhere" / "at" / "all")], "--model"),
        (["--model", str(no_config)], "config.json: cannot be read"),
        (["--model", str(wrong_shape)], "has shape (32,), config.json asks for (33,)"),
        (["--data_dir", str(broken)], "sts-dev.csv: no such file"),
        (["--sst_test", str(root / "gone.csv")], "gone.csv: no such file"),
        (["--sts_train", str(root / "data" / "ids-sst-train.csv")], "no column 'sentence1'"),
        (["--name", str(taken)], "there is a run of this name"),
        (["--sst_loss", "oll1", "--tasks", "para,sts"], "sst is not among --tasks"),
        (["--sst_loss", "oll3"], "invalid choice: 'oll3'"),
        (["--pal", "g=relu"], "g: 'relu' is none of attention, identity"),
        (["--pal", "size=0"], "size: '0' is not a whole number"),
        (["--pal", "size=10"], "is no multiple of the encoder's 4 attention heads"),
        (["--aux", "stars"], "is not NAME=FILE"),
        (["--aux", "stars="], "is not NAME=FILE"),
        (["--aux", "=x.csv"], "is not NAME=FILE"),
        (["--aux", "stars=x.csv", "--aux", "stars=y.csv"], "one of stars is given twice"),
        (["--aux", f"a={root}/gone.csv,b={root}/gone.csv"], "gone.csv: no such file"),
        (["--aux", "sst=x.csv"], "'sst' is a task already"),
        (["--aux", "a-b=x.csv"], "'a-b' is no plain name"),
        (["--aux", "train=x.csv"], "'train' is no plain name"),
        (["--pal", "size=4000000000"], "below 10000"),
        (["--schedule", "annealed", "--epoch_length", str(10 ** 12)], "not longest, shortest or a number"),
        (["--aux", f"stars={root}/gone.csv"], "gone.csv: no such file"),
        (["--aux", f"stars={root / 'data' / 'sts-train.csv'}"], "no column 'sentence'"),
        (["--score_also", "sst"], "sst is among --tasks"),
        (["--score_also", "yelp"], "argument --score_also: unknown task 'yelp'"),
        (["--limit", "para=0"], "not a share above 0 and up to 1"),
        (["--limit", "1.5"], "not a share above 0 and up to 1"),
        (["--limit", "yelp=.5"], "not a share above 0 and up to 1 of one of sst, para, sts"),
        (["--upsample"], "--upsample without --schedule mtdnn"),
        (["--optimizer_per_task"], "needs steps of one task"),
        (["--optimizer_per_task", "--schedule", "mtdnn", "--accumulate", "2"], "needs steps of one task"),
        (["--pcgrad", "--schedule", "mtdnn"], "a step has one task"),
        (["--init_from", str(root / "tiny")], "not a run of this script"),
        (["--init_from", str(taken), "--pair_head", "uv"], "is of another shape"),
        (["--save_every", "-1"], "argument --save_every"),
        (["--resume", str(root / "tiny")], "no run to go on with"),
        (["--sst_train", str(root)], "no such file"),
        (["--sst_train", str(files / "binary.csv")], "is not UTF-8"),
        (["--sst_train", str(files / "utf16.csv")], "is not UTF-8"),
        (["--sst_train", str(files / "header.csv")], "no rows"),
        (["--sst_train", str(files / "comma.csv")], "no column 'id'"),
        (["--sst_train", str(files / "nul.csv")], "nul.csv"),
        (["--sst_train", str(files / "spaces.csv")], "sentence is empty"),
        (["--sst_train", str(files / "open.csv")], "quote"),
        (["--para_dev", str(files / "half.csv")], "is_duplicate 0.5 is not a class 0..1"),
        (["--sts_dev", str(files / "six.csv")], "similarity 6 is outside 0..5"),
        (["--model", str(encoders / "no-vocab")], "vocab.txt"),
        (["--model", str(encoders / "other-vocab")], "no [CLS] in the vocabulary"),
        (["--model", str(encoders / "long-vocab")], "too few for its vocabulary of "),
        (["--model", str(encoders / "no-weights")], "neither model.safetensors nor pytorch_model.bin"),
        (["--model", str(encoders / "cut-weights")], "is damaged"),
        (["--model", str(encoders / "flipped-weights")], "is damaged"),
        (["--model", str(encoders / "gpt")], "model_type is 'gpt2'"),
        (["--model", str(encoders / "heads")], "is no multiple of num_attention_heads"),
        (["--model", str(encoders / "words")], "hidden_size is 'many'"),
        (["--model", str(encoders / "dropout")], "hidden_dropout_prob is 1.0"),
    ]
    assert len(table) >= 90
    for flags, part in table:
        status, said, _ = run(*flags)
        assert status == 2 and part in said and "Traceback" not in said, (flags, status, said)
        last = said.splitlines()[-1]  # the error is one line, after what was said before it
        program = f"{Path(sys.argv[0]).name}: "
        assert last.startswith(program) and part in last and said.count(program) == 1, said
    (broken / "sts-dev.csv").write_bytes((root / "data" / "sts-dev.csv").read_bytes())
    (broken / "sts-test-student.csv").unlink()
    status, said, folder = run("--data_dir", broken)
    assert status == 0 and "so no predictions for sts test" in said  # an optional file: said, and the run goes on
    assert not (folder / "predictions" / "sts-test-output.csv").exists()


RESUMED = [  # settings that keep something from step to step
    ["--pcgrad", "--accumulate", "2"], ["--gradvac", "--schedule", "mixed"], ["--smart", "--proximal"],
    ["--pal", "size=8", "--schedule", "mtdnn", "--upsample"], ["--schedule", "annealed", "--gradvac", "--accumulate", "3"],
    ["--schedule", "sequential", "--optimizer_per_task"], ["--option", "pretrain", "--pair_head", "cross"],
    ["--aux", "stars=DATA/stars-train.csv", "--sst_loss", "oll1.5", "--limit", "0.5"]]


def resumable(flags):
    """Flags of a run of two epochs of seven steps that is saved after every optimizer step."""
    root = workspace()
    flags = [flag.replace("DATA", str(root / "data")) for flag in flags]
    return ["--option", "finetune", "--model", root / "tiny", "--data_dir", root / "data", "--epochs", 2, "--epoch_length", 7,
            "--batch_size", 4, "--save_every", 0, *flags]


def remains(folder):
    """What a run left, apart from its speed: all metrics, the final and the best weights, the predictions."""
    metrics = [{key: value for key, value in line.items() if not key.endswith("_per_second")}
               for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())]
    last = torch.load(folder / "last.pt", weights_only=True)["model"]
    files = {path.name: path.read_bytes() for path in [*(folder / "predictions").iterdir(), folder / "errors.csv"]}
    return metrics, {**load_file(folder / "model.safetensors"), **{f"last {name}": x for name, x in last.items()}}, files


def equal(folder, other):
    (metrics, weights, files), (metrics_2, weights_2, files_2) = remains(folder), remains(other)
    return metrics == metrics_2 and same(weights, weights_2) and files == files_2


class Killed(BaseException):
    """Nothing of the program runs after it, as after kill -9."""


def quietly(main, *flags):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = exit_status(main, list(map(str, flags)))
    return status, said.getvalue()


def test_a_killed_run_goes_on_to_the_same_bits():
    generator, real = random.Random(0), multitask_classifier.Training.train_step
    for n, flags in enumerate(RESUMED):
        whole, killed = (workspace() / "runs" / f"resumed-{n}-{kind}" for kind in ("whole", "killed"))
        assert quietly(multitask_classifier.main, *resumable(flags), "--name", whole)[0] == 0
        for attempt, flags_now in enumerate(([*resumable(flags), "--name", killed], ["--resume", killed])):
            left = [generator.randrange(1 + attempt, 6)]  # steps until it is killed, twice

            def train_step(training, batches):
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
                real(training, batches)

            with mock.patch.object(multitask_classifier.Training, "train_step", train_step):
                try:
                    quietly(multitask_classifier.main, *flags_now)
                    raise AssertionError("not killed")
                except Killed:
                    pass
            with open(killed / "metrics.jsonl", "a") as file:
                file.write('{"kind": "step", "torn')  # what was written after the last save is cut off
        status, said = quietly(multitask_classifier.main, "--resume", killed)
        assert status == 0 and equal(whole, killed), (flags, said)
    # killed before anything was saved: what was taken over from another run is taken over again
    flags = ["--init_from", whole, "--option", "finetune", "--epochs", 1, "--epoch_length", 3, "--data_dir",
             workspace() / "data", "--aux", f"stars={workspace() / 'data' / 'stars-train.csv'}"]
    on, killed = whole.with_name("from-whole"), whole.with_name("from-whole-killed")
    assert quietly(multitask_classifier.main, *flags, "--name", on)[0] == 0
    with mock.patch.object(multitask_classifier.Training, "train_step", side_effect=Killed):
        try:
            quietly(multitask_classifier.main, *flags, "--name", killed)
        except Killed:
            pass
    assert quietly(multitask_classifier.main, "--resume", killed)[0] == 0 and equal(on, killed)
    before = remains(whole)
    assert quietly(multitask_classifier.main, "--resume", whole)[0] == 0 and remains(whole)[0] == before[0]  # a finished one


def test_speed_is_per_second():
    now = [100.0]
    with mock.patch.object(time, "perf_counter", lambda: now[0]):
        meter = Meter(["sst", "para"], "cpu")
        for rows, tokens in ((1, 100), (3, 300)):
            meter.add("sst", torch.tensor(float(rows)), rows, tokens)
            meter.steps += 1
        now[0] += 8
        means, speed = meter.read()
        assert means == {"sst": 10 / 4}, "of the rows; none of a task that had none"
        assert speed == {"tokens_per_second": 50, "steps_per_second": 0.25}
        meter.add("para", torch.tensor(5.0), 2, 20)
        now[0] += 2
        assert meter.read() == ({"para": 5}, {"tokens_per_second": 10, "steps_per_second": 0})


def test_saving_is_due_after_minutes():
    folder = Path(tempfile.mkdtemp(dir=workspace())) / "run"
    kept, now = Run(folder, {}), time.perf_counter()
    for seconds, minutes, due in ((0, 1, False), (59, 1, False), (61, 1, True), (299, 5, False),
                                  (301, 5, True), (0, 0, True)):
        kept.saved_at = now - seconds
        with mock.patch.object(time, "perf_counter", lambda: now):
            assert kept.due(minutes) == due, (seconds, minutes)
    kept.start()
    kept.saved_at = now - 301
    kept.save({})
    assert not kept.due(5), "counted from the last save"


def test_kill_9_at_twenty_random_moments():
    if not FULL:
        raise SkipTest("with --full")
    generator = random.Random(1)
    script = [sys.executable, multitask_classifier.__file__]
    undisturbed = {}
    for n in range(20):
        flags = RESUMED[n % len(RESUMED)]
        whole, killed = (workspace() / "runs" / f"kill9-{kind}" for kind in (f"{n % len(RESUMED)}-whole", f"{n}-killed"))
        command = [*map(str, [*script, *resumable(flags), "--epochs", 4])]
        if n % len(RESUMED) not in undisturbed:
            start = time.perf_counter()
            subprocess.run([*command, "--name", str(whole)], check=True, capture_output=True)
            undisturbed[n % len(RESUMED)] = time.perf_counter() - start
        process = subprocess.Popen([*command, "--name", str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not killed.exists():
            time.sleep(0.01)
        time.sleep(generator.random() * 0.4 * undisturbed[n % len(RESUMED)])
        process.kill()
        process.wait()
        subprocess.run([*script, "--resume", str(killed)], check=True, capture_output=True)
        assert equal(whole, killed), flags


def test_ctrl_c_saves_and_says_how_to_go_on():
    real, handler = multitask_classifier.Training.train_step, signal.getsignal(signal.SIGINT)
    flags = resumable(["--accumulate", "3", "--save_every", "100"])
    whole, stopped = (workspace() / "runs" / f"ctrl-c-{kind}" for kind in ("whole", "stopped"))
    assert quietly(multitask_classifier.main, *flags, "--name", whole)[0] == 0

    def press(at):
        def train_step(training, batches):
            real(training, batches)
            if training.steps_of_run() in at:
                signal.raise_signal(signal.SIGINT)
        return mock.patch.object(multitask_classifier.Training, "train_step", train_step)

    for at in ((8,), (12,)):
        with press(at):
            status, said = quietly(multitask_classifier.main, *(
                ["--resume", stopped] if stopped.exists() else [*flags, "--name", stopped]))
        assert status == 130 and "--resume" in said.splitlines()[-1] and "Traceback" not in said, said
        assert torch.load(stopped / "last.pt", weights_only=True)["step"] in (3, 6), "the optimizer step was made"
    assert quietly(multitask_classifier.main, "--resume", stopped)[0] == 0 and equal(whole, stopped)
    with press((8, 9)):  # a second one does not wait
        status, said = quietly(multitask_classifier.main, *flags, "--name", str(stopped) + "-at-once")
    assert status == 130 and "stopped at once" in said, said
    assert signal.getsignal(signal.SIGINT) is handler  # a shell starts what is in the background without one


@contextlib.contextmanager
def inside(folder):
    """With `folder` as the current directory."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def killed_after(steps, main, *flags):
    """main(flags), killed in the step after so many."""
    real, left = multitask_classifier.Training.train_step, [steps]

    def train_step(training, batches):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        real(training, batches)

    with mock.patch.object(multitask_classifier.Training, "train_step", train_step):
        try:
            quietly(main, *flags)
        except Killed:
            return
    raise AssertionError("not killed")


def test_a_run_and_its_project_can_be_moved():
    """Started inside the project with relative paths, killed; project and run are renamed, and it
    is resumed from elsewhere to the bits of an undisturbed one."""
    root = workspace()
    old, new = root / "project", root / "project, renamed"
    (old / "runs").mkdir(parents=True)
    for name in ("tiny", "data"):
        shutil.copytree(root / name, old / name)
    flags = ["--option", "finetune", "--model", "tiny", "--data_dir", "data", "--aux",
             "stars=data/stars-train.csv", "--sst_dev", "data/ids-sst-train.csv", "--sst_dev_out",
             "runs/sst.csv", "--epochs", 2, "--epoch_length", 3, "--batch_size", 4,
             "--save_every", 0]
    with mock.patch.object(flags_of, "HERE", old), inside(old):
        assert quietly(multitask_classifier.main, *flags, "--name", old / "runs" / "whole")[0] == 0
        killed_after(4, multitask_classifier.main, *flags, "--name", old / "runs" / "killed")
        status, said = quietly(pretrain_mlm.main, "--model", "tiny", "--data_dir", "data",
                               "--text", "tiny/vocab.txt", "--epochs", 1, "--epoch_length", 2,
                               "--out", "runs/mlm")
        assert status == 0, said
    old.rename(new)
    (new / "runs" / "killed").rename(new / "a run")
    with mock.patch.object(flags_of, "HERE", new), inside(root):
        status, said = quietly(multitask_classifier.main, "--resume", f"{new.name}/a run")
        assert status == 0 and equal(new / "a run", new / "runs" / "whole"), said
        status, said = quietly(pretrain_mlm.main, "--resume", new / "runs" / "mlm")
        assert status == 0 and "mlm" in said.splitlines()[-1], said


def test_a_path_that_is_gone_can_be_given_anew():
    root = workspace() / "moved"
    root.mkdir()
    for name in ("tiny", "data"):
        shutil.copytree(workspace() / name, root / name)
    (root / "tiny" / "text.txt").write_bytes((root / "data" / "ids-sst-train.csv").read_bytes())
    shutil.copyfile(root / "data" / "stars-train.csv", root / "stars.csv")
    (root / "out").mkdir()
    first = run(steps=1, name=str(root / "first"))[2]
    elsewhere = root / "started here"
    elsewhere.mkdir()

    # started with relative paths, of which all are renamed
    with inside(elsewhere):
        flags = ["--option", "finetune", "--model", "../tiny", "--data_dir", "../data",
                 "--init_from", "../first", "--aux", "stars=../stars.csv",
                 "--sst_dev", "../data/ids-sst-dev.csv", "--sts_dev_out", "../out/sts.csv",
                 "--epochs", 2, "--epoch_length", 3, "--batch_size", 4, "--save_every", 0]
        killed_after(4, multitask_classifier.main, *flags, "--name", root / "killed")
        assert quietly(multitask_classifier.main, *flags, "--name", root / "whole")[0] == 0
        status, said = quietly(pretrain_mlm.main, "--model", "../tiny",
                               "--text", "../tiny/text.txt", "--epochs", 1, "--epoch_length", 2,
                               "--out", "../mlm")
        assert status == 0, said
    elsewhere.rmdir()
    for name in ("tiny", "data", "first", "stars.csv", "out"):
        (root / name).rename(root / f"new-{name}")
    moved = {"model": "new-tiny", "data_dir": "new-data", "init_from": "new-first",
             "aux": "stars=new-stars.csv", "sst_dev": "new-data/ids-sst-dev.csv",
             "sts_dev_out": "new-out/sts.csv"}
    given = [word for name, path in moved.items() for word in (f"--{name}", path)]
    with inside(root):
        for n, left_out in enumerate(moved):
            others = given[:2 * n] + given[2 * n + 2:]
            status, said = quietly(multitask_classifier.main, "--resume", "killed", *others)
            assert status == 2 and said.count("\n") == 1 and "gone" in said, said
            assert [name for name in moved if f"(--{name}" in said] == [left_out], said
        status, said = quietly(multitask_classifier.main, "--resume", "killed")
        assert all(f"(--{name}" in said for name in moved) and said.count("\n") == 1, said
        status, said = quietly(multitask_classifier.main, "--resume", "killed", *given, "--sst_dev",
                               "new-data/ids-sst-train.csv")
        assert status == 2 and "not those that the run was started with" in said, said
        status, said = quietly(multitask_classifier.main, "--resume", "killed", *given)
        assert status == 0 and equal(root / "killed", root / "whole"), said

        status, said = quietly(pretrain_mlm.main, "--resume", "mlm")
        assert status == 2 and said.count("\n") == 1, said
        assert "(--model)" in said and "(--text)" in said, said
        status, said = quietly(pretrain_mlm.main, "--resume", "mlm", "--model", "new-tiny",
                               "--text", "new-tiny/text.txt")
        assert status == 0, said


def test_ctrl_c_prints_the_command_that_resumes():
    """As it is printed, in the directory where it is printed: also by a run that was resumed,
    elsewhere than it was started, with a path given anew."""
    root = workspace()
    data, folder = root / "ctrl-c's data", root / "runs" / "ctrl-c's run"
    shutil.copytree(root / "data", data)
    real = multitask_classifier.Training.train_step

    def stopped(*flags):
        def train_step(training, batches):
            real(training, batches)
            signal.raise_signal(signal.SIGINT)

        with mock.patch.object(multitask_classifier.Training, "train_step", train_step):
            with mock.patch.object(sys, "argv", ["../multitask_classifier.py"]):
                status, said = quietly(multitask_classifier.main, *flags)
        assert status == 130, said
        python, script, *words = shlex.split(said.splitlines()[-1].split("resume with: ")[1])
        assert (python, script) == ("python", "../multitask_classifier.py")
        return words

    with inside(data):
        words = stopped(*resumable([]), "--data_dir", ".", "--name", folder)
        assert words == ["--resume", os.path.relpath(folder)]
        assert stopped(*words) == words
    data.rename(root / "data of ctrl-c")
    with inside(folder.parent):
        words = stopped("--resume", folder.name, "--data_dir", "../data of ctrl-c")
        status, said = quietly(multitask_classifier.main, *words)
    assert status == 0, said


def test_what_cannot_be_resumed_says_why():
    root = workspace()
    folder = root / "runs" / "to-resume"
    flags = resumable([])
    assert quietly(multitask_classifier.main, *flags, "--name", folder)[0] == 0

    def refused(part, *more, folder=folder):
        status, said = quietly(multitask_classifier.main, "--resume", folder, *more)
        assert status == 2 and part in said.splitlines()[-1] and "Traceback" not in said, said

    assert quietly(multitask_classifier.main, "--resume", folder, "--epochs", 2)[0] == 0  # as it was
    refused("--lr is 0.0001 in the run", "--lr", 1e-3)
    refused("--epochs is 2 in the run", "--epochs", 3)
    refused("no run to go on with", folder=root / "nowhere")
    refused("no run to go on with", folder=root / "tiny")
    whole = (folder / "last.pt").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damage in (b"", whole[:-1000], bytes(flipped), b"x" * 5000):
        (folder / "last.pt").write_bytes(damage)
        refused("damaged")

    class Payload:
        def __reduce__(self):
            return (open, (str(root / "it-ran"), "w"))

    torch.save({"model": Payload()}, folder / "last.pt")
    refused("holds more than that")
    metrics = (folder / "metrics.jsonl").read_bytes()
    for content in ({"model": {}}, torch.zeros(3), {"metrics": 0, "data": "x"}):
        torch.save(content, folder / "last.pt")
        refused("")
        assert (folder / "metrics.jsonl").read_bytes() == metrics, "a refused run is left as it was"
    stripped = torch.load(io.BytesIO(whole), weights_only=True)
    stripped["model"].popitem()
    torch.save(stripped, folder / "last.pt")
    refused("last.pt is not what this script saves")
    assert not (root / "it-ran").exists()
    (folder / "last.pt").write_bytes(whole)
    lines = (folder / "metrics.jsonl").read_bytes()
    (folder / "metrics.jsonl").write_bytes(lines[:40])
    refused("is shorter than when last.pt was saved")
    (folder / "metrics.jsonl").write_bytes(lines)
    _, examples = three_task_model()
    before = tasks.data_digest({"sts": {"train": examples["sts"]}})
    examples["sts"].labels[3] += 0.25
    assert tasks.data_digest({"sts": {"train": examples["sts"]}}) != before, "another label"
    path = root / "data" / "ids-sst-train.csv"
    kept = path.read_text(encoding="utf-8")
    try:
        path.write_text(kept.replace(" film", " movie"), encoding="utf-8")
        refused("not those that the run was started with")
    finally:
        path.write_text(kept, encoding="utf-8")


def test_a_full_disk_leaves_the_last_good_checkpoint():
    """/dev/full has no room: writing the temporary file fails, and what was there stays."""
    real = torch.save
    folder = workspace() / "runs" / "full-disk"
    flags, saves = resumable([]), []

    def save(state, path):
        saves.append(path)
        if len(saves) == 4:
            Path(path).write_bytes(b"half of it")
            with open("/dev/full", "wb") as full:
                full.write(b"x" * 100000)
        real(state, path)

    with mock.patch.object(torch, "save", save):
        status, said = quietly(multitask_classifier.main, *flags, "--name", folder)
    assert status == 1 and "No space left on device" in said.splitlines()[-1] and "Traceback" not in said, said
    assert not list(folder.glob("*.part")) and torch.load(folder / "last.pt", weights_only=True)["step"] == 3
    assert quietly(multitask_classifier.main, "--resume", folder)[0] == 0
    whole = workspace() / "runs" / "full-disk-whole"
    assert quietly(multitask_classifier.main, *flags, "--name", whole)[0] == 0 and equal(whole, folder)


@functools.cache
def queried():
    """(folder, model) of a short run of the three tasks."""
    status, said, folder = run("--pair_head", "para=cross,sts=cosine")
    assert status == 0, said
    return folder, MultitaskBERT.load(folder)


FIRST, SECOND = "A quiet film.", "A loud film \U0001f3ac \u05e9\u05dc\u05d5\u05dd"


def test_a_trained_model_is_queried():
    folder, model = queried()
    rows = [(FIRST,), (FIRST, SECOND), [SECOND], ("word " * 30000,)]
    made = predict.predict_sentences(model, rows)
    assert [sorted(answer) for answer in made] == [
        ["sst"], ["para", "sst", "sts"], ["sst"], ["sst"]]
    assert all(abs(sum(answer["sst"]) - 1) < 1e-3 for answer in made)
    assert made[0]["sst"] == made[1]["sst"]
    assert 0 <= made[1]["para"] <= 1 and 0 <= made[1]["sts"] <= 5

    def answered(*flags):
        status, said = quietly(predict.main, *flags)
        assert "Traceback" not in said
        return status, said

    # from the command line, a file and standard input
    status, said = answered(folder, FIRST, SECOND)
    assert status == 0 and json.loads(said) == {"text": [FIRST, SECOND], **made[1]}
    path = workspace() / "input.txt"
    path.write_bytes(f"\ufeff{FIRST}\t{SECOND}\r\n{SECOND}".encode())
    status, said = answered(folder, "--input", path)
    found = [json.loads(line)["sst"] for line in said.splitlines()]
    assert found == [made[1]["sst"], made[2]["sst"]], said
    with mock.patch.object(sys, "stdin", mock.Mock(buffer=io.BytesIO(FIRST.encode()))):
        assert json.loads(answered(folder, "--input", "-")[1])["sst"] == made[0]["sst"]

    # a file's faults, with their line
    for content, part in ((b"good\n\nbad", "line 2: a sentence is empty"),
                          (b"a\tb\tc", "line 1: 3 sentences"), (b"a\0b", "a NUL byte"),
                          (b"good\nb\xff", "line 2: byte 0xff"), (b"", "no line of text")):
        path.write_bytes(content)
        status, said = answered(folder, "--input", path)
        assert status == 2 and part in said, said
    path.write_text("one \u2028 line\x0c\nand another", encoding="utf-8")
    assert answered(folder, "--input", path)[1].count("\n") == 2

    status, said = answered(folder, "word " * 3000)
    assert json.loads(said.splitlines()[-1])["sst"] and "cut 1 of 1 rows" in said
    pairs = run("--tasks", "para")[2]
    for flags, part in (((pairs, "a"), "knows pairs alone"), ((), "give the folder of a run"),
                        ((folder,), "give one or two sentences"),
                        ((folder, "a", "--input", path), "give one or two sentences"),
                        ((folder, "a", "b", "c"), "3 sentences"), ((folder, " "), "is empty"),
                        ((workspace() / "tiny", "a"), "not a run"),
                        ((folder, "--input", ""), "cannot be read"),
                        ((folder, "--input", "/nowhere"), "cannot be read"),
                        ((folder, "--input", "a\0b"), "cannot be read")):
        status, said = answered(*flags)
        assert status == 2 and part in said, said


def test_python_input_is_validated_as_terminal_input_is():
    _, model = queried()
    for bad, part in ((FIRST, "not of type str"), (("a", "b", "c"), "3 sentences"),
                      ((), "0 sentences"), (None, "not of type NoneType"),
                      (math.nan, "not of type float"),
                      (b"bytes", "not of type bytes"), ({"a": "b"}, "not of type dict"),
                      (("a", None), "not of type NoneType"), ((math.nan,), "not of type float"),
                      ((b"bytes", "a"), "not of type bytes"), ((("a",),), "not of type tuple"),
                      (("a", " \t"), "is empty"), (("a\0",), "holds a NUL byte"),
                      (("caf\udce9",), "is not valid text")):
        for message in ("rows[2]: ", part):
            raises(InputError, message, predict.predict_sentences, model, [("a",), ("a", "b"), bad])
    for rows, part in ((FIRST, "the rows are not"), (b"bytes", "the rows are not"),
                       (None, "the rows are not"), (math.nan, "the rows are not"),
                       (np.array(1.0), "the rows are not"), ({FIRST: SECOND}, "rows[0]: a row is")):
        raises(InputError, part, predict.predict_sentences, model, rows)
    alone = MultitaskBERT.load(run("--tasks", "para,sts")[2])
    raises(InputError, "rows[1]: this run knows pairs alone", predict.predict_sentences, alone,
           [(FIRST, SECOND), (FIRST,)])
    assert predict.predict_sentences(model, []) == []


def test_a_sentence_is_never_parsed_as_a_flag():
    folder, _ = queried()
    path = workspace() / "--dashes.txt"
    path.write_text(f"{FIRST}\n--really?\n", encoding="utf-8")
    lines = [[FIRST], ["--really?"]]
    with inside(path.parent):
        for words, texts in (
                ([folder, "-5 out of 10"], [["-5 out of 10"]]),
                ([folder, "--really?"], [["--really?"]]), ([folder, "-5", "-h?"], [["-5", "-h?"]]),
                ([folder, "--use_gpus", "-"], [["--use_gpus", "-"]]),
                ([folder, "a=b", "--a=b"], [["a=b", "--a=b"]]),
                (["--", folder, "--help"], [["--help"]]), ([folder, "@x"], [["@x"]]),
                ([folder, "--", "--input", "--"], [["--input", "--"]]),
                ([folder, "--input", path], lines), ([folder, f"--input={path}"], lines),
                (["--input", path, folder], lines), ([folder, "--input", path.name], lines),
                ([f"--input={path.name}", "--", folder], lines)):
            status, said = quietly(predict.main, *words)
            assert status == 0, said
            assert [json.loads(line)["text"] for line in said.splitlines()] == texts, (words, said)
    for words, part in (([folder, "--input"], "expected one argument"),
                        ([folder, "--use_gpu=1", "a"], "--use_gpu")):
        status, said = quietly(predict.main, *words)
        assert status == 2 and part in said and said.count("\n") == 1, said
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            predict.main(["--help"])
        except SystemExit as end:
            assert end.code == 0
    assert "Only the flags above are flags" in " ".join(said.getvalue().split())


def printed(encoding, main, *flags, terminal=False):
    """(exit status, the bytes on standard output, those on standard error) of a strict encoding."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    streams[0].isatty = lambda: terminal
    with mock.patch.multiple(sys, stdout=streams[0], stderr=streams[1]):
        status = exit_status(main, list(map(str, flags)))
        for stream in streams:
            stream.flush()
    return status, *(stream.buffer.getvalue() for stream in streams)


def test_any_stream_can_be_printed_to():
    folder, model = queried()
    answer = {"text": [FIRST, SECOND], **predict.predict_sentences(model, [(FIRST, SECOND)])[0]}
    for encoding in ("ascii", "cp1252", "utf-8"):
        status, out, _ = printed(encoding, predict.main, folder, FIRST, SECOND)
        assert status == 0 and json.loads(out.decode("ascii")) == answer
        status, out, _ = printed(encoding, predict.main, folder, SECOND, terminal=True)
        assert status == 0 and b"A loud film" in out and b"sentiment" in out
        status, _, said = printed(encoding, predict.main, folder, "caf\udce9 \u2603")
        assert status == 2 and b"is not valid text" in said

    # the training scripts' own words
    root = workspace()
    common = ["--model", root / "tiny", "--data_dir", root / "data", "--epochs", 1,
              "--epoch_length", 1]
    for main, flag in ((multitask_classifier.main, "--name"), (pretrain_mlm.main, "--out")):
        name = root / "runs" / f"\u05e9\u05dc{flag}"
        status, out, _ = printed("ascii", main, *common, flag, name)
        assert status == 0 and b"\\u05e9\\u05dc" in out.splitlines()[-1], out
    fill = ["--model", root / "tiny", "--fill"]
    status, out, _ = printed("cp1252", pretrain_mlm.main, *fill, "a \u2603 [MASK]")
    assert status == 0 and b"\\u2603" in out
    for main, flags in ((pretrain_mlm.main, [*fill, "\udce9 [MASK]"]),
                        (multitask_classifier.main, [*common, "--name", root / "runs" / "\udce9"])):
        status, _, said = printed("ascii", main, *flags)
        assert status == 2 and b"is not valid text" in said and said.count(b"\n") == 1, said


def test_closed_streams_end_in_no_traceback():
    folder, _ = queried()
    with mock.patch.object(sys, "stdin", None):
        status, said = quietly(predict.main, folder, "--input", "-")
    assert status == 2 and said.count("\n") == 1 and "standard input: is closed" in said

    # as Python finds them after >&- 2>&-
    with mock.patch.multiple(sys, stdout=None, stderr=None):
        statuses = [exit_status(predict.main, [str(folder), text]) for text in (FIRST, " ")]
        fill = ["--model", str(workspace() / "tiny"), "--fill", "[MASK]"]
        statuses.append(exit_status(pretrain_mlm.main, fill))
    assert statuses == [0, 2, 0]

    # a reader that is gone, and a full disk; the interpreter's own flush at its end must succeed
    for name in ("broken pipe", "full disk"):
        if name == "broken pipe":
            reader, writer = os.pipe()
            os.close(reader)
        else:
            writer = os.open("/dev/full", os.O_WRONLY)
        with open(writer, "w") as out, contextlib.redirect_stderr(io.StringIO()) as said:
            with mock.patch.object(sys, "stdout", out):
                status = exit_status(predict.main, [str(folder), FIRST])
            out.flush()
        said = said.getvalue()
        assert status == 1 and said.count("\n") == 1, said
        assert said.startswith(f"{Path(sys.argv[0]).name}: "), said


TORCHRUN = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "1"}


def test_under_torchrun_the_first_process_alone_answers():
    folder, _ = queried()
    for rank, lines in (("0", 1), ("1", 0)):
        with mock.patch.dict(os.environ, {**TORCHRUN, "RANK": rank, "LOCAL_RANK": rank}):
            status, said = quietly(predict.main, folder, FIRST)
            assert status == 0 and said.count("\n") == lines, said
            status, said = quietly(predict.main, folder, " ")
            assert status == 2 * lines and said.count("\n") == lines, "errors are printed once, too"


def test_half_set_environments_are_rejected():
    folder, _ = queried()
    root = workspace()
    common = "--model", root / "tiny", "--data_dir", root / "data"
    scripts = ((predict.main, (folder, FIRST)), (multitask_classifier.main, common),
               (pretrain_mlm.main, (*common, "--out", root / "none")))
    table = [(name, value) for name in TORCHRUN for value in (None, "")]
    table += [(name, value) for name in TORCHRUN if name != "MASTER_ADDR"
              for value in ("two", "-1", "1.5", "9" * 5000)]
    for name, value in [*table, ("WORLD_SIZE", "0"), ("RANK", "2")]:
        setting = {**TORCHRUN, name: value} if value is not None else {
            key: value for key, value in TORCHRUN.items() if key != name}
        with mock.patch.dict(os.environ):
            for key in TORCHRUN:
                os.environ.pop(key, None)
            os.environ.update(setting)
            for main, flags in scripts:
                status, said = quietly(main, *flags)
                assert status == 2 and said.count("\n") == 1, (name, value, said)
                assert f"variable {name} is" in said, (name, value, said)
    with mock.patch.dict(os.environ, {"WORLD_SIZE": "1"}):  # alone: it needs no other
        assert quietly(predict.main, folder, FIRST)[0] == 0

    # no home directory, and no entry in passwd
    with mock.patch.dict(os.environ), mock.patch("pwd.getpwuid", side_effect=KeyError):
        for name in ("HOME", "XDG_CACHE_HOME"):
            os.environ.pop(name, None)
        for main, flags in ((multitask_classifier.main, ("--data_dir", root / "data")),
                            (pretrain_mlm.main, ("--fill", "[MASK]"))):
            status, said = quietly(main, *flags)
            assert status == 2 and said.count("\n") == 1 and "XDG_CACHE_HOME" in said, said
        os.environ["XDG_CACHE_HOME"] = str(root / "cache")
        assert cache_folder() == root / "cache" / "multitask-bert"


def test_answers_are_the_models_outputs():
    """Probabilities of sst's classes and of a paraphrase; a similarity that is not outside 0..5."""
    status, said, folder = run("--pair_head", "cross", "--tasks", "sst,para,sts")
    assert status == 0, said
    sentence, other = "A quiet film.", "A loud one, at last."
    for bias, shown in ((9.0, 5.0), (-9.0, 0.0), (2.25, None)):
        model = MultitaskBERT.load(folder)
        generator = torch.Generator().manual_seed(21)
        for head in model.heads.values():
            nn.init.normal_(head.linear.weight, generator=generator)
        nn.init.constant_(model.heads["sts"].linear.bias, bias)
        nn.init.normal_(model.heads["sts"].linear.weight, std=0.1, generator=generator)
        model.save(folder, folder)
        status, said = quietly(predict.main, folder, sentence, other)
        answer, logits = json.loads(said.splitlines()[-1]), {}
        for task in KINDS:
            texts = [(sentence, other)[:len(TASKS[task].text_columns)]]
            examples = tasks.Examples(TASKS[task], None, ["x"], texts, None, [])
            batch = collate(tokenize(examples, model.tokenizer, 64, cross=True), np.arange(1))
            logits[task] = model.logits(task, batch)[0].detach()
        assert np.abs(np.array(answer["sst"]) - logits["sst"].softmax(dim=-1).numpy()).max() < 1e-4
        assert abs(answer["para"] - logits["para"].sigmoid()) < 1e-4 < abs(answer["para"] - 0.5)
        assert abs(answer["sts"] - (logits["sts"] if shown is None else shown)) < 1e-4


# ---------------------------------------------------------------- pretrain_mlm.py

def mlm(*flags, out=None):
    """pretrain_mlm.main() on the tiny encoder and the cut demo sets. Returns (exit status, what it said, the folder)."""
    root = workspace()
    out = out or root / "runs" / f"mlm-{time.time_ns()}"
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = exit_status(pretrain_mlm.main, [*map(str, ("--model", root / "tiny", "--data_dir", root / "data",
                                                            "--out", out, *flags))])
    return status, said.getvalue(), out


def mlm_batches(passes=1):
    """Batches of the demo pairs, whole, with the tiny vocabulary: (vocabulary, [input_ids (B, L), ...])."""
    root = workspace()
    tokenizer = load_tokenizer(root / "tiny")
    batches = []
    for name in ("para", "sts"):
        with contextlib.redirect_stdout(io.StringIO()):
            examples = tokenize(read_examples(DEMO / TASKS[name].filename("train"), TASKS[name]), tokenizer, 512, cross=True)
        batches += [batch.input_ids for batch in evaluation_batches(examples, np.arange(len(examples)))]
    return pretrain_mlm.Vocabulary.of(tokenizer, root), batches * passes


def test_masks_have_their_shares():
    for whole_word in (False, True):
        vocabulary, batches = mlm_batches(passes=6)
        generator, tokens, kinds = np.random.default_rng(0), 0, np.zeros(3)
        random_tokens = set()
        for ids in batches:
            masked, chosen = pretrain_mlm.mask_tokens(ids, vocabulary, whole_word, generator)
            special = torch.from_numpy(vocabulary.special)[ids]
            assert not (chosen & special).any() and (chosen.sum(dim=1) > 0).all() and (ids == 0).any()
            assert torch.equal(masked[~chosen], ids[~chosen])
            tokens += int((~special).sum())
            kept, mask = masked[chosen] == ids[chosen], masked[chosen] == vocabulary.mask
            kinds += [int(mask.sum()), int((~mask & ~kept).sum()), int(kept.sum())]
            random_tokens.update(masked[chosen][~mask & ~kept].tolist())
            if whole_word:  # a continuation is chosen exactly where the piece before it is
                inside = torch.from_numpy(vocabulary.continuation)[ids[:, 1:]]
                assert torch.equal(chosen[:, 1:][inside], chosen[:, :-1][inside]) and inside.any()
            else:
                counts = (~special).sum(dim=1)
                assert torch.equal(chosen.sum(dim=1), torch.tensor([max(1, round(0.15 * int(n))) for n in counts]))
        assert tokens > 1e5 and abs(kinds.sum() / tokens - 0.15) < 0.005, (tokens, kinds.sum() / tokens)
        assert np.abs(kinds / kinds.sum() - [0.8, 0.1, 0.1]).max() < 0.01, kinds / kinds.sum()
        assert len(random_tokens) > 0.9 * TINY.vocab_size, "each position draws its own"


def test_the_masked_ids_are_what_the_model_sees():
    """And the token types of a pair; what was there before is the target alone."""
    vocabulary, _ = mlm_batches()
    _, examples = three_task_model()
    batch = collate(examples["para"], np.arange(20))
    given = pretrain_mlm.predict_masked(lambda *args: args, batch, vocabulary, False, 3)
    ids, attention_mask, types, chosen, targets = given
    masked, positions = pretrain_mlm.mask_tokens(batch.input_ids, vocabulary, False,
                                                 np.random.default_rng(3))
    assert torch.equal(ids, masked) and torch.equal(chosen, positions)
    assert (ids[chosen] == vocabulary.mask).float().mean() > 0.6
    assert torch.equal(types, batch.token_type_ids) and types.any()
    assert torch.equal(attention_mask, batch.attention_mask)
    assert torch.equal(targets, batch.input_ids) and not (targets == vocabulary.mask).any()


def test_text_is_read_once_and_a_twentieth_held_out():
    text = workspace() / "numbers.txt"
    text.write_text("".join(f"Line {i} of the text.\n" for i in range(100)) * 2)
    with mock.patch.object(pretrain_mlm, "read_examples", side_effect=AssertionError("no task")):
        status, said, folder = mlm("--text", text, "--epochs", 1)
        assert status == 0 and "95 sequences to train on, 5 held out" in said, said
        with mock.patch.object(pretrain_mlm, "HELD_OUT", 3):
            assert "97 sequences to train on, 3 held out" in mlm("--text", text, "--epochs", 1)[1]
    for line in read_metrics(folder, "evaluation"):
        assert abs(line["perplexity"] / math.exp(line["loss"]) - 1) < 1e-9


def test_the_held_out_loss_is_a_mean_over_tokens():
    seen, seeds, real = [], [], pretrain_mlm.predict_masked

    def recorded(model, *args):
        logits, targets = real(model, *args)
        assert not model.training
        seen.append(F.cross_entropy(logits, targets, reduction="none"))
        seeds.append(args[-1])
        return logits, targets

    def batches(examples, rows):  # some of them
        return evaluation_batches(examples, rows, tokens=60)

    with mock.patch.multiple(pretrain_mlm, predict_masked=recorded, evaluation_batches=batches), \
            mock.patch.object(pretrain_mlm.Stream, "rows", side_effect=Killed):
        try:  # before the first step
            mlm(out=workspace() / "runs" / "mlm-before")
        except Killed:
            pass
    line, = read_metrics(workspace() / "runs" / "mlm-before", "evaluation")
    assert len({len(losses) for losses in seen}) > 1 and len(set(seeds)) == len(seeds) > 2
    assert abs(line["loss"] - torch.cat(seen).mean()) < 1e-5


def test_gaps_are_filled_with_the_most_probable_tokens():
    tokenizer = load_tokenizer(workspace() / "tiny")
    torch.manual_seed(22)
    model = pretrain_mlm.MaskedLM(BertModel(TINY)).train()
    film, the = (tokenizer.token_to_id(word) for word in ("film", "the"))
    model.bias.data[[film, the]] = torch.tensor([30.0, 29.0])
    filled = pretrain_mlm.fill(model, tokenizer, "a [MASK] that [MASK].")
    assert len(filled) == 2
    for best in filled:
        assert [token for token, _ in best[:2]] == ["film", "the"] and len(best) == 5
        ratio = best[0][1] / best[1][1]
        assert abs(best[0][1] + best[1][1] - 1) < 1e-5 and 1.5 < ratio < 5  # e, but for the rest
    assert filled == pretrain_mlm.fill(model.train(), tokenizer, "a [MASK] that [MASK].")


def test_masks_are_drawn_anew_and_from_training_text():
    seen, read, original = [], [], pretrain_mlm.mask_tokens
    reader = pretrain_mlm.read_examples

    def recorded(input_ids, *args):
        masked, chosen = original(input_ids, *args)
        seen.append((input_ids.clone(), chosen))
        return masked, chosen

    with mock.patch.multiple(pretrain_mlm, mask_tokens=recorded,
                             read_examples=lambda path, *args, **kwargs: read.append(path.name) or reader(path, *args, **kwargs)):
        status, said, _ = mlm("--epochs", 2, "--batch_size", 100)
    assert status == 0 and len(seen) == 5, said  # held out, one batch of all, held out, one batch, held out
    assert read == ["ids-sst-train.csv", "quora-train.csv", "sts-train.csv"]
    assert all(torch.equal(a, b) for a, b in zip(seen[0], seen[2])), "the held-out masks stay"
    found = [{tuple(ids.tolist()): mask for ids, mask in zip(*seen[i])} for i in (1, 3)]
    assert found[0].keys() == found[1].keys() and not (found[0].keys() & {tuple(ids.tolist()) for ids in seen[0][0]})
    assert sum(torch.equal(found[0][ids], found[1][ids]) for ids in found[0]) < len(found[0]) / 2
    held_out = seen[0][0]
    del seen[:]
    flags = ["--epochs", 1, "--batch_size", 100, "--whole_word", "--seed", 1]
    with mock.patch.object(pretrain_mlm, "mask_tokens", recorded):
        assert mlm(*flags)[0] == 0 and len(seen) == 3
    texts = [{tuple(ids[ids > 0].tolist()) for ids in part} for part in (held_out, seen[0][0])]
    assert texts[0] != texts[1], "drawn by the seed"
    continuation = torch.from_numpy(mlm_batches()[0].continuation)
    for ids, chosen in seen:  # whole words in training and for the held-out loss
        inside = continuation[ids[:, 1:]]
        assert torch.equal(chosen[:, 1:][inside], chosen[:, :-1][inside]) and inside.any()


def test_the_pretraining_loop_does_what_its_flags_say():
    """Two epochs of five steps: what reaches the optimizer, and what the model draws."""
    seen, drawn, losses, heads, real = [], [], [], [], pretrain_mlm.predict_masked

    class Recorder(AdamW):
        def step(self):
            decay, plain = self.param_groups
            gradients = [p.grad for p in decay["params"] + plain["params"] if p.grad is not None]
            norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
            seen.append((decay["lr"], plain["lr"], norm))
            assert decay["weight_decay"] == 0.1 and plain["weight_decay"] == 0
            assert all(p.ndim >= 2 for p in decay["params"])
            assert all(p.ndim < 2 for p in plain["params"])
            super().step()

    def recorded(model, *args):
        seed = torch.initial_seed()
        logits, targets = real(model, *args)
        if model.training:  # the seeds of dropout and of the masks
            drawn.append((seed, args[-1]))
            losses.append(F.cross_entropy(logits, targets, reduction="none").detach())
            heads.append(model.dense.weight.detach().clone())
            assert all(module.training for module in model.modules()), "with dropout"
        return logits, targets

    def still(model, batch, vocabulary, whole_word, seed):  # the same masks at every step
        torch.manual_seed(0)
        return real(model, batch, vocabulary, whole_word, 0)

    flags = ["--epochs", 2, "--epoch_length", 5, "--batch_size", 4, "--warmup", 0.5,
             "--weight_decay", 0.1]
    with mock.patch.multiple(pretrain_mlm, AdamW=Recorder, predict_masked=recorded):
        status, said, folder = mlm(*flags, "--clip", 0.01)
        assert status == 0, said
        shown = [line["loss"] for line in read_metrics(folder, "step")]
        means = [float(torch.cat(part).mean()) for part in (losses[:5], losses[5:])]
        assert np.abs(np.array(shown) - means).max() < 1e-5, "means over tokens, since the last"
        rates = [learning_rate(1e-4, n / 11, warmup=0.5) for n in range(1, 11)]
        assert [(a, b) for a, b, _ in seen] == [(rate, rate) for rate in rates]
        assert all(abs(norm - 0.01) < 1e-5 for _, _, norm in seen), seen
        first = {seed for pair in drawn for seed in pair}
        assert len(first) == 20, "dropout and masks are drawn anew"
        del drawn[:]
        assert mlm(*flags, "--seed", 1)[0] == 0
        assert not first & {seed for pair in drawn for seed in pair}
        assert not torch.equal(heads[0], heads[10]), "the new head has the seed"
    del seen[:]
    whole = mock.Mock(side_effect=lambda text, rows: collate(text, np.sort(rows)))
    with mock.patch.multiple(pretrain_mlm, AdamW=Recorder, predict_masked=still, collate=whole):
        flags = ["--lr", 0, "--clip", 1000, "--batch_size", 1000, "--weight_decay", 0.1]
        assert mlm(*flags, "--epochs", 3)[0] == 0
    norms = [norm for _, _, norm in seen]
    assert len(norms) == 3 and norms[0] > 0 and len(set(norms)) == 1, "no gradient stays"


def test_only_chosen_positions_are_decoded():
    """Loss and gradients of the decoder at the chosen positions, against all positions through the written-out head."""
    torch.manual_seed(14)
    model = pretrain_mlm.MaskedLM(BertModel(TINY)).double().eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    ids, mask, types = random_batch(TINY, [12, 30, 7])
    chosen = (torch.rand(ids.shape) < 0.2) & (mask == 1)
    logits, targets = model(ids, mask, types, chosen, ids)
    ours = F.cross_entropy(logits, targets)
    assert logits.shape == (int(chosen.sum()), 500)
    hidden = model.bert(ids, mask, types)["last_hidden_state"]
    hidden = F.layer_norm(F.gelu(hidden @ model.dense.weight.T + model.dense.bias), (16,), model.layer_norm.weight,
                          model.layer_norm.bias, 1e-12)
    full = hidden @ model.bert.word_embedding.weight.T + model.bias  # (B, L, V); the decoder is the embedding itself
    theirs = F.cross_entropy(full.flatten(0, 1), torch.where(chosen, ids, -100).flatten())
    assert abs(ours - theirs) < 1e-6
    parameters = [p for name, p in model.named_parameters() if "pooler" not in name]
    for a, b in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters)):
        assert (a - b).abs().max() < 1e-6
    assert not any("decoder" in name for name in model.state_dict())


def test_pretraining_goes_on_from_its_own_head():
    status, said, folder = mlm("--epochs", 2, "--lr", 1e-3, "--batch_size", 8)
    assert status == 0 and "no masked-LM head" in said, said
    losses = [line["loss"] for line in read_metrics(folder, "evaluation")]
    assert len(losses) == 3 and losses[2] < losses[0] and (folder / "curve.png").exists()
    status, said, second = mlm("--model", folder, "--epochs", 1)
    assert status == 0 and "no masked-LM head" not in said and "unused" not in said, said
    assert abs(read_metrics(second, "evaluation")[0]["loss"] - min(losses)) < 1e-5
    status, said, _ = run("--model", folder)
    assert status == 0 and "left unused: cls.predictions" in said, said
    _, _, again = mlm("--epochs", 2, "--lr", 1e-3, "--batch_size", 8)
    assert same(load_file(folder / "model.safetensors"), load_file(again / "model.safetensors")), "the same bits"
    broken = shutil.copytree(folder, folder.with_name("mlm-broken"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["cls.predictions.bias"]
    save_file(tensors, broken / "model.safetensors")
    for flags, part in ((["--model", broken], "cls.predictions.bias of its masked-LM head is missing"),
                        (["--out", folder], "there is a run of this name"), (["--fill", "nothing hidden"], "no [MASK] in it"),
                        (["--text", folder / "gone.txt"], "gone.txt: cannot be read"), (["--tasks", "yelp"], "unknown task")):
        status, said, _ = mlm(*flags)
        assert status == 2 and part in said and "Traceback" not in said, said
    try:
        from transformers import BertForMaskedLM
    except ImportError:
        return
    model, peer = pretrain_mlm.MaskedLM.from_pretrained(folder).eval(), BertForMaskedLM.from_pretrained(folder).eval()
    ids, mask, types = random_batch(TINY, [12, 30, 7])
    logits, _ = model(ids, mask, types, torch.tensor([[1] + [0] * 29] * 3).bool())
    expected = peer(ids, mask, types).logits[:, 0][torch.tensor([2, 0, 1])]  # packed order: by length
    assert (logits - expected).abs().max() < 1e-5


def test_fill_cuts_a_long_sentence_as_training_does():
    short = "a " * 40 + "[MASK] film"
    status, said, _ = mlm("--fill", short, short + " of" * 40)
    assert status == 0 and said.count("cut 1 of 1 rows to 64 tokens") == 1, said
    tokenizer = load_tokenizer(workspace() / "tiny")
    with contextlib.redirect_stdout(io.StringIO()):
        model = pretrain_mlm.MaskedLM.from_pretrained(workspace() / "tiny")
        # beyond the 62 tokens that are read, the sentence has no effect
        long, longer = (pretrain_mlm.fill(model, tokenizer, short + " a" * n) for n in (20, 80))
    assert long == longer and len(long) == 1 and len(long[0]) == 5
    status, said, _ = mlm("--fill", "a " * 61 + "[MASK] a")  # the last that is read before [SEP]
    assert status == 0 and "cut 1 of 1 rows" in said, said
    for sentence in ("a " * 62 + "[MASK]", "[MASK] " + "a " * 70 + "[MASK]"):
        status, said, _ = mlm("--fill", sentence)
        assert status == 2 and "Traceback" not in said and "cut 1 of 1 rows" not in said
        assert "a [MASK] is cut away, since the encoder reads 64 tokens" in said, said


def test_a_masked_lm_head_of_2018_is_used_and_not_reported_as_unused():
    _, _, folder = mlm("--epochs", 1, "--epoch_length", 2, "--lr", 1e-2)
    old = shutil.copytree(folder, folder.with_name(folder.name + "-2018"))
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): x
               for name, x in tensors.items()}
    assert "cls.predictions.transform.LayerNorm.gamma" in renamed
    embeddings = tensors["bert.embeddings.word_embeddings.weight"]
    renamed["cls.predictions.decoder.weight"] = embeddings.clone()
    save_file({**renamed, "cls.seq_relationship.bias": torch.zeros(2)}, old / "model.safetensors")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert same(*(pretrain_mlm.MaskedLM.from_pretrained(path).state_dict()
                      for path in (folder, old)))
    said, = said.getvalue().splitlines()
    assert said.endswith("left unused: cls.seq_relationship.bias"), said
    name = "cls.predictions.transform.dense.weight"
    save_file({**tensors, name: tensors[name].to(torch.int8)}, old / "model.safetensors")
    raises(InputError, f"{name} holds torch.int8", pretrain_mlm.MaskedLM.from_pretrained, old)


def test_pretraining_goes_on_where_it_was_killed():
    real, left = pretrain_mlm.predict_masked, []

    def predict_masked(*args):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return real(*args)

    flags = "--epochs", 2, "--batch_size", 4, "--epoch_length", 6, "--save_every", 0
    status, said, whole = mlm(*flags)
    killed = whole.with_name(whole.name + "-killed")
    for n in (4, 5):
        left[:] = [n]
        try:
            with mock.patch.object(pretrain_mlm, "predict_masked", predict_masked):
                mlm(*flags, out=killed) if n == 4 else quietly(pretrain_mlm.main, "--resume", killed)
            raise AssertionError("not killed")
        except Killed:
            pass
    status, said = quietly(pretrain_mlm.main, "--resume", killed)
    assert status == 0, said
    assert same(load_file(killed / "model.safetensors"), load_file(whole / "model.safetensors"))
    metrics, metrics_2 = ([{key: value for key, value in json.loads(line).items() if not key.endswith("_per_second")}
                           for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (whole, killed))
    assert metrics == metrics_2 and len(metrics) == 6
    left[:], losses, killed = [9], iter((5.0, 3.0, 4.0)), whole.with_name(whole.name + "-best")
    with mock.patch.object(pretrain_mlm, "evaluate", lambda *args: next(losses)):
        try:  # killed after the first epoch, which stays the best
            with mock.patch.object(pretrain_mlm, "predict_masked", predict_masked):
                mlm(*flags, out=killed)
        except Killed:
            pass
        best = (killed / "model.safetensors").read_bytes()
        status, said = quietly(pretrain_mlm.main, "--resume", killed)
    assert status == 0 and torch.load(killed / "last.pt", weights_only=True)["best"] == 3.0, said
    assert (killed / "model.safetensors").read_bytes() == best and "saved" not in said
    status, said, failed = mlm("--batch_size", 4, "--epoch_length", 30, "--lr", 1e30, "--save_every", 0)
    assert status == 1 and ("are not finite" in said or "the loss is nan at" in said), said
    assert not (failed / "last.pt").exists() and not (failed / "model.safetensors").exists(), "nothing that is not finite"
    text = workspace() / "snow.txt"
    text.write_text("A plain sentence here.\n" + "\u2603\n" + "".join(f"Number {i} of the lines.\n" for i in range(40)))
    status, said, _ = mlm("--text", text, "--batch_size", 1, "--epochs", 1)
    assert status == 0 and "left out 1 sequences of unknown characters alone" in said, said
    status, said = quietly(pretrain_mlm.main, "--resume", killed, "--lr", 1)
    assert status == 2 and "--lr is 0.0001 in the run" in said, said


def test_pretraining_leaves_a_model_where_no_epoch_beats_the_start():
    real, left = pretrain_mlm.predict_masked, []

    def predict_masked(*args):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return real(*args)

    flags = "--epochs", 3, "--batch_size", 8, "--epoch_length", 4
    for before, losses, worse in ((5.0, (7.0, 6.0, 8.0), True), (6.0, (7.0, 6.0, 8.0), False)):
        evaluations = iter((before, *losses))
        with mock.patch.object(pretrain_mlm, "evaluate", lambda *args: next(evaluations)):
            left[:] = [10]  # steps until it is killed, in the third epoch; the second is the best
            try:
                with mock.patch.object(pretrain_mlm, "predict_masked", predict_masked):
                    out = workspace() / "runs" / f"mlm-worse-{before}"
                    mlm(*flags, out=out)
                raise AssertionError("not killed")
            except Killed:
                best = torch.load(out / "last.pt", weights_only=True)["model"]
            status, said = quietly(pretrain_mlm.main, "--resume", out)
        line = f"held-out loss 6.000 in the best, which is saved, and {before:.3f} before training"
        assert status == 0 and (line in said) == worse, said
        assert "encoder and masked-LM head" in said, said
        saved = pretrain_mlm.MaskedLM.from_pretrained(out).state_dict()
        assert same(saved, best), "the best of the epochs"
        status, said = quietly(pretrain_mlm.main, "--resume", out)  # a finished run says the same
        assert status == 0 and (line in said) == worse, said
    status, said, out = mlm("--epochs", 1, "--batch_size", 8, "--lr", 2)
    assert status == 0 and "every epoch is worse than the start" in said, said
    assert mlm("--model", out, "--epochs", 1, "--epoch_length", 1)[0] == 0
    # a loss that is not finite would never be beaten
    evaluations = iter((5.0, math.nan))
    with mock.patch.object(pretrain_mlm, "evaluate", lambda *args: next(evaluations)):
        status, said, out = mlm(*flags)
    assert status == 1 and "the held-out loss is nan after step 4" in said.splitlines()[-1], said
    assert not (out / "model.safetensors").exists()


def test_sixty_four_sentences_are_learnt_by_heart():
    """A small model from random weights, new masks at every step."""
    if not FULL:
        raise SkipTest("with --full")
    root = workspace()
    tokenizer = load_tokenizer(root / "tiny")
    vocabulary, generator = pretrain_mlm.Vocabulary.of(tokenizer, root), np.random.default_rng(0)
    with contextlib.redirect_stdout(io.StringIO()):
        examples = tokenize(read_examples(DEMO / "ids-sst-train.csv", TASKS["sst"]), tokenizer, 24, cross=True)
    torch.manual_seed(15)
    config = BertConfig(vocab_size=500, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256,
                        max_position_embeddings=64, hidden_dropout_prob=0.0)
    model = pretrain_mlm.MaskedLM(BertModel(config)).train()
    optimizer, batch, losses = AdamW(model.parameters()), collate(examples, np.arange(64)), []
    for step in range(600):
        optimizer.param_groups[0]["lr"] = learning_rate(3e-3, step / 600, 0.1)
        ids, chosen = pretrain_mlm.mask_tokens(batch.input_ids, vocabulary, False, generator)
        logits, targets = model(ids, batch.attention_mask, batch.token_type_ids, chosen, batch.input_ids)
        loss = F.cross_entropy(logits, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        if len(losses) > 20 and np.mean(losses[-20:]) < 0.1:
            return
    raise AssertionError(f"the loss is {np.mean(losses[-20:]):.3f} after 600 steps")


def test_demo_run_learns():
    """The README's command with the default encoder (fetched once)."""
    if not FULL:
        raise SkipTest("with --full")
    folder = workspace() / "demo"
    with contextlib.redirect_stdout(io.StringIO()) as said:
        flags = ["--option", "finetune", "--pcgrad", "--data_dir", str(DEMO), "--name", str(folder)]
        multitask_classifier.main(flags)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    dev = max((line for line in lines if line["kind"] == "evaluation"), key=lambda line: line["overall_2023"])["dev"]
    assert dev["sst"] >= 0.40 and dev["para"] >= 0.75 and dev["sts"] >= 0.70, said.getvalue()


# ---------------------------------------------------------------- stored values and the runner

STORED_IDS = [[101, 1996, 2143, 2003, 1037, 4251, 10911, 1012, 102, 0, 0],
              [101, 6343, 2356, 2005, 2023, 8297, 1010, 2106, 2027, 1029, 102]]
STORED_CLS = [[-0.2285301, -0.0404145, 0.417334, -0.0190319, -0.154999, 0.0167786],
              [0.0205113, 0.0973974, 0.1900676, -0.0039369, 0.0941866, 0.1808437]]
STORED_MEAN = [[-0.0309636, 0.1109137, 0.0930861, 0.0387746, -0.2119545, 0.1756335],
               [-0.3196696, 0.2232597, 0.1744754, 0.0761012, -0.2033074, -0.2638388]]
STORED_POOLER = [[-0.0520373, -0.0431513, 0.0213192, 0.0768633, -0.0953051, 0.0144682],
                 [-0.0112392, 0.0450846, 0.0587121, 0.0795594, -0.1073437, -0.0098406]]


def setup_function(check):
    """Before each check, here and under pytest, which knows this name: a check draws what it draws alone."""
    seed = seed_of(check.__name__) % 2 ** 32  # NumPy takes no larger one
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def test_every_check_draws_from_its_own_seed():
    drawn = []

    def draw():
        drawn.append((torch.rand(()).item(), np.random.rand(), random.random()))

    for name in ("test_drawn_first", "test_drawn_second", "test_drawn_first"):
        draw.__name__ = name
        with mock.patch.dict(globals(), {name: draw}):
            assert main([name]) == 0
    assert drawn[0] == drawn[2], "what ran before a check changes what it draws"
    assert all(a != b for a, b in zip(*drawn[:2])), "two checks have the same seed"


def main(words):
    passed = failed = skipped = 0
    for name, check in list(globals().items()):
        if not name.startswith("test_") or not all(word in name for word in words):
            continue
        start, said = time.perf_counter(), io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                setup_function(check)
                check()
        except SkipTest as reason:
            skipped += 1
            print(f"skip  {name[5:].replace('_', ' ')}: {reason}", flush=True)
        except Exception:
            failed += 1
            print(f"FAIL  {name[5:].replace('_', ' ')}\n{said.getvalue()}{traceback.format_exc()}", flush=True)
        else:
            passed += 1
            print(f"ok    {name[5:].replace('_', ' ')} ({time.perf_counter() - start:.1f} s)", flush=True)
    print(f"{skipped} skipped\n{passed} passed, {failed} failed")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main([word for word in sys.argv[1:] if not word.startswith("--")]))
