"""A Transformer of PyTorch's own layers, on padded batches with masks, with the weights of ours."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from nlpfast.models.transformer import Transformer, TransformerConfig
from nlpfast.models.transformer_layers import sinusoids
from nlpfast.nn.packing import Packing

SOURCE_LENGTHS, TARGET_LENGTHS = [5, 1, 7, 3], [4, 6, 1, 3]
V, C, H = 13, 16, 4

# names of PyTorch's layers, and of ours; what is one there may be several here, one below the other
BOTH = {
    "self_attn.in_proj_{}": ("self_attention.in_proj.{}",),
    "self_attn.out_proj.{}": ("self_attention.out_proj.{}",),
    "linear1.{}": ("network.fc1.{}",),
    "linear2.{}": ("network.fc2.{}",),
    "norm1.{}": ("self_attention_norm.{}",),
}
ENCODER = {**BOTH, "norm2.{}": ("network_norm.{}",)}
DECODER = {
    **BOTH,
    "multihead_attn.in_proj_{}": ("cross_attention.query_proj.{}", "cross_attention.key_value_proj.{}"),
    "multihead_attn.out_proj.{}": ("cross_attention.out_proj.{}",),
    "norm2.{}": ("cross_attention_norm.{}",),
    "norm3.{}": ("network_norm.{}",),
}


def sizes(**changes):
    """Return a configuration of some layers, without dropout."""
    fields = {"encoder_layers": 2, "decoder_layers": 4, "d_model": C, "heads": H, "d_ff": 20, "dropout": 0.0}
    vocabularies = {"source_vocab": V, "target_vocab": V}
    return TransformerConfig(**{**vocabularies, **fields, "max_positions": 50, **changes})


def ours(dtype=torch.float64, **changes):
    """Return our model, with weights that make every part count, in evaluation mode."""
    torch.manual_seed(1)
    model = Transformer(sizes(**changes)).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.3)
            if name.endswith("norm.weight"):
                parameter.add_(1.0)
    return model.eval()


def batch(sources=SOURCE_LENGTHS, targets=TARGET_LENGTHS, vocabulary=V):
    """Return padded sources, their lengths, padded targets, their lengths; padding is token 0."""
    generator = torch.Generator().manual_seed(2)
    sides = []
    for lengths in (sources, targets):
        tokens = torch.randint(1, vocabulary, (len(lengths), max(lengths)), generator=generator)
        lengths = torch.tensor(lengths)
        sides += [tokens * (torch.arange(tokens.shape[1]) < lengths[:, None]), lengths]
    return sides


def packed(source, source_lengths, target, target_lengths):
    """Return the same as `Transformer.forward` takes it."""
    sides = Packing.of_lengths(source_lengths), Packing.of_lengths(target_lengths)
    tokens = (x[:, : side.longest][side.within()] for x, side in zip((source, target), sides, strict=True))
    return *tokens, *sides


class Plain(nn.Module):
    """The model of Vaswani et al., from torch.nn.TransformerEncoderLayer and TransformerDecoderLayer."""

    def __init__(self, model):
        super().__init__()
        config = self.config = model.config
        options = {
            "dim_feedforward": config.d_ff,
            "dropout": 0.0,
            "activation": config.activation,
            "batch_first": True,
            "norm_first": config.norm == "pre",
            "dtype": model.output_weight.dtype,
        }
        size = (config.d_model, config.heads)
        self.encoder = nn.ModuleList(
            nn.TransformerEncoderLayer(*size, **options) for _ in range(config.encoder_layers)
        )
        self.decoder = nn.ModuleList(
            nn.TransformerDecoderLayer(*size, **options) for _ in range(config.decoder_layers)
        )
        self.source, self.target = (
            nn.Parameter(s.tokens.weight.clone()) for s in (model.source, model.target)
        )
        self.output = nn.Parameter(model.output_weight.clone())
        if config.tied != "none":
            self.output = self.target
        if config.tied == "all":
            self.source = self.target
        table = sinusoids(50, config.d_model).to(self.output)
        for side in ("source", "target"):
            learned = getattr(model, side).positions
            positions = table if learned is None else nn.Parameter(learned.weight.clone())
            setattr(self, f"{side}_positions", positions)
        self.encoder_norm, self.decoder_norm = nn.Identity(), nn.Identity()
        if config.norm == "pre":
            self.encoder_norm, self.decoder_norm = (
                nn.LayerNorm(config.d_model, dtype=self.output.dtype) for _ in range(2)
            )
        with torch.no_grad():
            for theirs, those in self.correspondence(model):
                theirs.copy_(torch.cat([p.detach() for p in those]))

    def correspondence(self, model):
        """Yield each of our parameters with those of the other model that it consists of."""
        own, other = dict(self.named_parameters()), dict(model.named_parameters(remove_duplicate=False))
        for side, table in (("encoder", ENCODER), ("decoder", DECODER)):
            for number in range(len(getattr(self, side))):
                for name, names in table.items():
                    for kind in ("weight", "bias"):
                        those = [other[f"{side}.{number}.{n.format(kind)}"] for n in names]
                        yield own[f"{side}.{number}.{name.format(kind)}"], those
            if self.config.norm == "pre":
                for kind in ("weight", "bias"):
                    yield own[f"{side}_norm.{kind}"], [other[f"{side}_norm.{kind}"]]
        for side in ("source", "target"):
            yield getattr(self, side), [other[f"{side}.tokens.weight"]]
            if self.config.positions == "learned":
                yield getattr(self, f"{side}_positions"), [other[f"{side}.positions.weight"]]
        yield self.output, [model.output_weight]

    def embed(self, side, tokens):
        """Return what the first layer reads."""
        places = getattr(self, f"{side}_positions")[: tokens.shape[1]]
        return F.embedding(tokens, getattr(self, side)) * math.sqrt(self.config.d_model) + places

    def encode(self, source, lengths):
        """Return the memory, and where it is padding."""
        padding = torch.arange(source.shape[1]) >= lengths[:, None]
        x = self.embed("source", source)
        for layer in self.encoder:
            x = layer(x, src_key_padding_mask=padding)
        return self.encoder_norm(x), padding

    def layers(self, source, source_lengths, target, target_lengths, *, causal=True):
        """Return what the decoder's layers read, and what comes out of the last; memory; padding; mask."""
        memory, padding = self.encode(source, source_lengths)
        T = target.shape[1]
        hidden = torch.ones(T, T).triu(1).bool() if causal else torch.zeros(T, T).bool()
        targets = torch.arange(T) >= target_lengths[:, None]
        xs, masks = [self.embed("target", target)], {"tgt_mask": hidden, "tgt_key_padding_mask": targets}
        for layer in self.decoder:
            xs.append(layer(xs[-1], memory, **masks, memory_key_padding_mask=padding))
        return xs, memory, padding, masks

    def forward(self, *sides):
        """Return logits [B, T, V]; anything at padding."""
        return self.decoder_norm(self.layers(*sides)[0][-1]) @ self.output.T

    def probabilities(self, number, *sides, causal=True):
        """Return the probabilities of a layer's cross-attention, [B, H, T, S]."""
        xs, memory, padding, masks = self.layers(*sides, causal=causal)
        layer, x = self.decoder[number], xs[number]
        reads = layer.norm1(x) if self.config.norm == "pre" else x
        found = layer.self_attn(
            *(reads, reads, reads),
            attn_mask=masks["tgt_mask"],
            key_padding_mask=masks["tgt_key_padding_mask"],
            need_weights=False,
        )[0]
        reads = layer.norm2(x + found) if self.config.norm == "pre" else layer.norm1(x + found)
        return layer.multihead_attn(
            *(reads, memory, memory), key_padding_mask=padding, average_attn_weights=False
        )[1]
