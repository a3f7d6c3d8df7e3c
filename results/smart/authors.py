"""Training with the perturbation of the code that SMART's authors released in place of algorithm 1,
for two lines of the README's table. Token by token: noise plus .001 of the gradient, divided by
its largest number, and no projection.

    python results/smart/authors.py --smart FLAGS     in the project's folder; other flags are those
                                                      of multitask_classifier.py

Dimensions: S sequences, L tokens in the longest, H hidden size.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import multitask_classifier  # noqa: E402
from attention import to_device  # noqa: E402
from smart import Smoothness  # noqa: E402
from support.run import exit_status  # noqa: E402


class ReleasedCode(Smoothness):
    def adversarial_perturbation(self, model, task, batch, logits, seed):
        """(S, L, H), zeros on the padding."""
        mask = to_device(batch.attention_mask, model.device).unsqueeze(-1)  # (S, L, 1)
        shape = (*mask.shape[:2], model.bert.config.hidden_size)
        noise = (self.sigma * torch.randn(shape, device=mask.device) * mask).requires_grad_()

        total = self.divergences(model, task, batch, logits.detach(), seed, noise).sum()
        gradient, = torch.autograd.grad(total, noise)
        moved = noise.detach() + 1e-3 * gradient
        return moved / (moved.abs().amax(dim=-1, keepdim=True) + 1e-6) * mask


if __name__ == "__main__":
    multitask_classifier.Smoothness = ReleasedCode  # make_regularizers looks it up there
    sys.exit(exit_status(multitask_classifier.main))
