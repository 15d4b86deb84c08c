from itertools import pairwise

import pytest
import torch

from crevnet.cells import CELLS
from crevnet.predictor import PredictiveTransform, reversible_predictor
from revgrad import ChainState, Residue, ReversibleSequential, check_invertible
from revgrad.chain import undo_chain
from revgrad.links import chain_links

MODULES, CHANNELS = 4, 3
CELL_NAMES = ["convlstm", "stlstm"]
SIZES = [(4, 4), (2, 4, 4)]
GRID_STEP = 2.0**-32  # of float64 streams


def make(cell, size, arithmetic="float", modules=MODULES, attention_norm="none"):
    torch.manual_seed(0)
    predictor = reversible_predictor(cell, modules, CHANNELS, size, attention_norm=attention_norm).double()
    predictor.arithmetic = arithmetic
    for name, p in predictor.named_parameters():
        if name.endswith("peephole"):
            torch.nn.init.normal_(p)
        else:
            p.data *= 2  # states and gates that differ visibly
    return predictor


def streams_of(size, seed=1, batch=2):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, CHANNELS, *size, generator=generator, dtype=torch.float64) for _ in range(2))


def start(cell, size, modules=MODULES, batch=2):
    zero = torch.zeros(batch, CHANNELS, *size, dtype=torch.float64)
    return ChainState(((zero, zero),) * modules, (zero,) * CELLS[cell].carries)


def spy_on_cells(predictor):
    """Per call of a cell, in order: module, states read, states left."""
    calls = []
    for i, module in enumerate(predictor):
        module.transform.cell.register_forward_hook(lambda _, args, out, i=i: calls.append((i, args[1], out[1])))
    return calls


def section_2_2(predictor, streams, state):
    """One time step as the paper writes it: `h`, `g`, weighted sum; streams in turn."""
    first, second = streams
    carry = state.carry
    new = []
    for i, module in enumerate(predictor):
        source, target = (first, second) if i % 2 == 0 else (second, first)
        h, left = module.transform.cell(source, (*state.layers[i], *carry))
        w1, *norm, _, w2 = module.transform.attention
        inner = w1(h)
        if norm:
            centred = inner - inner.flatten(1).mean(1).view(-1, *(1,) * (h.ndim - 1))
            variance = centred.square().flatten(1).mean(1).view(-1, *(1,) * (h.ndim - 1))
            weight, bias = (p.view(-1, *(1,) * (h.ndim - 2)) for p in norm[0].parameters())
            inner = weight * centred / (variance + 1e-5).sqrt() + bias
        g = torch.sigmoid(w2(torch.relu(inner)))
        blended = (1 - g) * target + g * h
        first, second = (first, blended) if i % 2 == 0 else (blended, second)
        new.append(left[:2])
        carry = left[2:]
    return (first, second), ChainState(tuple(new), carry)


def test_modules_alternate_between_the_streams():
    predictor = reversible_predictor("stlstm", 5, CHANNELS, (4, 4))
    assert [(m.source, m.target) for m in predictor] == [(0, 1), (1, 0), (0, 1), (1, 0), (0, 1)]


@pytest.mark.parametrize("cell", CELL_NAMES)
def test_each_module_changes_one_stream_only(cell):
    predictor = make(cell, (4, 4))
    for modules in range(1, MODULES + 1):
        streams = streams_of((4, 4))
        with torch.no_grad():
            before, _ = ReversibleSequential(*predictor[: modules - 1], arithmetic="float")(
                *streams, states=start(cell, (4, 4), modules - 1)
            )
            after, _ = ReversibleSequential(*predictor[:modules], arithmetic="float")(
                *streams, states=start(cell, (4, 4), modules)
            )
        changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert changed == ([False, True] if modules % 2 else [True, False])


