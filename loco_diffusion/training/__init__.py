"""Training of control adapters: configuration, trainer, checkpoints."""
