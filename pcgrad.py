"""Gradient surgery: PCGrad (Yu et al. 2020, algorithm 1) and Gradient Vaccine (Wang et al. 2021).

Tasks that share an encoder can pull it in opposite directions. PCGrad starts, for each task i, from
its own gradient g_i' = g_i, visits the other tasks j in a fresh random order, and where the two
conflict takes away what points against g_j:

    where g_i' . g_j < 0:    g_i' <- g_i' - (g_i' . g_j / |g_j|^2) g_j

g_j is always the original gradient, and the update is the SUM of the g_i'. This file has it twice:
as that loop over vectors, which is the definition; and on the K x K Gram matrix of the gradients,
which training uses, since it copies no gradient.

Every g_i' is a combination of the K original gradients, g_i' = sum_k W_ik g_k. Every product and
norm that the loop needs follows from their products G_kj = g_k . g_j (G = J J^T, where the g_k are
the rows of J). For example

    g_i' . g_j = sum_k W_ik G_kj,    |g_j|^2 = G_jj

So the loop can run on K numbers per task. It ends with one weighted sum of the rows, (1^T W) J: row
j has the weight that g_j has in all g_i' together, the sum of column j of W.

Gradient Vaccine replaces "conflict" by "a cosine below the target t_ij", a running average of the
cosines so far, and moves g_i' just far enough to reach the target (formula at `vaccine_weights`).

    python pcgrad.py        two conflicting gradients before and after, both ways

Dimensions: K rows of J (tasks, or groups of tasks), P shared parameters.
"""
import math
import random

import torch
from torch import distributed

# Columns of J whose products are summed in float32; the blocks are summed in float64. Four times as
# many are no faster, and eight times less accurate where two gradients are nearly antiparallel.
BLOCK = 1 << 18
VACCINE_BETA = 0.01  # the weight of the newest cosine in its running target, Wang et al. 2021


# ---------------------------------------------------------------- the definition, on vectors

def projection_order(K, seed):
    """Every ordered pair (i, j) of different tasks; for each i the j in an order of their own."""
    shuffle = random.Random(seed).shuffle
    for i in range(K):
        others = [j for j in range(K) if j != i]
        shuffle(others)
        for j in others:
            yield i, j


def pcgrad(gradients, seed):
    """Algorithm 1 of Yu et al. 2020, as it is written there. (K, P) -> the update (P,)."""
    projected = gradients.clone()  # row i becomes g_i'
    for i, j in projection_order(len(gradients), seed):
        g_j = gradients[j]  # the original, also where row j has been projected already
        dot = projected[i] @ g_j
        if dot < 0:
            projected[i] -= dot / (g_j @ g_j) * g_j
    return projected.sum(dim=0)


# ---------------------------------------------------------------- the same on the Gram matrix

def gram_matrix(J):
    """G = J J^T, as float64 on the CPU. (K, P) -> (K, K)."""
    gram = torch.zeros(len(J), len(J), dtype=torch.float64)
    for block in J.split(BLOCK, dim=1):
        for i in range(len(J)):
            for j in range(i + 1):
                gram[i, j] += torch.dot(block[i], block[j]).item()
    return gram + gram.tril(-1).T


def gram_matrices_on_gpu(scopes):
    """The same of each scope, some columns of J, with one product per block and one copy to the
    host for all: a GPU wants few launches and waits. [(K, P)] -> [(K, K)]."""
    blocks = [columns.split(BLOCK, dim=1) for columns in scopes]
    products = torch.stack([block @ block.T for of_scope in blocks for block in of_scope])
    return [gram.sum(dim=0) for gram in products.cpu().double().split([*map(len, blocks)])]


def pcgrad_weights(gram, seed):
    """W of the update (1^T W) J. (K, K) Gram matrix -> (K, K); g_i' = W_i J."""
    W = torch.eye(len(gram), dtype=gram.dtype)
    for i, j in projection_order(len(gram), seed):
        dot = W[i] @ gram[:, j]  # g_i' . g_j
        if dot < 0 and gram[j, j] > 0:
            W[i, j] -= dot / gram[j, j]
    return W


