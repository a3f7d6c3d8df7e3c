"""AdamW: Adam with the bias correction folded into the step size, then decoupled weight decay
(Kingma & Ba 2014, algorithm 1 in the "efficient" form at the end of section 2; Loshchilov & Hutter
2019, algorithm 2); the learning-rate schedule; and one update, which clips and sets the rate first.

    m <- b1 m + (1 - b1) g                      first moment
    v <- b2 v + (1 - b2) g^2                    second moment
    a  = lr sqrt(1 - b2^t) / (1 - b1^t)         step size, bias correction included
    theta <- theta - a m / (sqrt(v) + eps)
    theta <- theta - lr wd theta                lr, not a

torch.optim.AdamW adds its eps after the bias correction of v, and decays the old theta, as
Loshchilov & Hutter do, where the course decays the new one (an O(lr^2 wd) difference). With weight
decay 0 and eps_torch = eps / sqrt(1 - b2^t) the two make the same step. All three codes multiply
the decay by lr; in the paper it has the schedule's factor, but not the rate's peak.

    python optimizer.py        both on one problem
"""
import math

import torch
from torch import nn
from torch.optim import Optimizer

# Numbers per pass on a CPU. The tensors of a chunk (5 MiB) stay in the cache, so that memory is
# read once for all formulas.
CHUNK = 1 << 18


class AdamW(Optimizer):
    """AdamW with the course's constructor.

    A parameter whose gradient is None is left untouched: no momentum, no decay, no step counted.
    Raises ValueError for a hyperparameter out of range, or a sparse gradient.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0,
                 correct_bias=True):
        for name, value, valid in (
                ("lr", lr, lr >= 0), ("eps", eps, eps >= 0),
                ("betas", betas, len(betas) == 2 and all(0 <= beta < 1 for beta in betas)),
                ("weight_decay", weight_decay, weight_decay >= 0)):
            if not valid:
                raise ValueError(f"invalid {name}: {value}")
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
                                      correct_bias=correct_bias))

    @torch.no_grad()
    def step(self, closure=None):
        """One step on every parameter that has a gradient. Returns the closure's loss, if any."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for parameter in parameters:
                self._count(parameter)
            # chunk by chunk on a CPU; a GPU wants few launches, so all parameters at once there
            if parameters and parameters[0].device.type == "cpu":
                for parameter in parameters:
                    for tensors in self._chunks(parameter):
                        adamw([tensors], [self.state[parameter]["step"]], group)
            elif parameters:
                states = [self.state[p] for p in parameters]
                adamw([(p, p.grad, state["exp_avg"], state["exp_avg_sq"])
                       for p, state in zip(parameters, states)],
                      [state["step"] for state in states], group)
        return loss

    def _count(self, parameter):
        """One step more, with moments of zero before the first."""
        if parameter.grad.is_sparse:
            raise ValueError("a sparse gradient: let autograd add it into a dense .grad, "
                             "as with pcgrad.py's buffer")
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            for moment in ("exp_avg", "exp_avg_sq"):  # m, v
                state[moment] = torch.zeros_like(parameter,
                                                 memory_format=torch.contiguous_format)
        state["step"] += 1

    def _chunks(self, parameter):
        """(theta, g, m, v) of a parameter, piece by piece."""
        state = self.state[parameter]
        tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        if not all(x.is_contiguous() for x in tensors):
            return [tensors]
        return zip(*(x.view(-1).split(CHUNK) for x in tensors))


def adamw(tensors, steps, group):
    """The formulas above, in place, on several tensors that differ in their t.

    tensors: [(theta, g, m, v)]. steps: t of each.
    """
    thetas, gradients, ms, vs = map(list, zip(*tensors))
    lr, (beta1, beta2) = group["lr"], group["betas"]
    step_sizes = [lr] * len(steps)
    if group["correct_bias"]:
        step_sizes = [lr * math.sqrt(1 - beta2 ** t) / (1 - beta1 ** t) for t in steps]

    # torch._foreach_* are the functions of that name on a list: one launch for many tensors
    torch._foreach_lerp_(ms, gradients, 1 - beta1)  # lerp(m, g, w) = (1 - w) m + w g
    torch._foreach_mul_(vs, beta2)
    torch._foreach_addcmul_(vs, gradients, gradients, value=1 - beta2)
    denominators = torch._foreach_sqrt(vs)
    torch._foreach_add_(denominators, group["eps"])
    torch._foreach_addcdiv_(thetas, ms, denominators, [-step_size for step_size in step_sizes])
    if group["weight_decay"]:
        torch._foreach_mul_(thetas, 1 - lr * group["weight_decay"])


def learning_rate(peak, progress, warmup, schedule="linear"):
    """progress: the share of the run that is done, between 0 and 1. The rate rises from 0 in the
    first `warmup` of it; then it is "constant", or falls to 0 ("linear")."""
    if progress < warmup:
        return peak * progress / warmup
    return peak if schedule == "constant" else peak * (1 - progress) / (1 - warmup)


class ScheduledAdamW:
    """What an update does with the gradients: clip their global norm, set the learning rate, step.

    updates: how many there will be. clip: the largest norm, 0 for none. scaler: a GradScaler, by
    whose scale the losses were multiplied. Biases and LayerNorm, whose tensors have one dimension,
    do not decay.
    """

    def __init__(self, parameters, updates, lr, warmup, lr_schedule="linear", weight_decay=0.0,
                 clip=1.0, scaler=None):
        self.scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
        self.parameters, self.updates, self.done = list(parameters), updates, 0
        self.peak, self.lr, self.clip = lr, 0.0, clip
        self.warmup, self.lr_schedule = warmup, lr_schedule
        self.adamw = AdamW([
            {"params": [p for p in self.parameters if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in self.parameters if p.ndim < 2]}], lr=lr)

    def step(self):
        """Returns False where a gradient has overflowed in float16. Then nothing changes but the
        scale, which is halved."""
        self.scaler.unscale_(self.adamw)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip or math.inf)
        if self.scaler.is_enabled():
            self.scaler.update()
            if not norm.isfinite():
                return False

        self.done += 1
        progress = self.done / (self.updates + 1)  # the + 1: so that no update has rate 0
        self.lr = learning_rate(self.peak, progress, self.warmup, self.lr_schedule)
        for group in self.adamw.param_groups:  # one rate for all
            group["lr"] = self.lr
        self.adamw.step()
        return True

    def state_dict(self):
        return {"done": self.done, "lr": self.lr, "adamw": self.adamw.state_dict(),
                "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state):
        self.done, self.lr = state["done"], state["lr"]
        self.adamw.load_state_dict(state["adamw"])
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])


if __name__ == "__main__":
    def minimize(make_optimizer):
        """200 steps down a quadratic. Returns the end point and its loss."""
        torch.manual_seed(0)
        theta = nn.Parameter(torch.randn(1000, dtype=torch.float64))
        curvature = torch.linspace(.1, 10, 1000, dtype=torch.float64)
        optimizer = make_optimizer([theta])
        for _ in range(200):
            theta.grad = curvature * theta.detach()
            optimizer.step()
        return theta.detach(), float((curvature * theta.detach() ** 2).sum()) / 2

    ours, loss = minimize(lambda parameters: AdamW(parameters, lr=.01, eps=0.0))
    theirs, _ = minimize(lambda parameters: torch.optim.AdamW(parameters, lr=.01, eps=0.0,
                                                              weight_decay=0.0))
    print(f"200 steps down a quadratic: loss {loss:.4f}, "
          f"largest difference from torch.optim.AdamW {(ours - theirs).abs().max():.1e}")
