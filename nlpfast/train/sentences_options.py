"""Options of the sentence tasks: their files, the model, and the recipe. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from nlpfast.train.bert_options import SIZES
from nlpfast.train.config import DTYPES, ConfigError, TrainerConfig, check_options
from nlpfast.train.config import option as field

__all__ = ["OPTIONS", "STRATEGIES", "ClassifyOptions", "MultitaskOptions", "SentencesOptions", "TaskFiles"]

OPTIONS = ("pretrain", "finetune")
STRATEGIES = ("round_robin", "proportional", "annealed", "sequential", "mixed")
OBJECTIVES = ("cosine", "regression")
# the assignment's, of heads alone and of the whole model, and what trains a new one
RATES = {"pretrain": 1e-3, "finetune": 2e-5, "new": 5e-4}
# as the course calls its files, below --data_dir
COURSE_FILES = {
    "sst": ("ids-sst-train.csv", "ids-sst-dev.csv", "ids-sst-test-student.csv"),
    "cfimdb": ("ids-cfimdb-train.csv", "ids-cfimdb-dev.csv", "ids-cfimdb-test-student.csv"),
    "para": ("quora-train.csv", "quora-dev.csv", "quora-test-student.csv"),
    "sts": ("sts-train.csv", "sts-dev.csv", "sts-test-student.csv"),
}


@dataclasses.dataclass(frozen=True)
class TaskFiles:
    """Files of a task.

    Attributes:
        key: "sst", "cfimdb", "para" or "sts", or "" for a file of the user's own.
        train: to learn from.
        dev: to choose the best checkpoint by.
        test: to be predicted for; perhaps none.
    """

    key: str
    train: str
    dev: str
    test: str | None


@dataclasses.dataclass(kw_only=True)
class SentencesOptions:
    """What all sentence tasks have.

    Raises:
        ConfigError: a value outside its bounds.
    """

    data_dir: str | None = field(None, "folder with the course's files, by their names", metavar="DIR")
    output_dir: str = field("runs/sentences", "folder for log, checkpoints and predictions", metavar="DIR")
    overwrite: bool = field(False, "replace the checkpoints of an earlier run in --output_dir")
    model: str | None = field(
        None, "BERT to begin with, a folder or a name on the Hugging Face hub", metavar="NAME", fixed=True
    )
    vocab: str | None = field(
        None, "folder with the vocabulary (the model's, or one made of the text)", metavar="DIR", fixed=True
    )
    vocab_size: int = field(8000, "pieces of a vocabulary made of the text", least=10, fixed=True)
    cased: bool = field(False, "a vocabulary made of the text has capitals", fixed=True)
    config: str = field("tiny", "size of a new model", choices=tuple(SIZES), fixed=True)
    option: str = field("finetune", "train the heads alone, or all", choices=OPTIONS, fixed=True)
    hidden_dropout_prob: float = field(0.3, "dropout of states and heads", least=0, most=1, fixed=True)
    max_length: int = field(512, "pieces of a sentence that are read", least=3, most=512, fixed=True)
    class_weights: bool = field(False, "rare classes weigh more in the loss", fixed=True)
    lr: float | None = field(
        None, "peak learning rate (1e-3 for heads alone, 2e-5 with --model, 5e-4 for a new one)", above=0
    )
    epochs: int = field(10, "passes over the data, of all tasks together", least=1)
    max_steps: int | None = field(None, "optimizer steps, if that is fewer", least=1)
    batch_size: int = field(16, "examples of a task in a step", least=1, fixed=True)
    dtype: str = field("float32", "precision of the forward pass, through autocast", choices=DTYPES)
    device: str = field("auto", "auto, cpu, cuda or cuda:N; auto takes CUDA where there is one")
    seed: int = field(11711, "of initial weights, data and dropout", least=0, below=2**63, fixed=True)
    log_every: int = field(50, "steps between two lines of the log", least=1)

    def __post_init__(self) -> None:
        """Check every value."""
        check_options(self)
        for name in ("output_dir", "model", "vocab", "data_dir"):
            if getattr(self, name) == "":
                raise ConfigError(name, "", "give the name of a folder")

    def trainer_config(self, steps_per_epoch: int) -> TrainerConfig:
        """Return the settings of the training loop; an item of the data is a batch already.

        Args:
            steps_per_epoch: after so many there is an evaluation.
        """
        rate = "pretrain" if self.option == "pretrain" else "finetune" if self.model else "new"
        return TrainerConfig(
            max_epochs=self.epochs,
            max_steps=self.max_steps,
            batch_size=1,
            sampling="sequential",
            learning_rate=self.lr or RATES[rate],
            betas=(0.9, 0.999),
            weight_decay=0.01,
            schedule="cosine",
            dtype=self.dtype,
            device=self.device,
            seed=self.seed,
            log_every=self.log_every,
            eval_every=steps_per_epoch,
        )

    def files(self) -> list[TaskFiles]:
        """Return the files of every task, none for those that are embedded.

        Raises:
            ConfigError: some are named and others missing.
        """
        raise NotImplementedError

    def _course(self, key: str, given: dict[str, str | None]) -> TaskFiles | None:
        """Return the files of a task, those that are given and otherwise the course's; None without any."""
        names = dict(zip(("train", "dev", "test"), COURSE_FILES[key], strict=True))
        found = dict(given)
        if self.data_dir is not None:
            for part, name in names.items():
                path = Path(self.data_dir) / name
                if found[part] is None and (part != "test" or path.exists()):
                    found[part] = str(path)
        missing = [part for part in ("train", "dev") if found[part] is None]
        if len(missing) == 2 and found["test"] is None:
            return None
        for part in missing:
            argument = part if isinstance(self, ClassifyOptions) else f"{key}_{part}"
            rule = "other files of the task are given and this is not, name it or --data_dir"
            raise ConfigError(argument, None, rule)
        return TaskFiles(key, str(found["train"]), str(found["dev"]), found["test"])


