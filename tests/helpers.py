"""What the checks share: a tiny encoder, cut demo sets, runs of the scripts on them."""
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from unittest import SkipTest, mock

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

import multitask_classifier
from bert import BertConfig, BertModel
from data.tasks import TASKS, read_examples
from data.tokenizer import SPECIAL, load_tokenizer, tokenize
from multitask_classifier import MultitaskBERT
from support.run import exit_status

PROJECT = Path(__file__).resolve().parents[1]
DEMO = PROJECT / "data" / "demo"
TINY = BertConfig(vocab_size=500, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
                  intermediate_size=32, max_position_embeddings=64)
KINDS = {"sst": "classification", "para": "binary", "sts": "regression"}
FULL = "--full" in sys.argv  # with the checks that take longer or fetch the default encoder


def needs_full():
    if not FULL:
        raise SkipTest("with --full")


def seed_check(name):
    """Seed all generators from a check's name, so that none depends on what ran before it."""
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "big")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def raises(kind, part, function, *args, **kwargs):
    """The function raises `kind` with `part` in a message of one line."""
    try:
        function(*args, **kwargs)
    except kind as error:
        assert part in str(error) and "\n" not in str(error), f"the message is: {error}"
    else:
        raise AssertionError(f"no {kind.__name__} with {part!r}")


def same(a, b):
    """Two {name: tensor} are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------- folders and files

@functools.cache
def workspace():
    """A temporary folder with a tiny random encoder, and the demo sets cut to a few rows. It is
    removed at exit."""
    folder = tempfile.TemporaryDirectory(prefix="sanity-check-")
    workspace.keep = folder
    root = Path(folder.name)
    with torch.random.fork_rng():  # a check's own draws do not depend on who makes the workspace
        torch.manual_seed(0)
        BertModel(TINY).save_pretrained(root / "tiny")

    # a vocabulary of letters and of the demo sets' most frequent words
    texts = [path.read_text(encoding="utf-8").lower() for path in DEMO.glob("*-train.csv")]
    text = " ".join(texts)
    letters = sorted({c for c in text if c.isalpha()}) + list("0123456789.,?!'\"-:;()$%&/")
    words = sorted({word for word in text.split() if word.isalpha()},
                   key=lambda word: (-text.count(f" {word} "), word))
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters,
                  *("##" + c for c in letters), *words]
    lines = "\n".join(vocabulary[:TINY.vocab_size]) + "\n"
    (root / "tiny" / "vocab.txt").write_text(lines, encoding="utf-8")

    (root / "data").mkdir()
    for path in DEMO.glob("*.csv"):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        rows = lines[:25 if "train" in path.name else 9]
        (root / "data" / path.name).write_text("".join(rows), encoding="utf-8")
    return root


def write_file(name, text):
    """A file of this name in a new folder. text: a string or bytes."""
    path = Path(tempfile.mkdtemp(dir=workspace())) / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@contextlib.contextmanager
def inside(folder):
    """With `folder` as the current directory."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def copy_of_tiny(**config):
    """A folder with the tiny encoder, to be changed. config: fields of its config.json to set; its
    weights then have the shapes that follow."""
    folder = Path(tempfile.mkdtemp(dir=workspace())) / "encoder"
    shutil.copytree(workspace() / "tiny", folder)
    if config:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            BertModel(dataclasses.replace(TINY, **config)).save_pretrained(folder)
    return folder


def split_weights(folder):
    """Split a folder's weights into three files and an index, as transformers saves large ones.
    Returns the files."""
    tensors = load_file(folder / "model.safetensors")
    shards = [folder / f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    shard_of = {name: shards[i % 3] for i, name in enumerate(tensors)}
    for path in shards:
        part = {name: x for name, x in tensors.items() if shard_of[name] == path}
        save_file(part, path, metadata={"format": "pt"})
    weight_map = {name: path.name for name, path in shard_of.items()}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    return shards


def as_tokenizer_json(folder, normalizer=None, max_length=None):
    """Replace a folder's vocab.txt by tokenizer.json, as transformers 5 and sentence-transformers 6
    save it. normalizer: its settings. max_length: truncate and pad to it."""
    lines = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    vocabulary = {token: i for i, token in enumerate(lines)}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.add_special_tokens([token for token in SPECIAL if token in vocabulary])
    tokenizer.normalizer = BertNormalizer(**(normalizer or {}))
    tokenizer.pre_tokenizer = BertPreTokenizer()
    if max_length:
        tokenizer.enable_truncation(max_length)
        tokenizer.enable_padding(length=max_length)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "vocab.txt").unlink()


