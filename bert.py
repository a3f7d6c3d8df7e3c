"""BERT from scratch: the encoder of Devlin et al. 2018 (section 3 and appendix A.2).

It has the interface of the course's minBERT: `BertModel.from_pretrained(name_or_folder)`, `embed`,
`encode`, and `model(input_ids, attention_mask)` on padded batches. Inside, the padding is dropped
(attention.py says why): the packed tokens of a batch pass through the layers as a (T, H) tensor.

Any published BERT checkpoint loads through one table of names, and is saved in the same layout, so
that `transformers.AutoModel.from_pretrained` opens what this file writes.

    python bert.py        encode two sentences; compare with `transformers` where it is installed

Dimensions: B sequences in the batch, L tokens in the longest, T packed tokens, H hidden size.
"""
import dataclasses
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from attention import BertSelfAttention, Packing
from data.download import DEFAULT_ENCODER, fetch_encoder
from data.tokenizer import copy_vocabulary
from support.files import InputError, write_atomically
from support.weights import read_checkpoint, to_float


# ---------------------------------------------------------------- the model

@dataclasses.dataclass
class BertConfig:
    """The fields of a published config.json that the encoder reads. Defaults: bert-base-uncased."""
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
        """Read folder/config.json. Raises InputError where it is missing, broken, or describes
        another architecture."""
        path = Path(folder) / "config.json"
        try:
            fields = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{path}: cannot be read ({type(error).__name__}); "
                             "a BERT folder has a config.json") from None

        # what other architectures set
        for name, ours in (("model_type", model_type), ("hidden_act", "gelu"),
                           ("position_embedding_type", "absolute"), ("is_decoder", False)):
            if fields.get(name, ours) != ours:
                raise InputError(f"{path}: {name} is {fields[name]!r}; this encoder supports only "
                                 f"{ours!r}")

        # the fields it shares with this class; what is not there has bert-base's value
        config = cls(**{field.name: fields[field.name] for field in dataclasses.fields(cls)
                        if field.name in fields})
        for field in dataclasses.fields(cls):
            # whole numbers are at least 1; the others are in [0, 1)
            value = getattr(config, field.name)
            least, below = (1, 2 ** 31) if field.type is int else (0, 1)
            if not isinstance(value, (field.type, int)) or not least <= value < below:
                raise InputError(f"{path}: {field.name} is {value!r}")
        if config.hidden_size % config.num_attention_heads:
            raise InputError(f"{path}: hidden_size {config.hidden_size} is no multiple of "
                             f"num_attention_heads {config.num_attention_heads}")
        return config

    def save(self, folder, model_type="bert"):
        fields = {"architectures": ["BertModel"], "model_type": model_type, "hidden_act": "gelu",
                  "attention_probs_dropout_prob": 0.0, "pad_token_id": 0,
                  **dataclasses.asdict(self)}
        text = json.dumps(fields, indent=2) + "\n"
        write_atomically(Path(folder) / "config.json",
                         lambda path: path.write_text(text, encoding="utf-8"))