@dataclasses.dataclass(kw_only=True)
class ClassifyOptions(SentencesOptions):
    """One task of single sentences, or of pairs."""

    task: str = field(
        "sst", "sst, cfimdb, or a training file: id, sentence or two, class", metavar="TASK", fixed=True
    )
    train: str | None = field(None, "examples to learn from (embedded ones for sst)", metavar="FILE")
    dev: str | None = field(None, "examples to choose the best checkpoint by", metavar="FILE")
    test: str | None = field(None, "examples to be predicted for", metavar="FILE")

    def files(self) -> list[TaskFiles]:
        """Return the files of the task, none for embedded ones.

        Raises:
            ConfigError: some are named and others missing.
        """
        if self.task in ("sst", "cfimdb"):
            found = self._course(self.task, {"train": self.train, "dev": self.dev, "test": self.test})
            if found is None and self.task == "cfimdb":
                raise ConfigError("task", "cfimdb", "has no embedded examples, give --data_dir or files")
            return [] if found is None else [found]
        if self.train is not None:
            raise ConfigError("train", self.train, f"--task {self.task} is the training file, leave out one")
        if self.dev is None:
            raise ConfigError("dev", None, f"--task {self.task} is a file of your own, name another here")
        return [TaskFiles("", self.task, self.dev, self.test)]


@dataclasses.dataclass(kw_only=True)
class MultitaskOptions(SentencesOptions):
    """Sentiment, paraphrases and similarity on one encoder."""

    sst_train: str | None = field(None, "of sentiment, to learn from (embedded examples)", metavar="FILE")
    sst_dev: str | None = field(None, "of sentiment, to choose by", metavar="FILE")
    sst_test: str | None = field(None, "of sentiment, to be predicted for", metavar="FILE")
    para_train: str | None = field(None, "of paraphrases, to learn from (embedded examples)", metavar="FILE")
    para_dev: str | None = field(None, "of paraphrases, to choose by", metavar="FILE")
    para_test: str | None = field(None, "of paraphrases, to be predicted for", metavar="FILE")
    sts_train: str | None = field(None, "of similarity, to learn from (embedded examples)", metavar="FILE")
    sts_dev: str | None = field(None, "of similarity, to choose by", metavar="FILE")
    sts_test: str | None = field(None, "of similarity, to be predicted for", metavar="FILE")
    strategy: str = field("round_robin", "which task a step is of", choices=STRATEGIES, fixed=True)
    rlayer: bool = field(False, "both tasks of pairs share a layer before their heads", fixed=True)
    objective: str = field("cosine", "what makes a score of two sentences", choices=OBJECTIVES, fixed=True)
    pcgrad: bool = field(
        False, "project gradients of tasks that contradict each other (--strategy mixed)", fixed=True
    )

    def __post_init__(self) -> None:
        """Check every value."""
        super().__post_init__()
        if self.pcgrad and self.strategy != "mixed":
            raise ConfigError("pcgrad", True, "needs all tasks in a step, add --strategy mixed")

    def files(self) -> list[TaskFiles]:
        """Return the files of the three tasks, none for embedded ones.

        Raises:
            ConfigError: some are named and others missing.
        """
        found = []
        for key in ("sst", "para", "sts"):
            given = {part: getattr(self, f"{key}_{part}") for part in ("train", "dev", "test")}
            found.append((key, self._course(key, given)))
        named = [files for _, files in found if files is not None]
        if named and len(named) < len(found):
            key = next(key for key, files in found if files is None)
            raise ConfigError(f"{key}_train", None, "files of other tasks are given, name those of all three")
        return named
