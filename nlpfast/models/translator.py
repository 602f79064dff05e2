"""From text to text: a translation model with its vocabularies, and the word alignments that it makes.

Shapes: B sentences of a batch, S source tokens with EOS, T target tokens with EOS.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nlpfast.beam_search import beam_search, greedy_search
from nlpfast.data.alignments import Link
from nlpfast.data.lines import DataError
from nlpfast.data.subwords import Subwords
from nlpfast.hypotheses import Hypothesis
from nlpfast.models import pretrained
from nlpfast.models.seq2seq import Seq2Seq
from nlpfast.models.transformer import Transformer
from nlpfast.models.translation_files import VOCAB, load_model, load_vocabularies

__all__ = ["Alignment", "Translation", "Translator"]

# source tokens, times the hypotheses of a sentence, that are translated together
BATCH_TOKENS = 16384


class Translation(NamedTuple):
    """A translation.

    Attributes:
        text: detokenised.
        tokens: its subwords, without EOS.
        score: what hypotheses are ranked by, after the length penalty.
        log_probability: of its tokens and EOS, in nats.
        finished: False if it was cut off at the longest length.
    """

    text: str
    tokens: list[int]
    score: float
    log_probability: float
    finished: bool


class Alignment(NamedTuple):
    """How much each target token attends to each source token.

    Attributes:
        source: tokens, without EOS.
        target: likewise.
        probabilities: float32 [T, S], the last row and column of EOS.
    """

    source: list[int]
    target: list[int]
    probabilities: Tensor

    def links(self) -> list[Link]:
        """Return the source token that each target token attends to most, EOS left out on both sides."""
        if not self.source:
            return []
        best = self.probabilities[: len(self.target), : len(self.source)].argmax(1).tolist()
        return [(s, t) for t, s in enumerate(best)]


class Translator:
    """A model and its vocabularies.

    Attributes:
        model: in evaluation mode, on the device on which it works.
        source: vocabulary of the source.
        target: of the target; the same object where it is joint.
        dtype: precision of the computation, by autocast.
    """

    def __init__(
        self,
        model: Transformer | Seq2Seq,
        source: Subwords,
        target: Subwords,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Take over a model, which stays in the mode that it has.

        Args:
            model: the model.
            source: vocabulary of the source.
            target: of the target.
            dtype: float32, or bfloat16 or float16 by autocast.
        """
        self.model, self.source, self.target, self.dtype = model, source, target, dtype

    @classmethod
    def from_folder(
        cls, folder: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Translator:
        """Read what `nlpfast train translation` wrote.

        Args:
            folder: of the run: its `model/`, or before the run has ended its `best/` or `last/`; or one of
                these.
            device: where to translate.
            dtype: precision of the computation.

        Raises:
            OSError: a file is missing or unreadable; names it.
            ValueError: a file is damaged, or there is no model or vocabulary in the folder; names it.
        """
        folder = Path(folder)
        places = [folder, *(folder / name for name in ("model", "best", "last"))]
        found = next((place for place in places if (place / pretrained.CONFIG_FILE).exists()), None)
        if found is None:
            raise OSError(f"{folder}: there is no translation model in it; name the folder of a run")
        # a checkpoint's vocabulary is its run's
        vocabularies = next((place for place in (found, found.parent) if (place / VOCAB).is_dir()), None)
        if vocabularies is None:
            raise DataError(f"{found}: has no {VOCAB}/, nor the folder round it; name the folder of a run")
        model = load_model(found).to(device)
        sides = load_vocabularies(vocabularies)
        for side, size in zip(sides, (model.config.source_vocab, model.config.target_vocab), strict=True):
            if len(side) != size:
                sizes = f"has {len(side)} pieces, the model {size}"
                raise DataError(f"{vocabularies / VOCAB}: {sizes}; name the folder of a run")
        return cls(model, *sides, dtype=dtype)

    def translate(
        self,
        lines: Sequence[str],
        *,
        beam: int = 5,
        place: Callable[[int], str] = "sentence {}".format,
        pause: Callable[[], None] = lambda: None,
        **options: Any,
    ) -> list[list[Translation]]:
        """Return the best translations of each sentence, the best first.

        Sentences of similar lengths are translated together. A sentence without a word is not translated: its
        only translation is empty.

        Args:
            lines: sentences, as text.
            beam: hypotheses of a sentence; 1 takes the most probable token each time.
            place: `number from 0 -> what messages call the sentence`.
            pause: is called between two batches.
            options: of `nlpfast.beam_search.beam_search`.

        Raises:
            DataError: a sentence is longer than the model reads.
            ValueError: an option is outside its bounds, or the model's weights are not usable.
        """
        ids = self.source.encode_batch(lines)
        self._check_lengths(ids, place)
        found = [[Translation("", [], 0.0, 0.0, True)] for _ in lines]
        rows = [row for row, tokens in enumerate(ids) if tokens]
        for batch in _batches(rows, [len(tokens) + 1 for tokens in ids], BATCH_TOKENS // beam):
            pause()
            source, lengths = self._padded([ids[row] for row in batch], self.model.config.eos_id, after=True)
            with self._computing():
                if beam == 1 and options.get("n_best", 1) == 1:
                    kept = {
                        k: v
                        for k, v in options.items()
                        if k not in ("n_best", "stop", "length_penalty", "alpha")
                    }
                    best = [[hypothesis] for hypothesis in greedy_search(self.model, source, lengths, **kept)]
                else:
                    best = beam_search(self.model, source, lengths, beam=beam, **options)
            for row, hypotheses in zip(batch, best, strict=True):
                found[row] = [self._translation(hypothesis) for hypothesis in hypotheses]
        return found

    def align(
        self,
        sources: Sequence[Sequence[int]],
        targets: Sequence[Sequence[int]],
        *,
        place: Callable[[int], str] = "sentence {}".format,
        **options: Any,
    ) -> list[Alignment]:
        """Return what each target token attends to when the model is made to write a given translation.

        Args:
            sources: tokens of each sentence, without EOS.
            targets: tokens of its translation, likewise; either may be empty.
            place: `number from 0 -> what messages call the sentence`.
            options: of the model's `soft_alignment`.

        Raises:
            DataError: a sentence is longer than the model reads.
        """
        if options and isinstance(self.model, Seq2Seq):
            raise ValueError(f"{next(iter(options))} is given, but an RNN has one attention; leave it out")
        for side in (sources, targets):
            self._check_lengths(side, place)
        found: list[Alignment | None] = [None] * len(sources)
        longer = [max(len(s), len(t)) + 1 for s, t in zip(sources, targets, strict=True)]
        config = self.model.config
        for batch in _batches(list(range(len(sources))), longer, BATCH_TOKENS // 4):
            source = self._padded([sources[row] for row in batch], config.eos_id, after=True)
            target = self._padded([targets[row] for row in batch], config.bos_id, after=False)
            with self._computing():
                probabilities = self.model.soft_alignment(*source, *target, **options).float().cpu()
            for row, table in zip(batch, probabilities, strict=True):
                s, t = list(sources[row]), list(targets[row])
                found[row] = Alignment(s, t, table[: len(t) + 1, : len(s) + 1].clone())
        return [alignment for alignment in found if alignment is not None]

    def attention(
        self, source: str, target: str | None = None, *, layer: int | None = None
    ) -> tuple[Tensor, list[str], list[str]]:
        """Return what each subword of a translation attends to, as `nlpfast.plot.attention` takes it.

        Args:
            source: a sentence.
            target: its translation; None for the model's own, by beam search.
            layer: of the decoder, from 0 or from the last, -1; None for the aligned one.

        Returns:
            Probabilities of each head, float32 [H, T, S], row t of the step that writes target subword t; the
            subwords of the source and EOS, and those of the target and EOS.

        Raises:
            DataError: a sentence is longer than the model reads.
            ValueError: there is no such layer.
        """
        ids = self.source.encode(source)
        best = self.translate([source])[0][0].tokens if target is None else self.target.encode(target)
        for tokens in (ids, best):
            self._check_lengths([tokens], "the sentence".format)
        config = self.model.config
        sides = (
            *self._padded([ids], config.eos_id, after=True),
            *self._padded([best], config.bos_id, after=False),
        )
        with self._computing():
            if isinstance(self.model, Seq2Seq):
                if layer is not None:
                    raise ValueError("layer is given, but an RNN has one attention; leave it out")
                found = self.model.soft_alignment(*sides)[:, None]
            else:
                with self.model.aligned_by(layer):
                    found = self.model.attention_probabilities(*sides)
        eos = [config.eos_id]
        return found[0].float().cpu(), self.source.pieces(ids + eos), self.target.pieces(best + eos)

    def word_links(self, alignment: Alignment) -> set[Link]:
        """Return the links between words, those between spaces: of words any of whose subwords are linked.

        Args:
            alignment: of tokens of the two vocabularies.
        """
        s_words = self.source.word_numbers(alignment.source)
        t_words = self.target.word_numbers(alignment.target)
        return {(s_words[s], t_words[t]) for s, t in alignment.links()}

    def _translation(self, hypothesis: Hypothesis) -> Translation:
        text = self.target.decode(hypothesis.tokens)
        return Translation(text, *hypothesis)

    def _check_lengths(self, ids: Sequence[Sequence[int]], place: Callable[[int], str]) -> None:
        most = getattr(self.model.config, "max_positions", None)
        for row, tokens in enumerate(ids):
            if most is not None and len(tokens) + 1 > most:
                reads = f"has {len(tokens)} subwords, the model reads {most - 1} at most"
                raise DataError(f"{place(row)}: {reads}; split the sentence")

    def _padded(self, ids: Sequence[Sequence[int]], special: int, *, after: bool) -> tuple[Tensor, Tensor]:
        """Return sentences with a special token after or before them, and their lengths, on the device."""
        rows = [[*tokens, special] if after else [special, *tokens] for tokens in ids]
        longest = max(map(len, rows))
        padded = [row + [self.model.config.pad_id] * (longest - len(row)) for row in rows]
        device = next(self.model.parameters()).device
        return torch.tensor(padded, device=device), torch.tensor([len(row) for row in rows], device=device)

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        device = next(self.model.parameters()).device.type
        with torch.no_grad(), torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32):
            yield


def _batches(rows: Sequence[int], lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Yield rows of similar lengths together, so many that their padded size is within `most`."""
    batch: list[int] = []
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        if batch and (len(batch) + 1) * lengths[batch[0]] > most:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
