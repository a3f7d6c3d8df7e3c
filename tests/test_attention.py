"""attention.py: attention with and without padding, packing, projected attention layers; and
support/fast_cpu.py: linear layers and dropout on a CPU.

Dimensions as in attention.py: B sequences, L tokens in the longest, T packed tokens, H hidden size,
A attention heads, D = H / A.
"""
import math
from types import SimpleNamespace
from unittest import SkipTest, mock

import torch
from torch import nn
from torch.nn import functional as F

import attention
from attention import (Packing, ProjectedAttention, flash_attention, grouped_attention,
                       padded_attention)
from bert import BertModel
from data.tasks import TASKS
from multitask_classifier import MultitaskBERT
from pretrain_mlm import MaskedLM
from support import fast_cpu
from tests.helpers import KINDS, TINY, raises, random_batch, same, three_task_model


def gradients_of(output, weights, inputs):
    """The gradients of sum(output * weights)."""
    return torch.autograd.grad((output * weights).sum(), inputs, retain_graph=True)


def largest_difference(tensors, references):
    return max(float((a - b).abs().max()) for a, b in zip(tensors, references, strict=True))


def padded_problem(B=7, A=4, L=20, D=8):
    """Random query, key, value (B, A, L, D), and a mask (B, L). The mask has holes, so that a
    token's place in its sequence and its place among the real tokens differ."""
    mask = torch.rand(B, L) < 0.6
    mask[:, 3] = True  # no sequence is empty
    return torch.randn(3, B, A, L, D).requires_grad_(), mask


# ---------------------------------------------------------------- attention

def test_padded_masked_attention_equals_torch_attention():
    qkv, mask = padded_problem()
    qkv = qkv.detach().double().requires_grad_()
    weights = torch.randn(qkv[0].shape).double()
    for padding, reference_mask in ((None, None), (mask.long(), mask[:, None, None])):
        expected = F.scaled_dot_product_attention(*qkv, attn_mask=reference_mask)
        ours = attention.attention(*qkv, padding)
        assert (ours - expected).abs().max() < 1e-12
        assert largest_difference(gradients_of(ours, weights, qkv),
                                  gradients_of(expected, weights, qkv)) < 1e-12

    # the form that packed attention uses: sequences and heads in one dimension
    flat = qkv.flatten(1, 2)  # (3, B * A, L, D)
    expected = F.scaled_dot_product_attention(*flat)
    assert (attention.attention(*flat) - expected).abs().max() < 1e-12


def test_padding_has_no_weight_in_attention():
    qkv, mask = padded_problem()
    query, key, value = qkv.detach()
    padding = ~mask[:, None, :, None]
    other_key, other_value = (torch.where(padding, 1e4 * torch.randn(x.shape), x)
                              for x in (key, value))
    assert torch.equal(attention.attention(query, other_key, other_value, mask),
                       attention.attention(query, key, value, mask))
    assert not torch.equal(attention.attention(query, other_key, other_value),
                           attention.attention(query, key, value))


def varlen_attn(query, key, value, bounds, bounds_of_keys, longest, longest_of_keys):
    """The fused kernel on a CPU, one sequence after the other."""
    assert bounds.dtype == bounds_of_keys.dtype == torch.int32
    assert torch.equal(bounds, bounds_of_keys)
    assert longest == longest_of_keys == max(bounds.diff())
    sequences = [x.split(bounds.diff().tolist()) for x in (query, key, value)]
    outputs = [F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in qkv))
               for qkv in zip(*sequences)]  # (A, L, D) each
    return torch.cat([output.transpose(0, 1) for output in outputs])


@mock.patch.object(attention, "varlen_attn", varlen_attn)
def test_the_three_paths_equal_padded_masked_attention():
    qkv, mask = padded_problem()
    packing = Packing(mask)
    # what padded attention gives for queries that are padding has no counterpart
    real = mask[..., None]
    references = (attention.attention(*qkv, mask),
                  F.scaled_dot_product_attention(*qkv, attn_mask=mask[:, None, None]))
    for attend in (grouped_attention, padded_attention, flash_attention):
        packed = [packing.pack(x.transpose(1, 2)) for x in qkv]  # (T, A, D) each
        ours = packing.unpack(attend(*packed, packing).flatten(1))  # (B, L, A * D)
        weights = torch.randn(ours.shape) * real
        for reference in references:
            expected = reference.transpose(1, 2).flatten(2)
            assert (ours - expected * real).abs().max() < 1e-5
            assert largest_difference(gradients_of(ours, weights, qkv),
                                      gradients_of(expected, weights, qkv)) < 1e-5


