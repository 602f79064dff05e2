"""AdamW of the minBERT assignment, Adamax of fairseq, and optimizers by name: formulas, relatives, states."""

import copy
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nlpfast import native
from nlpfast.optim import Adamax, AdamW, build_optimizer, linear_weights_and_rest
from nlpfast.train import checkpoint

# The weights after 1000 steps that the assignment's own test expects, as float32 numbers: optimizer_test.npy,
# the same in the course's repositories and in those that it took the assignment from.
PUBLISHED = "33090e3f36dd5d3ffc56953d4efde4be561a97bed41f8bbe"


def course_steps():
    """The 1000 inputs and targets of the assignment's test."""
    draws = np.random.default_rng(0)
    for _ in range(1000):
        x = draws.uniform(size=3).astype(np.float32)
        yield x, np.array([x[0] + x[1], -x[2]])


def formula(weight, gradient, steps, *, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, decay=0.0, correct=True):
    """The definition in float64, with the gradient as a function of weight and step."""
    mean, square = np.zeros_like(weight), np.zeros_like(weight)
    for t in range(1, steps + 1):
        grad = gradient(weight, t)
        mean = betas[0] * mean + (1 - betas[0]) * grad
        square = betas[1] * square + (1 - betas[1]) * grad**2
        size = lr * np.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t) if correct else lr
        weight = weight - size * mean / (np.sqrt(square) + eps)
        weight = weight - lr * decay * weight
    return weight


