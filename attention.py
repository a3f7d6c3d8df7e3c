"""Multi-head self-attention on packed tokens (Vaswani et al. 2017, section 3.2), and projected attention layers.

A batch of sentences padded to the longest is mostly padding: random batches of 32 cross-encoded STS pairs are 41 % text.
So the encoder drops the padding, orders the sequences by length, and lays their real tokens end to end; every linear
layer, norm and activation then runs on these T tokens. Attention sees all sequences of one length as a dense
(n, L, ...) view of a slice of those tokens, which needs no mask and no padding.

T is rounded up to a multiple of 32 with sequences of one token: a matrix product is set up anew for every new shape, and
with few shapes the products of a bfloat16 step on a CPU take two thirds of the time.

    python attention.py        what the padding would have cost, and a comparison with padded, masked attention

Dimensions: B sequences in the batch, L tokens in the longest, T real tokens in the batch (rounded up), n sequences of one
length, H hidden size, A attention heads, D = H / A.
"""
import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

T_MULTIPLE = 32
AVX512 = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def to_device(tensor, device):
    """Without making the host wait where that is safe: MPS would read the memory of a temporary that is gone by then."""
    return tensor.to(device, non_blocking=torch.device(device).type == "cuda")


class Packing:
    """Where the real tokens of a padded batch stand once the padding is dropped and the sequences are ordered by length.

    attention_mask: (B, L), 1 for a real token. The lengths are needed on the host (they are the shapes of the views
    below), so a mask on the CPU spares a GPU the wait; the index tensors go to `device`.
    Raises ValueError for an empty batch, or a sequence without a real token.
    """

    def __init__(self, attention_mask, device=None):
        device = device if device is not None else attention_mask.device
        mask = attention_mask.bool().cpu()  # (B, L)
        self.padded_shape = B, L = mask.shape
        lengths = mask.sum(dim=1)
        if B == 0:
            raise ValueError("the batch is empty")
        if lengths.min() == 0:
            raise ValueError(f"sequence {int(lengths.argmin())} of the batch has no real token")
        order = lengths.argsort(stable=True)  # packed sequence -> the caller's row
        row, column = mask[order].nonzero(as_tuple=True)
        self.fill = -len(row) % T_MULTIPLE  # how many sequences of one token come behind the batch's
        lengths = torch.cat([lengths[order], lengths.new_ones(self.fill)])
        group_length, group_size = lengths.unique_consecutive(return_counts=True)

        self.groups = list(zip(group_size.tolist(), group_length.tolist()))  # [(n, L), ...]
        self.group_tokens = [n * length for n, length in self.groups]
        self.max_length = int(lengths.max())
        self.positions = to_device(F.pad(column, (0, self.fill)), device)  # (T,) of each token in its padded row
        self.indices = to_device(order[row] * L + column, device)  # (T - fill,) into the flattened (B * L)
        self.restore = to_device(order.argsort(), device)  # (B,) the caller's row -> packed sequence
        self.cu_seqlens = to_device(F.pad(lengths.cumsum(dim=0), (1, 0)).int(), device)  # where each sequence starts

    def pack(self, padded):  # (B, L, ...) -> (T, ...), the last `fill` of them zeros
        if padded.shape[:2] != self.padded_shape:
            raise ValueError(f"tokens {tuple(padded.shape[:2])} beside an attention mask {tuple(self.padded_shape)}")
        tokens = to_device(padded.flatten(0, 1), self.indices.device).index_select(0, self.indices)
        return torch.cat([tokens, tokens.new_zeros(self.fill, *tokens.shape[1:])])

    def unpack(self, packed):  # (T, H) -> (B, L, H), zeros on the padding
        B, L = self.padded_shape
        tokens = packed[:len(self.indices)]
        return packed.new_zeros(B * L, packed.size(-1)).index_copy(0, self.indices, tokens).view(B, L, -1)

    def first(self, packed):  # (T, H) -> (B, H), each sequence's first token, which is [CLS]
        return packed.index_select(0, self.cu_seqlens[:-1].index_select(0, self.restore))

    def mean(self, packed):  # (T, H) -> (B, H), the mean over each sequence's real tokens
        means = [tokens.view(n, length, -1).mean(dim=1)
                 for (n, length), tokens in zip(self.groups, packed.split(self.group_tokens))]
        return torch.cat(means).index_select(0, self.restore)


def scaled_dot_product_attention(query, key, value):
    """softmax(Q K^T / sqrt(D)) V, equation 1 of Vaswani et al. 2017. All (..., L, D), sequences of one length."""
    scores = query @ key.mT / math.sqrt(query.size(-1))  # (..., L, L)
    return scores.softmax(dim=-1) @ value  # (..., L, D)


def grouped_attention(query, key, value, packing):
    """The formula above on each group of sequences of equal length. All (T, A, D).

    In float32 where the rest is in bfloat16, which makes products as small as these slower on a CPU.
    """
    (T, A, D), outputs = query.shape, []
    qkv = torch.stack((query, key, value), dim=1)  # (T, 3, A, D)
    with torch.autocast(query.device.type, enabled=False):
        for (n, L), tokens in zip(packing.groups, at_least_float32(qkv).split(packing.group_tokens)):
            q, k, v = tokens.view(n, L, 3, A, D).permute(2, 0, 3, 1, 4).reshape(3, n * A, L, D).unbind()  # one copy
            output = scaled_dot_product_attention(q, k, v)  # (n * A, L, D)
            outputs.append(output.view(n, A, L, D).transpose(1, 2).flatten(0, 1))  # (n * L, A, D)
    return torch.cat(outputs).to(query.dtype)


