"""OpenUnlearning's trainers, fused: the same losses and gradients, without logits.

    python -m examples.open_unlearning

In OpenUnlearning, after its trainers are registered (src/trainer/__init__.py)::

    from examples.open_unlearning import fused
    _register_trainer(fused(NPO))  # handler: FusedNPO

| trainer    | forget term                                                    | arXiv      | computed by          |
|------------|----------------------------------------------------------------|------------|----------------------|
| GradAscent | mean_tok log p_y, and no retain term                           |            | `fused_logprob_loss` |
| GradDiff   | mean_tok log p_y                                               | 2401.06121 | `fused_logprob_loss` |
| NPO        | (2/beta) mean_s softplus(beta r), r = logp - ref_logp          | 2404.05868 | `fused_logprob_loss` |
| DPO        | (2/beta) mean_s softplus(beta (r_original - r_alternate))      | 2401.06121 | `fused_logprob_loss` |
| SimNPO     | (2/beta) mean_s softplus(beta (logp / num_tokens + delta))     | 2410.07163 | `fused_logprob_loss` |
| WGA        | mean_tok w log p_y, w = p_y^beta                               | 2502.19301 | `fused_token_loss`   |
| SatImp     | mean_tok w log p_y, w = p_y^beta1 (1 - p_y)^beta2              | 2505.11953 | `fused_token_loss`   |
| CEU        | mean_tok CE(softmax(z with z_y = -inf), p), and no retain term | 2503.01224 | `fused_token_loss`   |
| UNDIAL     | mean_tok CE(softmax(z_ref - beta 1_y), p)                      | 2402.10052 | `fused_linear_kl`    |
| PDU        | mean_tok (max_v z_v - mean_v z_v)^2                            | 2506.05314 | `token_statistics`   |
| RMU        | mean_s mean_tok,d (h - u)^2, h the output of a layer           | 2403.03218 | a forward hook       |

These are all of its trainers except FinetuneTrainer, whose loss is the model's own; IdkDPO and AltPO use DPO.
The loss is gamma forget + alpha retain. The retain term is "NLL", mean_tok -log p_y; "KL", KL(reference || model), as
published the mean over all B x T positions, including prompts and padding; or, for RMU, "EMBED_DIFF".

Trainers are recognised by their attributes, without importing OpenUnlearning: `gamma`, `alpha`, `beta`, `ref_model`,
`retain_loss_type`, and batches {"forget": ..., "retain": ...}. `examples/open_unlearning_head.py` has their common
parts.
"""

import copy
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.open_unlearning_head import Batch, FusedLoss, Rows, mean_nll, stack
from examples.tiny import collate, random_rows, tiny_model
from npo_kernels import fused_logprob_loss, fused_token_loss, token_statistics


class ForgetOnly(FusedLoss):
    """A trainer without gamma, alpha and a retain term."""

    uses_retain = False

    def total(self, forget, retain):
        return forget


# ---------------------------------------------------------------------------------------------------------------------
# Losses of log-probabilities: one call for forget and retain rows, and one gradient of the head
# ---------------------------------------------------------------------------------------------------------------------


class SequenceLoss(FusedLoss):
    def of_sequences(self, logps: Tensor, num_tokens: Tensor, batch: Batch) -> Tensor:
        """The forget term of (B,) summed log-probabilities and numbers of tokens."""
        raise NotImplementedError

    def forget_loss(self, rows):
        return rows(fused_logprob_loss, loss_fn=partial(self.of_sequences, batch=rows.batch))

    def loss(self, together, forget, retain=None):
        if retain is None or self.retain_loss_type != "NLL":
            return super().loss(together, forget, retain)
        count = len(forget.hidden)

        def loss_fn(logps: Tensor, num_tokens: Tensor) -> Tensor:
            forget_loss = self.of_sequences(logps[:count], num_tokens[:count], forget.batch)
            return self.total(forget_loss, mean_nll(logps[count:], num_tokens[count:]))

        return together(fused_logprob_loss, loss_fn=loss_fn)


class GradDiffLoss(SequenceLoss):
    def of_sequences(self, logps, num_tokens, batch):
        return -mean_nll(logps, num_tokens)


class GradAscentLoss(ForgetOnly, GradDiffLoss):
    pass


class NPOLoss(SequenceLoss):
    beta: float

    def forget_batch(self, inputs):
        return self.with_reference(inputs)

    def of_sequences(self, logps, num_tokens, batch):
        return -(2 / self.beta) * F.logsigmoid(-self.beta * (logps - batch["ref_logps"])).mean()


class DPOLoss(SequenceLoss):
    """The alternate answer is preferred to the original one."""

    beta: float

    def forget_batch(self, inputs):
        return self.with_reference(stack([inputs["original"], inputs["alternate"]]))

    def of_sequences(self, logps, num_tokens, batch):
        lose, win = (logps - batch["ref_logps"]).chunk(2)
        return -(2 / self.beta) * F.logsigmoid(self.beta * (win - lose)).mean()


