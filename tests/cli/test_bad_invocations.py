"""Every way to call a verb wrongly: the exit code, one line on stderr with what is wrong and what to do.

Nothing is printed on stdout, and nothing on the disk changes.
"""

import argparse
import builtins
import gzip
import io
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nlpfast.cli import bench, build_parser, main
from nlpfast.data.birthplaces_files import read_documents
from nlpfast.data.subwords import Subwords
from nlpfast.models.gpt import GPT, GPTConfig
from nlpfast.models.parameter_file import write_parameters
from nlpfast.train import checkpoint
from nlpfast.train.translation_options import ALIGNED

USAGE, DATA = 2, 65
LEAST = 200
LONGEST = 300

# a command line; its exit code; what the message names; what it tells to do
Case = tuple[str, int, str, str]


def each(command: str, code: int, fix: str, *words: str) -> list[Case]:
    """Return a case for each of `words` in the place of {}; the message names its first word."""
    return [(command.replace("{}", word), code, re.split("[ =]", word)[0], fix) for word in words]


def see(command: str, *words: str) -> list[Case]:
    """Return cases of words that the parser of a command refuses."""
    return each(f"{command} {{}}".strip(), USAGE, f"(see nlpfast {command}".rstrip() + " --help)", *words)


VERBS = [
    ("", USAGE, "name a verb", "vocab, align, score, plot, info, bench"),
    *see("", "fly", "INFO", "inf", "--fly", "--verbose"),
    ("--max-steps 3", USAGE, "VERB", "choose from 'train', 'generate'"),
    *see("info", "extra", "--quick", "--device cpu", "--json=yes"),
    ("train", USAGE, "TASK", "(see nlpfast train --help)"),
    *see("train", "kites", "LM", "--"),
    ("train --text good.txt", USAGE, "TASK", "choose from 'lm'"),
    ("generate", USAGE, "CHECKPOINT", "(see nlpfast generate --help)"),
    ("generate --prompt a", USAGE, "CHECKPOINT", "(see nlpfast generate --help)"),
    ("align", USAGE, "ACTION", "(see nlpfast align --help)"),
    *see("align", "glue", "Score"),
    ("birthplaces", USAGE, "ACTION", "(see nlpfast birthplaces --help)"),
    *see("birthplaces", "forget", "Pretrain"),
    ("vocab", USAGE, "KIND", "(see nlpfast vocab --help)"),
    *see("vocab", "syllables", "WordPiece"),
    ("vocab --size 3 good.txt", USAGE, "KIND", "choose from 'wordpiece', 'bpe', 'encode', 'decode'"),
    ("align --gold gold", USAGE, "ACTION", "choose from 'score'"),
    ("plot", USAGE, "ACTION", "(see nlpfast plot --help)"),
    *see("plot", "heads", "Curves"),
    ("plot --output x.png", USAGE, "ACTION", "choose from 'curves'"),
]

LM = "train lm {}"
TRAIN_WORDS = [
    *see(
        "train lm", "extra", "whole", "--nothing", "--nothing 3", "--max-step 3", "--top-k 3", "--n_layer 3"
    ),
    *see("train lm", "--overwrite=yes", "--tensorboard=1", "--resume"),
    ("train lm --overwrite yes", USAGE, "yes", "(see nlpfast train lm --help)"),
    ("train lm --max-steps 10 20", USAGE, "20", "(see nlpfast train lm --help)"),
    ("train lm --betas 0.9 0.99 0.999", USAGE, "0.999", "(see nlpfast train lm --help)"),
    *see(
        "train lm", "--text", "--output-dir", "--max-steps", "--betas", "--schedule", "--sampling", "--seed"
    ),
    *see("train lm", "--biographies 1.5", "--biographies many", "--n-layer two", "--n-layer 1e3"),
    *see(
        "train lm", "--n-head x", "--n-embd 128.0", "--block-size 0x40", "--dropout half", "--max-steps many"
    ),
    *see("train lm", "--max-steps 1.5", "--max-steps ''", "--max-epochs 0.5", "--max-epochs all"),
    *see("train lm", "--batch-size 12.5", "--batch-size auto", "--accumulation-steps none"),
    *see("train lm", "--learning-rate fast", "--learning-rate 1,5", "--learning-rate -inf"),
    *see("train lm", "--betas 0.9", "--betas 0.9 b", "--betas 0.9,0.99", "--weight-decay little"),
    *see("train lm", "--grad-norm-clip off", "--warmup-tokens 5%", "--final-tokens all", "--seed 1.0"),
    *see("train lm", "--num-workers two", "--eval-every often", "--eval-batches all", "--eval-batch-size x"),
    *see("train lm", "--save-every x", "--log-every never", "--skip-nonfinite x", "--strategy"),
    *see("train lm", "--warmup-steps few", "--plateau-patience much", "--early-stop=yes", "--average all"),
    *see("train lm", "--optimizer", "--vocab", "--valid", "--max-length", "--max-length x", "--model"),
    *see("train lm", "--embed-size x", "--hidden-size 1.5"),
    *each(LM, USAGE, "choose from 'gpt', 'rnn'", "--model lstm", "--model transformer"),
    *each(LM, USAGE, "choose from 'adamw', 'adam', 'adamax', 'sgd'", "--optimizer lamb"),
    *each(LM, USAGE, "choose from 'cosine'", "--schedule linear", "--schedule Cosine"),
    *each(LM, USAGE, "choose from 'float32'", "--dtype int8", "--dtype fp16", "--dtype float64"),
    *each(LM, USAGE, "choose from 'shuffle'", "--sampling random"),
    *each(LM, USAGE, "choose from 'ddp'", "--strategy dp"),
]
TRAIN_BOUNDS = [
    *each(LM, USAGE, "at least 1 and at most 5000", *(f"--biographies {n}" for n in (0, -1, 5001))),
    *each(
        LM, USAGE, "at least 1", "--n-layer 0", "--n-layer -3", "--n-head 0", "--n-embd 0", "--block-size 0"
    ),
    *each(LM, USAGE, "at least 1", "--block-size -64", "--max-steps 0", "--max-steps -5", "--max-epochs 0"),
    *each(LM, USAGE, "at least 1", "--batch-size 0", "--batch-size -1", "--accumulation-steps 0"),
    *each(LM, USAGE, "at least 1", "--final-tokens 0", "--eval-every 0", "--eval-batches 0"),
    *each(LM, USAGE, "at least 1", "--eval-batch-size 0", "--save-every 0", "--log-every 0"),
    *each(LM, USAGE, "at least 0", "--warmup-tokens -1", "--num-workers -1", "--skip-nonfinite -1"),
    *each(LM, USAGE, "at least 0", "--warmup-steps -1", "--average -1"),
    *each(LM, USAGE, "at least 1", "--plateau-patience 0", "--early-stop 0"),
    *each(LM, USAGE, "or this", "--warmup-steps 5 --warmup-tokens 9", "--warmup-steps 5 --final-tokens 9"),
    *each(LM, USAGE, "give warmup_steps", "--warmup-tokens 5 --schedule noam"),
    *each(LM, USAGE, "leave it out", "--final-tokens 5 --schedule noam"),
    *each(LM, USAGE, "give at least 1", "--warmup-tokens 0 --schedule inverse_sqrt"),
    *each(LM, USAGE, "at least 0", "--weight-decay -0.1", "--weight-decay inf"),
    *each(LM, USAGE, "at least 0 and at most 1", *(f"--dropout {x}" for x in (2, -0.1, "nan", "inf"))),
    *each(
        LM, USAGE, "finite number above 0", *(f"--learning-rate {x}" for x in (0, -1, "nan", "inf", "1e999"))
    ),
    *each(LM, USAGE, "finite number above 0", *(f"--grad-norm-clip {x}" for x in (0, -1, "nan"))),
    *each(
        LM,
        USAGE,
        "at least 0 and below 1",
        *(f"--betas {x}" for x in ("0.9 1", "1 0.9", "-0.1 0.9", "0.9 nan")),
    ),
    *each(LM, USAGE, "at least 0 and below 9.2", "--seed -1", f"--seed {2**63}"),
    *each(LM, USAGE, "a multiple of n_head", "--n-embd 30", "--n-embd 128 --n-head 3"),
    *each(LM, USAGE, "less than final_tokens", "--warmup-tokens 9 --final-tokens 8"),
    *each(LM, USAGE, "less than final_tokens", "--warmup-tokens 8 --final-tokens 8"),
    *each(
        LM, USAGE, "give one of auto, cpu, cuda, cuda:N", "--device toaster", "--device cuda:", "--device ''"
    ),
    *each(
        LM, USAGE, "give one of auto, cpu, cuda, cuda:N", "--device meta", "--device cpu,cuda", "--device CPU"
    ),
    *each(LM, USAGE, "give cpu or auto", "--device cuda:99"),
    *each(LM, USAGE, "name a folder", "--output-dir file", "--output-dir file/below"),
    *each(LM, USAGE, "the name of a folder", "--output-dir ''"),
    *each(LM, USAGE, "at least 1", "--embed-size 0", "--hidden-size -1", "--n-layer 0 --model rnn"),
    *each(LM, USAGE, "at least 2 and at most 1024", "--max-length 1", "--max-length 1025"),
    *each(LM, USAGE, "give a name", "--vocab ''", "--valid ''"),
    *each(LM, USAGE, "name their file by --text too", "--vocab pieces"),
    *each(LM, USAGE, "add --vocab", "--valid good.txt", "--valid good.txt --text good.txt"),
    ("train lm --model rnn --strategy fsdp", USAGE, "--strategy fsdp", "use ddp"),
    *each(LM, USAGE, "name another folder or add --overwrite", "--output-dir run"),
]
TEXT = "train lm --text {}"
LINES = "train lm --vocab pieces --text {}"
TRAIN_DATA = [
    *each(LINES, DATA, "check the path", "missing.txt", "dangling"),
    *each(LINES, DATA, "give a text with one a line", "newline.txt", "none"),
    *each(LINES, DATA, "convert", "bad.txt", "nul.txt"),
    *each(LINES, DATA, "name a --valid file", "short.txt"),
    *each(LINES, DATA, "check the text and max_length", "good.txt --max-length 2"),
    *each("train lm --vocab pieces --text good.txt --valid {}", DATA, "check the path", "missing.txt"),
    *each("train lm --vocab pieces --text good.txt --valid {}", DATA, "convert", "bad.txt"),
    *each("train lm --text good.txt --vocab {}", DATA, "a folder of `nlpfast vocab bpe`", "nothing", "whole"),
    *each(TEXT, DATA, "check the path", "missing.txt", "dangling"),
    *each(TEXT, DATA, "give a text file", ".", "nothing", "whole"),
    *each(TEXT, DATA, "give a file with text", "empty.txt", "empty.gz"),
    *each(TEXT, DATA, "give about 650 characters or a smaller block_size", "newline.txt", "short.txt"),
    *each(TEXT, DATA, "a smaller block_size", "good.txt --block-size 100"),
    *each(TEXT, DATA, "convert", "bad.txt", "nul.txt", "utf16.txt", "image.png", "surrogate.txt"),
    *each(TEXT, DATA, "compress it again", "cut.gz", "head.gz", "noise.gz"),
    *each(TEXT, DATA, "check its permissions", "unreadable.txt", "loop", "file/below"),
    *each(
        "train lm --resume {}",
        DATA,
        "name the folder that `nlpfast train` wrote",
        "missing",
        "nothing",
        "file",
    ),
    *each("train lm --resume {}", DATA, "use another checkpoint", "state-cut", "state-empty"),
    *each("train lm --resume run {}", USAGE, "leave it out", "--overwrite", "--output-dir elsewhere"),
    ("train lm --text bad.txt --max-steps 1", DATA, "bad.txt:3: ", "convert"),
    ("train lm --text nul.txt --max-steps 1", DATA, "nul.txt:2: ", "convert"),
]

