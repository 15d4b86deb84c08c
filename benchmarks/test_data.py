"""Speed of generating Moving MNIST: `pytest benchmarks/test_data.py --benchmark-only`."""

import platform

import numpy as np
import pytest
import torch

from crevnet.data import DataConfig, train_batches

BATCH = 16


@pytest.fixture
def one_thread():
    """Measure one core, whatever the machine has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("num_digits", [1, 2, 3])
def test_generate_training_batches(benchmark, one_thread, num_digits):
    config = DataConfig(num_digits=num_digits, image_size=64, digit_size=28, frames=20)
    batch = benchmark(next, train_batches(config.build_train(), BATCH))
    assert batch.shape == (BATCH, 20, 1, 64, 64)
    benchmark.extra_info.update(
        batch_size=BATCH,
        config=str(config),
        torch=torch.__version__,
        numpy=np.__version__,
        machine=platform.machine(),
    )
    if benchmark.stats is not None:
        p20, median, p80 = np.percentile(benchmark.stats.stats.data, [20, 50, 80])
        benchmark.extra_info.update(
            sequences_per_second=BATCH / median, p20_ms=p20 * 1e3, median_ms=median * 1e3, p80_ms=p80 * 1e3
        )
        print(f"\n{num_digits} digits: {BATCH / median:.0f} sequences/s, {median * 1e3:.2f} ms per batch")
