"""Several tasks on one encoder: the plan of a run, its batches, its losses, and gradients that contradict."""

import itertools
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from nlpfast.data.sentences import PARAPHRASE, SIMILARITY, SST, Example, SentenceDataset
from nlpfast.models.bert import BertConfig
from nlpfast.models.bert_sentences import BertForSentences
from nlpfast.nn.packing import Packing
from nlpfast.train.multitask import TaskBatches, TaskLoss, count_examples, plan_tasks, whole_batch
from nlpfast.train.pcgrad import projected, surrogate

SIZES = {"a": 1000, "b": 100, "c": 10}


class Letters:
    """A tokenizer of letters."""

    cls_id, sep_id, pad_id = 1, 2, 0

    def encode_batch(self, texts):
        return [[3 + ord(char) % 20 for char in text] for text in texts]


def datasets(sizes=(7, 5, 4)) -> dict[str, SentenceDataset]:
    words = ["one", "three", "seven", "no", "yes", "perhaps"]

    def rows(n, sentences, label):
        return [
            Example(f"id{i}", tuple(words[(i + j) % 6] for j in range(sentences)), label(i), i + 2)
            for i in range(n)
        ]

    kinds = {
        "sst": rows(sizes[0], 1, lambda i: i % 5),
        "paraphrase": rows(sizes[1], 2, lambda i: i % 2),
        "similarity": rows(sizes[2], 2, lambda i: i / 2),
    }
    return {name: SentenceDataset(part, Letters(), source=f"{name}.csv") for name, part in kinds.items()}


def batches(strategy="round_robin", steps=6, epochs=2, **options) -> TaskBatches:
    arguments = {"batch_size": 3, "seed": 5, **options}
    return TaskBatches(datasets(), strategy=strategy, steps=steps, total=steps * epochs, **arguments)


def test_plans():
    assert plan_tasks(SIZES, "round_robin", 7, 0) == [(n,) for n in "abcabca"]
    assert plan_tasks(SIZES, "sequential", 7, 0) == [(n,) for n in "aaabbcc"]
    assert plan_tasks(SIZES, "mixed", 2, 0) == [("a", "b", "c")] * 2
    for strategy in ("proportional", "annealed"):
        plan = plan_tasks(SIZES, strategy, 50, 1)
        assert plan == plan_tasks(SIZES, strategy, 50, 1) != plan_tasks(SIZES, strategy, 50, 2)
    with pytest.raises(ValueError, match="strategy='random' must be one of round_robin"):
        plan_tasks(SIZES, "random", 2, 0)


def test_tasks_are_drawn_by_their_size():
    steps = 4000
    counts = Counter(plan_tasks(SIZES, "proportional", steps, 3))
    for name, size in SIZES.items():
        share = size / 1110
        deviation = (steps * share * (1 - share)) ** 0.5
        assert abs(counts[(name,)] - steps * share) < 4 * deviation


def test_small_tasks_come_up_more_often_at_the_end_when_annealed():
    plan = plan_tasks(SIZES, "annealed", 6000, 4)
    first, last = (Counter(plan[a:b]) for a, b in ((0, 600), (5400, 6000)))
    assert first[("a",)] > 500 and first[("c",)] < 30
    # n^0.2: 3.98, 2.51, 1.58 of 8.07
    assert abs(last[("a",)] / 600 - 0.51) < 0.09 and abs(last[("c",)] / 600 - 0.18) < 0.07


def test_every_task_goes_through_all_its_examples():
    data = batches(steps=9, epochs=2)
    seen: dict[str, list[int]] = {name: [] for name in data.datasets}
    for data.epoch in range(2):
        for step in range(len(data)):
            ((name, indices),) = data._chosen(step)
            seen[name] += indices
    # six batches each: two passes of three batches, three passes of two
    assert Counter(seen["sst"]) == dict.fromkeys(range(7), 2)
    assert Counter(seen["paraphrase"]) == dict.fromkeys(range(5), 3)
    assert Counter(seen["similarity"]) == dict.fromkeys(range(4), 3)
    assert seen["sst"][:7] != seen["sst"][7:]
    assert seen["paraphrase"][:5] != seen["paraphrase"][5:10]


def test_a_batch_has_the_tokens_and_labels_of_its_examples():
    data = batches("mixed", steps=3, epochs=1)
    (batch,) = data[1]
    chosen = data._chosen(1)
    assert batch.parts == [("sst", 3), ("paraphrase", 2), ("similarity", 1)]
    assert count_examples([batch]) == 6
    sentences = []
    for (name, indices), labels in zip(chosen, batch.labels, strict=True):
        items = [data.datasets[name][i] for i in indices]
        assert labels.tolist() == [item.label for item in items]
        for side in range(len(items[0].tokens)):
            sentences += [item.tokens[side] for item in items]
    cu = batch.packed.cu_seqlens.tolist()
    found = [batch.packed.input_ids[a:b].tolist() for a, b in itertools.pairwise(cu)]
    assert found[: len(sentences)] == sentences
    assert batch.packed.sentences == len(sentences) == 3 + 2 * 2 + 2 * 1
    assert data.source(1).startswith("sst.csv:") and data.source(1).endswith("and 3 more")
    apart = batches("mixed", steps=3, epochs=1, apart=True)[1]
    assert [part.parts for part in apart] == [[part] for part in batch.parts]
    assert whole_batch([apart]) is apart
    with pytest.raises(ValueError, match="unpack"):
        whole_batch([apart, apart])
    with pytest.raises(IndexError, match="outside the 3 steps"):
        data[3]


