"""The vocabulary projection and its loss in one module: logits for the whole batch never exist at once.

Head and loss share one `forward` because ZeRO-3 gathers a module's weights only around its `forward`: reading
`head.weight` from outside would see a partitioned tensor.

Rows are processed in chunks. Each chunk's gradients are computed with its logits, in the forward pass, so
that nothing of size [N, V] is kept and no logit is computed twice: three matrix products per row, the
minimum. A chunk needs one softmax besides (in place if the dtype allows) and reductions.

The loss of one row, with p the probability of its target and log Z the log of the softmax's denominator:

    (1 − ε) · (1 − p)^γ · (−ln p)  +  ε · mean over the vocabulary of −ln p_v  +  z · (log Z)²

focal γ (paper §3.3 uses 2), label smoothing ε (Szegedy et al. 2016, as in torch), z-loss z (Chowdhery et al.
2022: keeps log Z near 0, against logits that drift in bf16). All 0: cross-entropy. The loss reported per
target is always plain cross-entropy.

Liger's fused head is the same scheme with one kernel for softmax and gradient, where torch runs a few. It is
not used: it returns the sum of one objective, while the metrics also need the plain cross-entropy of each
row; and it has no focal loss.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# A chunk has many rows, because each chunk reads the weight twice and adds to its gradient once, but not so
# many that the softmax falls out of the cache (measured: docs/lab-book/README.md).
CHUNK_ELEMENTS = 1 << 25  # 128 MB in fp32: 667 rows of OPT's vocabulary
CHUNK_ROWS = 1024  # the limit for small vocabularies


def chunk_rows(vocabulary: int) -> int:
    """Rows whose logits exist at once."""
    return max(1, min(CHUNK_ROWS, CHUNK_ELEMENTS // vocabulary))


class _ProjectedLoss(torch.autograd.Function):
    """Sum of the loss over rows; the backward only scales what the forward computed."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, gamma, smoothing, z_loss, want_correct, want_grad):
        rows = chunk_rows(weight.shape[0])
        exact = torch.promote_types(hidden.dtype, torch.float32)
        # `needs_input_grad` is true under no_grad too: evaluation must not pay for gradients.
        need = [want_grad and needed for needed in ctx.needs_input_grad[:3]]
        grad_hidden = torch.empty_like(hidden) if need[0] else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if need[1] else None
        grad_bias = torch.zeros_like(bias, dtype=exact) if need[2] else None
        nll = torch.empty(len(targets), dtype=exact, device=hidden.device)
        correct = torch.empty(len(targets), dtype=torch.bool, device=hidden.device) if want_correct else None
        objective = torch.zeros((), dtype=exact, device=hidden.device)
        for at in range(0, len(targets), rows):
            h, t = hidden[at : at + rows], targets[at : at + rows]
            logits = p = grad = None  # frees the previous chunk: never two of them at once
            logits = F.linear(h, weight, bias)
            if want_correct:
                correct[at : at + rows] = logits.argmax(-1) == t
            target_logit = logits.gather(1, t[:, None])[:, 0].to(exact)
            top_logit = logits.amax(-1).to(exact)
            mean_logit = logits.mean(-1, dtype=exact) if smoothing else None
            if logits.dtype == exact:
                p = torch.softmax(logits, -1, out=logits)
            else:
                p = torch.softmax(logits, -1, dtype=exact)
            # The likeliest symbol's probability gives log Z exactly, also where the target's is 0 in fp32.
            log_z = top_logit - p.amax(-1).log()
            chunk_nll = log_z - target_logit
            nll[at : at + rows] = chunk_nll
            loss, target_slope, p_slope = _row_loss(chunk_nll, log_z, mean_logit, gamma, smoothing, z_loss)
            objective += loss.sum()
            if not any(need):
                continue
            # d loss / d logits = p_slope · p − target_slope · onehot − ε / V, in place of the probabilities
            if p_slope is not None:
                p.mul_(p_slope[:, None])
            if smoothing:
                p.sub_(smoothing / weight.shape[0])
            p.scatter_add_(1, t[:, None], -target_slope[:, None])
            grad = p.to(hidden.dtype)
            if need[0]:
                torch.mm(grad, weight, out=grad_hidden[at : at + rows])
            if need[1]:
                if grad.dtype == exact:
                    grad_weight.addmm_(grad.t(), h)
                else:
                    grad_weight += grad.t() @ h
            if need[2]:
                grad_bias += p.sum(0)
        logits = p = grad = None
        ctx.grads = (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
        )
        ctx.mark_non_differentiable(*(x for x in (nll, correct) if x is not None))
        return objective, nll, correct

    @staticmethod
    def backward(ctx, grad_objective, *_):
        # In place: no one else holds these tensors, and a second [V, d] copy would double the head's memory.
        grads = tuple(None if g is None else g.mul_(grad_objective) for g in ctx.grads)
        del ctx.grads
        return (*grads, *[None] * 6)


def _row_loss(
    nll: Tensor, log_z: Tensor, mean_logit: Tensor | None, gamma: float, smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(loss [n], target slope [n], slope of the probabilities [n] or None for 1) of each row: the slopes
    weight the target and the probabilities in d loss / d logits."""
    loss, slope = nll, torch.ones_like(nll)
    if gamma:
        p = torch.exp(-nll)
        rest = (1 - p).clamp_min(0)
        loss = rest**gamma * nll
        slope = rest**gamma + gamma * rest ** (gamma - 1) * p * nll
    if not (gamma or smoothing or z_loss):
        return loss, slope, None
    target_slope = (1 - smoothing) * slope
    p_slope = target_slope + smoothing
    loss = (1 - smoothing) * loss
    if smoothing:
        loss = loss + smoothing * (log_z - mean_logit)
    if z_loss:
        loss = loss + z_loss * log_z.square()
        p_slope = p_slope + 2 * z_loss * log_z
    return loss, target_slope, p_slope


class VocabularyHead(nn.Linear):
    """Linear [d → vocabulary] with bias, and its loss."""

    def forward(
        self,
        hidden_Nd: Tensor,
        targets_N: Tensor | None = None,
        focal_gamma: float = 0.0,
        want_correct: bool = False,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> Any:
        """Sum of the training loss over rows, per-row cross-entropy, and per-row arg-max hits.

        Args:
            hidden_Nd: [N, d].
            targets_N: int64 [N]; None returns float32 logits [N, V] instead (generation, checks).
            focal_gamma, label_smoothing, z_loss: γ, ε and z of the loss above; all 0 is cross-entropy.
            want_correct: also compare the arg max with the target.
        Returns: (objective scalar with gradient, nll float32 [N] in nats without gradient, bool [N] or None).
        """
        if targets_N is None:
            return F.linear(hidden_Nd, self.weight, self.bias).float()
        return _ProjectedLoss.apply(
            hidden_Nd,
            self.weight,
            self.bias,
            targets_N,
            focal_gamma,
            label_smoothing,
            z_loss,
            want_correct,
            torch.is_grad_enabled(),
        )
