"""Training data: datasets, the order of samples, micro-batches that can be gone on with."""