GENERATE = "generate whole {}"
GENERATE_WORDS = [
    *see("generate", "--prompt", "--max-new-tokens", "--top-k", "--device", "--temperature"),
    *each(
        GENERATE, USAGE, "(see nlpfast generate --help)", "extra", "--nothing", "--temp 1", "--max-steps 3"
    ),
    *each(GENERATE, USAGE, "(see nlpfast generate --help)", "--max-new-tokens 1.5", "--max-new-tokens lots"),
    *each(
        GENERATE, USAGE, "(see nlpfast generate --help)", "--temperature hot", "--top-k 1.5", "--top-k all"
    ),
    *each(GENERATE, USAGE, "(see nlpfast generate --help)", "--top-p most", "--seed x", "--greedy=1"),
    *each(GENERATE, USAGE, "at least 0", "--max-new-tokens -1"),
    *each(GENERATE, USAGE, "finite number above 0", *(f"--temperature {x}" for x in (0, -1, "nan", "inf"))),
    *each(GENERATE, USAGE, "at least 1", "--top-k 0", "--top-k -1"),
    *each(GENERATE, USAGE, "above 0 and at most 1", *(f"--top-p {x}" for x in (0, 1.5, -0.5, "nan"))),
    *each(GENERATE, USAGE, "at least 0 and below 9.2", "--seed -1", f"--seed {2**63}"),
    *each(GENERATE, USAGE, "leave out one of the two", "--top-k 3 --greedy", "--top-p 0.5 --greedy"),
    *each(GENERATE, USAGE, "leave out one of the two", "--temperature 0.5 --greedy"),
    *each(GENERATE, USAGE, "give one of auto, cpu, cuda, cuda:N", "--device toaster", "--device xpu"),
    *each(GENERATE, USAGE, "give cpu or auto", "--device cuda:99"),
    *each(GENERATE, USAGE, "remove it", "--prompt abc", "--prompt é", "--prompt 'a b'"),
]
CHECKPOINT = "generate {}"
GENERATE_DATA = [
    *each(CHECKPOINT, DATA, "name the folder", "missing", "file/below"),
    ("generate dangling", DATA, "nowhere: no such checkpoint", "name the folder"),
    ("generate .", DATA, "is not a checkpoint", "no state.json in it"),
    *each(CHECKPOINT, DATA, "no state.json in it", "good.txt", "nothing", "state-missing", "state-folder"),
    *each(CHECKPOINT, DATA, "use a checkpoint of `nlpfast train lm`", "wordless", "letters-text"),
    *each(CHECKPOINT, DATA, "state.json: vocabulary", "letters-twice", "letters-long", "letters-numbers"),
    *each(CHECKPOINT, DATA, "give at least one character", "letters-none"),
    *each(CHECKPOINT, DATA, "use another checkpoint", "letters-two"),
    *each(CHECKPOINT, DATA, "use another checkpoint", "state-empty", "state-cut", "state-noise"),
    *each(
        CHECKPOINT, DATA, "use a checkpoint of this version", "state-list", "state-format", "state-formless"
    ),
    *each(CHECKPOINT, DATA, "use another checkpoint", "state-stateless", "state-config", "state-metadata"),
    *each(CHECKPOINT, DATA, "give a folder with a saved model", "weights-missing", "weights-folder"),
    *each(CHECKPOINT, DATA, "save the model again", "weights-empty", "weights-cut", "weights-short"),
    *each(CHECKPOINT, DATA, "save the model again", "weights-more", "weights-noise", "weights-pickle"),
    *each(CHECKPOINT, DATA, "give a folder with a saved model", "config-missing", "config-folder"),
    *each(
        CHECKPOINT, DATA, "save the model again", "config-empty", "config-cut", "config-list", "config-latin"
    ),
    *each(CHECKPOINT, DATA, "name another model", "config-type"),
    *each(CHECKPOINT, DATA, "change one of the two", "config-heads"),
    *each(CHECKPOINT, DATA, "pass n_embd=", "config-text"),
    *each(CHECKPOINT, DATA, "pass n_layer=", "config-negative"),
    *each(CHECKPOINT, DATA, "pass n_head=", "config-float", "config-zero"),
    *each(CHECKPOINT, DATA, "pass vocab_size=", "config-wordless"),
    *each(CHECKPOINT, DATA, "write n_layer=1", "config-name"),
    *each(CHECKPOINT, DATA, "0 turns dropout off", "config-dropout"),
    *each(CHECKPOINT, DATA, "use another checkpoint", "config-huge"),
    *each(
        CHECKPOINT, DATA, "that belongs to these weights", "config-shape", "config-letters", "config-layers"
    ),
]

