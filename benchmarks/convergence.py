"""Train by the kernels and by plain PyTorch from the same weights: do the losses go the same way?

    python -m benchmarks.convergence FOLDER [--only NAME] [--seeds 5] [--steps 200]

Every trainer of the command line runs on invented text with each seed twice, in processes of their own: as it
is, and with NLPFAST_BACKEND=reference, where each operation is its definition in plain PyTorch. Without
dropout that is for the first quarter of the steps, with it for all. The definitions draw the kernels' own
random numbers, so that both drop the same elements. Without dropout the definition trains a second time by
other instructions, which round otherwise: how far it is from itself says what training makes of a rounding.

CS224N's model also trains beside eager code that shares nothing with ours but first weights and batches, with
PyTorch's own dropout (`benchmarks.training_steps`), and ours also in bfloat16. The eager code trains a second
time with other random numbers: how far it is from itself says what the band is worth.

The rows go to the results file of this machine in FOLDER, which `benchmarks.report` reads, in the place of
those with the same names:

- difference: the largest of the loss of a step, both with the same seed, over the loss;
- of the band: the largest difference over what lies between the smallest and the largest loss among the seeds
  of plain PyTorch, in the same step. Where each drops elements of its own, both are of the mean of `WINDOW`
  steps, and the difference is that of the means over the seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from nlpfast.data.birthplaces_files import invented
from nlpfast.data.invented_sentences import write_invented
from nlpfast.train.schedule import learning_rate_multiplier
from nlpfast.train.translation_data import write_invented_pairs

from . import sections
from .training_steps import DOCUMENTS, DROPOUT, EAGER, FEW, OURS, Pretraining, PretrainingStep, documents

__all__ = ["MODELS", "TRAINERS", "beside_eager", "curves", "main", "prepare", "row"]

# Without dropout, in float32.
GOAL = 1e-5
WINDOW = 20
DEFINITION, ROUNDED = "definition", "definition, rounded otherwise"
_REFERENCE = {"NLPFAST_BACKEND": "reference"}
# What PyTorch and its libraries would choose last; every CPU has it, and adds in another order.
_BASELINE = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41"}
ENVIRONMENTS: dict[str, dict[str, str]] = {
    OURS: {},
    DEFINITION: _REFERENCE,
    ROUNDED: {**_REFERENCE, **_BASELINE},
}


@dataclass(frozen=True)
class Trainer:
    """A trainer of the command line.

    Attributes:
        words: what runs it; {seed} and {steps} are filled in, and {kind}, "-plain" for a run without dropout.
        plain: what is added for that.
        dropout: whether there is a run with dropout.
    """

    words: str
    plain: str = "--dropout 0"
    dropout: bool = True


_EVERY_STEP = "--seed {seed} --max-steps {steps} --log-every 1 --device cpu"
_RUN = f"{_EVERY_STEP} --eval-every 1000 --output-dir run"
_SETTINGS = "--max-length 64 --eval-sentences 10"
_PAIRS = f"text/train.source text/train.target --valid text/valid.source text/valid.target {_SETTINGS}"
_TRANSLATION = f"train translation {_PAIRS} --vocab vocab --max-tokens 512 --learning-rate 2e-3 {_RUN}"
_TRANSFORMER = (
    f"{_TRANSLATION} --encoder-layers 2 --decoder-layers 2 --d-model 64 --heads 4 --d-ff 128 "
    "--dropout 0.1 --attention-dropout 0.1 --activation-dropout 0.1"
)
_TRANSFORMER_PLAIN = "--dropout 0 --attention-dropout 0 --activation-dropout 0"
_ALIGNED = "--criterion label_smoothed_cross_entropy_with_alignment --alignments text/train.align"
_RECURRENT = "--model rnn --embed-size 64 --hidden-size 64"
_LM = "train lm --vocab vocab --max-length 64 --batch-size 32"
# at the assignment's rate, which is for 128 documents, the loss of a few jumps, and rounding leads elsewhere
_RATE = 1e-3
_BIRTHPLACES = (
    f"--config small --batch-size 4 --pretrain-lr {_RATE} {_EVERY_STEP} --writing-params-path weights"
)
_FILES = " ".join(
    f"--{task}-{part} tasks/{task}-{part}.csv"
    for task in ("sst", "para", "sts")
    for part in ("train", "dev", "test")
)

TRAINERS = {
    "birthplaces pretrain, vanilla": Trainer(f"birthplaces pretrain vanilla corpus {_BIRTHPLACES}"),
    "birthplaces pretrain, perceiver": Trainer(f"birthplaces pretrain perceiver corpus {_BIRTHPLACES}"),
    "birthplaces finetune": Trainer(
        f"birthplaces finetune vanilla corpus --finetune-corpus-path questions {_BIRTHPLACES}"
    ),
    "lm, GPT": Trainer(
        "train lm --biographies 400 --n-layer 2 --n-head 4 --n-embd 64 --block-size 64 --batch-size 16 "
        f"--dropout 0.1 {_RUN}"
    ),
    "lm, RNN": Trainer(
        f"{_LM} --text text/train.source --valid text/valid.source {_RECURRENT} --dropout 0.1 {_RUN}"
    ),
    "bert": Trainer(f"train bert --biographies 400 --vocab-size 1000 --max-length 64 --dropout 0.1 {_RUN}"),
    "sentences multitask": Trainer(
        f"sentences multitask {_FILES} --vocab-size 1000 --output-dir run {_EVERY_STEP}",
        "--hidden-dropout-prob 0",
    ),
    "translation, Transformer": Trainer(f"{_TRANSFORMER} {_ALIGNED}", _TRANSFORMER_PLAIN),
    "translation, RNN": Trainer(f"{_TRANSLATION} {_RECURRENT} --dropout 0.1"),
    # the loss is an expectation over translations that the model draws, and has no dropout
    "mrt": Trainer(
        f"train mrt {_PAIRS} --model there --samples 4 --max-tokens 128 --learning-rate 2e-4 {_RUN}",
        plain="",
        dropout=False,
    ),
    # dropout is that of its translators
    "dual": Trainer(
        f"train dual {_PAIRS} --forward there{{kind}} --backward back{{kind}} --lm-source lm-source "
        f"--lm-target lm-target --dsl-lambda 0.01 --dsl-warmup-epochs 0 --max-tokens 512 {_RUN}",
        plain="",
    ),
}
# those of CS224N's assignment 5, which also train beside eager code
MODELS = {"GPT, vanilla": "vanilla", "GPT, perceiver": "perceiver"}


def prepare(folder: Path, steps: int = 100) -> None:
    """Write what the trainers need into an empty folder: text, a vocabulary, and models.

    Args:
        folder: the folder.
        steps: that the models have been trained.
    """
    write_invented_pairs(folder / "text", 2000, 0)
    write_invented(folder / "tasks")
    for name, lines in zip(("corpus", "questions"), invented(64), strict=False):
        (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    _call("vocab bpe text/train.source text/train.target --size 400 --output-dir vocab", folder)
    for name, x, y in (("there", "source", "target"), ("back", "target", "source")):
        files = f"text/train.{x} text/train.{y} --valid text/valid.{x} text/valid.{y}"
        for kind, plain in (("", ""), ("-plain", _TRANSFORMER_PLAIN)):
            words = _TRANSFORMER.replace(_PAIRS, f"{files} {_SETTINGS}").replace(
                "--output-dir run", f"--output-dir {name}{kind}"
            )
            _call(f"{words.format(seed=0, steps=steps)} {plain}", folder)
        words = f"{_LM} --text text/train.{x} --valid text/valid.{x} --n-layer 1 --n-embd 64"
        _call(f"{words} --max-steps {steps} --eval-every 1000 --device cpu --output-dir lm-{x}", folder)


def curves(
    trainer: Trainer, seeds: Sequence[int], steps: int, dropout: bool, inputs: Path, kinds: Sequence[str]
) -> dict[str, Tensor]:
    """Return the losses of some of `ENVIRONMENTS`; [seeds, steps] each, float64.

    Args:
        trainer: one of `TRAINERS`.
        seeds: a run each.
        steps: of a run.
        dropout: with it or without.
        inputs: what `prepare` has written.
        kinds: which of them.

    Raises:
        RuntimeError: a run failed, or its log has other steps.
    """
    kind, plain = ("", "") if dropout else ("-plain", trainer.plain)

    def losses(environment: str, seed: int) -> Tensor:
        with tempfile.TemporaryDirectory() as name:
            for path in inputs.iterdir():
                (Path(name) / path.name).symlink_to(path)
            words = f"{trainer.words.format(seed=seed, steps=steps, kind=kind)} {plain}"
            _call(words, Path(name), ENVIRONMENTS[environment])
            [log] = [*Path(name).glob("run/log.jsonl"), *Path(name).glob("expt/*/*/log.jsonl")]
            records = map(json.loads, log.read_text(encoding="utf-8").splitlines())
            found = {record["step"]: record["loss"] for record in records if "loss" in record}
        if sorted(found) != [*range(1, steps + 1)]:
            raise RuntimeError(f"{trainer.words}: there are losses of the steps {sorted(found)}")
        return torch.tensor([found[step] for step in sorted(found)], dtype=torch.float64)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # in the order of the seeds
        runs = {name: pool.map(losses, [name] * len(seeds), seeds) for name in kinds}
        return {name: torch.stack([*found]) for name, found in runs.items()}


def beside_eager(
    model: str, seeds: Sequence[int], steps: int
) -> Iterator[tuple[str, torch.dtype, Tensor, Tensor]]:
    """Yield whose losses in which dtype, they, and those of eager code in float32; [seeds, steps] each.

    First come ours in each dtype, then eager code's with other random numbers. Each has its own dropout;
    bfloat16 is by autocast.

    Args:
        model: vanilla or perceiver.
        seeds: a run each, of first weights, batches and dropout.
        steps: of a run.
    """
    kinds = (
        *((EAGER, torch.float32, 0), (OURS, torch.float32, 0)),
        *((OURS, torch.bfloat16, 0), (EAGER, torch.float32, 1)),
    )
    runs = [(model, dtype, name, seed, steps, turn) for name, dtype, turn in kinds for seed in seeds]
    # processes, as PyTorch's random numbers and its threads are the process'
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        found = torch.tensor([*pool.map(_losses, *zip(*runs, strict=True))], dtype=torch.float64)
    eager, *ours = found.view(len(kinds), len(seeds), steps)
    for (name, dtype, _), losses in zip(kinds[1:], ours, strict=True):
        yield name, dtype, losses, eager


def _losses(
    model: str, dtype: torch.dtype, implementation: str, seed: int, steps: int, turn: int
) -> list[float]:
    torch.set_num_threads(1)
    step = PretrainingStep(Pretraining(model, dtype, 1.0), implementation, DROPOUT, seed=seed)
    if turn:
        # as far apart as that no seed draws what another has drawn
        torch.manual_seed((turn << 32) + seed)
    order, items = torch.Generator().manual_seed(seed), documents(DOCUMENTS)
    losses = []
    for number in range(1, steps + 1):
        for group in step.optimizer.param_groups:
            group["lr"] = _RATE * learning_rate_multiplier(number, steps // 10, steps, "constant")
        step.read([items[i] for i in torch.randperm(DOCUMENTS, generator=order)[:FEW]])
        losses.append(step.step().item())
    return losses


def row(name: str, ours: Tensor, eager: Tensor, *, alike: bool = True, **facts: Any) -> dict[str, Any]:
    """Return what is said of two sets of losses.

    Args:
        name: of the trainer.
        ours: [seeds, steps].
        eager: [seeds, steps].
        alike: both dropped the same elements, or none.
        facts: what else the row says.
    """
    seeds, steps = eager.shape
    first_and_last = [eager[:, 0].mean().item(), eager[:, -WINDOW:].mean().item()]
    if not alike:
        ours, eager = (losses.unfold(1, WINDOW, 1).mean(2) for losses in (ours, eager))
    band = eager.amax(0) - eager.amin(0)
    difference = ours - eager if alike else (ours - eager).mean(0, keepdim=True)
    shares = difference.abs().amax(0) / band
    return {
        "name": name,
        "seeds": seeds,
        "steps": steps,
        "difference": (difference / eager).abs().max().item() if alike else None,
        # where all are equal there is no band
        "of_band": shares[band > 0].max().item() if (band > 0).any() else None,
        "losses": first_and_last,
        **facts,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Train, print a line for each row, and write the rows.

    Args:
        argv: the words after the module; those of the process when None.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--only", choices=(*TRAINERS, *MODELS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args(argv)
    names = (args.only,) if args.only else (*TRAINERS, *MODELS)
    seeds, rows = range(args.seeds), []
    for found in _rows(names, seeds, args.steps):
        print(found, file=sys.stderr, flush=True)
        rows.append(found)
    sections.change(
        *(args.folder, "cpu", "convergence"),
        lambda old: [*(row for row in old if row["name"] not in names), *rows],
    )


def _rows(names: Sequence[str], seeds: Sequence[int], steps: int) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder)
        if not set(names) <= set(MODELS):
            prepare(inputs)
        for name in names:
            if name in MODELS:
                for by, dtype, losses, eager in beside_eager(MODELS[name], seeds, steps):
                    facts = {"by": by, "against": EAGER, "dtype": str(dtype).removeprefix("torch.")}
                    yield row(name, losses, eager, alike=False, goal=None, dropout=True, **facts)
                continue
            for dropout in (False, True) if TRAINERS[name].dropout else (False,):
                kinds = (OURS, DEFINITION) if dropout else (OURS, DEFINITION, ROUNDED)
                turns = steps if dropout else steps // 4
                found = curves(TRAINERS[name], seeds, turns, dropout, inputs, kinds)
                facts = {"against": DEFINITION, "dtype": "float32", "dropout": dropout}
                for by, losses in found.items():
                    if by != DEFINITION:
                        goal = None if dropout or by != OURS else GOAL
                        yield row(name, losses, found[DEFINITION], by=by, goal=goal, **facts)


def _call(words: str, folder: Path, changes: Mapping[str, str] = MappingProxyType({})) -> None:
    """Run a command in a folder, with some variables of the environment changed."""
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder)}
    for name in ENVIRONMENTS[ROUNDED]:
        environment.pop(name, None)
    environment.update(changes)
    command = [sys.executable, "-m", "nlpfast", *shlex.split(words)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{words}: {done.stderr[-2000:]}")


if __name__ == "__main__":
    main()