class SimNPOLoss(SequenceLoss):
    beta: float
    delta: float

    def of_sequences(self, logps, num_tokens, batch):
        return -(2 / self.beta) * F.logsigmoid(self.beta * (-logps / num_tokens - self.delta)).mean()


class TokenLoss(FusedLoss):
    def of_tokens(self, logps: Tensor) -> Tensor:
        """The forget term of (N,) log-probabilities."""
        raise NotImplementedError

    def forget_loss(self, rows):
        return rows(fused_token_loss, loss_fn=lambda logps, sequence, num_tokens: self.of_tokens(logps))

    def loss(self, together, forget, retain=None):
        if retain is None or self.retain_loss_type != "NLL":
            return super().loss(together, forget, retain)
        count = len(forget.hidden)

        def loss_fn(logps: Tensor, sequence: Tensor, num_tokens: Tensor) -> Tensor:
            return self.total(self.of_tokens(logps[sequence < count]), -logps[sequence >= count].mean())

        return together(fused_token_loss, loss_fn=loss_fn)


class WGALoss(TokenLoss):
    beta: float

    def of_tokens(self, logps):
        weights = (self.beta * logps.detach()).exp()
        return (weights * logps).mean()


class SatImpLoss(TokenLoss):
    beta1: float
    beta2: float

    def of_tokens(self, logps):
        known = logps.detach()
        weights = (self.beta1 * known).exp() * (-known.expm1()) ** self.beta2
        return (weights * logps).mean()


class CEULoss(ForgetOnly, TokenLoss):
    """CE(sg[q], p) = (E + p_y log p_y) / (1 - p_y) with the entropy E of p, as q is p / (1 - p_y) without y.

    Its gradient in the logits is p - q, the gradient of -log(1 - p_y), which is a multiple of that of log p_y. So the
    gradient only needs log p_y, and the value is added as a constant.
    """

    ignore_first_n_answer_tokens: int

    def forget_batch(self, inputs):
        labels = inputs["labels"]
        first = (labels != -100).cumsum(1) <= self.ignore_first_n_answer_tokens
        return inputs | {"labels": labels.masked_fill(first, -100)}

    def forget_loss(self, rows):
        with torch.no_grad():
            found = rows(token_statistics, which=["logp", "entropy"])
        scored = rows.batch["labels"][:, 1:] != -100
        logp, entropy = (found[name][:, :-1][scored] for name in ("logp", "entropy"))
        value = ((entropy + logp.exp() * logp) / rest(logp)).mean()

        def loss_fn(logps: Tensor, sequence: Tensor, num_tokens: Tensor) -> Tensor:
            loss = -rest(logps).log().mean()
            return loss + (value - loss.detach())

        return rows(fused_token_loss, loss_fn=loss_fn)


# ---------------------------------------------------------------------------------------------------------------------
# Losses of distributions and of hidden states
# ---------------------------------------------------------------------------------------------------------------------


class UNDIALLoss(FusedLoss):
    """Cross-entropy to the reference with the label's logit lowered by beta: a KL, plus the entropy of that target.

    The mean is over scored positions. OpenUnlearning's is over all B x (T - 1), where a label of -100 lowers the logit
    of token V - 100: prompts and padding distil a reference without that token, and the loss depends on the padding.
    `published_rows = True` gives its numbers.
    """

    beta: float

    def forget_loss(self, rows):
        labels = F.pad(rows.batch["labels"][:, 1:], (0, 1), value=-100)
        mask = labels != -100
        if self.published_rows:
            labels = torch.where(mask, labels, len(rows.weight) - 100)
            mask = torch.ones_like(mask)
            mask[:, -1] = False

        def cross_entropy(ref: Rows) -> Tensor:
            with torch.no_grad():
                found = ref(token_statistics, labels=labels, shift=False, which=["logp", "entropy"])
                entropy = shifted_entropy(found["logp"][mask], found["entropy"][mask], self.beta)
            return rows.kl(ref, labels=labels, mask=mask, target_shift=self.beta) + entropy.mean()

        return self.in_reference(rows, cross_entropy)


