"""NPO + retain with `transformers.Trainer`: one forward per step, no logits, no reference model in memory.

    python -m examples.transformers_trainer
    accelerate launch --config_file training/launch/ddp.yaml -m examples.transformers_trainer

A step does not depend on how its batch is split into processes and micro-batches, even uneven ones: the forget
sequences and retain tokens are counted over the accumulated batch of all processes, and each micro-batch divides by
these counts.
"""

import tempfile
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Trainer, TrainingArguments

from examples.tiny import collate, random_rows, tiny_model
from npo_kernels import fused_logprob_loss
from npo_kernels.hf import add_fused_unlearning_head


class UnlearningTrainer(Trainer):
    """Batches have input_ids, attention_mask, labels, and per row `forget` (bool) and `ref_logps` (float32).

    loss = mean over forget rows of (2/beta) softplus(beta (logp - ref)) + retain_weight * NLL per retain token
    """

    loss_is_scaled_for_ga = True  # `compute_loss` divides by the counts of the accumulated batch
    _signature_columns: list[str] | None  # type: ignore[assignment]  # transformers' own is inferred to be None

    def __init__(self, model, *args, beta: float = 0.1, retain_weight: float = 1.0, **kwargs):
        if kwargs.get("compute_metrics") is not None:
            raise ValueError(
                "compute_metrics gets logits, and there are none: evaluate log-probabilities in a callback"
            )
        super().__init__(add_fused_unlearning_head(model), *args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError("one process sees several GPUs (DataParallel): start one a GPU, with accelerate launch")
        self.beta, self.retain_weight = beta, retain_weight
        self.model_accepts_loss_kwargs = True  # used by releases before `loss_is_scaled_for_ga`

    def _set_signature_columns_if_needed(self):
        """Keeps columns that are not arguments of the forward, which would be dropped before the collator."""
        super()._set_signature_columns_if_needed()
        extra = {"prompt_ids", "completion_ids", "forget", "ref_logps"}
        columns = self._signature_columns or []
        self._signature_columns = [*columns, *extra.difference(columns)]

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of a step, and (forget sequences, retain tokens) in those of all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = sum((count_items(batch).to(device) for batch in batches), torch.zeros(2, device=device))
        return batches, self.accelerator.reduce(counts, "sum")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        forget, ref_logps = inputs.pop("forget"), inputs.pop("ref_logps")
        if not model.training or num_items_in_batch is None:  # evaluation: the mean of this batch
            num_forget, num_tokens = count_items({"forget": forget, "labels": inputs["labels"]})
        else:  # wrappers average over processes
            num_forget, num_tokens = num_items_in_batch / self.accelerator.num_processes

        def loss_fn(logps: Tensor, _) -> Tensor:
            npo = -(2 / self.beta) * F.logsigmoid(-self.beta * (logps - ref_logps))
            nll = torch.where(forget, 0.0, -logps).sum() / num_tokens.clamp(min=1e-9)
            return torch.where(forget, npo, 0.0).sum() / num_forget.clamp(min=1e-9) + self.retain_weight * nll

        # through `model`, which is the wrapped one: self.model would bypass the averaging of gradients
        out = model(**inputs, fused_unlearning=partial(fused_logprob_loss, loss_fn=loss_fn))
        return (out.loss, out) if return_outputs else out.loss


def count_items(batch: dict[str, Tensor]) -> Tensor:
    """(forget sequences, retain tokens), float32."""
    forget = batch["forget"]
    tokens = (batch["labels"][:, 1:] != -100).sum(1)
    return torch.stack((forget.sum(), torch.where(forget, 0, tokens).sum())).float()


def collate_rows(rows: list[dict]) -> dict[str, Tensor]:
    return {
        **collate(rows),
        "forget": torch.tensor([row["forget"] for row in rows]),
        "ref_logps": torch.tensor([row["ref_logps"] for row in rows], dtype=torch.float32),
    }


@torch.no_grad()
def with_reference(model, rows: list[dict], batch_size: int = 8) -> list[dict]:
    """The rows with `ref_logps`, the model's summed log-probability of each completion. Call it before training."""
    add_fused_unlearning_head(model).eval()
    logps = []
    for start in range(0, len(rows), batch_size):
        batch = {name: t.to(model.device) for name, t in collate(rows[start : start + batch_size]).items()}
        logps += model(**batch, fused_unlearning=True).logps.tolist()
    return [{**row, "ref_logps": value} for row, value in zip(rows, logps, strict=True)]


def example_rows(model) -> list[dict]:
    rows = [{**row, "forget": i % 2 == 0} for i, row in enumerate(random_rows(12, seed=1))]
    return with_reference(model, rows)


def main(batch_size: int = 6, accumulate: int = 1, epochs: int = 2, **settings) -> UnlearningTrainer:
    """Train, and print the loss of every step; the first is (2/beta) ln 2 + NLL."""
    model = tiny_model()
    rows = example_rows(model)
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "per_device_train_batch_size": batch_size,
            "gradient_accumulation_steps": accumulate,
            "num_train_epochs": epochs,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            "report_to": "none",
            **settings,
        }
        args = TrainingArguments(folder, **options)
        trainer = UnlearningTrainer(model, args, train_dataset=rows, data_collator=collate_rows)
        trainer.train()
    return trainer


if __name__ == "__main__":
    main()
