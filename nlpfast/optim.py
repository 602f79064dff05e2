"""Optimizers that PyTorch does not have, and the one of a run by its name.

AdamW is that of CS224N's minBERT assignment, Adamax that of fairseq. They differ from PyTorch's in a detail
that a published result depends on; otherwise `torch.optim` is the right choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from nlpfast import native

__all__ = ["AdamW", "Adamax", "OptimizerOptions", "build_optimizer", "linear_weights_and_rest"]


class OptimizerOptions(Protocol):
    """What `build_optimizer` reads from a training configuration; `optimizer` too, where it has one."""

    learning_rate: float
    betas: tuple[float, float]
    weight_decay: float


def build_optimizer(
    decayed: Sequence[Tensor], kept: Sequence[Tensor], options: OptimizerOptions
) -> Optimizer:
    """Return the optimizer that a training configuration asks for, with two groups: `decayed` and `kept`.

    ========  ===========================================================================================
    adamw     ``torch.optim.AdamW``, decay decoupled (Loshchilov and Hutter 2019)
    adam      ``torch.optim.Adam`` (Kingma and Ba 2015); the decay is added to the gradient, as L2
    adamax    `Adamax`, decay decoupled
    sgd       ``torch.optim.SGD`` without momentum; the decay is added to the gradient; `betas` do not count
    ========  ===========================================================================================

    Args:
        decayed: parameters that decay by `options.weight_decay`.
        kept: parameters that do not decay.
        options: object with `learning_rate`, `betas` and `weight_decay`; its `optimizer` is one of the names
            above, "adamw" where it has none.

    Raises:
        ValueError: an unknown optimizer.
    """
    groups = [
        {"params": list(decayed), "weight_decay": options.weight_decay},
        {"params": list(kept), "weight_decay": 0.0},
    ]
    rate, betas = options.learning_rate, options.betas
    # the same formula in one kernel instead of ten; not every device has it
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in (*decayed, *kept))
    name = getattr(options, "optimizer", "adamw")
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=rate, betas=betas, fused=fused)
    if name == "adam":
        return torch.optim.Adam(groups, lr=rate, betas=betas, fused=fused)
    if name == "adamax":
        return Adamax(groups, lr=rate, betas=betas)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=rate)
    raise ValueError(f"optimizer={name!r} is unknown; give one of adamw, adam, adamax, sgd")


def linear_weights_and_rest(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the parameters of a model that decay, and those that do not, as in minGPT.

    The weights of `nn.Linear` layers decay. Biases, layer norms, embeddings, convolutions, recurrent layers
    and parameters of a module's own do not. A weight that an embedding and a linear layer share is that of
    whichever the model has first.

    Args:
        model: any module.
    """
    decay = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    parameters = dict(model.named_parameters())
    decayed = [parameter for name, parameter in parameters.items() if name in decay]
    return decayed, [parameter for name, parameter in parameters.items() if name not in decay]


