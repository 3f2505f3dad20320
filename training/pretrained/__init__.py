"""A study of the papers' claims on SmolLM2-135M and a part of TOFU, small enough for two CPU cores."""
