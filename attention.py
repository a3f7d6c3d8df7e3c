"""Multi-head self-attention (Vaswani et al. 2017, section 3.2), and projected attention layers
(Stickland & Murray 2019).

Sentences of a batch have different lengths, so the textbook pads them to the longest and masks the
padding. But a padded batch is mostly padding: random batches of 32 sentence pairs of STS, read as
one sequence each, are 41 % text. So the encoder drops the padding. It lays the real tokens of all
sequences end to end ("packed"), and every linear layer, norm and activation runs on these tokens:

    padded, (B, L)     a a a . .          packed, (T,)     a a a c c c b b b b b
                       b b b b b
                       c c c . .          groups           2 sequences of 3 tokens, 1 of 5

(followed by tokens that nothing reads, up to a multiple of 32, for speed).

Only attention must know which tokens belong together. The sequences are ordered by length, so that
all those of one length are a dense block, which needs no mask. That suits a CPU. A GPU wants few
kernel launches instead: one fused kernel on the packed tokens where it has one, or else padding for
the time of the attention. `fastest_attention` chooses between the three, which compute the same.

    python attention.py        attention on packed tokens beside padded, masked attention

Dimensions: B sequences in the batch, L tokens in the longest, T packed tokens (the real ones, and
up to 31 that fill T up), n sequences of one length, H hidden size, A attention heads, D = H / A.
"""
import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

# Sequences of one token fill T up to a multiple of this. oneDNN prepares a matrix
# product for every new shape; with few shapes, the products of a bfloat16 step on a CPU take two
# thirds of the time that they take otherwise.
T_MULTIPLE = 32


def attention(query, key, value, attention_mask=None):
    """softmax(Q K^T / sqrt(D)) V, equation 1 of Vaswani et al. 2017. All (..., L, D).

    attention_mask: (B, L), 1 for a real token and 0 for padding; the others are then (B, A, L, D).
    None where nothing is padded.
    """
    scores = query @ key.mT / math.sqrt(query.size(-1))  # (..., L, L)
    if attention_mask is not None:
        padding = attention_mask[:, None, None, :] == 0  # (B, 1, 1, L), for every head and query
        scores = scores.masked_fill(padding, -math.inf)  # so the softmax gives padding weight 0
    return scores.softmax(dim=-1) @ value


# ---------------------------------------------------------------- the same without padding

