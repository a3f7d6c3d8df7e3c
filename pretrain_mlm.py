"""Masked-language-model pretraining of an encoder on the tasks' own text (Devlin et al. 2018,
section 3.1, task 1; Gururangan et al. 2020; Sun et al. 2020, section 4.2), before it is fine-tuned.

    python pretrain_mlm.py --tasks sst,para,sts --epochs 4 --out runs/mlm
    python multitask_classifier.py --model runs/mlm ...             starts from there
    python pretrain_mlm.py --text FILE --out runs/mlm               any text, one sentence per line
    python pretrain_mlm.py --model runs/mlm --fill "A [MASK] film." the model's guesses for the gap

15 % of each sequence's tokens, special ones aside, are to be predicted, drawn anew in every
pass: 80 % of them are replaced by [MASK], 10 % by a random token, and 10 % are left. The text is
that of the training files alone; some of it is held out for the loss and perplexity that are
printed. A pair is one sequence. A run leaves a BERT folder with the masked-LM head beside the
encoder, metrics.jsonl and curve.png.

Dimensions: B sequences in the batch, L tokens in the longest, T packed tokens, N chosen tokens, H
hidden size, V vocabulary.
"""
import dataclasses
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from bert import BertConfig, BertModel
from data.batches import TaskBatches, collate, evaluation_batches, seed_of
from data.download import DEFAULT_ENCODER, fetch_encoder
from data.tasks import TASKS, Examples, data_digest, find_data_files, read_examples, task_names
from data.tokenizer import SPECIAL, fitting_tokenizer, tokenize
from optimizer import ScheduledAdamW
from support.devices import autocast, get_device, make_scaler, process_environment
from support.fast_cpu import accelerate
from support.files import InputError
from support.flags import Parser, number, parse_flags
from support.plots import plot_losses
from support.run import (Interruption, Run, RunFailed, StepLog, check_weights, exit_status,
                         restoring)
from support.weights import read_checkpoint, to_float

CHOSEN = 0.15  # of a sequence's tokens are predicted
HELD_OUT = 1000  # sequences, or a twentieth of a small set
LOG_EVERY = 10  # steps per line of metrics.jsonl
PUBLISHED = {  # our name -> the published one
    "dense.weight": "cls.predictions.transform.dense.weight",
    "dense.bias": "cls.predictions.transform.dense.bias",
    "layer_norm.weight": "cls.predictions.transform.LayerNorm.weight",
    "layer_norm.bias": "cls.predictions.transform.LayerNorm.bias",
    "bias": "cls.predictions.bias"}


# ---------------------------------------------------------------- flags

def get_parser():
    parser = Parser(description="Masked-language-model pretraining on the tasks' own text.")
    add = parser.add_argument
    add("--model", default=DEFAULT_ENCODER, help="BERT folder, or name on the Hugging Face hub")
    add("--tasks", help="whose training text (default: sst,para,sts, or none with --text)")
    add("--text", type=Path, help="a text file, one sentence per line")
    add("--data_dir", type=Path, help="folder with the course's files (default: data/, or the demo "
        "sets in data/demo/ until `python data/download.py` has filled it)")
    add("--skip_malformed", action="store_true",
        help="continue where more than 1 %% of a file is malformed")
    add("--epochs", type=number(int, 1), default=4, help="number of epochs")
    add("--epoch_length", type=number(int, 1), help="steps (default: once through the text)")
    add("--batch_size", type=number(int, 1), default=32, help="sequences per step")
    add("--lr", type=number(float, 0), default=1e-4, help="peak learning rate")
    add("--warmup", type=number(float, 0, 1), default=0.1,
        help="share of the steps in which the rate rises from 0; then it falls linearly to 0")
    add("--weight_decay", type=number(float, 0), default=0.01,
        help="of weights; biases and norms have none")
    add("--clip", type=number(float, 0), default=1.0, help="largest global gradient norm; 0: off")
    add("--whole_word", action="store_true", help="mask whole words, not single word pieces")
    add("--seed", type=number(int, 0, 2 ** 63), default=11711, help="seed of all random generators")
    add("--use_gpu", action="store_true", help="train on CUDA, or on MPS of an Apple machine")
    add("--amp", action="store_true", help="in half precision (CUDA, or a CPU with avx512_bf16)")
    add("--out", type=Path, help="the folder to write, which must not exist yet")
    add("--resume", metavar="FOLDER", help="resume an interrupted run, with the flags it had")
    add("--save_every", type=number(float, 0), default=5.0, metavar="MINUTES",
        help="how often the state to resume from is saved, besides after each epoch")
    add("--fill", nargs="+", metavar="SENTENCE",
        help="no training: fill the [MASK]s of these sentences")
    return parser