def vaccine_weights(gram, targets, seed, beta=VACCINE_BETA):
    """Gradient Vaccine (Wang et al. 2021, section 3). Like `pcgrad_weights`; changes `targets`.

    With phi = cos(g_i', g_j) and the target t = targets[i, j]:

        where phi < t:    g_i' <- g_i' + |g_i'| (t sqrt(1 - phi^2) - phi sqrt(1 - t^2))
                                         / (|g_j| sqrt(1 - t^2)) g_j
        and always then   t <- (1 - beta) t + beta phi

    A pair of which one gradient has vanished has no cosine, and is left as it is.
    """
    W = torch.eye(len(gram), dtype=gram.dtype)
    for i, j in projection_order(len(gram), seed):
        # rounding can leave |g_i'|^2 below zero
        norm_i = math.sqrt(max(W[i] @ gram @ W[i], 0.0))
        norm_j = math.sqrt(gram[j, j])
        if norm_i <= 1e-5 * math.sqrt(gram[i, i]) or norm_j == 0:
            continue
        phi = min(1.0, max(-1.0, float(W[i] @ gram[:, j]) / (norm_i * norm_j)))
        target = min(float(targets[i, j]), 1 - 1e-12)  # the formula divides by sqrt(1 - t^2)

        if phi < target:
            sine = math.sqrt(1 - target ** 2)
            W[i, j] += norm_i * (target * math.sqrt(1 - phi ** 2) - phi * sine) / (norm_j * sine)
        targets[i, j] = (1 - beta) * target + beta * phi
    return W


def diagnostics(gram, names):
    """Two of the three conditions under which surgery should help (Yu et al. 2020, section 2):
    conflict and differing norms. The third, high curvature, is not measured.

    names: of the K rows. Returns norm: |g_i|; and for each pair of nonzero gradients cosine,
    conflict (1 where the cosine is negative, else 0) and magnitude_similarity,
    2 |g_i| |g_j| / (|g_i|^2 + |g_j|^2), which is 1 for equal norms.
    """
    norms = gram.diagonal().sqrt().tolist()
    found = {"norm": dict(zip(names, norms)),
             "cosine": {}, "magnitude_similarity": {}, "conflict": {}}
    for i in range(len(names)):
        for j in range(i + 1, len(names)):
            if norms[i] and norms[j]:
                pair, product = f"{names[i]}-{names[j]}", norms[i] * norms[j]
                cosine = float(gram[i, j]) / product
                found["cosine"][pair] = cosine
                found["magnitude_similarity"][pair] = 2 * product / (norms[i] ** 2 + norms[j] ** 2)
                found["conflict"][pair] = float(cosine < 0)
    return found


# ---------------------------------------------------------------- the buffer

