"""Training with the perturbation of the code that SMART's authors released in place of algorithm 1, for two rows of the
README's table: noise plus .001 of the gradient, over its largest number, token by token, and no projection.

    python results/smart/authors.py --smart FLAGS      from the project's folder; flags as of multitask_classifier.py
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import multitask_classifier  # noqa: E402


class ReleasedCode(multitask_classifier.Smoothness):
    def ascend(self, model, task, batch, logits, seed):
        mask = batch.attention_mask.to(model.device).unsqueeze(-1)  # (S, L, 1)
        noise = self.sigma * torch.randn(*mask.shape[:2], model.bert.config.hidden_size, device=mask.device) * mask
        noise.requires_grad_()
        total = self.divergences(model, task, batch, logits.detach(), seed, noise).sum()
        perturbation = noise.detach() + 1e-3 * self.gradient(model, total, noise)
        return perturbation / (perturbation.abs().amax(dim=-1, keepdim=True) + 1e-6) * mask


if __name__ == "__main__":
    multitask_classifier.Smoothness = ReleasedCode
    sys.exit(multitask_classifier.exit_status(multitask_classifier.main))
