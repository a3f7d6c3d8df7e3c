"""BERT from scratch: the encoder of Devlin et al. 2018 (section 3 and appendix A.2), on packed tokens.

Behind the interface of the course's minBERT: `BertModel.from_pretrained(name_or_folder)`, `embed`, `encode`, and
`model(input_ids, attention_mask)` with padded batches. Inside, the padding is dropped (attention.py says why). Any
published BERT checkpoint loads through one table of names, and is saved in the same layout, so that
`transformers.AutoModel.from_pretrained` opens what this file writes.

    python bert.py                 encode two sentences and compare with `transformers` where it is installed
    python bert.py --benchmark     what a training step costs, beside one around `transformers`; flags of the main script

Dimensions: B sequences in the batch, L tokens in the longest, T packed tokens, H hidden size.
"""
import copy
import dataclasses
import hashlib
import json
import pickle
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from attention import BertSelfAttention, Linear, Packing
from data.download import (DEFAULT_ENCODER, TOKENIZER_FILES, InputError, fetch_encoder,
                           weight_files, write_whole)
from data.tasks import read_vocabulary

# Published name -> our name, applied from top to bottom; from bottom to top, and right to left, when saving.
RENAMES = [
    ("embeddings.word_embeddings.", "word_embedding."),
    ("embeddings.position_embeddings.", "pos_embedding."),
    ("embeddings.token_type_embeddings.", "tk_type_embedding."),
    ("embeddings.LayerNorm.", "embed_layer_norm."),
    ("encoder.layer.", "bert_layers."),
    ("attention.self.", "self_attention."),
    ("attention.output.dense.", "attention_dense."),
    ("attention.output.LayerNorm.", "attention_layer_norm."),
    ("intermediate.dense.", "interm_dense."),
    ("output.dense.", "out_dense."),
    ("output.LayerNorm.", "out_layer_norm."),
    ("pooler.dense.", "pooler_dense."),
]


@dataclasses.dataclass
class BertConfig:
    """The fields of a published config.json that this encoder reads. The defaults are bert-base-uncased."""
    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_dropout_prob: float = 0.1
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02

    @classmethod
    def from_folder(cls, folder, model_type="bert"):
        """Read folder/config.json. Raises InputError where it is missing, broken, or describes another architecture."""
        path = Path(folder) / "config.json"
        try:
            fields = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{path}: cannot be read ({type(error).__name__}); a BERT folder has a config.json") from None
        for name, ours in (("model_type", model_type), ("hidden_act", "gelu"),
                           ("position_embedding_type", "absolute"), ("is_decoder", False)):
            if fields.get(name, ours) != ours:
                raise InputError(f"{path}: {name} is {fields[name]!r}, and this encoder has {ours!r} only")
        config = cls(**{f.name: fields[f.name] for f in dataclasses.fields(cls) if f.name in fields})
        for field in dataclasses.fields(cls):
            value = getattr(config, field.name)
            least = 1 if field.type is int else 0.0
            if not isinstance(value, (field.type, int)) or value < least or field.type is float and value >= 1:
                raise InputError(f"{path}: {field.name} is {value!r}")
        if config.hidden_size % config.num_attention_heads:
            raise InputError(f"{path}: hidden_size {config.hidden_size} is no multiple of "
                             f"num_attention_heads {config.num_attention_heads}")
        return config

    def save(self, folder, model_type="bert"):
        fields = {"architectures": ["BertModel"], "model_type": model_type, "hidden_act": "gelu",
                  "attention_probs_dropout_prob": 0.0, "pad_token_id": 0, **dataclasses.asdict(self)}
        write_whole(Path(folder) / "config.json",
                lambda path: path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8"))


class Dropout(nn.Dropout):
    """Zeros with probability p, to the nearest 1 / 65536, and the rest divided by 1 - p (Srivastava et al. 2014).

    On a CPU a mask takes 16 random bits a number, where torch may draw a double for each, on one core.
    """

    def forward(self, x):
        dropped = round(self.p * 2 ** 16)  # of the 2^16 values of 16 bits
        if not self.training or x.device.type != "cpu" or dropped in (0, 2 ** 16):
            return super().forward(x)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-2 ** 63, None).view(torch.int16)
        kept = (bits[:x.numel()] >= dropped - 2 ** 15).view(x.shape).to(x.dtype)
        return x * kept.mul_(2 ** 16 / (2 ** 16 - dropped))