class PDULoss(FusedLoss):
    """Flat logits on the forget set; the weight of the retain term is the dual variable of retain <= eps.

    The mean is over the positions that predict a label. OpenUnlearning's is over the positions of the labels, one
    later: `published_rows = True`. Its first version used all positions, also prompts and padding:
    `published_rows = "all"`.
    """

    preferences: list[float]
    retain_loss_eps: float
    primal_dual: bool
    dual_step_size: float
    dual_update_upon: str
    can_update: bool
    log: Callable[[dict[str, float]], None]
    uses_retain = True  # alpha is the initial weight

    def forget_loss(self, rows):
        labels = rows.batch["labels"]
        if not self.published_rows:
            labels = F.pad(labels[:, 1:], (0, 1), value=-100)
        elif self.published_rows == "all":
            labels = torch.zeros_like(labels)
        z = rows(token_statistics, labels=labels, shift=False, which=["max_logit", "mean_logit"])
        return (z["max_logit"] - z["mean_logit"]).square().sum() / (labels != -100).sum()

    def total(self, forget, retain):
        violation = retain - self.retain_loss_eps
        loss = self.preferences[0] * forget + self.preferences[1] * violation
        record = {"forget_loss": forget.item(), "retain_loss": retain.item()}
        if self.primal_dual:
            if self.can_update and self.dual_update_upon == "step":
                self.preferences[1] = max(0, self.preferences[1] + self.dual_step_size * violation.item())
            record["retain_preference"] = self.preferences[1]
        self.log(record)
        return loss


class RMULoss(FusedLoss):
    """Squared distance of a layer's output from a fixed vector, and of retain rows from the reference's (EMBED_DIFF).

    Each sequence contributes the mean over its labels' positions. OpenUnlearning divides (B,) by (B, 1), which gives
    the mean of the sums times the mean of 1 / num_tokens: the same for one sequence, and for equal numbers of tokens.
    `published_rows = True` gives its numbers.
    """

    get_control_vector: Callable[[int], Tensor]

    def forget_loss(self, rows):
        vector = self.get_control_vector(rows.activations.shape[-1])
        return self.distance(rows, vector.to(rows.activations))

    def retain_loss(self, rows):
        if self.retain_loss_type == "EMBED_DIFF":
            return self.in_reference(rows, lambda ref: self.distance(rows, ref.activations))
        return super().retain_loss(rows)

    def distance(self, rows: Rows, target: Tensor | None) -> Tensor:
        scored = rows.batch["labels"] != -100
        squares = ((rows.activations - target).square().mean(-1) * scored).sum(1)
        num_tokens = scored.sum(1)
        return squares.mean() * (1 / num_tokens).mean() if self.published_rows else (squares / num_tokens).mean()


def rest(logp: Tensor) -> Tensor:
    """1 - p, above 0 even if p rounds to 1."""
    return -logp.clamp(max=-1e-30).expm1()


def shifted_entropy(logp: Tensor, entropy: Tensor, shift: float) -> Tensor:
    """Entropy of softmax(z - shift 1_y), of log p_y and the entropy of p = softmax(z).

    With Z = 1 - p_y + p_y e^-shift the others have p_v / Z and y has p_y e^-shift / Z.
    """
    p, lowered = logp.exp(), logp - shift
    Z = -logp.expm1() + lowered.exp()
    return (entropy + p * logp - lowered.exp() * lowered) / Z + Z.log()


LOSSES: dict[str, type[FusedLoss]] = {
    "GradAscent": GradAscentLoss,
    "GradDiff": GradDiffLoss,
    "NPO": NPOLoss,
    "DPO": DPOLoss,
    "SimNPO": SimNPOLoss,
    "WGA": WGALoss,
    "SatImp": SatImpLoss,
    "CEU": CEULoss,
    "UNDIAL": UNDIALLoss,
    "PDU": PDULoss,
    "RMU": RMULoss,
}


def fused(trainer: type) -> type:
    """The trainer class `NPO` -> `FusedNPO`, with the same arguments."""
    if trainer.__name__ not in LOSSES:
        raise ValueError(f"fused: expected one of {', '.join(LOSSES)}, got {trainer.__name__}; it keeps its own loss")
    return type(f"Fused{trainer.__name__}", (LOSSES[trainer.__name__], trainer), {})


# ---------------------------------------------------------------------------------------------------------------------
# A run without OpenUnlearning: a stand-in for its NPO trainer
# ---------------------------------------------------------------------------------------------------------------------


class NPO:
    """The parts of the trainer that its loss needs."""

    def __init__(self, model, gamma=1.0, alpha=1.0, beta=0.1, retain_loss_type="NLL"):
        self.model, self.gamma, self.alpha, self.beta = model, gamma, alpha, beta
        self.retain_loss_type = retain_loss_type
        self.ref_model = copy.deepcopy(model).eval()

    def step(self, optimizer: torch.optim.Optimizer, inputs: dict, compute_loss: Callable) -> float:
        loss = compute_loss(self.model, inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()


def main() -> list[float]:
    trainer = fused(NPO)(model=tiny_model(), beta=0.1)
    optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=1e-3)
    inputs = {"forget": collate(random_rows(4, seed=1)), "retain": collate(random_rows(4, seed=2))}
    losses = [trainer.step(optimizer, inputs, trainer.compute_loss) for _ in range(5)]
    print(" ".join(f"{loss:.4f}" for loss in losses))
    return losses


if __name__ == "__main__":
    main()
