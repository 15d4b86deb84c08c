import pytest
import torch
from torch import nn

from revgrad import MomentumNetwork, ReversibleSequential, StreamError, from_groups, from_pairs, momentum_from

MODES = ["stored", "checkpoint", "reversible"]


def pairs(make, count=3, width=4):
    return [(make.net(width).double(), make.net(width).double()) for _ in range(count)]


@pytest.mark.parametrize("mode", MODES)
def test_pairs_compute_what_the_convention_says(make, mode):
    blocks = pairs(make)
    x1, x2 = make.streams(dtype=torch.float64)
    y1, y2 = x1, x2
    for f, g in blocks:
        y1 = y1 + f(y2)
        y2 = y2 + g(y1)
    found = from_pairs(blocks, mode=mode)(x1, x2)
    torch.testing.assert_close(found, (y1, y2))
    joined = from_pairs(blocks, split_dim=-1, mode=mode)(torch.cat([x1, x2], -1))
    torch.testing.assert_close(joined, torch.cat([y1, y2], -1))


@pytest.mark.parametrize("split_dim", [None, 1, -1])
def test_gradients_of_pairs_with_missing_functions(make, check, split_dim):
    f, g = make.net(4).double(), make.net(4).double()
    chain = from_pairs([(f, None), (None, g), (None, None), (g, f)], split_dim)
    assert sum(type(layer).__name__ == "AdditiveCoupling" for layer in chain) == 4
    x = make.streams(width=8 if split_dim else 4, count=1 if split_dim else 2, dtype=torch.float64)
    check.same(check.gradients(chain, x, "reversible"), check.gradients(chain, x, "stored"), rtol=1e-12)
    assert len(list(chain.parameters())) == 8


def test_pairs_take_the_options_of_a_chain(make):
    chain = from_pairs(pairs(make), mode="checkpoint", arithmetic="exact")
    assert isinstance(chain, ReversibleSequential)
    assert (chain.mode, chain.arithmetic) == ("checkpoint", "exact")
    options = {"anchor_every": 2, "drift_guard": True, "memory_budget": "1 MiB", "arithmetic": "float"}
    for made in (
        from_pairs(pairs(make), **options),
        from_groups([[make.net(4), make.net(4)]], **options),
        momentum_from([make.net(4)], skip_inside=False, **options).chain,
    ):
        assert made.chosen_options() == options
    with pytest.raises(TypeError, match="anchor_evry"):
        from_pairs(pairs(make), anchor_evry=2)


def test_options_of_a_momentum_network_are_its_chains(make):
    network = momentum_from([make.net(4)], skip_inside=False, mode="stored")
    assert (network.mode, network.arithmetic) == ("stored", "auto")
    changed = {
        "mode": "reversible",
        "arithmetic": "float",
        "anchor_every": 2,
        "drift_guard": 3,
        "memory_budget": "1 MiB",
        "offload": True,
    }
    for name, value in changed.items():
        setattr(network, name, value)
        assert getattr(network, name) == value
    del changed["mode"]  # the default
    assert network.chain.chosen_options() == changed
    with pytest.raises(StreamError, match="mode must be"):
        network.mode = "stord"


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([(nn.ReLU(),)], r"item 0 is not a pair \(F, G\)"),
        ([(None, nn.ReLU()), nn.ReLU()], r"item 1 is not a pair \(F, G\) of modules, but a ReLU"),
        ([(nn.ReLU(), torch.relu)], "pair 0 holds a builtin_function_or_method, neither a module nor None"),
        ([(None, None)], "there is no module"),
        ([], "there is no module"),
    ],
)
def test_pairs_that_are_none(items, message):
    with pytest.raises(StreamError, match=message):
        from_pairs(items)


