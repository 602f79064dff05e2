"""The whole path of dual learning on the invented languages, by the command line.

Two translators and two language models are trained, then both translators together with and without what
they disagree by, for equal steps; a run is stopped in the middle of an epoch and goes on; then the one is
trained by the rewards of its translations.
"""

import json
import signal
from pathlib import Path

import pytest

from nlpfast.cli import main
from nlpfast.models.pretrained import read_weights
from nlpfast.train import dual
from nlpfast.train.translation_data import write_invented_pairs

SIZES = "--encoder-layers 2 --decoder-layers 2 --d-model 96 --d-ff 192 --dropout 0.1 --max-length 64"
TRAIN = "--max-tokens 768 --eval-sentences 50 --device cpu"
MODELS = "--forward there --backward back --lm-source lm-source --lm-target lm-target"


@pytest.fixture
def text(monkeypatch, tmp_path) -> dict[str, str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return {name: str(path) for name, path in write_invented_pairs("text", 3000, 0).items()}


def call(words: str) -> None:
    assert main(words.split()) == 0, words


def evaluations(folder: str) -> list[dict]:
    records = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [record for record in records if "bleu" in record]


@pytest.mark.slow
def test_two_translators_teach_each_other(text, monkeypatch):
    sides = {"source": (text["train.source"], text["valid.source"])}
    sides["target"] = (text["train.target"], text["valid.target"])
    call(f"vocab bpe {sides['source'][0]} {sides['target'][0]} --size 400 --output-dir vocab")
    for name, x, y in (("there", "source", "target"), ("back", "target", "source")):
        files = f"{sides[x][0]} {sides[y][0]} --valid {sides[x][1]} {sides[y][1]} --vocab vocab"
        words = "--learning-rate 4e-3 --max-epochs 6 --eval-every 250"
        call(f"train translation {files} --output-dir {name} {SIZES} {TRAIN} {words}")
    for side, model in (("source", "gpt"), ("target", "rnn")):
        words = "--n-layer 1 --n-embd 96 --embed-size 96 --hidden-size 192 --batch-size 32 --max-epochs 3"
        call(
            f"train lm --text {sides[side][0]} --valid {sides[side][1]} --vocab vocab --model {model} "
            f"--max-length 64 --output-dir lm-{side} {words} --learning-rate 5e-3 --device cpu"
        )
    pairs = f"{sides['source'][0]} {sides['target'][0]} --valid {sides['source'][1]} {sides['target'][1]}"
    both = f"train dual {pairs} {MODELS} --max-length 64 {TRAIN} --max-epochs 1 --learning-rate 1e-3"
    call(f"{both} --dsl-lambda 0 --output-dir apart")
    call(f"{both} --dsl-lambda 0.02 --dsl-warmup-epochs 0 --output-dir together")
    apart, together = evaluations("apart")[-1], evaluations("together")[-1]
    print({name: (apart[name], together[name]) for name in ("gap", "val_loss", "backward_loss", "bleu")})
    # language models and translators of so regular languages agree nearly already
    assert together["gap"] < 1.02 * apart["gap"]
    for name in ("val_loss", "backward_loss"):
        assert together[name] < apart[name] + 0.02

    losses, calls = dual.pair_losses, []

    def stop(model, batch, **rest):
        calls.append(batch)
        if len(calls) == 20:
            signal.raise_signal(signal.SIGTERM)
        return losses(model, batch, **rest)

    monkeypatch.setattr(dual, "pair_losses", stop)
    assert main(f"{both} --dsl-lambda 0.02 --dsl-warmup-epochs 0 --output-dir parts".split()) == 143
    assert not evaluations("parts")
    call("train dual --resume parts")
    assert evaluations("parts")[-1]["bleu"] == together["bleu"]
    ends = [read_weights(f"{name}/last") for name in ("parts", "together")]
    assert all(weight.equal(ends[1][name]) for name, weight in ends[0].items())

    before = together["bleu"]
    call(
        f"train mrt {pairs} --model together/forward --max-length 64 {TRAIN} --output-dir mrt "
        "--samples 2 --baseline-samples 0 --max-steps 20 --eval-every 20 --learning-rate 2e-4"
    )
    # on 50 sentences a few steps of two samples are some points either way
    assert evaluations("mrt")[-1]["bleu"] > before - 4
