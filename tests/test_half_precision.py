"""--amp: which dtype a device has; float16, where losses are scaled, and an update whose gradients
overflow moves nothing. Here on a CPU, which is told that float16 is its half precision."""
import random
from unittest import mock

import torch

import multitask_classifier
import pretrain_mlm
from support import devices
from support.files import InputError
from support.run import read_metrics
from tests.helpers import (equal, killed_after, quietly, raises, resumable, run, same,
                           without_curves, workspace)

SCALE = 2 ** 8  # at the start of the runs here. GradScaler's 2^16 overflows in a first step or two


def float16(check):
    """Run a check with float16 as the CPU's half precision, from a scale that does not overflow."""
    scaler_of = torch.amp.GradScaler
    smaller = mock.patch("torch.amp.GradScaler", lambda device, enabled: scaler_of(
        device, init_scale=SCALE, enabled=enabled))
    dtype = mock.patch.object(devices, "half_precision", lambda device: torch.float16)
    return dtype(smaller(check))


def state_of(folder):
    """last.pt, as {name: tensor}, with the numbers as tensors too."""
    def flatten(value, name):
        if isinstance(value, dict):
            parts = (flatten(part, f"{name}/{key}") for key, part in value.items())
            return {key: x for part in parts for key, x in part.items()}
        if isinstance(value, (list, tuple)):
            return flatten(dict(enumerate(value)), name)
        return {name: value if torch.is_tensor(value) else torch.tensor(float(value))}

    last = torch.load(folder / "last.pt", weights_only=True)
    kept = ("model", "gradvac_targets", "optimizers", "teacher")
    return flatten({name: last[name] for name in kept if last[name] is not None}, "")


# ---------------------------------------------------------------- which dtype

def test_half_precision_is_what_the_hardware_computes_in():
    def cuda(bfloat16):
        supported = mock.patch("torch.cuda.is_bf16_supported", lambda including_emulation: bfloat16)
        with supported:
            return devices.half_precision("cuda")

    def cpu(bfloat16):
        with mock.patch("torch.cpu._is_avx512_bf16_supported", lambda: bfloat16):
            return devices.half_precision("cpu")

    assert (cuda(True), cuda(False)) == (torch.bfloat16, torch.float16)
    assert (cpu(True), cpu(False)) == (torch.bfloat16, None)
    assert devices.half_precision("mps") is None
    with mock.patch("torch.cpu._is_avx512_bf16_supported", lambda: False):
        raises(InputError, "--amp: this cpu device has no", devices.get_device, False, True)


def test_losses_are_scaled_only_in_float16():
    cpu = torch.device("cpu")
    for dtype, amp, scaled in ((torch.float16, True, True), (torch.float16, False, False),
                               (torch.bfloat16, True, False)):
        with mock.patch.object(devices, "half_precision", lambda device: dtype):
            scaler = devices.make_scaler(cpu, amp)
            assert scaler.scale(torch.ones(())).item() == (2 ** 16 if scaled else 1)
            with devices.autocast(cpu, amp):
                product = torch.ones(2, 2) @ torch.ones(2, 2)
            assert product.dtype == (dtype if amp else torch.float32)


# ---------------------------------------------------------------- float16

@float16
@without_curves
def test_float16_trains_to_the_losses_of_float32():
    for words in ([], ["--pcgrad"], ["--gradvac", "--proximal"], ["--pal", "--pal_size", 8],
                  ["--pair_head", "cross", "--pooling", "cls"]):
        runs = [run("--lr", 1e-3, *words, *amp, steps=20) for amp in ([], ["--amp"])]
        assert all(status == 0 for status, _, _ in runs), runs[-1][1]
        plain, half = (read_metrics(folder, "step")[-1] for _, _, folder in runs)
        assert half["losses"] != plain["losses"], "else it was not float16"
        for task, loss in plain["losses"].items():
            assert abs(half["losses"][task] - loss) < 0.02 * loss, (words, task)

        # the norms that are logged are those of the gradients themselves, not of scaled ones
        for task, norm in plain.get("gradients", {"norm": {}})["norm"].items():
            assert abs(half["gradients"]["norm"][task] - norm) < 0.02 * norm


