import pytest
import torch

from benchmarks.gpu.operators import OPERATORS, Inputs, backward, outputs, with_gradients

BATCH = 2


@pytest.mark.parametrize("channels_last", [False, True], ids=["", "channels_last"])
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda o: o.name)
def test_plain_pytorch_computes_what_the_operator_does(operator, channels_last):
    leaves = operator.leaves(Inputs(BATCH, torch.float32, channels_last=channels_last))
    results = [outputs(f) for f in (operator.fused(*leaves, backend="reference"), operator.plain(*leaves))]
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert bool(with_gradients(results[0])) == operator.differentiable
    if operator.differentiable:
        grads = [torch.randn_like(t) for t in with_gradients(results[0])]
        for found, expected in zip(*(backward(result, leaves, grads) for result in results), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_inputs_have_the_shapes_of_crevnet():
    made = Inputs(BATCH, torch.bfloat16, channels_last=True)
    assert made.feature().shape == (BATCH, 32, 3, 8, 8)
    assert made.feature().is_contiguous(memory_format=torch.channels_last_3d)
    assert made.unfolded().shape == (BATCH, 8, 3, 16, 16)
    assert made.feature().dtype == torch.bfloat16