def check_flags(args):
    if not args.fill and not args.out:
        raise InputError("give --out FOLDER to train, or --fill SENTENCE")
    if args.text and args.tasks is None:
        args.tasks = []
    else:
        args.tasks = task_names(args.tasks or "sst,para,sts")
    return args


# ---------------------------------------------------------------- model

class MaskedLM(nn.Module):
    """BERT and its masked-LM head: dense, GELU, LayerNorm, then the word embeddings as the decoder,
    and a bias."""

    def __init__(self, bert, amp=False):
        super().__init__()
        H = bert.config.hidden_size
        self.bert, self.amp = bert, amp
        self.dense = nn.Linear(H, H)
        self.layer_norm = nn.LayerNorm(H, eps=bert.config.layer_norm_eps)
        nn.init.normal_(self.dense.weight, std=bert.config.initializer_range)
        nn.init.zeros_(self.dense.bias)
        self.bias = nn.Parameter(torch.zeros(bert.config.vocab_size))
        accelerate(self)

    @property
    def device(self):
        return self.bias.device

    def forward(self, input_ids, attention_mask, token_type_ids, chosen, targets=None):
        """Padded (B, L) each, `chosen` boolean -> logits (N, V) at the chosen positions, in packed
        order, and targets (N,) there.

        The decoder is the largest product of the model, so only what is predicted goes through it.
        """
        with autocast(self.device, self.amp):
            # the encoder, as in fine-tuning
            ids, types, packing = self.bert.pack(input_ids, attention_mask, token_type_ids)
            hidden_states = self.bert.embed(ids, types, packing.positions)
            hidden_states = self.bert.encode_packed(hidden_states, packing)  # (T, H)

            # the chosen positions, in packed order. Their number is known on the host, so a sort
            # finds them without a wait for the GPU, which hidden_states[boolean mask] would be
            order = packing.pack(chosen.int()).argsort(descending=True, stable=True)  # (T,)
            positions = order[:int(chosen.sum())]  # (N,)

            # the head, on these alone; its decoder is the word embedding itself
            hidden_states = hidden_states.index_select(0, positions)
            hidden_states = self.layer_norm(F.gelu(self.dense(hidden_states)))  # (N, H)
            logits = F.linear(hidden_states, self.bert.word_embedding.weight, self.bias)
        if targets is not None:
            targets = packing.pack(targets).index_select(0, positions)
        return logits.float(), targets

    @classmethod
    def from_pretrained(cls, folder, amp=False, needs_head=False):
        """A BERT folder, with its own masked-LM head where it has one. Raises InputError, with
        needs_head also where it has none."""
        path, tensors = read_checkpoint(folder)
        # checkpoints of 2018 have TensorFlow's names
        current = {name: name.replace("gamma", "weight").replace("beta", "bias")
                   for name in tensors}
        published = {current[name]: tensor for name, tensor in tensors.items()}
        decoder = [f"cls.predictions.decoder.{kind}" for kind in ("weight", "bias")]
        of_head = [name for name in tensors if current[name] in (*PUBLISHED.values(), *decoder)]
        model = cls(BertModel.from_pretrained(folder, ignore=of_head), amp)

        # the head is loaded whole or not at all
        found = {ours: to_float(path, theirs, published[theirs])
                 for ours, theirs in PUBLISHED.items() if theirs in published}
        if not found and needs_head:
            raise InputError(f"{path}: has no masked-LM head, so its guesses would be random; give "
                             "--model a folder that has one, such as one that this script wrote")
        if not found:
            print(f"{path}: has no masked-LM head; it starts from random weights")
            return model
        own = model.state_dict()
        for ours, theirs in PUBLISHED.items():
            if ours not in found or found[ours].shape != own[ours].shape:
                raise InputError(f"{path}: {theirs} of its masked-LM head is missing or misshapen")
        model.load_state_dict(found, strict=False)

        # a checkpoint may store the decoder a second time, which must be the word embeddings
        tied = published.get(decoder[0])
        if tied is not None and not torch.equal(tied.float(), model.bert.word_embedding.weight):
            raise InputError(f"{path}: {decoder[0]} is not the word embeddings, to which this head "
                             "is tied")
        return model

    def save_pretrained(self, folder, vocabulary_folder):
        own = self.state_dict()
        head = {theirs: own[ours] for ours, theirs in PUBLISHED.items()}
        self.bert.save_pretrained(folder, vocabulary_folder, head)


