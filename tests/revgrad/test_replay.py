"""The second evaluation sees what the first one saw: random numbers, autocast, modes, statistics."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from revgrad import (
    AdditiveCoupling,
    GatedCoupling,
    ReversibilityError,
    ReversibleLayer,
    ReversibleSequential,
    unroll,
)
from revgrad.layer import Rewound
from revgrad.replay import Snapshot

pytestmark = pytest.mark.usefixtures("single_thread")

MODES = ["checkpoint", "reversible"]
NORMS = {
    "batch": lambda: nn.BatchNorm1d(8),
    "cumulative": lambda: nn.BatchNorm1d(8, momentum=None),
    "no affine": lambda: nn.BatchNorm1d(8, affine=False),
    "untracked": lambda: nn.BatchNorm1d(8, track_running_stats=False),
}


# Random numbers


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["additive", "gated"])
@pytest.mark.composes("Randomness", "dropout in F and G")
def test_dropout_is_replayed(make, check, kind, mode):
    chain, x = make.chain(kind, 5, inner=lambda: nn.Dropout(0.4), arithmetic="exact"), make.streams()
    expected = check.gradients(chain, x, "stored")
    check.same(check.gradients(chain, x, mode), expected)
    # The test has teeth: another seed gives another result.
    assert not torch.equal(check.gradients(chain, x, mode, seed=4)["output 1"], expected["output 1"])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.composes("Randomness", "the global generator afterwards", "works: where stored mode leaves it")
def test_generator_is_where_it_was(make, check, mode):
    chain, x = make.chain("mixed", 4, inner=lambda: nn.Dropout(0.4)), make.streams()
    after = {}
    for m in ("stored", mode):
        chain.mode = m
        torch.manual_seed(5)
        y = chain(*x)
        after[m] = torch.get_rng_state()
        torch.rand(7)
        before = torch.get_rng_state()
        check.loss(y).backward()
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(after["stored"], after[mode])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.composes("Randomness", "two forwards before one backward")
def test_two_forwards_before_one_backward(make, check, mode):
    chain, x = make.chain("mixed", 4, inner=lambda: nn.Dropout(0.4)), make.streams()
    found = {}
    for m in ("stored", mode):
        chain.mode = m
        torch.manual_seed(5)
        first, second = chain(*x), chain(*x)
        loss = check.loss(first) + 2 * check.loss(second)
        found[m] = torch.autograd.grad(loss, (*x, *chain.parameters()))
        assert not torch.equal(first[1], second[1])
    assert all(map(torch.equal, found["stored"], found[mode]))


def test_dropout_in_a_recomputed_unroll(make, check):
    core = make.chain("gated", 3, inner=lambda: nn.Dropout(0.3))
    x = [make.streams(), None, make.streams(), None, None]
    found = []
    for options in ({"mode": "stored"}, {}, {"keep_states_every": 2}, {"keep_states_every": 5}):
        torch.manual_seed(5)
        y, _ = unroll(core, x, **options)
        before = torch.get_rng_state()
        found.append(torch.autograd.grad(check.loss(y), (*x[0], *x[2], *core.parameters())))
        assert torch.equal(torch.get_rng_state(), before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_random_states_are_kept_only_where_something_was_drawn(make):
    chain = make.chain("additive", 4)
    chain[2].transform.inner = nn.Dropout(0.5)
    snapshot = Snapshot(chain)
    x = make.streams()
    for i, layer in enumerate(chain):
        with snapshot.first_evaluation(i, torch.device("cpu")):
            layer.transform(x[0])
    assert list(snapshot._random_states) == [2]


# Statistics


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", ["additive", "gated"])
@pytest.mark.composes("Modes", "BatchNorm in train mode", "works: statistics move once a step")
def test_running_statistics_move_once(make, check, kind, norm, mode):
    chain, x = make.chain(kind, 4, inner=NORMS[norm], arithmetic="exact"), make.streams(6)
    for _ in range(2):  # so that momentum=None averages over more than one batch
        expected = check.gradients(chain, x, "stored")
        check.same(check.gradients(chain, x, mode), expected)
        chain(*x)
    if norm != "untracked":
        assert chain[0].transform.inner.num_batches_tracked == 2
        assert expected["buffer layers.0.transform.inner.num_batches_tracked"] == 2
        assert expected["buffer layers.0.transform.inner.running_mean"].any()


@pytest.mark.parametrize("every", [1, 2])
def test_running_statistics_move_once_in_an_unroll(make, check, every):
    core = make.chain("gated", 2, inner=NORMS["cumulative"])
    x = [make.streams(5), None, make.streams(5)]
    buffers = {}
    for mode in ("stored", "checkpoint", "reversible"):
        model = copy.deepcopy(core)
        y, _ = unroll(model, x, mode=mode, keep_states_every=every)
        check.loss(y).backward()
        buffers[mode] = dict(model.named_buffers())
    check.same(buffers["checkpoint"], buffers["stored"])
    check.same(buffers["reversible"], buffers["stored"])
    assert buffers["stored"]["layers.0.transform.inner.num_batches_tracked"] == 3


@pytest.mark.parametrize("mode", MODES)
def test_shared_normalisation_moves_once_per_use(make, check, mode):
    layer = make.coupling("additive", 4, inner=nn.BatchNorm1d(8))
    chain, x = ReversibleSequential(layer, layer, arithmetic="exact"), make.streams(6)
    expected = check.gradients(chain, x, "stored")
    check.same(check.gradients(chain, x, mode), expected)
    assert expected["buffer layers.0.transform.inner.num_batches_tracked"] == 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.composes("Modes", "gradients in eval mode")
def test_gradients_in_eval_mode_use_the_statistics(make, check, mode):
    chain, x = make.chain("additive", 4, inner=NORMS["batch"], arithmetic="exact"), make.streams(6)
    chain(*make.streams(50))
    chain.eval()
    before = {k: b.clone() for k, b in chain.named_buffers()}
    check.same(check.gradients(chain, x, mode), check.gradients(chain, x, "stored"))
    check.same(dict(chain.named_buffers()), before)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.composes("Modes", "train or eval mode switched between forward and backward")
def test_switching_between_train_and_eval_before_backward(make, check, first):
    def inner():
        return nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.3))

    chain, x = make.chain("additive", 4, inner=inner, arithmetic="exact"), make.streams(6)
    chain(*make.streams(50))
    found = {}
    for mode in ("stored", "reversible"):
        model = copy.deepcopy(chain).train(first)
        model[1].transform.inner[1].train(not first)  # modes of single modules, too
        model.mode = mode
        torch.manual_seed(5)
        y = model(*x)
        model.train(not first)
        loss = check.loss(y)
        grads = torch.autograd.grad(loss, (*x, *model.parameters()))
        found[mode] = dict(enumerate([*y, *grads, *model.buffers()]))
        assert all(m.training is not first for m in model.modules())
    check.same(found["reversible"], found["stored"])


# Autocast


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["additive", "gated"])
@pytest.mark.composes("Modes", "autocast to bfloat16, streams in float32")
def test_autocast_is_replayed(make, check, kind, mode, inside):
    chain, x = make.chain(kind, 4, arithmetic="exact"), make.streams()
    plain = check.gradients(chain, x, "stored")["output 1"]
    found = {}
    for m in ("stored", mode):
        chain.mode = m
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = chain(*x)
            loss = check.loss(y)
            if inside:
                grads = torch.autograd.grad(loss, (*x, *chain.parameters()))
        if not inside:
            grads = torch.autograd.grad(loss, (*x, *chain.parameters()))
        assert y[1].dtype == torch.float32
        assert not torch.equal(y[1], plain)
        found[m] = [*y, *grads]
    assert all(map(torch.equal, found[mode], found["stored"]))


def test_autocast_around_the_backward_only(make, check):
    """The recomputation is without autocast, as the forward pass was; what autograd then does is its own affair."""
    chain, x = make.chain("gated", 4), make.streams()
    found = {}
    for mode in ("stored", "reversible"):
        chain.mode = mode
        loss = check.loss(chain(*x))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found[mode] = torch.autograd.grad(loss, x)
    assert all(map(torch.equal, found["stored"], found["reversible"]))


def test_autocast_cache_holds_no_weight_without_a_graph(make, check):
    """The same weights reversible first, then stored, in one region: the stored pass must still reach them."""
    chain, x = make.chain("additive", 2), make.streams()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        chain(*x)
        assert torch.is_autocast_cache_enabled()
        chain.mode = "stored"
        loss = check.loss(chain(*x))
    grads = torch.autograd.grad(loss, tuple(chain.parameters()), allow_unused=True)
    assert all(g is not None for g in grads)


# Snapshot


def test_parameters_are_replaced_during_backward_and_put_back(make, check):
    seen = []

    class Spy(nn.Linear):
        def forward(self, x):
            seen.append(self.weight)
            return super().forward(x)

    chain = ReversibleSequential(AdditiveCoupling(Spy(4, 4)))
    weight = chain[0].transform.weight
    check.loss(chain(*make.streams())).backward()
    assert seen[0] is weight
    assert seen[1] is not weight
    assert seen[1].data_ptr() == weight.data_ptr()
    assert chain[0].transform.weight is weight
    assert isinstance(weight, nn.Parameter)


def test_shared_modules_are_counted_once(make):
    layer = make.coupling("gated")
    tied = AdditiveCoupling(nn.Linear(4, 8, bias=False))
    tied.transform.weight = layer.transform.first.weight
    snapshot = Snapshot([layer, tied, layer])
    assert len(snapshot.parameters) == 4
    assert snapshot.indices_of(layer) == [0, 1, 2, 3]
    assert snapshot.indices_of(tied) == [0]
    assert len(snapshot.slots) == 5
    assert len(snapshot.modules) == len(set(map(id, snapshot.modules)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.composes("Modes", "several backward passes, with BatchNorm")
def test_statistics_stay_in_every_backward_pass(make, check, mode):
    chain = make.chain("additive", 2, inner=lambda: nn.BatchNorm1d(8), mode=mode)
    loss = check.loss(chain(*make.streams()))
    after = {name: b.clone() for name, b in chain.named_buffers()}
    for _ in range(2):
        loss.backward(retain_graph=True)
    assert all(torch.equal(b, after[name]) for name, b in chain.named_buffers())


@pytest.mark.composes("Structure", "`torch.nn.utils.parametrize.cached()` around a training step")
def test_weights_cached_by_parametrizations_keep_their_gradients(make, check):
    chain, x = make.chain("additive", 2), make.streams()
    for layer in chain:
        weight_norm(layer.transform.first)
    with parametrize.cached():
        found = check.gradients(chain, x, "reversible")
    check.same(found, check.gradients(chain, x, "stored"), rtol=1e-5)
    assert all(v is not None for v in found.values())


def test_buffers_that_are_only_read_are_fine(make, check):
    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("shift", torch.ones(4))

        def forward(self, x):
            return torch.tanh(x) + self.shift, x

    chain, x = ReversibleSequential(GatedCoupling(Shift())), make.streams()
    check.same(check.gradients(chain, x, "reversible"), check.gradients(chain, x, "stored"))


# Layers that evaluate nothing


class Factor(ReversibleLayer):
    """Its rewind needs no evaluation, but reads a parameter."""

    evaluations_in_rewind = 0

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))

    def run(self, streams, call):
        return tuple(x * self.factor for x in streams)

    def undo(self, streams, call):
        return tuple(x / self.factor for x in streams)

    def rewind(self, backward, call, state_grads, wrt):
        backward.streams[:] = [x.detach() for x in self.undo(tuple(backward.streams), call)]
        with torch.enable_grad():
            outputs = self.run(tuple(backward.streams), call)
        grads = torch.autograd.grad(outputs, wrt, backward.grads)
        backward.grads[:] = [g * self.factor.detach() for g in backward.grads]
        return Rewound((), grads)


def test_a_layer_that_evaluates_nothing_may_read_parameters(make, check):
    chain, x = ReversibleSequential(Factor(), AdditiveCoupling(make.net(4))).double(), make.streams(dtype=torch.float64)
    check.same(check.gradients(chain, x), check.gradients(chain, x, "stored"), rtol=1e-10)


@pytest.mark.composes(
    "Structure", "lazy modules, trained before they have seen an input", "error: *under torch.no_grad*"
)
@pytest.mark.parametrize("budget", [None, "free"])
def test_a_lazy_module_must_have_seen_an_input(make, check, budget):
    def lazy():
        return ReversibleSequential(*(AdditiveCoupling(nn.LazyLinear(4), i, 1 - i) for i in range(2)))

    model, x = lazy(), make.streams()
    model.memory_budget = budget
    with pytest.raises(ReversibilityError, match=r"LazyLinear has no parameters yet.*under torch.no_grad"):
        model(*x)
    with torch.no_grad():
        model(*x)
    check.same(check.gradients(model, x), check.gradients(model, x, "stored"), rtol=1e-4)


@pytest.mark.parametrize("mode", ["checkpoint", "reversible"])
def test_a_transform_that_takes_a_gradient_itself(check, mode):
    class Force(nn.Linear):
        """The gradient of an energy."""

        def forward(self, x):
            with torch.enable_grad():
                x = x if x.requires_grad else x.detach().requires_grad_()
                return torch.autograd.grad(torch.tanh(super().forward(x)).square().sum(), x, create_graph=True)[0]

    chain = ReversibleSequential(*(AdditiveCoupling(Force(4, 4), i % 2, 1 - i % 2) for i in range(3))).double()
    x = [torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    check.same(check.gradients(chain, x, mode), check.gradients(chain, x, "stored"), rtol=1e-9)


@pytest.mark.composes(
    "Misuse", "weights changed between forward and backward in checkpoint mode", "error: *changed in place*"
)
def test_checkpoint_mode_notices_changed_weights_and_keeps_its_modes():
    chain = ReversibleSequential(AdditiveCoupling(nn.Sequential(nn.Linear(4, 4), nn.Dropout())), mode="checkpoint")
    x = [torch.ones(3, 4, requires_grad=True) for _ in range(2)]
    loss = chain(*x)[1].sum()
    chain.eval()
    loss.backward()  # the recomputation drops out as the forward pass did
    assert not chain.layers[0].transform[1].training
    chain.train()
    loss = chain(*x)[1].sum()
    with torch.no_grad():
        chain.layers[0].transform[0].weight.mul_(2)
    with pytest.raises(ReversibilityError, match="has changed in place between the forward pass and the recomputation"):
        loss.backward()
