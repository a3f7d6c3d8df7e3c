"""smart.py: divergences, the adversarial perturbation, the teacher, and both terms in training."""
import contextlib
import io
import itertools
import runpy
from unittest import mock

import numpy as np
import torch
from torch import nn

import multitask_classifier
import smart
from data.batches import collate
from data.tasks import find_data_files
from optimizer import AdamW
from support import flags
from support.run import StepLog, read_metrics
from tests.helpers import (KINDS, PROJECT, raises, run, same, three_task_model, trained,
                           without_curves, workspace)

ENCODINGS = ({"para": "cross", "sts": "cross"}, {"para": "uv_diff", "sts": "cosine"})
STRONG = ("--smart", "--smart_weight", 50, "--smart_eps", 1, "--smart_step_size", 1)


# ---------------------------------------------------------------- helpers

def logits_of(model, task, batch, perturbation=None):
    """With the dropout masks of seed 5. (B, C)"""
    torch.manual_seed(5)
    return model.logits(task, batch, perturbation)


def smart_setting(pair_head, size=6):
    """(model in train mode with dropout in encoder and heads, {task: batch of `size` examples},
    {task: logits with the dropout masks of seed 5})."""
    model, examples = three_task_model(pair_head=pair_head)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
    # heads start small; larger ones make the outputs depend on the sentence
    for head in model.heads.values():
        for parameter in head.parameters():
            parameter.data.mul_(10)

    batches = {task: collate(examples[task], np.arange(size)) for task in KINDS}
    return model, batches, {task: logits_of(model, task, batches[task]) for task in KINDS}


def encodings():
    """Of pairs as one sequence and as two: (model, task, batch, logits) for each task."""
    for pair_head in ENCODINGS:
        model, batches, logits = smart_setting(pair_head)
        for task, batch in batches.items():
            yield model, task, batch, logits[task]


def symmetrized_divergence(kind, logits, other):
    """As the paper has it, by torch's distributions. (B, C), (B, C) -> (B,)"""
    if kind == "regression":
        return (logits - other).squeeze(-1) ** 2
    if kind == "binary":
        p, q = (torch.distributions.Bernoulli(logits=x.squeeze(-1)) for x in (logits, other))
    else:
        p, q = (torch.distributions.Categorical(logits=x) for x in (logits, other))
    kl = torch.distributions.kl_divergence
    return kl(p, q) + kl(q, p)


# ---------------------------------------------------------------- the divergence

def test_divergences_are_the_papers():
    a, b = 3 * torch.randn(2, 40, 5, dtype=torch.float64)
    for kind in KINDS.values():
        columns = slice(None) if kind == "classification" else slice(1)  # one output otherwise
        expected = symmetrized_divergence(kind, a[:, columns], b[:, columns])
        found = smart.divergence(kind, a[:, columns], b[:, columns])
        assert found.shape == (40,) and (found - expected).abs().max() < 1e-12, kind
    assert kind == "regression" and torch.equal(found, expected)  # no logarithm to round


def test_divergences_of_different_shapes_are_rejected():
    for kind in KINDS.values():
        for shapes in (((4, 1), (4,)), ((4,), (4,)), ((4, 5), (4, 1))):
            logits, other = map(torch.zeros, shapes)
            raises(ValueError, "should be (B, C)", smart.divergence, kind, logits, other)


def test_float32_resolves_a_perturbation_of_the_papers_size():
    a = torch.tensor([[2.0, -1.0, 0.5, 0.0, 1.0]])
    b = a + 1e-5 * torch.tensor([[1.0, -1, 1, -1, 0]])
    exact = smart.divergence("classification", a.double(), b.double())
    assert abs(smart.divergence("classification", a, b) / exact - 1) < 0.05 and exact < 1e-9


# ---------------------------------------------------------------- the adversarial perturbation

