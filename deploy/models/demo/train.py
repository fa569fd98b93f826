"""Trains the built-in model and writes its folder: `python -m deploy.models.demo.train --out DIR`.

A fixed number of steps from one seed, on the CPU. The loss is on the answer only, and most answers are cut short,
because choosing the answer takes most of the training. A second head, on the last position of the prompt, names the
group of the question; it keeps the choice that the warm start brings and is dropped at the end.
"""

import argparse
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import nn
from torch.nn import functional

from deploy.models.demo.batches import IGNORED, AnswerShares, Batches, token_ids
from deploy.models.demo.corpus import FALLBACK, load_groups, load_synonyms, load_unrelated
from deploy.models.demo.generate import Generator
from deploy.models.demo.llama import Llama
from deploy.models.demo.tokenizer import END_ID, USER_ID, train_tokenizer, write_tokenizer
from deploy.models.demo.warm_start import chooser_of, learn_bag, start_from
from nodes.model_tools.llama_onnx import LlamaShape, TokenIds, write_llama

# Untied: a tied head pulls the embeddings away from what they know of questions, and learns to speak more slowly.
SHAPE = LlamaShape(
    hidden=256, layers=2, heads=4, kv_heads=4, head_dim=64, ffn=576, vocab=4000, context=1024, tied=False
)
LOGITS_DIFFERENCE_MAX = 1e-4  # between torch and the exported graph

TOKENIZER_QUESTIONS = 16_000
SHARES = AnswerShares(full=0.20, foreign=0.05)


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a training does. Learning rates are the peaks of a cosine that warms up first."""

    seed: int = 7
    steps: int = 2200
    batch: int = 128
    learning_rate: float = 3e-3
    chooser_rate_share: float = 0.15  # for what starts learned: at the full rate the first 300 steps undo it
    weight_decay: float = 0.05
    warmup_steps: int = 100
    gradient_norm_max: float = 1.0
    warm_start_questions: int = 600_000
    group_loss_weight: float = 1.0


def train(out: Path, recipe: Recipe, shape: LlamaShape = SHAPE, threads: int = 2) -> Path:
    """Train from nothing and write the folder. Returns out."""
    torch.set_num_threads(threads)
    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed)
    groups = load_groups()
    generator = Generator(groups, load_unrelated(), load_synonyms(), rng)
    texts = [group.answer for group in groups] * 8 + [FALLBACK] * 20
    texts += [generator.example().question for _ in range(TOKENIZER_QUESTIONS)]
    tokenizer = train_tokenizer(texts, shape.vocab)
    if tokenizer.get_vocab_size() != shape.vocab:
        raise ValueError(f"the corpus fills {tokenizer.get_vocab_size()} tokens of {shape.vocab}")

    model = Llama(shape)
    group_head = nn.Linear(shape.hidden, len(groups) + 1)
    batches = Batches(generator, tokenizer, groups, rng, recipe.batch, SHARES)
    print(f"{shape.parameter_count() / 1e6:.2f} million parameters, {len(groups)} groups", flush=True)
    width = (shape.heads - 1) * shape.head_dim
    start_from(learn_bag(batches, shape.vocab, width, recipe.warm_start_questions), model, group_head)
    _descend(model, group_head, batches, recipe)

    out.mkdir(parents=True, exist_ok=True)
    write_tokenizer(tokenizer, out, shape.context)
    weights = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    write_llama(out, shape, weights, TokenIds(bos=USER_ID, eos=END_ID, pad=END_ID))
    difference = logits_difference(model, out, token_ids(tokenizer, FALLBACK))
    print(f"the exported graph differs from torch by at most {difference:.1e} in a logit", flush=True)
    if difference > LOGITS_DIFFERENCE_MAX:
        raise AssertionError(f"logits differ by {difference}, more than {LOGITS_DIFFERENCE_MAX}")
    return out


def logits_difference(model: Llama, folder: Path, ids: list[int]) -> float:
    """Largest difference over all prefixes of ids between torch and the graph in folder."""
    with torch.no_grad():
        expected = model.eval().logits(model(torch.tensor([ids])))[0].numpy()
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    past = {
        entry.name: np.zeros((1, entry.shape[1], 0, entry.shape[3]), np.float32) for entry in session.get_inputs()[2:]
    }
    worst = 0.0
    for count in range(1, len(ids) + 1):
        feed = {"input_ids": np.array([ids[:count]]), "attention_mask": np.ones((1, count), np.int64), **past}
        (logits,) = session.run(["logits"], feed)
        worst = max(worst, float(np.abs(logits[0, 0] - expected[count - 1]).max()))
    return worst


def _descend(model: Llama, group_head: nn.Linear, batches: Batches, recipe: Recipe) -> None:
    parameters = [*model.parameters(), *group_head.parameters()]
    chooser = chooser_of(model, group_head)
    others = [parameter for parameter in parameters if all(parameter is not known for known in chooser)]
    shares = (recipe.chooser_rate_share, 1.0)
    optimizer = torch.optim.AdamW(
        [{"params": chooser}, {"params": others}],
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    began, cpu_began, tokens = time.monotonic(), time.process_time(), 0
    averages: tuple[float, float] = (0.0, 0.0)
    for step in range(recipe.steps):
        progress = step / recipe.steps
        rate = min(1.0, (step + 1) / recipe.warmup_steps) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))
        for settings, share in zip(optimizer.param_groups, shares, strict=True):
            settings["lr"] = recipe.learning_rate * rate * share
        ids, targets, last, groups = batches.next()
        hidden = model(ids)
        counted = targets != IGNORED
        answer_loss = functional.cross_entropy(model.logits(hidden[counted]), targets[counted])
        group_loss = functional.cross_entropy(
            group_head(hidden[torch.arange(len(last)), last]), groups, ignore_index=IGNORED
        )
        loss = answer_loss + recipe.group_loss_weight * group_loss
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, recipe.gradient_norm_max)
        optimizer.step()
        optimizer.zero_grad()
        tokens += ids.numel()
        averages = (
            averages[0] + (answer_loss.item() - averages[0]) / min(step + 1, 100),
            averages[1] + (group_loss.item() - averages[1]) / min(step + 1, 100),
        )
        if (step + 1) % 250 == 0 or step + 1 == recipe.steps:
            seconds, cpu = time.monotonic() - began, time.process_time() - cpu_began
            print(
                f"step {step + 1} of {recipe.steps}: answer loss {averages[0]:.4f}, group loss {averages[1]:.4f}, "
                f"{seconds:.0f} s, {cpu:.0f} CPU seconds, {(step + 1) / seconds:.1f} steps/s, "
                f"{tokens / seconds:.0f} tokens/s",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; it is made if missing")
    parser.add_argument("--steps", type=int, default=Recipe().steps)
    parser.add_argument("--seed", type=int, default=Recipe().seed)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    train(arguments.out, Recipe(seed=arguments.seed, steps=arguments.steps), threads=arguments.threads)


if __name__ == "__main__":
    main()
