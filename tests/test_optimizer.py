"""optimizer.py: AdamW, the learning-rate schedule, and the update of both with clipping."""
import io
import itertools
import math

import torch
from torch import nn

from optimizer import CHUNK, AdamW, ScheduledAdamW, adamw, learning_rate
from tests.helpers import raises


# ---------------------------------------------------------------- AdamW

def test_adamw_is_the_formula_of_its_docstring():
    """A thousand steps in float64, with and without bias correction and weight decay."""
    for correct_bias, weight_decay in itertools.product((True, False), (0.0, 0.1)):
        parameter = nn.Parameter(torch.randn(300, dtype=torch.float64))
        optimizer = AdamW([parameter], lr=1e-2, weight_decay=weight_decay,
                          correct_bias=correct_bias)
        theta, m, v = parameter.detach().clone(), 0, 0
        for t in range(1, 1001):
            g = torch.randn(len(theta), dtype=torch.float64)
            parameter.grad = g.clone()
            optimizer.step()

            m = 0.9 * m + 0.1 * g
            v = 0.999 * v + 0.001 * g * g
            a = 1e-2
            if correct_bias:
                a = 1e-2 * math.sqrt(1 - 0.999 ** t) / (1 - 0.9 ** t)
            theta = theta - a * m / (v.sqrt() + 1e-6)
            theta = theta - 1e-2 * weight_decay * theta
        assert (parameter - theta).abs().max() < 1e-12


def test_adamw_takes_settings_other_than_the_defaults():
    """Betas and eps, each far from its default; two steps, since the first forgets beta_1."""
    parameter = nn.Parameter(torch.randn(50, dtype=torch.float64))
    optimizer = AdamW([parameter], lr=0.1, betas=(0.5, 0.75), eps=0.01)
    theta, m, v = parameter.detach().clone(), 0, 0
    for t in (1, 2):
        g = torch.randn(50, dtype=torch.float64)
        parameter.grad = g.clone()
        optimizer.step()
        m, v = 0.5 * m + 0.5 * g, 0.75 * v + 0.25 * g * g
        a = 0.1 * math.sqrt(1 - 0.75 ** t) / (1 - 0.5 ** t)
        theta = theta - a * m / (v.sqrt() + 0.01)
    assert (parameter - theta).abs().max() < 1e-12


def test_many_tensors_at_once_move_as_one_by_one():
    """What a GPU does: `adamw` on a list, whose tensors may have made different numbers of steps.
    """
    group = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.1,
             "correct_bias": True}
    tensors = [[torch.randn(shape) for _ in range(3)] + [torch.rand(shape)]
               for shape in ((5,), (2, 3), (4, 1, 2))]
    alone = [[x.clone() for x in each] for each in tensors]
    adamw(tensors, [1, 7, 300], group)
    for each, t in zip(alone, (1, 7, 300)):
        adamw([each], [t], group)
    for together, single in zip(tensors, alone):
        assert all(torch.equal(a, b) for a, b in zip(together, single))


def test_adamw_works_in_chunks():
    """A parameter longer than a chunk, and one whose memory is not contiguous, move as their
    numbers would one by one."""
    for values in (torch.randn(CHUNK + 1000), torch.randn(4, 6).t()):
        parameter, g = nn.Parameter(values.clone()), torch.randn(values.shape)
        assert parameter.is_contiguous() == values.is_contiguous()
        parameter.grad = g.clone()
        AdamW([parameter], lr=0.1).step()
        step_size = 0.1 * math.sqrt(0.001) / 0.1
        expected = values - step_size * 0.1 * g / ((0.001 * g * g).sqrt() + 1e-6)
        assert (parameter - expected).abs().max() < 1e-5


