"""How far perturbations of each size move a sentence's sentiment, and what float32 makes of them.

    python results/smart/perturbations.py RUN          of a trained model
    python results/smart/perturbations.py              of an untrained encoder, with a sentiment
                                                       head fitted to what it makes of SST

For each radius eps and step size the table has two perturbations of the sentence's embeddings: the
one that SMART's ascent finds in one step (smart.py), and random signs of the same 2-norm. Columns:
the largest change of a class's probability, and the divergence R, both computed in float64; and the
relative error of the ascent's R in float32, in which models are trained.
"""
import copy
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.batches import Batch, evaluation_batches  # noqa: E402
from data.download import fetch_encoder  # noqa: E402
from data.tasks import find_data_files  # noqa: E402
from data.tokenizer import load_tokenizer  # noqa: E402
from multitask_classifier import MultitaskBERT, build, get_parser  # noqa: E402
from optimizer import AdamW  # noqa: E402
from smart import Smoothness, divergence  # noqa: E402
from support import flags  # noqa: E402
from support.files import InputError  # noqa: E402
from support.run import exit_status  # noqa: E402

SENTENCE = "A quiet, clever film that never quite finds its ending."
SIZES = ((1e-6, 1e-4), (1e-5, 1e-3), (1e-4, 1e-2), (1e-3, 1e-1),  # (eps, step size); the
         (1e-2, 1.0), (0.1, 1.0), (1.0, 1e-3), (1.0, 1.0))  # paper's are the second


def show_perturbations(model, batch):
    """Print the table for a batch of one sentence. model: a MultitaskBERT in float32 with an sst
    head."""
    single = model.eval()
    double = copy.deepcopy(single).double()  # the smallest changes would be lost in float32
    logits = double.logits("sst", batch).detach()
    probabilities = [round(p, 3) for p in logits.softmax(dim=-1)[0].tolist()]
    print(f"{SENTENCE} {probabilities}\n"
          f"{'':24}largest change of a probability   R                    its error\n"
          f"eps       step size     signs      ascent       signs      ascent    in float32")

    for eps, step_size in SIZES:
        smart = Smoothness({"sst": "classification"}, eps=eps, sigma=min(eps, 1e-5),
                           step_size=step_size)
        torch.manual_seed(0)
        ascent = smart.adversarial_perturbation(double, "sst", batch, logits, seed=0)
        signs = ascent.square().mean().sqrt() * torch.randn_like(ascent).sign()
        (sign_change, sign_R), (change, R) = (effect(double, batch, logits, perturbation)
                                              for perturbation in (signs, ascent))

        single_logits = single.logits("sst", batch)
        measured = smart.divergences(single, "sst", batch, single_logits, 0, ascent).item()
        print(f"{eps:<8g}  {step_size:<8g} {sign_change:10.1e}  {change:10.1e}  "
              f"{sign_R:10.1e}  {R:10.1e}  {abs(measured / R - 1):11.0%}")


def effect(model, batch, logits, perturbation):
    """(largest change of a probability, R) of a perturbation of the one sentence."""
    moved = model.logits("sst", batch, perturbation).detach()
    change = (moved.softmax(dim=-1) - logits.softmax(dim=-1)).abs().max()
    return change.item(), divergence("classification", moved, logits).item()


def fit_sentiment_head(model, examples):
    """Fit the sst head to the pooled states of an untrained encoder, which stays as it is."""
    batches = evaluation_batches(examples, np.arange(min(500, len(examples))))
    with torch.no_grad():
        encoded = [(model.eval()(batch.input_ids, batch.attention_mask), batch.labels)
                   for batch in batches]
    pooled, labels = map(torch.cat, zip(*encoded))  # (N, H), (N,)

    head = model.heads["sst"]
    optimizer = AdamW(head.parameters(), lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        F.cross_entropy(head(pooled), labels.long()).backward()
        optimizer.step()


def untrained_model(options):
    """(model, folder of its vocabulary)."""
    argv = ["--tasks", "sst"]
    for name in ("model", "data_dir"):
        if getattr(options, name):
            argv += [f"--{name}", getattr(options, name)]
    args = flags.parse_flags(get_parser, flags.check_training_flags, argv, "--name")
    folder = fetch_encoder(args.model)
    model, data = build(args, find_data_files(args, splits=("train",)), folder)
    fit_sentiment_head(model, data["sst"]["train"])
    return model, folder


def trained_model(run):
    """(model, folder of its vocabulary). Raises InputError for a run without sst."""
    model = MultitaskBERT.load(run)
    if "sst" not in model.heads:
        raise InputError(f"{run}: trained without the task sst, so there is no sentiment to show")
    model.amp = False  # the table has a precision of its own
    return model, run


def main(argv=None):
    parser = flags.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", metavar="RUN", help="folder of a trained model")
    parser.add_argument("--model", help="without RUN: BERT folder or name")
    parser.add_argument("--data_dir", help="without RUN: folder with the course's files")
    options = parser.parse_args(argv)
    if options.run and (options.model or options.data_dir):
        raise InputError("--model and --data_dir are for an untrained encoder; leave out RUN")

    model, folder = trained_model(options.run) if options.run else untrained_model(options)
    ids = torch.tensor([load_tokenizer(folder).encode(SENTENCE).ids])  # (1, L)
    show_perturbations(model, Batch(ids, torch.ones_like(ids), torch.zeros_like(ids), None,
                                    np.zeros(1), None))


if __name__ == "__main__":
    sys.exit(exit_status(main))