def test_the_path_depends_on_device_and_precision():
    def query(device, dtype, D):
        """All that the choice looks at."""
        return SimpleNamespace(device=torch.device(device), is_cuda=device == "cuda", dtype=dtype,
                               size=lambda dim: D)

    for device, dtype, D, capability, path in (
            ("cpu", torch.float32, 32, None, grouped_attention),
            ("cpu", torch.bfloat16, 32, None, grouped_attention),
            ("mps", torch.float32, 32, None, padded_attention),
            ("cuda", torch.float32, 32, (9, 0), padded_attention),
            ("cuda", torch.float16, 64, (7, 5), padded_attention),  # T4
            ("cuda", torch.float16, 64, (8, 0), flash_attention),
            ("cuda", torch.bfloat16, 32, (8, 6), flash_attention),
            ("cuda", torch.bfloat16, 17, (8, 6), padded_attention)):  # PAL's heads
        with mock.patch("torch.cuda.get_device_capability", lambda device: capability):
            assert attention.fastest_attention(query(device, dtype, D)) is path, (device, dtype, D)


def test_the_paths_agree_on_cuda():
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        raise SkipTest("no CUDA device of Ampere or later")
    packing = Packing(random_batch(TINY, [50, 2, 9, 31, 128])[1], "cuda")
    qkv = torch.randn(3, 224, 12, 32, device="cuda", dtype=torch.bfloat16).requires_grad_()
    assert attention.has_flash(qkv[0])
    results = []
    for attend in (flash_attention, grouped_attention, padded_attention):
        query, key, value = qkv
        output = attend(query, key, value, packing)
        results.append((output, *torch.autograd.grad(output.float().square().sum(), query)))
    for flash, grouped, padded in zip(*results, strict=True):
        for other in (flash, padded):
            assert (other - grouped).float().norm() < 0.02 * grouped.float().norm()


