"""Train a classifier with optcpu: the loop is PyTorch's own, with one line more."""

import torch
from torch import nn
from torch.nn import functional

import optcpu
from optcpu.data import digits

images, labels = digits().train
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

model, optimizer = optcpu.optimize(model, optimizer)

for epoch in range(10):
    for batch in torch.randperm(len(images)).split(128):
        loss = functional.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"epoch {epoch}: loss {loss.item():.3f}")
