"""Devices and processes: CPU, CUDA or MPS; one process, or several started by torchrun."""
import contextlib
import math
import os

import torch
from torch import distributed

from data.download import fetch_encoder
from support.files import InputError


def get_device(use_gpu, amp):
    """"cpu", "cuda" or "mps". Raises InputError where there is no GPU to use, or no half precision
    for --amp."""
    device = "cpu"
    if use_gpu and torch.cuda.is_available():
        device = "cuda"
    elif use_gpu and torch.backends.mps.is_available():
        device = "mps"
    elif use_gpu:
        raise InputError("--use_gpu: torch sees neither a CUDA device nor an Apple GPU; "
                         "leave the flag out to use the CPU")
    if amp and half_precision(device) is None:
        raise InputError(f"--amp: this {device} device has no bfloat16 arithmetic "
                         "(a CPU needs avx512_bf16)")
    return device


def half_precision(device):
    """The dtype of --amp: bfloat16 where the hardware computes in it rather than emulates it, or
    else float16 on CUDA (before Ampere: a T4, for example). None on MPS and on other CPUs."""
    if device == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bfloat16 else torch.float16
    # a private name, but torch 2.11 has no other test for a CPU
    has_bfloat16 = device == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if has_bfloat16 else None


def autocast(device, amp):
    """The context of the encoder's forward pass: half precision where `amp`. A run that was made
    with it computes in float32 on a machine that has none."""
    dtype = half_precision(device.type) if amp else None
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


def make_scaler(device, amp):
    """For float16, whose smallest numbers would swallow small gradients: the losses are multiplied
    by a large factor, and the gradients divided by it before they are used. Otherwise disabled: it
    changes nothing."""
    enabled = amp and half_precision(device.type) is torch.float16
    return torch.amp.GradScaler(device.type if enabled else "cpu", enabled=enabled)


def sparse_embedding(model, device):
    """Let autograd compute the word embedding's gradient for the words of a batch alone, and add it
    to the row of J. Not on MPS, which has no sparse tensors."""
    model.bert.word_embedding.sparse = torch.device(device).type != "mps"


# ---------------------------------------------------------------- several processes

def process_environment():
    """(rank, rank on this machine, number of processes) as torchrun sets them; (0, 0, 1) without.

    Raises InputError where the variables are only partly set, or have impossible values.
    """
    if not {"WORLD_SIZE", "RANK"} & os.environ.keys():
        return 0, 0, 1
    numbers = {}  # WORLD_SIZE is read first: a single process needs none of the others
    for name, least, below in (("WORLD_SIZE", 1, math.inf), ("RANK", 0, math.inf),
                               ("LOCAL_RANK", 0, math.inf), ("MASTER_PORT", 0, 2 ** 16)):
        try:
            numbers[name] = int(os.environ.get(name, ""))
        except ValueError:
            raise wrong_environment(name) from None
        if not least <= numbers[name] < below:
            raise wrong_environment(name)
        if numbers["WORLD_SIZE"] == 1:
            return 0, 0, 1
    if numbers["RANK"] >= numbers["WORLD_SIZE"]:
        raise wrong_environment("RANK")
    if not os.environ.get("MASTER_ADDR"):
        raise wrong_environment("MASTER_ADDR")
    return numbers["RANK"], numbers["LOCAL_RANK"], numbers["WORLD_SIZE"]


def wrong_environment(name):
    value = repr(os.environ[name][:40]) if name in os.environ else "not set"
    return InputError(f"the environment variable {name} is {value}: start several processes with "
                      "torchrun, which sets all of them; for one process unset WORLD_SIZE and RANK")


def join_processes(device):
    """Meet the other processes where torchrun started several: one per GPU over nccl, or several on
    the CPU over gloo.

    device: "cpu", "cuda" or "mps". The processes share a file system: the first one writes the
    run's folder, and all read the best epoch from it.
    """
    _, local_rank, world = process_environment()
    if world == 1:
        return
    if device == "mps":
        raise InputError("--use_gpu with several processes: an Apple machine has one GPU; "
                         "leave out torchrun")
    if device == "cpu":
        distributed.init_process_group("gloo")
        return
    if local_rank >= torch.cuda.device_count():
        raise InputError(f"--nproc_per_node is more than the {torch.cuda.device_count()} GPUs of "
                         "this machine")
    torch.cuda.set_device(local_rank)
    distributed.init_process_group("nccl", device_id=torch.device("cuda", local_rank))


def rank_and_world():
    """This process's number, and how many there are; (0, 1) without torchrun."""
    if not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def sum_over_processes(tensor):
    """In place. Returns the tensor."""
    if distributed.is_initialized():
        distributed.all_reduce(tensor)
    return tensor


def fetch_encoder_once(args):
    """The folder of the encoder args.model. The first of several processes downloads it and
    names the run (the time is in the name), while the others wait in the broadcast of the name."""
    rank, _ = rank_and_world()
    if rank == 0:
        folder = fetch_encoder(args.model)
    if distributed.is_initialized():
        name = [args.name]
        distributed.broadcast_object_list(name)
        args.name, = name
    return folder if rank == 0 else fetch_encoder(args.model)
