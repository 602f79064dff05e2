"""Recurrent translation: a bidirectional LSTM reads, an LSTM with attention writes (CS224N, assignment 4).

    source -> embeddings -> convolution of 2 neighbours -> LSTM, both directions -> encoder states
    target -> embeddings -> LSTM cell -> attention over the encoder states -> combined outputs -> logits

A step of the decoder, with token embedding y, the combined output o of the step before and encoder states E:

    s, c = LSTMCell([y; o], (s, c))
    a = sum of softmax(scores of s and E) * E
    o = dropout(tanh(W [a; s]))

The assignment's text has [a; s]. Of programs that wrote [s; a] in their code, the columns of
``combined_output_projection.weight`` are to be rolled: ``weight.roll(2 * h, 1)``. Sources: Luong et al. 2015,
"Effective Approaches to Attention-based Neural Machine Translation" (input feeding, dot and multiplicative
attention); Bahdanau et al. 2015, "Neural Machine Translation by Jointly Learning to Align and Translate"
(additive attention).

Shapes: B batch, S source tokens of the longest sentence, T tokens of the longest translation, N and M tokens
of all sentences and translations of a packed batch, K hypotheses of a sentence, e embed_size, h hidden_size,
V target_vocab.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from nlpfast.models.seq2seq_config import Seq2SeqConfig, check_batch, check_packed, check_tokens
from nlpfast.models.seq2seq_parameters import Seq2SeqParameters
from nlpfast.models.seq2seq_state import Memory, Seq2SeqState, padding_of
from nlpfast.nn.losses import AlignedLoss, LabelSmoothedCrossEntropyWithAlignment
from nlpfast.nn.packing import Packing

__all__ = ["Seq2Seq", "Seq2SeqConfig", "Seq2SeqState"]

State = tuple[Tensor, Tensor]


class Seq2Seq(Seq2SeqParameters):
    """The translation model, with the parameter names and the methods of the assignment."""

    def forward(
        self,
        source: Tensor,
        target_in: Tensor,
        source_packing: Packing,
        target_packing: Packing,
        *,
        criterion: LabelSmoothedCrossEntropyWithAlignment,
        target_out: Tensor,
        pairs: None = None,
    ) -> AlignedLoss:
        """Return the loss of a packed batch, for which there are never all logits at once.

        The first four arguments are those of `features`.

        Args:
            source: tokens of the sentences.
            target_in: tokens of the translations.
            source_packing: of `source`.
            target_packing: of `target_in`.
            criterion: what the loss is, without alignments.
            target_out: tokens and EOS of the translations, int64 [M], or the criterion's `ignore_index`.
            pairs: None; the attention is not supervised.

        Raises:
            ValueError: as `features`, and for pairs.
        """
        if pairs is not None:
            raise ValueError("pairs are given, but no attention of an RNN is supervised; leave them out")
        features = self.features(source, target_in, source_packing, target_packing)
        return criterion(features[None], target_out[None], self.output_weight)

    def features(
        self, source: Tensor, target_in: Tensor, source_packing: Packing, target_packing: Packing
    ) -> Tensor:
        """Return the combined outputs of a packed batch, of which ``output_weight`` makes logits; [M, h].

        Row m is about the token after ``target_in[m]``. The sequences that fill up a batch may be empty.

        Args:
            source: tokens of the sentences with EOS, int64 [N].
            target_in: BOS and tokens of the translations, int64 [M].
            source_packing: of `source`.
            target_packing: of `target_in`; has as many sequences.

        Raises:
            ValueError: when the two do not go together, or (on the CPU) a token is outside its vocabulary.
        """
        counts = [len(packing.cu_seqlens) - 1 for packing in (source_packing, target_packing)]
        check_packed(self.config, source, target_in, *counts)
        # an LSTM reads no empty sequence; what is made of this one is thrown away
        lengths = source_packing.lengths().clamp(min=1)
        padded = source_packing.padded(source)
        memory, state = self._read(padded, lengths)
        outputs, _ = self._write(target_packing.padded(target_in), memory, state)
        return outputs[target_packing.within()]

    def encode(
        self, source_padded: Tensor, source_lengths: Sequence[int] | Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the encoder states, 0 at padding, and what the decoder begins with.

        Padding, whatever tokens it has, makes no difference to anything else.

        Args:
            source_padded: tokens, int64 [S, B].
            source_lengths: tokens of each sentence, in any order.

        Returns:
            enc_hiddens [B, S, 2h], and (hidden, cell), both [B, h].

        Raises:
            ValueError: when the shapes do not fit, or (on the CPU) a token is outside the vocabulary.
        """
        lengths = torch.as_tensor(source_lengths, device=source_padded.device)
        check_batch("source_padded.T", source_padded.t(), lengths, self.config.source_vocab)
        return self._encode(source_padded.t(), lengths)

    def _encode(self, source: Tensor, lengths: Tensor) -> tuple[Tensor, State]:
        padding = padding_of(lengths, source.shape[1])
        x = self.model_embeddings["source"](source).masked_fill(padding[..., None], 0.0)
        # as `post_embed_cnn` itself, which has "same" mean a neighbour on the right, but in less time
        neighbours = torch.cat((x[:, 1:], torch.zeros_like(x[:, :1])), 1)
        weight = self.post_embed_cnn.weight.transpose(1, 2).flatten(1)
        x = F.linear(torch.cat((x, neighbours), 2), weight, self.post_embed_cnn.bias)
        # states are float32 under autocast too
        x = x.to(weight.dtype)
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        hiddens, (hidden, cell) = self.encoder(packed)
        padded, _ = pad_packed_sequence(hiddens, batch_first=True, total_length=source.shape[1])
        first = self.h_projection(torch.cat((hidden[0], hidden[1]), 1))
        cells = self.c_projection(torch.cat((cell[0], cell[1]), 1))
        return padded, (first.to(weight.dtype), cells.to(weight.dtype))

    def generate_sent_masks(self, enc_hiddens: Tensor, source_lengths: Sequence[int] | Tensor) -> Tensor:
        """Return where encoder states are padding, bool [B, S].

        Args:
            enc_hiddens: [B, S, 2h].
            source_lengths: tokens of each sentence.
        """
        lengths = torch.as_tensor(source_lengths, device=enc_hiddens.device)
        return padding_of(lengths, enc_hiddens.shape[1])

    def project(self, enc_hiddens: Tensor) -> Tensor:
        """Return what `step` takes for `enc_hiddens_proj`, the keys of the attention.

        Args:
            enc_hiddens: [B, S, 2h].

        Returns:
            [B, S, h]: ``att_projection(enc_hiddens)``, or with "dot" attention the sum of both directions.
        """
        if self.config.attention == "dot":
            forward, backward = enc_hiddens.chunk(2, -1)
            return forward + backward
        keys: Tensor = self.att_projection(enc_hiddens)
        return keys

    def decode(
        self,
        enc_hiddens: Tensor,
        enc_masks: Tensor | None,
        dec_init_state: tuple[Tensor, Tensor],
        target_padded: Tensor,
    ) -> Tensor:
        """Return the combined outputs of all steps.

        The same as `step` in a loop; what does not depend on the step before is computed for all at once.

        Args:
            enc_hiddens: [B, S, 2h].
            enc_masks: 1 or True at padding, [B, S]; None if there is none.
            dec_init_state: hidden and cell, both [B, h].
            target_padded: BOS, tokens and EOS of the translations, int64 [T, B]. The last row is not read.

        Returns:
            [T - 1, B, h]; row t is about token t + 1.

        Raises:
            ValueError: when `target_padded` has another shape, or (on the CPU) a token is outside the
                vocabulary.
        """
        B = len(enc_hiddens)
        if target_padded.dim() != 2 or len(target_padded) < 2 or target_padded.shape[1] != B:
            rule = f"expected [T, {B}] with T >= 2; begin with BOS and end with EOS"
            raise ValueError(f"target_padded has shape {list(target_padded.shape)}, {rule}")
        check_tokens("target_padded", target_padded, self.config.target_vocab)
        masks = None if enc_masks is None else enc_masks.bool()
        memory = Memory(enc_hiddens, self.project(enc_hiddens), masks)
        outputs, _ = self._write(target_padded[:-1].t(), memory, dec_init_state)
        return outputs.transpose(0, 1)

    def step(
        self,
        Ybar_t: Tensor,
        dec_state: tuple[Tensor, Tensor],
        enc_hiddens: Tensor,
        enc_hiddens_proj: Tensor,
        enc_masks: Tensor | None,
    ) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
        """Return what one step of the decoder gives.

        Args:
            Ybar_t: embedding of the token and the last combined output, [B, e + h]; without input feeding
                the embedding alone, [B, e].
            dec_state: hidden and cell, both [B, h].
            enc_hiddens: [B, S, 2h].
            enc_hiddens_proj: [B, S, h], see `project`.
            enc_masks: 1 or True at padding, [B, S]; None if there is none.

        Returns:
            dec_state, the next; O_t, the combined output [B, h]; e_t, the scores [B, S], -inf at padding.
        """
        masks = None if enc_masks is None else enc_masks.bool()
        hidden, cell = self.decoder(Ybar_t, dec_state)
        output, scores = self._combine(hidden[:, None], Memory(enc_hiddens, enc_hiddens_proj, masks))
        return (hidden, cell), output[:, 0], scores[:, 0]

    def _read(self, source: Tensor, lengths: Tensor) -> tuple[Memory, State]:
        hiddens, state = self._encode(source, lengths)
        return Memory(hiddens, self.project(hiddens), padding_of(lengths, source.shape[1])), state

    def _combine(self, hidden: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """Return the combined outputs [B, K, h] and the scores [B, K, S] of decoder states [B, K, h]."""
        if self.config.attention == "additive":
            sums = memory.keys[:, None] + self.att_query_projection(hidden)[:, :, None]
            scores = self.att_vector(sums.tanh())[..., 0]
        else:
            scores = torch.bmm(hidden, memory.keys.transpose(1, 2))
        if memory.masks is not None:
            scores = scores.masked_fill(memory.masks[:, None], -torch.inf)
        attended = torch.bmm(scores.softmax(-1), memory.hiddens)
        combined = self.combined_output_projection(torch.cat((attended, hidden), -1))
        return self.dropout(combined.tanh()), scores

    def _write(self, target: Tensor, memory: Memory, state: State) -> tuple[Tensor, Tensor]:
        """Return the combined outputs [B, T, h] and the scores [B, T, S] after tokens [B, T]."""
        hidden, cell = state
        e, weight = self.config.embed_size, self.decoder.weight_ih
        # the share of the tokens in the gates of all steps; within the loop is what a step has of the last
        words = self.model_embeddings["target"](target)
        shares = F.linear(words, weight[:, :e], self.decoder.bias_ih + self.decoder.bias_hh)
        recurrent = torch.cat((weight[:, e:], self.decoder.weight_hh), 1).t()
        output = torch.zeros_like(hidden)
        written: list[tuple[Tensor, Tensor]] = []
        hiddens: list[Tensor] = []
        for share in shares.unbind(1):
            past = torch.cat((output, hidden), 1) if self.config.input_feeding else hidden
            put, forget, candidate, give = torch.addmm(share, past, recurrent).chunk(4, 1)
            cell = forget.sigmoid() * cell + put.sigmoid() * candidate.tanh()
            hidden = give.sigmoid() * cell.tanh()
            if self.config.input_feeding:
                written.append(self._combine(hidden[:, None], memory))
                output = written[-1][0][:, 0]
            else:
                hiddens.append(hidden)
        if not self.config.input_feeding:
            written = [self._combine(torch.stack(hiddens, 1), memory)]
        return torch.cat([o for o, _ in written], 1), torch.cat([scores for _, scores in written], 1)

    @torch.no_grad()
    def begin(self, source: Tensor, lengths: Tensor, beam: int) -> Seq2SeqState:
        """Read sentences, and return what `advance` goes on from.

        Args:
            source: tokens with EOS, int64 [B, S], the shorter ones filled up at their ends.
            lengths: tokens of each sentence, int64 [B], within 1..S.
            beam: hypotheses of each, K.

        Raises:
            ValueError: when the shapes do not fit, `beam` is below 1, or (on the CPU) a token is outside the
                vocabulary.
        """
        if beam < 1:
            raise ValueError(f"beam={beam} must be >= 1; 1 is greedy")
        check_batch("source", source, lengths, self.config.source_vocab)
        memory, (hidden, cell) = self._read(source, lengths)
        B, h = hidden.shape
        return Seq2SeqState(memory, hidden[:, None].expand(B, beam, h), cell[:, None].expand(B, beam, h))

    @torch.no_grad()
    def advance(self, tokens: Tensor, state: Seq2SeqState) -> Tensor:
        """Read one token more of each hypothesis, and return the logits of the next.

        Args:
            tokens: int64 [B, K]; BOS at first.
            state: of `begin`; goes on by this token.

        Returns:
            logits [B, K, V], float32, or float64 of a model in float64.

        Raises:
            ValueError: when there is not a token for each hypothesis, or (on the CPU) one is outside the
                vocabulary.
        """
        if tokens.shape != state.hidden.shape[:2]:
            rule = f"the state has hypotheses {list(state.hidden.shape[:2])}; give a token for each"
            raise ValueError(f"tokens has shape {list(tokens.shape)}, {rule}")
        check_tokens("tokens", tokens, self.config.target_vocab)
        inputs = self.model_embeddings["target"](tokens)
        if self.config.input_feeding:
            inputs = torch.cat((inputs, state.output), 2)
        last = state.hidden.flatten(0, 1), state.cell.flatten(0, 1)
        state.hidden, state.cell = (
            x.unflatten(0, tokens.shape) for x in self.decoder(inputs.flatten(0, 1), last)
        )
        state.output, _ = self._combine(state.hidden, state.memory)
        logits = F.linear(state.output, self.output_weight)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    @torch.no_grad()
    def soft_alignment(
        self, source: Tensor, source_lengths: Tensor, target_in: Tensor, target_lengths: Tensor
    ) -> Tensor:
        """Return how much each step attends to each source token when it has to write a translation.

        Args:
            source: tokens with EOS, int64 [B, S].
            source_lengths: int64 [B], within 1..S.
            target_in: BOS and tokens of the translations, int64 [B, T].
            target_lengths: int64 [B], within 1..T.

        Returns:
            float32 [B, T, S], 0 at padding of both: row t is about the token after ``target_in[:, t]``, and
            sums to 1.

        Raises:
            ValueError: when the shapes do not fit, or (on the CPU) a token is outside its vocabulary.
        """
        check_batch("source", source, source_lengths, self.config.source_vocab)
        check_batch("target_in", target_in, target_lengths, self.config.target_vocab, batch=len(source))
        memory, state = self._read(source, source_lengths)
        _, scores = self._write(target_in, memory, state)
        padding = padding_of(target_lengths, target_in.shape[1])
        return scores.float().softmax(-1).masked_fill(padding[..., None], 0.0)
