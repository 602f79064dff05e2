"""The recipes of the birthplaces task: the assignment's learning rates, epochs and names, and ours."""

import pytest

from nlpfast.train.birthplaces_options import (
    BLOCK_SIZE,
    BirthplacesOptions,
    needed,
    run_folder,
    trainer_config,
)
from nlpfast.train.config import ConfigError
from nlpfast.train.schedule import learning_rate_multiplier

# lines of the assignment's corpus, and the empty one after the last, which its code counts
DOCUMENTS = 2938


def multiplier(options, epoch):
    config = trainer_config(options, "pretrain", DOCUMENTS)
    # the assignment counts the padding too
    tokens = epoch * DOCUMENTS * (BLOCK_SIZE - 1)
    final = config.final_tokens or config.max_epochs * DOCUMENTS * (BLOCK_SIZE - 1)
    warmup = config.warmup_tokens if config.warmup_tokens is not None else round(0.05 * final)
    return learning_rate_multiplier(tokens, warmup, final, config.schedule)


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [(1, 1.0), (100, 0.506), (200, 0.1), (300, 0.48), (400, 0.999), (500, 0.53), (650, 0.12)],
)
def test_the_learning_rates_of_the_assignment(epoch, expected):
    """As measured on the seed's code: the cosine goes on past its end, and climbs again."""
    assert multiplier(BirthplacesOptions(compat="seed"), epoch) == pytest.approx(expected, abs=5e-3)


@pytest.mark.parametrize(
    ("epoch", "expected"), [(16.25, 0.5), (32.5, 1.0), (341.25, 0.5), (650, 0.1), (700, 0.1)]
)
def test_our_learning_rates_end_with_the_run(epoch, expected):
    assert multiplier(BirthplacesOptions(), epoch) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("action", "reading", "epochs", "batch", "rate"),
    [
        ("pretrain", None, 650, 128, 6e-3),
        ("finetune", None, 75, 256, 6e-4),
        ("finetune", "pretrained.params", 10, 256, 6e-4),
    ],
)
@pytest.mark.parametrize("compat", [None, "seed"])
def test_epochs_and_batches_are_those_of_the_assignment(action, reading, epochs, batch, rate, compat):
    config = trainer_config(BirthplacesOptions(reading_params_path=reading, compat=compat), action, 10)
    assert (config.max_epochs, config.batch_size, config.learning_rate) == (epochs, batch, rate)
    assert config.betas == (0.9, 0.95) and config.weight_decay == 0.1 and config.grad_norm_clip == 1.0
    assert config.sampling == ("sequential" if compat else "shuffle")
    assert not config.tensorboard


def test_options_reach_the_training_loop():
    options = BirthplacesOptions(
        **{"max_epochs": 3, "max_steps": 7, "pretrain_lr": 1e-3, "dtype": "bfloat16", "device": "cpu"},
        **{"seed": 5, "num_workers": 1, "log_every": 9, "save_every": 11, "tb_expt_name": "first"},
        batch_size=6,
    )
    config = trainer_config(options, "pretrain", 10)
    assert (config.max_epochs, config.max_steps, config.learning_rate) == (3, 7, 1e-3)
    assert (config.dtype, config.device, config.seed, config.num_workers) == ("bfloat16", "cpu", 5, 1)
    assert (config.log_every, config.eval_every, config.tensorboard, config.batch_size) == (9, 11, True, 6)


def test_runs_have_the_names_of_the_assignment():
    options = BirthplacesOptions(tb_expt_name="first", bottleneck_dim=64)
    name = "expt/finetune/first_perceiver_64_pt_lr_0.006000_ft_lr_0.000600"
    assert run_folder(options, "finetune", "perceiver") == name
    assert run_folder(BirthplacesOptions(), "pretrain", "vanilla").startswith("expt/pretrain/run_vanilla_32_")


@pytest.mark.parametrize(
    ("action", "missing"),
    [
        ("pretrain", ["writing_params_path"]),
        ("finetune", ["writing_params_path", "finetune_corpus_path"]),
        ("evaluate", ["reading_params_path", "eval_corpus_path", "outputs_path"]),
    ],
)
def test_what_an_action_needs(action, missing):
    given = {}
    for name in missing:
        with pytest.raises(ConfigError, match=f"{name}=None: {action} needs it, give the name of a file"):
            needed(BirthplacesOptions(**given), action, "vanilla")
        given[name] = "file"
    needed(BirthplacesOptions(**given), action, "vanilla")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bottleneck_dim": 0}, "at least 1 and at most 128"),
        ({"bottleneck_dim": 129}, "at least 1 and at most 128"),
        ({"config": "large"}, "one of full, small"),
        ({"compat": "sead"}, "one of seed"),
        ({"pretrain_lr": 0.0}, "above 0"),
        ({"resume": True, "overwrite": True}, "leave out one of the two"),
    ],
)
def test_wrong_options_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        BirthplacesOptions(**fields)
