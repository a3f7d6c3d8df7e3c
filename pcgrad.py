"""Gradient surgery: PCGrad (Yu et al. 2020, algorithm 1) and Gradient Vaccine (Wang et al. 2021), on the Gram matrix.

For each task i start from its own gradient g_i and visit the other tasks j in a fresh random order.

    PCGrad    where g_i' . g_j < 0:             g_i' <- g_i' - (g_i' . g_j / |g_j|^2) g_j
    Vaccine   where phi = cos(g_i', g_j) < t:   g_i' <- g_i' + |g_i'| (t sqrt(1 - phi^2) - phi sqrt(1 - t^2))
                                                               / (|g_j| sqrt(1 - t^2)) g_j
              and always then                   t <- (1 - beta) t + beta phi, a running target t for each pair (i, j)

g_j is always the original gradient, and the update is the SUM of the g_i'.

Every g_i' is a combination of the K original gradients, and every product and norm above follows from their K x K Gram
matrix G = J J^T, where row i of J is g_i. So no gradient is copied: from G come coefficients W, row i those of g_i', and
the update is (1^T W) J, one weighted sum of the rows. J is where autograd writes in the first place: during task i's
backward the parameters' .grad are views of row i.

J covers the parameters that every task reaches. Heads stay outside, each with its own task's gradient or None: inside,
they would enter |g_j|^2 and change the projection.

    python pcgrad.py           two conflicting gradients before and after; what surgery costs on the default encoder

Dimensions: K rows of J (tasks, or groups of tasks), P shared parameters.
"""
import functools
import math
import random

import torch
from torch import distributed

# Columns of J whose products are summed in float32; the blocks are summed in float64. Four times as
# many are no faster, and eight times less accurate where two gradients are nearly antiparallel.
BLOCK = 1 << 18
VACCINE_BETA = 0.01  # the weight of the newest cosine in its running target, Wang et al. 2021


class GradientBuffer:
    """J, and what a step does with it: zero, one backward a task, combine.

    shared: the parameters that every task reaches. heads: {task: its own parameters}, whose gradients are kept as
    autograd gives them. surgery: None for the plain sum, "pcgrad" or "gradvac". groups: the tasks of each row of J, lists
    of names; with None one row a task under surgery, and a single row that holds the sum without. scope: "vector", or
    "tensor" for surgery on each parameter by itself (report 1's reading of PCGrad).

    Under torch.distributed each process passes the loss of its share of the rows, weighted by that share; the rows of J
    are summed over the processes before anything is projected, a row while the next task computes, if one follows.
    """

    def __init__(self, shared, heads, surgery=None, groups=None, scope="vector"):
        self.shared, self.heads, self.surgery = list(shared), {task: list(own) for task, own in heads.items()}, surgery
        self.groups = groups or ([[task] for task in heads] if surgery else [list(heads)])
        self.row = {task: i for i, group in enumerate(self.groups) for task in group}
        K, sizes = len(self.groups), [parameter.numel() for parameter in self.shared]
        device = next(p for own in (self.shared, *self.heads.values()) for p in own).device  # frozen: nothing is shared
        self.J = torch.zeros(K, sum(sizes), device=device)  # (K, P)
        self.views = [[piece.view_as(parameter) for piece, parameter in zip(row.split(sizes), self.shared)]
                      for row in self.J]
        self.scopes = sizes if scope == "tensor" else [sum(sizes)]  # columns of J that are projected together
        self.targets = torch.zeros(len(self.scopes), K, K, dtype=torch.float64)  # Vaccine's t; saved with the run
        self.gram = None  # (K, K) of the last step, over all columns
        self.seen = set()  # the tasks since `zero`
        self.sending = {}  # row -> its sum over the processes, under way

    def zero(self):
        self.J.zero_()
        self.seen.clear()
        for parameter in (p for own in self.heads.values() for p in own):
            parameter.grad = None

    def backward(self, task, loss, still_to_come=None):
        """Add the gradient of one task's loss to its row of J, and to its head's own .grad.

        loss: a scalar, or None where this process has no row of the batch. still_to_come: the tasks that follow before
        `combine`; None where that is not known, and the rows then wait for `combine` to be sent.
        """
        row = self.row[task]
        self.seen.add(task)
        if loss is not None:
            self._point_at(row)
            loss.backward()
        if distributed.is_initialized() and still_to_come is not None and row not in map(self.row.get, still_to_come):
            self._send(row)

    def combine(self, seed):
        """Leave the update in the shared parameters' .grad (row 0 of J). seed: for the order of the projections."""
        if distributed.is_initialized():
            self._receive()
        grams = []
        for i, block in enumerate(self.J.split(self.scopes, dim=1) if len(self.J) > 1 else ()):
            grams.append(gram_matrix(block))
            if self.surgery:
                W = pcgrad(grams[-1], seed) if self.surgery == "pcgrad" else vaccine(grams[-1], self.targets[i], seed)
                coefficients = W.sum(dim=0).tolist()  # 1^T W
            else:
                coefficients = [1.0] * len(self.J)
            block[0].mul_(coefficients[0])
            for row, coefficient in zip(block[1:], coefficients[1:]):
                block[0].add_(row, alpha=coefficient)
        self.gram = sum(grams) if grams else None
        self._point_at(0)

    def _point_at(self, row):
        for parameter, view in zip(self.shared, self.views[row]):
            parameter.grad = view

    def _send(self, row):
        self.sending[row] = distributed.all_reduce(self.J[row], async_op=True)

    def _receive(self):
        for row in range(len(self.J)):  # one order on all processes
            if row not in self.sending:
                self._send(row)
        for work in self.sending.values():
            work.wait()
        self.sending.clear()
        for parameter in (p for task, own in self.heads.items() if task in self.seen for p in own):
            if parameter.grad is None:  # this process had no row of the task
                parameter.grad = torch.zeros_like(parameter)
            distributed.all_reduce(parameter.grad)