SCORE, COMBINE, ALIGN = "align score {} --gold gold", "align symmetrize {}", "align train {}"
ALIGN_WORDS = [
    ("align score", USAGE, "HYP, --gold", "(see nlpfast align score --help)"),
    ("align score hyp", USAGE, "--gold", "(see nlpfast align score --help)"),
    ("align score --gold gold", USAGE, "HYP", "(see nlpfast align score --help)"),
    ("align score hyp --gold", USAGE, "--gold", "(see nlpfast align score --help)"),
    *see("align score", "--gold-one-based=yes hyp --gold gold"),
    ("align score hyp --gol gold", USAGE, "--gold", "(see nlpfast align score --help)"),
    *each(
        "align score hyp --gold gold {}", USAGE, "(see nlpfast align score --help)", "extra", "--method union"
    ),
    *each("align score hyp --gold gold {}", USAGE, "(see nlpfast align score --help)", "--target-source=no"),
    ("align symmetrize", USAGE, "FWD, REV", "(see nlpfast align symmetrize --help)"),
    ("align symmetrize hyp", USAGE, "REV", "(see nlpfast align symmetrize --help)"),
    *see("align symmetrize", "hyp hyp hyp", "--method", "--target-source=no hyp hyp"),
    *each("align symmetrize hyp hyp {}", USAGE, "(see nlpfast align symmetrize --help)", "--model eflomal"),
    *each("align symmetrize hyp hyp {}", USAGE, "(see nlpfast align symmetrize --help)", "--gold-one-based"),
    *each("align symmetrize hyp hyp {}", USAGE, "'grow-diag-final-and'", "--method grow", "--method UNION"),
    ("align train", USAGE, "SRC, TGT", "(see nlpfast align train --help)"),
    ("align train src", USAGE, "TGT", "(see nlpfast align train --help)"),
    *each(
        "align train src tgt {}", USAGE, "(see nlpfast align train --help)", "extra", "--model", "--method"
    ),
    *each(
        "align train src tgt {}",
        USAGE,
        "(see nlpfast align train --help)",
        "--iterations 5",
        "--target-source",
    ),
    *each("align train src tgt {}", USAGE, "'eflomal', 'fast_align'", "--model giza", "--model Eflomal"),
    *each("align train src tgt {}", USAGE, "'grow-diag-final-and'", "--method grow"),
]
ALIGN_DATA = [
    *each(SCORE, DATA, "check the path", "missing", "dangling"),
    *each("align score hyp --gold {}", DATA, "check the path", "missing"),
    *each(SCORE, DATA, "give a text file", ".", "nothing"),
    *each("align score hyp --gold {}", DATA, "give a text file", "."),
    *each(SCORE, DATA, "give a file with text", "empty.txt", "empty.gz"),
    *each(SCORE, DATA, "check its permissions", "unreadable.txt", "loop"),
    *each(SCORE, DATA, "convert", "latin", "zero-byte", "image.png", "utf16.txt"),
    *each(SCORE, DATA, "compress it again", "cut.gz", "head.gz", "noise.gz"),
    *each(
        SCORE, DATA, "two numbers such as 0-3", "half", "words", "minus", "float", "plus", "tabs", "return"
    ),
    *each(SCORE, DATA, "two numbers such as 0-3", "arabic"),
    *each(SCORE, DATA, "put one between two links", "spaces", "leading"),
    *each(SCORE, DATA, "check what wrote the file", "huge"),
    *each(SCORE, DATA, "find the line too many", "three"),
    ("align score half --gold gold --target-source", DATA, "half:2:5: ", "two numbers such as 0-3"),
    ("align score gold --gold gold", DATA, "gold:1:5: '1p1' is a possible link", "write '-' or remove it"),
    ("align score hyp --gold zero --gold-one-based", DATA, "zero:2:5: ", "read the file as 0-based"),
    ("align score hyp --gold three", DATA, "hyp has 2 lines, three has 3", "find the line too many"),
    ("align score none --gold none", DATA, "none: no links in it", "check the file"),
    *each("align symmetrize hyp {}", DATA, "check the path", "missing"),
    *each("align symmetrize hyp {}", DATA, "give a text file", "nothing"),
    *each("align symmetrize hyp {}", DATA, "two numbers such as 0-3", "half"),
    *each("align symmetrize hyp {}", DATA, "convert", "nul.txt"),
    *each("align symmetrize hyp {}", DATA, "give a file with text", "empty.txt"),
    *each("align symmetrize hyp {}", DATA, "find the line too many", "three"),
    *each("align symmetrize {} hyp", DATA, "check the path", "missing"),
    *each("align symmetrize {} hyp", DATA, "two numbers such as 0-3", "half"),
    *each("align symmetrize {} hyp", DATA, "write '-' or remove it", "gold"),
    *each("align train src {}", DATA, "check the path", "missing"),
    *each("align train src {}", DATA, "find the line too many", "two"),
    *each("align train src {}", DATA, "convert", "bad.txt", "nul.txt", "utf16.txt"),
    *each("align train src {}", DATA, "compress it again", "cut.gz"),
    *each("align train src {}", DATA, "check its permissions", "unreadable.txt", "loop"),
    *each("align train {} tgt", DATA, "check the path", "missing"),
    *each("align train {} tgt", DATA, "give a text file", "."),
    *each("align train {} tgt", DATA, "give a file with text", "empty.txt"),
]

PRETRAIN = "birthplaces pretrain vanilla good.txt --writing_params_path new {}"
FINETUNE = "birthplaces finetune vanilla asked.txt --writing_params_path new --finetune_corpus_path {}"
EVALUATE = (
    "birthplaces evaluate vanilla asked.txt --reading_params_path {} --eval_corpus_path asked "
    "--outputs_path new"
)
ASK = (
    "birthplaces evaluate vanilla asked.txt --reading_params_path params --eval_corpus_path {} "
    "--outputs_path new"
)
BIRTHPLACES_ACTIONS = ("pretrain", "finetune", "evaluate")
BIRTHPLACES_WORDS = [
    *((f"birthplaces {action}", USAGE, "CORPUS", "--help)") for action in BIRTHPLACES_ACTIONS),
    *((f"birthplaces {action} vanilla", USAGE, "CORPUS", "--help)") for action in BIRTHPLACES_ACTIONS),
    *(
        (f"birthplaces {action} plain good.txt", USAGE, "plain", "choose from 'vanilla', 'perceiver'")
        for action in BIRTHPLACES_ACTIONS
    ),
    *(
        (f"birthplaces {action} vanilla good.txt {option}", USAGE, re.split("[ =]", option)[0], "--help)")
        for action in BIRTHPLACES_ACTIONS
        for option in (
            *("--bottleneck_dim few", "--reading_params_path", "--writing_params_path", "--pretrain_lr fast"),
            *("--finetune_corpus_path", "--eval_corpus_path", "--outputs_path", "--finetune_lr slow"),
            *("--tb_expt_name", "--config large", "--compat sead", "--prefix_lm=yes", "--max_epochs x"),
            *("--max_steps x", "--dtype int8", "--device", "--seed x", "--num_workers x", "--log_every x"),
            *("--save_every x", "--resume=yes", "--overwrite=yes", "--spans words", "--dropout half"),
            *("--batch_size x", "--residual=yes"),
        )
    ),
    *each(PRETRAIN, USAGE, "(see nlpfast birthplaces pretrain --help)", "extra", "--nothing", "--max-step 1"),
    *each(
        PRETRAIN, USAGE, "at least 1", "--max-epochs 0", "--max-steps 0", "--log-every 0", "--save-every 0"
    ),
    *each(PRETRAIN, USAGE, "at least 1 and at most 128", "--bottleneck-dim 0", "--bottleneck-dim 129"),
    *each(PRETRAIN, USAGE, "finite number above 0", "--pretrain-lr 0", "--finetune-lr nan"),
    *each(PRETRAIN, USAGE, "at least 0", "--num-workers -1", "--seed -1", "--dropout 2"),
    *each(PRETRAIN, USAGE, "give one of auto, cpu, cuda, cuda:N", "--device toaster"),
    ("birthplaces pretrain vanilla good.txt", USAGE, "--writing-params-path", "give the name of a file"),
    (PRETRAIN.format("--resume --overwrite"), USAGE, "--overwrite", "leave out one of the two"),
    (PRETRAIN.format("--resume"), USAGE, "--resume", "leave it out"),
    (PRETRAIN.format("--prefix_lm").replace("vanilla", "perceiver"), USAGE, "--prefix-lm", "leave it out"),
    (PRETRAIN.format("--residual"), USAGE, "--residual", "leave it out"),
    *each(
        "birthplaces pretrain vanilla good.txt --writing_params_path {}",
        USAGE,
        "create it first",
        "no/such",
        "file/new",
    ),
    ("birthplaces pretrain vanilla good.txt --writing_params_path run", USAGE, "run", "name a file"),
    (FINETUNE.format("").rpartition("--")[0], USAGE, "--finetune-corpus-path", "give the name of a file"),
    ("birthplaces evaluate vanilla asked.txt", USAGE, "--reading-params-path", "give the name of a file"),
    ("birthplaces baseline", USAGE, "--eval_corpus_path", "(see nlpfast birthplaces baseline --help)"),
    ("birthplaces baseline --eval_corpus_path asked --answer", USAGE, "--answer", "--help)"),
    ("birthplaces baseline --eval_corpus_path asked", USAGE, "asked", "give a file that has"),
    *each("birthplaces demo {}", USAGE, "(see nlpfast birthplaces demo --help)", "--output_dir", "extra"),
    ("birthplaces demo --output_dir file", USAGE, "file", "name a folder"),
]
BIRTHPLACES_DATA = [
    *each("birthplaces pretrain vanilla {} --writing_params_path new", DATA, "check the path", "missing"),
    *each("birthplaces pretrain vanilla {} --writing_params_path new", DATA, "convert", "bad.txt", "nul.txt"),
    *each("birthplaces pretrain vanilla {} --writing_params_path new", DATA, "one a line", "newline.txt"),
    *each("birthplaces pretrain vanilla {} --writing_params_path new", DATA, "remove it", "marks.txt"),
    *each(FINETUNE, DATA, "check the path", "missing"),
    *each(FINETUNE, DATA, "write question, tab, answer", "asked", "twice"),
    *each(FINETUNE, DATA, "a vocabulary that has it", "foreign"),
    *each(FINETUNE, DATA, "shorten it", "long"),
    *each(EVALUATE, DATA, "give a file that pretrain or finetune wrote", "missing", "empty.txt", "image.png"),
    *each(EVALUATE, DATA, "name that, or another file", "latents"),
    *each(EVALUATE, DATA, "give the --config", "params"),
    *each(ASK, DATA, "check the path", "missing"),
    *each(ASK, DATA, "all there or not at all", "some"),
    *each(ASK, DATA, "write question, tab, answer", "twice"),
    *each(ASK, DATA, "a vocabulary that has it", "foreign"),
    *each(ASK, DATA, "write one", "marks.txt", "newline.txt"),
    *each("birthplaces baseline --eval_corpus_path {}", DATA, "check the path", "missing"),
    *each("birthplaces baseline --eval_corpus_path {}", DATA, "all there or not at all", "some"),
]

