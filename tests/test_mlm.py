"""pretrain_mlm.py: masks, text, loop, head, filled gaps, resumed runs."""
import contextlib
import functools
import io
import math
import shutil
import time
from unittest import SkipTest, mock

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import optimizer
import pretrain_mlm
from bert import BertConfig, BertModel
from data.batches import collate, evaluation_batches
from data.tasks import TASKS, read_examples
from data.tokenizer import load_tokenizer, tokenize
from optimizer import AdamW, ScheduledAdamW, learning_rate
from pretrain_mlm import MaskedLM, Vocabulary, mask_tokens
from support.files import InputError
from support.run import read_metrics
from tests.helpers import (DEMO, TINY, Killed, needs_full, quietly, raises, random_batch, run, same,
                           three_task_model, workspace)


# ---------------------------------------------------------------- runs, text and vocabulary

def mlm(*flags, out=None):
    """pretrain_mlm.py on the tiny encoder and the cut demo sets. Returns (exit status, what was
    printed, the folder)."""
    root = workspace()
    out = out or root / "runs" / f"mlm-{time.time_ns()}"
    status, printed = quietly(pretrain_mlm.main, "--model", root / "tiny", "--data_dir",
                              root / "data", "--out", out, *flags)
    return status, printed, out


def stopped_after(steps, main, *flags):
    """Run pretrain_mlm.py, and kill it where it would mask one batch more than `steps`, those of
    the evaluations included."""
    left, real = [steps], pretrain_mlm.predict_masked

    def predict_masked(*args):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return real(*args)

    with mock.patch.object(pretrain_mlm, "predict_masked", predict_masked):
        try:
            main(*flags)
        except Killed:
            return
    raise AssertionError("not killed")


def evaluations_are(*losses):
    """A patch: the held-out losses, one after the other, are these."""
    losses = iter(losses)
    return mock.patch.object(pretrain_mlm, "evaluate", lambda *args: next(losses))


@functools.cache
def tiny_vocabulary():
    return Vocabulary.of(load_tokenizer(workspace() / "tiny"), workspace())


@functools.cache
def demo_batches():
    """The input_ids (B, L) of the demo sets' pairs, untruncated."""
    tokenizer, batches = load_tokenizer(workspace() / "tiny"), []
    for name in ("para", "sts"):
        path = DEMO / TASKS[name].filename("train")
        examples = tokenize(read_examples(path, TASKS[name]), tokenizer, 512, cross=True)
        indices = np.arange(len(examples))
        batches += [batch.input_ids for batch in evaluation_batches(examples, indices)]
    return batches


def assert_whole_words(ids, chosen):
    """A continuation is chosen exactly where the piece before it is. (B, L), (B, L)"""
    inside = torch.from_numpy(tiny_vocabulary().continuation)[ids[:, 1:]]
    assert torch.equal(chosen[:, 1:][inside], chosen[:, :-1][inside]) and inside.any()


# ---------------------------------------------------------------- masks

def test_of_all_tokens_15_percent_are_chosen_and_of_these_80_10_10_masked_random_kept():
    vocabulary = tiny_vocabulary()
    for whole_word in (False, True):
        generator, tokens = np.random.default_rng(0), 0
        kinds = np.zeros(3)  # masked, random, kept
        random_tokens = set()
        for ids in demo_batches() * 6:
            masked, chosen = mask_tokens(ids, vocabulary, whole_word, generator)
            tokens += int((~torch.from_numpy(vocabulary.special)[ids]).sum())
            kept, mask = masked[chosen] == ids[chosen], masked[chosen] == vocabulary.mask
            random = ~mask & ~kept
            kinds += [int(mask.sum()), int(random.sum()), int(kept.sum())]
            random_tokens.update(masked[chosen][random].tolist())
        assert tokens > 1e5 and abs(kinds.sum() / tokens - 0.15) < 0.005, kinds.sum() / tokens
        assert np.abs(kinds / kinds.sum() - [0.8, 0.1, 0.1]).max() < 0.01, kinds / kinds.sum()
        assert len(random_tokens) > 0.9 * TINY.vocab_size, "each position draws its own token"


