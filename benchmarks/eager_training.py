"""Train a Transformer twice, by eager code and as `nlpfast train translation` does: how long to a BLEU?

    python -m benchmarks.eager_training SRC TGT --valid SRC TGT [--vocab DIR] [--max-tokens 1536]

Both have the same initial weights, batches in the same order, optimizer, learning rate and clipping, and take
turns, batch by batch, so that a slow phase of the machine falls on both. The eager code is that of
`benchmarks.eager_translation`: padded batches, all scores, all logits, fairseq's criterion, PyTorch's dropout
and Adamax, in float32, or with `--eager-dtype bfloat16` by autocast. Ours is the optimizer step of the
trainer. After each epoch a line has the seconds of each on training so far, and the BLEU of a greedy
translation of the validation text, which is not timed.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nlpfast.data.translation_batches import TranslationBatch
from nlpfast.metrics import corpus_scores
from nlpfast.models.transformer import Transformer
from nlpfast.models.translator import Translator
from nlpfast.nn.packing import Packing
from nlpfast.train.schedule import learning_rate_multiplier
from nlpfast.train.trainer import Trainer
from nlpfast.train.translation import prepared
from nlpfast.train.translation_data import TranslationData
from nlpfast.train.translation_options import TranslationConfig, TranslationOptions

from .eager_translation import decode, encode, smoothed_loss

__all__ = ["main", "padded_loss"]


def padded_loss(model: Transformer, batch: TranslationBatch, label_smoothing: float) -> Tensor:
    """Return the mean loss of a batch over its targets, by eager code on the padded sentences.

    Args:
        model: with pre-norm layers.
        batch: packed; what fills it up is left out.
        label_smoothing: eps.
    """
    B, pad = batch.sentences, model.config.pad_id
    source = _padded(batch.source, batch.source_cu[: B + 1], pad)
    target_in = _padded(batch.target_in, batch.target_cu[: B + 1], pad)
    target_out = _padded(batch.target_out, batch.target_cu[: B + 1], pad)
    features, _ = decode(model, target_in, encode(model, source), source)
    logits = F.linear(features, model.output_weight)
    return smoothed_loss(logits, target_out, pad, label_smoothing) / (target_out != pad).sum()


def _padded(rows: Tensor, cu: Tensor, pad: int) -> Tensor:
    # zeros fill up
    return Packing(cu, int(cu.diff().max())).padded(rows[: cu[-1]] - pad) + pad


def main(argv: Sequence[str] | None = None) -> None:
    """Train both, and print a line for each epoch.

    Args:
        argv: the words after the module; those of the process when None.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("texts", nargs="*", metavar="TEXT")
    parser.add_argument("--valid", nargs=2, metavar="FILE")
    parser.add_argument("--vocab", metavar="DIR")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument(
        "--stop-after", type=int, metavar="EPOCHS", help="of --epochs, which the schedule is for"
    )
    parser.add_argument("--max-tokens", type=int, default=1536)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--eager-dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--output-dir", default="runs/eager")
    args = parser.parse_args(argv)
    source, target = args.texts if args.texts else (None, None)
    options = TranslationOptions(
        source=source,
        target=target,
        valid=tuple(args.valid) if args.valid else None,
        vocab=args.vocab,
        max_tokens=args.max_tokens,
        output_dir=args.output_dir,
    )
    made: list[TranslationData] = []
    config = TranslationConfig(max_epochs=args.epochs, dtype=args.dtype)
    trainer, _ = prepared(options, config, quiet=True, made=made)
    data, ours = made[0], cast(Transformer, trainer.model)
    eager = Eager(copy.deepcopy(ours), trainer, options.label_smoothing, args.eager_dtype)
    seconds = {"nlpfast": 0.0, "eager": 0.0}
    for epoch in range(args.stop_after or args.epochs):
        for model in (ours, eager.model):
            model.train()
        for group in trainer.feed.groups(epoch, 0, 1):
            start = time.perf_counter()
            trainer.steps.take(group, lambda: False)
            between = time.perf_counter()
            eager.take(group[0].data)
            seconds["nlpfast"] += between - start
            seconds["eager"] += time.perf_counter() - between
        words = [f"epoch {epoch + 1:3}"]
        for (name, spent), model, dtype in zip(
            seconds.items(), (ours, eager.model), (args.dtype, args.eager_dtype), strict=True
        ):
            words.append(f"{name} {spent:8.1f} s  BLEU {_bleu(model, data, dtype):6.2f}")
        print("  ".join([*words, f"ratio {seconds['eager'] / seconds['nlpfast']:5.2f}"]), flush=True)


class Eager:
    """A model that is trained by eager code.

    Attributes:
        model: the model.
    """

    def __init__(self, model: Transformer, trainer: Trainer, label_smoothing: float, dtype: str) -> None:
        """Build the optimizer; settings and length of the schedule are those of another model's trainer."""
        self.model, self.label_smoothing, self.dtype = model, label_smoothing, dtype
        self.config, self.steps, self.step = trainer.config, trainer.total_steps() or 1, 0
        self.optimizer = torch.optim.Adamax(model.parameters(), self.config.learning_rate, self.config.betas)

    def take(self, batch: TranslationBatch) -> None:
        """Take one step."""
        self.step += 1
        warmup = self.config.warmup_steps or 0
        factor = learning_rate_multiplier(self.step, warmup, self.steps, self.config.schedule)
        self.optimizer.param_groups[0]["lr"] = self.config.learning_rate * factor
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == "bfloat16"):
            loss = padded_loss(self.model, batch, self.label_smoothing)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_norm_clip or float("inf"))
        self.optimizer.step()


def _bleu(model: Transformer, data: TranslationData, dtype: str) -> float:
    translator = Translator(model.eval(), data.source, data.target, dtype=getattr(torch, dtype))
    found = translator.translate(data.sentences.source, beam=1)
    [(_, bleu, _)] = corpus_scores([best[0].text for best in found], [data.sentences.target], ("bleu",))
    return bleu


if __name__ == "__main__":
    main()