@pytest.mark.parametrize("cell", CELL_NAMES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("arithmetic", ["float", "exact"])
@pytest.mark.parametrize("attention_norm", ["none", "group"])
def test_matches_section_2_2_written_out(cell, size, arithmetic, attention_norm):
    predictor = make(cell, size, arithmetic, attention_norm=attention_norm)
    found, wanted = (streams_of(size), start(cell, size)), (streams_of(size), start(cell, size))
    with torch.no_grad():
        for _ in range(3):
            found = predictor(*found[0], states=found[1])
            wanted = section_2_2(predictor, *wanted)
    # Exact arithmetic quantises 1 - g to 2^-16, so that is how far it may be off.
    tolerance = 1e-12 if arithmetic == "float" else 2**-16 * 3 * MODULES
    torch.testing.assert_close(found[0], wanted[0], atol=tolerance, rtol=0)
    torch.testing.assert_close(found[1].tensors(), wanted[1].tensors(), atol=tolerance, rtol=0)


def test_the_transform_returns_attention_logits_and_hidden_state():
    transform = PredictiveTransform("convlstm", CHANNELS, (4, 4)).double()
    x, state = streams_of((4, 4))[0], streams_of((4, 4), seed=2)
    (logits, hidden), new_state = transform(x, state)
    expected, (_, cell) = transform.cell(x, state)
    assert torch.equal(hidden, expected)
    assert torch.equal(new_state[0], expected)
    assert torch.equal(new_state[1], cell)
    assert torch.equal(logits, transform.attention(expected))
    assert bool((logits < 0).any()), "logits, not gates"


def test_attention_is_two_convolutions_with_a_relu_between():
    kinds = [type(m).__name__ for m in PredictiveTransform("stlstm", CHANNELS, (2, 4, 4)).attention]
    assert kinds == ["Convolution3d", "ReLU", "Convolution3d"]


@pytest.mark.parametrize("mode", ["stored", "reversible"])
def test_zigzag_of_the_memory(mode):
    predictor = make("stlstm", (4, 4), "exact")
    predictor.mode = mode
    calls = spy_on_cells(predictor)
    streams, state = streams_of((4, 4)), start("stlstm", (4, 4))
    given = state.carry[0]
    for _ in range(3):
        streams, state = predictor(*streams, states=state)
    assert [i for i, _, _ in calls] == [0, 1, 2, 3] * 3
    before = given
    for i, read, left in calls:
        assert torch.equal(read[2], before), f"module {i} reads the memory of the call before it"
        assert not torch.equal(left[2], before)
        before = left[2]
    assert torch.equal(state.carry[0], before)
    for module in range(MODULES):
        own = [(read[:2], left[:2]) for i, read, left in calls if i == module]
        for (_, left), (read, _) in pairwise(own):
            assert all(torch.equal(a, b) for a, b in zip(left, read, strict=True)), "H and C stay with their module"


def test_conv_lstm_carries_nothing():
    predictor = make("convlstm", (4, 4))
    with torch.no_grad():
        _, state = predictor(*streams_of((4, 4)), states=start("convlstm", (4, 4)))
    assert state.carry == ()
    assert [len(s) for s in state.layers] == [2] * MODULES


@pytest.mark.parametrize("cell", CELL_NAMES)
def test_undone_bit_for_bit_over_time(cell):
    predictor = make(cell, (2, 4, 4), "exact")
    calls = spy_on_cells(predictor)
    links = chain_links(predictor)
    residue = Residue()
    history, state = [streams_of((2, 4, 4), batch=1)], start(cell, (2, 4, 4), batch=1)
    history[0] = tuple(torch.round(x * 2**32) * GRID_STEP for x in history[0])
    with torch.no_grad():
        for _ in range(5):
            streams, state = predictor(*history[-1], states=state, residue=residue)
            history.append(streams)
        read = [states for _, states, _ in calls]
        for t in reversed(range(5)):
            streams = undo_chain(links, streams, read[t * MODULES : (t + 1) * MODULES], residue)
            assert all(torch.equal(a, b) for a, b in zip(streams, history[t], strict=True))
    residue.check_undone_to()


@pytest.mark.parametrize("cell", CELL_NAMES)
def test_the_checker_finds_nothing(cell):
    report = check_invertible(make(cell, (4, 4), "exact"), streams_of((4, 4)), start(cell, (4, 4)))
    assert report.exact
    assert report.invertible
    assert len(report.layers) == MODULES
    assert report.bits > 0


@pytest.mark.parametrize("cell", CELL_NAMES)
@pytest.mark.parametrize("mode", ["stored", "reversible"])
def test_gradients(cell, mode):
    predictor = make(cell, (2, 2), modules=2)
    predictor.mode = mode
    state = start(cell, (2, 2), modules=2, batch=1)
    names = [name for name, _ in predictor.named_parameters()]
    inputs = [*streams_of((2, 2), batch=1), *(torch.randn_like(s) for s in state.tensors())]
    n = len(inputs)
    inputs += [p.detach() for p in predictor.parameters()]

    def call(*values):
        parameters = dict(zip(names, values[n:], strict=True))
        states = state.replace(values[2:n])
        out, new = torch.func.functional_call(predictor, parameters, values[:2], {"states": states})
        return (*out, *new.tensors())

    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in inputs], fast_mode=True)


@pytest.mark.parametrize("cell", CELL_NAMES)
def test_with_normalised_attention_gradients_are_those_of_stored_autograd(cell):
    found = []
    for mode in ("stored", "reversible"):
        predictor = make(cell, (2, 4, 4), "exact", attention_norm="group")
        predictor.mode = mode
        out, new = predictor(*streams_of((2, 4, 4)), states=start(cell, (2, 4, 4)))
        sum(x.square().sum() for x in (*out, *new.tensors())).backward()
        found.append([p.grad for p in predictor.parameters()])
    assert all(map(torch.equal, *found))


def test_unknown_normalisation_is_refused():
    with pytest.raises(ValueError, match="attention_norm must be one of none, group, got 'batch'"):
        reversible_predictor("stlstm", 2, CHANNELS, (4, 4), attention_norm="batch")


def test_unknown_cell_is_refused():
    with pytest.raises(ValueError, match=r"one of \['convlstm', 'stlstm'\], got 'gru'"):
        reversible_predictor("gru", 2, CHANNELS, (4, 4))