def test_each_sequence_has_chosen_tokens_and_no_special_one_is_chosen():
    vocabulary, generator = tiny_vocabulary(), np.random.default_rng(0)
    for whole_word in (False, True):
        for ids in demo_batches():
            masked, chosen = mask_tokens(ids, vocabulary, whole_word, generator)
            special = torch.from_numpy(vocabulary.special)[ids]
            assert (ids == 0).any() and not (chosen & special).any()
            assert (chosen.sum(dim=1) > 0).all()
            assert torch.equal(masked[~chosen], ids[~chosen])
            if whole_word:
                assert_whole_words(ids, chosen)
            else:
                counts = [max(1, round(0.15 * int(n))) for n in (~special).sum(dim=1)]
                assert chosen.sum(dim=1).tolist() == counts


def test_the_model_sees_the_masked_ids_and_the_original_ones_are_the_target_alone():
    _, examples = three_task_model()
    batch = collate(examples["para"], np.arange(20))
    given = pretrain_mlm.predict_masked(lambda *args: args, batch, tiny_vocabulary(), False, 3)
    ids, attention_mask, types, chosen, targets = given
    masked, positions = mask_tokens(batch.input_ids, tiny_vocabulary(), False,
                                    np.random.default_rng(3))
    assert torch.equal(ids, masked) and torch.equal(chosen, positions)
    assert (ids[chosen] == tiny_vocabulary().mask).float().mean() > 0.6
    assert torch.equal(targets, batch.input_ids) and not (targets == tiny_vocabulary().mask).any()

    # a pair keeps its token types
    assert torch.equal(types, batch.token_type_ids) and types.any()
    assert torch.equal(attention_mask, batch.attention_mask)


def masked_batches(*flags):
    """[(input_ids, chosen)] of all batches of a run, those of the evaluations included."""
    seen = []

    def recorded(input_ids, *args):
        masked, chosen = mask_tokens(input_ids, *args)
        seen.append((input_ids.clone(), chosen))
        return masked, chosen

    with mock.patch.object(pretrain_mlm, "mask_tokens", recorded):
        status, printed, _ = mlm("--batch_size", 100, *flags)
    assert status == 0, printed
    return seen


def sequences_of(batch):
    """{a sequence's ids: which are chosen} of a batch."""
    return {tuple(ids[ids > 0].tolist()): mask[ids > 0] for ids, mask in zip(*batch)}


def test_training_masks_are_drawn_anew_per_epoch_and_held_out_masks_stay():
    # held out, one batch of all, held out, one batch of all, held out
    before, first, between, second, after = masked_batches("--epochs", 2)
    for held_out in (between, after):
        assert torch.equal(before[0], held_out[0]) and torch.equal(before[1], held_out[1])

    masks, other_masks = sequences_of(first), sequences_of(second)
    assert masks.keys() == other_masks.keys() and not masks.keys() & sequences_of(before).keys()
    equal = sum(torch.equal(masks[ids], other_masks[ids]) for ids in masks)
    assert equal < len(masks) / 2

    # what is held out depends on the seed
    other, *_ = masked_batches("--epochs", 1, "--seed", 1)
    assert sequences_of(other).keys() != sequences_of(before).keys()


def test_whole_words_are_masked_in_training_and_in_the_held_out_text():
    seen = masked_batches("--epochs", 1, "--whole_word", "--seed", 1)
    assert len(seen) == 3
    for ids, chosen in seen:
        assert_whole_words(ids, chosen)


# ---------------------------------------------------------------- text and held-out loss

def test_the_text_is_that_of_the_training_files_alone():
    read = []

    def recorded(path, *args, **kwargs):
        read.append(path.name)
        return read_examples(path, *args, **kwargs)

    with mock.patch.object(pretrain_mlm, "read_examples", recorded):
        assert mlm("--epochs", 1, "--epoch_length", 1)[0] == 0
    assert read == ["ids-sst-train.csv", "quora-train.csv", "sts-train.csv"]


