"""pcgrad.py: gradient surgery on vectors, on the Gram matrix, and through the buffer."""
import itertools
import random
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import pcgrad
from data.batches import collate
from support.devices import sparse_embedding
from tests.helpers import heads_of, three_task_model


# ---------------------------------------------------------------- references and helpers

def double_loop(gradients, seed, change):
    """Both papers' algorithm on vectors: the sum over i of g_i after change(i, j, g_i', g_j) for
    every other j, in an order that is drawn for each i."""
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
    """Yu et al. 2020, algorithm 1."""
    def change(i, j, g, other):
        if g @ other >= 0:
            return g
        return g - (g @ other) / (other @ other) * other

    return double_loop(gradients, seed, change)


def vaccine_reference(gradients, targets, seed, beta=0.01):
    """Wang et al. 2021, section 3. Moves `targets` in place."""
    def change(i, j, g, other):
        phi, target = F.cosine_similarity(g, other, dim=0), targets[i, j].clone()
        targets[i, j] = (1 - beta) * target + beta * phi
        if phi >= target:
            return g
        sine = (1 - target ** 2).sqrt()
        factor = g.norm() * (target * (1 - phi ** 2).sqrt() - phi * sine)
        return g + factor / (other.norm() * sine) * other

    return double_loop(gradients, seed, change)


def of_all_sizes(K, P, generator):
    """Random gradients whose norms differ by orders of magnitude. (K, P)"""
    return torch.randn(K, P, generator=generator) * 10 ** torch.randn(K, 1, generator=generator)


def buffer_of(shared, tasks, *args, **kwargs):
    """A GradientBuffer of tasks without heads."""
    return pcgrad.GradientBuffer(shared, dict.fromkeys(tasks, ()), *args, **kwargs)


def linear_loss(shared, gradient):
    """A loss g . theta, whose gradient is g."""
    pieces = gradient.split([parameter.numel() for parameter in shared])
    return sum((parameter * piece).sum() for parameter, piece in zip(shared, pieces))


def buffered_update(gradients, surgery="pcgrad", seed=0, scope="vector", targets=None):
    """The update that a GradientBuffer makes of the rows of `gradients`, over two parameters of 3
    and the remaining numbers. Moves `targets`, where given."""
    shared = [nn.Parameter(torch.randn(size)) for size in (3, len(gradients[0]) - 3)]
    tasks = [f"task{i}" for i in range(len(gradients))]
    buffer = buffer_of(shared, tasks, surgery, scope=scope)
    if targets is not None:
        buffer.targets = targets

    buffer.begin(tasks)
    for task, gradient in zip(tasks, gradients):
        buffer.backward(task, linear_loss(shared, gradient))
    J = buffer.J.double()
    buffer.combine(seed)

    # what the diagnostics are made of: products of the rows before they were combined
    gram = J @ J.T
    assert not surgery or (buffer.gram - gram).abs().max() <= 1e-5 * gram.abs().max()
    return torch.cat([parameter.grad for parameter in shared])


# ---------------------------------------------------------------- PCGrad

def test_pcgrad_agrees_with_a_double_loop():
    """The loop over vectors, and the Gram matrix through the buffer."""
    generator = torch.Generator().manual_seed(6)
    for K, case in itertools.product(range(2, 7), range(100)):
        gradients = of_all_sizes(K, 12, generator)
        exact = gradients.double()
        expected = pcgrad_reference(exact, seed=case)
        assert (pcgrad.pcgrad(exact, case) - expected).norm() < 1e-12 * exact.norm(), (K, case)
        assert torch.equal(exact, gradients.double()), "the gradients are left as they were"

        update = buffered_update(gradients, seed=case)
        assert (update - expected).norm() < 1e-5 * gradients.norm(), (K, case)