def use_sparse_gradient(embedding):
    """Its gradient then touches, in J, only the rows of words that occur. MPS has no sparse
    tensors: there it stays dense."""
    embedding.sparse = embedding.weight.device.type != "mps"


def gram_matrix(J):
    """G = J J^T, as float64 on the CPU. (K, P) -> (K, K)."""
    if J.device.type != "cpu":
        return gram_matrix_on_gpu(J)
    gram = torch.zeros(len(J), len(J), dtype=torch.float64)
    for block in J.split(BLOCK, dim=1):
        for i in range(len(J)):
            for j in range(i + 1):
                gram[i, j] += torch.dot(block[i], block[j]).item()
    return gram + gram.tril(-1).T


def gram_matrix_on_gpu(J):  # one product per block: a GPU wants few launches
    grams = torch.stack([block @ block.T for block in J.split(BLOCK, dim=1)])
    return grams.cpu().double().sum(dim=0)


def visits(K, seed):
    """Every ordered pair (i, j) of different rows; for each i the j in a random order of their own."""
    shuffle = random.Random(seed).shuffle
    for i in range(K):
        others = [j for j in range(K) if j != i]
        shuffle(others)
        for j in others:
            yield i, j


def pcgrad(gram, seed):
    """Algorithm 1 of Yu et al. 2020. (K, K) Gram matrix -> W (K, K), row i the coefficients of g_i' on the g_j."""
    W = torch.eye(len(gram), dtype=gram.dtype)
    for i, j in visits(len(gram), seed):
        dot = W[i] @ gram[:, j]  # g_i' . g_j
        if dot < 0 and gram[j, j] > 0:
            W[i, j] -= dot / gram[j, j]
    return W


def vaccine(gram, targets, seed, beta=VACCINE_BETA):
    """The update of Wang et al. 2021 (its formula is at the top). Like `pcgrad`; moves `targets` (K, K) in place."""
    W = torch.eye(len(gram), dtype=gram.dtype)
    for i, j in visits(len(gram), seed):
        norm_i = math.sqrt(max(W[i] @ gram @ W[i], 0.0))  # |g_i'|; rounding can leave its square below 0
        norm_j = math.sqrt(gram[j, j])
        if norm_i <= 1e-5 * math.sqrt(gram[i, i]) or norm_j == 0:  # vanished: it has no direction to compare
            continue
        phi = min(1.0, max(-1.0, float(W[i] @ gram[:, j]) / (norm_i * norm_j)))
        target = min(float(targets[i, j]), 1 - 1e-12)  # the formula divides by sqrt(1 - t^2)
        if phi < target:
            sine = math.sqrt(1 - target ** 2)
            W[i, j] += norm_i * (target * math.sqrt(1 - phi ** 2) - phi * sine) / (norm_j * sine)
        targets[i, j] = (1 - beta) * target + beta * phi
    return W


def diagnostics(gram, names):
    """What Yu et al. 2020 (section 2) name as the conditions for surgery to help. names: of the K rows.

    norm: |g_i|. For each pair of nonzero gradients its cosine, whether it is in conflict (1 or 0), and its magnitude
    similarity 2 |g_i| |g_j| / (|g_i|^2 + |g_j|^2), which is 1 for equal norms.
    """
    norms = gram.diagonal().sqrt().tolist()
    pairs = {f"{names[i]}-{names[j]}": (i, j) for i in range(len(norms)) for j in range(i + 1, len(norms))
             if norms[i] and norms[j]}
    cosine = {pair: float(gram[i, j]) / (norms[i] * norms[j]) for pair, (i, j) in pairs.items()}
    return {"norm": dict(zip(names, norms)), "cosine": cosine,
            "magnitude_similarity": {pair: 2 * norms[i] * norms[j] / (norms[i] ** 2 + norms[j] ** 2)
                                     for pair, (i, j) in pairs.items()},
            "conflict": {pair: float(value < 0) for pair, value in cosine.items()}}


