"""GPT: a Transformer that predicts the next token, with the interface of minGPT (2020).

    tokens -> tok_emb + pos_emb -> drop -> Block x n_layer -> ln_f -> head -> logits

With `perceiver` the first and the last layer are those of a bottleneck (perceiver.py), and the blocks between
them work on its `bottleneck_dim` latents. Such a model sees the tokens from there on in their own positions
alone.

A block adds twice to its input: attention over the positions so far, then a two-layer network at each
position; both read a layer-normalised copy (pre-norm). Sources: Radford et al. 2018, "Improving Language
Understanding by Generative Pre-Training"; Radford et al. 2019, "Language Models are Unsupervised Multitask
Learners" (pre-norm).

Shapes: B batch, T sequence length, C channels (n_embd), V vocabulary.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nlpfast.models import pretrained
from nlpfast.models.perceiver import DownProjectBlock, UpProjectBlock
from nlpfast.nn import CausalCrossAttention, CausalSelfAttention
from nlpfast.ops.cross_entropy import cross_entropy
from nlpfast.ops.linear_cross_entropy import linear_cross_entropy

__all__ = ["GPT", "Block", "GPT1Config", "GPTConfig", "OptimizerOptions"]


class GPTConfig:
    """The sizes of a GPT; every keyword becomes an attribute.

    Attributes:
        vocab_size: V.
        block_size: longest sequence.
        n_layer: number of blocks.
        n_head: attention heads, a divisor of `n_embd`.
        n_embd: channels, C.
        embd_pdrop: dropout after the embeddings.
        resid_pdrop: dropout of what a block adds.
        attn_pdrop: dropout of the attention probabilities.
        ignore_index: targets with this value do not count in the loss.
        perceiver: whether there is a bottleneck, in the place of the first and the last block.
        bottleneck_dim: its latents.
        latent_init: "xavier" or "normal": see `perceiver.PerceiverConfig`, also for the next two.
        normalize_query: False as in the assignment.
        residual: False as in the assignment.
    """

    vocab_size: int
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int
    embd_pdrop: float = 0.1
    resid_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    ignore_index: int = -100
    perceiver: bool = False
    bottleneck_dim: int = 32
    latent_init: str = "xavier"
    normalize_query: bool = False
    residual: bool = False

    def __init__(self, vocab_size: int, block_size: int, **kwargs: Any) -> None:
        """Set the attributes.

        Args:
            vocab_size: V.
            block_size: longest sequence.
            **kwargs: further attributes; names that are not listed above are kept as they are.

        Raises:
            ValueError: when a keyword is almost, but not quite, one of the names above.
        """
        self.vocab_size = vocab_size
        self.block_size = block_size
        known = list(GPTConfig.__annotations__)
        for name, value in kwargs.items():
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
            if near and name not in known and not hasattr(self, name):
                raise ValueError(
                    f"{name}={value!r} is not a field of {type(self).__name__}; write {near[0]}={value!r}"
                )
            setattr(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields by name, class defaults included.

        Raises:
            ValueError: when a field is not a number, a string, a truth value or None, as config.json holds no
                others.
        """
        defaults = [name for cls in reversed(type(self).__mro__) for name in vars(cls)]
        names = dict.fromkeys([*GPTConfig.__annotations__, *defaults, *vars(self)])
        fields = {name: getattr(self, name) for name in names if name[0] != "_" and hasattr(self, name)}
        fields = {name: value for name, value in fields.items() if not callable(value)}
        for name, value in fields.items():
            if not isinstance(value, (int, float, str, type(None))):
                raise ValueError(
                    f"config.{name} is a {type(value).__name__}, expected a number, a string, a bool or "
                    "None; remove it before saving"
                )
        return fields


class GPT1Config(GPTConfig):
    """The first GPT: 12 layers, 12 heads, 768 channels (Radford et al. 2018)."""

    n_layer = 12
    n_head = 12
    n_embd = 768


class OptimizerOptions(Protocol):
    """What `GPT.configure_optimizers` reads from a training configuration."""

    learning_rate: float
    betas: tuple[float, float]
    weight_decay: float


