"""All operators of recurrent cells: what they compute, and that the kernel computes what the reference does."""

import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from revgrad_kernels import cell_update, convlstm, hidden_output, stlstm_states
from revgrad_kernels.backend import BackendError
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.kernels.cases import DEVICE, LAYOUTS, SHAPES, TOLERANCES, arrange, assert_close, needs_triton

BACKENDS = ["reference", pytest.param("triton", marks=needs_triton)]
FUNCTIONS = [cell_update, hidden_output, convlstm, stlstm_states]
SUMMED = ("peephole", "bias", "memory_bias")


def new_cell(gates, cell):
    i, f, g = gates.chunk(3, dim=1)
    return torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)


def biased(gates, bias):
    return gates if bias is None else gates + bias.view(-1, *(1,) * (gates.ndim - 2))


def literal_cell_update(gates, cell, bias=None):
    return new_cell(biased(gates, bias), cell)


def literal_hidden_output(output_gate, update, added=None):
    return torch.sigmoid(output_gate if added is None else output_gate + added) * torch.tanh(update)


def literal_convlstm(gates, cell, peephole, bias=None):
    n = cell.shape[1]
    gates, o = biased(gates, bias).split([3 * n, n], dim=1)
    cell = new_cell(gates, cell)
    return torch.sigmoid(o + peephole * cell) * torch.tanh(cell), cell


def literal_stlstm_states(gates, memory_gates, cell, memory, bias=None, memory_bias=None):
    n = cell.shape[1]
    gates, o = biased(gates, bias).split([3 * n, n], dim=1)
    cell, memory = new_cell(gates, cell), new_cell(biased(memory_gates, memory_bias), memory)
    return cell, memory, torch.cat([cell, memory], dim=1), o


LITERAL = {
    cell_update: literal_cell_update,
    hidden_output: literal_hidden_output,
    convlstm: literal_convlstm,
    stlstm_states: literal_stlstm_states,
}


def inputs(function, shape, dtype=torch.float32, layout="contiguous", optional=True):
    """Random inputs by name, for cells of a shape; with biases, or the second summand, or without."""
    batch, channels, *size = shape
    cell, bias = {"cell": 1}, {"bias": 4}
    groups = {
        cell_update: {"gates": 3, "cell": 1, "bias": 3},
        hidden_output: {"output_gate": 1, "update": 1, "added": 1},
        convlstm: {"gates": 4} | cell | {"peephole": 1} | bias,
        stlstm_states: {"gates": 4, "memory_gates": 3} | cell | {"memory": 1} | bias | {"memory_bias": 3},
    }[function]
    shapes = {}
    for name, n in groups.items():
        if optional or not (name.endswith("bias") or name == "added"):
            whole = (batch, n * channels, *size)
            shapes[name] = whole[1:2] if name.endswith("bias") else whole[1:] if name == "peephole" else whole
    return {name: arrange(torch.randn(s, dtype=torch.float64).to(dtype), layout) for name, s in shapes.items()}


def registered(function):
    """The operator of a function, and that of its gradient."""
    module = importlib.import_module(f"revgrad_kernels.{function.__name__}")
    return getattr(module, f"_{function.__name__}"), getattr(module, f"_{function.__name__}_backward")


