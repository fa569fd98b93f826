"""Starts the transformer as a bag-of-tokens classifier, so that choosing an answer need not be learned by slow steps.

A mean of embeddings and one linear layer, as fastText does it (Joulin et al. 2016), sees ten thousand questions a
second where the transformer sees two hundred. The first attention layer can compute that mean exactly: scores near
zero weigh all tokens alike, and values pass through unchanged. The bag therefore sees its embeddings as that layer
does, after RMS norm. One coordinate is the same for all tokens: it keeps the norm from levelling telling tokens and
empty ones. The bag fills all heads but the last, which is left free: a model whose heads all compute the mean learns to
begin the right answer and not to finish it, because nothing tells it where in the answer it is.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from deploy.models.demo.batches import Batches
from deploy.models.demo.llama import INITIAL_STD, Llama

BATCH = 512
LEARNING_RATE = 0.05  # of the embeddings; the linear layer takes a quarter
WARMUP_STEPS = 50
SHARED_COORDINATE = 16.0  # about the norm of a learned embedding, so that norms between 0 and twice that survive
MEAN_GAIN = 2.0  # how strongly the mean stands out of the residual stream


@dataclass(frozen=True, slots=True)
class Bag:
    """embeddings float32 [vocab, hidden], coordinate 0 shared; head turns the normed mean into groups."""

    embeddings: torch.Tensor
    head: nn.Linear


def learn_bag(batches: Batches, vocab: int, hidden: int, questions: int) -> Bag:
    embeddings = nn.Embedding(vocab, hidden, sparse=True)
    nn.init.normal_(embeddings.weight, std=0.1)
    head = nn.Linear(hidden, batches.group_count)
    sparse = torch.optim.SparseAdam(embeddings.parameters(), lr=LEARNING_RATE)
    dense = torch.optim.Adam(head.parameters(), lr=LEARNING_RATE / 4)
    steps = questions // BATCH
    loss = torch.zeros(())
    with torch.no_grad():
        embeddings.weight[:, 0] = SHARED_COORDINATE
    for step in range(steps):
        rate = min(1.0, (step + 1) / WARMUP_STEPS) * (1 - step / steps)
        sparse.param_groups[0]["lr"] = LEARNING_RATE * rate
        dense.param_groups[0]["lr"] = LEARNING_RATE / 4 * rate
        bags, groups = batches.questions(BATCH)
        lengths = torch.tensor([len(bag) for bag in bags])
        tokens = torch.tensor([token for bag in bags for token in bag])
        seen = functional.rms_norm(embeddings(tokens), (hidden,))
        sums = torch.zeros(len(bags), hidden).index_add(0, torch.repeat_interleave(lengths), seen)
        loss = functional.cross_entropy(head(_normed_mean(sums, lengths)), groups)
        loss.backward()  # type: ignore[no-untyped-call]
        sparse.step()  # type: ignore[no-untyped-call]
        dense.step()
        sparse.zero_grad()
        dense.zero_grad()
        with torch.no_grad():
            embeddings.weight[:, 0] = SHARED_COORDINATE
    print(f"warm start: {steps * BATCH} questions, group loss {loss.item():.3f}", flush=True)
    return Bag(embeddings.weight.detach(), head)


def start_from(bag: Bag, model: Llama, group_head: nn.Linear) -> None:
    """Overwrite the model's start so that group_head, put on its last hidden state, decides as the bag does. The bag is
    as wide as all heads but one."""
    shape, first = model.shape, model.model.layers[0].self_attn
    width = bag.embeddings.shape[1]
    assert width == (shape.heads - 1) * shape.head_dim, f"a bag of {width} coordinates for {shape}"
    with torch.no_grad():
        scale = INITIAL_STD / bag.embeddings[:, 1:].std()
        model.model.embed_tokens.weight[:, :width] = bag.embeddings * scale
        first.v_proj.weight[:width] = torch.eye(shape.hidden)[:width]
        first.o_proj.weight[:, :width] = torch.eye(shape.hidden)[:, :width] * MEAN_GAIN
        first.o_proj.weight[0, 0] = 0
        first.q_proj.weight[:width].mul_(0.1)
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(0.1)
        for layer in model.model.layers[1:]:
            layer.self_attn.o_proj.weight.mul_(0.1)
        group_head.weight.zero_()
        group_head.weight[:, :width] = bag.head.weight
        group_head.bias.copy_(bag.head.bias)


def chooser_of(model: Llama, group_head: nn.Linear) -> list[nn.Parameter]:
    """What start_from made: the parameters that know how to choose before the transformer's first step."""
    first = model.model.layers[0]
    return [
        model.model.embed_tokens.weight,
        first.input_layernorm.weight,
        *first.self_attn.parameters(),
        *group_head.parameters(),
    ]


def _normed_mean(sums: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    mean = sums / lengths[:, None]
    mean = torch.cat((torch.zeros(len(mean), 1), mean[:, 1:]), 1)
    return functional.rms_norm(mean, (mean.shape[1],))