def test_adamw_equals_torch_where_both_make_the_same_step():
    """With weight decay 0, and torch's eps = eps / sqrt(1 - b2^t)."""
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 50, dtype=torch.float64)) for _ in range(2))
    optimizer = AdamW([ours], lr=1e-2)
    peer = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.0)
    for t in range(1, 101):
        ours.grad = torch.randn(50, dtype=torch.float64)
        theirs.grad = ours.grad.clone()
        peer.param_groups[0]["eps"] = 1e-6 / math.sqrt(1 - 0.999 ** t)
        optimizer.step()
        peer.step()
    assert (ours - theirs).abs().max() < 1e-12


def test_adamw_leaves_a_parameter_without_gradient_alone():
    """No momentum moves it, it does not decay, and no step is counted."""
    moved, idle = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = AdamW([moved, idle], lr=0.1, weight_decay=0.1)

    def all_of(parameter):
        state = optimizer.state[parameter].values()
        return [torch.as_tensor(x).clone() for x in (parameter.detach(), *state)]

    for parameter in (moved, idle):
        parameter.grad = torch.ones(3)
    optimizer.step()
    before = all_of(idle)
    idle.grad = None
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, all_of(idle), strict=True))
    assert optimizer.state[moved]["step"] == 2 and optimizer.state[idle]["step"] == 1


def test_adamw_rejects_settings_that_are_out_of_range():
    parameter = nn.Parameter(torch.ones(3))
    for name, value in (("lr", -1.0), ("eps", -1e-9), ("betas", (1.0, 0.999)),
                        ("betas", (0.9, 1.0)), ("betas", (-0.1, 0.999)), ("betas", (0.9,)),
                        ("weight_decay", -0.1)):
        raises(ValueError, f"invalid {name}: {value}", AdamW, [parameter], **{name: value})
    AdamW([parameter], lr=0.0, betas=(0.0, 0.0), eps=0.0)  # the ends of the ranges

    words = nn.Embedding(5, 2, sparse=True)
    words(torch.tensor([1])).sum().backward()
    raises(ValueError, "a sparse gradient", AdamW(words.parameters()).step)


def test_adamw_calls_its_closure_with_gradients_enabled():
    parameter = nn.Parameter(torch.tensor([3.0]))
    optimizer = AdamW([parameter], lr=0.1)

    def closure():
        loss = parameter.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 9.0
    assert parameter.item() < 3.0 and optimizer.step() is None


# ---------------------------------------------------------------- learning rate

def test_learning_rate_rises_and_falls():
    progress = 0, 0.125, 0.25, 0.625, 1
    assert [learning_rate(2.0, p, 0.25) for p in progress] == [0, 1, 2, 1, 0]
    assert [learning_rate(2.0, p, 0.25, "constant") for p in progress] == [0, 1, 2, 2, 2]
    assert learning_rate(2.0, 0, 0) == learning_rate(2.0, 0, 0, "constant") == 2


# ---------------------------------------------------------------- ScheduledAdamW

def two_parameters():
    """A matrix, and a bias."""
    return [nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(4))]