# ---------------------------------------------------------------- models and batches

def random_batch(config, lengths, seed=0):
    """input_ids, attention_mask, token_type_ids, each (B, L)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    mask = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(5, config.vocab_size, shape, generator=generator) * mask
    return ids, mask, torch.randint(0, 2, shape, generator=generator) * mask


def three_task_model(**kwargs):
    """A tiny model of three tasks, in train mode, and their tokenized demo examples. kwargs: of
    MultitaskBERT."""
    root = workspace()
    torch.manual_seed(7)
    pair_head = {"para": "cross", "sts": "cross", **kwargs.pop("pair_head", {})}
    model = MultitaskBERT(BertModel.from_pretrained(root / "tiny"),
                          {task: TASKS[task] for task in KINDS}, pair_head,
                          kwargs.pop("pooling", "mean"), 0.0, **kwargs)
    tokenizer = load_tokenizer(root / "tiny")
    examples = {}
    for name in KINDS:
        path = root / "data" / TASKS[name].filename("train")
        examples[name] = tokenize(read_examples(path, TASKS[name]), tokenizer, 64,
                                  pair_head.get(name) == "cross")
    return model.train(), examples


def heads_of(model):
    """{task: the parameters of its head}, for a GradientBuffer."""
    return {task: list(head.parameters()) for task, head in model.heads.items()}


# ---------------------------------------------------------------- runs of the scripts

def quietly(main, *flags):
    """(exit status, what was printed) of a script's main."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        status = exit_status(main, list(map(str, flags)))
    return status, printed.getvalue()


def captured(function, *args, **kwargs):
    """(what a function returns, what it prints)."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        result = function(*args, **kwargs)
    return result, printed.getvalue()


def without_curves(check):
    """Leave out the plots of a check's runs, which would take half of its time."""
    return mock.patch.object(multitask_classifier, "plot_curves", lambda folder: None)(check)


def run(*flags, steps=2, option="finetune", name=None):
    """multitask_classifier.py on the tiny encoder and the cut demo sets. Returns (exit status, what
    was printed, the run's folder)."""
    root = workspace()
    name = name or str(root / "runs" / f"{time.time_ns()}")
    status, printed = quietly(
        multitask_classifier.main, "--option", option, "--model", root / "tiny", "--data_dir",
        root / "data", "--epochs", 1, "--epoch_length", steps, "--name", name, *flags)
    return status, printed, Path(name)


def trained(*flags, **kwargs):
    """The tensors that a run leaves: encoder and heads."""
    status, printed, folder = run(*flags, **kwargs)
    assert status == 0, printed
    return load_file(folder / "model.safetensors")


def resumable(flags):
    """Flags of a run of two epochs of seven steps that is saved after every optimizer step."""
    root = workspace()
    flags = [str(flag).replace("DATA", str(root / "data")) for flag in flags]
    return ["--option", "finetune", "--model", root / "tiny", "--data_dir", root / "data",
            "--epochs", 2, "--epoch_length", 7, "--batch_size", 4, "--save_every", 0, *flags]


def remains(folder):
    """What a run leaves: its evaluations, the final and the best weights, predictions and errors.
    (The step lines of metrics.jsonl may end at other steps where a run was saved and resumed.)"""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    last = torch.load(folder / "last.pt", weights_only=True)["model"]
    weights = {**load_file(folder / "model.safetensors"),
               **{f"last {name}": tensor for name, tensor in last.items()}}
    files = {path.name: path.read_bytes()
             for path in [*(folder / "predictions").iterdir(), folder / "errors.csv"]}
    return evaluations, weights, files


def equal(folder, other):
    """Two runs left the same, bit for bit."""
    evaluations, weights, files = remains(folder)
    other_evaluations, other_weights, other_files = remains(other)
    return (evaluations == other_evaluations and same(weights, other_weights)
            and files == other_files)


class Killed(BaseException):
    """Nothing of the program runs after it, as after kill -9."""


def killed_after(steps, main, *flags):
    """Run multitask_classifier.py and kill it when its next step would begin after `steps` of
    them."""
    left, real = [steps], multitask_classifier.GradientBuffer.begin

    def begin(*args):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        real(*args)

    with mock.patch.object(multitask_classifier.GradientBuffer, "begin", begin):
        try:
            quietly(main, *flags)
        except Killed:
            return
    raise AssertionError("not killed")
