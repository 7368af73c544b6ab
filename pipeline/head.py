"""The vocabulary projection and its loss in one module: logits for the whole batch never exist at once.

In: hidden states [N, d] and target ids [N] (valid positions only). Out: the summed training objective with
its gradient, and plain cross-entropy per target. Used by all three models. Head and loss share one `forward`
because ZeRO-3 gathers a module's weights only around its `forward`: reading `head.weight` from outside would
see a partitioned tensor.

Rows are worked off in chunks. Each chunk's gradients are computed with its logits, in the forward pass, so
that nothing of size [N, V] is kept and no logit is computed twice: three matrix products per row in all, the
least there is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK_ELEMENTS = 1 << 23  # logits held at once (32 MB in fp32)


class _ProjectedLoss(torch.autograd.Function):
    """sum of CE or focal loss over rows; the backward only scales what the forward computed."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, focal_gamma, want_correct, want_grad):
        rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
        # `needs_input_grad` is true under no_grad too: evaluation must not pay for gradients.
        need = [want_grad and needed for needed in ctx.needs_input_grad[:3]]
        grad_hidden = torch.empty_like(hidden) if need[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need[1] else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if need[2] else None
        nll = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        correct = torch.empty(len(targets), dtype=torch.bool, device=hidden.device) if want_correct else None
        objective = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for at in range(0, len(targets), rows):
            h, t = hidden[at : at + rows], targets[at : at + rows]
            logits = F.linear(h, weight, bias).float()
            log_z = logits.logsumexp(-1)
            chunk_nll = log_z - logits.gather(1, t[:, None])[:, 0]
            nll[at : at + rows] = chunk_nll
            if want_correct:
                correct[at : at + rows] = logits.argmax(-1) == t
            if focal_gamma:
                # focal = (1-p)^γ · nll, p = exp(-nll)  (paper §3.3; γ = 2)
                p = torch.exp(-chunk_nll)
                rest = (1 - p).clamp_min(0)
                objective += (rest**focal_gamma * chunk_nll).sum()
                slope = rest**focal_gamma + focal_gamma * rest ** (focal_gamma - 1) * p * chunk_nll
            else:
                objective += chunk_nll.sum()
                slope = None
            if any(need):
                # d nll / d logits = softmax - onehot, in place of the logits
                grad = logits.sub_(log_z[:, None]).exp_()
                grad.scatter_add_(1, t[:, None], grad.new_full((len(t), 1), -1.0))
                if slope is not None:
                    grad.mul_(slope[:, None])
                grad_low = grad.to(hidden.dtype)
                if need[0]:
                    torch.mm(grad_low, weight, out=grad_hidden[at : at + rows])
                if need[1]:
                    if grad_weight.dtype == grad_low.dtype:
                        grad_weight.addmm_(grad_low.t(), h)
                    else:
                        grad_weight += grad_low.t() @ h
                if need[2]:
                    grad_bias += grad.sum(0)
        ctx.grads = (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
        )
        ctx.mark_non_differentiable(*(x for x in (nll, correct) if x is not None))
        return objective, nll, correct

    @staticmethod
    def backward(ctx, grad_objective, *_):
        # In place: the tensors are this call's own, and keeping a second [V, d] copy would double the head's
        # memory.
        grads = tuple(None if g is None else g.mul_(grad_objective) for g in ctx.grads)
        del ctx.grads
        return (*grads, None, None, None, None)


class VocabularyHead(nn.Linear):
    """Linear [d → vocabulary] with bias, and its loss.

    Both go through `forward`: with targets it is the loss, without them the logits (generation, where one
    row is needed).
    """

    def forward(
        self,
        hidden_Nd: Tensor,
        targets_N: Tensor | None = None,
        focal_gamma: float = 0.0,
        want_correct: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None] | Tensor:
        """Sum of the training loss over rows, per-row cross-entropy, and per-row arg-max hits.

        Args:
            hidden_Nd: [N, d].
            targets_N: int64 [N]; None returns float32 logits [N, V] instead (generation, checks).
            focal_gamma: 0 is cross-entropy; the paper's focal loss uses 2.
            want_correct: also compare the arg max with the target.
        Returns: (objective scalar with gradient, nll float32 [N] in nats without gradient, bool [N] or None).
        """
        if targets_N is None:
            return F.linear(hidden_Nd, self.weight, self.bias).float()
        return _ProjectedLoss.apply(
            hidden_Nd, self.weight, self.bias, targets_N, focal_gamma, want_correct, torch.is_grad_enabled()
        )