def test_both_forms_of_pcgrad_agree():
    """On gradients as long as a layer, in float32 as in training, where all pairs conflict: the
    loop over vectors, and the weights of the rows through the buffer."""
    generator = torch.Generator().manual_seed(20)
    for K, case in itertools.product((2, 3, 6), range(5)):
        noise = torch.randn(K, 100_000, generator=generator)
        opposed = noise - 0.9 * noise.mean(dim=0)  # each less most of what they have in common
        opposed *= 10 ** torch.randn(K, 1, generator=generator)
        gram = opposed @ opposed.T
        assert (gram < 0).sum() == K * (K - 1)

        update = buffered_update(opposed, seed=case)
        assert (update - pcgrad.pcgrad(opposed, case)).norm() < 1e-5 * opposed.norm()
        assert (update - opposed.sum(dim=0)).norm() > 1e-3 * opposed.norm()


def test_pcgrad_leaves_no_conflict_between_two():
    g = torch.tensor([[2.0, 1.0, -3.0, 1.0], [-1.0, 0.5, 1.0, 2.0]])
    projected = pcgrad.pcgrad_weights(pcgrad.gram_matrix(g), seed=0).float() @ g
    assert g[0] @ g[1] < 0
    assert abs(projected[0] @ g[1]) < 1e-5 and abs(projected[1] @ g[0]) < 1e-5


def test_pcgrad_without_conflict_is_the_plain_sum():
    g = torch.rand(4, 9)  # all products positive
    plain = g[0] + g[1] + g[2] + g[3]
    assert torch.equal(buffered_update(g), plain)
    assert torch.equal(buffered_update(g, surgery=None), plain)
    assert torch.equal(pcgrad.pcgrad(g, 0), g.sum(dim=0))


def test_pcgrad_works_on_the_whole_vector():
    """By tensor (the first three numbers, the last two) the first pieces conflict; as a whole
    nothing does."""
    g = torch.tensor([[1.0, 1.0, 0.0, 5.0, 5.0], [-1.0, 0.0, 0.0, 5.0, 5.0]])
    assert torch.equal(buffered_update(g), g.sum(0))
    by_tensor = buffered_update(g, scope="tensor")
    assert (by_tensor[:3] - pcgrad_reference(g[:, :3], 0)).abs().max() < 1e-6
    assert torch.equal(by_tensor[3:], g.sum(0)[3:])
    assert not torch.equal(by_tensor, g.sum(0))


def test_pcgrad_order_is_drawn_for_each_task():
    """Of three tasks: equal seeds, equal weights; and all 2^3 combinations of their orders occur,
    where one order for all tasks would give only six."""
    g = torch.tensor([[1.0, 0.2, 0.0], [-1.0, 1.0, 0.3], [-0.5, -1.0, 1.0]])
    W = [pcgrad.pcgrad_weights(pcgrad.gram_matrix(g), seed) for seed in range(40)]
    assert torch.equal(W[0], pcgrad.pcgrad_weights(pcgrad.gram_matrix(g), 0))
    assert len({tuple(w.mul(1e6).round().flatten().tolist()) for w in W}) == 8
    assert len({tuple(pcgrad.projection_order(3, seed)) for seed in range(40)}) == 8


def test_pcgrad_of_a_zero_gradient():
    g = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0], [-1.0, -2.0, 1.0, 0.0]])
    expected = pcgrad_reference(g[[0, 2]].double(), 0)
    for update in (buffered_update(g), pcgrad.pcgrad(g, 0)):
        assert update.isfinite().all() and (update - expected).abs().max() < 1e-5


# ---------------------------------------------------------------- the Gram matrix

def test_gram_matrices_add_up_over_blocks():
    """On the CPU and as on a GPU, with a last block that is not full."""
    J = torch.randn(3, 10_000, generator=torch.Generator().manual_seed(18)) + 1
    expected = J.double() @ J.double().T
    for block in (1000, 3000, 1 << 20):
        with mock.patch.object(pcgrad, "BLOCK", block):
            for gram in (pcgrad.gram_matrix(J), pcgrad.gram_matrices_on_gpu([J])[0]):
                assert gram.dtype == torch.float64 and gram.device.type == "cpu"
                assert (gram - expected).abs().max() < 1e-5 * expected.max(), block