def test_both_terms_compare_passes_with_the_same_dropout():
    for model, task, batch, logits in encodings():
        # where nothing has moved, a term is zero with the same masks, and not with others
        for term in (smart.Smoothness(KINDS, eps=0.0), smart.Proximal(model, KINDS)):
            assert term(model, task, batch, logits, seed=5) == 0
            assert term(model, task, batch, logits, seed=6) > 1e-4

        # the passes of the ascent too
        seeds, forward = [], model.logits

        def recorded(*args):
            seeds.append(torch.initial_seed())
            return forward(*args)

        with mock.patch.object(model, "logits", recorded):
            smart.Smoothness(KINDS, steps=2)(model, task, batch, logits, seed=5)
        assert seeds == [5, 5, 5]


def test_the_perturbation_stays_in_its_ball():
    for norm, eps in itertools.product(("inf", "2"), (1e-5, 0.1)):
        smoothness = smart.Smoothness(KINDS, eps=eps, sigma=eps, step_size=100 * eps, steps=2,
                                      norm=norm)
        for model, task, batch, logits in encodings():
            found = smoothness.adversarial_perturbation(model, task, batch, logits, seed=5)
            assert found.shape == (*batch.attention_mask.shape, 16) and not found.requires_grad

            # real tokens move, padding does not
            padding = batch.attention_mask == 0
            assert padding.any() and (found[padding] == 0).all()
            assert (found[~padding] != 0).float().mean() > 0.9

            # both sentences of a pair are in one ball; the steps are long, so they reach its edge
            sizes = found.abs()
            if norm == "2":
                sides = found.unflatten(0, (-1, len(batch.labels)))
                sizes = sides.square().sum(dim=(0, 2, 3)).sqrt()
            assert eps * 0.999 < sizes.max() <= eps * (1 + 1e-6)


def algorithm_1(model, task, batch, clean, noise, own, norm):
    """x~ - x of one example, written out. own: its sequences, one or two, in the batch; noise:
    theirs. eps = .02, two steps of .01."""
    delta = noise
    for _ in range(2):
        delta = delta.detach().requires_grad_()
        whole = torch.zeros(*batch.attention_mask.shape, 16, dtype=torch.float64)
        moved = logits_of(model, task, batch, whole.index_copy(0, own, delta))
        example = int(own[0])  # the first sequences are one per example
        moved = smart.divergence(KINDS[task], moved, clean)[example]
        gradient, = torch.autograd.grad(moved, delta)

        delta = delta + 1e-2 * gradient / torch.linalg.vector_norm(gradient.flatten(), norm)
        if norm == float("inf"):
            delta = delta.clamp(-2e-2, 2e-2)
        else:
            delta = delta * min(1.0, 2e-2 / float(delta.detach().norm()))
    return delta.detach()


def test_the_perturbation_is_algorithm_1():
    """Against the algorithm written out for one example at a time; a pair that is encoded
    separately is one example."""
    for pair_head, norm in itertools.product(ENCODINGS, ("inf", "2")):
        model, batches, _ = smart_setting(pair_head, size=3)
        model.double()
        smoothness = smart.Smoothness(KINDS, eps=2e-2, sigma=1e-2, step_size=1e-2, steps=2,
                                      norm=norm)
        for task, batch in batches.items():
            clean = logits_of(model, task, batch).detach()
            torch.manual_seed(12)
            found = smoothness.adversarial_perturbation(model, task, batch, clean, seed=5)

            torch.manual_seed(12)
            mask = batch.attention_mask[..., None]
            noise = (1e-2 * torch.randn(*batch.attention_mask.shape, 16) * mask).double()
            for example in range(3):
                own = torch.arange(example, len(noise), 3)
                expected = algorithm_1(model, task, batch, clean, noise[own], own, float(norm))
                assert (found[own] - expected).abs().max() < 1e-8, (pair_head, norm, task)


