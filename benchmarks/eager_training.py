"""Train a Transformer by eager code: how long to a BLEU that `nlpfast train translation` reaches?

    python -m benchmarks.eager_training SRC TGT --valid SRC TGT [--vocab DIR] [--max-tokens 1536]

The model, its initial weights, the batches and their order, the optimizer, the learning rate and the clipping
are those of the command; what computes is `benchmarks.eager_translation`: padded batches in float32, all
scores, all logits, fairseq's criterion, PyTorch's dropout and Adamax. After each epoch it prints the seconds
spent on training and the BLEU of a greedy translation of the validation text, which is not timed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nlpfast.data.translation_batches import TranslationBatch
from nlpfast.metrics import corpus_scores
from nlpfast.models.transformer import Transformer
from nlpfast.models.translator import Translator
from nlpfast.nn.packing import Packing
from nlpfast.train.random_state import set_seed
from nlpfast.train.sampling import BatchOrder
from nlpfast.train.schedule import learning_rate_multiplier
from nlpfast.train.translation import build_model
from nlpfast.train.translation_data import read_translation_data
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
    """Train, and print a line for each epoch.

    Args:
        argv: the words after the module; those of the process when None.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("texts", nargs="*", metavar="TEXT")
    parser.add_argument("--valid", nargs=2, metavar="FILE")
    parser.add_argument("--vocab", metavar="DIR")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--max-tokens", type=int, default=1536)
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
    data = read_translation_data(options, 0)
    config = TranslationConfig(max_epochs=args.epochs).planned(len(data.train))
    set_seed(0)
    special = {name: getattr(data.source, name) for name in ("pad_id", "bos_id", "eos_id")}
    model = build_model(options, len(data.source), len(data.target), **special)
    assert isinstance(model, Transformer)
    optimizer = torch.optim.Adamax(model.parameters(), config.learning_rate, config.betas)
    order = BatchOrder(len(data.train), 1, config.seed)
    total, step, seconds = len(data.train) * args.epochs, 0, 0.0
    for epoch in range(args.epochs):
        order.epoch = epoch
        model.train()
        start = time.perf_counter()
        for [index] in order:
            step += 1
            rate = learning_rate_multiplier(step, config.warmup_steps or 0, total, config.schedule)
            optimizer.param_groups[0]["lr"] = config.learning_rate * rate
            optimizer.zero_grad()
            padded_loss(model, data.train[index], options.label_smoothing).backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.grad_norm_clip or float("inf"))
            optimizer.step()
        seconds += time.perf_counter() - start
        model.eval()
        found = Translator(model, data.source, data.target).translate(data.sentences.source, beam=1)
        [(_, bleu, _)] = corpus_scores([best[0].text for best in found], [data.sentences.target], ("bleu",))
        print(f"epoch {epoch + 1:3}  {seconds:8.1f} s  BLEU {bleu:6.2f}", flush=True)


if __name__ == "__main__":
    main()
