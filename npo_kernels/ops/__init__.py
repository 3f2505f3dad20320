"""The custom torch operators of this package, as torch.compile, export and selective checkpointing see them."""
