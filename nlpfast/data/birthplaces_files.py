"""Files of the birthplaces task: a corpus of documents, and questions with or without answers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from nlpfast.data.biographies import people
from nlpfast.data.birthplaces import MASK, PAD, corpus_vocabulary
from nlpfast.data.lines import DataError, ReadReport, read_lines
from nlpfast.data.text import CharVocabulary

__all__ = ["Questions", "invented", "read_documents", "read_questions"]

# What the corpus has of each invented person; the characters of the questions are among its.
WORDINGS = (
    "{name} was born in {place}.",
    "{name}. Born in {place}.",
    "Where does {name} come from? From {place}.",
    "The birthplace of {name}, {job}, is {place}.",
)


def read_documents(
    path: str | Path, *, keep_empty: bool = False
) -> tuple[list[str], CharVocabulary, ReadReport]:
    """Return the documents of a corpus, one a line, and the vocabulary of all.

    Args:
        path: UTF-8 text; the policies are those of `nlpfast.data.lines`.
        keep_empty: empty lines are documents too; otherwise they are skipped, and counted.

    Raises:
        DataError: the file cannot be read, or has no document, or PAD or MASK in it; names file and line.
    """
    report, documents = ReadReport(path), []
    lines = []
    for line in read_lines(path, report):
        lines.append(line)
        if line or keep_empty:
            documents.append(line)
        else:
            report.skip("empty")
    if not documents:
        raise DataError(f"{path}: has no documents; give a corpus with one a line")
    return documents, corpus_vocabulary(lines, str(path)), report


@dataclasses.dataclass(frozen=True)
class Questions:
    """What is asked, and the answers if they are known.

    Attributes:
        questions: without MASK.
        answers: as many, or None.
    """

    questions: list[str]
    answers: list[str] | None


def read_questions(path: str | Path, vocabulary: CharVocabulary | None = None) -> Questions:
    """Read lines "question<TAB>answer", or "question" on every line.

    Args:
        path: UTF-8 text; the policies are those of `nlpfast.data.lines`.
        vocabulary: has to have all characters of the questions; None for any.

    Raises:
        DataError: the file cannot be read; a question is empty or has a character that is not in the
            vocabulary, or a mark; a line has several tabs, or an answer where others have none, or none where
            others have one. Names file and line.
    """
    questions: list[str] = []
    answers: list[str] = []
    for number, line in enumerate(read_lines(path), 1):
        question, *rest = line.split("\t")
        place = f"{path}:{number}"
        if len(rest) > 1:
            raise DataError(f"{place}: has {len(rest)} answers; write question, tab, answer")
        if number > 1 and bool(rest) != bool(answers):
            found = "has an answer" if rest else "has no answer after a tab"
            raise DataError(f"{place}: {found}, unlike the lines before; answers are all there or not at all")
        if not question or MASK in question or PAD in question:
            found = "is empty" if not question else f"has {MASK} or {PAD}, which mark what is no text"
            raise DataError(f"{place}: the question {found}; write one")
        try:
            if vocabulary is not None:
                vocabulary.encode(question)
        except DataError as error:
            raise DataError(f"{place}: {error}") from error
        questions.append(question)
        answers += rest
    return Questions(questions, answers or None)


def invented(n: int, seed: int = 0) -> tuple[list[str], list[str], list[str]]:
    """Return a corpus, questions with answers to learn the form from, and others to be asked.

    The corpus tells in several wordings where each of `n` invented people (nlpfast.data.biographies) was
    born: of facts in one wording a model can hardly be asked (Allen-Zhu and Li 2023, "Physics of Language
    Models: Part 3.1"). Each question is about one of them, and half of the questions are to learn from.

    Args:
        n: people, at least 2.
        seed: chooses them.

    Returns:
        Lines of the corpus, of the training file and of the evaluation file, without their ends.
    """
    found = people(n, seed)
    facts = [{"name": p.name, "place": p.birthplace, "job": p.profession} for p in found]
    rows = ["Where was {name} born?\t{place}".format(**fact) for fact in facts]
    return [wording.format(**fact) for fact in facts for wording in WORDINGS], rows[: n // 2], rows[n // 2 :]
