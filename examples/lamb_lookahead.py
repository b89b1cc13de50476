"""Train with LAMB inside Lookahead, then evaluate with the slow weights."""

import torch
from torch import nn
from torch.nn import functional

import optcpu
from optcpu.data import digits

train, test = digits().train, digits().test
model = nn.Sequential(nn.Flatten(), optcpu.FusedLinearReLU(64, 256), nn.Linear(256, 10))
optimizer = optcpu.Lookahead(optcpu.Lamb(model.parameters(), lr=2e-2), k=5, alpha=0.5)
model, optimizer = optcpu.optimize(model, optimizer)

for epoch in range(10):
    for batch in torch.randperm(len(train[0])).split(128):
        loss = functional.cross_entropy(model(train[0][batch]), train[1][batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with optimizer.slow_weights(), torch.no_grad():
        right = model(test[0]).argmax(1) == test[1]
    print(f"epoch {epoch}: loss {loss.item():.3f}, right {right.float().mean():.1%}")
