"""A pretend accelerator, for machines that have none: test_device.py runs the scripts on it.

A tensor on the device "pretend" is a shell around a CPU tensor, which does the arithmetic. What is
like CUDA is what fails or waits there: an operation that mixes tensors of the device with CPU
tensors raises an error, and each copy or question that makes the host wait for the device is
counted, by the line of the project that asked. What it cannot show: CUDA's kernels, and with them
its autocast and the fused attention; pinned memory; several processes over nccl.

Importing it adds the device to torch and replaces three functions of the project. So it needs a
process of its own, where it is imported before the scripts.
"""
import functools
import sys
from collections import Counter
from pathlib import Path

import torch
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

PROJECT = Path(__file__).resolve().parents[1]
aten = torch.ops.aten

copies = Counter()  # "file:line function" -> copies to the device that the host does not wait for
waits = Counter()  # the same for everything that the host waits for

# On CUDA these read numbers of the device: one, or as many as their result has.
READS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten._unique2,
         aten.unique_dim, aten.unique_consecutive, aten.repeat_interleave, aten.bincount}
INDEXING = {aten.index, aten._unsafe_index, aten.index_put, aten.index_put_,
            aten._unsafe_index_put, aten._index_put_impl_}


# ---------------------------------------------------------------- the device

class PretendTensor(torch.Tensor):
    """A tensor of the device. on_cpu: the CPU tensor that has its numbers."""

    # results are wrapped in `compute` alone
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, on_cpu):
        memory = {"strides": on_cpu.stride(), "storage_offset": on_cpu.storage_offset()}
        if on_cpu.layout != torch.strided:  # the sparse gradient of an embedding
            memory = {}
        tensor = torch.Tensor._make_wrapper_subclass(cls, on_cpu.size(), dtype=on_cpu.dtype,
                                                     layout=on_cpu.layout, device=DEVICE, **memory)
        tensor.on_cpu = on_cpu
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, *args, **kwargs or {})

    def tolist(self):
        return self.cpu().tolist()

    def untyped_storage(self):  # safetensors compares addresses
        return self.on_cpu.untyped_storage()

    def __reduce_ex__(self, protocol):
        return self.cpu().__reduce_ex__(protocol)  # torch.save; torch.load has map_location="cpu"


class PretendModule:
    """What torch asks of torch.cuda, here of torch.pretend. Random numbers are the CPU's."""
    is_available = is_initialized = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    synchronize = staticmethod(lambda: None)
    manual_seed_all = staticmethod(lambda seed: None)
    get_rng_state = staticmethod(lambda device: None)
    set_rng_state = staticmethod(lambda state, device: None)
    _is_in_bad_fork = staticmethod(lambda: False)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16])


def compute(function, *args, **kwargs):
    """One operation of torch that has a tensor of the device among its arguments, or makes one."""
    packet, device = function.overloadpacket, kwargs.get("device")
    if packet is aten.copy_:
        return copy_into(*args)
    if packet is aten._to_copy:
        return to_copy(*args, **kwargs)

    # the same on the CPU
    if device is not None:
        kwargs["device"] = torch.device("cpu")
    leaves, structure = pytree.tree_flatten((args, kwargs))
    inside = [x for x in leaves if isinstance(x, PretendTensor)]
    if inside:
        check(function, leaves, args[1] if packet in INDEXING else ())
    args, kwargs = pytree.tree_unflatten(
        [x.on_cpu if isinstance(x, PretendTensor) else x for x in leaves], structure)
    result = function(*args, **kwargs)
    if device is not None and device.type != DEVICE.type:
        return result

    # an operation in place returns the tensor that it was given
    given = {id(x.on_cpu): x for x in inside}
    assert all(x.shape == x.on_cpu.shape for x in inside), f"{function} resizes a tensor"
    return pytree.tree_map_only(
        torch.Tensor, lambda x: given[id(x)] if id(x) in given else PretendTensor(x), result)


def check(function, leaves, indices):
    """Raise an error where CUDA would, and count where it would make the host wait.

    leaves: all arguments, of which one at least is on the device. indices: those that are indices.
    """
    # from the CPU, CUDA takes indices, which it copies, and single numbers in arithmetic
    packet, indices = function.overloadpacket, [x for x in indices if x is not None]
    numbers = packet in INDEXING or torch.Tag.pointwise in function.tags
    outside = [x for x in leaves
               if isinstance(x, torch.Tensor) and not isinstance(x, PretendTensor)]
    for x in outside:
        if not (numbers and x.ndim == 0 or any(x is index for index in indices)):
            raise RuntimeError(f"{function} at {place()}: tensors on two devices, "
                               f"one of shape {tuple(x.shape)} on the CPU")

    # a mask of booleans is turned into positions first, whose number has to be known
    copied = any(x.device.type == "cpu" for x in indices)
    if packet in READS or copied or any(x.dtype == torch.bool for x in indices):
        waits[place()] += 1


def copy_into(target, source, non_blocking=False):
    """target.copy_(source), within the device or across."""
    note_copy(source, isinstance(target, PretendTensor), non_blocking)
    on_cpu = [x.on_cpu if isinstance(x, PretendTensor) else x for x in (target, source)]
    on_cpu[0].copy_(on_cpu[1])
    return target


def to_copy(source, device=None, non_blocking=False, **kwargs):
    """source.to(device or dtype), of a tensor of the device."""
    inside = device is None or device.type == DEVICE.type
    note_copy(source, inside, non_blocking)
    copied = aten._to_copy(source.on_cpu, **kwargs)
    return PretendTensor(copied) if inside else copied


def note_copy(source, to_device, non_blocking):
    """The host waits for every copy from the device, and for those to it that are blocking."""
    if isinstance(source, PretendTensor) != to_device:
        counted = copies if to_device and non_blocking else waits
        counted[place()] += 1


def place():
    """"file:line function" of the innermost line of the project that is being executed."""
    frame = sys._getframe(1)
    while frame:
        path = Path(frame.f_code.co_filename)
        ours = path.is_relative_to(PROJECT) and path != Path(__file__)
        if ours and "site-packages" not in path.parts:  # of an environment in this folder
            return f"{path.relative_to(PROJECT)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "a backward pass"


# Operations on tensors of the device come to PretendTensor, and those that make one from nothing to
# the fallback. Some need an entry of their own: the copy inside torch.tensor, and functions that
# would make an empty tensor and resize it, which a shell cannot do.
_setup_privateuseone_for_python_backend("pretend", PretendModule)
DEVICE = torch.device("pretend", 0)
fallback = torch.library.Library("_", "IMPL")
fallback.fallback(compute, "PrivateUse1")
entries = torch.library.Library("aten", "IMPL")
entries.impl("copy_", copy_into, "PrivateUse1")
for made in (aten.arange.default, aten.arange.start, aten.arange.start_step, aten.eye.default):
    entries.impl(made, functools.partial(compute, made), "PrivateUse1")


# ---------------------------------------------------------------- the project on it

# The other files import these three by name, so they are replaced before. --use_gpu gives the
# pretend device; copies to it may be non-blocking, as to CUDA; and the CPU has torch's own products
# and dropout, since a mask has to be of the same random numbers on both.
import attention  # noqa: E402
from support import devices, fast_cpu  # noqa: E402

devices.get_device = lambda use_gpu, amp: "pretend" if use_gpu else "cpu"
attention.to_device = lambda tensor, device: tensor.to(
    device, non_blocking=torch.device(device).type == DEVICE.type)
fast_cpu.accelerate = lambda model: model