# ---------------------------------------------------------------- text and masks

@dataclasses.dataclass
class Vocabulary:
    mask: int  # the id of [MASK]
    special: np.ndarray  # (V,) boolean: never chosen
    continuation: np.ndarray  # (V,) boolean: a word piece that is not its word's first, ##ing

    @classmethod
    def of(cls, tokenizer, folder):
        ids = tokenizer.get_vocab()
        if "[MASK]" not in ids:
            raise InputError(f"{folder}: no [MASK] in its vocabulary")
        special, continuation = np.zeros((2, max(ids.values()) + 1), dtype=bool)
        for token, i in ids.items():
            special[i], continuation[i] = token in SPECIAL, token.startswith("##")
        special[0] = True  # padding, whatever the vocabulary has there
        return cls(ids["[MASK]"], special, continuation)


def choose_positions(ids, vocabulary, whole_word, generator):
    """The positions of one sequence to predict: 15 % of its tokens that are not special, or whole
    words of about as many tokens."""
    candidates = np.flatnonzero(~vocabulary.special[ids])
    if len(candidates) == 0:
        return candidates
    count = max(1, round(CHOSEN * len(candidates)))
    if not whole_word:
        return generator.choice(candidates, count, replace=False)

    # words in random order, those that still fit; the first one always, however long it is
    starts = np.flatnonzero(~vocabulary.continuation[ids[candidates]])
    words = np.split(candidates, starts[1:])
    chosen = []
    for i in generator.permutation(len(words)):
        if not chosen or len(chosen) + len(words[i]) <= count:
            chosen.extend(words[i])
    return np.array(chosen)


def mask_tokens(input_ids, vocabulary, whole_word, generator):
    """(B, L) -> the ids, where of the chosen tokens 80 % are [MASK], 10 % random and 10 % kept; and
    which are chosen, boolean."""
    ids, chosen = input_ids.numpy().copy(), np.zeros(input_ids.shape, dtype=bool)
    for row, of_row in zip(ids, chosen):
        of_row[choose_positions(row, vocabulary, whole_word, generator)] = True

    # one draw per token decides all three cases
    draw = generator.random(ids.shape)
    ids[chosen & (draw < 0.8)] = vocabulary.mask
    random = chosen & (draw >= 0.8) & (draw < 0.9)
    # from the whole vocabulary, special tokens too, as in BERT's released code
    ids[random] = generator.integers(len(vocabulary.special), size=random.sum())
    return torch.from_numpy(ids), torch.from_numpy(chosen)