def test_the_gram_matrix_is_exact_to_four_digits():
    """Relative to the norms, for gradients as long as a small encoder's: also where two are nearly
    antiparallel and their length is odd, which float32 sums least well."""
    generator = torch.Generator().manual_seed(14)
    for P in (3_000_001, 3 << 20):
        first, noise, other = torch.randn(3, P, generator=generator)
        J = torch.stack([first, 1e-4 * noise - first, other])
        exact = J.double() @ J.double().T
        norms = exact.diagonal().sqrt()
        error = (pcgrad.gram_matrix(J) - exact) / (norms[:, None] * norms)
        assert error.abs().max() < 1e-4


def test_gradient_diagnostics():
    g = torch.tensor([[3.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, 0.0]])
    found = pcgrad.diagnostics(pcgrad.gram_matrix(g), ["a", "b", "c", "d"])
    assert found["norm"] == {"a": 3, "b": 1, "c": 1, "d": 0}
    assert found["cosine"] == {"a-b": 0, "a-c": -1, "b-c": 0}, "no pair with a zero gradient"
    assert found["conflict"] == {"a-b": 0, "a-c": 1, "b-c": 0}
    similarity = found["magnitude_similarity"]
    assert similarity.keys() == found["cosine"].keys()
    assert abs(similarity["a-b"] - 0.6) < 1e-9 and similarity["b-c"] == 1


# ---------------------------------------------------------------- Gradient Vaccine

def test_vaccine_agrees_with_a_double_loop():
    """Over 20 steps, so that the targets have moved; the targets agree too."""
    generator = torch.Generator().manual_seed(10)
    for K, case in itertools.product(range(2, 7), range(5)):
        ours, theirs = torch.zeros(2, K, K, dtype=torch.float64)
        drift = torch.randn(12, generator=generator) * (case - 2)  # from mostly opposed to alike
        for step in range(20):
            g = (torch.randn(K, 12, generator=generator) + drift).double()
            W = pcgrad.vaccine_weights(g @ g.T, ours, seed=step)
            expected = vaccine_reference(g, theirs, seed=step)
            assert ((W @ g).sum(0) - expected).norm() < 1e-8 * g.norm(), (K, case)
            assert (ours - theirs).abs().max() < 1e-9, (K, case)


def test_vaccine_through_the_buffer():
    generator = torch.Generator().manual_seed(11)
    for K, case, scope in itertools.product(range(2, 7), range(100), ("vector", "tensor")):
        g = of_all_sizes(K, 12, generator)
        pieces = [g] if scope == "vector" else [g[:, :3], g[:, 3:]]
        ours = torch.rand(len(pieces), K, K, generator=generator, dtype=torch.float64) * 1.8 - 0.9
        theirs = ours.clone()
        update = buffered_update(g, "gradvac", case, scope, ours)
        expected = torch.cat([vaccine_reference(piece.double(), targets, case)
                              for piece, targets in zip(pieces, theirs)])
        assert (update - expected).norm() < 1e-3 * max(expected.norm(), g.norm()), (K, case, scope)
        assert (ours - theirs).abs().max() < 1e-5, (K, case, scope)

    # the targets of a new buffer are 0, one for each ordered pair and tensor
    expected = torch.cat([vaccine_reference(piece.double(), torch.zeros(6, 6).double(), 0)
                          for piece in (g[:, :3], g[:, 3:])])
    assert (buffered_update(g, "gradvac", 0, "tensor") - expected).norm() < 1e-3 * g.norm()


def test_vaccine_reaches_its_target():
    g = torch.tensor([[1.0, 0.0, 0.0], [-0.3, 1.0, 0.2]], dtype=torch.float64)
    targets = torch.tensor([[0.0, 0.4], [0.4, 0.0]], dtype=torch.float64)
    before, phi = targets.clone(), F.cosine_similarity(g[0], g[1], dim=0)
    changed = pcgrad.vaccine_weights(g @ g.T, targets, seed=0) @ g
    for i, j in ((0, 1), (1, 0)):
        assert abs(F.cosine_similarity(changed[i], g[j], dim=0) - 0.4) < 1e-9
        assert abs(targets[i, j] - (0.99 * before[i, j] + 0.01 * phi)) < 1e-12

    # a target below the cosine changes no gradient, and moves up itself
    below = torch.full((2, 2), -0.9, dtype=torch.float64)
    unchanged = pcgrad.vaccine_weights(g @ g.T, below, seed=0)
    assert torch.equal(unchanged, torch.eye(2, dtype=torch.float64)) and below[0, 1] > -0.9


