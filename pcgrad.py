"""Gradient surgery (PCGrad; Yu et al. 2020, algorithm 1) on the Gram matrix of the task gradients.

For each task i start from its own gradient g_i and visit the other tasks j in a fresh random order; where g_i' . g_j < 0,
subtract (g_i' . g_j / |g_j|^2) g_j, g_j being the original gradient. The update is the SUM of the g_i'.

Every g_i' is a combination of the K original gradients, and every scalar product above follows from their K x K Gram
matrix G = J J^T, where row i of J is g_i. So no gradient is copied: from G come coefficients W, row i those of g_i', and
the update is (1^T W) J, one weighted sum of the rows. J is where autograd writes in the first place: during task i's
backward the parameters' .grad are views of row i.

J covers the parameters that every task reaches. Heads stay outside, each with its own task's gradient or None: inside,
they would enter |g_j|^2 and change the projection.

    python pcgrad.py           two conflicting gradients before and after

Dimensions: K tasks, P shared parameters.
"""
import random

import torch

BLOCK = 1 << 20  # columns of J whose products are summed in float32; the blocks are summed in float64


class GradientBuffer:
    """J, and what a step does with it: zero, one backward a task, combine.

    shared: the parameters that every task reaches. others: the heads and the like; their gradients are kept as autograd
    gives them. tasks: their names. surgery: None for the plain sum, for which all tasks share one row of J, or "pcgrad".
    """

    def __init__(self, shared, others, tasks, surgery=None):
        self.shared, self.others, self.surgery = list(shared), list(others), surgery
        self.row = {task: i if surgery else 0 for i, task in enumerate(tasks)}
        sizes = [parameter.numel() for parameter in self.shared]
        device = [*self.shared, *self.others][0].device  # with a frozen encoder nothing is shared
        self.J = torch.zeros(max(self.row.values()) + 1, sum(sizes), device=device)  # (K, P)
        self.views = [[piece.view_as(parameter) for piece, parameter in zip(row.split(sizes), self.shared)]
                      for row in self.J]

    def zero(self):
        self.J.zero_()
        for parameter in self.others:
            parameter.grad = None

    def backward(self, task, loss):
        """Add the gradient of one task's loss to its row of J, and to its heads' own .grad."""
        self._point_at(self.row[task])
        loss.backward()

    def combine(self, seed):
        """Leave the update in the shared parameters' .grad (row 0 of J). seed: for the order of the projections."""
        if self.surgery:
            coefficients = pcgrad(gram_matrix(self.J), seed).sum(dim=0).tolist()  # 1^T W
            self.J[0].mul_(coefficients[0])
            for row, coefficient in zip(self.J[1:], coefficients[1:]):
                self.J[0].add_(row, alpha=coefficient)
        self._point_at(0)

    def _point_at(self, row):
        for parameter, view in zip(self.shared, self.views[row]):
            parameter.grad = view


def gram_matrix(J):
    """G = J J^T, as float64 on the CPU. (K, P) -> (K, K)."""
    if J.device.type != "cpu":
        return (J @ J.T).cpu().double()
    gram = torch.zeros(len(J), len(J), dtype=torch.float64)
    for block in J.split(BLOCK, dim=1):
        for i in range(len(J)):
            for j in range(i + 1):
                gram[i, j] += torch.dot(block[i], block[j]).item()
    return gram + gram.tril(-1).T


def pcgrad(gram, seed):
    """Algorithm 1 of Yu et al. 2020. (K, K) Gram matrix -> W (K, K), row i the coefficients of g_i' on the g_j."""
    K = len(gram)
    W = torch.eye(K, dtype=gram.dtype)
    shuffle = random.Random(seed).shuffle
    for i in range(K):
        others = [j for j in range(K) if j != i]
        shuffle(others)
        for j in others:
            dot = W[i] @ gram[:, j]  # g_i' . g_j
            if dot < 0 and gram[j, j] > 0:
                W[i, j] -= dot / gram[j, j]
    return W


if __name__ == "__main__":
    J = torch.tensor([[2.0, 1.0], [-1.0, 0.5]])
    W = pcgrad(gram_matrix(J), seed=0).float()
    print(f"g_1 = {J[0].tolist()}, g_2 = {J[1].tolist()}, g_1 . g_2 = {J[0] @ J[1]:.2f}: in conflict")
    for i, (projected, other) in enumerate(zip(W @ J, J.flip(0)), start=1):
        print(f"g_{i}' = {[round(x, 3) for x in projected.tolist()]}, "
              f"its product with the other gradient {projected @ other:.2f}")
    print(f"plain sum {J.sum(0).tolist()}, PCGrad's update {[round(x, 3) for x in (W @ J).sum(0).tolist()]}")