VOCAB = "vocab wordpiece good.txt --output-dir new {}"
VOCAB_WORDS = [
    *see("vocab wordpiece", "--nothing", "--siz 100", "--output_dir new", "--vocab-size 100", "--output-dir"),
    *see("vocab wordpiece", "--size", "--size 1e3", "--size many", "--min-frequency", "--min-frequency 1.5"),
    *see("vocab wordpiece", "--cased=yes", "--overwrite=yes", "--lowercase"),
    *each("vocab wordpiece {}", USAGE, "name a folder", "--output-dir ''"),
    ("vocab wordpiece", USAGE, "--output-dir None", "name a folder"),
    ("vocab wordpiece good.txt --cased", USAGE, "--output-dir None", "name a folder"),
    *each(
        VOCAB, USAGE, "at least 6 and at most 1e+06", "--size 5", "--size 0", "--size -1", f"--size {10**30}"
    ),
    *each(VOCAB, USAGE, "at least 1 and below 9.2", "--min-frequency 0", f"--min-frequency {2**63}"),
    *each(
        "vocab wordpiece good.txt {}", USAGE, "name a folder", "--output-dir file", "--output-dir file/below"
    ),
    *each(
        "vocab wordpiece {}", USAGE, "name another folder", "--output-dir dangling", "--output-dir loop/below"
    ),
    *each("vocab wordpiece {}", USAGE, "name another folder or add --overwrite", "--output-dir ."),
]
NEW = "vocab wordpiece {} --output-dir new"
VOCAB_DATA = [
    *each(NEW, DATA, "check the path", "missing.txt", "dangling"),
    *each(NEW, DATA, "give a text file", ".", "nothing", "whole"),
    *each(NEW, DATA, "give a file with text", "empty.txt", "empty.gz"),
    *each(NEW, DATA, "give more text", "newline.txt", "none"),
    *each(NEW, DATA, "convert", "bad.txt", "nul.txt", "utf16.txt", "image.png", "surrogate.txt"),
    *each(NEW, DATA, "compress it again", "cut.gz", "head.gz", "noise.gz"),
    *each(NEW, DATA, "check its permissions", "unreadable.txt", "loop", "file/below"),
    ("vocab wordpiece good.txt bad.txt --output-dir new", DATA, "bad.txt:3: ", "convert"),
    ("vocab wordpiece good.txt --output-dir new --size 30", DATA, "good.txt: ", "a higher min_frequency"),
    ("vocab wordpiece src --output-dir new --min-frequency 9", DATA, "min_frequency=9", "give more text"),
]
PAIRS, ENCODE, DECODE = "vocab bpe {} --output-dir new", "vocab encode {}", "vocab decode {}"
SUBWORDS = [
    *see("vocab bpe", "--nothing", "--size", "--size many", "--min-frequency 1.5", "--output-dir"),
    *see("vocab bpe", "--overwrite=yes", "--cased", "--dropout 0.1"),
    ("vocab bpe good.txt", USAGE, "--output-dir None", "name a folder"),
    *each("vocab bpe good.txt {}", USAGE, "name a folder", "--output-dir file", "--output-dir file/below"),
    ("vocab bpe good.txt --output-dir .", USAGE, "has a sentencepiece.model", "add --overwrite"),
    ("vocab bpe good.txt --output-dir pieces", USAGE, "has a tokenizer.json", "add --overwrite"),
    *each("vocab bpe --output-dir new {}", USAGE, "at least 6 and at most 1e+06", "--size 5", "--size -1"),
    *each("vocab bpe --output-dir new {}", USAGE, "at least 1 and below 9.2", "--min-frequency 0"),
    *each(PAIRS, DATA, "check the path", "missing.txt", "dangling"),
    *each(PAIRS, DATA, "give more text", "newline.txt", "none"),
    *each(PAIRS, DATA, "convert", "bad.txt", "nul.txt"),
    ("vocab bpe good.txt --output-dir new --size 19", DATA, "good.txt: ", "a higher min_frequency"),
    ("vocab encode", USAGE, "DIR", "(see nlpfast vocab encode --help)"),
    ("vocab decode", USAGE, "DIR", "(see nlpfast vocab decode --help)"),
    ("vocab encode pieces src tgt", USAGE, "tgt", "(see nlpfast vocab encode --help)"),
    ("vocab decode pieces src tgt", USAGE, "tgt", "(see nlpfast vocab decode --help)"),
    ("vocab encode pieces --dropout 1", USAGE, "--dropout", "(see nlpfast vocab encode --help)"),
    *each(ENCODE, DATA, "give a folder of `nlpfast vocab bpe`", "nothing", "missing", "whole"),
    *each(DECODE, DATA, "give a folder of `nlpfast vocab bpe`", "nothing", "missing", "whole"),
    *each("vocab encode pieces {}", DATA, "check the path", "missing.txt", "dangling"),
    *each("vocab decode pieces {}", DATA, "check the path", "missing.txt", "dangling"),
    *each("vocab encode pieces {}", DATA, "give a file with text", "empty.txt"),
    *each("vocab decode pieces {}", DATA, "check its permissions", "unreadable.txt"),
    ("vocab encode pieces bad.txt", DATA, "bad.txt:3: ", "convert"),
    ("vocab decode pieces src", DATA, "src:1: 'a' is not a piece of pieces", "use the vocabulary that"),
]