def test_each_text_is_read_once_and_a_twentieth_is_held_out():
    text = workspace() / "numbers.txt"
    text.write_text("".join(f"Line {i} of the text.\n" for i in range(100)) * 2)
    with mock.patch.object(pretrain_mlm, "read_examples", side_effect=AssertionError("no task")):
        status, printed, folder = mlm("--text", text, "--epochs", 1)
        assert status == 0 and "95 sequences to train on, 5 held out" in printed, printed
        with mock.patch.object(pretrain_mlm, "HELD_OUT", 3):
            _, printed, _ = mlm("--text", text, "--epochs", 1)
            assert "97 sequences to train on, 3 held out" in printed, printed
    for line in read_metrics(folder, "evaluation"):
        assert abs(line["perplexity"] / math.exp(line["loss"]) - 1) < 1e-9


def test_sequences_of_unknown_characters_are_left_out():
    text = workspace() / "snow.txt"
    lines = [f"Number {i} of the lines.\n" for i in range(40)]
    text.write_text("A plain sentence here.\n\u2603\n" + "".join(lines))
    status, printed, _ = mlm("--text", text, "--batch_size", 1, "--epochs", 1)
    assert status == 0, printed
    assert "left out 1 sequences that have only unknown characters" in printed, printed
    assert "39 sequences to train on, 2 held out" in printed, printed


def test_the_held_out_loss_is_a_mean_over_tokens():
    seen, seeds, real = [], [], pretrain_mlm.predict_masked
    out = workspace() / "runs" / "mlm-before"

    def recorded(model, *args):
        logits, targets = real(model, *args)
        assert not model.training
        seen.append(F.cross_entropy(logits, targets, reduction="none"))
        seeds.append(args[-1])
        return logits, targets

    def small_batches(examples, indices):
        return evaluation_batches(examples, indices, tokens=60)

    # stopped before the first step, after the first evaluation
    with mock.patch.multiple(pretrain_mlm, predict_masked=recorded,
                             evaluation_batches=small_batches), \
            mock.patch.object(pretrain_mlm.TaskBatches, "indices", side_effect=Killed), \
            contextlib.suppress(Killed):
        mlm(out=out)
    line, = read_metrics(out, "evaluation")
    assert len({len(losses) for losses in seen}) > 1, "else a mean over batches is the same"
    assert len(set(seeds)) == len(seeds) > 2
    assert abs(line["loss"] - torch.cat(seen).mean()) < 1e-5


# ---------------------------------------------------------------- the loop

class Recorder(AdamW):
    """An AdamW that records, in `steps`, the rates of its two groups and the gradient norm."""
    steps = []

    def step(self):
        decaying, plain = self.param_groups
        assert all(p.ndim >= 2 for p in decaying["params"])
        assert all(p.ndim < 2 for p in plain["params"])
        assert decaying["weight_decay"] == 0.1 and plain["weight_decay"] == 0

        parameters = decaying["params"] + plain["params"]
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
        self.steps.append((decaying["lr"], plain["lr"], norm))
        super().step()


@contextlib.contextmanager
def recorded_updates():
    with mock.patch.object(optimizer, "AdamW", Recorder), mock.patch.object(Recorder, "steps", []):
        yield Recorder.steps


def recorded_predictions(seeds, losses, heads):
    """A patch that records, in training: the seeds of dropout and of the masks, the losses of the
    chosen tokens, and the weights of the head."""
    real = pretrain_mlm.predict_masked

    def recorded(model, *args):
        seed = torch.initial_seed()
        logits, targets = real(model, *args)
        if model.training:
            assert all(module.training for module in model.modules()), "with dropout"
            seeds.append((seed, args[-1]))
            losses.append(F.cross_entropy(logits, targets, reduction="none").detach())
            heads.append(model.dense.weight.detach().clone())
        return logits, targets

    return mock.patch.object(pretrain_mlm, "predict_masked", recorded)


TWO_EPOCHS = ["--epochs", 2, "--epoch_length", 5, "--batch_size", 4, "--warmup", 0.5,
              "--weight_decay", 0.1]


def test_the_pretraining_loop_has_the_rate_decay_and_clipping_of_its_flags():
    with recorded_updates() as steps:
        status, printed, _ = mlm(*TWO_EPOCHS, "--clip", 0.01)
    assert status == 0, printed
    rates = [learning_rate(1e-4, n / 11, warmup=0.5) for n in range(1, 11)]
    assert [(a, b) for a, b, _ in steps] == [(rate, rate) for rate in rates]
    assert all(abs(norm - 0.01) < 1e-5 for *_, norm in steps), steps

    with recorded_updates() as steps:
        assert mlm(*TWO_EPOCHS, "--clip", 0)[0] == 0
    assert all(norm > 0.1 for *_, norm in steps), "0: no clipping"


