"""AdamW: Adam with the bias correction folded into the step size, then decoupled weight decay.

Kingma & Ba 2014, algorithm 1 in the "efficient" form at the end of section 2; Loshchilov & Hutter 2019, algorithm 2.

    m <- b1 m + (1 - b1) g                      first moment
    v <- b2 v + (1 - b2) g^2                    second moment
    a  = lr sqrt(1 - b2^t) / (1 - b1^t)         step size, bias correction included
    theta <- theta - a m / (sqrt(v) + eps)
    theta <- theta - lr wd theta                lr, not a

torch.optim.AdamW adds its eps after the bias correction of v, and decays the old theta, as Loshchilov & Hutter do, where
the course decays the new one (an O(lr^2 wd) difference). With weight decay 0 and eps_torch = eps / sqrt(1 - b2^t) the two
make the same step.

    python optimizer.py        both on one problem, and the time of a step beside torch's
"""
import math

import torch
from torch.optim import Optimizer

CHUNK = 1 << 18  # elements a pass; a chunk's tensors (5 MiB) stay in the cache, so memory is read once for all formulas


class AdamW(Optimizer):
    """AdamW(params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, correct_bias=True), the course's constructor.

    A parameter whose gradient is None is left alone: no momentum, no decay, no step counted. Raises ValueError for a
    hyperparameter out of range, or a sparse gradient.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, correct_bias=True):
        for name, value, valid in (("lr", lr, lr >= 0),
                                   ("betas", betas, len(betas) == 2 and all(0 <= beta < 1 for beta in betas)),
                                   ("eps", eps, eps >= 0), ("weight_decay", weight_decay, weight_decay >= 0)):
            if not valid:
                raise ValueError(f"invalid {name}: {value}")
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, correct_bias=correct_bias))

    @torch.no_grad()
    def step(self, closure=None):
        """One step on every parameter that has a gradient. Returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter.grad.is_sparse:
                    raise ValueError("a sparse gradient: let autograd add it into a dense .grad, as pcgrad.py does")
                state = self.state[parameter]
                if not state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)  # m
                    state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)  # v
                state["step"] += 1
                adamw(parameter, parameter.grad, state, group)
        return loss


def adamw(parameter, gradient, state, group):
    """The formulas above on one parameter, in place."""
    lr, (beta1, beta2), t = group["lr"], group["betas"], state["step"]
    step_size = lr * math.sqrt(1 - beta2 ** t) / (1 - beta1 ** t) if group["correct_bias"] else lr
    whole = (parameter, gradient, state["exp_avg"], state["exp_avg_sq"])
    chunked = parameter.device.type == "cpu" and all(x.is_contiguous() for x in whole)  # a GPU wants few launches instead
    for theta, g, m, v in zip(*(x.view(-1).split(CHUNK) for x in whole)) if chunked else [whole]:
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        theta.addcdiv_(m, v.sqrt().add_(group["eps"]), value=-step_size)
        if group["weight_decay"]:
            theta.mul_(1 - lr * group["weight_decay"])


def parameter_groups(parameters, weight_decay):
    """Weights decay; biases and LayerNorm, whose tensors have one dimension, do not."""
    parameters = list(parameters)
    return [{"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim < 2]}]


def learning_rate(peak, progress, warmup, schedule="linear"):
    """progress: 0 before the first step, 1 after the last. Rises from 0 in the share `warmup`; then "constant", or
    "linear" down to 0."""
    if progress < warmup:
        return peak * progress / warmup
    return peak if schedule == "constant" else peak * (1 - progress) / (1 - warmup)


if __name__ == "__main__":
    from checkpoint import median_times

    def quadratic(make, steps=200):
        torch.manual_seed(0)
        theta = torch.nn.Parameter(torch.randn(1000, dtype=torch.float64))
        curvature, optimizer = torch.linspace(.1, 10, 1000, dtype=torch.float64), make([theta])
        for _ in range(steps):
            theta.grad = curvature * theta.detach()
            optimizer.step()
        return theta.detach(), (curvature * theta.detach() ** 2).sum().item() / 2

    ours, loss = quadratic(lambda p: AdamW(p, lr=.01, eps=0.0))
    theirs, _ = quadratic(lambda p: torch.optim.AdamW(p, lr=.01, eps=0.0, weight_decay=0.0))
    print(f"200 steps down a quadratic: loss {loss:.4f}, "
          f"largest difference from torch.optim.AdamW {(ours - theirs).abs().max():.1e}")

    shapes = [(30522, 384)] + [(384, 1536), (1536, 384), (384, 384), (384, 384), (384, 384), (384, 384)] * 6
    kinds = {"this file": AdamW, "torch, fused": lambda p: torch.optim.AdamW(p, fused=True),
             "torch, foreach": lambda p: torch.optim.AdamW(p, foreach=True),
             "torch, loop": lambda p: torch.optim.AdamW(p, foreach=False)}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    optimizers = {}
    for kind, make in kinds.items():
        parameters = [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizers[kind] = make(parameters)
    steps = {kind: lambda i, step=optimizer.step: step() for kind, optimizer in optimizers.items()}
    median = median_times(steps, 11, device)
    parameters = sum(math.prod(shape) for shape in shapes)
    for kind, seconds in median.items():
        print(f"{kind:15} {seconds / median['torch, fused']:5.2f} x torch's fused step "
              f"({parameters / 1e6:.1f}M parameters, {device})")