class GradientBuffer:
    """J, and where autograd writes it: one row per task under surgery, otherwise one for the sum.

    During task i's backward pass the .grad of every shared parameter is a view of row i, so that
    the gradients of a step are in J without a copy. `combine` leaves the update in row 0.

    J covers the parameters that every task reaches. Heads stay outside. The gradient of one task's
    loss for another task's head is zero, so inside the vector a head would change no product
    g_i . g_j. Head j would only enlarge |g_j|^2, so that less of a conflict would be removed, and a
    projection of g_i would change the gradient of head j.

    shared: the parameters that every task reaches. heads: {task: the parameters of its head and its
    projected attention layers}, whose gradients are as autograd gives them, or None in an update
    without the task. surgery: None for the plain sum, "pcgrad" or "gradvac". groups: the tasks of
    each row of J, lists of names; default: one row per task under surgery, else a single row for
    the sum. scope: "vector", or "tensor" for surgery on each parameter separately (report 1's
    reading of PCGrad). scaler: a GradScaler, by whose scale each loss is multiplied; surgery does
    not depend on a common factor.

    Under torch.distributed each process computes the loss of its shard, weighted by the shard's
    share of the batch. The rows of J are summed over the processes before anything is projected;
    a row is sent while the next task computes.
    """

    def __init__(self, shared, heads, surgery=None, groups=None, scope="vector", scaler=None):
        self.scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
        self.shared = list(shared)
        self.heads = {task: list(own) for task, own in heads.items()}
        self.surgery = surgery
        self.groups = groups or ([[task] for task in heads] if surgery else [list(heads)])
        self.row = {task: i for i, group in enumerate(self.groups) for task in group}

        # J, and for each row its views in the shapes of the parameters
        K, sizes = len(self.groups), [parameter.numel() for parameter in self.shared]
        everything = [self.shared, *self.heads.values()]  # a frozen encoder shares nothing
        device = next(parameter for own in everything for parameter in own).device
        self.J = torch.zeros(K, sum(sizes), device=device)  # (K, P)
        self.views = [[piece.view_as(parameter)
                       for piece, parameter in zip(row.split(sizes), self.shared)]
                      for row in self.J]

        self.widths = sizes if scope == "tensor" else [sum(sizes)]  # columns projected together
        self.targets = torch.zeros(len(self.widths), K, K, dtype=torch.float64)  # of Vaccine
        self.gram = None  # (K, K) of the last update, over all columns
        self.combined = True  # the next step starts a new update
        self.seen = set()  # tasks of this update
        self.sums = {}  # row -> its sum over the processes, under way

    def begin(self, tasks, is_update=True):
        """Start a step. tasks: in the order of their backward passes. is_update: `combine` follows
        this step; False where further steps add to the same update (--accumulate)."""
        if self.combined:
            self.J.zero_()
            for parameter in (p for own in self.heads.values() for p in own):
                parameter.grad = None
            self.seen.clear()
            self.combined = False
        self.to_come = list(tasks) if is_update else None

    def backward(self, task, loss):
        """Add the gradient of one task's loss to its row of J, and to its head's own .grad.

        loss: a scalar, or None where this process has no example of the batch.
        """
        row = self.row[task]
        self.seen.add(task)
        if loss is not None:
            self._point_at(row)
            self.scaler.scale(loss).backward()

        # a row is complete when no later task of the update adds to it
        if distributed.is_initialized() and self.to_come is not None:
            self.to_come.remove(task)
            if row not in {self.row[other] for other in self.to_come}:
                self._start_sum(row)

    def combine(self, seed):
        """Leave the update in the shared parameters' .grad. seed: for the projection order."""
        if distributed.is_initialized():
            self._wait_for_sums()
        self.gram, self.targets_before = None, self.targets.clone()
        if len(self.J) > 1:  # a single row is the sum already
            scopes = self.J.split(self.widths, dim=1)  # all columns, or those of each parameter
            if self.J.device.type == "cpu":
                grams = [gram_matrix(columns) for columns in scopes]
            else:
                grams = gram_matrices_on_gpu(scopes)
            self.gram = sum(grams) / self.scaler.get_scale() ** 2
            for columns, gram, targets in zip(scopes, grams, self.targets):
                self._combine(columns, gram, targets, seed)
        self._point_at(0)
        self.combined = True

    def undo(self):
        """After an update that was skipped: it moves no target of Vaccine, and is not measured."""
        self.gram, self.targets = None, self.targets_before

    def diagnostics(self):
        """Of the last update; None where all tasks share one row."""
        if self.gram is None:
            return None
        return diagnostics(self.gram, ["+".join(group) for group in self.groups])

    def _combine(self, columns, gram, targets, seed):
        """Leave the weighted sum of the rows, (1^T W) J, in row 0. gram: their Gram matrix."""
        W = torch.eye(len(gram))  # the plain sum, if there are rows for --log_gradients alone
        if self.surgery == "pcgrad":
            W = pcgrad_weights(gram, seed)
        elif self.surgery == "gradvac":
            W = vaccine_weights(gram, targets, seed)

        # how much of each original gradient is in the sum of the g_i'
        coefficients = W.sum(dim=0).tolist()
        columns[0].mul_(coefficients[0])
        for row, coefficient in zip(columns[1:], coefficients[1:]):
            columns[0].add_(row, alpha=coefficient)

    def _point_at(self, row):
        for parameter, view in zip(self.shared, self.views[row]):
            parameter.grad = view

    def _start_sum(self, row):
        self.sums[row] = distributed.all_reduce(self.J[row], async_op=True)

    def _wait_for_sums(self):
        # rows whose sum has not begun, in the same order on all processes
        for row in range(len(self.J)):
            if row not in self.sums:
                self._start_sum(row)
        for work in self.sums.values():
            work.wait()
        self.sums.clear()

        for task in (task for task in self.heads if task in self.seen):
            for parameter in self.heads[task]:
                if parameter.grad is None:  # this process had no example of the task
                    parameter.grad = torch.zeros_like(parameter)
                distributed.all_reduce(parameter.grad)


if __name__ == "__main__":
    J = torch.tensor([[2.0, 1.0], [-1.0, 0.5]])
    print(f"g_1 = {J[0].tolist()}, g_2 = {J[1].tolist()}, g_1 . g_2 = {J[0] @ J[1]:.2f}")
    W = pcgrad_weights(gram_matrix(J), seed=0).float()
    for i, (projected, other) in enumerate(zip(W @ J, J.flip(0)), start=1):
        rounded = [round(x, 3) for x in projected.tolist()]
        print(f"g_{i}' = {rounded}, its product with the other gradient {projected @ other:.2f}")

    print(f"plain sum                          {J.sum(dim=0).tolist()}")
    for name, update in (("PCGrad, the loop over vectors", pcgrad(J, seed=0)),
                         ("PCGrad, from the Gram matrix", (W @ J).sum(dim=0))):
        print(f"{name:34} {[round(x, 3) for x in update.tolist()]}")
