"""Extend the pipeline with a pass of your own, and see how often it fired."""

import torch
from torch import fx, nn

import optcpu

sqrt, reciprocal, rsqrt = (
    getattr(torch.ops.aten, n).default for n in ("sqrt", "reciprocal", "rsqrt")
)


def one_over_root(graph: fx.Graph) -> int:
    """Replace ``reciprocal(sqrt(x))`` by ``rsqrt(x)``; return how often."""
    fired = 0
    for node in graph.find_nodes(op="call_function", target=reciprocal):
        if node.args[0].target is sqrt:
            node.args, node.target = node.args[0].args, rsqrt
            fired += 1
    graph.eliminate_dead_code()
    return fired


class RootMeanSquare(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x.square().mean(-1, keepdim=True).sqrt().reciprocal()


model = nn.Sequential(nn.Linear(64, 64), RootMeanSquare())
passes = [one_over_root, *optcpu.default_passes()]
print(optcpu.inspect(model, torch.randn(8, 64), passes=passes))
