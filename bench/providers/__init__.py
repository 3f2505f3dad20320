"""The compared providers, by name. One module for each peer; a peer is imported only when it runs."""

from bench.providers import cce, liger, ours, plain, quack, trl
from bench.providers.base import Provider, UnsupportedError
from bench.providers.ours import plan_of

PROVIDERS: dict[str, Provider] = {
    provider.name: provider for module in (ours, plain, liger, trl, cce, quack) for provider in module.PROVIDERS
}

__all__ = ["PROVIDERS", "Provider", "UnsupportedError", "plan_of"]
