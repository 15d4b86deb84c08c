"""CrevNet video prediction, and all that it takes to train it, built on reversible autograd."""
