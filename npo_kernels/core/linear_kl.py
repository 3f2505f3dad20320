"""KL divergence of a model, p = softmax(z), and a reference, q = softmax(z_ref), without keeping either set of logits.

    forward   KL_i = sum_v q_iv (log q_iv - log p_iv)     dKL_i / dz_iv = p_iv - q_iv
    reverse   KL_i = sum_v p_iv (log p_iv - log q_iv)     dKL_i / dz_iv = p_iv (log p_iv - log q_iv - KL_i)

First the normalizers of both softmaxes are computed (one product each). A second sweep over the vocabulary, one slice
at a time, computes the sum and the gradient from the difference of the log-probabilities. This keeps their relative
precision where the models agree, for logits of any size (`csrc_triton.linear_kl`). The gradient of the reverse
direction needs KL_i itself, so KL_i is computed in a separate sweep before. Number of products with both gradients:

|         | sum or mean, all in the forward | each position: forward + backward |
|---------|---------------------------------|-----------------------------------|
| forward | 2 + 4 = 6                       | 4 + 4 = 8                         |
| reverse | 2 + 2 + 4 = 8                   | 4 + 4 = 8                         |

A target shift lowers the reference's logit at the label, z_ref - shift [v = label], in both sweeps, without a copy.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from npo_kernels.core.execute import finish_hidden_grad, slab_buffers
from npo_kernels.core.gradients import Gradients, HeadGradients
from npo_kernels.core.lm_head import Head
from npo_kernels.core.matmul import matmul
from npo_kernels.core.plan import Plan
from npo_kernels.core.softmax_stats import Divergence, Lowered, Normalizers, merge_sums
from npo_kernels.core.task import Task


@dataclass(frozen=True)
class Pair:
    """The counted positions (those of the mask) of both models."""

    task: Task  # the model's
    x: Tensor  # (N, H)
    ref_x: Tensor  # (N, H_ref)
    ref_head: Head
    lowered: Lowered | None = None  # the target shift of the reference
    reverse: bool = False  # KL(model || reference)

    def normalizers(self) -> Normalizers:
        """Normalizers of both softmaxes; NaN for a row whose label is outside [0, V). Two products."""
        backend = self.task.backend
        model = merge_sums(*backend.softmax_sums(self.x, self.task.head, self.ref_x, None))
        anchor, total = merge_sums(*backend.softmax_sums(self.ref_x, self.ref_head, self.x, self.lowered))
        if self.lowered is not None:
            total = torch.where(self.lowered.valid(self.ref_head.weight.shape[0]), total, torch.nan)
        return Normalizers(*model, anchor, total)

    def divergence(self, normalizers: Normalizers, kl: Tensor | None = None) -> Divergence:
        return Divergence(normalizers.vectors(), self.lowered, self.reverse, kl)

    def plan(self, workspace_bytes: int | None) -> Plan:
        """Plan of the sweep that computes the gradients."""
        return self.task.plan(
            workspace_bytes,
            gradient_in_forward=False,
            summed=True,
            scratch=self.task.backend.kl_scratch(self.x, self.task.head, self.ref_x, self.ref_head),
            beside=self.ref_x.numel() * self.ref_x.itemsize,
        )

    def values(self, normalizers: Normalizers) -> Tensor:
        """(N,) KL of each row. Two products."""
        divergence = self.divergence(normalizers)
        return self.task.backend.kl_sums(self.x, self.task.head, self.ref_x, self.ref_head, divergence).sum(0)

    def sweep(
        self, normalizers: Normalizers, row_weight: Tensor, plan: Plan, kl: Tensor | None = None
    ) -> tuple[Tensor, Gradients]:
        """(KL of each row (N,), gradients of sum_i row_weight_i KL_i). Two products, and one per gradient.

        The reverse direction computes `values` first (two more products) unless `kl` is given.
        """
        task, head = self.task, self.task.head
        if self.reverse and kl is None:
            kl = self.values(normalizers)
        divergence = self.divergence(normalizers, kl)
        product = torch.zeros(self.x.shape, dtype=torch.float32, device=self.x.device) if task.needs.hidden else None
        head_grads = HeadGradients(task, accumulate=False)
        coefs = -row_weight * head.logit_scale, torch.zeros_like(row_weight)  # KL has no target terms
        head_grads.take_rows(self.x, *coefs, target=None)
        parts, models = [], (self.x, head, self.ref_x, self.ref_head)
        for begin, end, buffer in slab_buffers(task.backend, self.x, plan.slices):
            slab, part = task.backend.kl_logits(*models, divergence, (begin, end), out=buffer)
            parts.append(part)
            if product is not None:
                matmul(slab, head.weight[begin:end], out=product)
            head_grads.add(slab, begin, end)
        del buffer, slab
        hidden_grad = None
        if product is not None:
            # contiguous, even if the hidden states are not
            hidden_grad = task.hidden.new_zeros(task.hidden.shape, dtype=task.wide_dtype)
            finish_hidden_grad(task, product, coefs, task.rows.target, task.rows.index, hidden_grad)
        return torch.cat(parts).sum(0) if kl is None else kl, Gradients(hidden_grad, *head_grads.result())

    def scatter(self, values: Tensor) -> Tensor:
        """Scatter values (..., N) to their positions (..., T); 0 outside the mask."""
        out = values.new_zeros(*values.shape[:-1], self.task.hidden.shape[0])
        return out.index_copy_(-1, self.task.rows.index, values)
