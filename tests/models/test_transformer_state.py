"""Written token by token: the logits of the whole target at each step, whichever hypotheses go on."""

import pytest
import torch
from plain_transformer import SOURCE_LENGTHS, V, batch, ours, sizes

from nlpfast.models.transformer import Transformer
from nlpfast.models.transformer_state import ROOM

B = len(SOURCE_LENGTHS)
KINDS = [
    {},
    {"norm": "post", "positions": "learned", "tied": "none", "activation": "gelu"},
    {"heads": 1, "decoder_layers": 1, "tied": "decoder", "source_vocab": V + 4},
]


def texts(beam, length, sentences=B):
    """Return what hypotheses say, [B, K, T]."""
    return torch.randint(1, V, (sentences, beam, length), generator=torch.Generator().manual_seed(3))


def whole(model, source, lengths, written):
    """Return the logits of hypotheses [B, K, T] by reading them at once, [B, K, T, V]."""
    beam, length = written.shape[1:]
    rows = written.flatten(0, 1)
    sources, sizes_ = source.repeat_interleave(beam, 0), lengths.repeat_interleave(beam)
    return model.logits(sources, sizes_, rows, torch.full((len(rows),), length)).unflatten(0, (-1, beam))


@pytest.mark.parametrize("beam", [1, 3])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
def test_step_by_step_is_the_whole(kind, beam, dtype, tolerance):
    model, (source, lengths, _, _) = ours(dtype, **kind), batch()
    written = texts(beam, 2 * ROOM + 3)
    want = whole(model, source, lengths, written)
    state = model.begin(source, lengths, beam)
    assert state.beam == beam and state.position == 0
    for t in range(written.shape[2]):
        got = model.advance(written[:, :, t], state)
        assert got.shape == (B, beam, V) and got.dtype == dtype and not got.requires_grad
        torch.testing.assert_close(got, want[:, :, t], rtol=0, atol=tolerance)
        assert state.position == t + 1
    assert all(part.shape[2] == max(SOURCE_LENGTHS) for pair in state.memory for part in pair)


@torch.no_grad()
@pytest.mark.parametrize("first", [0, 1, ROOM - 1, ROOM, ROOM + 2])
def test_hypotheses_go_on_from_others(first):
    """Compared with a fresh run on what they say then; nothing that was dropped comes back."""
    model, (source, lengths, _, _) = ours(), batch()
    written = texts(3, ROOM + 6)
    state = model.begin(source, lengths, 3)
    for t in range(first):
        model.advance(written[:, :, t], state)
    for step in range(3):
        beams = torch.randint(3, (B, 3), generator=torch.Generator().manual_seed(step))
        state.reorder(beams)
        seen = written[:, :, : first + step].gather(1, beams[:, :, None].expand(-1, -1, first + step))
        written = torch.cat((seen, written[:, :, first + step :]), 2)
        got = model.advance(written[:, :, first + step], state)
        want = whole(model, source, lengths, written[:, :, : first + step + 1])[:, :, -1]
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


@torch.no_grad()
@pytest.mark.parametrize("first", [0, 3, ROOM])
@pytest.mark.parametrize("kept", [[0, 1, 2, 3], [1, 3], [3], [2, 0], [0, 1]], ids=str)
@pytest.mark.parametrize("beam", [1, 3])
def test_some_sentences_go_on(beam, kept, first):
    model, (source, lengths, _, _) = ours(), batch()
    written = texts(beam, ROOM + 3)
    state = model.begin(source, lengths, beam)
    for t in range(first):
        model.advance(written[:, :, t], state)
    kept = torch.tensor(kept)
    state.keep(kept)
    source, lengths, written = source[kept], lengths[kept], written[kept]
    assert torch.equal(state.lengths, lengths)
    # no work for sources that are no longer there
    assert all(part.shape[2] == lengths.max() for pair in state.memory for part in pair)
    want = whole(model, source, lengths, written)
    for t in range(first, first + 3):
        got = model.advance(written[:, :, t], state)
        torch.testing.assert_close(got, want[:, :, t], rtol=0, atol=1e-11)


@torch.no_grad()
def test_sentences_and_hypotheses_in_turn():
    """As beam search uses the two."""
    model, (source, lengths, _, _) = ours(), batch()
    written = texts(2, 8)
    state = model.begin(source, lengths, 2)
    for t, kept in enumerate(([0, 1, 2, 3], [0, 2, 3], [0, 1], [1], [0])):
        kept = torch.tensor(kept)
        state.keep(kept)
        source, lengths, written = source[kept], lengths[kept], written[kept]
        beams = (torch.arange(len(kept))[:, None] + torch.tensor([t, 1])) % 2
        state.reorder(beams)
        seen = written[:, :, :t].gather(1, beams[:, :, None].expand(-1, -1, t))
        written = torch.cat((seen, written[:, :, t:]), 2)
        got = model.advance(written[:, :, t], state)
        want = whole(model, source, lengths, written[:, :, : t + 1])[:, :, -1]
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


@torch.no_grad()
def test_no_sentence_goes_on():
    model, (source, lengths, _, _) = ours(), batch()
    state = model.begin(source, lengths, 2)
    model.advance(texts(2, 1)[:, :, 0], state)
    state.keep(torch.empty(0, dtype=torch.int64))
    assert len(state.lengths) == 0 and state.own(0)[0].shape[0] == 0


@torch.no_grad()
def test_room_grows_as_it_is_needed():
    model, (source, lengths, _, _) = ours(), batch()
    state, written = model.begin(source, lengths, 3), texts(3, 2 * ROOM + 1)
    rooms = []
    for t in range(2 * ROOM + 1):
        model.advance(written[:, :, t], state)
        keys, values = state.own(3)
        assert keys.shape == values.shape and keys.shape[:2] == (B * 3, model.config.heads)
        rooms.append(keys.shape[2])
    assert rooms == [ROOM] * ROOM + [2 * ROOM] * ROOM + [3 * ROOM]


@torch.no_grad()
def test_what_follows_a_source_is_not_read():
    model, (source, lengths, _, _) = ours(), batch()
    wider = torch.nn.functional.pad(source, (0, 3), value=V + 5)
    wider[torch.arange(wider.shape[1]) >= lengths[:, None]] = V + 5
    tokens = texts(2, 1)[:, :, 0]
    want = model.advance(tokens, model.begin(source, lengths, 2))
    assert torch.equal(model.advance(tokens, model.begin(wider, lengths, 2)), want)


@torch.no_grad()
def test_no_more_than_the_positions():
    model, (source, lengths, _, _) = ours(max_positions=7), batch()
    state, written = model.begin(source, lengths), texts(1, 8)
    for t in range(7):
        model.advance(written[:, :, t], state)
    with pytest.raises(ValueError, match="a sentence has 8 tokens, max_positions=7 is the most"):
        model.advance(written[:, :, 7], state)
    with pytest.raises(ValueError, match="a sentence has 7 tokens, max_positions=6 is the most"):
        ours(max_positions=6).begin(source, lengths)


@torch.no_grad()
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_autocast_is_near(norm):
    model, (source, lengths, _, _) = Transformer(sizes(norm=norm)).eval(), batch()
    written = texts(3, ROOM + 2)
    want = whole(model, source, lengths, written)
    with torch.autocast("cpu", torch.bfloat16):
        state = model.begin(source, lengths, 3)
        got = torch.stack([model.advance(written[:, :, t], state) for t in range(written.shape[2])], 2)
    assert state.own(0)[0].dtype == torch.bfloat16
    assert 0 < (got.float() - want).norm() < 0.02 * want.norm()
