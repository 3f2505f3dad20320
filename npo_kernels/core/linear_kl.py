"""KL of two heads on two hidden states, neither set of logits kept: p = softmax(z), q = softmax(z_ref).

    forward   KL_i = sum_v q_iv (log q_iv - log p_iv)     dKL_i / dz_iv = p_iv - q_iv
    reverse   KL_i = sum_v p_iv (log p_iv - log q_iv)     dKL_i / dz_iv = p_iv (log p_iv - log q_iv - KL_i)

The normalizers of both softmaxes come first (one product each); a second sweep over the vocabulary, a slice at a time,
forms the sum and the gradient from the difference of the log-probabilities, which keeps their relative precision where
the models agree and at logits of any size (`csrc_triton.linear_kl`), and takes the gradients there. The gradient of the
reverse direction needs KL_i itself, so there the sum has a sweep of its own before. Products, with both gradients:

|         | sum or mean, all in the forward | each position: forward + backward |
|---------|---------------------------------|-----------------------------------|
| forward | 2 + 4 = 6                       | 4 + 4 = 8                         |
| reverse | 2 + 2 + 4 = 8                   | 4 + 4 = 8                         |

A target shift lowers the reference's logit at the label, z_ref - shift [v = label], in both sweeps; nothing is copied.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from npo_kernels.core.execute import finish_hidden_grad, slab_rooms
from npo_kernels.core.gradients import Gradients, HeadGradients
from npo_kernels.core.lm_head import Head
from npo_kernels.core.matmul import matmul
from npo_kernels.core.plan import Plan
from npo_kernels.core.softmax_stats import Divergence, Lowered, Normalizers, merge_sums
from npo_kernels.core.task import Task


@dataclass(frozen=True)
class Pair:
    """The counted positions of both models."""

    task: Task  # of the model
    x: Tensor  # (N, H)
    ref_x: Tensor  # (N, H_ref)
    ref_head: Head
    lowered: Lowered | None = None  # of the reference's logits
    reverse: bool = False  # KL(model || reference)

    def normalizers(self) -> Normalizers:
        """Of both softmaxes; NaN where the target of a row is no token. Two products."""
        backend = self.task.backend
        model = merge_sums(*backend.softmax_sums(self.x, self.task.head, self.ref_x, None))
        anchor, total = merge_sums(*backend.softmax_sums(self.ref_x, self.ref_head, self.x, self.lowered))
        if self.lowered is not None:
            total = torch.where(self.lowered.valid(self.ref_head.weight.shape[0]), total, torch.nan)
        return Normalizers(*model, anchor, total)

    def divergence(self, normalizers: Normalizers, kl: Tensor | None = None) -> Divergence:
        return Divergence(normalizers.vectors(), self.lowered, self.reverse, kl)

    def plan(self, workspace_bytes: int | None) -> Plan:
        """Of the sweep that forms all gradients that are wanted."""
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
        """KL of each row (N,), and the gradients of sum_i row_weight_i KL_i. Two products, and one a gradient.

        The reverse direction takes `values` first, two products more, unless they are given.
        """
        task, head = self.task, self.task.head
        if self.reverse and kl is None:
            kl = self.values(normalizers)
        divergence = self.divergence(normalizers, kl)
        product = torch.zeros(self.x.shape, dtype=torch.float32, device=self.x.device) if task.needs.hidden else None
        head_grads = HeadGradients(task, accumulate=False)
        coefs = -row_weight * head.logit_scale, torch.zeros_like(row_weight)  # no label has a term of its own
        head_grads.take_rows(self.x, *coefs, target=None)
        parts, models = [], (self.x, head, self.ref_x, self.ref_head)
        for begin, end, room in slab_rooms(task.backend, self.x, plan.slices):
            slab, part = task.backend.kl_logits(*models, divergence, (begin, end), out=room)
            parts.append(part)
            if product is not None:
                matmul(slab, head.weight[begin:end], out=product)
            head_grads.add(slab, begin, end)
        del room, slab
        hidden_grad = None
        if product is not None:
            # contiguous, whatever the hidden states are
            hidden_grad = task.hidden.new_zeros(task.hidden.shape, dtype=task.wide_dtype)
            finish_hidden_grad(task, product, coefs, task.rows.target, task.rows.index, hidden_grad)
        return torch.cat(parts).sum(0) if kl is None else kl, Gradients(hidden_grad, *head_grads.result())

    def scatter(self, values: Tensor) -> Tensor:
        """(..., N) values at their positions (..., T), 0 outside the mask."""
        out = values.new_zeros(*values.shape[:-1], self.task.hidden.shape[0])
        return out.index_copy_(-1, self.task.rows.index, values)
