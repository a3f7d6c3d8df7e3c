"""Reading the weights of a published checkpoint: safetensors, or a pickle without running it; in
one file or in several."""
import pickle

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from data.download import weight_files
from support.files import InputError


def read_checkpoint(folder):
    """(path, {published name: tensor}) of a folder's weights. A pickle is read without running it.

    path: the file to name in a message; the index of weights that are split into several files.
    """
    # large weights are split into several files
    path, files = weight_files(folder)
    tensors = {}
    for file in files:
        part = read_tensors(file, path)
        twice = sorted(tensors.keys() & part)
        if twice:
            raise InputError(f"{path}: {twice[0]} is in two of its files")
        tensors.update(part)

    # old checkpoints store the positions 0, 1, 2, ...
    name = next((key for key in tensors if key.endswith("embeddings.position_ids")), "")
    positions = tensors.pop(name, torch.arange(0)).flatten().cpu()
    if not torch.equal(positions, torch.arange(len(positions))):
        raise InputError(f"{path}: position_ids is not 0, 1, 2, ..., which this encoder assumes")
    return path, tensors


def read_tensors(file, path):
    """{name: tensor} of one file of weights."""
    # a pickle can hold code; weights_only reads tensors and refuses the rest
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        tensors = dict(torch.load(file, map_location="cpu", weights_only=True))
        if all(isinstance(name, str) and isinstance(x, torch.Tensor)
               for name, x in tensors.items()):
            return tensors
        reason = "TypeError"
    except FileNotFoundError:
        raise InputError(f"{path}: {file.name}, which holds a part of the weights, "
                         "does not exist") from None
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, ValueError, TypeError, OSError,
            EOFError) as error:
        reason = type(error).__name__
    raise InputError(f"{file}: cannot be read as named tensors ({reason}); it is damaged, or holds "
                     "more than weights")


def to_float(path, name, tensor):
    """A tensor of a checkpoint in float32. Raises InputError for integers, which are quantized."""
    if not tensor.is_floating_point():
        raise InputError(f"{path}: {name} holds {tensor.dtype}, and weights are floating-point "
                         "numbers; is the checkpoint quantized?")
    return tensor.float()