class _Stepping(Optimizer):
    """An optimizer that updates group by group."""

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """Update all parameters that have a gradient.

        Args:
            closure: computes loss and gradients first, if it is given.

        Returns:
            What the closure returns, or None.

        Raises:
            RuntimeError: a gradient is sparse, or complex.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = _with_gradients(group["params"])
            if params:
                self._update(group, params, [param.grad for param in params if param.grad is not None])
        return loss

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        raise NotImplementedError


class AdamW(_Stepping):
    """Adam with decoupled weight decay, as in CS224N's minBERT assignment.

    With the averages m of the gradients and v of their squares after t steps::

        p -= lr * sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps)
        p -= lr * weight_decay * p

    It is the efficient form of Kingma and Ba 2015, at the end of section 2: `eps` is added to an average that
    is not bias-corrected yet. In ``torch.optim.AdamW`` it is added to the corrected one, and weights decay
    before the update.

    The state of a parameter has its type: use float32 parameters with autocast rather than 16-bit ones.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ) -> None:
        """Keep the parameters; there is no state before the first step.

        Args:
            params: parameters, or groups of them with options of their own.
            lr: learning rate, at least 0.
            betas: how much of the averages m and v stays in a step, from 0 to below 1 each.
            eps: keeps the quotient finite, at least 0.
            weight_decay: at least 0.
            correct_bias: correct the averages for their beginning at 0; without it the step is ``lr``.

        Raises:
            ValueError: an argument is outside its bounds.
        """
        _check(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**options, "correct_bias": correct_bias})

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        means, squares = (_averages(self, params, name) for name in ("exp_avg", "exp_avg_sq"))
        lr, (beta1, beta2) = group["lr"], group["betas"]
        torch._foreach_mul_(means, beta1)
        torch._foreach_add_(means, grads, alpha=1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        sizes = []
        for step in _counted(self, params):
            correction = math.sqrt(1 - beta2**step) / (1 - beta1**step) if group["correct_bias"] else 1.0
            sizes.append(-lr * correction)
        divisors = torch._foreach_sqrt(squares)
        torch._foreach_add_(divisors, group["eps"])
        torch._foreach_addcdiv_(params, means, divisors, sizes)
        if group["weight_decay"]:
            # no product with 1 - lr * weight_decay: in float32 it is 1.2e-7 below 1 where it should be 1e-7
            torch._foreach_add_(params, params, alpha=-lr * group["weight_decay"])


class Adamax(_Stepping):
    """Adamax with decoupled weight decay, as in fairseq.

    With the average m of the gradients g and the decaying maximum u of their sizes after t steps::

        m = beta1 * m + (1 - beta1) * g
        u = max(beta2 * u, |g|)
        p -= lr * weight_decay * p
        p -= lr / (1 - beta1^t) * m / (u + eps)

    It is algorithm 2 of Kingma and Ba 2015, with `eps`, and with the decay of Loshchilov and Hutter 2019.
    ``torch.optim.Adamax`` has u = max(beta2 * u, |g| + eps), and adds the decay to the gradient.

    The state of a parameter has its type: use float32 parameters with autocast rather than 16-bit ones.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        """Keep the parameters; there is no state before the first step.

        Args:
            params: parameters, or groups of them with options of their own.
            lr: learning rate, at least 0.
            betas: how much of the average m and of the maximum u stays in a step, from 0 to below 1 each.
            eps: keeps the quotient finite, at least 0.
            weight_decay: at least 0.

        Raises:
            ValueError: an argument is outside its bounds.
        """
        _check(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        means, sizes = (_averages(self, params, name) for name in ("exp_avg", "exp_inf"))
        lr, (beta1, beta2), decay = group["lr"], group["betas"], group["lr"] * group["weight_decay"]
        rates = [lr / (1 - beta1**step) for step in _counted(self, params)]
        rest = []
        for number, tensors in enumerate(zip(params, grads, means, sizes, strict=True)):
            if native.status() == "ok" and all(map(_flat_floats, tensors)):
                options = (beta1, beta2, group["eps"], rates[number], decay)
                torch.ops.nlpfast.adamax_step(*tensors, *options)
            else:
                rest.append((*tensors, -rates[number]))
        if rest:
            self._update_others(group, *map(list, zip(*rest, strict=True)))

    def _update_others(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        means: list[Tensor],
        sizes: list[Tensor],
        rates: list[float],
    ) -> None:
        """Do the same pass by pass, for other devices, dtypes and strides."""
        beta1, beta2 = group["betas"]
        torch._foreach_mul_(means, beta1)
        torch._foreach_add_(means, grads, alpha=1 - beta1)
        torch._foreach_mul_(sizes, beta2)
        torch._foreach_maximum_(sizes, torch._foreach_abs(grads))
        if group["weight_decay"]:
            torch._foreach_add_(params, params, alpha=-group["lr"] * group["weight_decay"])
        divisors = torch._foreach_add(sizes, group["eps"])
        torch._foreach_addcdiv_(params, means, divisors, rates)


def _check(*, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """Refuse what is outside its bounds, NaN too."""
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not value >= 0:
            raise ValueError(f"{name}={value} must be at least 0; pass another value")
    for place, value in enumerate(betas):
        if not 0 <= value < 1:
            raise ValueError(f"betas[{place}]={value} must be from 0 to below 1; pass another value")


def _flat_floats(x: Tensor) -> bool:
    """Return whether it is in float32 and contiguous, on the CPU and whole there."""
    alone = type(x) in (Tensor, nn.Parameter)
    return alone and x.device.type == "cpu" and x.dtype == torch.float32 and x.is_contiguous()


def _with_gradients(params: list[Tensor]) -> list[Tensor]:
    """Return the parameters that have a gradient; refuse gradients that the formulas are not for."""
    found = [param for param in params if param.grad is not None]
    for grad in (param.grad for param in found):
        if grad is not None and (grad.is_sparse or grad.is_complex()):
            kind, other = ("sparse", "SparseAdam") if grad.is_sparse else ("complex", "AdamW")
            raise RuntimeError(f"gradient is {kind}, must be dense and real; use torch.optim.{other} for it")
    return found


def _averages(optimizer: Optimizer, params: list[Tensor], name: str) -> list[Tensor]:
    """Return the state `name` of each parameter, zeros at first."""
    for param in params:
        state = optimizer.state[param]
        if name not in state:
            state[name] = torch.zeros_like(param, memory_format=torch.preserve_format)
    return [optimizer.state[param][name] for param in params]


def _counted(optimizer: Optimizer, params: list[Tensor]) -> list[int]:
    """Count a step of each parameter, and return how many there were, this one among them."""
    steps = []
    for param in params:
        state = optimizer.state[param]
        # a checkpoint may give it back as a tensor
        state["step"] = int(state.get("step", 0)) + 1
        steps.append(state["step"])
    return steps
