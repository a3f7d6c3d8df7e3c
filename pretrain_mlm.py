"""Masked-language-model pretraining of an encoder on the tasks' own text (Devlin et al. 2018, section 3.1, task 1;
Gururangan et al. 2020; Sun et al. 2020, section 4.2), before it is fine-tuned on the tasks.

    python pretrain_mlm.py --tasks sst,para,sts --epochs 4 --out runs/mlm      for multitask_classifier.py --model runs/mlm
    python pretrain_mlm.py --text FILE --out runs/mlm                            any text, one sentence a line
    python pretrain_mlm.py --model runs/mlm --fill "A [MASK] film."              what the model puts in the gap

15 % of each sequence's tokens are to be predicted, drawn anew in every pass: of these 80 % are replaced by [MASK], 10 % by
a random token, and 10 % are left. The text is that of the training files alone; some of it is held out for the loss and
perplexity that are shown. A pair is one sequence. A run leaves a BERT folder with the masked-LM head beside the encoder,
metrics.jsonl and curve.png.

Dimensions: B sequences in the batch, L tokens in the longest, T packed tokens, N chosen tokens, H hidden size, V vocabulary.
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

from attention import Linear
from bert import BertConfig, BertModel, read_checkpoint, to_float
from checkpoint import (Interruption, Meter, Run, RunFailed, autocast, exit_status, get_device,
                        process_environment)
from curves import plot_losses
from data.batches import Stream, collate, evaluation_batches, seed_of
from data.download import DEFAULT_ENCODER, InputError, fetch_encoder
from data.tasks import (SPECIAL, TASKS, Examples, data_digest, fitting_tokenizer, locate,
                        read_examples, task_names, tokenize)
from flags import Parser, note_start, number, resumed
from optimizer import AdamW, learning_rate, parameter_groups

SHARE = 0.15  # of a sequence's tokens are predicted
HELD_OUT = 1000  # sequences, or a twentieth of a small set
LOG_EVERY = 10  # steps between two step lines of metrics.jsonl
PUBLISHED = {  # our name -> the published one
    "dense.weight": "cls.predictions.transform.dense.weight", "dense.bias": "cls.predictions.transform.dense.bias",
    "layer_norm.weight": "cls.predictions.transform.LayerNorm.weight",
    "layer_norm.bias": "cls.predictions.transform.LayerNorm.bias", "bias": "cls.predictions.bias"}


# ---------------------------------------------------------------- model

class MaskedLM(nn.Module):
    """BERT and its masked-LM head: dense, GELU, LayerNorm, then the word embeddings as the decoder, and a bias."""

    def __init__(self, bert, amp=False):
        super().__init__()
        H = bert.config.hidden_size
        self.bert, self.amp = bert, amp
        self.dense, self.layer_norm = Linear(H, H), nn.LayerNorm(H, eps=bert.config.layer_norm_eps)
        nn.init.normal_(self.dense.weight, std=bert.config.initializer_range)
        nn.init.zeros_(self.dense.bias)
        self.bias = nn.Parameter(torch.zeros(bert.config.vocab_size))

    @property
    def device(self):
        return self.bias.device

    def forward(self, input_ids, attention_mask, token_type_ids, chosen, targets=None):
        """Padded (B, L) each, `chosen` boolean -> logits (N, V) at the chosen positions, packed, and targets (N,) there.

        The decoder is the largest product of the model: only what is predicted goes through it.
        """
        with autocast(self.device, self.amp):
            input_ids, token_type_ids, packing = self.bert.pack(input_ids, attention_mask, token_type_ids)
            hidden_states = self.bert.embed(input_ids, token_type_ids, packing.positions)
            hidden_states = self.bert.encode_packed(hidden_states, packing)  # (T, H)
            chosen = packing.pack(chosen)  # (T,)
            hidden_states = self.layer_norm(F.gelu(self.dense(hidden_states[chosen])))  # (N, H)
            logits = F.linear(hidden_states, self.bert.word_embedding.weight, self.bias)
        return logits.float(), None if targets is None else packing.pack(targets)[chosen]

    @classmethod
    def from_pretrained(cls, folder, amp=False):
        """A BERT folder, with its own masked-LM head where it has one. Raises InputError."""
        path, tensors = read_checkpoint(folder)
        of_now = {name: name.replace("gamma", "weight").replace("beta", "bias") for name in tensors}
        published = {of_now[name]: tensor for name, tensor in tensors.items()}
        decoder = [f"cls.predictions.decoder.{kind}" for kind in ("weight", "bias")]
        of_head = [name for name in tensors if of_now[name] in (*PUBLISHED.values(), *decoder)]
        model = cls(BertModel.from_pretrained(folder, elsewhere=of_head), amp)
        found = {ours: to_float(path, theirs, published[theirs])
                 for ours, theirs in PUBLISHED.items() if theirs in published}
        if not found:
            print(f"{path}: has no masked-LM head; it starts from random weights")
            return model
        own = model.state_dict()
        wrong = [theirs for ours, theirs in PUBLISHED.items() if ours not in found or found[ours].shape != own[ours].shape]
        if wrong:
            raise InputError(f"{path}: {wrong[0]} of its masked-LM head is missing or misshapen")
        model.load_state_dict(found, strict=False)
        tied = published.get(decoder[0])
        if tied is not None and not torch.equal(tied.float(), model.bert.word_embedding.weight):
            raise InputError(f"{path}: {decoder[0]} is not the word embeddings, "
                             "to which this head is tied")
        return model

    def save_pretrained(self, folder, vocabulary_folder):
        own = self.state_dict()
        self.bert.save_pretrained(folder, vocabulary_folder, head={theirs: own[ours] for ours, theirs in PUBLISHED.items()})


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
        return cls(ids["[MASK]"], special, continuation)


def choose(ids, vocabulary, whole_word, generator):
    """The positions of one sequence to predict: 15 % of its tokens that are not special, or words of about as many."""
    candidates = np.flatnonzero(~vocabulary.special[ids])
    if len(candidates) == 0:
        return candidates
    count = max(1, round(SHARE * len(candidates)))
    if not whole_word:
        return generator.choice(candidates, count, replace=False)
    words = np.split(candidates, np.flatnonzero(~vocabulary.continuation[ids[candidates]])[1:])
    chosen = []
    for i in generator.permutation(len(words)):
        if not chosen or len(chosen) + len(words[i]) <= count:
            chosen.extend(words[i])
    return np.array(chosen)


def mask_tokens(input_ids, vocabulary, whole_word, generator):
    """(B, L) -> the ids with 80 % of the chosen as [MASK], 10 % random and 10 % kept; and where the chosen are, boolean."""
    ids, chosen = input_ids.numpy().copy(), np.zeros(input_ids.shape, dtype=bool)
    for row, positions in zip(chosen, (choose(row, vocabulary, whole_word, generator) for row in ids)):
        row[positions] = True
    kind = generator.random(ids.shape)
    ids[chosen & (kind < 0.8)] = vocabulary.mask
    randomly = chosen & (kind >= 0.8) & (kind < 0.9)
    ids[randomly] = generator.integers(len(vocabulary.special), size=randomly.sum())
    return torch.from_numpy(ids), torch.from_numpy(chosen)


def load_text(args, tokenizer, max_length, vocabulary):
    """(training text, held-out text): Examples without labels, each sequence once. Raises InputError."""
    sets = [read_examples(splits["train"], TASKS[task], skip_malformed=args.skip_malformed)
            for task, splits in locate(args, ("train",)).items()]
    if args.text:
        try:
            lines = [line.strip() for line in args.text.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{args.text}: cannot be read as UTF-8 text ({error})") from None
        sets.append(Examples(None, args.text, [], [(line,) for line in lines], None, []))
    unique = {}
    for examples in sets:
        for row in tokenize(examples, tokenizer, max_length, cross=True).tokens:
            unique[row[0][0].tobytes()] = row
    tokens = [row for row in unique.values() if not vocabulary.special[row[0][0]].all()]
    if len(tokens) < len(unique):
        print(f"left out {len(unique) - len(tokens)} sequences of unknown characters alone")
    order = np.random.default_rng(seed_of(args.seed, "held out")).permutation(len(tokens))
    size = min(HELD_OUT, len(tokens) // 20)
    if size == 0:
        raise InputError(f"{len(tokens)} sequences of text are too few: one in twenty is held out")
    print(f"{len(tokens) - size} sequences to train on, {size} held out")
    return [Examples(None, None, [], [], None, [], [tokens[i] for i in part]) for part in (order[size:], order[:size])]


# ---------------------------------------------------------------- training

def predict_masked(model, batch, vocabulary, whole_word, seed):
    """Hide some tokens of a batch, as `seed` draws them. Returns the logits (N, V) for them, and what they are (N,)."""
    ids, chosen = mask_tokens(batch.input_ids, vocabulary, whole_word, np.random.default_rng(seed))
    return model(ids, batch.attention_mask, batch.token_type_ids, chosen, batch.input_ids)


@torch.no_grad()
def evaluate(model, held_out, vocabulary, args):
    """The mean loss over the chosen tokens of the held-out text, which are the same at every call."""
    model.eval()
    total = count = 0
    for i, batch in enumerate(evaluation_batches(held_out, np.arange(len(held_out.tokens)))):
        seed = seed_of(args.seed, "held-out masks", i)
        logits, targets = predict_masked(model, batch, vocabulary, args.whole_word, seed)
        total += float(F.cross_entropy(logits, targets, reduction="sum"))
        count += len(targets)
    model.train()
    return total / count


def perplexity(loss):
    return math.exp(min(loss, 700.0))  # beyond it float64 overflows


def train(args, model, text, held_out, vocabulary, run, encoder_folder, interruption):
    """args.epochs passes over the text, from where `run` stopped if it did. Saves the epoch that is best on the held-out
    text, also where it is worse than the model before training: a run leaves what it trained."""
    stream = Stream(len(text.tokens), args.batch_size, args.seed, "text")
    steps_per_epoch = args.epoch_length or stream.batches
    updates = args.epochs * steps_per_epoch
    optimizer = AdamW(parameter_groups(model.parameters(), args.weight_decay), lr=args.lr)
    unchecked = []  # (step, loss) since the last check that all are finite
    measured, done, of_data = Meter(["loss"], model.device), 0, data_digest({"text": {"train": text, "held out": held_out}})

    def check_losses():
        """Raises RunFailed that names the first step since the last check whose loss is not finite."""
        losses = torch.stack([loss for _, loss in unchecked]).tolist() if unchecked else []
        for (n, _), loss in zip(unchecked, losses):
            if not math.isfinite(loss):
                raise RunFailed(f"the loss is {loss} at step {n + 1}, sequences {stream.rows(n)[:5].tolist()}, ... of the "
                                "training text; what was saved before is intact; try a lower --lr")
        unchecked.clear()

    def state():
        check_losses()
        if not all(parameter.isfinite().all() for parameter in model.parameters()):
            raise RunFailed(f"the weights are not finite after step {done}; what was saved before is intact; "
                            "try a lower --lr")
        return {"data": of_data, "done": done, "start": start, "best": best,
                "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                "measured": measured.state()}

    if run.last:
        if run.last.get("data") != of_data:
            raise InputError("--resume: the text or the vocabulary is not that which the run was started with")
        done, start, best = run.last["done"], run.last["start"], run.last["best"]
        model.load_state_dict(run.last["model"])
        optimizer.load_state_dict(run.last["optimizer"])
        measured.load_state(run.last["measured"])
    run.start()
    if not run.last:
        start, best = evaluate(model, held_out, vocabulary, args), None  # best: of the epochs
        print(f"before      held-out loss {start:.3f}, perplexity {perplexity(start):.1f}",
              flush=True)
        run.log("evaluation", epoch=0, step=0, loss=start, perplexity=perplexity(start))
    for epoch in range(done // steps_per_epoch, args.epochs):
        bar = tqdm(range(done, (epoch + 1) * steps_per_epoch), desc=f"epoch {epoch + 1}/{args.epochs}",
                   initial=done % steps_per_epoch, total=steps_per_epoch, unit="step", leave=False)
        for n in bar:
            batch = collate(text, stream.rows(n))
            torch.manual_seed(seed_of(args.seed, "dropout", n))
            seed = seed_of(args.seed, "masks", n)
            logits, targets = predict_masked(model, batch, vocabulary, args.whole_word, seed)
            loss = F.cross_entropy(logits, targets)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(args.lr, (n + 1) / (updates + 1), args.warmup)
            optimizer.step()
            unchecked.append((n, loss.detach()))
            measured.add("loss", loss, len(targets), int(batch.attention_mask.sum()))
            measured.steps += 1
            done = n + 1
            if done % LOG_EVERY == 0 or done % steps_per_epoch == 0:
                check_losses()
                means, speed = measured.read()
                bar.set_postfix_str(f"loss {means['loss']:.3f}, {speed['tokens_per_second']} tokens/s")
                run.log("step", epoch=epoch + 1, step=done, **means, lr=optimizer.param_groups[0]["lr"], **speed)
            if done % steps_per_epoch and (interruption.asked or run.due(args.save_every)):
                run.save(state())
                interruption.check(run)
        loss = evaluate(model, held_out, vocabulary, args)
        if not math.isfinite(loss):
            raise RunFailed(f"the held-out loss is {loss} after step {done}; what was saved "
                            "before is intact; try a lower --lr")
        improved = best is None or loss < best
        best = loss if improved else best
        print(f"epoch {epoch + 1}/{args.epochs}   held-out loss {loss:.3f}, perplexity {perplexity(loss):.1f}"
              f"{'  best so far, saved' if improved else ''}", flush=True)
        run.log("evaluation", epoch=epoch + 1, step=done, loss=loss, perplexity=perplexity(loss))
        measured.clear()
        now = state()  # refuses weights that are not finite
        if improved:
            model.save_pretrained(run.folder, encoder_folder)
        plot_losses(run.folder)
        run.save(now)
        interruption.check(run)
    if best > start:
        print(f"every epoch is worse than the start: held-out loss {best:.3f} in the best, which "
              f"is saved, and {start:.3f} before training")


@torch.no_grad()
def fill(model, tokenizer, sentence, top=5):
    """The most probable tokens for each [MASK] of a sentence, which is cut as in training. Raises
    InputError where there is none, or where one is cut away."""
    mask, length = tokenizer.token_to_id("[MASK]"), model.bert.config.max_position_embeddings
    masks = [i for i, token in enumerate(tokenizer.encode(sentence).ids) if token == mask]
    if not masks:
        raise InputError(f"--fill {sentence!r}: no [MASK] in it")
    if masks[-1] > length - 2:  # the last token that is read is [SEP]
        raise InputError(f"--fill {sentence!r}: a [MASK] is cut away, since the encoder reads "
                         f"{length} tokens; shorten the sentence")
    examples = Examples(None, "--fill", [0], [(sentence,)], None, [])
    ((ids, _),), = tokenize(examples, tokenizer, length, cross=False).tokens
    ids = torch.from_numpy(ids)[None]  # (1, L)
    logits, _ = model.eval()(ids, torch.ones_like(ids), torch.zeros_like(ids), ids == mask)
    best = logits.softmax(dim=-1).topk(top)
    return [[(tokenizer.id_to_token(int(i)), float(p)) for p, i in zip(*row)] for row in zip(best.values, best.indices)]


# ---------------------------------------------------------------- flags

def get_parser():
    parser = Parser(description="Masked-language-model pretraining on the tasks' own text.")
    parser.add_argument("--model", default=DEFAULT_ENCODER, help="BERT folder, or name on the Hugging Face hub")
    parser.add_argument("--tasks", default=None, help="whose training text (default: sst,para,sts, or none with --text)")
    parser.add_argument("--text", type=Path, default=None, help="a text file, one sentence a line")
    parser.add_argument("--data_dir", type=Path, default=None, help="folder with the course's files (default: data/, or "
                        "the demo sets as long as that is empty)")
    parser.add_argument("--skip_malformed", action="store_true", help="go on where more than 1 %% of a file is malformed")
    parser.add_argument("--epochs", type=number(int, 1), default=4, help="number of epochs")
    parser.add_argument("--epoch_length", type=number(int, 1), default=None, help="steps (default: once through the text)")
    parser.add_argument("--batch_size", type=number(int, 1), default=32, help="sequences a step")
    parser.add_argument("--lr", type=number(float, 0), default=1e-4, help="peak learning rate")
    parser.add_argument("--warmup", type=number(float, 0, 1), default=0.1,
                        help="share of the steps in which the rate rises from 0; after that it falls linearly to 0")
    parser.add_argument("--weight_decay", type=number(float, 0), default=0.01, help="of weights; biases and norms have none")
    parser.add_argument("--clip", type=number(float, 0), default=1.0, help="largest global gradient norm")
    parser.add_argument("--whole_word", action="store_true", help="mask whole words, not single word pieces")
    parser.add_argument("--seed", type=number(int, 0, 2 ** 63), default=11711, help="of everything random")
    parser.add_argument("--use_gpu", action="store_true", help="train on CUDA, or on MPS of an Apple machine")
    parser.add_argument("--amp", action="store_true", help="in bfloat16 (CUDA, or a CPU with avx512_bf16)")
    parser.add_argument("--out", type=Path, default=None, help="the folder to write; it must not be there yet")
    parser.add_argument("--resume", default=None, metavar="FOLDER",
                        help="go on with a run that was stopped or killed; what was moved since "
                             "then is given anew: --data_dir, --model, --text")
    parser.add_argument("--save_every", type=number(float, 0), default=5.0, metavar="MINUTES",
                        help="how often the state to go on from is saved; after each epoch it always is")
    parser.add_argument("--fill", nargs="+", metavar="SENTENCE", help="no training: fill the [MASK]s of these sentences")
    return parser


def resolve(argv):
    args = get_parser().parse_args(argv)
    if args.resume is not None:
        return resumed(get_parser, complete, argv, "--out")
    note_start(args, argv)
    return complete(args)


def complete(args):
    if not args.fill and not args.out:
        raise InputError("give --out FOLDER to train, or --fill SENTENCE")
    args.tasks = [] if args.text and args.tasks is None else task_names(args.tasks or "sst,para,sts")
    return args


def main(argv=None):
    args = resolve(sys.argv[1:] if argv is None else list(argv))
    if process_environment()[2] > 1:
        raise InputError("pretraining runs as one process; leave out torchrun")
    device = get_device(args.use_gpu, args.amp)
    encoder_folder = fetch_encoder(args.model)
    pairs = not args.fill and any(TASKS[task].is_pair for task in args.tasks)
    tokenizer = fitting_tokenizer(encoder_folder, BertConfig.from_folder(encoder_folder), pairs)
    vocabulary = Vocabulary.of(tokenizer, encoder_folder)
    torch.manual_seed(args.seed)  # for a new head
    if args.fill:
        model = MaskedLM.from_pretrained(encoder_folder)
        for sentence in args.fill:
            for filled in fill(model, tokenizer, sentence):
                print(f"{sentence}   " + "  ".join(f"{token} {p:.2f}" for token, p in filled))
        return
    model = MaskedLM.from_pretrained(encoder_folder, args.amp).to(device)
    text, held_out = load_text(args, tokenizer, model.bert.config.max_position_embeddings, vocabulary)
    with Interruption() as interruption:
        train(args, model, text, held_out, vocabulary, Run(args.out, vars(args), args.resume), encoder_folder, interruption)
    print(f"{os.path.relpath(args.out)}: encoder and masked-LM head, metrics.jsonl, curve.png")


if __name__ == "__main__":
    sys.exit(exit_status(main))
