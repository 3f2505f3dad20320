"""One process of `transformers_trainer` under `accelerate launch`: the first writes the trained weights and losses."""

import sys

import torch
from safetensors.torch import save_file

from examples.transformers_trainer import main

trainer = main(batch_size=2, accumulate=2, use_cpu=True)
if trainer.accelerator.is_main_process:
    assert trainer.accelerator.num_processes == 2
    losses = torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    save_file({**trainer.accelerator.unwrap_model(trainer.model).state_dict(), "losses": losses}, sys.argv[1])
trainer.accelerator.end_training()  # a process group that lives on until exit can abort the process