def test_attention_is_float32_under_autocast():
    packing = Packing(random_batch(TINY, [5, 2, 9, 5, 1])[1])
    qkv = torch.randn(3, 32, 4, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        output = grouped_attention(*qkv, packing)
    assert torch.equal(output, grouped_attention(*qkv.float(), packing).bfloat16())


# ---------------------------------------------------------------- packing

def test_packing_comes_back_in_the_order_of_the_batch():
    lengths = [4, 1, 6, 4, 2]
    mask = random_batch(TINY, lengths)[1]
    packing, padded = Packing(mask), torch.randn(5, 6, 3)
    packed = packing.pack(padded)
    assert packed.shape == (32, 3) and not packed[17:].any()  # 17 real tokens
    assert torch.equal(packing.unpack(packed), padded * mask[..., None])

    assert torch.equal(packing.first(packed), padded[:, 0])
    means = torch.stack([row[:n].mean(dim=0) for row, n in zip(padded, lengths)])
    assert (packing.mean(packed) - means).abs().max() < 1e-6


def test_packing_groups_sequences_of_one_length():
    packing = Packing(random_batch(TINY, [4, 1, 6, 4, 2])[1])
    assert packing.groups == [(1, 1), (1, 2), (2, 4), (1, 6), (15, 1)]  # the last fill T up
    assert packing.cu_seqlens.tolist() == [0, 1, 3, 7, 11, 17, *range(18, 33)]
    assert packing.max_length == 6
    assert packing.positions.tolist() == [0, 0, 1, *2 * [0, 1, 2, 3], *range(6), *15 * [0]]
    assert Packing(torch.ones(4, 8)).groups == [(4, 8)]  # 32 tokens: nothing to fill up


def test_packing_rejects_what_it_cannot_pack():
    raises(ValueError, "the batch is empty", Packing, torch.ones(0, 3))
    raises(ValueError, "sequence 1", Packing, torch.tensor([[1, 1], [0, 0]]))
    packing = Packing(torch.ones(5, 6))
    raises(ValueError, "tokens (5, 7) beside an attention mask (5, 6)",
           packing.pack, torch.zeros(5, 7))


def test_every_linear_layer_computes_real_tokens_only():
    model, computed = BertModel(TINY).eval(), []

    def count_tokens(module, inputs, output):
        computed.append(output.numel() // output.size(-1))

    model.embed_layer_norm.register_forward_hook(count_tokens)
    for module in model.bert_layers.modules():
        if isinstance(module, (nn.Linear, nn.LayerNorm)):
            module.register_forward_hook(count_tokens)
    model(*random_batch(TINY, [3, 30, 7, 11]))

    # 51 tokens rounded up to 64; padded they would be 120
    assert computed == [64] * (1 + 2 * 8), computed


# ---------------------------------------------------------------- projected attention layers

def test_projected_attention_has_as_many_parameters_as_the_paper_says():
    """For BERT-base, a task. 12 layers share the two projections; with "attention" each layer has
    queries, keys and values of its own."""
    projections = 2 * 768 * 204 + 204 + 768
    for g, expected in (("identity", projections),
                        ("attention", projections + 12 * 3 * (204 * 204 + 204))):
        pal = ProjectedAttention(768, 204, num_attention_heads=12, num_layers=12, g=g)
        assert sum(p.numel() for p in pal.parameters()) == expected
    assert expected == 1_819_836


def test_projected_attention_starts_from_the_pretrained_encoder():
    """At first it adds nothing, and still V_D learns from the first step on."""
    for g in ("attention", "identity"):
        without, _ = three_task_model()
        model, _ = three_task_model(pal={"g": g, "size": 8})
        model.load_state_dict(without.state_dict(), strict=False)
        ids, mask, types = random_batch(TINY, [9, 3, 9, 14])
        pooled = model.eval()(ids, mask, types, pal=model.pal["sts"])
        assert torch.equal(pooled, without.eval()(ids, mask, types))

        gradient, = torch.autograd.grad(pooled.square().sum(), model.pal["sts"].up.weight)
        assert gradient.abs().max() > 0


def layer_by_the_equation(layer, i, hidden, pal):
    """LayerNorm(a + FFN(a) + V_D g(V_E h)), with h = `hidden` (L, H), all in the textbook form."""
    def attend(module, x):  # (L, H) -> (L, H)
        A = module.num_attention_heads
        q, k, v = ((x @ linear.weight.T + linear.bias).unflatten(-1, (A, -1)).transpose(0, 1)
                   for linear in (module.query, module.key, module.value))  # (A, L, D) each
        return F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)

    attended = layer.attention_dense(attend(layer.self_attention, hidden))
    a = layer.attention_layer_norm(hidden + attended)
    feed_forward = layer.out_dense(F.gelu(layer.interm_dense(a)))
    projected = hidden @ pal.down.weight.T + pal.down.bias
    if pal.attentions:
        projected = attend(pal.attentions[i], projected)
    return layer.out_layer_norm(a + feed_forward + projected @ pal.up.weight.T + pal.up.bias)


def test_projected_attention_is_its_equation():
    for g in ("attention", "identity"):
        model, examples = three_task_model(pal={"g": g, "size": 8})
        model.eval()
        # every parameter away from 0 and 1, so that the layer's input, its norm and the output of
        # its attention block differ
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.3)

        (ids, _), = examples["sst"].tokens[0]
        sentence = torch.from_numpy(ids)[None]  # (1, L)
        pal, hidden = model.pal["sts"], model.bert.embed(sentence)[0]
        assert len(pal.attentions) == (len(model.bert.bert_layers) if g == "attention" else 0)
        for i, layer in enumerate(model.bert.bert_layers):
            hidden = layer_by_the_equation(layer, i, hidden, pal)
        pooled = model(sentence, torch.ones_like(sentence), pal=pal)
        assert (pooled - hidden.mean(dim=0)).abs().max() < 1e-5


# ---------------------------------------------------------------- fast_cpu.py: Linear

def fast_linear(inputs, theirs, dtype, avx512, amp):
    """What the fast layer makes of `inputs` with the weights of `theirs`. Returns the layer, its
    inputs, its output and the arguments of its convolution, or None if it makes none."""
    layer = fast_cpu.Linear(theirs.in_features, theirs.out_features)
    layer.load_state_dict(theirs.state_dict())
    layer, x = layer.to(dtype), inputs.detach().to(dtype).requires_grad_()
    convolution = mock.Mock(wraps=F.conv2d)
    with mock.patch.object(fast_cpu, "AVX512", avx512), \
            mock.patch.object(F, "conv2d", convolution), \
            torch.autocast("cpu", torch.bfloat16, enabled=amp):
        output = layer(x)
    return layer, x, output, convolution.call_args and convolution.call_args.args


