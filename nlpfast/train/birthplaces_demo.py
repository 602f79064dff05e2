"""The story of the birthplaces task, on invented people, in a few minutes of two processor cores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nlpfast.data.birthplaces_files import invented
from nlpfast.files import replacing
from nlpfast.train.birthplaces import train
from nlpfast.train.birthplaces_answers import evaluate
from nlpfast.train.birthplaces_options import VARIANTS, BirthplacesOptions
from nlpfast.train.config import ConfigError

__all__ = ["demo"]

PEOPLE = 32
# Few steps of finetuning after pretraining: more, on few questions, overwrite what was learned before.
STEPS = {"pretrain": 1200, "finetune": 15, "scratch": 75}
# Many small steps, and nothing dropped: the facts are to be known by heart.
RECIPE: dict[str, Any] = {"config": "small", "bottleneck_dim": 64, "dropout": 0.0, "batch_size": 32}


def demo(
    folder: str | Path,
    *,
    people: int | None = None,
    steps: dict[str, int] | None = None,
    quiet: bool = False,
) -> Iterator[str]:
    """Make data, train and evaluate both variants with and without pretraining, and tell what came of it.

    Args:
        folder: gets the data, parameters, predictions and logs; made when missing, files are replaced.
        people: invented ones in the corpus; None for PEOPLE.
        steps: optimizer steps of "pretrain", of "finetune" after it, and of finetuning from "scratch"; None
            for STEPS.
        quiet: no progress on stderr.

    Yields:
        Lines for people, each when its figures are there.

    Raises:
        ConfigError: the folder is a file.
        OSError: a file cannot be written.
    """
    steps, folder = steps or STEPS, Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ConfigError("output_dir", str(folder), "it is a file, name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    files = dict(zip(("corpus.txt", "train.tsv", "dev.tsv"), invented(people or PEOPLE), strict=True))
    for name, lines in files.items():
        with replacing(folder / name) as file:
            file.write("".join(f"{line}\n" for line in lines).encode())
    answers = [row.partition("\t")[2] for row in files["dev.tsv"]]
    place, count = Counter(answers).most_common(1)[0]
    yield f"{len(answers)} questions about people of whom the corpus tells"
    yield f"always {place:<28} {count / len(answers):6.1%}"
    for variant in VARIANTS:
        for pretrained in (False, True):
            yield _line(folder, variant, pretrained, steps, quiet)


def _line(folder: Path, variant: str, pretrained: bool, steps: dict[str, int], quiet: bool) -> str:
    corpus, kept = (
        str(folder / "corpus.txt"),
        folder / f"{variant}.{'pretrained' if pretrained else 'scratch'}",
    )
    # with the residual it learns in minutes: without, what a token is reaches its prediction through latents
    common = {**RECIPE, "overwrite": True, "residual": variant == "perceiver"}
    seconds, taken = 0.0, 0
    first = None
    if pretrained:
        first = f"{kept}.pretrain.params"
        options = BirthplacesOptions(
            writing_params_path=first,
            max_steps=steps["pretrain"],
            max_epochs=steps["pretrain"],
            pretrain_lr=2e-3,
            log_every=200,
            **common,
        )
        state = train("pretrain", variant, corpus, options, folder=f"{kept}.pretrain", quiet=quiet)
        seconds, taken = state.seconds, state.step
    last, few = f"{kept}.finetune.params", steps["finetune" if pretrained else "scratch"]
    options = BirthplacesOptions(
        reading_params_path=first,
        writing_params_path=last,
        finetune_corpus_path=str(folder / "train.tsv"),
        max_steps=few,
        max_epochs=few,
        **common,
    )
    state = train("finetune", variant, corpus, options, folder=f"{kept}.finetune", quiet=quiet)
    seconds, taken = seconds + state.seconds, taken + state.step
    options = BirthplacesOptions(
        reading_params_path=last,
        eval_corpus_path=str(folder / "dev.tsv"),
        outputs_path=f"{kept}.predictions",
        **common,
    )
    score = evaluate(variant, corpus, options)
    share = (score.correct or 0) / score.total
    how = "pretrained" if pretrained else "not pretrained"
    times = f"{taken} steps, {1000 * seconds / taken:.0f} ms a step"
    return f"{variant + ', ' + how:<35} {share:6.1%}  {times}"