class BertLayer(nn.Module):
    """Self-attention, then a feed-forward network, each added to its input and normalised (post-norm). (T, H) -> (T, H).

    added: (T, H), what an adapter adds beside the feed-forward network.
    """

    def __init__(self, config):
        super().__init__()
        H, eps = config.hidden_size, config.layer_norm_eps
        self.self_attention = BertSelfAttention(H, config.num_attention_heads)
        self.attention_dense = Linear(H, H)
        self.attention_dropout = Dropout(config.hidden_dropout_prob)
        self.attention_layer_norm = nn.LayerNorm(H, eps=eps)
        self.interm_dense = Linear(H, config.intermediate_size)
        self.out_dense = Linear(config.intermediate_size, H)
        self.out_dropout = Dropout(config.hidden_dropout_prob)
        self.out_layer_norm = nn.LayerNorm(H, eps=eps)

    def forward(self, hidden_states, packing, added=None):
        attention = self.attention_dropout(self.attention_dense(self.self_attention(hidden_states, packing)))
        hidden_states = self.attention_layer_norm(hidden_states + attention)
        feed_forward = self.out_dropout(self.out_dense(F.gelu(self.interm_dense(hidden_states))))  # exact (erf) GELU
        if added is not None:
            feed_forward = feed_forward + added
        return self.out_layer_norm(hidden_states + feed_forward)


