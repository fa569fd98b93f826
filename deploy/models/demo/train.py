"""Trains the built-in model and writes its folder: `python -m deploy.models.demo.train --out DIR`.

A fixed number of steps from one seed, on the CPU, in phases. The loss is on the answer only. In the first phase
most answers are cut short, because choosing the answer takes most of the training; a second head that names the group
of the question, on the last position of the prompt, speeds the choice up and is dropped after it. The later
phases teach to say the answers to their ends.
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
from deploy.models.demo.generate import UNRELATED_SHARE, Generator
from deploy.models.demo.llama import Llama
from deploy.models.demo.tokenizer import END_ID, USER_ID, train_tokenizer, write_tokenizer
from deploy.models.demo.warm_start import learn_bag, start_from
from deploy.models.llama_onnx import LlamaShape, TokenIds, write_llama

SHAPE = LlamaShape(hidden=256, layers=2, heads=4, kv_heads=4, head_dim=64, ffn=576, vocab=4000, context=1024)
LOGITS_DIFFERENCE_MAX = 1e-4  # between torch and the exported graph

TOKENIZER_QUESTIONS = 16_000


CHOOSING = AnswerShares(full=0.12, foreign=0.06)


@dataclass(frozen=True, slots=True)
class Saying:
    """A phase of the training that says whole answers. seed: added to the recipe's."""

    seed: int
    steps: int
    learning_rate: float
    shares: AnswerShares
    unrelated_share: float
    warmup_steps: int = 40
    embedding_rate_share: float = 0.5


# The second leans towards questions that have an answer. The model is the mean of what both leave, weighted by
# LAST_SHARE, which is better at either than the one or the other (Wortsman et al. 2022, "Model soups").
SAYING = (
    Saying(4, 500, 1.5e-3, AnswerShares(full=0.45, foreign=0.08), UNRELATED_SHARE),
    Saying(5, 520, 1.3e-3, AnswerShares(full=0.30, foreign=0.05), 0.26),
)
LAST_SHARE = 0.6


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a training does. Learning rates are the peaks of a cosine that warms up first."""

    seed: int = 7
    steps: int = 2500
    batch: int = 128
    learning_rate: float = 1.5e-3
    embedding_rate_share: float = 0.3  # embeddings start learned and should keep what they know
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
    batches = Batches(generator, tokenizer, groups, rng, recipe.batch, CHOOSING)
    print(f"{shape.parameter_count() / 1e6:.2f} million parameters, {len(groups)} groups", flush=True)
    start_from(learn_bag(batches, shape.vocab, shape.hidden, recipe.warm_start_questions), model, group_head)
    _choose(model, group_head, batches, recipe)
    left: list[dict[str, torch.Tensor]] = []
    for saying in SAYING:
        rng = random.Random(recipe.seed + saying.seed)
        generator = Generator(groups, load_unrelated(), load_synonyms(), rng, saying.unrelated_share)
        _say(model, Batches(generator, tokenizer, groups, rng, recipe.batch, saying.shares), recipe, saying)
        left.append({name: value.clone() for name, value in model.state_dict().items()})
    model.load_state_dict({name: torch.lerp(left[0][name], left[1][name], LAST_SHARE) for name in left[0]})

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


def _choose(model: Llama, group_head: nn.Linear, batches: Batches, recipe: Recipe) -> None:
    """The first phase."""
    parameters = [*model.parameters(), *group_head.parameters()]
    embeddings = model.model.embed_tokens.weight
    others = [parameter for parameter in parameters if parameter is not embeddings]
    shares = (recipe.embedding_rate_share, 1.0)
    optimizer = torch.optim.AdamW(
        [{"params": [embeddings]}, {"params": others}],
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


def _say(model: Llama, batches: Batches, recipe: Recipe, saying: Saying) -> None:
    """One of the later phases, with an optimiser of its own."""
    embeddings = model.model.embed_tokens.weight
    others = [parameter for parameter in model.parameters() if parameter is not embeddings]
    optimizer = torch.optim.AdamW(
        [{"params": [embeddings]}, {"params": others}],
        lr=saying.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    average = 0.0
    for step in range(saying.steps):
        progress = step / saying.steps
        rate = min(1.0, (step + 1) / saying.warmup_steps)
        rate *= 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))
        optimizer.param_groups[0]["lr"] = saying.learning_rate * rate * saying.embedding_rate_share
        optimizer.param_groups[1]["lr"] = saying.learning_rate * rate
        ids, targets, _, _ = batches.next()
        hidden = model(ids)
        counted = targets != IGNORED
        loss = functional.cross_entropy(model.logits(hidden[counted]), targets[counted])
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), recipe.gradient_norm_max)
        optimizer.step()
        optimizer.zero_grad()
        average += (loss.item() - average) / min(step + 1, 50)
        if (step + 1) % 50 == 0:
            print(f"saying, step {step + 1} of {saying.steps}: answer loss {average:.4f}", flush=True)


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
