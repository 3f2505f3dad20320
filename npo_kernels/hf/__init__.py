"""`add_fused_unlearning_head`: the losses inside the forward of a Hugging Face model.

    model = add_fused_unlearning_head(AutoModelForCausalLM.from_pretrained(...))  # before any wrapper
    out = model(input_ids, attention_mask=mask, labels=labels, fused_unlearning=True)
    out.logps, out.num_tokens  # (B,), (B,)

See `npo_kernels.hf.model` for losses and for the arguments of the forward.
"""

from npo_kernels.hf.model import FusedUnlearningOutput, add_fused_unlearning_head

__all__ = ["FusedUnlearningOutput", "add_fused_unlearning_head"]