TRAIN_BERT = "train bert {}"
BERT_WORDS = [
    *see("train bert", "--text", "--output-dir", "--model", "--vocab", "--resume", "--device", "--nothing"),
    *see("train bert", "--biographies few", "--vocab-size x", "--config huge", "--dropout half"),
    *see("train bert", "--max-length x", "--masking letters", "--cased=yes", "--no-nsp=yes"),
    *see("train bert", "--overwrite=yes", "--max-steps x", "--max-epochs x", "--batch-size x"),
    *see("train bert", "--accumulation-steps x", "--learning-rate x", "--betas x 1", "--weight-decay x"),
    *see("train bert", "--grad-norm-clip x", "--schedule fast", "--warmup-tokens x", "--final-tokens x"),
    *see("train bert", "--dtype int8", "--seed x", "--sampling x", "--num-workers x", "--eval-every x"),
    *see("train bert", "--eval-batches x", "--eval-batch-size x", "--save-every x", "--log-every x"),
    *see("train bert", "--skip-nonfinite x", "--strategy x", "--tensorboard=1"),
    *see("train bert", "--warmup-steps x", "--plateau-patience x", "--early-stop x", "--average x"),
    *see("train bert", "--optimizer x"),
    *each(TRAIN_BERT, USAGE, "at least 10 and at most 5000", "--biographies 9", "--biographies 5001"),
    *each(TRAIN_BERT, USAGE, "at least 8 and at most 512", "--max-length 7", "--max-length 513"),
    *each(TRAIN_BERT, USAGE, "at least 10", "--vocab-size 9"),
    *each(TRAIN_BERT, USAGE, "at least 0 and at most 1", "--dropout -0.1", "--dropout nan"),
    *each(TRAIN_BERT, USAGE, "give the name of a folder", "--output-dir ''", "--model ''", "--vocab ''"),
    *each(TRAIN_BERT, USAGE, "name a folder", "--output-dir file", "--output-dir file/below"),
    *each(TRAIN_BERT, USAGE, "add --overwrite", "--output-dir run"),
    ("train bert good.txt --text good.txt", USAGE, "--text good.txt", "leave one out"),
    ("train bert good.txt --biographies 20", USAGE, "--biographies", "leave one out"),
    ("train bert --resume run --output-dir other", USAGE, "--output-dir", "leave it out"),
    ("train bert --resume run --overwrite", USAGE, "--overwrite", "leave it out"),
    ("train bert --resume nothing", DATA, "nothing", "name the folder"),
    *each(TRAIN_BERT, DATA, "check the path", "missing.txt"),
    *each(TRAIN_BERT, DATA, "convert", "bad.txt", "nul.txt"),
    *each(TRAIN_BERT, DATA, "blank lines between documents", "newline.txt"),
    ("train bert --vocab nothing", DATA, "nothing", "give the folder of a BERT model"),
]

SENTENCES_ACTIONS = {
    "classify": ("--task", "--train", "--dev", "--test"),
    "multitask": (
        *(f"--{key}_{part}" for key in ("sst", "para", "sts") for part in ("train", "dev", "test")),
        *("--strategy random", "--rlayer=yes", "--objective dot", "--pcgrad=yes"),
    ),
}
CLASSIFY, MULTITASK = "sentences classify {}", "sentences multitask {}"
SPLIT = "sentences split examples.csv --parts {}"
SENTENCES_WORDS = [
    ("sentences", USAGE, "ACTION", "(see nlpfast sentences --help)"),
    *see("sentences", "forget", "Classify"),
    *(
        (f"sentences {action} {option}", USAGE, re.split("[ =]", option)[0], "--help)")
        for action, own in SENTENCES_ACTIONS.items()
        for option in (
            *own,
            *("--data_dir", "--output_dir", "--overwrite=yes", "--model", "--vocab", "--vocab_size x"),
            *("--cased=yes", "--config huge", "--option both", "--hidden_dropout_prob half", "--lr fast"),
            *("--max_length x", "--class_weights=yes", "--epochs x", "--max_steps x", "--batch_size x"),
            *("--dtype int8", "--device", "--seed x", "--log_every x", "--resume", "extra", "--epoch 3"),
        )
    ),
    *each(CLASSIFY, USAGE, "at least 1", "--epochs 0", "--max-steps 0", "--batch-size 0", "--log-every 0"),
    *each(CLASSIFY, USAGE, "at least 3 and at most 512", "--max-length 2", "--max-length 513"),
    *each(CLASSIFY, USAGE, "finite number above 0", "--lr 0", "--lr nan"),
    *each(CLASSIFY, USAGE, "at least 0 and at most 1", "--hidden-dropout-prob 2"),
    *each(CLASSIFY, USAGE, "give the name of a folder", "--output-dir ''", "--data-dir ''", "--model ''"),
    *each(CLASSIFY, USAGE, "name a folder", "--output-dir file"),
    *each(CLASSIFY, USAGE, "add --overwrite", "--output-dir run"),
    *each(CLASSIFY, USAGE, "give one of auto, cpu, cuda, cuda:N", "--device toaster"),
    *each(CLASSIFY, USAGE, "give --data_dir or files", "--task cfimdb"),
    ("sentences classify --train examples.csv", USAGE, "--dev", "name it or --data_dir"),
    ("sentences classify --task examples.csv", USAGE, "--dev", "name another here"),
    ("sentences classify --task a --train b --dev c", USAGE, "--train b", "leave out one"),
    ("sentences classify --resume run --overwrite", USAGE, "--overwrite", "leave it out"),
    ("sentences classify --resume nothing", DATA, "nothing", "name the folder"),
    *each(MULTITASK, USAGE, "add --strategy mixed", "--pcgrad"),
    ("sentences multitask --sst-train a --sst-dev b", USAGE, "--para-train", "name those of all three"),
    *each("sentences classify --dev examples.csv --train {}", DATA, "check the path", "missing"),
    *each("sentences classify --dev examples.csv --train {}", DATA, "correct the first line", "good.txt"),
    *each("sentences classify --dev examples.csv --train {}", DATA, "correct it", "labels.csv"),
    *each("sentences classify --dev examples.csv --task {}", DATA, "without a gap", "gap.csv"),
    ("sentences classify --data-dir nothing", DATA, "nothing/ids-sst-train.csv", "check the path"),
    *each("sentences text good.txt {}", USAGE, "(see nlpfast sentences text --help)", "--nothing"),
    ("sentences text", USAGE, "FILE", "(see nlpfast sentences text --help)"),
    *each("sentences text {}", DATA, "check the path", "missing"),
    *each("sentences text {}", DATA, "correct the first line", "good.txt"),
    *each("sentences split examples.csv {}", USAGE, "split --help)", "--parts", "--seed x"),
    ("sentences split examples.csv", USAGE, "--parts", "(see nlpfast sentences split --help)"),
    *each(SPLIT, USAGE, "write NAME=N, or NAME=rest", "new", "new=", "new=some", "new=-1"),
    *each(SPLIT, USAGE, "give each file once", "a=1 a=2", "a=rest b=rest"),
    (SPLIT.format("new=99"), DATA, "examples.csv", "lower them"),
    ("sentences split missing --parts new=1", DATA, "missing", "check the path"),
]

BENCH = [
    *see("bench", "--threads", "--backend", "--device", "--output", "--quick=yes"),
    ("bench no_such_op", USAGE, "no_such_op", "choose from 'add_layer_norm', 'alignment_loss'"),
    ("bench attention cross_entropy", USAGE, "cross_entropy", "(see nlpfast bench --help)"),
    ("bench attention --out x.json", USAGE, "--out", "(see nlpfast bench --help)"),
    ("bench attention --max-steps 3", USAGE, "--max-steps", "(see nlpfast bench --help)"),
    *each("bench {}", USAGE, "positive numbers such as 1,2", "--threads 0", "--threads -1", "--threads 1,,2"),
    *each(
        "bench {}", USAGE, "positive numbers such as 1,2", "--threads two", "--threads 1.5", "--threads ''"
    ),
    *each("bench {}", USAGE, "positive numbers such as 1,2", "--threads '1;2'", "--threads ²"),
    *each("bench {}", USAGE, "give one of them", "--backend abacus", "--backend CPU"),
    *each("bench attention {}", USAGE, "give one of them", "--backend abacus", "--backend ''"),
    ("bench modules --backend reference", USAGE, "--backend", "drop the option"),
    ("bench training --backend reference", USAGE, "--backend", "drop the option"),
    ("bench bert --backend reference", USAGE, "--backend", "drop the option"),
    *each("bench {}", USAGE, "give one of auto, cpu, cuda, cuda:N", "--device abacus", "--device meta"),
    *each("bench {}", USAGE, "give cpu or auto", "--device cuda:99"),
    *each("bench modules {}", USAGE, "give cpu or auto", "--device cuda:99"),
    *each("bench {}", USAGE, "create it first", "--output no/such/folder/x.json", "--output file/x.json"),
    *each("bench {}", USAGE, "create it first", "--output loop/x.json"),
    *each("bench {}", USAGE, "name a file or a folder", "--output /dev/full", "--output /dev/null"),
    *each("bench {}", USAGE, "name another", "--output /proc/self", "--output /proc/self/x.json"),
    *each("bench {}", USAGE, "the name of a file or of a folder", "--output ''"),
]