def test_logged_pretraining_losses_are_means_over_tokens_since_the_last_line():
    seeds, losses, heads = [], [], []
    with recorded_predictions(seeds, losses, heads):
        _, _, folder = mlm(*TWO_EPOCHS)
    logged = [line["losses"]["text"] for line in read_metrics(folder, "step")]
    means = [float(torch.cat(part).mean()) for part in (losses[:5], losses[5:])]
    assert len({len(part) for part in losses}) > 1, "else a mean over batches is the same"
    assert len(logged) == 2 and np.abs(np.array(logged) - means).max() < 1e-5


def test_dropout_and_masks_are_drawn_anew_per_step_and_from_the_seed():
    seeds, losses, heads, other_seeds, other_heads = [], [], [], [], []
    with recorded_predictions(seeds, losses, heads):
        assert mlm(*TWO_EPOCHS)[0] == 0
    with recorded_predictions(other_seeds, losses, other_heads):
        assert mlm(*TWO_EPOCHS, "--seed", 1)[0] == 0
    first, second = ({seed for pair in pairs for seed in pair} for pairs in (seeds, other_seeds))
    assert len(first) == len(second) == 20 and not first & second
    assert not torch.equal(heads[0], other_heads[0]), "a new head is drawn from the seed, too"


def test_no_gradient_remains_from_the_step_before():
    real = pretrain_mlm.predict_masked

    def still(model, batch, vocabulary, whole_word, seed):  # the same masks in each step
        torch.manual_seed(0)
        return real(model, batch, vocabulary, whole_word, 0)

    # with a rate of 0 on one batch of everything, each step has the same gradient
    in_order = mock.Mock(side_effect=lambda text, indices: collate(text, np.sort(indices)))
    with recorded_updates() as steps, \
            mock.patch.multiple(pretrain_mlm, predict_masked=still, collate=in_order):
        status, printed, _ = mlm("--lr", 0, "--clip", 1000, "--batch_size", 1000,
                                 "--weight_decay", 0.1, "--epochs", 3)
    assert status == 0, printed
    norms = [norm for *_, norm in steps]
    assert len(norms) == 3 and norms[0] > 0 and len(set(norms)) == 1, norms


def test_a_diverged_pretraining_fails_and_saves_nothing():
    status, printed, folder = mlm("--batch_size", 4, "--epoch_length", 30, "--lr", 1e30,
                                  "--save_every", 0)
    assert status == 1, printed
    assert "is not finite" in printed or "the loss of text is nan" in printed, printed
    assert not (folder / "last.pt").exists() and not (folder / "model.safetensors").exists()


# ---------------------------------------------------------------- the model

def test_only_chosen_positions_are_decoded():
    """Loss and gradients at the chosen positions, against a head written out for all positions."""
    torch.manual_seed(14)
    model = MaskedLM(BertModel(TINY)).double().eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    ids, mask, types = random_batch(TINY, [12, 30, 7])
    chosen = (torch.rand(ids.shape) < 0.2) & (mask == 1)
    logits, targets = model(ids, mask, types, chosen, ids)
    ours = F.cross_entropy(logits, targets)
    assert logits.shape == (int(chosen.sum()), 500)

    # the decoder is the word embedding itself
    hidden = model.bert(ids, mask, types)["last_hidden_state"]  # (B, L, H)
    hidden = F.gelu(hidden @ model.dense.weight.T + model.dense.bias)
    hidden = F.layer_norm(hidden, (16,), model.layer_norm.weight, model.layer_norm.bias, 1e-12)
    full = hidden @ model.bert.word_embedding.weight.T + model.bias  # (B, L, V)
    theirs = F.cross_entropy(full.flatten(0, 1), torch.where(chosen, ids, -100).flatten())
    assert not any("decoder" in name for name in model.state_dict())

    assert abs(ours - theirs) < 1e-6
    parameters = [p for name, p in model.named_parameters() if "pooler" not in name]
    gradients, expected = (torch.autograd.grad(loss, parameters) for loss in (ours, theirs))
    for a, b in zip(gradients, expected):
        assert (a - b).abs().max() < 1e-6