LINEAR_CASES = [  # shape of the inputs, AVX-512, dtype, autocast; whether it is a convolution
    ((128, 24), True, torch.float32, False, True),
    ((1024, 24), True, torch.float32, False, True),
    ((128, 24), False, torch.float32, False, False),
    ((128, 24), True, torch.float64, False, False),
    ((128, 24), True, torch.float32, True, False),
    ((0, 24), True, torch.float32, False, False),
    ((17, 24), True, torch.float32, False, False),
    ((112, 24), True, torch.float32, False, False),  # too few for the convolution to be faster
    ((136, 24), True, torch.float32, False, False),  # no multiple of 16
    ((128, 3, 24), True, torch.float32, False, False)]


def test_fast_linear_equals_torch_linear():
    """Output and gradients of both ways to compute it, and that the right one is taken."""
    theirs = nn.Linear(24, 40)
    for shape, avx512, dtype, amp, convolved in LINEAR_CASES:
        x, weights = torch.randn(shape).requires_grad_(), torch.randn(*shape[:-1], 40)
        expected = theirs(x)
        layer, input, output, convolution = fast_linear(x, theirs, dtype, avx512, amp)
        assert (convolution is not None) == convolved, shape
        assert output.shape == expected.shape and output.is_contiguous()

        references = expected, *gradients_of(expected, weights, (x, theirs.weight, theirs.bias))
        ours = output, *gradients_of(output, weights, (input, layer.weight, layer.bias))
        for a, b in zip(ours, references, strict=True):
            assert (a - b).norm() <= (1e-2 if amp else 1e-6) * b.norm(), shape


def test_fast_linear_is_computed_by_onednn():
    """With one thread too, which is why the tokens are taken as 16 images."""
    if not fast_cpu.AVX512:
        raise SkipTest("a CPU without AVX-512")
    *_, convolution = fast_linear(torch.randn(128, 24), nn.Linear(24, 40), torch.float32,
                                  avx512=True, amp=False)
    stride, padding, dilation, output_padding = (1, 1), (0, 0), (1, 1), (0, 0)
    backend = torch._C._select_conv_backend(*convolution, stride, padding, dilation,
                                            False, output_padding, 1)
    assert backend == torch._C._ConvBackend.Mkldnn


# ---------------------------------------------------------------- fast_cpu.py: Dropout

def ones_to_two():
    """Inputs that are never 0, so that each 0 of the output is one that was dropped."""
    return (torch.rand(1001, 997) + 1).requires_grad_()


def within_chance(count, share, n):
    """`count` of n is `share` of them, to five standard deviations."""
    return abs(int(count) - share * n) < 5 * math.sqrt(share * (1 - share) * n)


def test_dropout_drops_its_share_independently():
    zeros = (fast_cpu.Dropout(0.1).train()(ones_to_two()) == 0).flatten()
    n = len(zeros)
    assert within_chance(zeros.sum(), 0.1, n)

    # four numbers share one draw of 64 bits: each place has its share, and neighbors do not
    # depend on each other
    for i in range(4):
        assert within_chance(zeros[i::4].sum(), 0.1, n / 4)
    for distance in (1, 2, 3):
        together = zeros[:-distance] & zeros[distance:]
        assert within_chance(together.sum(), 0.01, n - distance)

    # nor do others at any distance: the correlations at all n of them, by a Fourier transform;
    # their standard deviation is 1, and the largest of a million is about 5
    spectrum = torch.fft.rfft((zeros.double() - 0.1) / 0.3)
    correlations = torch.fft.irfft(spectrum.abs() ** 2, n) / math.sqrt(n)
    assert correlations[0] > 0.99 * math.sqrt(n) and correlations[1:].abs().max() < 8


def test_dropout_rescales_what_it_keeps():
    x, dropout = ones_to_two(), fast_cpu.Dropout(0.1).train()
    output = dropout(x)
    zeros = output == 0
    # p is rounded to 1 / 65536, so that 1 / (1 - p) is off by up to 1e-5
    assert (output - (x / 0.9).masked_fill(zeros, 0)).abs().max() < 1e-4
    gradient, = torch.autograd.grad(output.sum(), x)
    assert torch.equal(gradient == 0, zeros)
    assert (gradient[~zeros] - 1 / 0.9).abs().max() < 1e-4
    assert fast_cpu.Dropout(0.5).train()(x.bfloat16()).dtype == torch.bfloat16