SCORES, CURVES = "score {} src", "plot curves {} --output new.png"
SCORE_PLOT = [
    ("score", USAGE, "HYP, REF", "(see nlpfast score --help)"),
    ("score src", USAGE, "REF", "(see nlpfast score --help)"),
    *see("score", "--metric", "--tokenize", "--lowercase=yes src tgt", "--low src tgt", "--json src tgt"),
    *each("score src tgt {}", USAGE, "choose from 'bleu', 'chrf'", "--metric rouge", "--metric BLEU"),
    ("score --metric bleu src tgt", USAGE, "src", "choose from 'bleu', 'chrf'"),
    *each("score src tgt {}", USAGE, "choose from '13a'", "--tokenize flores200", "--tokenize 13"),
    ("score src -", USAGE, "REF -", "name a file"),
    ("score src tgt -", USAGE, "REF -", "name a file"),
    *each(SCORES, DATA, "check the path", "missing", "dangling"),
    *each(SCORES, DATA, "give a text file", ".", "nothing"),
    *each(SCORES, DATA, "give a file with text", "empty.txt", "empty.gz"),
    *each(SCORES, DATA, "convert", "latin", "zero-byte", "image.png", "utf16.txt"),
    *each(SCORES, DATA, "compress it again", "cut.gz", "head.gz", "noise.gz"),
    *each(SCORES, DATA, "check its permissions", "unreadable.txt", "loop"),
    *each("score src {}", DATA, "find the line too many", "two"),
    *each("score src tgt {}", DATA, "find the line too many", "hyp"),
    *each("score src tgt {}", DATA, "check the path", "missing"),
    ("plot curves", USAGE, "RUN, --output", "(see nlpfast plot curves --help)"),
    ("plot curves run", USAGE, "--output", "(see nlpfast plot curves --help)"),
    *each("plot curves run {}", USAGE, "(see nlpfast plot curves --help)", "--output"),
    ("plot curves run --out x.png", USAGE, "--output", "(see nlpfast plot curves --help)"),
    *each("plot curves run --output x.png {}", USAGE, "(see nlpfast plot curves --help)", "--nothing"),
    *each("plot curves run {}", USAGE, "ends in .png", "--output new", "--output new.pdf", "--output ''"),
    *each("plot curves run {}", USAGE, "create it first", "--output no/new.png", "--output file/new.png"),
    ("plot curves run --output folder.png", USAGE, "folder.png", "name a file"),
    *each(CURVES, DATA, "check the path", "missing", "dangling"),
    *each(CURVES, DATA, "name the folder of a run", "nothing", "whole"),
    *each(CURVES, DATA, "give a file with text", "empty.txt"),
    *each(CURVES, DATA, "convert", "bad.txt", "nul.txt", "utf16.txt", "image.png"),
    *each(CURVES, DATA, "check its permissions", "unreadable.txt", "loop"),
    *each(CURVES, DATA, "correct the line or remove it", "good.txt", "newline.txt"),
    *each(CURVES, DATA, "wait for the first record", "begun.jsonl", "file"),
    ("plot curves damaged.jsonl --output new.png", DATA, "damaged.jsonl:2: ", "correct the line"),
]

TRAIN, GENERATION = [*TRAIN_WORDS, *TRAIN_BOUNDS, *TRAIN_DATA], [*GENERATE_WORDS, *GENERATE_DATA]
TRAIN_TRANSLATION = "train translation {}"
TRANSLATION_WORDS = [
    *see(
        "train translation", "--source", "--target", "--valid a", "--columns 1", "--columns a b", "--nothing"
    ),
    *see("train translation", "--output-dir", "--overwrite=yes", "--vocab", "--target-vocab", "--pairs many"),
    *see("train translation", "--vocab-size x", "--separate=yes", "--bpe-dropout x", "--max-length x"),
    *see("train translation", "--max-ratio x", "--max-tokens x", "--model cnn", "--encoder-layers x"),
    *see("train translation", "--decoder-layers x", "--d-model x", "--heads x", "--d-ff x", "--norm batch"),
    *see("train translation", "--activation tanh", "--positions rotary", "--tied some", "--embed-size x"),
    *see("train translation", "--hidden-size x", "--attention concat", "--dropout x", "--criterion mse"),
    *see("train translation", "--attention-dropout x", "--activation-dropout x", "--label-smoothing x"),
    *see("train translation", "--alignments", "--alignment-level line", "--alignment-lambda x"),
    *see("train translation", "--alignment-layer x", "--alignment-heads x", "--align-shift x"),
    *see("train translation", "--full-context=yes", "--choose-by chance", "--eval-beam x"),
    *see("train translation", "--eval-sentences x", "--resume", "--max-steps x", "--max-epochs x"),
    *see("train translation", "--accumulation-steps x", "--learning-rate x", "--betas x 1"),
    *see("train translation", "--weight-decay x", "--grad-norm-clip x", "--schedule fast", "--optimizer x"),
    *see("train translation", "--warmup-tokens x", "--final-tokens x", "--warmup-steps x", "--average x"),
    *see("train translation", "--plateau-patience x", "--early-stop x", "--dtype int8", "--device"),
    *see("train translation", "--seed x", "--num-workers x", "--eval-every x", "--save-every x"),
    *see("train translation", "--log-every x", "--skip-nonfinite x", "--tensorboard=1", "--batch-size 3"),
    ("train translation a.txt b.txt c.txt", USAGE, "c.txt", "give two texts"),
    *each(TRAIN_TRANSLATION, USAGE, "at least 100 and at most 100000", "--pairs 99"),
    *each(TRAIN_TRANSLATION, USAGE, "each a whole number at least 1", "--columns 0 1"),
    *each(TRAIN_TRANSLATION, USAGE, "at least 0", "--bpe-dropout 1"),
    *each(TRAIN_TRANSLATION, USAGE, "give a multiple of --heads", "--d-model 30"),
    *each(TRAIN_TRANSLATION, USAGE, "there are 4 heads", "--alignment-heads 5"),
    ("train translation --decoder-layers 2 --alignment-layer 2", USAGE, "--alignment-layer", "from the last"),
    *each(TRAIN_TRANSLATION, USAGE, "must hold a sentence", "--max-tokens 100"),
    *each(TRAIN_TRANSLATION, USAGE, "without a source text", "--target good.txt", "--alignments good.txt"),
    ("train translation --valid good.txt good.txt", USAGE, "--valid", "name that first"),
    ("train translation --target-vocab pieces", USAGE, "--target-vocab", "without --vocab"),
    ("train translation --vocab pieces --target-vocab pieces", USAGE, "--target-vocab", "--tied decoder"),
    *each(TRAIN_TRANSLATION, USAGE, "--tied decoder", "--separate"),
    ("train translation good.txt good.txt --criterion " + ALIGNED, USAGE, "--criterion", "add --alignments"),
    ("train translation good.txt good.txt --alignments gold", USAGE, "--alignments", ALIGNED),
    (f"train translation --bpe-dropout 0.1 --criterion {ALIGNED}", USAGE, "--bpe-dropout", "leave out"),
    (f"train translation --model rnn --criterion {ALIGNED}", USAGE, "--criterion", "for the transformer"),
    ("train translation --model rnn --tied decoder", USAGE, "--tied", "--embed-size"),
    ("train translation good.txt --source good.txt", USAGE, "--source good.txt", "leave one out"),
    *each(TRAIN_TRANSLATION, USAGE, "name a folder", "--output-dir file", "--output-dir file/below"),
    *each(TRAIN_TRANSLATION, USAGE, "add --overwrite", "--output-dir run"),
    ("train translation --resume run --output-dir other", USAGE, "--output-dir", "leave it out"),
    ("train translation --resume nothing", DATA, "nothing", "name the folder"),
    ("train translation missing.txt good.txt", DATA, "missing.txt", "check the path"),
    ("train translation bad.txt good.txt", DATA, "bad.txt", "convert"),
    ("train translation good.txt", DATA, "good.txt:1", "column"),
    ("train translation --vocab nothing", DATA, "nothing", "vocab"),
]
TRAIN_DUAL = "train dual a b --forward f --backward g --lm-source h --lm-target i {}"
DUAL_WORDS = [
    *see("train dual", "--source", "--target", "--valid a", "--columns 1", "--forward", "--backward"),
    *see("train dual", "--lm-source", "--lm-target", "--output-dir", "--overwrite=yes", "--dsl-lambda x"),
    *see("train dual", "--dsl-warmup-epochs x", "--length-norm=yes", "--max-length x", "--max-ratio x"),
    *see("train dual", "--max-tokens x", "--choose-by chance", "--eval-beam x", "--eval-sentences x"),
    *see("train dual", "--resume", "--max-steps x", "--max-epochs x", "--accumulation-steps x"),
    *see("train dual", "--learning-rate x", "--betas x 1", "--weight-decay x", "--grad-norm-clip x"),
    *see("train dual", "--schedule fast", "--optimizer x", "--warmup-tokens x", "--final-tokens x"),
    *see("train dual", "--warmup-steps x", "--plateau-patience x", "--early-stop x", "--dtype int8"),
    *see("train dual", "--device", "--seed x", "--num-workers x", "--eval-every x", "--save-every x"),
    *see("train dual", "--log-every x", "--skip-nonfinite x", "--tensorboard=1", "--average 2"),
    ("train dual", USAGE, "--source", "name it"),
    ("train dual a b", USAGE, "--forward", "name it"),
    ("train dual a b --forward f --backward g --lm-source h", USAGE, "--lm-target", "name it"),
    ("train dual a b c", USAGE, "c", "give two texts"),
    *each(TRAIN_DUAL, USAGE, "at least 0", "--dsl-lambda -0.1", "--dsl-warmup-epochs -1"),
    *each(TRAIN_DUAL, USAGE, "must hold a sentence", "--max-tokens 100"),
    *each(TRAIN_DUAL, USAGE, "name a folder", "--output-dir file"),
    *each(TRAIN_DUAL, USAGE, "add --overwrite", "--output-dir run"),
    (TRAIN_DUAL.replace("{}", ""), 1, "f", "name the folder of a run"),
    ("train dual --resume nothing", DATA, "nothing", "name the folder"),
]
TRANSLATE, EXTRACT = "translate nothing {}", "align extract run a b {}"
PLOT = "plot attention nothing word {}"
TRANSLATE_WORDS = [
    ("translate", USAGE, "RUN", "(see nlpfast translate --help)"),
    *each(TRANSLATE, USAGE, "(see nlpfast translate --help)", "--beam", "--beam x", "--n-best x"),
    *each(TRANSLATE, USAGE, "(see nlpfast translate --help)", "--scores=yes", "--length-penalty x"),
    *each(TRANSLATE, USAGE, "(see nlpfast translate --help)", "--alpha x", "--max-len-a x", "--max-len-b x"),
    *each(TRANSLATE, USAGE, "(see nlpfast translate --help)", "--min-length x", "--no-repeat-ngram x"),
    *each(TRANSLATE, USAGE, "(see nlpfast translate --help)", "--print-alignment x", "--device", "--dtype x"),
    ("translate nothing good.txt more", USAGE, "more", "(see nlpfast translate --help)"),
    *each(TRANSLATE, USAGE, "at least 1 and at most 1000", "--beam 0", "--beam 1001", "--max-len-b 0"),
    *each(TRANSLATE, USAGE, "give at most --beam, which is 5", "--n-best 6"),
    *each(TRANSLATE, USAGE, "at least 0", "--alpha -1", "--max-len-a -1", "--min-length -1"),
    *each(TRANSLATE, USAGE, "give one of auto, cpu, cuda", "--device tpu"),
    ("translate nothing good.txt", 1, "nothing", "name the folder of a run"),
    ("translate run good.txt", DATA, "run", "name the folder of a run"),
    ("align extract", USAGE, "RUN", "(see nlpfast align extract --help)"),
    ("align extract nothing good.txt", USAGE, "TGT", "(see nlpfast align extract --help)"),
    *each(EXTRACT, USAGE, "(see nlpfast align extract --help)", "--layer x", "--heads x", "--device"),
    *each(EXTRACT, USAGE, "(see nlpfast align extract --help)", "--subwords=yes"),
    ("align extract nothing good.txt good.txt", 1, "nothing", "name the folder of a run"),
    ("plot attention nothing", USAGE, "SENTENCE", "(see nlpfast plot attention --help)"),
    *each(PLOT, USAGE, "(see nlpfast plot attention --help)", "--layer x", "--target", "--output"),
    *each(PLOT, USAGE, "ends in .png", "--output new.pdf"),
    ("plot attention nothing word --output x.png --heads 2", USAGE, "--heads", "--help)"),
    ("plot attention nothing word --output x.png", 1, "nothing", "name the folder of a run"),
]