def results(function, tensors, grads=None, **options):
    """Outputs, and the gradients of the inputs by name."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    outputs = function(**leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if grads is None:
        generator = torch.Generator().manual_seed(1)
        grads = [torch.randn(y.shape, generator=generator).to(y.device, y.dtype) for y in outputs]
    pulled = torch.autograd.grad(outputs, list(leaves.values()), grads)
    return outputs, dict(zip(leaves, pulled, strict=True))


def assert_same(found, expected, tolerance, samples=1):
    for one, other in zip(found[0], expected[0], strict=True):
        assert_close(one, other, **tolerance)
    for name, other in expected[1].items():
        # A sum of many rounded terms: the tolerance grows with their number.
        more = {"rtol": 0, "atol": 8 * tolerance["atol"] * samples**0.5} if name in SUMMED else tolerance
        assert_close(found[1][name], other, **more)


@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 5), (2, 3, 3, 5), (2, 3, 2, 3, 5)], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-7), (torch.float64, 1e-15)], ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_values_and_gradients_are_those_of_the_formula(function, dtype, tolerance, shape, optional):
    tensors = inputs(function, shape, dtype, optional=optional)
    found, expected = results(function, tensors, backend="reference"), results(LITERAL[function], tensors)
    tolerance = {"rtol": 8 * tolerance, "atol": 8 * tolerance}
    assert_same(found, expected, tolerance, samples=60)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradcheck(function, backend):
    tensors = inputs(function, (2, 2, 2), torch.float64)
    leaves = [t.requires_grad_() for t in tensors.values()]
    assert torch.autograd.gradcheck(lambda *t: function(*t, backend=backend), leaves, fast_mode=backend == "triton")


@needs_triton
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_triton_computes_what_the_reference_does(function, dtype, shape, layout):
    tensors = inputs(function, shape, dtype, layout)
    found, expected = (results(function, tensors, backend=b) for b in ("triton", "reference"))
    tolerance = {k: 4 * v for k, v in TOLERANCES[dtype].items()}
    assert_same(found, expected, tolerance, samples=max(1, torch.Size(shape).numel() // shape[1]))


@needs_triton
@pytest.mark.parametrize("shape", [(2, 1, 3, 5), (2, 1, 2, 3, 5)], ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_one_channel_is_contiguous_and_channels_last_at_once(function, shape):
    tensors = inputs(function, shape, layout="channels_last")
    tensors |= {name: t.contiguous() for name, t in tensors.items() if t.shape == shape}
    found, expected = (results(function, tensors, backend=b) for b in ("triton", "reference"))
    assert_same(found, expected, {k: 4 * v for k, v in TOLERANCES[torch.float32].items()}, samples=60)
    torch.library.opcheck(registered(function)[0], tuple(t.requires_grad_() for t in tensors.values()))


@needs_triton
@given(
    st.sampled_from(FUNCTIONS),
    st.lists(st.integers(0, 9), min_size=2, max_size=5),
    st.sampled_from(LAYOUTS),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_triton_computes_what_the_reference_does_whatever_the_shape(function, shape, layout, optional, seed):
    torch.manual_seed(seed)
    tensors = inputs(function, shape, torch.float64, layout, optional)
    found, expected = (results(function, tensors, backend=b) for b in ("triton", "reference"))
    assert_same(found, expected, {"rtol": 1e-9, "atol": 1e-9})


@needs_triton
@pytest.mark.parametrize("function", FUNCTIONS)
def test_layouts_and_dtypes_may_be_mixed(function):
    tensors = inputs(function, (2, 3, 4, 5))
    for k, name in enumerate(tensors):
        dtype = (torch.float16, torch.float64, torch.float32)[k % 3]
        tensors[name] = arrange(tensors[name].to(dtype), LAYOUTS[(k + 1) % 3])
    found, expected = (results(function, tensors, backend=b) for b in ("triton", "reference"))
    for one, other in zip(found[0], expected[0], strict=True):
        assert_close(one, other)
    for name, one in found[1].items():
        # Sums of gradients that the operator has rounded to the dtype of the gates, here half precision.
        assert_close(one, expected[1][name], **({"rtol": 2e-3, "atol": 2e-3} if name in SUMMED else {}))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", [cell_update, convlstm, stlstm_states])
def test_a_bias_in_float64_counts_as_the_other_inputs_do(function, backend):
    tensors = inputs(function, (2, 3, 4))
    tensors |= {name: t.double() + 2**25 for name, t in tensors.items() if name.endswith("bias")}
    tensors |= {name: t - 2**25 for name, t in tensors.items() if name.endswith("gates")}
    found = results(function, tensors, backend=backend)[0]
    expected = results(function, {name: t.double() for name, t in tensors.items()}, backend="reference")[0]
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other.float())


@needs_triton
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 2e-14)], ids=str)
def test_tanh_of_the_kernels_is_exact_relative_to_its_value_also_near_zero(dtype, tolerance):
    size = 10 ** torch.linspace(-12, 1.5, 4001, dtype=torch.float64)
    g = torch.cat([-size, size, torch.tensor([0, 1e4, -1e4, torch.inf, -torch.inf])]).to(DEVICE, dtype)[None]
    opened, zero = torch.full_like(g, torch.inf), torch.zeros_like(g)
    new = cell_update(torch.cat([opened, zero, g], dim=1), zero, backend="triton")
    torch.testing.assert_close(new.double(), torch.tanh(g.double()), rtol=tolerance, atol=0)


@needs_triton
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("function", [cell_update, convlstm, stlstm_states])
def test_gradients_that_are_sums_are_the_same_bits_in_every_run(function, layout):
    tensors = inputs(function, (4, 7, 17, 13), layout=layout)
    first, second = (results(function, tensors, backend="triton")[1] for _ in range(2))
    for name in set(SUMMED) & set(first):
        assert torch.equal(first[name], second[name]), name


@needs_triton
@pytest.mark.parametrize("function", FUNCTIONS)
def test_kernels_save_their_inputs_only(function):
    tensors = {name: t.requires_grad_() for name, t in inputs(function, (2, 3, 4)).items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        function(**tensors, backend="triton")
    assert [t.data_ptr() for t in saved] == [t.data_ptr() for t in tensors.values()]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_with_and_without_gradients_bits_and_layout_are_the_same(function, optional, layout, backend):
    tensors = inputs(function, (2, 3, 3, 5, 7), layout=layout, optional=optional)
    copies = [t.clone() for t in tensors.values()]
    expected, _ = results(function, tensors, backend=backend)
    with torch.no_grad():
        found = function(**tensors, backend=backend)
    assert all(map(torch.equal, tensors.values(), copies))
    for one, other in zip(found if isinstance(found, tuple) else (found,), expected, strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gradients", [False, True])
def test_a_hidden_state_has_the_layout_of_the_update(gradients, dtype):
    gate, update = inputs(hidden_output, (2, 3, 5, 7), dtype, optional=False).values()
    update = update.contiguous(memory_format=torch.channels_last)
    with torch.set_grad_enabled(gradients):
        assert hidden_output(gate, update).stride() == update.stride()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_nothing_is_changed_in_place_and_gradients_can_be_asked_for_twice(function, backend):
    tensors = {name: t.requires_grad_() for name, t in inputs(function, (2, 3, 4)).items()}
    copies = [t.detach().clone() for t in tensors.values()]
    outputs = function(**tensors, backend=backend)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    values, grads = [y.detach().clone() for y in outputs], [torch.randn_like(y) for y in outputs]
    given_grads = [g.clone() for g in grads]
    leaves = list(tensors.values())
    first, second = (torch.autograd.grad(outputs, leaves, grads, retain_graph=True) for _ in range(2))
    for one, other in zip((*first, *leaves, *outputs, *grads), (*second, *copies, *values, *given_grads), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_have_the_dtype_of_the_states_also_under_autocast(backend):
    dtypes = {
        "gates": torch.bfloat16,
        "memory_gates": torch.bfloat16,
        "update": torch.bfloat16,
        "added": torch.bfloat16,
    }
    for function in FUNCTIONS:
        tensors = {name: t.to(dtypes.get(name, t.dtype)) for name, t in inputs(function, (2, 3, 4, 4)).items()}
        with torch.autocast(DEVICE, torch.bfloat16):
            outputs, grads = results(function, tensors, backend=backend)
        expected, _ = results(function, {name: t.float() for name, t in tensors.items()}, backend="reference")
        for found, wanted in zip(outputs, expected, strict=True):
            assert_close(found, wanted)
        assert {name: g.dtype for name, g in grads.items()} == {name: t.dtype for name, t in tensors.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_inputs_without_a_dense_layout(function, backend):
    tensors = inputs(function, (2, 3, 4, 5))
    tensors = {name: t if t.ndim == 1 else t[:1].expand_as(t) for name, t in tensors.items()}
    tensors = {
        name: t.mT.contiguous().mT if t.ndim == 4 and k % 2 else t for k, (name, t) in enumerate(tensors.items())
    }
    found, expected = results(function, tensors, backend=backend), results(LITERAL[function], tensors)
    assert_same(found, expected, TOLERANCES[torch.float32], samples=40)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("side", [4, 64])
def test_the_output_gate_of_an_st_lstm_can_be_added_to_in_place(side, backend):
    tensors = inputs(stlstm_states, (2, 2, side, side), optional=False)
    gates = tensors["gates"].requires_grad_() * 1.0
    before = gates.detach().clone()
    stlstm_states(**tensors | {"gates": gates}, backend=backend)[3].add_(1.0)
    assert torch.equal(gates, before)


@pytest.mark.parametrize("cell", [(2, 3, 5), (2, 2, 4), (1, 2, 5), (2,)])
def test_shapes_that_do_not_fit_are_named(cell):
    gates, cell = {3: torch.zeros(2, 6, 5), 4: torch.zeros(2, 8, 5)}, torch.zeros(cell)
    shape = rf"\({', ?'.join(map(str, cell.shape))},?\)"
    with pytest.raises(ValueError, match=rf"cell_update: gates \(2, 6, 5\) must have three times .* cell {shape}"):
        cell_update(gates[3], cell)
    with pytest.raises(ValueError, match=rf"convlstm: gates \(2, 8, 5\) must have four times .* cell {shape}"):
        convlstm(gates[4], cell, torch.zeros(2, 5))
    with pytest.raises(ValueError, match=rf"convlstm: peephole {shape} does not fit cell \(2, 2, 5\)"):
        convlstm(gates[4], torch.zeros(2, 2, 5), cell)
    with pytest.raises(ValueError, match=rf"stlstm_states: memory {shape} does not fit cell \(2, 2, 5\)"):
        stlstm_states(gates[4], gates[3], torch.zeros(2, 2, 5), cell)
    with pytest.raises(ValueError, match=r"stlstm_states: memory_gates \(2, 8, 5\) must have three times"):
        stlstm_states(gates[4], gates[4], torch.zeros(2, 2, 5), torch.zeros(2, 2, 5))
    with pytest.raises(ValueError, match=rf"hidden_output: shapes \(2, 6, 5\), {shape} differ"):
        hidden_output(gates[3], cell)
    with pytest.raises(ValueError, match=rf"hidden_output: shapes \(2, 6, 5\), \(2, 6, 5\), {shape} differ"):
        hidden_output(gates[3], gates[3], cell)


@pytest.mark.parametrize("size", [(4,), (1,), (6, 1)])
def test_a_bias_has_one_element_per_channel(size):
    bias, cell = torch.zeros(size), torch.zeros(2, 2, 5)
    with pytest.raises(ValueError, match=r"one element per channel of gates \(2, 6, 5\), got"):
        cell_update(torch.zeros(2, 6, 5), cell, bias)
    with pytest.raises(ValueError, match=r"one element per channel of memory_gates \(2, 6, 5\), got"):
        stlstm_states(torch.zeros(2, 8, 5), torch.zeros(2, 6, 5), cell, cell, None, bias)


def test_tensors_on_two_devices_are_refused():
    with pytest.raises(BackendError, match="one device, got cpu, meta"):
        cell_update(torch.zeros(2, 6, device="meta"), torch.zeros(2, 2))


@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_opcheck(function, layout, optional):
    operator, backward = registered(function)
    tensors = inputs(function, (2, 3, 4, 5), layout=layout, optional=optional)
    arguments = [t.requires_grad_() for t in tensors.values()]
    arguments += [None] * (len(operator._opoverload._schema.arguments) - len(arguments))
    torch.library.opcheck(operator, arguments)
    outputs = operator(*arguments)
    grads = [torch.randn_like(y) for y in (outputs if isinstance(outputs, tuple) else (outputs,))]
    torch.library.opcheck(backward, [t if t is None else t.detach() for t in (*arguments, *grads)])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_second_derivatives_exist_in_the_reference_and_are_refused_in_triton(function):
    leaves = [t.requires_grad_() for t in inputs(function, (2, 2, 1), torch.float64).values()]
    assert torch.autograd.gradgradcheck(lambda *t: function(*t, backend="reference"), leaves)
    outputs = registered(function)[0](*leaves)
    first = torch.autograd.grad(outputs[0].sum(), leaves[:1], create_graph=True)[0]
    with pytest.raises(BackendError, match=rf"revgrad::{function.__name__}_backward .* choose backend='reference'"):
        first.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_compiles_without_a_graph_break_and_exports(function, backend):
    class Half(torch.nn.Module):
        def forward(self, **tensors):
            return function(**{name: 2 * t for name, t in tensors.items()}, backend=backend)

    tensors = inputs(function, (2, 3, 4))
    compiled = torch.compile(Half(), backend="aot_eager", fullgraph=True)
    assert_same(results(compiled, tensors), results(Half(), tensors), TOLERANCES[torch.float32])
    exported = torch.export.export(Half(), (), tensors).module()(**tensors)
    for one, other in zip(exported, Half()(**tensors), strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_fake_tensors_of_a_gpu_take_the_operator_and_keep_the_layout(function):
    shapes = {name: t.shape for name, t in inputs(function, (2, 3, 4, 4)).items()}
    with FakeTensorMode(allow_non_fake_inputs=True), torch.profiler.profile() as profile:
        tensors = {name: torch.empty(s, device="cuda") for name, s in shapes.items()}
        outputs = function(
            **{k: t.to(memory_format=torch.channels_last) if t.ndim == 4 else t for k, t in tensors.items()}
        )
    for y in outputs if isinstance(outputs, tuple) else (outputs,):
        assert y.device.type == "cuda"
        assert y.is_contiguous(memory_format=torch.channels_last)
    assert f"revgrad::{function.__name__}" in {event.name for event in profile.events()}
    assert function(**{name: torch.empty(s, device="meta") for name, s in shapes.items()})[0].device.type == "meta"
