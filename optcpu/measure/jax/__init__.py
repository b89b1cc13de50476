"""JAX as a peer: a PyTorch model, exported and run operator by operator by ``jax.jit``."""
