"""The operations: one package each, a definition in plain PyTorch and its backends."""
