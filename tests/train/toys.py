"""Models and data that the training tests share: small enough that a step can be computed by hand."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from nlpfast.models.gpt import GPT, GPTConfig
from nlpfast.train.config import TrainerConfig
from nlpfast.train.trainer import Trainer

VOCABULARY = 7


class Bigram(nn.Module):
    """The smallest language model, with plain gradient descent: a step shows the gradient itself."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.table = nn.Parameter(
            torch.linspace(-1, 1, VOCABULARY**2, dtype=dtype).view(VOCABULARY, VOCABULARY)
        )

    def forward(self, idx, targets):
        logits = self.table[idx]
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizers(self, config):
        return torch.optim.SGD(self.parameters(), lr=config.learning_rate)


class Sentences(Dataset):
    """Random sentences of which a varying number of targets counts; `empty` of them have none that does."""

    def __init__(self, size, length=8, empty=()):
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(VOCABULARY, (size, length + 1), generator=generator)
        self.counts = torch.randint(1, length + 1, (size,), generator=generator)
        self.counts[list(empty)] = 0

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        targets = self.tokens[index, 1:].clone()
        targets[self.counts[index] :] = -100
        return self.tokens[index, :-1], targets


class Counting(Dataset):
    """Windows of 0 1 2 3 4 0 1 ...: predictable, so that the loss goes down quickly."""

    def __len__(self):
        return 200

    def __getitem__(self, index):
        window = torch.arange(index, index + 9) % 5
        return window[:-1], window[1:]


def config(**values):
    defaults = {"max_steps": 1, "batch_size": 4, "learning_rate": 0.5, "schedule": "constant"}
    return TrainerConfig(**{**defaults, "warmup_tokens": 0, "device": "cpu", **values})


def train(model, data, settings, **options):
    trainer = Trainer(model, data, settings, quiet=True, **options)
    trainer.run()
    return trainer


def small_gpt():
    torch.manual_seed(0)
    return GPT(
        GPTConfig(VOCABULARY, 8, n_layer=1, n_head=2, n_embd=16, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0)
    )
