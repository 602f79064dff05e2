"""BERT for sentence tasks, one or several on one encoder: what a sentence says, what two have in common.

A task's head works on the pooled vectors of its sentences, u and v, of which dropout takes a part:

    classes    Linear(u), C classes
    binary     Linear([u; v; |u - v|]), one logit (the features of Reimers and Gurevych 2019, "Sentence-BERT")
    score      from 0 to 5: 2.5 (1 + cos(u, v)) with the objective "cosine", Linear([u; v; |u - v|]) with
               "regression"

With `rlayer` both kinds of pairs share a layer, tanh(Linear(u)), before their heads. Several tasks may be in
one packed batch: the encoder runs once.

Shapes: B examples of a task, C channels, N tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nlpfast.data.sentences import HIGHEST_SCORE, SentenceTask
from nlpfast.models.bert import BertModel
from nlpfast.models.bert_config import BertConfig
from nlpfast.models.bert_files import BertPretrained
from nlpfast.nn.dropout import Dropout
from nlpfast.nn.packing import Packing

__all__ = ["OBJECTIVES", "BertForSentences"]

OBJECTIVES = ("cosine", "regression")


class BertForSentences(BertPretrained):
    """An encoder with a head for each task.

    Attributes:
        tasks: by name.
        objective: of scores, "cosine" or "regression".
        rlayer: whether tasks of pairs share a layer.
        frozen: whether the encoder does not learn; it drops nothing then.
    """

    def __init__(
        self,
        config: BertConfig,
        tasks: Sequence[SentenceTask],
        *,
        objective: str = "cosine",
        rlayer: bool = False,
        frozen: bool = False,
    ) -> None:
        """Build the model with initial weights.

        Args:
            config: of the encoder; its `hidden_dropout_prob` is that of the heads too.
            tasks: at least one, each with a name of its own.
            objective: of scores.
            rlayer: tasks of pairs share a layer.
            frozen: the encoder does not learn.

        Raises:
            ValueError: there is no task, two have one name, or `objective` is unknown.
        """
        super().__init__()
        names = [task.name for task in tasks]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"tasks have the names {names}; give at least one, each with a name of its own")
        if objective not in OBJECTIVES:
            raise ValueError(
                f"objective={objective!r} must be one of {', '.join(OBJECTIVES)}; pass one of them"
            )
        self.config, self.objective, self.rlayer, self.frozen = config, objective, rlayer, frozen
        self.tasks = {task.name: task for task in tasks}
        self.bert = BertModel(config)
        self.dropout = Dropout(config.hidden_dropout_prob)
        C, heads = config.hidden_size, {}
        for task in tasks:
            if task.kind == "classes":
                heads[task.name] = nn.Linear(task.sentences * C, cast(int, task.classes))
            elif task.kind == "binary" or objective == "regression":
                heads[task.name] = nn.Linear(3 * C, 1)
        self.heads = nn.ModuleDict(heads)
        if rlayer:
            self.relation = nn.Linear(C, C)
        self._init_weights()
        self.bert.requires_grad_(not frozen)

    def train(self, mode: bool = True) -> BertForSentences:
        """Set the mode of all parts, but for an encoder that is frozen, which stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.bert.eval()
        return self

    def forward(
        self,
        input_ids: Tensor,
        parts: Sequence[tuple[str, int]],
        token_type_ids: Tensor | None = None,
        *,
        packing: Packing,
    ) -> list[Tensor]:
        """Return what each task's head says of its examples.

        Args:
            input_ids: tokens, int64 [N], of all sentences, in the order of `parts`; the sentences of pairs in
                the order of `collate_sentences`: first all u, then all v. Sequences after them only fill up.
            parts: names of tasks, and how many examples each has in the batch.
            token_type_ids: segments [N]; None for 0 everywhere.
            packing: of the sentences.

        Returns:
            For each part: logits [B, number of classes], a logit [B] of "yes", or a score [B].

        Raises:
            ValueError: there is no such task, or there are fewer sentences than the parts need.
        """
        needed = sum(self._task(name).sentences * count for name, count in parts)
        there = len(packing.cu_seqlens) - 1
        if there < needed:
            raise ValueError(f"packing has {there} sequences, parts={list(parts)} need {needed}; give all")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            pooled = self.bert(input_ids, token_type_ids=token_type_ids, packing=packing).pooler_output
        outputs, begin = [], 0
        for name, count in parts:
            task = self.tasks[name]
            end = begin + task.sentences * count
            outputs.append(self._head(task, pooled[begin:end].unflatten(0, (task.sentences, count))))
            begin = end
        return outputs

    def _task(self, name: str) -> SentenceTask:
        if name not in self.tasks:
            raise ValueError(f"parts has {name!r}, the tasks are {', '.join(self.tasks)}; name one of them")
        return self.tasks[name]

    def _head(self, task: SentenceTask, sentences: Tensor) -> Tensor:
        """Return what the head of a task says of sentences [1 or 2, B, C]."""
        if self.rlayer and task.sentences == 2:
            sentences = torch.tanh(self.relation(sentences))
        if task.kind == "score" and self.objective == "cosine":
            # dropped elements would be of u and v alike, or not, and move the cosine by chance
            u, v = sentences
            return HIGHEST_SCORE / 2 * (1 + F.cosine_similarity(u, v))
        sentences = self.dropout(sentences)
        if task.kind == "classes":
            logits: Tensor = self.heads[task.name](torch.cat(tuple(sentences), 1))
            return logits
        u, v = sentences
        out: Tensor = self.heads[task.name](torch.cat((u, v, (u - v).abs()), 1)).squeeze(1)
        return out

    def more_fields(self) -> dict[str, Any]:
        """Return what config.json holds of the model beside its configuration; plain values."""
        tasks = [dataclasses.asdict(task) for task in self.tasks.values()]
        return {"tasks": tasks, "objective": self.objective, "rlayer": self.rlayer}

    @classmethod
    def keywords(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return the constructor's keywords that config.json has, as `more_fields` put them there.

        Args:
            fields: all of config.json.

        Raises:
            ValueError: they are damaged.
        """
        found = {name: fields[name] for name in ("objective", "rlayer") if name in fields}
        try:
            if "tasks" in fields:
                found["tasks"] = [
                    SentenceTask(**{**task, "columns": tuple(task["columns"])}) for task in fields["tasks"]
                ]
        except (TypeError, KeyError) as error:
            raise ValueError(
                f"tasks={fields['tasks']!r} is damaged ({error}); save the model again"
            ) from error
        return found