def test_the_ascent_beats_noise_of_its_size():
    smoothness = smart.Smoothness(KINDS, eps=1e-2, sigma=1e-2, step_size=1.0)
    ratios = {}  # of R under the ascent to R under random signs, for each kind of pair head
    for model, task, batch, logits in encodings():
        found = ratios.setdefault(str(model.pair_head), [])
        for i in range(10):
            torch.manual_seed(i)
            ascent = smoothness.adversarial_perturbation(model, task, batch, logits, seed=5)
            noise = 1e-2 * torch.randn_like(ascent).sign() * batch.attention_mask[..., None]
            R, R_noise = (
                smoothness.divergences(model, task, batch, logits, 5, perturbation).mean().item()
                for perturbation in (ascent, noise))
            found.append(R / R_noise)
    assert len(ratios) == 2
    for found in ratios.values():
        assert min(found) > 1 and np.median(found) > 2, found


def test_smoothness_reaches_the_encoder_and_the_ascent_does_not():
    smoothness = smart.Smoothness(KINDS, eps=0.1, step_size=1.0)
    for model, task, batch, logits in encodings():
        model.zero_grad()
        smoothness.adversarial_perturbation(model, task, batch, logits, seed=5)
        assert all(parameter.grad is None for parameter in model.parameters())

        clean = logits_of(model, task, batch)
        smoothness(model, task, batch, clean, seed=5).backward()
        for name in ("word_embedding.weight", "bert_layers.0.self_attention.query.weight",
                     "bert_layers.1.out_dense.bias"):
            assert model.bert.get_parameter(name).grad.abs().sum() > 0, name
        in_head = sum(p.grad.abs().sum() for p in model.heads[task].parameters())
        assert in_head > 0 or model.pair_head.get(task) == "cosine"  # which has no parameters here


def test_smoothness_does_not_depend_on_the_batch():
    """With the same noise for each example: a batch twice, or in another order, has the same R."""
    smoothness = smart.Smoothness(KINDS, eps=1e-2, sigma=1e-2, step_size=1e-2)

    def noise_of(batch):
        """(S, L, H), a function of the example and of which sentence of it."""
        S, L = batch.attention_mask.shape
        B, noise = len(batch.indices), torch.zeros(S, L, 16)
        for s in range(S):
            seed = 100 * int(batch.indices[s % B]) + s // B
            generator = torch.Generator().manual_seed(seed)
            noise[s] = torch.randn(64, 16, generator=generator)[:L]
        return noise

    def R(model, task, examples, indices):
        batch = collate(examples[task], np.array(indices))
        noise = noise_of(batch)
        with mock.patch.object(torch, "randn", lambda *shape, **kwargs: noise):
            clean = model.logits(task, batch)
            return smoothness(model, task, batch, clean, seed=5).item()

    for pair_head in ENCODINGS:
        model, _, _ = smart_setting(pair_head)
        model.double().eval()
        _, examples = three_task_model(pair_head=pair_head)
        for task in KINDS:
            expected = R(model, task, examples, [0, 1, 2, 3])
            assert expected > 0
            for indices in ([0, 1, 2, 3] * 2, [2, 0, 3, 1]):
                assert abs(R(model, task, examples, indices) / expected - 1) < 1e-9, (task, indices)


# ---------------------------------------------------------------- the term and its gradient

def test_smoothness_gradient_is_that_of_its_formula():
    """Central differences in float64, along random directions, of the paper's formula, with the
    perturbation held."""
    for pair_head in ENCODINGS:
        model, batches, _ = smart_setting(pair_head)
        model.double()
        smoothness = smart.Smoothness(KINDS, weight=3.0, eps=0.3, step_size=1.0)
        for task, batch in batches.items():
            clean = logits_of(model, task, batch)
            held = smoothness.adversarial_perturbation(model, task, batch, clean, seed=5)
            with mock.patch.object(smoothness, "adversarial_perturbation", lambda *args: held):
                value = smoothness(model, task, batch, clean, seed=5)

            # not the pooler's and the other heads', which this task does not reach
            parameters = [*model.shared_parameters(), *model.own_parameters(task)]
            gradient = torch.autograd.grad(value, parameters)

            torch.manual_seed(13)
            direction = [torch.randn_like(parameter) for parameter in parameters]
            slope = sum((g * v).sum().item() for g, v in zip(gradient, direction))

            @torch.no_grad()
            def at(shift):
                """The formula at parameters moved by `shift` along the direction."""
                for parameter, v in zip(parameters, direction):
                    parameter.add_(v, alpha=shift)
                moved = logits_of(model, task, batch, held)
                each = symmetrized_divergence(KINDS[task], moved, logits_of(model, task, batch))
                for parameter, v in zip(parameters, direction):
                    parameter.sub_(v, alpha=shift)
                return 3.0 * each.mean().item()

            assert abs(at(0.0) - value) < 1e-10 * value and abs(slope) > 1e-4 * value
            measured = (at(1e-6) - at(-1e-6)) / 2e-6
            assert abs(measured - slope) < 1e-5 * abs(slope) + 1e-6, (task, slope)


