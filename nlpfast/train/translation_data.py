"""The data of a translation run: from files to batches of tokens, with the vocabularies and alignments."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nlpfast.data.alignments import format_links, read_alignments
from nlpfast.data.invented_languages import invented_pairs
from nlpfast.data.lines import DataError, file_digest
from nlpfast.data.parallel import AlignmentPairs, AlignmentReport
from nlpfast.data.parallel_text import ParallelText, read_parallel_text
from nlpfast.data.read_report import FIRST, Skips
from nlpfast.data.subword_alignments import subword_alignments
from nlpfast.data.subwords import Subwords
from nlpfast.data.token_pairs import TokenPairs
from nlpfast.data.translation_batches import TranslationDataset
from nlpfast.files import replacing
from nlpfast.train.translation_options import ALIGNED, TranslationOptions

__all__ = ["TranslationData", "read_translation_data", "write_invented_pairs"]

# of a text without files to evaluate on, the last so much, and at most so many
VALIDATION_SHARE, MOST_VALIDATION = 0.05, 1000
# pairs of the invented languages to evaluate on, and to test with
INVENTED_VALIDATION, INVENTED_TEST = 200, 500
# without a limit of their own: sentences to evaluate on are not chosen by length
LONGEST = 1024


@dataclasses.dataclass
class TranslationData:
    """What a translation run works with.

    Attributes:
        source: vocabulary of the source.
        target: of the target; the same object where it is joint.
        train: batches for training.
        validation: batches to evaluate on.
        sentences: the pairs to evaluate on, as text; those of `validation`.
        facts: what a checkpoint tells of the data.
        words: what there is to say of it.
    """

    source: Subwords
    target: Subwords
    train: TranslationDataset
    validation: TranslationDataset
    sentences: ParallelText
    facts: dict[str, Any]
    words: list[str]


def write_invented_pairs(folder: str | Path, count: int, seed: int) -> dict[str, Path]:
    """Write invented parallel text: train, valid and test, with the alignments of their words.

    Args:
        folder: made when missing; files in it are replaced.
        count: pairs for training.
        seed: of the sentences.

    Returns:
        The files, as "train.source", "train.target", "train.align", "valid.source" and so on.

    Raises:
        OSError: one cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    found = invented_pairs(count + INVENTED_VALIDATION + INVENTED_TEST, seed)
    links = [format_links(part) for part in found.links]
    columns = {"source": found.source, "target": found.target, "align": links}
    begin, paths = 0, {}
    for part, size in (("train", count), ("valid", INVENTED_VALIDATION), ("test", INVENTED_TEST)):
        for name, lines in columns.items():
            path = paths[f"{part}.{name}"] = folder / f"{part}.{name}"
            with replacing(path) as file:
                file.write("".join(f"{line}\n" for line in lines[begin : begin + size]).encode())
        begin += size
    return paths


def read_translation_data(
    options: TranslationOptions, seed: int, *, vocabularies: tuple[Subwords, Subwords] | None = None
) -> TranslationData:
    """Read text, vocabularies and alignments, and cut batches.

    Args:
        options: which; without a source the invented languages are written to `data/` of the run's folder.
        seed: of what is drawn.
        vocabularies: of source and target; None for those that the options name.

    Raises:
        DataError: a file is missing or damaged, or two do not belong together.
        OSError: a file cannot be written.
    """
    # before anything is written
    named = vocabularies or _named(options)
    options = _with_files(options, seed)
    assert options.source is not None and options.max_tokens is not None
    text = read_parallel_text(options.source, options.target, columns=options.columns)
    if options.valid is not None:
        training, validation = text, read_parallel_text(*options.valid)
    else:
        training, validation = _split(text)
    source, target = named or _made(options, training)
    sides = source.encode_batch(training.source), target.encode_batch(training.target)
    pairs = TokenPairs(training, *sides, max_length=options.max_length, max_ratio=options.max_ratio)
    links = _alignments(options, pairs, source, target)
    special: dict[str, Any] = {name: getattr(source, name) for name in ("pad_id", "bos_id", "eos_id")}
    if any(getattr(target, name) != value for name, value in special.items()):
        raise DataError(f"{options.target_vocab}: its special tokens have other ids than those of --vocab")
    redrawn = _Redrawn(options.bpe_dropout, seed, (source, target), (training.source, training.target))
    padded = options.model == "rnn"
    train = TranslationDataset(
        pairs,
        **special,
        max_tokens=options.max_tokens,
        padded=padded,
        seed=seed,
        alignments=links,
        encode=redrawn if options.bpe_dropout else None,
    )
    checked = TokenPairs(
        *(validation, source.encode_batch(validation.source), target.encode_batch(validation.target)),
        max_length=LONGEST,
    )
    evaluated = TranslationDataset(
        checked, **special, max_tokens=max(options.max_tokens, LONGEST), padded=padded, seed=seed
    )
    facts = _facts(options, pairs, checked, source, target, links.report if links else None)
    # loss and BLEU are of the same pairs: no model reads those that are skipped
    sentences = dataclasses.replace(
        validation,
        source=[validation.source[row] for row in checked.rows],
        target=[validation.target[row] for row in checked.rows],
        lines=validation.lines[checked.rows],
        report=checked.report,
    )
    return TranslationData(
        *(source, target, train, evaluated, sentences, facts),
        words=_words(pairs, checked, train, source, target, links.report if links else None),
    )


