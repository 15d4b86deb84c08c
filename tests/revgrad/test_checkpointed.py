from contextlib import contextmanager

import pytest
import torch

from revgrad import unroll
from revgrad.checkpointed import _Anew
from revgrad.spilled_words import GrowingWords


@pytest.mark.parametrize("arithmetic", ["float", "exact"])
@pytest.mark.parametrize("kind", ["additive", "gated"])
def test_every_layer_is_run_twice_and_computes_what_it_does_stored(make, check, kind, arithmetic):
    chain, x = make.chain(kind, 3, arithmetic=arithmetic), make.streams()
    check.same(check.gradients(chain, x, "checkpoint"), check.gradients(chain, x, "stored"))
    chain.mode = "checkpoint"
    sum(y.sum() for y in chain(*x)).backward()
    assert [layer.transform.count[0] for layer in chain] == [2, 2, 2]


@pytest.mark.parametrize("arithmetic", ["float", "exact"])
def test_every_time_step_is_run_twice_and_hands_on_residue_and_state(make, arithmetic):
    core, x = make.recurrent(), make.streams()
    state = make.state(core)
    found = []
    for mode in ("stored", "checkpoint"):
        for layer in core:
            layer.transform.count[0] = 0
        outputs, final = unroll(core, [x, None, x], state, mode=mode, arithmetic=arithmetic)
        loss = sum(y.square().sum() for y in (*outputs, *final.tensors()))
        found.append((*outputs, *torch.autograd.grad(loss, [*x, *core.parameters()])))
        assert [layer.transform.count[0] for layer in core] == [3 if mode == "stored" else 6] * 2
    assert all(map(torch.equal, *found))


def test_no_word_of_the_residue_is_kept(make, monkeypatch):
    kept = []
    append = GrowingWords.append
    monkeypatch.setattr(GrowingWords, "append", lambda self, *args: (kept.append(1), append(self, *args))[1])
    chain, x = make.chain("gated", 8, arithmetic="exact"), make.streams()
    for mode, counted in (("stored", False), ("checkpoint", False), ("reversible", True)):
        kept.clear()
        chain.mode = mode
        sum(y.sum() for y in chain(*x)).backward()
        assert bool(kept) == counted, mode


def test_a_context_is_made_whenever_it_is_entered():
    seen = []

    @contextmanager
    def make():
        mine = len(seen)
        seen.append(f"in {mine}")
        yield
        seen.append(f"out {mine}")

    anew = _Anew(make)
    with anew, anew:
        pass
    with anew:
        pass
    assert seen == ["in 0", "in 1", "out 1", "out 0", "in 4", "out 4"]