def load_text(args, tokenizer, max_length, vocabulary):
    """(training text, held-out text): Examples without labels, each sequence once. Raises
    InputError."""
    sets = [read_examples(splits["train"], TASKS[task], skip_malformed=args.skip_malformed)
            for task, splits in find_data_files(args, ("train",)).items()]
    if args.text:
        try:
            lines = args.text.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{args.text}: cannot be read as UTF-8 text ({error})") from None
        texts = [(line.strip(),) for line in lines if line.strip()]
        sets.append(Examples(None, args.text, [], texts, None, []))

    # a sequence that occurs more than once counts once
    unique = {}
    for examples in sets:
        for sequences in tokenize(examples, tokenizer, max_length, cross=True).tokens:
            unique[sequences[0][0].tobytes()] = sequences
    tokens = [sequences for sequences in unique.values()
              if not vocabulary.special[sequences[0][0]].all()]
    if len(tokens) < len(unique):
        print(f"left out {len(unique) - len(tokens)} sequences that have only unknown characters")

    # the split is by the seed, so that a resumed run has the same
    order = np.random.default_rng(seed_of(args.seed, "held out")).permutation(len(tokens))
    size = min(HELD_OUT, len(tokens) // 20)
    if size == 0:
        raise InputError(f"{len(tokens)} sequences of text are too few: one in twenty is held out")
    print(f"{len(tokens) - size} sequences to train on, {size} held out")
    return [Examples(None, None, [str(i) for i in part], [], None, [], [tokens[i] for i in part])
            for part in (order[size:], order[:size])]


# ---------------------------------------------------------------- training

def predict_masked(model, batch, vocabulary, whole_word, seed):
    """Mask some tokens of a batch, as drawn by `seed`. Returns the logits (N, V) for them, and what
    they are (N,)."""
    generator = np.random.default_rng(seed)
    ids, chosen = mask_tokens(batch.input_ids, vocabulary, whole_word, generator)
    return model(ids, batch.attention_mask, batch.token_type_ids, chosen, batch.input_ids)


@torch.no_grad()
def evaluate(model, held_out, vocabulary, args):
    """The mean loss over the chosen tokens of the held-out text, the same in every call."""
    model.eval()
    sums, count = [], 0
    for i, batch in enumerate(evaluation_batches(held_out, np.arange(len(held_out.tokens)))):
        seed = seed_of(args.seed, "held-out masks", i)
        logits, targets = predict_masked(model, batch, vocabulary, args.whole_word, seed)
        sums.append(F.cross_entropy(logits, targets, reduction="sum"))
        count += len(targets)
    model.train()
    return sum(torch.stack(sums).tolist()) / count


def perplexity(loss):
    return math.exp(min(loss, 700.0))  # beyond it float64 overflows


def train(args, model, text, held_out, vocabulary, run, encoder_folder):
    """args.epochs passes over the text, or the rest of them where `run` is resumed. Saves the best
    epoch on the held-out text, also where none is better than the model before training."""
    batches = TaskBatches(len(text.tokens), args.batch_size, args.seed, "text")
    steps_per_epoch = args.epoch_length or batches.batches_per_pass
    scaler = make_scaler(model.device, args.amp)
    optimizer = ScheduledAdamW(model.parameters(), args.epochs * steps_per_epoch, args.lr,
                               args.warmup, weight_decay=args.weight_decay, clip=args.clip,
                               scaler=scaler)
    log = StepLog(run, ["text"], {}, model.device)
    # done: steps; start, best: held-out losses before training and of the best epoch
    state = {"done": 0, "start": None, "best": None}
    if run.last:
        load_state(run.last, state, model, optimizer)
    run.start()
    if state["start"] is None:
        state["start"] = evaluate(model, held_out, vocabulary, args)
        report(run, "before   ", 0, 0, state["start"])

    with Interruption() as interruption:
        for epoch in range(state["done"] // steps_per_epoch, args.epochs):
            first, end = state["done"] % steps_per_epoch, (epoch + 1) * steps_per_epoch
            log.clear()  # its clock starts anew: the evaluation was no step
            bar = tqdm(range(state["done"], end), desc=f"epoch {epoch + 1}/{args.epochs}",
                       initial=first, total=steps_per_epoch, unit="step", leave=False)
            for n in bar:
                # other masks in every step, the same ones after an interruption
                batch = collate(text, batches.indices(n))
                torch.manual_seed(seed_of(args.seed, "dropout", n))
                logits, targets = predict_masked(model, batch, vocabulary, args.whole_word,
                                                 seed_of(args.seed, "masks", n))
                loss = F.cross_entropy(logits, targets)

                model.zero_grad()
                scaler.scale(loss).backward()
                if not optimizer.step():  # clips, sets the rate
                    log.skipped += 1
                log.add("text", loss, len(targets), batch)
                log.end_step()

                state["done"] = done = n + 1
                save = done < end and (interruption.asked or run.due(args.save_every))
                if done % LOG_EVERY == 0 or done == end or save:
                    bar.set_postfix_str(log.write(epoch + 1, done, lr=optimizer.lr))
                if save:
                    save_state(run, state, model, optimizer, epoch)
                    interruption.check(run)

            end_epoch(args, model, held_out, vocabulary, run, state, encoder_folder, epoch)
            save_state(run, state, model, optimizer, epoch)
            interruption.check(run)
    if state["best"] > state["start"]:
        print(f"pretraining made the model worse: held-out loss {state['best']:.3f} after the best "
              f"epoch, which is saved, and {state['start']:.3f} before")


def report(run, name, epoch, step, loss, note=""):
    print(f"{name}   held-out loss {loss:.3f}, perplexity {perplexity(loss):.1f}{note}", flush=True)
    run.log("evaluation", epoch=epoch, step=step, loss=loss, perplexity=perplexity(loss))


def end_epoch(args, model, held_out, vocabulary, run, state, encoder_folder, epoch):
    """Evaluate on the held-out text, and save the model if the epoch is the best so far."""
    check_weights(model, epoch + 1, state["done"])
    loss = evaluate(model, held_out, vocabulary, args)
    if not math.isfinite(loss):
        raise RunFailed(f"the held-out loss is {loss} after step {state['done']}; what was "
                        "saved before is intact; start a new run with a lower --lr")
    improved = state["best"] is None or loss < state["best"]
    report(run, f"epoch {epoch + 1}/{args.epochs}", epoch + 1, state["done"], loss,
           "  best so far, saved" if improved else "")
    if improved:
        state["best"] = loss
        model.save_pretrained(run.folder, encoder_folder)
    plot_losses(run.folder)


def save_state(run, state, model, optimizer, epoch):
    """Write last.pt, from which --resume continues."""
    check_weights(model, epoch + 1, state["done"])
    run.save({**state, "model": model.state_dict(), "optimizer": optimizer.state_dict()})


def load_state(last, state, model, optimizer):
    """Restore what save_state wrote. Raises InputError for the state of another script."""
    with restoring():
        state.update({name: last[name] for name in state})
        model.load_state_dict(last["model"])
        optimizer.load_state_dict(last["optimizer"])


@torch.no_grad()
def fill(model, tokenizer, sentence, top=5):
    """The most probable tokens for each [MASK] of a sentence, which is truncated as in training.
    Raises InputError where there is none, or where one is truncated away."""
    mask, length = tokenizer.token_to_id("[MASK]"), model.bert.config.max_position_embeddings
    masks = [i for i, token in enumerate(tokenizer.encode(sentence).ids) if token == mask]
    if not masks:
        raise InputError(f"--fill {sentence!r}: no [MASK] in it")
    if masks[-1] > length - 2:  # the last token that is read is [SEP]
        raise InputError(f"--fill {sentence!r}: a [MASK] is truncated away, since the encoder "
                         f"reads {length} tokens; shorten the sentence")
    examples = Examples(None, "--fill", [0], [(sentence,)], None, [])
    ((ids, _),), = tokenize(examples, tokenizer, length, cross=False).tokens
    ids = torch.from_numpy(ids)[None].to(model.device)  # (1, L)
    chosen = ids == mask
    logits, _ = model.eval()(ids, torch.ones_like(ids), torch.zeros_like(ids), chosen)
    best = logits.softmax(dim=-1).topk(top)
    return [[(tokenizer.id_to_token(int(i)), float(p)) for p, i in zip(*row)]
            for row in zip(best.values, best.indices)]


# ---------------------------------------------------------------- main

def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse_flags(get_parser, check_flags, argv, "--out")
    if process_environment()[2] > 1:
        raise InputError("pretraining runs as one process; leave out torchrun")
    device = get_device(args.use_gpu, args.amp)
    folder = fetch_encoder(args.model)
    pairs = not args.fill and any(TASKS[task].is_pair for task in args.tasks)
    tokenizer = fitting_tokenizer(folder, BertConfig.from_folder(folder), pairs)
    vocabulary = Vocabulary.of(tokenizer, folder)
    torch.manual_seed(args.seed)  # for a new head

    if args.fill:
        model = MaskedLM.from_pretrained(folder, args.amp, needs_head=True).to(device)
        for sentence in args.fill:
            for guesses in fill(model, tokenizer, sentence):
                print(f"{sentence}   " + "  ".join(f"{token} {p:.2f}" for token, p in guesses))
        return
    model = MaskedLM.from_pretrained(folder, args.amp).to(device)
    length = model.bert.config.max_position_embeddings
    text, held_out = load_text(args, tokenizer, length, vocabulary)
    digest = data_digest({"text": {"train": text, "held out": held_out}})
    run = Run(args.out, vars(args), digest, args.resume)
    train(args, model, text, held_out, vocabulary, run, folder)
    print(f"{os.path.relpath(args.out)}: encoder and masked-LM head, metrics.jsonl, curve.png")


if __name__ == "__main__":
    sys.exit(exit_status(main))
