"""Faster linear layers and dropout for CPUs. Skip this on first reading: the products are those of
nn.Linear, the masks have the distribution of nn.Dropout's, and `accelerate(model)` is the only
thing that the scripts call.

Measured on two of AMD's processors. On one, MKL, which torch asks for float32 products, left
AVX-512 unused, and a product by oneDNN took half the time; on the other both took the same.
"""
import torch
from torch import nn
from torch.nn import functional as F

AVX512 = (torch.backends.mkldnn.is_available()
          and torch.backends.cpu.get_cpu_capability() == "AVX512")


class Linear(nn.Linear):
    """x W^T + b, as a convolution of width 1 where oneDNN is faster. (..., H_in) -> (..., H_out).

    That is for (T, H_in) in float32 on a CPU. In bfloat16 both go to oneDNN. The tokens are taken
    as 16 images, since torch hands fewer images to oneDNN only with several threads.
    """

    def forward(self, x):
        if (not AVX512 or x.device.type != "cpu" or x.dtype != torch.float32
                or torch.is_autocast_enabled("cpu")
                or x.ndim != 2 or len(x) < 128 or len(x) % 16):
            return super().forward(x)
        # (16, H_in, T / 16, 1), channels last in memory
        images = x.reshape(16, -1, 1, x.size(-1)).permute(0, 3, 1, 2)
        output = F.conv2d(images, self.weight[:, :, None, None], self.bias)
        return output.permute(0, 2, 3, 1).flatten(0, 2)


class Dropout(nn.Dropout):
    """Zeros with probability p, to the nearest 1 / 65536, and the rest divided by 1 - p.

    On a CPU a mask takes 16 random bits per number; torch may draw a double for each, on one core.
    """

    def forward(self, x):
        dropped = round(self.p * 2 ** 16)  # of the 2^16 values of 16 bits
        if not self.training or x.device.type != "cpu" or dropped in (0, 2 ** 16):
            return super().forward(x)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-2 ** 63, None)
        bits = bits.view(torch.int16)[:x.numel()]
        kept = (bits >= dropped - 2 ** 15).view(x.shape).to(x.dtype)
        return x * kept.mul_(2 ** 16 / (2 ** 16 - dropped))


def accelerate(model):
    """Exchange the classes of a model's nn.Linear and nn.Dropout modules in place. Returns it."""
    faster = {nn.Linear: Linear, nn.Dropout: Dropout}
    for module in model.modules():
        module.__class__ = faster.get(type(module), type(module))
    return model
