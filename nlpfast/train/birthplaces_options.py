"""Options of the birthplaces task, and its recipes: sizes, batches, schedules. Nothing here imports torch.

The recipes of CS224N's assignment 5 are `compat="seed"`; what differs otherwise was found by experiment, see
README.md.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from nlpfast.train.config import DTYPES, ConfigError, TrainerConfig, check_options, option

BLOCK_SIZE = 128
VARIANTS = ("vanilla", "perceiver")
SPANS = ("random", "names")
SIZES = {
    "full": {"n_layer": 4, "n_head": 8, "n_embd": 256},
    "small": {"n_layer": 4, "n_head": 4, "n_embd": 128},
}
# documents and questions in a batch
BATCHES = {"pretrain": 128, "finetune": 256}
# of minGPT's schedule in the assignment: the warm-up in tokens, and the epochs after which the cosine ends
SEED_WARMUP, SEED_EPOCHS = 512 * 20, 200


@dataclasses.dataclass(kw_only=True)
class BirthplacesOptions:
    """Files, model and recipe; names and defaults are those of the assignment's run.py as far as it has them.

    Raises:
        ConfigError: a value outside its bounds.
    """

    bottleneck_dim: int = option(32, "latents of the perceiver", least=1, most=BLOCK_SIZE)
    reading_params_path: str | None = option(None, "parameters to begin with, or to evaluate", metavar="FILE")
    writing_params_path: str | None = option(None, "where trained parameters go", metavar="FILE")
    finetune_corpus_path: str | None = option(
        None, "questions with answers, for finetune: question TAB answer", metavar="FILE"
    )
    eval_corpus_path: str | None = option(
        None, "questions to answer, for evaluate; with answers they are scored", metavar="FILE"
    )
    outputs_path: str | None = option(None, "where predictions go, one line each", metavar="FILE")
    pretrain_lr: float = option(6e-3, "peak learning rate of pretrain", above=0)
    finetune_lr: float = option(6e-4, "peak learning rate of finetune", above=0)
    tb_expt_name: str | None = option(None, "also write TensorBoard events, below expt/, by this name")
    config: str = option("full", "size of the model", choices=tuple(SIZES))
    compat: str | None = option(None, "the assignment's own recipe", choices=("seed",))
    spans: str = option("random", "what documents lack: any span, or names", choices=SPANS)
    dropout: float = option(0.1, "dropout of embeddings, attention and residuals", least=0, most=1)
    prefix_lm: bool = option(
        False, "documents with their hole, and questions, are read in both directions (vanilla)"
    )
    residual: bool = option(
        False, "the perceiver's last layer adds what it finds to its tokens, unlike the assignment's"
    )
    batch_size: int | None = option(None, "documents or questions in a step (128; 256)", least=1)
    max_epochs: int | None = option(
        None, "passes over the data (650; for finetune 10, or 75 without --reading_params_path)", least=1
    )
    max_steps: int | None = option(None, "optimizer steps, if that is fewer", least=1)
    dtype: str = option("float32", "precision of the forward pass, through autocast", choices=DTYPES)
    device: str = option("auto", "auto, cpu, cuda or cuda:N; auto takes CUDA where there is one")
    seed: int = option(0, "of initial weights, data and dropout", least=0, below=2**63)
    num_workers: int = option(0, "processes that load data", least=0)
    log_every: int = option(50, "steps between two lines of the log", least=1)
    save_every: int = option(250, "steps between checkpoints", least=1)
    resume: bool = option(False, "go on with the run that was stopped or killed")
    overwrite: bool = option(False, "begin anew, where a run was stopped or killed")

    def __post_init__(self) -> None:
        """Check every value."""
        check_options(self)
        if self.resume and self.overwrite:
            raise ConfigError("overwrite", True, "it is given with --resume, leave out one of the two")


def needed(options: BirthplacesOptions, action: str, variant: str) -> None:
    """Raise unless the files that an action needs are named, and no option is of the other variant.

    Args:
        options: as given.
        action: pretrain, finetune or evaluate.
        variant: vanilla or perceiver.

    Raises:
        ConfigError: one is not, or is.
    """
    rules = {
        "prefix_lm": ("vanilla", "the perceiver reads a prefix in its order"),
        "residual": ("perceiver", "the vanilla model has no bottleneck"),
    }
    for name, (served, reason) in rules.items():
        if getattr(options, name) and variant != served:
            raise ConfigError(name, True, f"{reason}, name {served} or leave it out")
    files = {
        "pretrain": ("writing_params_path",),
        "finetune": ("writing_params_path", "finetune_corpus_path"),
        "evaluate": ("reading_params_path", "eval_corpus_path", "outputs_path"),
    }
    for name in files[action]:
        if not getattr(options, name):
            raise ConfigError(name, getattr(options, name), f"{action} needs it, give the name of a file")


def run_folder(options: BirthplacesOptions, action: str, variant: str) -> str:
    """Return where a run's log and checkpoints go; the assignment's name for its TensorBoard events."""
    rates = f"pt_lr_{options.pretrain_lr:f}_ft_lr_{options.finetune_lr:f}"
    return f"expt/{action}/{options.tb_expt_name or 'run'}_{variant}_{options.bottleneck_dim}_{rates}"


def trainer_config(options: BirthplacesOptions, action: str, documents: int) -> TrainerConfig:
    """Return the settings of the training loop.

    Args:
        options: as given.
        action: pretrain or finetune.
        documents: of the corpus, which sets the length of the assignment's schedule.
    """
    epochs = 650 if action == "pretrain" else 10 if options.reading_params_path else 75
    recipe: dict[str, Any] = {"schedule": "cosine", "sampling": "shuffle", "betas": (0.9, 0.95)}
    if options.compat == "seed":
        final = SEED_EPOCHS * documents * BLOCK_SIZE
        recipe |= {"schedule": "mingpt", "sampling": "sequential"}
        recipe |= {"warmup_tokens": SEED_WARMUP, "final_tokens": final}
    return TrainerConfig(
        max_epochs=options.max_epochs or epochs,
        max_steps=options.max_steps,
        batch_size=options.batch_size or BATCHES[action],
        learning_rate=options.pretrain_lr if action == "pretrain" else options.finetune_lr,
        dtype=options.dtype,
        device=options.device,
        seed=options.seed,
        num_workers=options.num_workers,
        log_every=options.log_every,
        eval_every=options.save_every,
        tensorboard=options.tb_expt_name is not None,
        **recipe,
    )