@functools.cache
def pretrained():
    """(what was printed, the folder) of two epochs from the tiny encoder."""
    status, printed, folder = mlm("--epochs", 2, "--lr", 1e-3, "--batch_size", 8)
    assert status == 0, printed
    return printed, folder


def test_pretraining_lowers_the_held_out_loss_and_repeats_bit_for_bit():
    printed, folder = pretrained()
    assert "no masked-LM head" in printed, printed
    losses = [line["loss"] for line in read_metrics(folder, "evaluation")]
    assert len(losses) == 3 and losses[2] < losses[0] and (folder / "curve.png").exists()

    _, _, again = mlm("--epochs", 2, "--lr", 1e-3, "--batch_size", 8)
    assert same(*(load_file(path / "model.safetensors") for path in (folder, again)))


def test_pretraining_starts_from_a_folder_with_its_own_head():
    _, folder = pretrained()
    losses = [line["loss"] for line in read_metrics(folder, "evaluation")]
    status, printed, second = mlm("--model", folder, "--epochs", 1)
    assert status == 0 and "no masked-LM head" not in printed and "unused" not in printed, printed
    assert abs(read_metrics(second, "evaluation")[0]["loss"] - min(losses)) < 1e-5

    status, printed, _ = run("--model", folder)  # of multitask_classifier.py
    assert status == 0 and "left unused: cls.predictions" in printed, printed


def test_bad_input_to_pretraining_is_one_line_and_status_2():
    _, folder = pretrained()
    broken = shutil.copytree(folder, folder.with_name("mlm-broken"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["cls.predictions.bias"]
    save_file(tensors, broken / "model.safetensors")
    for flags, part in (
            (["--model", broken], "cls.predictions.bias of its masked-LM head is missing"),
            (["--out", folder], "a run of this name exists"),
            (["--fill", "a [MASK]"], "has no masked-LM head, so its guesses would be random"),
            (["--model", folder, "--fill", "nothing hidden"], "no [MASK] in it"),
            (["--text", folder / "missing.txt"], "missing.txt: cannot be read"),
            (["--tasks", "yelp"], "unknown task")):
        status, printed, _ = mlm(*flags)
        assert status == 2 and part in printed and "Traceback" not in printed, printed


def test_a_pretrained_folder_gives_the_logits_of_transformers():
    try:
        from transformers import BertForMaskedLM
    except ImportError:
        raise SkipTest("transformers is not installed") from None
    _, folder = pretrained()
    with contextlib.redirect_stdout(io.StringIO()):
        model = MaskedLM.from_pretrained(folder).eval()
    peer = BertForMaskedLM.from_pretrained(folder).eval()
    ids, mask, types = random_batch(TINY, [12, 30, 7])
    chosen = torch.tensor([[1] + [0] * 29] * 3).bool()
    logits, _ = model(ids, mask, types, chosen)
    order = torch.tensor([2, 0, 1])  # packed: by length
    assert (logits - peer(ids, mask, types).logits[:, 0][order]).abs().max() < 1e-5


def test_a_masked_lm_head_of_2018_is_used_and_not_reported_as_unused():
    _, folder = pretrained()
    old = shutil.copytree(folder, folder.with_name(folder.name + "-2018"))
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): x
               for name, x in tensors.items()}
    assert "cls.predictions.transform.LayerNorm.gamma" in renamed
    embeddings = tensors["bert.embeddings.word_embeddings.weight"]
    renamed["cls.predictions.decoder.weight"] = embeddings.clone()
    save_file({**renamed, "cls.seq_relationship.bias": torch.zeros(2)}, old / "model.safetensors")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        models = [MaskedLM.from_pretrained(path).state_dict() for path in (folder, old)]
    assert same(*models)
    line, = printed.getvalue().splitlines()
    assert line.endswith("left unused: cls.seq_relationship.bias"), line

    name = "cls.predictions.transform.dense.weight"
    save_file({**tensors, name: tensors[name].to(torch.int8)}, old / "model.safetensors")
    raises(InputError, f"{name} holds torch.int8", MaskedLM.from_pretrained, old)