class Packing:
    """Where each real token of a padded batch goes when the padding is dropped.

    attention_mask: (B, L), 1 for a real token. device: of the index tensors (default: the mask's).
    The lengths are needed on the host, as the shapes of the groups; with a mask on the CPU no GPU
    has to be waited for. Raises ValueError for an empty batch, or a sequence without a real token.
    """

    def __init__(self, attention_mask, device=None):
        device = attention_mask.device if device is None else device
        mask = attention_mask.bool().cpu()  # (B, L)
        self.padded_shape = B, L = mask.shape
        lengths = mask.sum(dim=1)  # (B,)
        if B == 0:
            raise ValueError("the batch is empty")
        if lengths.min() == 0:
            raise ValueError(f"sequence {int(lengths.argmin())} of the batch has no real token")

        # order the sequences by length: in the picture above a, c, b. Their real tokens, sequence
        # after sequence, are the packed tokens; column: where each stood in its row
        order = lengths.argsort(stable=True)  # packed sequence -> row of the padded batch
        sequence, column = mask[order].nonzero(as_tuple=True)  # (T - fill,) each

        # fill T up with sequences of one token, which attend to themselves and which nothing reads
        self.fill = -len(sequence) % T_MULTIPLE
        lengths = torch.cat([lengths[order], lengths.new_ones(self.fill)])
        group_length, group_size = lengths.unique_consecutive(return_counts=True)

        # for attention: (sequences, length) of each group, here [(2, 3), (1, 5)] and the fill
        # (21, 1); and the cumulative sequence lengths 0, 3, 6, 11, 12, ..., 32, where each starts
        self.groups = list(zip(group_size.tolist(), group_length.tolist()))
        self.group_tokens = [n * length for n, length in self.groups]
        self.max_length = int(lengths.max())
        self.cu_seqlens = to_device(F.pad(lengths.cumsum(dim=0), (1, 0)).int(), device)

        # for the embeddings: the position of each token in its sequence; for `pack` and `unpack`:
        # where it stands in the flattened batch; for `first` and `mean`: where each row went
        self.positions = to_device(F.pad(column, (0, self.fill)), device)  # (T,)
        self.indices = to_device(order[sequence] * L + column, device)  # (T - fill,)
        self.restore = to_device(order.argsort(), device)  # (B,) row -> packed sequence
        self.mask = to_device(mask, device)  # (B, L), for padded_attention

    def pack(self, padded):
        """(B, L, ...) -> (T, ...), zeros in the tokens that fill T up."""
        if padded.shape[:2] != self.padded_shape:
            raise ValueError(f"tokens {tuple(padded.shape[:2])} beside an attention mask "
                             f"{tuple(self.padded_shape)}")
        tokens = to_device(padded.flatten(0, 1), self.indices.device).index_select(0, self.indices)
        return torch.cat([tokens, tokens.new_zeros(self.fill, *tokens.shape[1:])])

    def unpack(self, packed):
        """(T, H) -> (B, L, H), zeros on the padding."""
        B, L = self.padded_shape
        tokens = packed[:len(self.indices)]
        padded = packed.new_zeros(B * L, packed.size(-1)).index_copy(0, self.indices, tokens)
        return padded.view(B, L, -1)

    def first(self, packed):
        """The first token of each sequence, which is [CLS]. (T, H) -> (B, H)."""
        return packed.index_select(0, self.cu_seqlens[:-1].index_select(0, self.restore))

    def mean(self, packed):
        """The mean over the real tokens of each sequence. (T, H) -> (B, H)."""
        means = [tokens.view(n, length, -1).mean(dim=1)
                 for (n, length), tokens in zip(self.groups, packed.split(self.group_tokens))]
        return torch.cat(means).index_select(0, self.restore)


def to_device(tensor, device):
    """Copy; CUDA's host need not wait for it. On MPS that would read freed memory."""
    return tensor.to(device, non_blocking=torch.device(device).type == "cuda")


def grouped_attention(query, key, value, packing):
    """Equation 1 on each group of sequences of one length. All (T, A, D)."""
    (_, A, D), outputs = query.shape, []
    qkv = torch.stack((query, key, value), dim=1)  # (T, 3, A, D)

    # in float32 also under autocast: on a CPU, products this small are slower in bfloat16
    qkv = qkv.to(torch.promote_types(qkv.dtype, torch.float32))
    with torch.autocast(query.device.type, enabled=False):
        for (n, length), tokens in zip(packing.groups, qkv.split(packing.group_tokens)):
            # (n, length, 3, A, D) -> (3, n, A, length, D), copied into one block
            qkv_of_group = tokens.view(n, length, 3, A, D).permute(2, 0, 3, 1, 4)
            q, k, v = qkv_of_group.reshape(3, n * A, length, D)
            output = attention(q, k, v).view(n, A, length, D)
            outputs.append(output.transpose(1, 2).flatten(0, 1))  # (n * length, A, D)
    return torch.cat(outputs).to(query.dtype)


def padded_attention(query, key, value, packing):
    """Equation 1 by torch on the padded batch, masked (True for a real token); fused where a kernel
    takes this D. All (T, A, D)."""
    (_, A, D), (B, L) = query.shape, packing.padded_shape
    qkv = torch.stack((query, key, value), dim=1).flatten(1)  # (T, 3 * A * D)
    q, k, v = packing.unpack(qkv).view(B, L, 3, A, D).permute(2, 0, 3, 1, 4)  # (B, A, L, D) each
    output = F.scaled_dot_product_attention(q, k, v, packing.mask[:, None, None, :])
    return packing.pack(output.transpose(1, 2))


def flash_attention(query, key, value, packing):
    """Equation 1 by one fused kernel on the packed tokens, where `has_flash` holds. All (T, A, D).
    """
    bounds, longest = packing.cu_seqlens, packing.max_length
    return varlen_attn(query, key, value, bounds, bounds, longest, longest)


