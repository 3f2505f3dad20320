"""NPO in a plain PyTorch loop: the same steps with logits and without.

python -m examples.plain_loop
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.tiny import collate, random_rows, tiny_model
from npo_kernels import fused_npo_loss, sequence_logprobs

BETA, STEPS = 0.1, 5


def plain_logps(model, batch: dict[str, Tensor]) -> Tensor:
    """The code that the library replaces: it forms the logits of all positions and all tokens."""
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
    targets = batch["labels"][:, 1:]
    tokens = logits[:, :-1].log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    return (tokens * (targets != -100)).sum(-1)


def plain_loss(model, batch: dict[str, Tensor], ref_logps: Tensor) -> Tensor:
    log_ratio = plain_logps(model, batch) - ref_logps
    return -(2 / BETA) * F.logsigmoid(-BETA * log_ratio).mean()


def hidden_states(model, batch: dict[str, Tensor]) -> Tensor:
    """The model without its lm-head. Models in a wrapper (DDP, FSDP) need `npo_kernels.hf`: see
    examples.transformers_trainer."""
    return model.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state


def fused_loss(model, batch: dict[str, Tensor], ref_logps: Tensor) -> Tensor:
    hidden = hidden_states(model, batch)
    return fused_npo_loss(hidden, model.lm_head.weight, batch["labels"], ref_logps=ref_logps, beta=BETA)


def train(loss_of) -> list[float]:
    """The loss before each step; the first is (2/beta) ln 2, as the model is its own reference."""
    model, batch = tiny_model(), collate(random_rows(6, seed=1))
    with torch.no_grad():
        ref_logps, _ = sequence_logprobs(hidden_states(model, batch), model.lm_head.weight, batch["labels"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(STEPS):
        loss = loss_of(model, batch, ref_logps)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> dict[str, list[float]]:
    losses = {"with logits": train(plain_loss), "fused": train(fused_loss)}
    for name, values in losses.items():
        print(f"{name:<12}", " ".join(f"{value:.4f}" for value in values))
    return losses


if __name__ == "__main__":
    main()
