"""SMART (Jiang et al. 2020): a smoothness regulariser and a Bregman proximal point term, each added to a task's loss.

    smoothness   weight * R,   R = mean over examples of  max over |x~ - x| <= eps  of  l(f(x~; theta), f(x; theta))
    proximal     mu * D,       D = mean over examples of  l(f(x; theta), f(x; theta~))
                               theta~ <- (1 - beta) theta + beta theta~   after every optimizer step

x is what the embedding layer gives (word + position + type, normalised, dropped out), f(x) the task's logits, and l the
symmetrised Kullback-Leibler divergence of the predicted distributions, or the squared difference of a regression. The
maximum is approached by projected gradient ascent (algorithm 1): x~ starts as x plus noise N(0, sigma^2), and each step
moves it by `step` along the gradient over its norm and then back into the ball of radius eps. An example is what has one
label: both sentences of a pair, also where they are encoded apart, share one norm and one ascent.

All passes over a batch draw the same dropout masks, by starting from the same seed: else R and D would measure dropout.

The paper's radius of 1e-5 is small beside embeddings of about 0.5: R is then a millionth of the loss. float32 still
resolves it, to a few percent (the table that this file prints), but on the default encoder the gradient of 5 R is some
millionths of the loss's, and a run ends with the scores of one without. A radius of 1 needs a step of that size too
(eps=1,step=1; with step=1e-3 the perturbation stays at 1e-3). The authors' released code does not project: its perturbation
is noise plus .001 of the gradient, over its largest number, token by token, which is mostly noise of size 1
(results/smart/authors.py). README.md has scores of each.

    python smart.py [RUN]      how far perturbations of each size move a sentence's sentiment; what a training step costs

Dimensions: B examples in the batch, S sequences (B, or 2B where pairs are encoded apart), L tokens in the longest,
H hidden size, C outputs of a task.
"""
import copy
import functools

import torch


def divergence(kind, logits, other):
    """l of the paper, symmetric, for each example. (B, C), (B, C) -> (B,). kind: "classes", "binary" or "similarity".

    KL(p || q) + KL(q || p) is the sum of (p - q)(log p - log q). Of the two terms of a Bernoulli distribution this leaves
    p - q times the difference of the logits. Raises ValueError where the shapes differ: (B, C) beside (B,) would
    broadcast to (B, B).
    """
    if logits.shape != other.shape or logits.ndim != 2:
        raise ValueError(f"logits {tuple(logits.shape)} beside {tuple(other.shape)}, where both should be (B, C)")
    if kind == "similarity":
        return (logits - other).square().squeeze(-1)
    if kind == "binary":
        return ((logits.sigmoid() - other.sigmoid()) * (logits - other)).squeeze(-1)
    log_p, log_q = logits.log_softmax(dim=-1), other.log_softmax(dim=-1)
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(dim=-1)


class Smoothness:
    """weight * R of section 3.1. kinds: {task: kind} of the tasks it is for.

    norm: "inf" or "2", of the ball and of the gradient, over all numbers of an example. The defaults are the paper's.
    """

    def __init__(self, kinds, weight=5.0, eps=1e-5, sigma=1e-5, step=1e-3, steps=1, norm="inf"):
        self.kinds, self.weight, self.eps, self.sigma = kinds, weight, eps, sigma
        self.step, self.steps, self.norm = step, steps, float(norm)

    def __call__(self, model, task, batch, logits, seed):
        """A scalar. logits (B, C): of the unperturbed pass, for which torch.manual_seed(seed) was called just before."""
        perturbation = self.ascend(model, task, batch, logits, seed)
        return self.weight * self.divergences(model, task, batch, logits, seed, perturbation).mean()

    def divergences(self, model, task, batch, logits, seed, perturbation):  # -> (B,)
        torch.manual_seed(seed)
        return divergence(self.kinds[task], model.logits(task, batch, perturbation), logits)

    def gradient(self, model, total, perturbation):  # of the perturbation alone: no weight's is computed
        return torch.autograd.grad(total, perturbation)[0]

    def ascend(self, model, task, batch, logits, seed):
        """x~ - x of algorithm 1, (S, L, H), zeros on the padding."""
        mask = batch.attention_mask.to(model.device).unsqueeze(-1)  # (S, L, 1)
        perturbation = self.sigma * torch.randn(*mask.shape[:2], model.bert.config.hidden_size, device=mask.device) * mask
        for _ in range(self.steps):
            perturbation.requires_grad_()
            total = self.divergences(model, task, batch, logits.detach(), seed, perturbation).sum()
            gradient = self.gradient(model, total, perturbation)
            smallest = torch.finfo(gradient.dtype).tiny  # where an example's gradient vanishes it stays where it is
            direction = gradient / self.example_norm(gradient, len(logits)).clamp_min(smallest)
            perturbation = self.project(perturbation.detach() + self.step * direction, len(logits))
        return perturbation

    def example_norm(self, x, B):
        """Over the one or two sequences of each example. (S, L, H) -> (S, 1, 1)."""
        sides = x.unflatten(0, (-1, B))  # (S / B, B, L, H): first all first sentences, then all second
        norm = torch.linalg.vector_norm(sides, self.norm, dim=(0, 2, 3))  # (B,)
        return norm.repeat(len(sides)).view(-1, 1, 1)

    def project(self, x, B):
        """The nearest point of the ball around 0."""
        if self.norm == float("inf"):
            return x.clamp(-self.eps, self.eps)
        return x * (self.eps / self.example_norm(x, B).clamp_min(torch.finfo(x.dtype).tiny)).clamp_max(1)


