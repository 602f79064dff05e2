"""What a run says: lines or a progress bar on stderr, JSON lines in a file, TensorBoard if asked for."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any, TextIO

from nlpfast.train.config import ConfigError

BAR_WIDTH = 24
SECONDS_BETWEEN_REDRAWS = 0.1


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"


class RunLog:
    """Write the records of a run; a context manager, usable once.

    Args:
        folder: `log.jsonl` and TensorBoard's events go there; None for neither.
        length: continue an existing `log.jsonl` after so many bytes; 0 replaces it.
        tensorboard: also write TensorBoard events.
        stream: where lines for people go, stderr for example; None for nowhere.

    Raises:
        ConfigError: TensorBoard is asked for and not installed, or there is no folder for it.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        length: int = 0,
        tensorboard: bool = False,
        stream: TextIO | None,
    ) -> None:
        """Open the files."""
        self._writer = _tensorboard_writer(folder) if tensorboard else None
        # closed by __exit__
        self._file = open(folder / "log.jsonl", "ab") if folder else None  # noqa: SIM115
        if self._file is not None:
            # what a run wrote after the checkpoint from which it goes on comes again
            self._file.truncate(min(length, self._file.tell()))
        self._stream = stream
        self._terminal = stream is not None and stream.isatty()
        self._drawn = 0
        self._last_drawing = 0.0
        self._started = time.monotonic()

    def __enter__(self) -> RunLog:
        """Return the log itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Erase the bar and close the files."""
        self._erase()
        if self._file is not None:
            self._file.close()
        if self._writer is not None:
            self._writer.close()

    def record(self, record: dict[str, Any], total_steps: int | None) -> None:
        """Write one record: a JSON line, a line for people, and TensorBoard's scalars.

        Args:
            record: plain values; `step` and `loss` at least.
            total_steps: the last step, or None when it is not known.
        """
        self.note(record)
        if self._writer is not None:
            for name, value in record.items():
                if name != "step" and isinstance(value, (int, float)):
                    self._writer.add_scalar(name, value, record["step"])
        # the bar already shows the loss; on a terminal only evaluations stay
        if not self._terminal or not {"val_loss", "score"}.isdisjoint(record):
            self.say(_line(record, total_steps))

    def note(self, record: dict[str, Any]) -> None:
        """Write a JSON line.

        Args:
            record: plain values; NaN is one.
        """
        if self._file is not None:
            self._file.write(json.dumps(record).encode() + b"\n")
            self._file.flush()

    def sync(self) -> int:
        """Wait until the file is on the disk, and return its length; 0 without one."""
        if self._file is None:
            return 0
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def say(self, line: str) -> None:
        """Print a line for people."""
        if self._stream is not None:
            self._erase()
            print(line, file=self._stream, flush=True)

    def progress(self, step: int, total_steps: int | None, loss: float) -> None:
        """Redraw the bar, at most ten times a second; nothing happens where there is no terminal."""
        now = time.monotonic()
        if self._stream is None or not self._terminal or now - self._last_drawing < SECONDS_BETWEEN_REDRAWS:
            return
        self._last_drawing = now
        text = f"step {step}  loss {loss:.4f}  {_duration(now - self._started)}"
        if total_steps:
            done = min(1.0, step / total_steps)
            bar = ("=" * round(done * BAR_WIDTH)).ljust(BAR_WIDTH)
            left = (now - self._started) * (1 - done) / max(done, 1e-9)
            text = f"[{bar}] {done:4.0%}  step {step}/{total_steps}  loss {loss:.4f}  {_duration(left)} left"
        self._stream.write("\r" + text.ljust(self._drawn))
        self._stream.flush()
        self._drawn = len(text)

    def _erase(self) -> None:
        if self._stream is not None and self._drawn:
            self._stream.write("\r" + " " * self._drawn + "\r")
            self._stream.flush()
            self._drawn = 0


def _line(record: dict[str, Any], total_steps: int | None) -> str:
    steps = f"{record['step']}/{total_steps}" if total_steps else str(record["step"])
    parts = [f"step {steps:>11}", f"loss {record['loss']:.4f}"]
    if "val_loss" in record:
        parts.append(f"val {record['val_loss']:.4f}")
    if "score" in record:
        parts.append(f"score {record['score']:.4f}")
    if record.get("best"):
        parts[-1] += " (best)"
    if "lr" in record:
        parts.append(f"lr {record['lr']:.2e}")
    if "tokens_per_second" in record:
        parts.append(f"{record['tokens_per_second']:,.0f} tokens/s")
    if record.get("skipped_steps"):
        parts.append(f"{record['skipped_steps']} steps skipped by the loss scaler")
    if record.get("nonfinite_steps"):
        parts.append(f"{record['nonfinite_steps']} steps left out")
    if record.get("empty_batches"):
        parts.append(f"{record['empty_batches']} batches without a counted target")
    return "  ".join(parts)


def _tensorboard_writer(folder: Path | None) -> Any:
    if folder is None:
        raise ConfigError("tensorboard", True, "give an output folder for its events as well")
    check_tensorboard()
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"))


def check_tensorboard() -> None:
    """Raise unless TensorBoard is installed.

    Raises:
        ConfigError: it is not; the message says how to install it.
    """
    import importlib.util

    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("tensorboard", True, "leave it off or `pip install nlpfast[log]`")


class Meter:
    """Means since the last record.

    Attributes:
        latest: loss of the latest step.
    """

    def __init__(self) -> None:
        """Start at nothing."""
        self.latest = self.norm = 0.0
        self.restart()

    def restart(self) -> None:
        """Forget the sums and restart the clock."""
        self.loss, self.tokens, self.started = 0.0, 0, time.monotonic()

    def add(self, loss: float, tokens: int, norm: float) -> None:
        """Count one optimizer step.

        Args:
            loss: mean over its tokens.
            tokens: how many counted.
            norm: of the gradient before clipping.
        """
        self.loss += loss * tokens
        self.tokens += tokens
        self.latest, self.norm = loss, norm

    def state(self) -> list[float]:
        """Return what `restore` takes."""
        return [self.loss, self.tokens, self.latest, self.norm]

    def restore(self, state: list[float]) -> None:
        """Go on from what `state` returned.

        Raises:
            ValueError: there are more values or fewer.
        """
        self.loss, tokens, self.latest, self.norm = state
        self.tokens = int(tokens)

    def record(self, learning_rate: float, seconds: float) -> dict[str, Any]:
        """Return the entries of a record: mean loss per token, rates, and the time.

        Args:
            learning_rate: of the latest step.
            seconds: since the run began.
        """
        elapsed = max(time.monotonic() - self.started, 1e-9)
        return {
            "loss": self.loss / self.tokens if self.tokens else self.latest,
            "lr": learning_rate,
            "time": round(seconds, 3),
            "grad_norm": self.norm if math.isfinite(self.norm) else None,
            "tokens_per_second": round(self.tokens / elapsed, 1),
        }