def test_vaccine_with_targets_held_at_zero_is_pcgrad():
    generator = torch.Generator().manual_seed(12)
    for case in range(50):
        g = torch.randn(4, 9, generator=generator).double()
        targets = torch.zeros(4, 4, dtype=torch.float64)
        W = pcgrad.vaccine_weights(g @ g.T, targets, seed=case, beta=0.0)
        assert (W - pcgrad.pcgrad_weights(g @ g.T, case)).abs().max() < 1e-9


def test_vaccine_of_parallel_and_opposed_gradients_is_finite():
    a, b = torch.randn(2, 10000, generator=torch.Generator().manual_seed(13))
    for rows in ([a, a], [a, -a], [a, -a, a], [a, 0 * a], [a, -(1 + 1e-6) * a],
                 [a, -a + 1e-4 * b]):
        g = torch.stack(rows)
        for target in (-0.5, 0.0, 0.999, 1.0):
            targets = torch.full((len(g), len(g)), target, dtype=torch.float64)
            W = pcgrad.vaccine_weights(pcgrad.gram_matrix(g), targets, seed=0)
            assert W.isfinite().all() and targets.abs().max() <= 1
            assert target == 1.0 or (W.float() @ g).norm() < 10 * g.norm()


# ---------------------------------------------------------------- the buffer

def test_groups_share_a_row():
    shared, tasks = [nn.Parameter(torch.zeros(3))], ["sst", "para", "yelp"]
    g = torch.tensor([[1.0, 0.0, 1.0], [0.0, 2.0, 0.0], [-1.0, -3.0, 0.5]])
    buffer = buffer_of(shared, tasks, "pcgrad", [["sst", "para"], ["yelp"]])
    buffer.begin(tasks)
    for task, gradient in zip(tasks, g):
        buffer.backward(task, linear_loss(shared, gradient))
    buffer.combine(0)

    expected = pcgrad_reference(torch.stack([g[0] + g[1], g[2]]), 0)
    assert (shared[0].grad - expected).abs().max() < 1e-6 and not torch.equal(expected, g.sum(0))
    diagnostics = buffer.diagnostics()
    assert diagnostics["conflict"] == {"sst+para-yelp": 1}
    assert abs(diagnostics["norm"]["sst+para"] - (g[0] + g[1]).norm()) < 1e-6


def test_rows_can_be_measured_without_surgery():
    """As with --log_gradients: the update is the plain sum, and conflicts are found."""
    shared, g = [nn.Parameter(torch.zeros(2))], torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
    for groups, conflict in (([["a"], ["b"]], {"a-b": 1}), (None, None)):
        buffer = buffer_of(shared, ["a", "b"], None, groups)
        buffer.begin(["a", "b"])
        for task, gradient in zip("ab", g):
            buffer.backward(task, linear_loss(shared, gradient))
        buffer.combine(0)
        assert torch.equal(shared[0].grad, g.sum(0))
        found = buffer.diagnostics()
        assert (found and found["conflict"]) == conflict, "one row for all tasks has no conflict"


