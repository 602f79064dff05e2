"""Translation of the invented languages: BLEU, and word alignments with supervision and without.

Two models are trained for some hundred steps each; the test sentences are new to them, their words are not.
"""

from pathlib import Path

import pytest

from nlpfast.alignment import alignment_error_rate
from nlpfast.data.alignments import read_alignments
from nlpfast.metrics import corpus_scores
from nlpfast.models.translator import Translator
from nlpfast.train.translation import train_translation
from nlpfast.train.translation_options import ALIGNED, TranslationConfig, TranslationOptions

SIZES = {
    **{"encoder_layers": 2, "decoder_layers": 2, "d_model": 128, "d_ff": 256, "dropout": 0.1},
    **{"pairs": 4000, "vocab_size": 500, "max_tokens": 1024, "eval_sentences": 50},
}
SUPERVISED = {"criterion": ALIGNED, "alignment_layer": 1, "align_shift": 1, "alignment_lambda": 0.2}


def scores(folder: str) -> tuple[float, float]:
    """Return BLEU of the test sentences, and the error rate of their alignments, both in percent."""
    data = Path(folder) / "data"
    source, target = ((data / f"test.{side}").read_text().splitlines() for side in ("source", "target"))
    translator = Translator.from_folder(folder)
    found = translator.translate(source, max_len_a=1.5, max_len_b=20)
    [(_, bleu, _)] = corpus_scores([best[0].text for best in found], [target], ("bleu",))
    tokens = translator.source.encode_batch(source), translator.target.encode_batch(target)
    links = [translator.word_links(alignment) for alignment in translator.align(*tokens)]
    gold = read_alignments(data / "test.align")
    return bleu, 100 * alignment_error_rate(links, gold.sure_links(), gold.links()).aer


@pytest.mark.slow
def test_supervision_makes_alignments_and_costs_no_bleu(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = TranslationConfig(max_epochs=10, eval_every=275, learning_rate=4e-3, device="cpu", average=2)
    for name, given in (("plain", {}), ("supervised", SUPERVISED)):
        train_translation(TranslationOptions(**SIZES, **given, output_dir=name), config, quiet=True)
    (plain, without), (supervised, aer) = scores("plain"), scores("supervised")
    assert aer <= 5 < 15 < without
    assert supervised >= plain - 0.5 and supervised > 90
    print(f"BLEU {plain:.1f} and {supervised:.1f}, AER {without:.1f} and {aer:.1f}")