class BertModel(nn.Module):
    """Embeddings, num_hidden_layers BertLayers, and a tanh layer over [CLS]."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        H = config.hidden_size
        self.word_embedding = nn.Embedding(config.vocab_size, H)
        self.pos_embedding = nn.Embedding(config.max_position_embeddings, H)
        self.tk_type_embedding = nn.Embedding(config.type_vocab_size, H)
        self.embed_layer_norm = nn.LayerNorm(H, eps=config.layer_norm_eps)
        self.embed_dropout = Dropout(config.hidden_dropout_prob)
        self.bert_layers = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))
        self.pooler_dense = Linear(H, H)
        self.apply(self._initialise)

    def _initialise(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def embed(self, input_ids, token_type_ids=None, position_ids=None):
        """Word + position + token type, normalised. (..., L) -> (..., L, H), or (T,) -> (T, H) with the positions given."""
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        if position_ids is None:
            position_ids = torch.arange(input_ids.size(-1), device=input_ids.device)
        embeddings = (self.word_embedding(input_ids) + self.pos_embedding(position_ids)
                      + self.tk_type_embedding(token_type_ids))
        return self.embed_dropout(self.embed_layer_norm(embeddings))

    def encode_packed(self, hidden_states, packing, adapter=None):
        """The layers, on packed tokens. (T, H) -> (T, H). adapter: a ProjectedAttention."""
        for i, layer in enumerate(self.bert_layers):
            added = None if adapter is None else adapter(i, hidden_states, packing)
            hidden_states = layer(hidden_states, packing, added)
        return hidden_states

    def encode(self, hidden_states, attention_mask):
        """The layers, on a padded batch. (B, L, H), (B, L) -> (B, L, H) with zeros on the padding."""
        packing = Packing(attention_mask, hidden_states.device)
        return packing.unpack(self.encode_packed(packing.pack(hidden_states), packing))

    def pack(self, input_ids, attention_mask, token_type_ids=None):
        """Drop the padding of a batch. Raises ValueError for an empty sequence, or a batch wider than the positions.

        Returns (T,) input_ids, (T,) token_type_ids or None, and the Packing, on the model's device. The ids end in zeros
        that fill T up.
        """
        if input_ids.size(1) > self.config.max_position_embeddings:
            raise ValueError(f"a batch {input_ids.size(1)} tokens wide, and the encoder has "
                             f"{self.config.max_position_embeddings} positions")
        packing = Packing(attention_mask, self.word_embedding.weight.device)
        return packing.pack(input_ids), None if token_type_ids is None else packing.pack(token_type_ids), packing

    def pool(self, first_tokens):  # (B, H) -> (B, H), the last states of [CLS]; as the authors' code has it
        return torch.tanh(self.pooler_dense(first_tokens))

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        """(B, L) each -> {"last_hidden_state": (B, L, H), zeros on the padding, "pooler_output": (B, H)}."""
        input_ids, token_type_ids, packing = self.pack(input_ids, attention_mask, token_type_ids)
        hidden_states = self.encode_packed(self.embed(input_ids, token_type_ids, packing.positions), packing)
        return {"last_hidden_state": packing.unpack(hidden_states),
                "pooler_output": self.pool(packing.first(hidden_states))}

    @classmethod
    def from_pretrained(cls, name_or_folder=DEFAULT_ENCODER, elsewhere=(), model_type="bert"):
        """A published checkpoint: a folder, the default encoder's name, or a model of the Hugging Face hub.

        Raises InputError where a tensor of the encoder is missing or misshapen, or where the files cannot be read. A
        missing pooler is initialised afresh, and tensors that no encoder has (an MLM head, say) are left; both are said.
        elsewhere: names of tensors that the caller reads by itself. model_type: what its config.json must say.
        """
        folder = fetch_encoder(str(name_or_folder))
        model = cls(BertConfig.from_folder(folder, model_type))
        path, published = read_checkpoint(folder)
        own, extra = model.state_dict(), []
        found = {}
        for name, tensor in published.items():
            ours = our_name(name)
            if ours not in own:
                if name not in elsewhere:
                    extra.append(name)
            elif ours in found:
                raise InputError(f"{path}: two tensors for {name}, with and without a prefix")
            elif tensor.shape != own[ours].shape:
                raise InputError(f"{path}: {name} has shape {tuple(tensor.shape)}, "
                                 f"config.json asks for {tuple(own[ours].shape)}")
            else:
                found[ours] = to_float(path, name, tensor)
        missing = [name for name in own if name not in found]
        if any(not name.startswith("pooler_dense.") for name in missing):
            raise InputError(f"{path}: no tensor for {', '.join(missing[:3])}"
                             f"{f' and {len(missing) - 3} more' if len(missing) > 3 else ''}; is it a BERT encoder?")
        if missing:
            print(f"{path}: has no pooler; it starts from random weights")
        if extra:
            print(f"{path}: not part of the encoder, left unused: {', '.join(extra)}")
        model.load_state_dict(found, strict=False)
        return model

    def save_pretrained(self, folder, vocabulary_folder=None, head=None, model_type="bert"):
        """Write config.json and model.safetensors with the published names, and a digest by which damage is noticed.

        vocabulary_folder: the folder whose vocabulary and tokenizer settings go along; a vocab.txt
        is written where it has a tokenizer.json alone. head: {name: tensor} to stand beside the
        encoder. model_type: for config.json; another one than "bert" where the encoder alone is
        not the model.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.save(folder, model_type)
        if vocabulary_folder:
            for name in TOKENIZER_FILES:
                if (vocabulary_folder / name).exists():
                    write_whole(folder / name,
                                lambda path: shutil.copyfile(vocabulary_folder / name, path))
            if not (vocabulary_folder / "vocab.txt").exists():
                lines = vocabulary_lines(read_vocabulary(vocabulary_folder)[1])
                write_whole(folder / "vocab.txt",
                            lambda path: path.write_text(lines, encoding="utf-8", newline="\n"))
        prefix = "bert." if head else ""  # as published: the names of an encoder with a head beside it have the prefix
        tensors = {prefix + published_name(name): tensor.contiguous() for name, tensor in self.state_dict().items()}
        tensors.update(head or {})
        metadata = {"format": "pt", "blake2b": tensor_digest(tensors)}
        write_whole(folder / "model.safetensors", lambda path: save_file(tensors, path, metadata=metadata))


def our_name(published):
    name = published.removeprefix("bert.")
    for theirs, ours in RENAMES:
        name = name.replace(theirs, ours)
    if name.endswith(".gamma") or name.endswith(".beta"):  # TensorFlow's names, in checkpoints of 2018
        name = name.replace(".gamma", ".weight").replace(".beta", ".bias")
    return name


