"""What is measured on a CUDA device; skipped where there is none. See `README.md` beside this file."""