class Proximal:
    """mu * D of section 3.2 with momentum, and the teacher theta~. kinds: {task: kind}.

    beta: of the running average; None for the paper's, .99 in the first tenth of the optimizer steps and then .999.
    """

    def __init__(self, model, kinds, mu=1.0, beta=None):
        self.kinds, self.mu, self.beta = kinds, mu, beta
        self.teacher = copy.deepcopy(model).requires_grad_(False).train()  # in train mode, for the same dropout

    def __call__(self, model, task, batch, logits, seed):
        """A scalar. logits (B, C): of the model's pass, for which torch.manual_seed(seed) was called just before."""
        torch.manual_seed(seed)
        with torch.no_grad():
            target = self.teacher.logits(task, batch)
        return self.mu * divergence(self.kinds[task], logits, target).mean()

    @torch.no_grad()
    def update(self, model, progress):
        """After an optimizer step; progress: the share of all steps that are done, in (0, 1]."""
        beta = self.beta if self.beta is not None else 0.99 if progress <= 0.1 else 0.999
        for average, parameter in zip(self.teacher.parameters(), model.parameters()):
            average.lerp_(parameter, 1 - beta)  # average + (1 - beta) (parameter - average)


def show_perturbations(model, batch):
    """How far a sentence's sentiment moves under one ascent step into the ball, and under random signs of equal size."""
    model = model.double().eval()  # float64, so that the smallest are seen as they are; the last column is float32
    logits = model.logits("sst", batch).detach()
    print(f"{[round(p, 3) for p in logits.softmax(dim=-1)[0].tolist()]}\n"
          f"{'':24}largest change of a probability   R                    its error\n"
          f"eps       step          signs      ascent       signs      ascent    in float32")
    for eps, step in ((1e-6, 1e-4), (1e-5, 1e-3), (1e-4, 1e-2), (1e-3, 1e-1), (1e-2, 1.0), (0.1, 1.0), (1.0, 1e-3), (1.0, 1.0)):
        torch.manual_seed(0)
        smart = Smoothness({"sst": "classes"}, eps=eps, sigma=min(eps, 1e-5), step=step)
        ascent = smart.ascend(model, "sst", batch, logits, seed=0)
        signs = ascent.square().mean().sqrt() * torch.randn_like(ascent).sign()  # of the same 2-norm
        changes, values = [], []
        for perturbation in (signs, ascent):
            perturbed = model.logits("sst", batch, perturbation).detach()
            changes.append((perturbed.softmax(dim=-1) - logits.softmax(dim=-1)).abs().max().item())
            values.append(divergence("classes", perturbed, logits).item())
        single = copy.deepcopy(model).float()
        measured = smart.divergences(single, "sst", batch, single.logits("sst", batch), 0, ascent.float()).item()
        print(f"{eps:<8g}  {step:<8g} {changes[0]:10.1e}  {changes[1]:10.1e}  {values[0]:10.1e}  {values[1]:10.1e}  "
              f"{abs(measured / values[1] - 1):11.0%}")