def model_of(**options) -> BertForSentences:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=20,
        max_position_embeddings=20,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSentences(config, [SST, PARAPHRASE, SIMILARITY], **options).double()


def test_the_loss_is_the_mean_over_tasks():
    model = model_of()
    (batch,) = batches("mixed")[0]
    outputs = model(
        batch.packed.input_ids,
        batch.parts,
        packing=Packing(batch.packed.cu_seqlens, batch.packed.longest),
    )
    sst, para, sts = (output.float() for output in outputs)
    labels = batch.labels
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0])
    rest = F.binary_cross_entropy_with_logits(para, labels[1].float()) + F.mse_loss(sts, labels[2].float())
    for given in ({}, {"sst": weights}):
        loss = TaskLoss(model.tasks, given)(model, [batch])
        expected = (F.cross_entropy(sst, labels[0], given.get("sst")) + rest) / 3
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_projection_by_hand():
    x = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [0.0, -2.0]], dtype=torch.float64)
    order = [[1, 2], [0, 2], [1, 0]]
    # g0 . g1 = -1: g0 + 1/2 g1 = (.5, .5); . g2 = -1: + 1/4 g2 = (.5, 0)
    # g1 . g0 = -1: g1 + g0 = (0, 1); . g2 = -2: + 1/2 g2 = (0, 0)
    # g2 . g1 = -2: g2 + g1 = (-1, -1); . g0 = -1: + g0 = (0, -1)
    expected = torch.tensor([[0.5, 0.0], [0.0, 0.0], [0.0, -1.0]], dtype=torch.float64)
    torch.testing.assert_close(projected(x, order), expected)
    agreeing = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    assert torch.equal(projected(agreeing, [[1], [0]]), agreeing)


def test_a_gradient_of_zero_is_left_alone():
    x = torch.tensor([[0.0, 0.0], [-1.0, 1.0]])
    assert torch.equal(projected(x, [[1], [0]]), x)


def test_the_surrogate_has_the_projected_gradient():
    torch.manual_seed(1)
    shared = torch.randn(5, dtype=torch.float64, requires_grad=True)
    own = [torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    a, b = torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    if a @ b > 0:
        b = -b
    losses = [lambda: (a * shared).sum() + (own[0] ** 2).sum(), lambda: (b * shared).sum() + 3 * own[1].sum()]
    loss = surrogate(losses, [shared], own)
    assert float(loss.detach()) == pytest.approx(float(sum(f() for f in losses).detach()) / 2)
    loss.backward()
    left = a - (a @ b) / (b @ b) * b + b - (a @ b) / (a @ a) * a
    torch.testing.assert_close(shared.grad, left / 2)
    torch.testing.assert_close(own[0].grad, own[0].detach())
    torch.testing.assert_close(own[1].grad, torch.full((2,), 1.5, dtype=torch.float64))


@pytest.mark.parametrize("rlayer", [False, True])
def test_projected_step_of_a_model(rlayer):
    """Gradients by hand, task by task, against those of the loss."""
    model = model_of(rlayer=rlayer, objective="regression")
    apart = batches("mixed", apart=True)[0]
    plain = TaskLoss(model.tasks, {})
    heads = {id(p) for p in model.heads.parameters()}
    names = [n for n, p in model.named_parameters() if id(p) not in heads]
    rows = []
    for batch in apart:
        model.zero_grad()
        plain(model, [batch]).backward()
        found = dict(model.named_parameters())
        rows.append(
            torch.cat(
                [(found[n].grad if found[n].grad is not None else found[n] * 0).flatten() for n in names]
            )
        )
        if batch.parts[0][0] == "sst":
            head = model.heads["sst"].weight.grad.clone()
    torch.manual_seed(9)
    model.zero_grad()
    loss = TaskLoss(model.tasks, {}, pcgrad=True)(model, apart)
    loss.backward()
    torch.manual_seed(9)
    order = [[j for j in torch.randperm(3).tolist() if j != i] for i in range(3)]
    expected = projected(torch.stack(rows), order).mean(0)
    assert not torch.allclose(expected, torch.stack(rows).mean(0)), "no gradients contradict each other"
    found = dict(model.named_parameters())
    torch.testing.assert_close(torch.cat([found[n].grad.flatten() for n in names]), expected)
    torch.testing.assert_close(model.heads["sst"].weight.grad, head / 3)
    values = [float(plain(model, [batch]).detach()) for batch in apart]
    assert float(loss.detach()) == pytest.approx(sum(values) / 3)
