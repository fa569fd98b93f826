"""The Llama that is trained, in plain torch. Its weights carry the names that nodes.model_tools.llama_onnx expects."""

import torch
from torch import nn
from torch.nn import functional

from nodes.model_tools.llama_onnx import LlamaShape, rotary_caches

INITIAL_STD = 0.03


class Llama(nn.Module):
    """Causal and right-padded: padding follows the text, so no position that counts ever sees it."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.shape = shape
        self.model = _Body(shape)
        if not shape.tied:
            self.lm_head = nn.Linear(shape.hidden, shape.vocab, bias=False)
        cos, sin = rotary_caches(shape)
        self.register_buffer("cos", torch.from_numpy(cos), persistent=False)
        self.register_buffer("sin", torch.from_numpy(sin), persistent=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=INITIAL_STD)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids int64 [batch, steps] to the normed last hidden states [batch, steps, hidden]."""
        stream: torch.Tensor = self.model.embed_tokens(ids)
        steps = ids.shape[1]
        cos, sin = self.cos[:steps], self.sin[:steps]
        for layer in self.model.layers:
            stream = layer(stream, cos, sin)
        normed: torch.Tensor = self.model.norm(stream)
        return normed

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [..., hidden] to logits [..., vocab]."""
        head = self.model.embed_tokens if self.shape.tied else self.lm_head
        return functional.linear(hidden, head.weight)


class _Body(nn.Module):
    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(_Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=shape.rms_eps)


class _Layer(nn.Module):
    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden, eps=shape.rms_eps)
        self.self_attn = _Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden, eps=shape.rms_eps)
        self.mlp = _GatedMlp(shape)

    def forward(self, stream: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        stream = stream + self.self_attn(self.input_layernorm(stream), cos, sin)
        gated: torch.Tensor = self.mlp(self.post_attention_layernorm(stream))
        return stream + gated


class _Attention(nn.Module):
    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self._head_dim = shape.head_dim
        self.q_proj = nn.Linear(shape.hidden, shape.heads * shape.head_dim, bias=False)
        self.k_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.v_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.o_proj = nn.Linear(shape.heads * shape.head_dim, shape.hidden, bias=False)

    def forward(self, normed: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        batch, steps, _ = normed.shape
        q, k, v = (
            project(normed).view(batch, steps, -1, self._head_dim).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = functional.scaled_dot_product_attention(
            _rotate(q, cos, sin), _rotate(k, cos, sin), v, is_causal=True, enable_gqa=True
        )
        out: torch.Tensor = self.o_proj(attended.transpose(1, 2).reshape(batch, steps, -1))
        return out


class _GatedMlp(nn.Module):
    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.down_proj = nn.Linear(shape.ffn, shape.hidden, bias=False)

    def forward(self, normed: torch.Tensor) -> torch.Tensor:
        down: torch.Tensor = self.down_proj(functional.silu(self.gate_proj(normed)) * self.up_proj(normed))
        return down


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, -1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)
