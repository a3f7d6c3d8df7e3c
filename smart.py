"""SMART (Jiang et al. 2020): a smoothness regularizer and a Bregman proximal point term. Each is a
term that is added to a task's loss.

    smoothness   weight * R,   R = mean over examples of max l(f(x~), f(x)), |x~ - x| <= eps
    proximal     mu * D,       D = mean over examples of l(f(x; theta), f(x; theta~))
                               theta~ <- (1 - beta) theta + beta theta~  after an optimizer step

x is the output of the embedding layer (word + position + type, normalized, after dropout), f(x) the
task's logits, and l the symmetrized Kullback-Leibler divergence of the predicted distributions, or
the squared difference for a regression.

The maximum is approximated by projected gradient ascent (algorithm 1). x~ starts as x plus noise
N(0, sigma^2); each ascent step moves it by `step_size` along the normalized gradient, and then back
into the ball of radius eps around x. An example has one norm; for a pair it is over both sentences,
also where they are encoded separately.

All passes over a batch draw the same dropout masks, by starting from the same seed. Otherwise R and
D would measure dropout.

At the paper's radius of 1e-5, R is a millionth of the loss: embeddings are about 0.5 in size. A
radius of 1 also needs a step of that size (--smart_eps 1 --smart_step_size 1), since an ascent step
moves no further than step_size from the noise. The authors' released code computes something else;
results/smart/ has both, with their scores.

    python smart.py        the perturbation of a small model: its ball, and what it does to R

Dimensions: B examples in the batch, S sequences (B, or 2B where pairs are encoded separately), L
tokens in the longest, H hidden size, C outputs of a task.
"""
import copy
import math

import torch

from attention import to_device


def divergence(kind, logits, other):
    """l of the paper for each example. (B, C), (B, C) -> (B,).

    kind: "classification", "binary" or "regression". Raises ValueError where the shapes differ:
    (B, C) beside (B,) would broadcast to (B, B).
    """
    if logits.shape != other.shape or logits.ndim != 2:
        raise ValueError(f"logits {tuple(logits.shape)} beside {tuple(other.shape)}, "
                         "where both should be (B, C)")
    if kind == "regression":
        return (logits - other).square().squeeze(-1)

    # KL(p || q) + KL(q || p) = sum of (p - q) (log p - log q)
    if kind == "binary":
        # the two terms of a Bernoulli distribution add up to (p - q) times the difference of logits
        return ((logits.sigmoid() - other.sigmoid()) * (logits - other)).squeeze(-1)
    log_p, log_q = logits.log_softmax(dim=-1), other.log_softmax(dim=-1)
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(dim=-1)


class Smoothness:
    """weight * R of section 3.1. The defaults are the paper's (which has weights of 1, 3 and 5).

    kinds: {task: kind}, the tasks it is for. norm: "inf" or "2", of the ball and of the gradient.
    """

    def __init__(self, kinds, weight=5.0, eps=1e-5, sigma=1e-5, step_size=1e-3, steps=1,
                 norm="inf"):
        self.kinds, self.weight, self.eps, self.sigma = kinds, weight, eps, sigma
        self.step_size, self.steps, self.norm = step_size, steps, float(norm)

    def __call__(self, model, task, batch, logits, seed):
        """A scalar. logits: (B, C), of the unperturbed pass, which was made right after
        torch.manual_seed(seed)."""
        perturbation = self.adversarial_perturbation(model, task, batch, logits, seed)
        divergences = self.divergences(model, task, batch, logits, seed, perturbation)
        return self.weight * divergences.mean()

    def divergences(self, model, task, batch, logits, seed, perturbation):
        """l(f(x + perturbation), f(x)) of each example, with the dropout masks of `logits`. (B,)"""
        torch.manual_seed(seed)
        return divergence(self.kinds[task], model.logits(task, batch, perturbation), logits)

    def adversarial_perturbation(self, model, task, batch, logits, seed):
        """x~ - x of algorithm 1. (S, L, H), zeros on the padding."""
        # noise, since at x itself the divergence has no slope; drawn from where the generator
        # stands after the clean pass
        mask = to_device(batch.attention_mask, model.device).unsqueeze(-1)  # (S, L, 1)
        shape = (*mask.shape[:2], model.bert.config.hidden_size)
        perturbation = self.sigma * torch.randn(shape, device=mask.device) * mask

        for _ in range(self.steps):
            # the gradient with respect to the perturbation alone: no weight's is computed
            perturbation.requires_grad_()
            total = self.divergences(model, task, batch, logits.detach(), seed, perturbation).sum()
            gradient, = torch.autograd.grad(total, perturbation)

            # an ascent step, then back into the ball; no step where the gradient vanishes
            norm = self.example_norm(gradient, len(logits))
            direction = gradient / norm.clamp_min(torch.finfo(gradient.dtype).tiny)
            moved = perturbation.detach() + self.step_size * direction
            perturbation = self.project(moved, len(logits))
        return perturbation

    def example_norm(self, x, B):
        """The norm over the one or two sequences of each of B examples. (S, L, H) -> (S, 1, 1)."""
        sides = x.unflatten(0, (-1, B))  # (S / B, B, L, H): all first sentences, then all second
        norm = torch.linalg.vector_norm(sides, self.norm, dim=(0, 2, 3))  # (B,)
        return norm.repeat(len(sides)).view(-1, 1, 1)

    def project(self, perturbation, B):
        """The nearest perturbation in the ball of radius eps. (S, L, H) -> (S, L, H)."""
        if self.norm == math.inf:
            return perturbation.clamp(-self.eps, self.eps)
        tiny = torch.finfo(perturbation.dtype).tiny
        norm = self.example_norm(perturbation, B).clamp_min(tiny)
        return perturbation * (self.eps / norm).clamp_max(1)