def _with_files(options: TranslationOptions, seed: int) -> TranslationOptions:
    """Return the options with the files of the invented languages, where they name no others."""
    if options.source is not None:
        return options
    paths = write_invented_pairs(Path(options.output_dir) / "data", options.pairs, seed)
    return dataclasses.replace(
        options,
        source=str(paths["train.source"]),
        target=str(paths["train.target"]),
        valid=(str(paths["valid.source"]), str(paths["valid.target"])),
        alignments=str(paths["train.align"]) if options.criterion == ALIGNED else None,
        alignment_level="word",
    )


def _split(text: ParallelText) -> tuple[ParallelText, ParallelText]:
    """Return the text without its last pairs, and these."""
    held = min(math.ceil(VALIDATION_SHARE * len(text)), MOST_VALIDATION)
    cut = len(text) - held
    if cut < 1:
        raise DataError(f"{text.path}: has 1 pair, and another is needed to evaluate on; name --valid files")
    parts = []
    for reason, rows, others in (
        ("kept to evaluate on", slice(0, cut), slice(cut, None)),
        ("for training", slice(cut, None), slice(0, cut)),
    ):
        report = copy.deepcopy(text.report)
        lines = text.lines[others].tolist()
        report.skipped[reason] = Skips(len(lines), [f"{text.path}:{line}" for line in lines[:FIRST]])
        part = dataclasses.replace(
            text, source=text.source[rows], target=text.target[rows], lines=text.lines[rows], report=report
        )
        parts.append(part)
    return parts[0], parts[1]


def _named(options: TranslationOptions) -> tuple[Subwords, Subwords] | None:
    """Return the vocabularies that are named; None if there are none."""
    if options.vocab is None:
        return None
    source = Subwords.from_folder(options.vocab)
    return source, source if options.target_vocab is None else Subwords.from_folder(options.target_vocab)


def _made(options: TranslationOptions, text: ParallelText) -> tuple[Subwords, Subwords]:
    """Return a vocabulary of both languages, or two, that are made of the text."""
    size, name = options.vocab_size, text.path
    if options.separate:
        return Subwords.train(text.source, size, source=name), Subwords.train(text.target, size, source=name)
    both = Subwords.train([*text.source, *text.target], size, source=name)
    return both, both


def _alignments(
    options: TranslationOptions, pairs: TokenPairs, source: Subwords, target: Subwords
) -> AlignmentPairs | None:
    """Return the alignments of the training text between its subwords."""
    if options.alignments is None:
        return None
    words = None
    if options.alignment_level == "word":
        words = (
            [source.word_numbers(ids) for ids in pairs.source.lists()],
            [target.word_numbers(ids) for ids in pairs.target.lists()],
        )
    return subword_alignments(read_alignments(options.alignments), pairs, words)


@dataclasses.dataclass
class _Redrawn:
    """BPE dropout: the tokens that sentences have in an epoch, the same each time for the same epoch."""

    dropout: float
    seed: int
    vocabularies: tuple[Subwords, Subwords]
    texts: tuple[list[str], list[str]]

    def __call__(self, side: int, rows: Sequence[int], epoch: int) -> list[list[int]]:
        """Return the tokens of sentences, see TranslationDataset."""
        place = repr((self.seed, side, epoch, rows[0])).encode()
        seed = int.from_bytes(hashlib.sha256(place).digest()[:7], "big")
        lines = [self.texts[side][row] for row in rows]
        return self.vocabularies[side].encode_batch(lines, dropout=self.dropout, seed=seed)


def _facts(
    options: TranslationOptions,
    pairs: TokenPairs,
    validation: TokenPairs,
    source: Subwords,
    target: Subwords,
    alignments: AlignmentReport | None,
) -> dict[str, Any]:
    digest = hashlib.sha256(f"{source.digest()} {target.digest()} {options.columns}".encode())
    for path in (options.source, options.target, options.alignments):
        digest.update(b"none" if path is None else file_digest(path).encode())
    reports: dict[str, Any] = {"train": pairs.report.as_dict(), "validation": validation.report.as_dict()}
    if alignments is not None:
        reports["alignments"] = str(alignments)
    return {"text": pairs.text.path, "digest": digest.hexdigest(), "data": reports}


def _words(
    pairs: TokenPairs,
    validation: TokenPairs,
    train: TranslationDataset,
    source: Subwords,
    target: Subwords,
    alignments: AlignmentReport | None,
) -> list[str]:
    sizes = f"{len(source):,} joint" if source is target else f"{len(source):,} and {len(target):,}"
    tokens = f"{len(pairs.source.flat):,} and {len(pairs.target.flat):,} subwords"
    lines = [str(pairs.report), str(validation.report), *([str(alignments)] if alignments else [])]
    return [*lines, f"{sizes} subwords in the vocabulary; {tokens} of text in {len(train):,} batches"]
