"""The custom operators of torch: what torch.compile, export and selective checkpointing see of this package."""