def test_smoothness_goes_down_when_it_is_minimized():
    """Thirty steps on R alone of one batch: what is added to the loss is what its gradient
    lowers."""
    for pair_head in ENCODINGS:
        model, batches, _ = smart_setting(pair_head)
        smoothness = smart.Smoothness(KINDS, weight=1.0, eps=0.1, step_size=1.0)
        optimizer, values = AdamW(model.parameters(), lr=1e-2), []
        for _ in range(30):
            optimizer.zero_grad()
            terms = []
            for task, batch in batches.items():
                clean = logits_of(model, task, batch)
                terms.append(smoothness(model, task, batch, clean, seed=5))
                terms[-1].backward()
            values.append(sum(term.item() for term in terms))
            optimizer.step()
        assert values[-1] < 0.1 * values[0], values


# ---------------------------------------------------------------- the teacher

def test_the_teacher_is_a_running_average():
    """With a constant beta, and with the paper's schedule: .99 in the first tenth, then .999."""
    for beta, betas in ((0.95, [0.95] * 20), (None, [0.99] * 2 + [0.999] * 18)):
        model, _, _ = smart_setting(ENCODINGS[0])
        proximal = smart.Proximal(model, KINDS, beta=beta)
        for average, parameter in zip(proximal.teacher.parameters(), model.parameters()):
            assert average.data_ptr() != parameter.data_ptr() and torch.equal(average, parameter)
            assert not average.requires_grad

        expected = [parameter.detach().double() for parameter in model.parameters()]
        for n, b in enumerate(betas, start=1):
            for parameter in model.parameters():
                parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
            proximal.update(model, n / 20)
            expected = [b * average + (1 - b) * parameter.detach().double()
                        for average, parameter in zip(expected, model.parameters())]
        for average, exact in zip(proximal.teacher.parameters(), expected):
            assert (average - exact).abs().max() < 1e-5


def test_the_proximal_term_is_the_divergence_from_the_teacher():
    model, batches, _ = smart_setting(ENCODINGS[0])
    proximal = smart.Proximal(model, KINDS, mu=2.0)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    for task, batch in batches.items():
        logits = logits_of(model, task, batch)
        target = logits_of(proximal.teacher, task, batch)
        value = proximal(model, task, batch, logits, seed=5)
        expected = 2 * smart.divergence(KINDS[task], logits, target).mean()
        assert value > 0 and torch.equal(value, expected)
        value.backward()

    assert model.bert.word_embedding.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in proximal.teacher.parameters())


# ---------------------------------------------------------------- in training

@without_curves
def test_regularizers_of_weight_zero_change_no_bit_and_others_do():
    """With every kind of schedule, pair head, surgery and pooling."""
    strong_proximal = "--proximal", "--proximal_mu", 50
    weightless = (*STRONG, "--smart_weight", 0, "--proximal", "--proximal_mu", 0)
    for base in ([],
                 ["--pair_head", "para=uv_diff,sts=cosine", "--schedule", "mixed", "--pcgrad"],
                 ["--pair_head", "cross", "--schedule", "sequential"],
                 ["--accumulate", 2, "--gradvac", "--pooling", "cls"]):
        plain = trained(*base, steps=3)
        assert same(plain, trained(*base, *weightless, steps=3)), base

        found = [plain, trained(*base, *STRONG, steps=3), trained(*base, *strong_proximal, steps=3),
                 trained(*base, *STRONG, *strong_proximal, "--proximal_beta", .5, steps=3)]
        assert not any(same(a, b) for a, b in itertools.combinations(found, 2)), base