def test_dropout_masks_follow_the_seed():
    x, dropout = ones_to_two(), fast_cpu.Dropout(0.1).train()
    torch.manual_seed(0)
    output = dropout(x)
    assert not torch.equal(dropout(x) == 0, output == 0)
    torch.manual_seed(0)
    assert torch.equal(dropout(x), output)


def test_dropout_of_nothing_and_of_everything():
    x = ones_to_two()
    assert torch.equal(fast_cpu.Dropout(0.1).eval()(x), x)
    assert torch.equal(fast_cpu.Dropout(0.0).train()(x), x)
    assert torch.equal(fast_cpu.Dropout(1e-9).train()(x), x)
    assert not fast_cpu.Dropout(1.0).train()(x).any()
    assert not fast_cpu.Dropout(1 - 1e-9).train()(x).any()


# ---------------------------------------------------------------- fast_cpu.py: accelerate

class OwnLinear(nn.Linear):
    """A subclass, whose forward pass must stay its own."""


def test_accelerate_exchanges_linear_and_dropout_in_place():
    """Exactly nn.Linear and nn.Dropout, not their subclasses or relatives; weights, settings and
    mode stay."""
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Dropout(0.25), nn.LayerNorm(8), nn.GELU(),
                          nn.Sequential(nn.Linear(8, 8), OwnLinear(8, 8), nn.Dropout1d(0.5)),
                          nn.Embedding(3, 8), nn.Bilinear(2, 2, 2), nn.MultiheadAttention(8, 2))
    model[0].eval()
    modules, kinds = list(model.modules()), [type(module) for module in model.modules()]
    parameters = dict(model.named_parameters())
    settings = [dict(module.__dict__) for module in modules]

    assert fast_cpu.accelerate(model) is model
    faster = {nn.Linear: fast_cpu.Linear, nn.Dropout: fast_cpu.Dropout}
    assert list(map(id, model.modules())) == list(map(id, modules))
    assert [type(module) for module in modules] == [faster.get(kind, kind) for kind in kinds]
    assert sum(kind in faster for kind in kinds) == 3
    after = dict(model.named_parameters())
    assert after.keys() == parameters.keys()
    assert all(after[name] is parameter for name, parameter in parameters.items())
    assert [module.__dict__ for module in modules] == settings

    # the model itself may be such a layer, and a second time nothing is left to exchange
    single = nn.Linear(2, 2)
    for _ in range(2):
        assert type(fast_cpu.accelerate(single)) is fast_cpu.Linear


def kinds_in(module):
    """The classes of a model's linear layers and dropouts."""
    return {type(part) for part in module.modules() if isinstance(part, (nn.Linear, nn.Dropout))}


def test_the_encoder_is_accelerated_and_the_heads_are_not():
    """Projected attention layers and all of a masked LM are, too; a BertModel alone is not."""
    plain = {nn.Linear, nn.Dropout}
    fast = {fast_cpu.Linear, fast_cpu.Dropout}
    bert = BertModel(TINY)
    assert kinds_in(bert) == plain

    tasks = {name: TASKS[name] for name in KINDS}
    pair_head = {"para": "uv_diff", "sts": "cross"}
    model = MultitaskBERT(bert, tasks, pair_head, "mean", 0.3, pal={"size": 8, "g": "attention"})
    assert model.bert is bert and kinds_in(model.bert) == fast
    assert kinds_in(model.heads) == plain
    assert kinds_in(model.pal) == {fast_cpu.Linear}
    assert kinds_in(MaskedLM(BertModel(TINY))) == fast


def test_an_accelerated_encoder_computes_the_same():
    model = BertModel(TINY).eval()
    batch = random_batch(TINY, [30, 50, 64, 7])  # 160 packed tokens
    expected = model(*batch)
    before = model.state_dict()
    convolution = mock.Mock(wraps=F.conv2d)
    with mock.patch.object(fast_cpu, "AVX512", True), mock.patch.object(F, "conv2d", convolution):
        ours = fast_cpu.accelerate(model)(*batch)
    assert convolution.call_count == 2 * 6  # of each layer's linear layers; the pooler has 4 rows
    for name in ("last_hidden_state", "pooler_output"):
        assert (ours[name] - expected[name]).abs().max() < 1e-6
    assert same(model.state_dict(), before)