class Block(nn.Module):
    """One layer: ``x = x + attn(ln1(x))``, then ``x = x + mlp(ln2(x))``."""

    def __init__(self, config: GPTConfig) -> None:
        """Build the attention and the two-layer network, 4 C wide in the middle."""
        super().__init__()
        self.ln1 = nn.LayerNorm(config.n_embd)
        self.ln2 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.mlp = nn.Sequential(
            nn.Linear(config.n_embd, 4 * config.n_embd),
            nn.GELU(),
            nn.Linear(4 * config.n_embd, config.n_embd),
            nn.Dropout(config.resid_pdrop),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the next layer's input; [B, T, C] -> [B, T, C]."""
        x = x + self.attn(self.ln1(x))
        x = x + self.mlp(self.ln2(x))
        return x


class GPT(nn.Module):
    """The language model.

    Attributes:
        config: the configuration it was built from.
        block_size: longest sequence it reads.
    """

    def __init__(self, config: GPTConfig) -> None:
        """Build the model; linear and embedding weights come from N(0, 0.02), biases and positions are 0.

        Args:
            config: all of `vocab_size`, `block_size`, `n_layer`, `n_head` and `n_embd` set.

        Raises:
            ValueError: when a size is missing or below 1, `n_head` does not divide `n_embd`, a dropout
                probability is outside [0, 1], or a bottleneck is wider than a sequence or without layers.
        """
        super().__init__()
        _check(config)
        self.config = config
        self.block_size = config.block_size
        self.tok_emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.pos_emb = nn.Parameter(torch.zeros(1, config.block_size, config.n_embd))
        self.drop = nn.Dropout(config.embd_pdrop)
        if config.perceiver:
            self.down_block, self.up_block = DownProjectBlock(config), UpProjectBlock(config)
        blocks = config.n_layer - 2 if config.perceiver else config.n_layer
        self.blocks = nn.Sequential(*[Block(config) for _ in range(blocks)])
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.apply(_init_weights)

    def get_block_size(self) -> int:
        """Return the longest sequence that the model reads, `block_size`."""
        return self.block_size

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, *, return_logits: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the logits of the token after each position, and the loss if targets are given.

        The loss is ``F.cross_entropy(logits.view(-1, V), targets.view(-1),
        ignore_index=config.ignore_index)``, in float32.

        Args:
            idx: tokens [B, T], int64 or int32, 0 <= idx < V, T <= block_size.
            targets: the tokens that follow, int64 [B, T]; `config.ignore_index` where none counts.
            return_logits: without, and with targets, the loss alone is computed, by ``linear_cross_entropy``,
                and there are never all logits at once; hooks of `head` are not called.

        Returns:
            logits [B, T, V] and a scalar loss, or None in the place of each that was not asked for.

        Raises:
            ValueError: when the shapes do not fit, T > block_size, or (on the CPU) a token is outside the
                vocabulary; a GPU stops with its own assertion in that case.
        """
        if idx.dim() != 2:
            raise ValueError(f"idx has shape {list(idx.shape)}, expected [B, T]; add the batch dimension")
        T = idx.shape[1]
        if self.block_size < T:
            raise ValueError(
                f"idx has T={T} tokens a row, block_size={self.block_size} is the most this model reads; "
                "crop idx or build the model with a larger block_size"
            )
        if targets is not None and targets.shape != idx.shape:
            raise ValueError(
                f"targets has shape {list(targets.shape)}, idx {list(idx.shape)}; both must be [B, T]"
            )
        V = self.config.vocab_size
        try:
            x = self.tok_emb(idx)  # [B, T, C]
        except IndexError:
            raise _outside(idx, V) from None
        x = self.drop(x + self.pos_emb[:, :T])
        perceiver = self.config.perceiver
        x = self.up_block(self.blocks(self.down_block(x)), x) if perceiver else self.blocks(x)
        x = self.ln_f(x)
        ignored = self.config.ignore_index
        if targets is not None and not return_logits:
            return None, linear_cross_entropy(x, self.head.weight, targets, ignore_index=ignored)
        logits = self.head(x)  # [B, T, V]
        return logits, None if targets is None else cross_entropy(logits, targets, ignore_index=ignored)

    def configure_optimizers(self, train_config: OptimizerOptions) -> torch.optim.AdamW:
        """Return AdamW that decays the weights of linear layers, and nothing else.

        Biases, layer norms, embeddings and positions are not decayed (the first group decays, the second does
        not).

        Args:
            train_config: object with `learning_rate`, `betas` and `weight_decay`.
        """
        decay = {f"{name}.weight" for name, module in self.named_modules() if isinstance(module, nn.Linear)}
        parameters = dict(self.named_parameters())
        groups = [
            {
                "params": [p for n, p in parameters.items() if n in decay],
                "weight_decay": train_config.weight_decay,
            },
            {"params": [p for n, p in parameters.items() if n not in decay], "weight_decay": 0.0},
        ]
        # the same formula in one kernel instead of ten; not every device has it
        fused = all(p.device.type in ("cpu", "cuda") for p in parameters.values())
        return torch.optim.AdamW(groups, lr=train_config.learning_rate, betas=train_config.betas, fused=fused)

    def save_pretrained(self, folder: str | Path, *, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Write config.json and model.safetensors; a write that fails leaves the files that were there.

        Args:
            folder: made when missing.
            state_dict: the weights to be written, where the module has only parts of them; None for its own.

        Raises:
            ValueError: when the configuration holds something other than plain values.
            OSError: when the folder cannot be made or a file cannot be written; names it.
        """
        pretrained.write(
            folder, {"model_type": "gpt", **self.config.to_dict()}, state_dict or self.state_dict()
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> GPT:
        """Read a model that `save_pretrained` wrote.

        It comes in evaluation mode, on the CPU, in the dtype in which it was saved. `mask` buffers of minGPT
        among the weights are left out. Nothing in the files is executed.

        Args:
            folder: holds config.json and model.safetensors.

        Raises:
            OSError: when a file is missing or unreadable; names it.
            ValueError: when a file is damaged, or its keys or shapes are not those of the configuration;
                names the file, the key and both shapes.
        """
        fields = pretrained.read_config(folder, "gpt")
        try:
            # no memory and no random numbers for weights that the file replaces
            with torch.device("meta"):
                model = cls(GPTConfig(**{"vocab_size": None, "block_size": None, **fields}))
        except ValueError as error:
            raise ValueError(f"{Path(folder) / pretrained.CONFIG_FILE}: {error}") from error
        masks = {
            f"{name}.mask"
            for name, module in model.named_modules()
            if isinstance(module, (CausalSelfAttention, CausalCrossAttention))
        }
        state = {name: w for name, w in pretrained.read_weights(folder).items() if name not in masks}
        pretrained.check_weights(folder, model.state_dict(), state)
        model.load_state_dict(state, assign=True)
        return model.eval()


def _check(config: GPTConfig) -> None:
    for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
        value = getattr(config, name, None)
        if not isinstance(value, int) or value < 1:
            raise ValueError(
                f"config.{name}={value!r} must be an integer >= 1; pass {name}= to the configuration"
            )
    if config.perceiver and not 1 <= config.bottleneck_dim <= config.block_size:
        rule = f"must be within 1..{config.block_size}, the block_size; latents beyond it see nothing"
        raise ValueError(f"config.bottleneck_dim={config.bottleneck_dim!r} {rule}")
    if config.perceiver and config.n_layer < 2:
        rule = "must be at least 2 with perceiver=True; two are the bottleneck's"
        raise ValueError(f"config.n_layer={config.n_layer} {rule}")
    for name in ("embd_pdrop", "resid_pdrop", "attn_pdrop"):
        value = getattr(config, name)
        if not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
            raise ValueError(f"config.{name}={value!r} must be a probability in [0, 1]; 0 turns dropout off")


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, mean=0.0, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def _outside(idx: Tensor, V: int) -> ValueError:
    b, t = ((idx < 0) | (idx >= V)).nonzero()[0].tolist()
    return ValueError(
        f"idx[{b}, {t}] is {int(idx[b, t])}, outside the vocabulary 0..{V - 1}; "
        "encode the text with the vocabulary the model was built for"
    )