TRAIN_MRT = "train mrt a b --model f {}"
MRT_WORDS = [
    *see("train mrt", "--source", "--target", "--valid a", "--columns 1", "--model", "--output-dir"),
    *see("train mrt", "--overwrite=yes", "--reward rouge", "--samples x", "--baseline-samples x"),
    *see("train mrt", "--temperature x", "--max-len-a x", "--max-len-b x", "--nll-weight x"),
    *see("train mrt", "--max-length x", "--max-ratio x", "--max-tokens x", "--eval-beam x"),
    *see("train mrt", "--eval-sentences x", "--resume", "--max-steps x", "--max-epochs x"),
    *see("train mrt", "--accumulation-steps x", "--learning-rate x", "--betas x 1", "--weight-decay x"),
    *see("train mrt", "--grad-norm-clip x", "--schedule fast", "--optimizer x", "--warmup-tokens x"),
    *see("train mrt", "--final-tokens x", "--warmup-steps x", "--average x", "--plateau-patience x"),
    *see("train mrt", "--early-stop x", "--dtype int8", "--device", "--seed x", "--num-workers x"),
    *see("train mrt", "--eval-every x", "--save-every x", "--log-every x", "--skip-nonfinite x"),
    *see("train mrt", "--tensorboard=1", "--batch-size 3", "--vocab pieces"),
    ("train mrt", USAGE, "--source", "name it"),
    ("train mrt a b", USAGE, "--model", "name it"),
    ("train mrt a b c --model f", USAGE, "c", "give two texts"),
    ("train mrt a --source b --model f", USAGE, "--source b", "leave one out"),
    *each(TRAIN_MRT, USAGE, "at least 1", "--samples 0", "--max-len-b 0", "--eval-beam 0"),
    *each(TRAIN_MRT, USAGE, "at least 0", "--baseline-samples -1", "--max-len-a -1", "--nll-weight -1"),
    *each(TRAIN_MRT, USAGE, "above 0", "--temperature 0"),
    *each(TRAIN_MRT, USAGE, "must hold a sentence", "--max-tokens 100"),
    *each(TRAIN_MRT, USAGE, "give a name", "--output-dir ''"),
    *each(TRAIN_MRT, USAGE, "name a folder", "--output-dir file"),
    *each(TRAIN_MRT, USAGE, "add --overwrite", "--output-dir run"),
    ("train mrt --resume run --output-dir other", USAGE, "--output-dir", "leave it out"),
    ("train mrt --resume nothing", DATA, "nothing", "name the folder"),
    ("train mrt good.txt good.txt --model nothing", 1, "nothing", "name the folder of a run"),
]

BAD = [*VERBS, *TRAIN, *GENERATION, *BIRTHPLACES_WORDS, *BIRTHPLACES_DATA, *ALIGN_WORDS, *ALIGN_DATA, *BENCH]
BAD += [*VOCAB_WORDS, *VOCAB_DATA, *SUBWORDS, *BERT_WORDS, *SENTENCES_WORDS, *SCORE_PLOT]
BAD += [*TRANSLATION_WORDS, *DUAL_WORDS, *MRT_WORDS, *TRANSLATE_WORDS]


