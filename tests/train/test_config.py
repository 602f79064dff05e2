"""Settings: a value that is not usable is refused in one line that names argument, value, rule and fix."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest

import nlpfast
from nlpfast.train.config import ConfigError, TrainerConfig, check_options, option
from nlpfast.train.language_model_options import LanguageModelOptions

BAD_TRAINING = [
    ({"max_steps": 0}, "max_steps=0", "at least 1"),
    ({"max_steps": 2.5}, "max_steps=2.5", "whole number"),
    ({"max_steps": True}, "max_steps=True", "whole number"),
    ({"max_epochs": -1}, "max_epochs=-1", "at least 1"),
    ({"batch_size": 0}, "batch_size=0", "at least 1"),
    ({"accumulation_steps": 0}, "accumulation_steps=0", "at least 1"),
    ({"learning_rate": 0.0}, "learning_rate=0.0", "above 0"),
    ({"learning_rate": math.nan}, "learning_rate=nan", "finite"),
    ({"learning_rate": "fast"}, "learning_rate='fast'", "finite number"),
    ({"betas": (0.9, 1.0)}, "betas=(0.9, 1.0)", "below 1"),
    ({"betas": (0.9,)}, "betas=(0.9,)", "2 values"),
    ({"betas": 0.9}, "betas=0.9", "2 values"),
    ({"weight_decay": -0.1}, "weight_decay=-0.1", "at least 0"),
    ({"grad_norm_clip": 0.0}, "grad_norm_clip=0.0", "above 0"),
    ({"schedule": "linear"}, "schedule='linear'", "cosine"),
    ({"warmup_tokens": -1}, "warmup_tokens=-1", "at least 0"),
    ({"warmup_tokens": 10, "final_tokens": 10}, "warmup_tokens=10", "less than final_tokens"),
    ({"warmup_tokens": 5, "warmup_steps": 9}, "warmup_steps=9", "give warmup_tokens, which is 5, or this"),
    ({"final_tokens": 5, "warmup_steps": 0}, "warmup_steps=0", "give final_tokens, which is 5, or this"),
    ({"warmup_steps": -1}, "warmup_steps=-1", "at least 0"),
    ({"schedule": "noam", "warmup_tokens": 5}, "warmup_tokens=5", "noam counts steps, give warmup_steps"),
    ({"schedule": "noam", "warmup_steps": 0}, "warmup_steps=0", "begins with a warm-up, give at least 1"),
    ({"schedule": "noam", "final_tokens": 5}, "final_tokens=5", "noam has no end, leave it out"),
    ({"schedule": "inverse_sqrt", "final_tokens": 5}, "final_tokens=5", "has no end, leave it out"),
    ({"schedule": "inverse_sqrt", "warmup_steps": 0}, "warmup_steps=0", "begins with a warm-up"),
    ({"schedule": "inverse_sqrt", "warmup_tokens": 0}, "warmup_tokens=0", "begins with a warm-up"),
    ({"schedule": "plateau", "plateau_patience": 0}, "plateau_patience=0", "at least 1"),
    ({"plateau_patience": None}, "plateau_patience=None", "at least 1"),
    ({"early_stop": 0}, "early_stop=0", "at least 1"),
    ({"average": -1}, "average=-1", "at least 0"),
    ({"optimizer": "lamb"}, "optimizer='lamb'", "give one of adamw, adam, adamax, sgd"),
    ({"dtype": "int8"}, "dtype='int8'", "bfloat16"),
    ({"device": 0}, "device=0", "a text"),
    ({"seed": -1}, "seed=-1", "at least 0"),
    ({"sampling": "sorted"}, "sampling='sorted'", "shuffle"),
    ({"num_workers": -1}, "num_workers=-1", "at least 0"),
    ({"eval_every": 0}, "eval_every=0", "at least 1"),
    ({"log_every": None}, "log_every=None", "at least 1"),
    ({"tensorboard": 1}, "tensorboard=1", "True or False"),
]


@pytest.mark.parametrize(("values", "seen", "rule"), BAD_TRAINING)
def test_a_bad_value_is_refused_with_argument_value_and_rule(values, seen, rule):
    with pytest.raises(ConfigError) as caught:
        TrainerConfig(**values)
    message = str(caught.value)
    assert message.startswith(seen)
    assert rule in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("values", "seen"),
    [
        ({"n_embd": 10, "n_head": 4}, "n_embd=10"),
        ({"dropout": 1.5}, "dropout=1.5"),
        ({"block_size": 0}, "block_size=0"),
        ({"output_dir": ""}, "output_dir=''"),
        ({"biographies": 0}, "biographies=0"),
    ],
)
def test_a_bad_model_option_is_refused(values, seen):
    with pytest.raises(ConfigError, match="^" + seen.replace("(", r"\(")):
        LanguageModelOptions(**values)


def test_an_integer_is_a_good_float_and_none_is_good_where_it_is_allowed():
    config = TrainerConfig(learning_rate=1, grad_norm_clip=None, betas=(0, 0.5))
    assert config.learning_rate == 1
    assert config.grad_norm_clip is None


def test_schedules_take_what_is_theirs():
    for schedule in ("cosine", "constant", "plateau", "mingpt"):
        assert TrainerConfig(schedule=schedule, warmup_steps=0).warmup_steps == 0
        assert TrainerConfig(schedule=schedule, warmup_tokens=0, final_tokens=9).final_tokens == 9
    assert TrainerConfig(schedule="noam").warmup_steps is None
    assert TrainerConfig(schedule="inverse_sqrt", warmup_tokens=1).warmup_tokens == 1
    # where no end is used, no warm-up is too long
    assert TrainerConfig(schedule="constant", warmup_tokens=9, final_tokens=9).warmup_tokens == 9


@pytest.mark.parametrize(
    ("values", "steps", "epochs"),
    [({}, 2000, None), ({"max_epochs": 3}, None, 3), ({"max_steps": 7, "max_epochs": 3}, 7, 3)],
)
def test_two_thousand_steps_unless_a_length_is_given(values, steps, epochs):
    config = TrainerConfig(**values)
    assert (config.max_steps, config.max_epochs) == (steps, epochs)


def test_bounds_are_inclusive_or_not_as_declared():
    @dataclasses.dataclass
    class Bounds:
        least: float = option(1.0, "", least=1)
        most: float = option(1.0, "", most=1)
        above: float = option(1.0, "", above=0)
        below: float = option(0.0, "", below=1)

    check_options(Bounds())
    for name, value in [("least", 0.9), ("most", 1.1), ("above", 0.0), ("below", 1.0)]:
        with pytest.raises(ConfigError, match=name):
            check_options(Bounds(**{name: value}))


def test_settings_do_not_import_torch():
    # the package itself does; what is imported on top must not need it
    folder = str(Path(nlpfast.__file__).parent)
    code = (
        f"import sys, types; package = types.ModuleType('nlpfast'); package.__path__ = [{folder!r}]\n"
        "sys.modules['nlpfast'] = package\n"
        "import nlpfast.train.config, nlpfast.cli.train, nlpfast.cli.generate\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