# ---------------------------------------------------------------- --fill

def test_gaps_are_filled_with_the_most_probable_tokens():
    tokenizer, sentence = load_tokenizer(workspace() / "tiny"), "a [MASK] that [MASK]."
    torch.manual_seed(22)
    model = MaskedLM(BertModel(TINY)).train()
    film, the = (tokenizer.token_to_id(word) for word in ("film", "the"))
    model.bias.data[[film, the]] = torch.tensor([30.0, 29.0])
    filled = pretrain_mlm.fill(model, tokenizer, sentence)
    assert len(filled) == 2
    for best in filled:
        (first, p), (second, q) = best[:2]
        assert (first, second) == ("film", "the") and len(best) == 5
        assert abs(p + q - 1) < 1e-5 and 1.5 < p / q < 5  # e, but for the hidden states
    assert filled == pretrain_mlm.fill(model.train(), tokenizer, sentence), "no dropout"


def test_fill_truncates_a_long_sentence_as_training_does():
    model = ["--model", pretrained()[1]]
    short = "a " * 40 + "[MASK] film"
    status, printed, _ = mlm(*model, "--fill", short, short + " of" * 40)
    assert status == 0 and printed.count("truncated 1 of 1 rows to 64 tokens") == 1, printed

    # beyond the 62 tokens that are read, the sentence has no effect
    tokenizer = load_tokenizer(workspace() / "tiny")
    with contextlib.redirect_stdout(io.StringIO()):
        loaded = MaskedLM.from_pretrained(workspace() / "tiny")
        long, longer = (pretrain_mlm.fill(loaded, tokenizer, short + " a" * n) for n in (20, 80))
    assert long == longer and len(long) == 1 and len(long[0]) == 5

    status, printed, _ = mlm(*model, "--fill", "a " * 61 + "[MASK] a")  # the last one before [SEP]
    assert status == 0 and "truncated 1 of 1 rows" in printed, printed
    for sentence in ("a " * 62 + "[MASK]", "[MASK] " + "a " * 70 + "[MASK]"):
        status, printed, _ = mlm(*model, "--fill", sentence)
        assert status == 2 and "Traceback" not in printed, printed
        assert "truncated 1 of 1 rows" not in printed, printed
        assert ("a [MASK] is truncated away, since the encoder reads 64 tokens"
                in printed), printed


# ---------------------------------------------------------------- killed and resumed runs

RESUMABLE = ["--epochs", 2, "--batch_size", 4, "--epoch_length", 6, "--save_every", 0]


def test_pretraining_resumes_where_it_was_killed():
    _, _, whole = mlm(*RESUMABLE)
    killed = whole.with_name(whole.name + "-killed")
    stopped_after(4, mlm_into(killed), *RESUMABLE)  # in the first epoch, then in the second
    stopped_after(5, quietly, pretrain_mlm.main, "--resume", killed)
    status, printed = quietly(pretrain_mlm.main, "--resume", killed)
    assert status == 0, printed
    assert same(*(load_file(folder / "model.safetensors") for folder in (killed, whole)))

    # step lines may end elsewhere, where a save wrote one before it was due
    evaluations, expected = (read_metrics(folder, "evaluation") for folder in (killed, whole))
    assert evaluations == expected and len(evaluations) == 3
    last, other = (torch.load(folder / "last.pt", weights_only=True) for folder in (killed, whole))
    assert same(last["model"], other["model"]) and last["done"] == other["done"] == 12

    status, printed = quietly(pretrain_mlm.main, "--resume", killed, "--lr", 1)
    assert status == 2 and "--lr is 0.0001 in the run" in printed, printed


def mlm_into(folder):
    return functools.partial(mlm, out=folder)


def test_a_last_pt_of_something_else_is_rejected():
    status, printed, folder = mlm("--epochs", 1, "--epoch_length", 2)
    assert status == 0, printed
    state = torch.load(folder / "last.pt", weights_only=True)
    for missing in ("done", "best", "model", "optimizer"):
        torch.save({name: x for name, x in state.items() if name != missing}, folder / "last.pt")
        status, printed = quietly(pretrain_mlm.main, "--resume", folder)
        assert status == 2 and "Traceback" not in printed, printed
        assert "last.pt is not what this script saves" in printed.splitlines()[-1], printed