def published_name(name):
    for theirs, ours in reversed(RENAMES):
        name = name.replace(ours, theirs)
    return name


def vocabulary_lines(vocabulary):
    """vocab.txt of {token: id}: the token of id 0, of id 1, ..., a line each.

    An id without a token, or whose token no text can match since there is a space or a line break
    in it, has an empty line, which no text matches either.
    """
    lines = [""] * (max(vocabulary.values()) + 1)
    for token, i in vocabulary.items():
        lines[i] = token if token.split() == [token] else ""
    return "".join(line + "\n" for line in lines)


def tensor_digest(tensors):
    """blake2b of the names and bytes of {name: tensor}, in the order of the names; 32 hex digits."""
    total = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        total.update(name.encode())
        total.update(tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def read_safetensors(path):
    """{name: tensor} of a file. Raises ValueError where the digest that save_pretrained stored does not fit."""
    with safe_open(path, "pt") as file:
        expected = (file.metadata() or {}).get("blake2b")
    tensors = load_file(path)
    if expected and tensor_digest(tensors) != expected:
        raise ValueError("some of its numbers are not those that were saved")
    return tensors


def read_checkpoint(folder):
    """(path, {published name: tensor}) of a folder's weights. A pickle is read without running it.

    path: the file to name in a message; the index of weights that are split into several files.
    """
    path, files = weight_files(folder)
    tensors = {}
    for file in files:
        try:
            read = (read_safetensors(file) if file.suffix == ".safetensors"
                    else dict(torch.load(file, map_location="cpu", weights_only=True)))
            if not all(isinstance(key, str) and isinstance(x, torch.Tensor)
                       for key, x in read.items()):
                raise TypeError
        except FileNotFoundError:
            raise InputError(f"{path}: {file.name}, which holds a part of the weights, "
                             "is not there") from None
        except (SafetensorError, pickle.UnpicklingError, RuntimeError, ValueError, TypeError,
                OSError, EOFError) as error:
            raise InputError(f"{file}: cannot be read as named tensors and nothing else "
                             f"({type(error).__name__}); it is damaged, or holds more than "
                             "weights") from None
        twice = sorted(tensors.keys() & read)
        if twice:
            raise InputError(f"{path}: {twice[0]} is in two of its files")
        tensors.update(read)

    name = next((key for key in tensors if key.endswith("embeddings.position_ids")), "")
    positions = tensors.pop(name, torch.arange(0)).flatten().cpu()
    if not torch.equal(positions, torch.arange(len(positions))):
        raise InputError(f"{path}: position_ids is not 0, 1, 2, ..., which this encoder assumes")
    return path, tensors


def to_float(path, name, tensor):
    """A tensor of a checkpoint in float32. Raises InputError for integers, which are quantized."""
    if not tensor.is_floating_point():
        raise InputError(f"{path}: {name} holds {tensor.dtype}, and weights are floating-point "
                         "numbers; is the checkpoint quantized?")
    return tensor.float()


def benchmark(flags, rounds=15):
    """Print the time of a training step on all tasks: packed, with its padding, in bfloat16, and around transformers' BERT.

    flags: of multitask_classifier.py. The variants take turns on the same batches; the first two rounds warm up. Beside each
    stands what share of the arithmetic rate of a large matrix product it reaches, a step being 6 operations for each
    parameter of the layers and each real token.
    """
    import numpy as np

    from checkpoint import autocast, get_device, median_times
    from data.batches import collate
    from data.tasks import locate
    from flags import resolve
    from multitask_classifier import build, task_loss
    from optimizer import AdamW
    from pcgrad import GradientBuffer, use_sparse_gradient

    args = resolve(["--option", "finetune", "--pair_head", "cross", *flags])
    folder, generator = fetch_encoder(args.model), np.random.default_rng(0)
    model, data = build(args, locate(args), folder)

    def ours(padded=False, amp=False):
        own = copy.deepcopy(model).train()
        own.amp = amp
        use_sparse_gradient(own.bert.word_embedding)
        gradients = GradientBuffer(own.shared_parameters(), {task: own.own_parameters(task) for task in own.tasks})
        optimizer = AdamW(own.parameters(), lr=1e-5)

        def step(batches):
            gradients.zero()
            for task, batch in batches:
                if padded:
                    batch = dataclasses.replace(batch, attention_mask=torch.ones_like(batch.attention_mask))
                gradients.backward(task, own.loss(task, batch))
            gradients.combine(seed=0)
            nn.utils.clip_grad_norm_(own.parameters(), 1.0)
            optimizer.step()
        return step

    def theirs(amp=False):
        from transformers import BertModel as Peer

        encoder, heads = Peer.from_pretrained(folder).to(args.device).train(), copy.deepcopy(model.heads).train()
        parameters = [*encoder.parameters(), *heads.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=1e-5)

        def step(batches):
            optimizer.zero_grad()
            for task, batch in batches:
                ids, mask, types, labels = (x.to(args.device) for x in (
                    batch.input_ids, batch.attention_mask, batch.token_type_ids, batch.labels))
                with autocast(model.device, amp):
                    states = encoder(ids, mask, types).last_hidden_state * mask.unsqueeze(-1)
                pooled = states.float().sum(dim=1) / mask.sum(dim=1, keepdim=True)
                task_loss(model.tasks[task], heads[task](pooled), labels).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        return step

    steps = {"packed, float32": ours(), "with its padding, float32": ours(padded=True)}
    try:
        get_device(args.use_gpu, amp=True)
        steps["packed, bfloat16"] = ours(amp=True)
        steps["transformers, bfloat16"] = theirs(amp=True)
    except (InputError, ImportError) as error:
        print(f"left out: {error}")
    try:
        steps["transformers, float32"] = theirs()
    except ImportError as error:
        print(f"left out: {error}")
    batches = [[(task, collate(data[task]["train"],
                               generator.permutation(len(data[task]["train"]))[:args.batch_size[task]]))
                for task in args.tasks] for _ in range(rounds + 2)]
    timed = {name: lambda i, step=step: step(batches[i]) for name, step in steps.items()}
    products = {name: next(dtype for dtype in ("float32", "bfloat16") if dtype in name) + " product" for name in steps}
    for name in set(products.values()):
        dtype = getattr(torch, name.split()[0])
        square, product = torch.randn(2048, 2048), Linear(2048, 2048, bias=False).requires_grad_(False)
        square, product = square.to(args.device, dtype), product.to(args.device, dtype)
        timed[name] = lambda i, square=square, product=product: product(square)
    median = median_times(timed, rounds, args.device)
    tokens = sum(int(batch.attention_mask.sum()) for step in batches for _, batch in step) / len(batches)
    operations = 6 * sum(p.numel() for p in model.bert.bert_layers.parameters()) * tokens
    print(f"a training step of {args.batch_size} rows, {tokens:.0f} tokens: medians of {rounds} over that of packed float32, "
          "and the share of the rate of a large matrix product:")
    for name in steps:
        rate = 2 * 2048 ** 3 / median[products[name]]
        print(f"  {name:28} {median[name] / median['packed, float32']:.2f}  {operations / median[name] / rate:4.0%}")


if __name__ == "__main__":
    if "--benchmark" in sys.argv:
        benchmark([flag for flag in sys.argv[1:] if flag != "--benchmark"])
        sys.exit()

    from data.tasks import load_tokenizer

    folder = fetch_encoder()
    encodings = load_tokenizer(folder).encode_batch(["An encoder reads the whole sentence at once.", "So does this one."])
    length = max(len(e.ids) for e in encodings)
    input_ids = torch.tensor([e.ids + [0] * (length - len(e.ids)) for e in encodings])  # (2, L)
    attention_mask = (input_ids != 0).long()
    model = BertModel.from_pretrained(folder).eval()
    with torch.no_grad():
        ours = model(input_ids, attention_mask)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    print({name: tuple(tensor.shape) for name, tensor in ours.items()})
    try:
        from transformers import BertModel as Peer
    except ImportError:
        print("transformers is not installed: no comparison")
    else:
        with torch.no_grad():
            theirs = Peer.from_pretrained(folder).eval()(input_ids, attention_mask)
        difference = (theirs.last_hidden_state - ours["last_hidden_state"])[attention_mask.bool()].abs().max()
        print(f"largest difference from transformers.BertModel: {difference:.1e}")