def course_run(dtype, steps=1000):
    """Weights of the assignment's test before the first step and after each one."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2, bias=False).to(dtype)
    optimizer = AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4, correct_bias=True)
    trajectory = [model.weight.detach().clone().numpy()]
    for x, y in itertools.islice(course_steps(), steps):
        optimizer.zero_grad()
        (torch.tensor(y, dtype=dtype) - model(torch.tensor(x, dtype=dtype))).square().sum().backward()
        optimizer.step()
        trajectory.append(model.weight.detach().clone().numpy())
    return trajectory


def test_the_published_result():
    published = np.frombuffer(bytes.fromhex(PUBLISHED), dtype="<f4").reshape(2, 3)
    assert np.abs(course_run(torch.float32)[-1].astype(np.float64) - published).max() <= 2e-7


def test_the_published_trajectory_in_float64():
    data = [(x.astype(np.float64), y.astype(np.float64)) for x, y in course_steps()]

    def gradient(weight, t):
        x, y = data[t - 1]
        return np.outer(2 * (weight @ x - y), x)

    trajectory = course_run(torch.float64)
    for t in (1, 2, 10, 100, 1000):
        expected = formula(trajectory[0], gradient, t, decay=1e-4)
        assert np.abs(trajectory[t] - expected).max() <= 1e-12


@pytest.mark.parametrize("kind", [AdamW, Adamax])
def test_small_decays_are_not_rounded_away(kind):
    """In float32 the number 1 - 1e-7 is 1.2e-7 below 1."""
    param = torch.nn.Parameter(torch.linspace(1, 2, 4001))
    optimizer = kind([param], lr=1e-3, weight_decay=1e-4)
    start = param.detach().double()
    for _ in range(50):
        param.grad = torch.zeros_like(param)
        optimizer.step()
    lost = (start - param.detach().double()).mean() / (50 * 1e-7 * start.mean())
    assert lost.item() == pytest.approx(1, abs=0.1)


def wave(shape, t):
    """A gradient that is different in every step, and small in some elements."""
    places = np.arange(np.prod(shape)).reshape(shape)
    return np.cos(places + 0.3 * t) * 10.0 ** -(places % 7)


OPTIONS = [
    {},
    {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.3},
    {"correct_bias": False, "weight_decay": 0.1},
    {"betas": (0.0, 0.0), "eps": 1e-2},
    {"lr": 0.0, "weight_decay": 0.5},
]
NAMES = {"weight_decay": "decay", "correct_bias": "correct"}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_formula_to_the_last_places(options):
    starts = {
        shape: np.linspace(-1, 1, int(np.prod(shape))).reshape(shape) for shape in ((3, 5), (1,), (2, 4, 4))
    }
    params = {shape: torch.nn.Parameter(torch.tensor(start)) for shape, start in starts.items()}
    optimizer = AdamW(params.values(), **options)
    for t in range(1, 31):
        for shape, param in params.items():
            param.grad = torch.tensor(wave(shape, t))
        optimizer.step()
    named = {NAMES.get(name, name): value for name, value in options.items()}
    for shape, param in params.items():
        expected = formula(starts[shape], lambda _, t, shape=shape: wave(shape, t), 30, **named)
        assert param.detach().numpy() == pytest.approx(expected, rel=1e-12, abs=1e-14)


def test_defaults_are_those_of_the_assignment():
    group = AdamW([torch.nn.Parameter(torch.ones(1))]).param_groups[0]
    values = [group[name] for name in ("lr", "betas", "eps", "weight_decay", "correct_bias")]
    assert values == [1e-3, (0.9, 0.999), 1e-6, 0.0, True]


def test_without_eps_it_is_torchs_and_with_eps_it_is_not():
    for eps, same in ((0.0, True), (1e-2, False)):
        ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 8, dtype=torch.float64)) for _ in range(2))
        optimizers = AdamW([ours], eps=eps), torch.optim.Adam([theirs], lr=1e-3, eps=eps)
        for t in range(1, 20):
            ours.grad, theirs.grad = (torch.tensor(wave((8,), t)) for _ in range(2))
            for optimizer in optimizers:
                optimizer.step()
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=0) is same


def test_groups_have_options_of_their_own():
    shape = (4,)
    params = [torch.nn.Parameter(torch.ones(shape, dtype=torch.float64)) for _ in range(3)]
    groups = [{"params": params[:1], "lr": 0.01}, {"params": params[1:2], "weight_decay": 0.5}]
    optimizer = AdamW(groups, lr=0.1)
    optimizer.add_param_group({"params": params[2:], "correct_bias": False})
    for t in range(1, 6):
        for param in params:
            param.grad = torch.tensor(wave(shape, t))
        optimizer.step()
    for param, options in zip(params, ({"lr": 0.01}, {"decay": 0.5}, {"correct": False}), strict=True):
        expected = formula(np.ones(shape), lambda _, t: wave(shape, t), 5, **{"lr": 0.1, **options})
        assert param.detach().numpy() == pytest.approx(expected, rel=1e-12)


def test_a_parameter_without_gradient_waits():
    """Its steps are counted from its first gradient on, and it does not decay before."""
    early, late = (torch.nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    optimizer = AdamW([early, late], weight_decay=0.1)
    optimizer.step()
    assert not optimizer.state
    for t in range(1, 8):
        early.grad = torch.tensor(wave((2,), t))
        late.grad = torch.tensor(wave((2,), t - 4)) if t > 4 else None
        optimizer.step()
        assert t > 4 or torch.equal(late, torch.ones_like(late))
    for param, steps in ((early, 7), (late, 3)):
        expected = formula(np.ones(2), lambda _, t: wave((2,), t), steps, decay=0.1)
        assert param.detach().numpy() == pytest.approx(expected, rel=1e-12)


def test_a_closure_is_run_with_gradients():
    param = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = AdamW([param], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0
    assert float(param.detach()) == pytest.approx(1.9)
    assert optimizer.step() is None


def training(model, optimizer, steps):
    for x, y in list(course_steps())[:steps]:
        optimizer.zero_grad()
        (torch.tensor(y) - model(torch.tensor(x))).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", [AdamW, Adamax])
def test_a_state_goes_on_where_it_was(kind, tmp_path):
    models = [torch.nn.Linear(3, 2) for _ in range(3)]
    first, second, third = (kind(model.parameters(), lr=0.01, weight_decay=0.1) for model in models)
    training(models[0], first, 10)
    models[1].load_state_dict(models[0].state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    checkpoint.save(tmp_path / "saved", models[0], first, {}, {})
    checkpoint.load(tmp_path / "saved", models[2], third)
    for model, optimizer in zip(models, (first, second, third), strict=True):
        training(model, optimizer, 10)
        assert torch.equal(model.weight, models[0].weight) and torch.equal(model.bias, models[0].bias)
        assert optimizer.state[model.weight]["step"] == 20


def test_gradients_of_other_kinds_are_refused():
    table = torch.nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    before = table.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"gradient is sparse, must be dense.*SparseAdam"):
        AdamW(table.parameters()).step()
    assert torch.equal(table.weight, before)
    param = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))
    param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError, match=r"gradient is complex, must be dense.*torch.optim.AdamW"):
        AdamW([param]).step()


@pytest.mark.parametrize("kind", [AdamW, Adamax])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1e-3}, r"lr=-0.001 must be at least 0"),
        ({"lr": float("nan")}, r"lr=nan must be at least 0"),
        ({"eps": -1.0}, r"eps=-1.0 must be at least 0"),
        ({"weight_decay": -0.1}, r"weight_decay=-0.1 must be at least 0"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\]=1.0 must be from 0 to below 1"),
        ({"betas": (0.9, -0.1)}, r"betas\[1\]=-0.1 must be from 0 to below 1"),
    ],
)
def test_arguments_outside_their_bounds_are_named(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind([torch.nn.Parameter(torch.ones(1))], **options)


def test_adamax_by_hand():
    """Three steps: the maximum is the gradient, then a larger gradient, then what is left of that."""
    param = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = Adamax([param], lr=0.1, betas=(0.5, 0.5), eps=0.0, weight_decay=0.1)
    # each weight is 0.99 of the one before, for the decay, minus rate * m / u
    steps = [
        (0.5, 0.99 - 0.1 / 0.5 * 0.25 / 0.5),
        (-1.0, 0.99 * 0.89 + 0.1 / 0.75 * 0.375 / 1.0),
        (0.1, 0.99 * 0.9311 + 0.1 / 0.875 * 0.1375 / 0.5),
    ]
    for gradient, expected in steps:
        param.grad = torch.full_like(param, gradient)
        optimizer.step()
        assert param.item() == pytest.approx(expected, rel=1e-14)
    assert {name: float(value) for name, value in optimizer.state[param].items()} == pytest.approx(
        {"step": 3, "exp_avg": -0.1375, "exp_inf": 0.5}
    )


def maximum_formula(weight, gradient, steps, *, lr=2e-3, betas=(0.9, 0.999), eps=1e-8, decay=0.0):
    """The definition of Adamax in float64, with the gradient as a function of the step."""
    mean, largest = np.zeros_like(weight), np.zeros_like(weight)
    for t in range(1, steps + 1):
        grad = gradient(t)
        mean = betas[0] * mean + (1 - betas[0]) * grad
        largest = np.maximum(betas[1] * largest, np.abs(grad))
        weight = weight - lr * decay * weight
        weight = weight - lr / (1 - betas[0] ** t) * mean / (largest + eps)
    return weight


@pytest.mark.parametrize("options", [option for option in OPTIONS if "correct_bias" not in option], ids=str)
def test_adamax_is_its_formula_to_the_last_places(options):
    starts = {
        shape: np.linspace(-1, 1, int(np.prod(shape))).reshape(shape) for shape in ((3, 5), (1,), (2, 4, 4))
    }
    params = {shape: torch.nn.Parameter(torch.tensor(start)) for shape, start in starts.items()}
    optimizer = Adamax(params.values(), **options)
    for t in range(1, 31):
        for shape, param in params.items():
            # the last one gets its first gradient late, and counts its steps from there
            param.grad = torch.tensor(wave(shape, t)) if shape != (1,) or t > 10 else None
        optimizer.step()
    named = {NAMES.get(name, name): value for name, value in options.items()}
    for shape, param in params.items():
        late = 10 if shape == (1,) else 0
        expected = maximum_formula(
            starts[shape], lambda t, shape=shape, late=late: wave(shape, t + late), 30 - late, **named
        )
        assert param.detach().numpy() == pytest.approx(expected, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("options", [option for option in OPTIONS if "correct_bias" not in option], ids=str)
def test_adamax_in_one_pass_is_adamax_pass_by_pass(options, monkeypatch):
    """The native step, and the one for other devices and dtypes; sizes around registers and blocks."""
    sizes = [(), (0,), (3,), (16,), (5, 7), (1023,), (1024,), (1025,), (300, 171)]
    torch.manual_seed(1)
    starts, gradients = ([torch.randn(size) for size in sizes] for _ in range(2))
    found = []
    for available in ("ok", "not built"):
        monkeypatch.setattr(native, "status", lambda available=available: available)
        params = [torch.nn.Parameter(start.clone()) for start in starts]
        optimizer = Adamax(params, **options)
        for t in range(5):
            for param, gradient in zip(params, gradients, strict=True):
                param.grad = gradient * (-0.7) ** t
            optimizer.step()
        states = [value for p in params for value in map(torch.as_tensor, optimizer.state[p].values())]
        found.append([*(p.detach() for p in params), *states])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=1e-7)


def test_adamax_in_one_pass_takes_what_lies_flat_and_leaves_the_rest():
    param = torch.nn.Parameter(torch.randn(6, 4).mT)
    flat = torch.nn.Parameter(param.detach().contiguous())
    start = flat.detach().clone()
    optimizer = Adamax([param, flat], lr=0.1)
    for _ in range(3):
        gradient = torch.randn(4, 6)
        param.grad, flat.grad = gradient.clone(), gradient.T.contiguous().T
        optimizer.step()
    torch.testing.assert_close(param, flat, rtol=1e-6, atol=1e-7)
    assert (flat - start).abs().min() > 1e-3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_adamax_hands_on_what_is_not_finite(value):
    param = torch.nn.Parameter(torch.ones(20))
    optimizer = Adamax([param])
    for gradient in (torch.ones(20), torch.ones(20).index_fill_(0, torch.tensor([3, 17]), value)):
        param.grad = gradient
        optimizer.step()
    state = optimizer.state[param]
    assert not param[[3, 17]].isfinite().any() and not state["exp_inf"][[3, 17]].isfinite().any()
    param.grad = torch.ones(20)
    optimizer.step()
    bad = torch.zeros(20, dtype=torch.bool).index_fill_(0, torch.tensor([3, 17]), True)
    assert torch.equal(param.isnan(), bad) and torch.equal(state["exp_inf"].isfinite(), ~bad)


def test_adamax_native_arguments_are_checked():
    step, x = torch.ops.nlpfast.adamax_step, torch.ones(6)
    for tensors, words in (
        ((x.double(), x, x, x), "param must be float32"),
        ((x, x[:5], x, x), "grad must be a contiguous CPU tensor with 6 elements"),
        ((x, x, torch.ones(12)[::2], x), "mean must be a contiguous"),
        ((x, x, x, x.half()), "size must be float32"),
    ):
        with pytest.raises(RuntimeError, match=words):
            step(*tensors, 0.9, 0.999, 1e-8, 1e-3, 0.0)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 2.5e-7), (torch.float64, 1e-11)])
def test_adamax_without_decay_is_torchs(dtype, most):
    """PyTorch adds eps to the gradient's size, fairseq to the maximum: 1.2e-7 and 2.3e-12 were measured."""
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(50, 20, dtype=dtype))
    theirs = torch.nn.Parameter(ours.detach().clone())
    optimizers = Adamax([ours]), torch.optim.Adamax([theirs])
    for _ in range(50):
        ours.grad = torch.randn_like(ours)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert (ours - theirs).abs().max().item() <= most


