"""Learns token embeddings with a bag of tokens before the transformer sees them.

A sum of embeddings and one linear layer, as fastText does it (Joulin et al. 2016), takes ten thousand questions a
second where the transformer takes two hundred, and learns which words belong together just as well.
"""

import torch
from torch import nn
from torch.nn import functional

from deploy.models.demo.batches import Batches

BATCH = 512
LEARNING_RATE = 0.05  # of the embeddings; the linear layer takes a quarter
WARMUP_STEPS = 50


def warm_embeddings(batches: Batches, vocab: int, hidden: int, questions: int) -> torch.Tensor:
    """Embeddings float32 [vocab, hidden] with mean 0 and standard deviation 1, learned from so many questions."""
    embeddings = nn.Embedding(vocab, hidden, sparse=True)
    nn.init.normal_(embeddings.weight, std=0.1)
    head = nn.Linear(hidden, batches.group_count)
    sparse = torch.optim.SparseAdam(embeddings.parameters(), lr=LEARNING_RATE)
    dense = torch.optim.Adam(head.parameters(), lr=LEARNING_RATE / 4)
    steps = questions // BATCH
    loss = torch.zeros(())
    for step in range(steps):
        rate = min(1.0, (step + 1) / WARMUP_STEPS) * (1 - step / steps)
        sparse.param_groups[0]["lr"] = LEARNING_RATE * rate
        dense.param_groups[0]["lr"] = LEARNING_RATE / 4 * rate
        bags, groups = batches.questions(BATCH)
        lengths = torch.tensor([len(bag) for bag in bags])
        tokens = torch.tensor([token for bag in bags for token in bag])
        sums = functional.embedding_bag(tokens, embeddings.weight, lengths.cumsum(0) - lengths, mode="sum", sparse=True)
        loss = functional.cross_entropy(head(sums * lengths[:, None] ** -0.5), groups)
        loss.backward()  # type: ignore[no-untyped-call]
        sparse.step()  # type: ignore[no-untyped-call]
        dense.step()
        sparse.zero_grad()
        dense.zero_grad()
    print(f"warm start: {steps * BATCH} questions, group loss {loss.item():.3f}", flush=True)
    learned = embeddings.weight.detach()
    return (learned - learned.mean(0)) / learned.std()