class BertLayer(nn.Module):
    """Self-attention, then a feed-forward network, each added to its input and normalized
    afterwards ("post-norm"). (T, H) -> (T, H)."""

    def __init__(self, config):
        super().__init__()
        H, eps = config.hidden_size, config.layer_norm_eps
        self.self_attention = BertSelfAttention(H, config.num_attention_heads)
        self.attention_dense = nn.Linear(H, H)
        self.attention_dropout = nn.Dropout(config.hidden_dropout_prob)
        self.attention_layer_norm = nn.LayerNorm(H, eps=eps)
        self.interm_dense = nn.Linear(H, config.intermediate_size)
        self.out_dense = nn.Linear(config.intermediate_size, H)
        self.out_dropout = nn.Dropout(config.hidden_dropout_prob)
        self.out_layer_norm = nn.LayerNorm(H, eps=eps)

    def forward(self, hidden_states, packing, pal_output=None):
        """pal_output: (T, H), what a task's projected attention layer makes of this layer's input;
        it is added beside the feed-forward network."""
        # the handout's add_norm: add to the input, then normalize
        attention = self.attention_dense(self.self_attention(hidden_states, packing))
        hidden_states = self.attention_layer_norm(hidden_states + self.attention_dropout(attention))

        # the same for the feed-forward network, and where there is one, a task's own term
        feed_forward = self.out_dense(F.gelu(self.interm_dense(hidden_states)))  # exact (erf) GELU
        feed_forward = self.out_dropout(feed_forward)
        if pal_output is not None:
            feed_forward = feed_forward + pal_output
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
        self.embed_dropout = nn.Dropout(config.hidden_dropout_prob)
        self.bert_layers = nn.ModuleList(BertLayer(config)
                                         for _ in range(config.num_hidden_layers))
        self.pooler_dense = nn.Linear(H, H)
        self.apply(self._initialize)

    def _initialize(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def embed(self, input_ids, token_type_ids=None, position_ids=None):
        """Word + position + token type, normalized. (..., L) -> (..., L, H); or packed, (T,) ->
        (T, H) with the positions given."""
        # by default token type 0, and positions 0, 1, 2, ...
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        if position_ids is None:
            position_ids = torch.arange(input_ids.size(-1), device=input_ids.device)
        embeddings = (self.word_embedding(input_ids) + self.pos_embedding(position_ids)
                      + self.tk_type_embedding(token_type_ids))
        return self.embed_dropout(self.embed_layer_norm(embeddings))

    def encode(self, hidden_states, attention_mask):
        """The layers, on a padded batch. (B, L, H), (B, L) -> (B, L, H), zeros on the padding."""
        packing = Packing(attention_mask, hidden_states.device)
        return packing.unpack(self.encode_packed(packing.pack(hidden_states), packing))

    def encode_packed(self, hidden_states, packing, pal=None):
        """The layers, on packed tokens. (T, H) -> (T, H). pal: a task's ProjectedAttention."""
        for i, layer in enumerate(self.bert_layers):
            pal_output = None
            if pal is not None:
                pal_output = pal(i, hidden_states, packing)
            hidden_states = layer(hidden_states, packing, pal_output)
        return hidden_states

    def pack(self, input_ids, attention_mask, token_type_ids=None):
        """Drop the padding of a batch. Returns (T,) input_ids, (T,) token_type_ids or None, and the
        Packing, on the model's device.

        Raises ValueError for an empty sequence, or a batch wider than the positions.
        """
        if input_ids.size(1) > self.config.max_position_embeddings:
            raise ValueError(f"a batch {input_ids.size(1)} tokens wide, and the encoder has "
                             f"{self.config.max_position_embeddings} positions")
        packing = Packing(attention_mask, self.word_embedding.weight.device)
        if token_type_ids is not None:
            token_type_ids = packing.pack(token_type_ids)
        return packing.pack(input_ids), token_type_ids, packing

    def pool(self, first_tokens):
        """What BERT makes of the last states of [CLS]. (B, H) -> (B, H)."""
        return torch.tanh(self.pooler_dense(first_tokens))

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        """(B, L) each -> {"last_hidden_state": (B, L, H), zeros on the padding,
        "pooler_output": (B, H)}."""
        ids, types, packing = self.pack(input_ids, attention_mask, token_type_ids)
        hidden_states = self.embed(ids, types, packing.positions)  # (T, H)
        hidden_states = self.encode_packed(hidden_states, packing)
        return {"last_hidden_state": packing.unpack(hidden_states),
                "pooler_output": self.pool(packing.first(hidden_states))}

    @classmethod
    def from_pretrained(cls, name_or_folder=DEFAULT_ENCODER, ignore=(), model_type="bert"):
        """A published checkpoint: a folder, the default encoder's name, or a model of the Hugging
        Face hub.

        ignore: names of tensors that the caller reads by itself. model_type: what its config.json
        must have. A missing pooler is initialized at random, and tensors that no encoder has (an
        MLM head, for example) are left unused; both are reported. Raises InputError where a tensor
        of the encoder is missing or misshapen, or where a file cannot be read.
        """
        folder = fetch_encoder(str(name_or_folder))
        model = cls(BertConfig.from_folder(folder, model_type))
        path, published = read_checkpoint(folder)

        # every tensor is used once, or named in a message
        own = model.state_dict()
        found, unused = {}, []
        for name, tensor in published.items():
            ours = our_name(name)
            if ours not in own:
                unused.append(name)
            elif ours in found:
                raise InputError(f"{path}: two tensors for {name}, with and without a prefix")
            elif tensor.shape != own[ours].shape:
                raise InputError(f"{path}: {name} has shape {tuple(tensor.shape)}, "
                                 f"config.json asks for {tuple(own[ours].shape)}")
            else:
                found[ours] = to_float(path, name, tensor)

        # only the pooler may be missing: sentence encoders are often published without it
        missing = [name for name in own if name not in found]
        if any(not name.startswith("pooler_dense.") for name in missing):
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise InputError(f"{path}: no tensor for {', '.join(missing[:3])}{more}; "
                             "is it a BERT encoder?")
        if missing:
            print(f"{path}: has no pooler; it starts from random weights")
        unused = [name for name in unused if name not in ignore]
        if unused:
            print(f"{path}: not part of the encoder, left unused: {', '.join(unused)}")
        model.load_state_dict(found, strict=False)
        return model

    def save_pretrained(self, folder, vocabulary_folder=None, head=None, model_type="bert"):
        """Write config.json and model.safetensors in the published layout.

        vocabulary_folder: the folder whose vocabulary and tokenizer settings are copied. head:
        {name: tensor} of all that stands beside the encoder. model_type: for config.json; another
        one than "bert" where the layers are not plain BERT's.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.save(folder, model_type)
        if vocabulary_folder:
            copy_vocabulary(vocabulary_folder, folder)

        # as published: beside a head, the names of the encoder's tensors have a prefix
        prefix = "bert." if head else ""
        tensors = {prefix + published_name(name): tensor.contiguous()
                   for name, tensor in self.state_dict().items()}
        tensors.update(head or {})
        write_atomically(folder / "model.safetensors",
                         lambda path: save_file(tensors, path, metadata={"format": "pt"}))


# ---------------------------------------------------------------- published checkpoints

# Published name -> our name. Loading applies them from top to bottom, saving from bottom to top.
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


def our_name(published):
    name = published.removeprefix("bert.")
    for theirs, ours in RENAMES:
        name = name.replace(theirs, ours)
    if name.endswith((".gamma", ".beta")):  # TensorFlow's names, in checkpoints of 2018
        name = name.replace(".gamma", ".weight").replace(".beta", ".bias")
    return name


def published_name(name):
    for theirs, ours in reversed(RENAMES):
        name = name.replace(ours, theirs)
    return name


if __name__ == "__main__":
    from data.tokenizer import load_tokenizer

    folder = fetch_encoder()
    sentences = ["An encoder reads the whole sentence at once.", "So does this one."]
    encodings = load_tokenizer(folder).encode_batch(sentences)
    length = max(len(encoding.ids) for encoding in encodings)
    input_ids = torch.tensor([encoding.ids + [0] * (length - len(encoding.ids))
                              for encoding in encodings])  # (2, L)
    attention_mask = (input_ids != 0).long()

    model = BertModel.from_pretrained(folder).eval()
    with torch.no_grad():
        ours = model(input_ids, attention_mask)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    print({name: tuple(tensor.shape) for name, tensor in ours.items()})

    try:
        from transformers import BertModel as TransformersBert
    except ImportError:
        print("transformers is not installed: no comparison")
    else:
        with torch.no_grad():
            theirs = TransformersBert.from_pretrained(folder).eval()(input_ids, attention_mask)
        difference = theirs.last_hidden_state - ours["last_hidden_state"]
        largest = difference[attention_mask.bool()].abs().max()
        print(f"largest difference from transformers.BertModel: {largest:.1e}")
