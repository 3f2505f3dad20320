"""The papers' claims on a pre-trained model that two cores can train: SmolLM2-135M on a part of TOFU."""
