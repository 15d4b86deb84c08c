"""Benchmarks: `pytest benchmarks/ --benchmark-only` measures, prints tables and writes `benchmarks/results/`.

- `test_training_memory.py`: memory of a training step, and how it grows with depth;
  writes `training_memory.json` and `.md`, and the picture `memory_against_depth.png`.
- `test_step_time.py`: time of a training step, reversible over stored; writes `step_time.json` and `.md`.
- `test_data.py`: speed of generating Moving MNIST; writes `moving_mnist.json` and `.md`.

A run of some of the benchmarks (`-k`) prints what it measured and leaves the written results alone.
"""