def overflow_at(call):
    """Patch regularized_loss, so that the gradients of its n-th loss overflow in float16, though
    the loss itself does not."""
    calls, real = [0], multitask_classifier.regularized_loss

    def loss_of(*args):
        calls[0] += 1
        return real(*args) * (1e30 if calls[0] == call else 1)

    return mock.patch.object(multitask_classifier, "regularized_loss", loss_of)


@float16
@without_curves
def test_an_update_that_overflows_moves_nothing():
    """A run whose last of four steps overflows leaves what a run of three steps does: weights,
    moments, count of updates, Vaccine's targets and the teacher. Only the scale is halved."""
    steady = ["--amp", "--lr_schedule", "constant", "--warmup", 0, "--proximal",
              "--proximal_beta", 0.9, "--batch_size", 4]
    for words in (["--gradvac"], ["--gradvac", "--pal", "--pal_size", 8], ["--pcgrad"], []):
        _, _, three = run(*steady, *words, steps=3)
        with overflow_at(call=3 * 3 + 2):  # the second of three tasks in the fourth step
            status, printed, four = run(*steady, *words, steps=4)
        assert status == 0, printed

        before, after = state_of(three), state_of(four)
        scales = {name for name in before if "/scaler/scale" in name}
        growth = {name for name in before if "/scaler/_growth_tracker" in name}
        assert {float(before.pop(name)) for name in scales} == {SCALE}
        assert {float(after.pop(name)) for name in scales} == {SCALE / 2}
        for name in growth:  # the scale doubles after 2,000 updates without an overflow
            assert (before.pop(name), after.pop(name)) == (3, 0)
        assert same(before, after), words
        assert before["/optimizers/sst/done"] == 3

        last = read_metrics(four, "step")[-1]
        assert last["skipped_updates"] == 1 and "nan" not in str(last).lower()
        assert "skipped_updates" not in read_metrics(three, "step")[-1]


@float16
@without_curves
def test_training_continues_after_an_overflow():
    with overflow_at(call=2):
        status, printed, folder = run("--amp", "--pcgrad", "--lr", 1e-3, steps=5)
    assert status == 0, printed
    state = state_of(folder)
    assert state["/optimizers/sst/done"] == 4
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert read_metrics(folder, "step")[-1]["gradients"]["updates"] == 4


@float16
@without_curves
def test_a_float16_run_resumes_bit_identical():
    words = resumable(["--amp", "--gradvac", "--proximal"])
    whole, killed = (workspace() / "runs" / f"float16-{kind}" for kind in ("whole", "killed"))
    main = multitask_classifier.main
    with overflow_at(call=4):  # so that the scale is no longer the initial one
        status, printed = quietly(main, *words, "--name", whole)
    assert status == 0, printed
    with overflow_at(call=4):
        killed_after(random.randrange(3, 6), main, *words, "--name", killed)
    status, printed = quietly(main, "--resume", killed)
    assert status == 0 and equal(whole, killed), printed
    assert same(state_of(whole), state_of(killed))
    assert state_of(whole)["/optimizers/sst/scaler/scale"] == SCALE / 2


@float16
def test_pretraining_in_float16_learns_and_skips_an_overflow():
    real, calls = pretrain_mlm.F.cross_entropy, [0]

    def loss_of(logits, targets, **kwargs):
        calls[0] += not kwargs  # the held-out loss has a reduction
        factor = 1e30 if calls[0] == 3 and not kwargs else 1
        loss = real(logits, targets, **kwargs)
        return loss + (loss - loss.detach()) * (factor - 1)  # its gradient times the factor

    root = workspace()
    folder = root / "runs" / "float16-mlm"
    with mock.patch.object(pretrain_mlm.F, "cross_entropy", loss_of):
        status, printed = quietly(
            pretrain_mlm.main, "--model", root / "tiny", "--data_dir", root / "data", "--epochs", 1,
            "--epoch_length", 10, "--batch_size", 8, "--lr", 1e-2, "--amp", "--out", folder)
    assert status == 0, printed
    before, after = read_metrics(folder, "evaluation")
    assert after["loss"] < before["loss"]
    assert read_metrics(folder, "step")[-1]["skipped_updates"] == 1