def at_least_float32(tensor):
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def flash_attention(query, key, value, packing):
    """The same by one fused kernel over the packed tokens, where `has_flash` says so. All (T, A, D)."""
    bounds, longest = packing.cu_seqlens, packing.max_length
    return varlen_attn(query, key, value, bounds, bounds, longest, longest)


def has_flash(query):
    """The fused kernel wants half precision on CUDA (Ampere or later) and heads of a width it was built for."""
    return (query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and query.size(-1) % 8 == 0
            and query.size(-1) <= 256 and torch.cuda.get_device_capability(query.device) >= (8, 0))


class Linear(nn.Linear):
    """x W^T + b. (..., H_in) -> (..., H_out).

    (T, H_in) in float32 on a CPU as a convolution of width 1, which oneDNN computes. nn.Linear asks MKL, which leaves AVX-512
    alone on AMD's processors and takes twice the time there. In bfloat16 both go to oneDNN. The rows are taken as 16 images,
    since torch gives oneDNN a convolution of fewer only where there are several threads.
    """

    def forward(self, x):
        if (not AVX512 or x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu")
                or x.ndim != 2 or len(x) < 128 or len(x) % 16):
            return super().forward(x)
        images = x.reshape(16, -1, 1, x.size(-1)).permute(0, 3, 1, 2)  # (16, H_in, T / 16, 1), channels last in memory
        return F.conv2d(images, self.weight[:, :, None, None], self.bias).permute(0, 2, 3, 1).flatten(0, 2)


class BertSelfAttention(nn.Module):
    """Queries, keys and values of A heads, attention, heads side by side again. (T, H) -> (T, H).

    No dropout on the attention probabilities, whatever the config says: the fused kernel has none, and both paths shall
    compute the same.
    """

    def __init__(self, hidden_size, num_attention_heads):
        super().__init__()
        self.num_attention_heads = num_attention_heads
        self.query = Linear(hidden_size, hidden_size)
        self.key = Linear(hidden_size, hidden_size)
        self.value = Linear(hidden_size, hidden_size)

    def forward(self, hidden_states, packing):
        qkv = [layer(hidden_states).unflatten(-1, (self.num_attention_heads, -1))  # (T, A, D)
               for layer in (self.query, self.key, self.value)]
        attend = flash_attention if has_flash(qkv[0]) else grouped_attention
        return attend(*qkv, packing).flatten(1)


class ProjectedAttention(nn.Module):
    """What one task adds to every encoder layer (Stickland & Murray 2019). With h the layer's input and a its attention
    block's normalised output, the layer gives

        LayerNorm(a + FFN(a) + TS(h)),    TS(h) = V_D g(V_E h)

    with V_E from H down to `size` numbers and V_D back, both shared by all layers. g: "attention", self-attention of its
    own in each layer, without an output matrix; or "identity", which leaves one low-rank map (report 4, and a baseline of
    the paper). V_D starts at zero, so that the pretrained encoder is what training starts from. The authors' code has a
    GELU after V_D that the equation has not; it is not here.
    """

    def __init__(self, hidden_size, size, num_attention_heads, num_layers, g="attention"):
        super().__init__()
        self.encode, self.decode = Linear(hidden_size, size), Linear(size, hidden_size)
        self.attentions = nn.ModuleList(BertSelfAttention(size, num_attention_heads)
                                        for _ in range(num_layers if g == "attention" else 0))
        for linear in (module for module in self.modules() if isinstance(module, Linear)):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        nn.init.zeros_(self.decode.weight)

    def forward(self, layer_index, hidden_states, packing):  # (T, H) -> (T, H)
        projected = self.encode(hidden_states)
        if self.attentions:
            projected = self.attentions[layer_index](projected, packing)
        return self.decode(projected)


if __name__ == "__main__":
    torch.manual_seed(0)
    lengths = torch.tensor([5, 31, 9, 9, 14, 5, 22, 9])
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    packing = Packing(mask)
    query, key, value = torch.randn(3, len(packing.positions), 12, 32)
    ours = packing.unpack(grouped_attention(query, key, value, packing).flatten(1))

    padded = [packing.unpack(x.flatten(1)).unflatten(-1, (12, 32)).transpose(1, 2) for x in (query, key, value)]
    textbook = F.scaled_dot_product_attention(*padded, attn_mask=mask[:, None, None].bool())
    difference = (textbook.transpose(1, 2).flatten(2) * mask[..., None] - ours).abs().max()
    print(f"{mask.numel()} padded tokens, {len(packing.indices)} real ones and {packing.fill} to fill up, groups (n, L): {packing.groups}")
    print(f"largest difference from padded, masked attention: {difference:.1e}")
    if torch.cuda.is_available() and has_flash(query.cuda().bfloat16()):
        qkv, packing = [x.cuda().bfloat16() for x in (query, key, value)], Packing(mask, "cuda")
        difference = (flash_attention(*qkv, packing) - grouped_attention(*qkv, packing)).abs().max()
        print(f"largest difference between the two paths, bfloat16 on {torch.cuda.get_device_name()}: {difference:.1e}")