@without_curves
def test_every_setting_of_a_regularizer_has_an_effect():
    strong = trained(*STRONG, steps=3)
    for setting in (["weight", 5], ["eps", .5], ["step_size", .5], ["sigma", .5], ["steps", 2],
                    ["norm", 2], ["tasks", "sst,sts"]):
        name, value = setting
        assert not same(strong, trained(*STRONG, f"--smart_{name}", value, steps=3)), setting

    proximal = "--proximal", "--proximal_mu", 9
    kept = trained(*proximal, steps=3)
    for setting in (["--proximal_mu", 1], ["--proximal_beta", .5]):
        assert not same(kept, trained(*proximal, *setting, steps=3)), setting


@without_curves
def test_the_heads_of_a_frozen_encoder_are_regularized():
    regularized = trained(*STRONG, "--proximal", option="pretrain", steps=3)
    assert not same(regularized, trained(option="pretrain", steps=3))


def regularizers_logged(folder):
    return [line["regularizers"] for line in read_metrics(folder, "step")]


@without_curves
def test_regularizers_are_logged_and_the_teacher_is_saved():
    settings = "--proximal_mu", .8, "--proximal_beta", .95
    status, printed, folder = run(*STRONG, "--proximal", *settings, steps=12)
    lines = regularizers_logged(folder)
    assert status == 0 and len(lines) == 2, printed
    for means in lines:
        assert means.keys() == {f"{task} {name}" for task in KINDS
                                for name in ("smart", "proximal")}
        assert all(value > 0 for value in means.values()), means

    last, name = torch.load(folder / "last.pt", weights_only=True), "bert.pos_embedding.weight"
    assert not torch.equal(last["teacher"][name], last["model"][name])


@without_curves
def test_regularizers_are_zero_where_nothing_moves():
    """At radius 0 the smoothness term is zero in training, dropout and all; the proximal term where
    the weights stay as they are, or where the teacher follows them after each step."""
    for settings, lines in ((["--lr", 0, "--epoch_length", 2], 1),
                            (["--proximal_beta", 0, "--epoch_length", 12], 2)):
        status, printed, folder = run("--smart", "--smart_eps", 0, "--proximal", *settings)
        logged = regularizers_logged(folder)
        assert status == 0 and len(logged) == lines, printed
        for means in logged:
            assert len(means) == 6 and set(means.values()) == {0.0}, settings


@without_curves
def test_the_teacher_moves_after_each_optimizer_step():
    seen = []

    class Recorder(smart.Proximal):
        def update(self, model, progress):
            seen.append(progress)
            super().update(model, progress)

    # two epochs of three updates; and six steps of one task, each with its task's optimizer
    for settings in (["--accumulate", 3, "--epochs", 2, "--epoch_length", 7],
                     ["--optimizer_per_task", "--schedule", "mtdnn", "--epoch_length", 6]):
        seen.clear()
        with mock.patch.object(multitask_classifier, "Proximal", Recorder):
            status, printed, _ = run("--proximal", *settings)
        assert status == 0, printed
        assert seen == [n / 6 for n in range(1, 7)], settings


def built(*flags_of_run):
    """(args, model in train mode, data) of a run with these flags, before its first step."""
    root = workspace()
    argv = ["--option", "finetune", "--model", root / "tiny", "--data_dir", root / "data"]
    args = flags.parse_flags(multitask_classifier.get_parser, flags.check_training_flags,
                             [*map(str, argv), *flags_of_run], "--name")
    with contextlib.redirect_stdout(io.StringIO()):
        model, data = multitask_classifier.build(args, find_data_files(args), root / "tiny")
    return args, model.train(), data