class Convolution(nn.Module):
    """Of a graph: the mean over neighbours, by the edges."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, edges, weights=None):
        return torch.zeros_like(x).index_add(0, edges[1], self.net(x)[edges[0]] * weights[:, None])


@pytest.mark.parametrize("arithmetic", ["float", "exact"])
@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.composes("Structure", "grouped blocks of a graph network, edges and edge weights given by name")
def test_groups_compute_what_the_convention_says(make, check, k, arithmetic):
    blocks = [[Convolution(make.net(4)).double() for _ in range(k)] for _ in range(3)]
    edges = torch.tensor([[0, 1, 2, 4, 4], [1, 2, 0, 3, 1]])
    weights = torch.rand(5, dtype=torch.float64, requires_grad=True)
    x = make.streams(5, count=k, dtype=torch.float64)
    expected = list(x)
    for block in blocks:
        y = sum(expected[1:])
        for i, f in enumerate(block):
            y = expected[i] = expected[i] + f(y, edges, weights)
    chain = from_groups(blocks, arithmetic=arithmetic)
    y = chain(*x, edges=edges, weights=weights)
    torch.testing.assert_close(y, tuple(expected), rtol=1e-6, atol=1e-6)
    grads = {}
    for chain.mode in MODES:
        y = chain(*x, edges=edges, weights=weights)
        grads[chain.mode] = torch.autograd.grad(check.loss(y), (*x, weights, *chain.parameters()))
    for mode in ("checkpoint", "reversible"):
        for a, b in zip(grads[mode], grads["stored"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert [f.net.count[0] for block in blocks for f in block] == [1 + 1 + 1 + 2 + 2] * 3 * k


@pytest.mark.parametrize("blocks", [[], [[nn.ReLU()]], [[nn.ReLU()] * 2, [nn.ReLU()] * 3]])
def test_groups_of_no_one_size(blocks):
    with pytest.raises(StreamError, match="every block needs the same number of modules, at least 2"):
        from_groups(blocks)


class Block(nn.Module):
    """A ResNet's block: the skip connection inside, and an activation behind it."""

    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return torch.relu(x + self.f(x))


def test_momentum_network_is_its_formula(make):
    f = [make.net(4).double() for _ in range(3)]
    x = torch.randn(3, 4, dtype=torch.float64)
    y, v = x, torch.zeros_like(x)
    for one in f:
        v = 0.6 * v + 0.4 * one(y)
        y = y + v
    torch.testing.assert_close(momentum_from(f, 0.6, skip_inside=False, arithmetic="float")(x), y)
    y, v = x, torch.zeros_like(x)
    for one in f:
        v = 0.6 * v + 0.4 * (torch.relu(y + one(y)) - y)
        y = y + v
    blocks = nn.Sequential(*map(Block, f))
    torch.testing.assert_close(momentum_from(blocks, 0.6, skip_inside=True, arithmetic="float")(x), y)


@pytest.mark.parametrize("skip_inside", [True, False])
def test_without_momentum_it_is_the_stack_it_was_made_of(make, skip_inside):
    f = [make.net(4).double() for _ in range(4)]
    x = torch.randn(3, 4, dtype=torch.float64)
    if skip_inside:
        blocks = nn.Sequential(*map(Block, f))
        expected = blocks(x)
    else:
        blocks, expected = f, x
        for one in f:
            expected = expected + one(expected)
    network = momentum_from(blocks, 1e-9, skip_inside=skip_inside, mode="stored", arithmetic="float")
    torch.testing.assert_close(network(x), expected, rtol=1e-6, atol=1e-6)


def test_momentum_network_trains_the_blocks_own_parameters(make):
    blocks = nn.Sequential(*(Block(make.net(4)) for _ in range(3)))
    network = momentum_from(blocks, skip_inside=True)
    assert set(network.parameters()) == set(blocks.parameters())
    network(torch.randn(3, 4)).square().sum().backward()
    assert all(p.grad is not None for p in blocks.parameters())


@pytest.mark.parametrize("arithmetic", ["float", "exact"])
def test_gradients_of_a_momentum_network(make, check, arithmetic):
    network = momentum_from([make.net(4) for _ in range(8)], 0.8, skip_inside=False, arithmetic=arithmetic)
    x = torch.randn(3, 4, requires_grad=True)
    found = {}
    for mode in MODES:
        network.chain.mode = mode
        found[mode] = check.gradients(network, (x,))
    for mode in ("checkpoint", "reversible"):
        check.same(found[mode], found["stored"], rtol=1e-4 if arithmetic == "float" else 0)