class WithAllGradients(Smoothness):
    """What the ascent would cost if it took the weights' gradients too, of which it has no use."""

    def gradient(self, model, total, perturbation):
        return torch.autograd.grad(total, [perturbation, *model.parameters()], allow_unused=True)[0]


def step_times(model, optimizer, gradients, kinds, steps, rounds=15):
    """{what: median seconds of a training step} of a plain step and of each regulariser, interleaved.

    steps: some steps, each a list of (task, batch); they are used over and over.
    """
    from checkpoint import median_times

    smart, proximal = Smoothness(kinds), Proximal(model, kinds)
    variants = {"plain": [], "smart": [smart], "smart, ascent with all gradients": [WithAllGradients(kinds)],
                "proximal": [proximal], "smart and proximal": [smart, proximal]}

    def step(i, regularisers):
        gradients.zero()
        for task, batch in steps[i % len(steps)]:
            torch.manual_seed(i)
            logits = model.logits(task, batch)
            loss = model.loss(task, batch, logits)
            for term in regularisers:
                loss = loss + term(model, task, batch, logits, seed=i)
            gradients.backward(task, loss)
        gradients.combine(seed=i)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if proximal in regularisers:
            proximal.update(model, progress=1.0)

    return median_times({name: functools.partial(step, regularisers=terms) for name, terms in variants.items()}, rounds,
                        model.device.type)


if __name__ == "__main__":
    import sys

    import numpy as np

    from checkpoint import exit_status
    from data.batches import Batch, collate, evaluation_batches
    from data.download import InputError, fetch_encoder
    from data.tasks import TASKS, load_data, load_tokenizer, locate
    from flags import resolve
    from multitask_classifier import MultitaskBERT, build
    from optimizer import AdamW
    from pcgrad import GradientBuffer, use_sparse_gradient

    def fit_sentiment_head(model, examples):
        """From what the untrained encoder makes of some sentences."""
        with torch.no_grad():
            encoded = [(model.eval()(batch.input_ids, batch.attention_mask), batch.labels)
                       for batch in evaluation_batches(examples, np.arange(min(500, len(examples))))]
        pooled, labels = map(torch.cat, zip(*encoded))
        head = model.heads["sst"]
        optimizer = AdamW(head.parameters(), lr=1e-2)
        for _ in range(300):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(head(pooled), labels.long()).backward()
            optimizer.step()

    SENTENCE = "A quiet, clever film that never quite finds its ending."

    def main(argv):
        run, *flags = argv if argv and not argv[0].startswith("-") else [None, *argv]
        args = resolve(["--option", "finetune", *flags])  # --data_dir, --model, --pair_head, ...
        if run:
            model = MultitaskBERT.load(run)
            model.amp = False  # shown in float64
            args.tasks = [task for task in model.tasks if task in TASKS]  # not an auxiliary one
            args.pair_head, folder = model.pair_head, run
            cross = [task for task, head in model.pair_head.items() if head == "cross"]
            data = load_data(locate(args), run, model.bert.config, cross, skip_malformed=False)
        else:
            folder = fetch_encoder(args.model)
            model, data = build(args, locate(args), folder)
        if "sst" not in args.tasks:
            raise InputError("without the task sst there is no sentiment to show")
        shown = copy.deepcopy(model).cpu()
        if not run:
            fit_sentiment_head(shown, data["sst"]["train"])
        ids = torch.tensor([load_tokenizer(folder).encode(SENTENCE).ids])
        print(SENTENCE, end=" ")
        show_perturbations(shown, Batch(ids, torch.ones_like(ids), torch.zeros_like(ids), None, np.zeros(1)))

        generator = np.random.default_rng(0)
        steps = [[(task, collate(data[task]["train"],
                                 generator.permutation(len(data[task]["train"]))[:args.batch_size[task]]))
                  for task in args.tasks] for _ in range(5)]
        model.to(args.device).train()
        use_sparse_gradient(model.bert.word_embedding)
        median = step_times(model, AdamW(model.parameters(), lr=1e-5),
                            GradientBuffer(model.shared_parameters(), {task: model.own_parameters(task) for task in args.tasks}),
                            {task: TASKS[task].kind for task in args.tasks}, steps)
        print(f"\na training step of {args.batch_size} rows, over a plain one: "
              + ", ".join(f"{name} {seconds / median['plain']:.2f}" for name, seconds in median.items() if name != "plain"))

    sys.exit(exit_status(main, sys.argv[1:]))
