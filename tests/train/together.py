"""What each of the processes does that test_distributed.py starts with torchrun: TASK FOLDER STRATEGY."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from toys import VOCABULARY, Sentences, config

from nlpfast.models.gpt import GPT, GPTConfig
from nlpfast.stop import Terminated
from nlpfast.train.distributed import joined
from nlpfast.train.trainer import Trainer

# an epoch has 6 batches of 2, of which the last has one sentence alone, and some have nothing that counts
SETTINGS = {
    **{"max_steps": None, "max_epochs": 2, "accumulation_steps": 2, "learning_rate": 0.01, "log_every": 1},
    **{
        "eval_every": 2,
        "save_every": 1,
        "seed": 3,
        "schedule": "cosine",
        "optimizer": "adamax",
        "average": 2,
    },
}


class Loss:
    """The model's loss, and in the n-th call what the task asks for."""

    def __init__(self, call=0, act=lambda: None):
        self.calls, self.call, self.act = 0, call, act

    def __call__(self, model, batch):
        self.calls += 1
        if self.calls == self.call:
            self.act()
        return model(*batch)[1]


def trainer(folder, strategy, loss_fn, batch_size, dropout=0.1):
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(
            *(VOCABULARY, 8),
            **{"n_layer": 2, "n_head": 2, "n_embd": 8},
            **{"embd_pdrop": dropout, "attn_pdrop": dropout, "resid_pdrop": dropout},
        )
    )
    settings = config(**SETTINGS, batch_size=batch_size, strategy=strategy, eval_batch_size=batch_size)
    data, validation = Sentences(11, empty=(1, 4, 5)), Sentences(5, empty=(2,))
    options = {"validation": validation, "output_dir": folder, "quiet": True}
    return Trainer(model, data, settings, loss_fn=loss_fn, **options)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def main(task, folder, strategy):
    folder = Path(folder)
    with joined(torch.device("cpu")) as processes:
        second = processes.rank == 1
        if task == "whole":
            trainer(folder / "whole", strategy, Loss(), 1, dropout=0.0).run()
        elif task == "resume":
            trainer(folder / "unstopped", strategy, Loss(), 1).run()
            # the signal reaches one process alone, in a step and in an evaluation
            for number, call in enumerate((4, 9)):
                run = trainer(
                    folder / "stopped", strategy, Loss(call, terminate if second else lambda: None), 1
                )
                if number:
                    run.resume(folder / "stopped")
                try:
                    run.run()
                except Terminated:
                    steps = processes.gather(run.state.step)
                    (folder / f"stopped.{number}.{processes.rank}").write_text(json.dumps(steps))
                torch.rand(5)
            run = trainer(folder / "stopped", strategy, Loss(), 1)
            run.resume(folder / "stopped")
            run.run()
        elif task == "raise":
            trainer(folder, strategy, Loss(4, (lambda: 1 / 0) if second else lambda: None), 1).run()
        elif task == "kill":
            act = (lambda: os.kill(os.getpid(), signal.SIGKILL)) if second else lambda: None
            trainer(folder, strategy, Loss(4, act), 1).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