def test_adamax_decays_apart_from_the_gradient_unlike_torchs():
    group = Adamax([torch.nn.Parameter(torch.ones(1))]).param_groups[0]
    values = [group[name] for name in ("lr", "betas", "eps", "weight_decay")]
    assert values == [2e-3, (0.9, 0.999), 1e-8, 0.0]
    moved = []
    for kind in (Adamax, torch.optim.Adamax):
        param = torch.nn.Parameter(torch.ones(1))
        param.grad = torch.zeros_like(param)
        kind([param], lr=0.1, weight_decay=0.01).step()
        moved.append(1 - param.item())
    # lr * weight_decay; and a whole step, as the decay is all of the gradient
    assert moved == pytest.approx([1e-3, 0.1], rel=1e-3)


class Mixed(torch.nn.Module):
    """One layer of every kind; the output layer shares the embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(5, 4)
        self.recurrent = torch.nn.LSTM(4, 4)
        self.convolution = torch.nn.Conv1d(4, 4, 1)
        self.norm = torch.nn.LayerNorm(4)
        self.latents = torch.nn.Parameter(torch.ones(3, 4))
        self.layers = torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.Linear(4, 2, bias=False)])
        self.output = torch.nn.Linear(4, 5, bias=False)
        self.output.weight = self.embedding.weight


def test_weights_of_linear_layers_decay_and_nothing_else():
    model = Mixed()
    decayed, kept = linear_weights_and_rest(model)
    assert [id(p) for p in decayed] == [id(layer.weight) for layer in model.layers]
    assert {id(p) for p in (*decayed, *kept)} == {id(p) for p in model.parameters()}
    assert len(decayed) + len(kept) == len(list(model.parameters()))


def options_of(**changes):
    return SimpleNamespace(**{"learning_rate": 0.25, "betas": (0.8, 0.9), "weight_decay": 0.5, **changes})


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((None, torch.optim.AdamW), ("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam)),
        *(("adamax", Adamax), ("sgd", torch.optim.SGD)),
    ],
)
def test_optimizers_by_name(name, kind):
    decayed, kept = (torch.nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    options = options_of(**{} if name is None else {"optimizer": name})
    optimizer = build_optimizer([decayed], [kept], options)
    assert type(optimizer) is kind
    assert [group["params"] for group in optimizer.param_groups] == [[decayed], [kept]]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    assert all(group["lr"] == 0.25 for group in optimizer.param_groups)
    assert all(group.get("betas", (0.8, 0.9)) == (0.8, 0.9) for group in optimizer.param_groups)
    # a gradient of 1, then of 0: without momentum sgd stands still, and L2 is a gradient
    moved = []
    for gradient in (1.0, 0.0):
        decayed.grad, kept.grad = torch.full_like(decayed, gradient), torch.full_like(kept, gradient)
        optimizer.step()
        moved.append((decayed[0].item(), kept[0].item()))
    if name == "sgd":
        assert moved == [(1 - 0.25 * 1.5, 0.75), (0.625 * (1 - 0.25 * 0.5), 0.75)]
    elif name == "adam":
        # a first step is as long as the rate, however large the gradient
        assert moved[0] == pytest.approx((0.75, 0.75), abs=1e-7) and moved[1][0] < moved[1][1] < 0.75
    else:
        assert moved[0] == pytest.approx((0.875 - 0.25, 0.75), abs=1e-7) and moved[1][1] < 0.75


def test_a_model_of_embeddings_alone_has_an_optimizer():
    table = torch.nn.Embedding(3, 2)
    for name in ("adamw", "adam", "adamax", "sgd"):
        optimizer = build_optimizer(*linear_weights_and_rest(table), options_of(optimizer=name))
        table.weight.grad = torch.ones_like(table.weight)
        before = table.weight.detach().clone()
        optimizer.step()
        assert torch.allclose(table.weight, before - 0.25, atol=1e-6)


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="optimizer='lamb' is unknown; give one of adamw, adam, adamax, sgd"):
        build_optimizer([torch.nn.Parameter(torch.ones(1))], [], options_of(optimizer="lamb"))