def set_gradients(parameters, seed=0, norm=None):
    """Random gradients of this seed, scaled to this global norm."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    if norm is not None:
        scale = norm / math.sqrt(sum(float(p.grad.square().sum()) for p in parameters))
        for parameter in parameters:
            parameter.grad *= scale


def test_an_update_clips_the_global_norm():
    """One norm over all parameters; a smaller one and a parameter without a gradient stay."""
    parameters = [*two_parameters(), nn.Parameter(torch.ones(2))]
    for clip, norm, expected in ((0.5, 3.0, 0.5), (0.5, 0.25, 0.25), (0, 3.0, 3.0)):
        optimizer = ScheduledAdamW(parameters, updates=10, lr=1e-3, warmup=0.1, clip=clip)
        set_gradients(parameters[:2], norm=norm)
        before = [p.grad.clone() for p in parameters[:2]]
        optimizer.step()
        for parameter, gradient in zip(parameters, before):
            assert (parameter.grad - gradient * (expected / norm)).abs().max() < 1e-5
    assert torch.equal(parameters[2], torch.ones(2))


def test_an_update_sets_the_rate_before_it_steps():
    """The rate of the u-th of U updates is that of progress u / (U + 1), so none has rate 0; AdamW
    with these rates, set by hand, gives the same weights."""
    for lr_schedule in ("linear", "constant"):
        parameters = two_parameters()
        twins = [nn.Parameter(p.detach().clone()) for p in parameters]
        optimizer = ScheduledAdamW(parameters, updates=7, lr=1e-2, warmup=0.5,
                                   lr_schedule=lr_schedule, clip=0)
        by_hand, rates = AdamW(twins), []
        for update in range(1, 8):
            set_gradients(parameters, seed=update)
            set_gradients(twins, seed=update)
            optimizer.step()
            rates.append(optimizer.lr)
            by_hand.param_groups[0]["lr"] = learning_rate(1e-2, update / 8, 0.5, lr_schedule)
            by_hand.step()
            assert all(torch.equal(a, b) for a, b in zip(parameters, twins, strict=True))

        shares = {"linear": [1, 2, 3, 4, 3, 2, 1], "constant": [1, 2, 3, 4, 4, 4, 4]}[lr_schedule]
        assert all(abs(rate - 1e-2 * share / 4) < 1e-12 for rate, share in zip(rates, shares))
        assert len(rates) == optimizer.done == optimizer.updates == 7


def test_biases_and_norms_do_not_decay():
    """With a gradient of 0 only decay moves a parameter."""
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    for parameter in model.parameters():
        nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    optimizer = ScheduledAdamW(model.parameters(), updates=1, lr=0.1, warmup=0.0,
                               lr_schedule="constant", weight_decay=0.25)
    optimizer.step()
    for name, parameter in model.named_parameters():
        expected = 0.975 if name in ("0.weight", "1.weight") else 1.0
        assert torch.allclose(parameter, torch.tensor(expected), atol=1e-7, rtol=0), name


# ---------------------------------------------------------------- saving

def resumes_to_the_same_bits(build):
    """build() -> (parameters, optimizer), the same in each call. Six updates equal three, a save of
    weights and state to a file that is read without running code, and three more."""
    def update(parameters, optimizer, seeds):
        for seed in seeds:
            set_gradients(parameters, seed)
            optimizer.step()

    whole, optimizer = build()
    update(whole, optimizer, range(6))

    parameters, optimizer = build()
    update(parameters, optimizer, range(3))
    file = io.BytesIO()
    torch.save((optimizer.state_dict(), [p.data for p in parameters]), file)
    file.seek(0)
    state, values = torch.load(file, weights_only=True)

    parameters, optimizer = build()
    optimizer.load_state_dict(state)
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data.copy_(value)
    update(parameters, optimizer, range(3, 6))
    return all(torch.equal(a, b) for a, b in zip(whole, parameters, strict=True))


def test_adamw_resumes_to_the_same_bits():
    matrix, turned = torch.randn(5, 4), torch.randn(4, 6)

    def build():
        # the second parameter is not contiguous
        parameters = [nn.Parameter(matrix.clone()), nn.Parameter(turned.clone().t())]
        groups = [{"params": parameters[:1], "weight_decay": 0.1}, {"params": parameters[1:]}]
        return parameters, AdamW(groups, lr=0.1)

    assert resumes_to_the_same_bits(build)


def test_a_scheduled_adamw_resumes_to_the_same_bits():
    """Moments, the number of updates, and with it the learning rate."""
    matrix, bias, built = torch.randn(5, 4), torch.randn(4), []

    def build():
        parameters = [nn.Parameter(matrix.clone()), nn.Parameter(bias.clone())]
        built.append(ScheduledAdamW(parameters, updates=6, lr=0.1, warmup=0.5, weight_decay=0.1))
        return parameters, built[-1]

    assert resumes_to_the_same_bits(build)
    undisturbed, _, resumed = built
    assert undisturbed.done == resumed.done == 6 and undisturbed.lr == resumed.lr

    # at once, before the next update sets them
    _, loaded = build()
    loaded.load_state_dict(undisturbed.state_dict())
    assert loaded.done == 6 and loaded.lr == undisturbed.lr > 0