PACKED = gzip.compress(bytes(range(32, 127)) * 300, mtime=0)
TEXTS = {
    "good.txt": b"the quick brown fox\n" * 40,
    "short.txt": b"the quick brown fox\n",
    "newline.txt": b"\n",
    "empty.txt": b"",
    "empty.gz": b"",
    "bad.txt": b"fine\nfine\nnot \xff fine\n" * 100,
    "nul.txt": b"fine\nno\0t\n" * 100,
    "surrogate.txt": b"fine\n\xed\xa0\x80\n" * 100,
    "utf16.txt": ("the quick brown fox\n" * 20).encode("utf-16"),
    "image.png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    "cut.gz": PACKED[:-20],
    "head.gz": PACKED[:5],
    "noise.gz": b"\x1f\x8b" + bytes(range(200)),
    "unreadable.txt": b"nobody may read this\n",
    "file": b"mine",
    "vocab.txt": b"mine",
    "sentencepiece.model": b"mine",
    "src": b"a b c\n\nb a\n",
    "tgt": b"A B C\nX\nB A\n",
    "two": b"A B C\nX\n",
    "hyp": b"0-0 1-1\n0-0\n",
    "gold": b"0-0 1p1\n0-0 3?3\n",
    "three": b"0-0\n\n0-0\n",
    "none": b"\n\n",
    "examples.csv": b"\tid\tsentence\tsentiment\n0\ta\tgood\t3\n1\tb\tbad\t1\n",
    "labels.csv": b"\tid\tsentence\tsentiment\n0\ta\tgood\t3\n1\tb\tbad\t5\n",
    "gap.csv": b"\tid\tsentence\tsentiment\n0\ta\tgood\t2\n1\tb\tbad\t0\n",
    "asked.txt": b"Where was she born?\n",
    "asked": b"Where was she born?\nWhere?\n",
    "some": b"Where was she born?\there\nWhere?\n",
    "twice": b"Where was she born?\there\there\n",
    "foreign": b"Where was Zoe?\there\n",
    "long": b"Where?\t" + b"h" * 130 + b"\n",
    "marks.txt": b"Where\n" + "\u2047\n".encode(),
    "half": b"0-0\n0-0 1-\n",
    "words": b"a-b\n",
    "minus": b"0--1\n",
    "plus": b"+1-0\n",
    "float": b"0-1.5\n",
    "huge": b"0-99999999999\n",
    "arabic": "\u0660-\u0660\n".encode(),
    "tabs": b"0-0\t1-1\n",
    "return": b"0-0\r1-1\n",
    "spaces": b"0-0  1-1\n",
    "leading": b" 0-0\n",
    "latin": b"0-0\n\xe9\n",
    "zero": b"1-1\n2-2 0-1\n",
    "zero-byte": b"0-0\0\n",
    "begun.jsonl": b'{"step": 0, "data": {}}\n{"step": 1, "lo',
    "damaged.jsonl": b'{"step": 1, "loss": 2.0}\n{"step": 2, "lo\n{"step": 3, "loss": 2.0}\n',
}


def save_checkpoint(folder: str, **metadata: Any) -> None:
    model = GPT(GPTConfig(3, 8, n_layer=1, n_head=1, n_embd=4))
    checkpoint.save(folder, model, None, {}, {}, metadata=metadata)


def write_parameter_files() -> None:
    _, vocabulary, _ = read_documents("asked.txt")
    for name, changes in (("params", {}), ("latents", {"perceiver": True, "bottleneck_dim": 32})):
        config = GPTConfig(len(vocabulary), 128, n_layer=2, n_head=1, n_embd=4, **changes)
        write_parameters(name, GPT(config).state_dict(), {"vocabulary": vocabulary.chars})


def without(content: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key != name}


def damaged_config(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "list": [config],
        "latin": b'{"\xe9": 1}',
        "type": {**config, "model_type": "bert"},
        "heads": {**config, "n_head": 3},
        "float": {**config, "n_head": 1.5},
        "zero": {**config, "n_head": 0},
        "negative": {**config, "n_layer": -1},
        "layers": {**config, "n_layer": 2},
        "text": {**config, "n_embd": "4"},
        "shape": {**config, "n_embd": 8},
        "letters": {**config, "vocab_size": 4},
        "wordless": without(config, "vocab_size"),
        "name": {**config, "n_layers": 1},
        "dropout": {**config, "embd_pdrop": 7},
        "huge": {**config, "block_size": 10**30},
    }


def damaged_state(state: dict[str, Any]) -> dict[str, Any]:
    return {
        "list": [state],
        "noise": bytes(range(256)),
        "format": {**state, "format": 99},
        "formless": without(state, "format"),
        "stateless": without(state, "state"),
        "config": {**state, "config": 3},
        "metadata": {**state, "metadata": ["a"]},
    }


def damaged_weights(weights: bytes) -> dict[str, Any]:
    return {
        "short": weights[:-1],
        "more": weights + b"0",
        "noise": bytes(range(256)),
        "pickle": b"\x80\x04\x95",
    }


def write_checkpoints() -> None:
    save_checkpoint("whole", vocabulary=["\n", "a", "b"])
    save_checkpoint("run/last", vocabulary=["\n", "a", "b"])
    save_checkpoint("wordless")
    letters = {"twice": ["a", "b", "a"], "long": ["a", "b", "cd"], "two": ["a", "b"], "numbers": [1, 2, 3]}
    for name, vocabulary in {**letters, "text": "abc", "none": []}.items():
        save_checkpoint(f"letters-{name}", vocabulary=vocabulary)
    files = {"weights": "model.safetensors", "config": "config.json", "state": "state.json"}
    whole = {part: Path("whole", file).read_bytes() for part, file in files.items()}
    damage = {
        "weights": damaged_weights(whole["weights"]),
        "config": damaged_config(json.loads(whole["config"])),
        "state": damaged_state(json.loads(whole["state"])),
    }
    for part, contents in damage.items():
        half = whole[part][: len(whole[part]) // 2]
        for name, content in {**contents, "empty": b"", "cut": half, "missing": None, "folder": None}.items():
            shutil.copytree("whole", f"{part}-{name}")
            path = Path(f"{part}-{name}", files[part])
            path.unlink()
            if name == "folder":
                path.mkdir()
            elif content is not None:
                path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def entries() -> dict[str, tuple[int, int]]:
    found = {}
    for folder, folders, files in os.walk("."):
        for name in [*folders, *files]:
            status = os.lstat(os.path.join(folder, name))
            found[os.path.join(folder, name)] = (status.st_size, status.st_mtime_ns)
    return found


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[int, int]]]:
    """Be in a folder with files and checkpoints that are whole, damaged and in the way."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("box"))
    torch.manual_seed(0)
    for name, content in TEXTS.items():
        Path(name).write_bytes(content)
    Path("dangling").symlink_to("nowhere")
    Path("loop").symlink_to("loop")
    Path("nothing").mkdir()
    Path("folder.png").mkdir()
    write_checkpoints()
    write_parameter_files()
    Subwords.train(["the quick brown fox"] * 9, 40).save("pieces")
    yield entries()
    os.chdir(before)


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a bad invocation would get to work, and refuse to read a file even to root."""

    def work(*arguments: Any, **options: Any) -> None:
        pytest.fail("it went to work")

    monkeypatch.setattr("nlpfast.train.trainer.Trainer.run", work)
    monkeypatch.setattr("nlpfast.decoding.generate", work)
    monkeypatch.setattr("nlpfast.train.birthplaces_answers.generate", work)
    monkeypatch.setattr("nlpfast.train.aligner.align_words", work)
    monkeypatch.setattr(bench.benchmark_module("measure"), "run", work)
    really_open = io.open

    def guarded(file: Any, *arguments: Any, **options: Any) -> Any:
        if str(file).endswith("unreadable.txt"):
            raise PermissionError(13, "Permission denied", str(file))
        return really_open(file, *arguments, **options)

    monkeypatch.setattr(io, "open", guarded)
    monkeypatch.setattr(builtins, "open", guarded)


@pytest.mark.parametrize(("command", "code", "thing", "fix"), BAD, ids=[case[0] or "-" for case in BAD])
def test_a_bad_invocation(
    command: str,
    code: int,
    thing: str,
    fix: str,
    box: dict[str, tuple[int, int]],
    no_work: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = main(shlex.split(command))
    out, err = capsys.readouterr()
    assert found == code, err
    assert out == ""
    assert err.startswith("nlpfast: error: ") and err.endswith("\n")
    assert len(err.splitlines()) == 1 and len(err) < LONGEST
    assert thing and thing in err
    assert fix and fix in err
    assert entries() == box


def test_the_table_is_long_and_has_nothing_twice() -> None:
    assert len(BAD) >= LEAST
    assert len({tuple(shlex.split(command)) for command, *_ in BAD}) == len(BAD)


def options_of(parser: argparse.ArgumentParser, words: str = "") -> Iterator[tuple[str, list[str]]]:
    """Yield the long options of all verbs, in all their spellings, each after the words of its verb."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from options_of(below, f"{words} {name}".strip())
        elif spellings := [option for option in action.option_strings if option.startswith("--")]:
            yield words, spellings


def test_every_option_is_given_wrongly_at_least_once() -> None:
    asked = [(words, options) for words, options in options_of(build_parser()) if words]
    asked = [(words, options) for words, options in asked if options[0] not in ("--help", "--debug")]
    assert len(asked) > 40
    given = [(command, re.split("[ =]", command)) for command, *_ in BAD]
    missing = [
        f"{words} {options}"
        for words, options in asked
        if not any(command.startswith(words) and set(options) & set(parts) for command, parts in given)
    ]
    assert not missing, f"no bad invocation of {missing}"