def test_momentum_network_in_exact_arithmetic_starts_on_the_grid_by_itself(make):
    network = momentum_from([make.net(4)], skip_inside=False)
    assert isinstance(network, MomentumNetwork)
    assert network.chain.arithmetic == "auto"
    network(torch.randn(3, 4)).sum().backward()


class Told(nn.Module):
    """A block that is told how much to add."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, context):
        return x + context * self.net(x)


def test_blocks_are_told_what_the_network_is_told(make):
    network = momentum_from([Told(make.net(4)) for _ in range(3)], skip_inside=True).double()
    x, context = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True).unbind()
    found = {}
    for network.chain.mode in MODES:
        loss = network(x, context=context).square().sum()
        found[network.chain.mode] = torch.autograd.grad(loss, (x, context, *network.parameters()))
    for mode in ("checkpoint", "reversible"):
        for a, b in zip(found[mode], found["stored"], strict=True):
            torch.testing.assert_close(a, b)
    with pytest.raises(StreamError, match="no layer of the chain takes an argument 'contxt'"):
        network(x, contxt=context)


@pytest.mark.parametrize("mode", MODES)
def test_block_that_changes_the_shape(mode):
    network = momentum_from(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 5)), skip_inside=True, mode=mode)
    with pytest.raises(StreamError, match=r"Linear changes the shape from \(2, 4\) to \(2, 5\); leave blocks that do"):
        network(torch.zeros(2, 4))
    with pytest.raises(StreamError, match=r"a message of shape \(2, 5\), but the target stream 1 has shape \(2, 4\)"):
        momentum_from([nn.Linear(4, 5)], skip_inside=False, mode=mode)(torch.zeros(2, 4))


def test_no_blocks():
    with pytest.raises(StreamError, match="there are no blocks"):
        momentum_from([], skip_inside=True)


def test_groups_of_one_tensor(make):
    blocks = [[make.net(4) for _ in range(3)] for _ in range(2)]
    x = torch.randn(2, 12)
    y = from_groups(blocks, split_dim=1)(x)
    assert torch.equal(y, torch.cat(from_groups(blocks)(*x.chunk(3, 1)), 1))


@pytest.mark.parametrize(
    ("convert", "message"),
    [
        (lambda net: from_pairs([(net, net)], split=1), r"^from_pairs: there is no option 'split'; .* split_dim, mode"),
        (lambda net: from_groups([(net, net)], dim=1), r"^from_groups: there is no option 'dim'; .* split_dim, mode"),
        (lambda net: momentum_from([net], skip_inside=False, split_dim=1), r"^momentum_from: .*; there are mode"),
    ],
)
def test_options_that_a_chain_does_not_have(make, convert, message):
    with pytest.raises(TypeError, match=message):
        convert(make.net(4))


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (nn.Linear(4, 4), r"^momentum_from: a Linear is no sequence of blocks: .*model\.layer1"),
        ({"a": nn.Linear(4, 4)}, r"^momentum_from: block 0 is a str, not a module"),
    ],
)
def test_what_is_no_stack_of_blocks(blocks, message):
    with pytest.raises(StreamError, match=message):
        momentum_from(blocks, skip_inside=False)


def test_a_block_that_returns_no_tensor(make):
    class Two(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(StreamError, match=r"Two returns a tuple; a block must return a tensor"):
        momentum_from([Two()], skip_inside=True)(torch.randn(2, 4))


@pytest.mark.parametrize(
    "chain", [lambda f: from_groups([(f, f)]), lambda f: momentum_from([f], skip_inside=True).chain]
)
def test_what_a_converted_block_lacks_is_told(chain):
    class Edges(nn.Module):
        def forward(self, x, edge_index):
            return x

    with pytest.raises(TypeError) as caught:
        chain(Edges())(torch.randn(2, 4), torch.randn(2, 4))
    assert any("it also needs edge_index: chain(x, edge_index=...)" in note for note in caught.value.__notes__)
