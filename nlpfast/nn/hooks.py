"""Whether a module's work may be done by someone else."""

from __future__ import annotations

from torch import nn

__all__ = ["has_hooks", "is_plain"]


def has_hooks(module: nn.Module) -> bool:
    """Return whether anyone wants to see what goes into this module, or comes out of it."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether a module is of this very class and has no hooks: its parameters say what it does."""
    return type(module) is kind and not has_hooks(module)