def test_a_resumed_pretraining_keeps_the_best_epoch():
    folder = workspace() / "runs" / "mlm-best"
    with evaluations_are(5.0, 3.0, 4.0):
        stopped_after(9, mlm_into(folder), *RESUMABLE)  # after the first epoch, the best
        best = (folder / "model.safetensors").read_bytes()
        status, printed = quietly(pretrain_mlm.main, "--resume", folder)
    assert status == 0 and "saved" not in printed, printed
    assert torch.load(folder / "last.pt", weights_only=True)["best"] == 3.0
    assert (folder / "model.safetensors").read_bytes() == best


def test_the_best_epoch_is_saved_where_no_epoch_beats_the_start():
    flags = "--epochs", 3, "--batch_size", 8, "--epoch_length", 4
    for before, worse in ((5.0, True), (6.0, False)):
        # killed in the third epoch; the second is the best
        out = workspace() / "runs" / f"mlm-worse-{before}"
        with evaluations_are(before, 7.0, 6.0, 8.0):
            stopped_after(10, mlm_into(out), *flags)
            best = torch.load(out / "last.pt", weights_only=True)["model"]
            status, printed = quietly(pretrain_mlm.main, "--resume", out)
        line = ("made the model worse: held-out loss 6.000 after the best epoch, which is saved, "
                f"and {before:.3f} before")
        assert status == 0 and (line in printed) == worse, printed
        assert "encoder and masked-LM head" in printed, printed
        assert same(MaskedLM.from_pretrained(out).state_dict(), best), "the best of the epochs"

        # a finished run reports the same
        status, printed = quietly(pretrain_mlm.main, "--resume", out)
        assert status == 0 and (line in printed) == worse, printed


def test_pretraining_that_makes_the_model_worse_leaves_a_usable_folder():
    status, printed, out = mlm("--epochs", 1, "--batch_size", 8, "--lr", 2)
    assert status == 0 and "pretraining made the model worse" in printed, printed
    assert mlm("--model", out, "--epochs", 1, "--epoch_length", 1)[0] == 0


def test_a_held_out_loss_that_is_not_finite_ends_the_run():
    # it would never be beaten
    with evaluations_are(5.0, math.nan):
        status, printed, out = mlm("--epochs", 3, "--batch_size", 8, "--epoch_length", 4)
    last = printed.splitlines()[-1]
    assert status == 1 and "the held-out loss is nan after step 4" in last, printed
    assert not (out / "model.safetensors").exists()


# ---------------------------------------------------------------- learning

def test_sixty_four_sentences_are_memorized():
    """A small model from random weights, with new masks in each step."""
    needs_full()
    tokenizer = load_tokenizer(workspace() / "tiny")
    with contextlib.redirect_stdout(io.StringIO()):
        examples = read_examples(DEMO / "ids-sst-train.csv", TASKS["sst"])
        examples = tokenize(examples, tokenizer, 24, cross=True)
    torch.manual_seed(15)
    config = BertConfig(vocab_size=500, hidden_size=128, num_hidden_layers=2,
                        num_attention_heads=4, intermediate_size=256, max_position_embeddings=64,
                        hidden_dropout_prob=0.0)
    model = MaskedLM(BertModel(config)).train()
    schedule = ScheduledAdamW(model.parameters(), 600, 3e-3, 0.1, clip=0)
    generator, batch, losses = np.random.default_rng(0), collate(examples, np.arange(64)), []
    while len(losses) < 600:
        ids, chosen = mask_tokens(batch.input_ids, tiny_vocabulary(), False, generator)
        logits, targets = model(ids, batch.attention_mask, batch.token_type_ids, chosen,
                                batch.input_ids)
        loss = F.cross_entropy(logits, targets)
        model.zero_grad()
        loss.backward()
        schedule.step()
        losses.append(float(loss.detach()))
        if len(losses) > 20 and np.mean(losses[-20:]) < 0.1:
            return
    raise AssertionError(f"the loss is {np.mean(losses[-20:]):.3f} after 600 steps")
