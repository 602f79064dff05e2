"""Continue a text with a trained language model.

CHECKPOINT is a folder that `nlpfast train lm` wrote: the run's, or best/ or last/ in it. The text goes to
stdout.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys

from nlpfast.cli.options import UsageError, add_options, build
from nlpfast.train.config import ConfigError, check_options, option


@dataclasses.dataclass(kw_only=True)
class GenerateOptions:
    """How to continue a text.

    Raises:
        ConfigError: a value outside its bounds.
    """

    prompt: str | None = option(None, "text to continue (a new line)", metavar="TEXT")
    max_new_tokens: int = option(500, "characters to add", least=0)
    temperature: float = option(1.0, "below 1 sharpens the distribution", above=0)
    top_k: int | None = option(None, "sample from the N most probable characters", least=1)
    top_p: float | None = option(None, "sample from the smallest set with this probability", above=0, most=1)
    greedy: bool = option(False, "always take the most probable character")
    seed: int = option(0, "of the sampling", least=0, below=2**63)
    device: str = option("auto", "auto, cpu, cuda or cuda:N; auto takes CUDA where there is one")

    def __post_init__(self) -> None:
        """Check every value."""
        check_options(self)
        for name, default in (("temperature", 1.0), ("top_k", None), ("top_p", None)):
            value = getattr(self, name)
            if self.greedy and value != default:
                raise ConfigError(name, value, "does nothing with --greedy, leave out one of the two")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the checkpoint and the options.

    Args:
        parser: the verb's parser.
    """
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a checkpoint or of a run")
    add_options(parser, GenerateOptions, "text")


def run(args: argparse.Namespace) -> int:
    """Print the prompt and its continuation on stdout.

    Args:
        args: the parsed command line.

    Returns:
        0.
    """
    options = build(GenerateOptions, args)
    # imports torch: a wrong option is reported without waiting for it
    sys.stdout.write(continue_text(args.checkpoint, options) + "\n")
    return 0


def continue_text(folder: str, options: GenerateOptions) -> str:
    """Return the prompt and its continuation by the model of a checkpoint.

    Args:
        folder: of a checkpoint or of a run.
        options: prompt and sampling.

    Raises:
        CheckpointError: the checkpoint is missing or damaged, or has no vocabulary.
        UsageError: the prompt has a character that the model does not know.
        ConfigError: the device does not exist.
    """
    import torch

    from nlpfast.data.text import CharVocabulary, DataError
    from nlpfast.decoding import generate
    from nlpfast.models.language_model_files import load_language_model
    from nlpfast.train.checkpoint import STATE, CheckpointError, load
    from nlpfast.train.device import resolve_device

    device = resolve_device(options.device)
    saved = load(folder)
    chars = saved.metadata.get("vocabulary")
    if not isinstance(chars, list):
        raise CheckpointError(
            f"{saved.folder / STATE}: no vocabulary of characters in it: use a checkpoint of "
            "`nlpfast train lm` without --vocab"
        )
    try:
        vocabulary = CharVocabulary(chars)
    except DataError as error:
        raise CheckpointError(f"{saved.folder / STATE}: {error}") from error
    try:
        model = load_language_model(saved.folder).to(device)
    except (OSError, ValueError) as error:
        raise CheckpointError(str(error)) from error
    except TypeError as error:
        # PyTorch's answer to a size beyond 64 bits
        raise CheckpointError(f"{saved.folder}: no model has such sizes; use another checkpoint") from error
    if len(vocabulary) != model.config.vocab_size:
        sizes = f"{len(vocabulary)} characters, the model {model.config.vocab_size}"
        raise CheckpointError(f"{saved.folder / STATE}: the vocabulary has {sizes}: use another checkpoint")
    prompt = options.prompt or ("\n" if "\n" in vocabulary.stoi else vocabulary.chars[0])
    try:
        idx = vocabulary.encode(prompt)[None].to(device)
    except DataError as error:
        raise UsageError(f"--prompt: {error}") from error
    generator = torch.Generator(device).manual_seed(options.seed)
    tokens = generate(
        model,
        idx,
        options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        greedy=options.greedy,
        generator=generator,
    )
    return vocabulary.decode(tokens[0])