def test_regularizers_are_as_the_flags_ask():
    """Every setting reaches its place; without settings they are those of the paper."""
    args, model, _ = built("--smart", "--proximal")
    made = multitask_classifier.make_regularizers(args, model)
    assert made.keys() == {"smart", "proximal"}
    assert vars(made["smart"]) == vars(smart.Smoothness(
        KINDS, weight=5.0, eps=1e-5, sigma=1e-5, step_size=1e-3, steps=1, norm="inf"))
    proximal = made["proximal"]
    assert (proximal.kinds, proximal.mu, proximal.beta) == (KINDS, 1.0, None)

    args, model, _ = built(*"--smart --smart_weight 2 --smart_eps .3 --smart_sigma .4 --smart_steps"
                           " 6 --smart_step_size .5 --smart_norm 2 --smart_tasks sst,sts"
                           " --proximal --proximal_mu 7 --proximal_beta .8".split())
    made = multitask_classifier.make_regularizers(args, model)
    assert vars(made["smart"]) == vars(smart.Smoothness(
        {task: KINDS[task] for task in ("sst", "sts")}, weight=2.0, eps=0.3, sigma=0.4,
        step_size=0.5, steps=6, norm="2"))
    proximal = made["proximal"]
    assert (proximal.kinds, proximal.mu, proximal.beta) == (KINDS, 7.0, 0.8)


def test_regularizers_are_added_to_the_loss():
    """Each for its tasks, with the seed and logits of the pass; then the sum is weighted by the
    shard's share of the batch."""
    args, model, data = built("--smart", "--smart_tasks", "sst,sts", "--proximal")
    regularizers = multitask_classifier.make_regularizers(args, model)

    # terms of known values instead, which keep what they were called with
    calls = []

    def constant(name, value):
        def term(*given):
            calls.append((name, *given))
            return torch.tensor(value)
        term.kinds = regularizers[name].kinds
        return term

    terms = {"smart": constant("smart", 3.0), "proximal": constant("proximal", 5.0)}
    log_file = mock.Mock()
    log = StepLog(log_file, args.trained, terms, model.device)
    for task, names, added in (("sst", ["smart", "proximal"], 8), ("para", ["proximal"], 5),
                               ("sts", ["smart", "proximal"], 8)):
        batch = collate(data[task]["train"], np.arange(6))
        batch.share = 0.25
        torch.manual_seed(23)
        logits = model.logits(task, batch)
        alone = model.loss(task, batch, logits)

        calls.clear()
        loss = multitask_classifier.regularized_loss(model, task, batch, terms, log, 23)
        assert abs(loss - 0.25 * (alone + added)) < 1e-5, task
        assert [name for name, *_ in calls] == names
        for _, of_model, of_task, of_batch, of_logits, seed in calls:
            assert (of_model, of_task, seed) == (model, task, 23) and of_batch is batch
            assert torch.equal(of_logits, logits)

    log.end_step()
    log.write(1, 1)
    means = log_file.log.call_args.kwargs["regularizers"]
    assert means == {"sst smart": 3, "sts smart": 3, "sst proximal": 5, "para proximal": 5,
                     "sts proximal": 5}


# ---------------------------------------------------------------- the demonstration

def test_the_demonstration_shows_the_ball_and_what_the_ascent_finds():
    """Each line of its table: radius, largest number of the perturbation, the same on the padding,
    R under the ascent and under random signs."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        runpy.run_path(str(PROJECT / "smart.py"), run_name="__main__")
    table = [list(map(float, line.split())) for line in printed.getvalue().splitlines()[1:]]
    assert table[0] == [0, 0, 0, 0, 0] and len(table) == 5
    for eps, largest, on_padding, R, R_noise in table[1:]:
        assert 0 < largest <= eps * (1 + 1e-6) and on_padding == 0
        assert R > 3 * R_noise > 0
    assert [row[3] for row in table] == sorted(row[3] for row in table)