def has_flash(query):
    """The kernel needs half precision on Ampere or later (not a T4), and D divisible by 8 and at
    most 256; the heads of PAL have D = 204 / 12 = 17."""
    return (query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
            and query.size(-1) % 8 == 0 and query.size(-1) <= 256
            and torch.cuda.get_device_capability(query.device) >= (8, 0))


def fastest_attention(query):
    """Which of the three to use for queries like these."""
    if query.device.type == "cpu":
        return grouped_attention
    return flash_attention if has_flash(query) else padded_attention


# ---------------------------------------------------------------- layers

class BertSelfAttention(nn.Module):
    """Queries, keys and values of A heads, attention, heads side by side again. (T, H) -> (T, H).

    No dropout on the attention probabilities, whatever the config says: varlen_attn has none, and
    all paths should compute the same.
    """

    def __init__(self, hidden_size, num_attention_heads):
        super().__init__()
        self.num_attention_heads = num_attention_heads
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size)
        self.value = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_states, packing):
        A = self.num_attention_heads
        query = self.query(hidden_states).unflatten(-1, (A, -1))  # (T, A, D)
        key = self.key(hidden_states).unflatten(-1, (A, -1))
        value = self.value(hidden_states).unflatten(-1, (A, -1))
        attend = fastest_attention(query)
        return attend(query, key, value, packing).flatten(1)


class ProjectedAttention(nn.Module):
    """One task's projected attention layers (Stickland & Murray 2019, section 3).

    They add a term of the task to every encoder layer. With h the layer's input and a the
    normalized output of its attention block, the layer gives

        LayerNorm(a + FFN(a) + TS(h)),    TS(h) = V_D g(V_E h)

    V_E (encode) maps H down to `size` numbers and V_D (decode) back up; all layers share both. g is
    "attention", self-attention without an output matrix, of its own in each layer; or "identity",
    which leaves one low-rank map (a baseline of the paper, and what report 4 used).

    V_D starts at zero, so that training starts from the pretrained encoder. The paper prints the
    first term as h; BERT and the authors' code have a. Their code also has a GELU after V_D, which
    is neither in the paper's equation nor here.
    """

    def __init__(self, hidden_size, size, num_attention_heads, num_layers, g="attention"):
        super().__init__()
        self.down = nn.Linear(hidden_size, size)  # V_E
        self.up = nn.Linear(size, hidden_size)  # V_D
        num_attentions = num_layers if g == "attention" else 0
        self.attentions = nn.ModuleList(BertSelfAttention(size, num_attention_heads)
                                        for _ in range(num_attentions))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.up.weight)

    def forward(self, layer_index, hidden_states, packing):  # (T, H) -> (T, H)
        projected = self.down(hidden_states)
        if self.attentions:
            projected = self.attentions[layer_index](projected, packing)
        return self.up(projected)


if __name__ == "__main__":
    torch.manual_seed(0)
    lengths = torch.tensor([5, 31, 9, 9, 14, 5, 22, 9])
    attention_mask = (torch.arange(31) < lengths[:, None]).long()  # (8, 31)
    query, key, value = torch.randn(3, 8, 12, 31, 32)  # (B, A, L, D) each
    padded = attention(query, key, value, attention_mask)

    packing = Packing(attention_mask)
    packed = [packing.pack(x.transpose(1, 2)) for x in (query, key, value)]  # (T, A, D) each
    real = attention_mask.bool()
    print(f"{attention_mask.numel()} padded tokens, {int(real.sum())} of them real")
    print(f"groups (sequences, length): {packing.groups}; the last {packing.fill} tokens fill T up")

    print("largest difference from padded, masked attention:")
    for attend in (grouped_attention, padded_attention):
        ours = packing.unpack(attend(*packed, packing).flatten(1))  # (B, L, A * D)
        difference = (padded.transpose(1, 2).flatten(2) - ours)[real].abs().max()
        print(f"    {attend.__name__:18} {difference:.1e}")
