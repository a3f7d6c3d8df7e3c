"""What a training step of bert-base-uncased holds in memory, by arithmetic: 8 examples per task, in
float32, on a GPU.

    python results/speed/memory.py        writes the table of results/speed/README.md

Most of it follows from the number of parameters: weights, the rows of J (pcgrad.py), the moments of
AdamW and its denominators (optimizer.py), the teacher of the proximal term (smart.py). What is left
are the activations, the tensors that autograd keeps between the forward and the backward pass. Here
they are counted by a formula, and the formula is checked against what autograd does keep.

Dimensions: T packed tokens, n sequences of one length L, H hidden size, A attention heads; in a
padded batch B sequences of L tokens, the length of the longest.
"""
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from attention import Packing  # noqa: E402
from bert import BertConfig, BertModel  # noqa: E402
from data.batches import collate  # noqa: E402
from data.download import fetch_encoder  # noqa: E402
from data.tasks import DATA, TASKS, read_examples  # noqa: E402
from data.tokenizer import load_tokenizer, tokenize  # noqa: E402
from multitask_classifier import MultitaskBERT  # noqa: E402
from results.scores import table, write_tables  # noqa: E402

PAGE = HERE / "README.md"
BYTES = 4  # of a number in float32
BATCH_SIZE = 8
GPU = 16e9  # bytes of a T4, for example
TRAINED = ("sst", "para", "sts")


# ---------------------------------------------------------------- what follows from the parameters

def parameter_bytes(model, tasks, rows=1, teacher=False):
    """{what: bytes}. rows: of J, one for the plain sum, or one per task under surgery."""
    everything = [p.numel() for p in model.parameters()]
    shared = model.shared_parameters()
    trained = shared + [p for task in tasks for p in model.own_parameters(task)]

    # AdamW's denominators are there for one group of parameters at a time: matrices, or vectors
    matrices = sum(p.numel() for p in trained if p.ndim >= 2)
    vectors = sum(p.numel() for p in trained if p.ndim < 2)
    numbers = {"weights": sum(everything),
               "J": rows * sum(p.numel() for p in shared),
               "two moments of AdamW": 2 * (matrices + vectors),
               "denominators of AdamW": max(matrices, vectors),
               "teacher": teacher * sum(everything)}
    return {name: BYTES * count for name, count in numbers.items()}


# ---------------------------------------------------------------- activations

def activation_bytes(config, packing, device):
    """What autograd keeps of the encoder's forward pass. device: "cpu", or "cuda", where attention
    in float32 pads (attention.py).

    A layer keeps per token: its input, the output of attention, the inputs of two LayerNorms and
    the output of the first, 5 H; the feed-forward network before and after its GELU; two dropout
    masks, of H numbers each on a CPU (support/fast_cpu.py), of H bytes on a GPU; and what
    attention needs. The embeddings keep a LayerNorm's input and a mask; no layer keeps the last
    layer's output.
    """
    T, H = sum(packing.group_tokens), config.hidden_size
    layers, mask = config.num_hidden_layers, H if device == "cpu" else H / BYTES
    per_token = 5 * H + 2 * config.intermediate_size + 2 * mask
    of_attention = attention_numbers if device == "cpu" else padded_attention_numbers
    layer = T * per_token + of_attention(packing, H, config.num_attention_heads)
    return round(BYTES * (layers * layer + T * (H + mask)))


def attention_numbers(packing, H, A):
    """Of grouped_attention: query, key, value, and L probabilities per token and head. A group of
    several sequences keeps a copy of its own; a group of one keeps a view, and with it the query,
    key and value of all tokens."""
    copied = sum(n * L for n, L in packing.groups if n > 1)
    viewed = sum(packing.group_tokens) if any(n == 1 for n, _ in packing.groups) else 0
    return 3 * H * (copied + viewed) + A * sum(n * L * L for n, L in packing.groups)


def padded_attention_numbers(packing, H, A):
    """Of padded_attention by a fused kernel: query, key, value and output, padded, and one number
    per token and head, from which the probabilities are computed again."""
    B, L = packing.padded_shape
    return B * L * (4 * H + A)


def kept_bytes(model, forward):
    """What autograd keeps of forward(), measured: the bytes of the distinct tensors in its graph
    that are not the model's parameters."""
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()  # the same for all views of a tensor
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = forward()  # while it lives, no two of its tensors share an address
    del output
    return sum(kept.values())


# ---------------------------------------------------------------- the table

def base_model():
    """bert-base-uncased as report 1 trains it, with random weights."""
    return MultitaskBERT(BertModel(BertConfig()), {task: TASKS[task] for task in TRAINED},
                         dict.fromkeys(("para", "sts"), "uv_diff"), "cls", 0.3).train()


def largest_batch():
    """(its task, it) of the first batches of the three demo sets: that with the most tokens."""
    tokenizer, batches = load_tokenizer(fetch_encoder()), {}
    for task in TRAINED:
        path = DATA / "demo" / TASKS[task].filename("train")
        examples = tokenize(read_examples(path, TASKS[task]), tokenizer, 512, cross=False)
        batches[task] = collate(examples, list(range(BATCH_SIZE)))
    return max(batches.items(), key=lambda item: int(item[1].attention_mask.sum()))


def systems_of(model):
    """{column: (what follows from the parameters, graphs that are held at once)}. The smoothness
    term holds the graphs of two passes, the unperturbed and the perturbed one."""
    return {"plain": (parameter_bytes(model, TRAINED), 1),
            "PCGrad": (parameter_bytes(model, TRAINED, rows=len(TRAINED)), 1),
            "smoothness and proximal": (parameter_bytes(model, TRAINED, teacher=True), 2)}


def memory_table(model, batch):
    """MB of each part, for a batch and for one of the same size with the longest sequences."""
    config, columns = model.bert.config, systems_of(model)
    names = next(iter(columns.values()))[0]
    rows = [(name, *(megabytes(parts[name]) for parts, _ in columns.values())) for name in names]

    longest = torch.ones(len(batch.input_ids), config.max_position_embeddings)
    for words, mask in ((f"{int(batch.attention_mask.sum())} tokens", batch.attention_mask),
                        (f"{len(longest)} sequences of {longest.size(1)} tokens", longest)):
        activations = activation_bytes(config, Packing(mask), "cuda")
        held = [graphs * activations for _, graphs in columns.values()]
        totals = [sum(parts.values()) + here
                  for (parts, _), here in zip(columns.values(), held)]
        rows.append((f"activations of one task, {words}", *map(megabytes, held)))
        rows.append((f"sum, with {words}",
                     *(f"{megabytes(total)} ({total / GPU:.0%} of 16 GB)" for total in totals)))
    return table(("MB", *columns), rows)


def megabytes(count):
    return f"{count / 1e6:,.0f}"


if __name__ == "__main__":
    torch.manual_seed(0)
    model, (task, batch) = base_model(), largest_batch()
    write_tables(PAGE, {"memory": memory_table(model, batch)})

    formula = activation_bytes(model.bert.config, Packing(batch.attention_mask), "cpu")
    measured = kept_bytes(model, lambda: model.loss(task, batch))
    count = sum(p.numel() for p in model.parameters())
    print(f"{PAGE}: the table of memory is written; {count / 1e6:.1f} million parameters\n"
          f"{len(batch.indices)} examples of {task}, "
          f"{len(batch.input_ids)} sequences, {int(batch.attention_mask.sum())} tokens: autograd "
          f"keeps {megabytes(measured)} MB on this CPU, the formula's difference is "
          f"{abs(formula / measured - 1):.1%}")