def test_a_step_that_is_not_the_last_adds_to_the_same_update():
    """--accumulate: rows and heads are summed over the steps of an update, and the next update
    starts from zero; a head that was idle in all steps of an update has no gradient."""
    shared = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(4))]
    heads = {task: [nn.Parameter(torch.tensor(1.0))] for task in "abc"}
    buffer = pcgrad.GradientBuffer(shared, heads, "pcgrad")
    g = torch.randn(6, 7, generator=torch.Generator().manual_seed(21))

    def step(tasks, rows, last):
        buffer.begin(tasks, last)
        for task, row in zip(tasks, rows):
            own, = heads[task]
            buffer.backward(task, linear_loss(shared, g[row]) + (row + 1) * own)

    # (tasks, rows of g, last) of each step; then the sums that combine has to find
    zero = torch.zeros(7)
    updates = (
        ([("ab", (0, 1), False), ("a", (2,), False), ("a", (3,), True)],
         [g[0] + g[2] + g[3], g[1], zero], {"a": 1 + 3 + 4, "b": 2, "c": None}),
        ([("c", (4,), True)], [zero, zero, g[4]], {"a": None, "b": None, "c": 5}),
        ([("cb", (5, 0), False), ("ca", (1, 2), True)], [g[2], g[0], g[5] + g[1]],
         {"a": 3, "b": 1, "c": 6 + 2}))
    for seed, (steps, rows, of_heads) in enumerate(updates):
        for tasks, used, last in steps:
            step(tasks, used, last)
        rows = torch.stack(rows)
        assert (buffer.J - rows).abs().max() < 1e-6
        buffer.combine(seed)
        update = torch.cat([parameter.grad for parameter in shared])
        busy = rows[rows.norm(dim=1) > 0].double()  # the reference divides by every norm
        assert (update - pcgrad_reference(busy, seed)).norm() < 1e-5
        for task, (own,) in heads.items():
            found = None if own.grad is None else own.grad.item()
            assert found == of_heads[task], (seed, task)


def test_heads_keep_their_own_gradient_and_idle_ones_none():
    model, examples = three_task_model()
    buffer = pcgrad.GradientBuffer(model.shared_parameters(), heads_of(model), "pcgrad")

    def loss(task):
        torch.manual_seed(8)  # of the dropout masks
        return model.loss(task, collate(examples[task], np.arange(4)))

    for tasks in (["sst", "para", "sts"], ["sst"]):
        expected = {task: torch.autograd.grad(loss(task), list(model.heads[task].parameters()))
                    for task in tasks}
        buffer.begin(tasks)
        for task in tasks:
            buffer.backward(task, loss(task))
        buffer.combine(0)

        for task, head in model.heads.items():
            gradients = [parameter.grad for parameter in head.parameters()]
            if task in tasks:
                assert all(map(torch.equal, gradients, expected[task])), task
            else:
                assert gradients == [None] * len(gradients), task
    # with mean pooling no task reaches the pooler
    assert model.bert.pooler_dense.weight.grad is None


def test_a_task_without_a_loss_adds_nothing():
    """A process that has no example of a task's batch: its row and its head stay empty."""
    shared, head = [nn.Parameter(torch.zeros(3))], nn.Parameter(torch.zeros(2))
    g = torch.tensor([[1.0, 2.0, 3.0]])
    buffer = pcgrad.GradientBuffer(shared, {"a": [], "b": [head]}, "pcgrad")
    buffer.begin(["a", "b"])
    buffer.backward("a", linear_loss(shared, g[0]))
    buffer.backward("b", None)
    buffer.combine(0)
    assert torch.equal(shared[0].grad, g[0]) and head.grad is None
    assert buffer.diagnostics()["norm"]["b"] == 0


# ---------------------------------------------------------------- gradients of the word embedding

def test_sparse_embedding_gradients_are_the_dense_bits():
    rows = []
    for sparse in (False, True):
        model, examples = three_task_model()
        model.bert.embed_dropout.p = 0.0
        model.bert.word_embedding.sparse = sparse
        buffer = pcgrad.GradientBuffer(model.shared_parameters(), heads_of(model), "pcgrad")
        buffer.begin(["sst", "para"])
        for task in ("sst", "para"):
            torch.manual_seed(9)
            buffer.backward(task, model.loss(task, collate(examples[task], np.arange(8))))
        rows.append(buffer.J[:2].clone())
    assert rows[0].abs().sum(1).min() > 0 and torch.equal(*rows)


def test_embedding_gradients_are_dense_on_an_apple_gpu():
    """torch has no sparse tensors there."""
    for device in ("cpu", "cuda", "mps"):
        model = mock.Mock()
        sparse_embedding(model, device)
        assert model.bert.word_embedding.sparse == (device != "mps"), device
