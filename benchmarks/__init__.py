"""Benchmarks: `pytest benchmarks/ --benchmark-only` measures, prints tables and writes `benchmarks/results/`.

- `test_table1.py`: FLOPs and memory of the paper's table 1, counted on the real models.
- `test_engine.py`: the engine beside stored autograd, checkpointing and other reversible libraries.
- `test_training_memory.py`: memory of a training step in all modes, and its growth with depth; a sweep.
- `test_training_step.py`, `test_inference.py`: training and prediction beside plain PyTorch, in every mode; sweeps.
- `test_precision.py`, `test_adam.py`: a training step in bfloat16 on a CPU; Adam's step, fused and not; sweeps.
- `test_cpu_operators.py`, `test_convolution.py`: operators and convolutions on a CPU beside PyTorch's.
- `test_deep_chain.py`, `test_budget.py`: a chain of 1,000 layers; step time against a memory budget.
- `test_profile.py`: operators, bytes and CPU time of a training step, with and without fused kernels.
- `test_kernel_resources.py`: registers, spills and bytes of the compiled kernels.
- `test_residue.py`, `test_data.py`: residue against its bound; generating sequences, and waiting for them.
- `test_normalisation.py`, `test_scaling.py`: stability of training; growth with modules, frames, pixels; sweeps.
- `scale_out.py`: training on several GPUs, projected on paper: `python -m benchmarks.scale_out`.
- `compiled.py`: what `torch.compile` does to stored training on a CPU: `python -m benchmarks.compiled`.
- `record_run.py`: a training run put into the documentation: `python -m benchmarks.record_run RUN`.
- `gpu/`: what only a CUDA device can tell; left out unless it is named.

Each writes `NAME.json`, `NAME.md` and its pictures. Those marked `sweep` run with `--sweeps`. A run of some of the
benchmarks (`-k`) prints what it measured and leaves the written results alone.
"""
