"""Optimizers with BF16 state and an update at memory speed; usable alone in any PyTorch loop."""

from optcpu.optim.adam import Adam, AdamW
from optcpu.optim.lamb import Lamb
from optcpu.optim.lookahead import Lookahead
from optcpu.optim.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "Lamb", "Lookahead"]
