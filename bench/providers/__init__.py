"""What is compared, by name. One module a peer; none is imported before it is run."""

from bench.providers import cce, liger, ours, plain, quack, trl
from bench.providers.base import Provider, UnsupportedError
from bench.providers.ours import plan_of

PROVIDERS: dict[str, Provider] = {
    provider.name: provider for module in (ours, plain, liger, trl, cce, quack) for provider in module.PROVIDERS
}

__all__ = ["PROVIDERS", "Provider", "UnsupportedError", "plan_of"]