class Proximal:
    """mu * D of section 3.2 with momentum: stay near a running average of the weights, the teacher.

    kinds: {task: kind}. beta: of the running average; None for the paper's schedule, .99 in the
    first tenth of the optimizer steps and .999 after it.
    """

    def __init__(self, model, kinds, mu=1.0, beta=None):
        self.kinds, self.mu, self.beta = kinds, mu, beta
        # theta~ starts as a copy of theta; in train mode, so that it has the same dropout
        self.teacher = copy.deepcopy(model).requires_grad_(False).train()

    def __call__(self, model, task, batch, logits, seed):
        """A scalar. logits: (B, C), of the model's pass right after torch.manual_seed(seed)."""
        torch.manual_seed(seed)
        with torch.no_grad():
            target = self.teacher.logits(task, batch)
        return self.mu * divergence(self.kinds[task], logits, target).mean()

    @torch.no_grad()
    def update(self, model, progress):
        """Move the teacher after an optimizer step. progress: the share of all optimizer steps that
        are done, in (0, 1]."""
        beta = self.beta
        if beta is None:
            beta = 0.99 if progress <= 0.1 else 0.999
        for average, parameter in zip(self.teacher.parameters(), model.parameters()):
            average.lerp_(parameter, 1 - beta)  # average + (1 - beta) (parameter - average)


if __name__ == "__main__":
    from types import SimpleNamespace

    # two sentences of embeddings about as large as BERT's; the second ends in two tokens of padding
    torch.manual_seed(0)
    batch = SimpleNamespace(attention_mask=torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]))
    mask = batch.attention_mask.unsqueeze(-1)  # (S, L, 1)
    x = torch.randn(2, 5, 16) / 2  # (S, L, H)
    hidden, output = torch.nn.Linear(16, 32), torch.nn.Linear(32, 3)

    def logits(task, batch, perturbation=0.0):
        """A nonlinear layer for each token, the mean over real tokens, 3 classes. -> (B, 3)"""
        states = hidden(x + perturbation).tanh() * mask
        return output(states.sum(dim=1) / mask.sum(dim=1))

    model = SimpleNamespace(logits=logits, device=x.device,
                            bert=SimpleNamespace(config=SimpleNamespace(hidden_size=16)))
    clean = logits("sst", batch)
    print("radius  largest |x~ - x|  on padding    R, ascent  R, random signs")
    for eps in (0.0, 1e-5, 0.01, 0.1, 1.0):
        # a step far longer than the radius: nearly all numbers end on the surface of the ball
        smoothness = Smoothness({"sst": "classification"}, 1.0, eps, sigma=eps, step_size=100 * eps)
        ascent = smoothness.adversarial_perturbation(model, "sst", batch, clean, seed=0)
        noise = [eps * torch.randn_like(ascent).sign() * mask for _ in range(100)]
        R, *of_noise = [smoothness.divergences(model, "sst", batch, clean, 0, moved).mean().item()
                        for moved in (ascent, *noise)]

        largest, on_padding = (part.abs().max().item() for part in (ascent, ascent * (1 - mask)))
        print(f"{eps:6g}  {largest:16g}  {on_padding:10g}  {R:11.1e}  {sum(of_noise) / 100:15.1e}")