def mean_of(records):
    """The mean of nested dicts of numbers, key by key, over the records that have the key."""
    keys = dict.fromkeys(key for record in records for key in record)
    columns = {key: [record[key] for record in records if key in record] for key in keys}
    return {key: mean_of(values) if isinstance(values[0], dict) else sum(values) / len(values)
            for key, values in columns.items()}


def describe_gradients(mean):
    pairs = [f"{pair} cosine {cosine:.3f}, in conflict {mean['conflict'][pair]:.0%}, magnitude similarity "
             f"{mean['magnitude_similarity'][pair]:.2f}" for pair, cosine in mean["cosine"].items()]
    return "gradients  " + ("\n" + " " * 22).join(pairs)


def step_times(model, optimizer, steps, rounds=15):
    """{surgery: median seconds of a training step}, for the plain sum (None), PCGrad and Vaccine in turn.

    steps: some steps, each a list of (name of a row of J, task, batch); they are used over and over.
    """
    from checkpoint import median_times

    names = [name for name, _, _ in steps[0]]
    heads = dict.fromkeys(names, ()) | {names[0]: list(model.heads.parameters())}
    buffers = [GradientBuffer(model.shared_parameters(), heads, surgery) for surgery in (None, "pcgrad")]

    def step(i, surgery):
        gradients = buffers[surgery is not None]
        gradients.surgery = surgery
        gradients.zero()
        for name, task, batch in steps[i % len(steps)]:
            gradients.backward(name, model.loss(task, batch))
        gradients.combine(seed=i)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return median_times({surgery: functools.partial(step, surgery=surgery) for surgery in (None, "pcgrad", "gradvac")},
                        rounds, model.device.type)


if __name__ == "__main__":
    J = torch.tensor([[2.0, 1.0], [-1.0, 0.5]])
    W = pcgrad(gram_matrix(J), seed=0).float()
    print(f"g_1 = {J[0].tolist()}, g_2 = {J[1].tolist()}, g_1 . g_2 = {J[0] @ J[1]:.2f}: in conflict")
    for i, (projected, other) in enumerate(zip(W @ J, J.flip(0)), start=1):
        print(f"g_{i}' = {[round(x, 3) for x in projected.tolist()]}, "
              f"its product with the other gradient {projected @ other:.2f}")
    print(f"plain sum {J.sum(0).tolist()}, PCGrad's update {[round(x, 3) for x in (W @ J).sum(0).tolist()]}\n")

    import sys

    import numpy as np

    from data.batches import collate
    from data.download import fetch_encoder
    from data.tasks import locate
    from flags import resolve
    from multitask_classifier import build
    from optimizer import AdamW

    args = resolve(["--option", "finetune", "--pair_head", "cross", *sys.argv[1:]])  # --data_dir, --model, ...
    model, data = build(args, locate(args), fetch_encoder(args.model))
    model.train()
    use_sparse_gradient(model.bert.word_embedding)
    optimizer, generator = AdamW(model.parameters(), lr=1e-5), np.random.default_rng(0)
    P = sum(parameter.numel() for parameter in model.shared_parameters())

    def random_batch(task):
        rows = generator.permutation(len(data[task]["train"]))[:args.batch_size[task]]
        return collate(data[task]["train"], rows)

    median = step_times(model, optimizer, [[(task, task, random_batch(task)) for task in args.tasks] for _ in range(5)])
    print(f"a training step, {P / 1e6:.1f}M shared parameters, {args.batch_size} rows, over that of the plain sum: "
          f"pcgrad {median['pcgrad'] / median[None]:.3f}, gradvac {median['gradvac'] / median[None]:.3f}")
    unit, task = None, args.tasks[-1]
    for K in (2, 4, 8):
        steps = [[(f"copy {k}", task, random_batch(task)) for k in range(K)] for _ in range(3)]
        median = step_times(model, optimizer, steps, rounds=7)
        unit = unit or median[None] / K
        print(f"K = {K} copies of {task}: time an example, 1 for the plain sum at K = 2: sum {median[None] / K / unit:.2f}, "
              f"pcgrad {median['pcgrad'] / K / unit:.2f}, gradvac {median['gradvac'] / K / unit:.2f}; "
              f"J {4e-6 * K * P:.0f} MB, where the sum has {4e-6 * P:.0f} MB")
