"""Writes a Llama's weights as GGUF, float32, and quantises that to Q4_0. Run by the peers environment.

`python -m tests.benchmark.engine.gguf_writer WEIGHTS.npz OUT.gguf [--q4 OUT_Q4.gguf]`. The archive holds the weights by
Hugging Face's names and `shape`, the fields of LlamaShape as JSON. llama.cpp rotates neighbouring pairs where these
weights rotate halves, so the rows of q and k are permuted, as llama.cpp's own converter does. All matrices become Q4_0,
embedding and head too: as many bits a weight as the int4 graph of the other contestants has.
"""

from __future__ import annotations

import argparse
import ctypes
import json
from typing import Any

import gguf
import llama_cpp
import numpy as np

LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OTHER_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    name = name.removesuffix(".weight")
    if name in OTHER_NAMES:
        return f"{OTHER_NAMES[name]}.weight"
    layer, _, part = name.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{LAYER_NAMES[part]}.weight"


def interleaved(weight: Any, heads: int) -> Any:
    """Rows of each head from halves [a0 a1 .. b0 b1 ..] to pairs [a0 b0 a1 b1 ..]. weight: [heads * head_dim, in]."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write(archive: str, out: str) -> None:
    with np.load(archive) as weights:
        shape = json.loads(str(weights["shape"]))
        writer = gguf.GGUFWriter(out, "llama")
        writer.add_context_length(shape["context"])
        writer.add_embedding_length(shape["hidden"])
        writer.add_block_count(shape["layers"])
        writer.add_feed_forward_length(shape["ffn"])
        writer.add_head_count(shape["heads"])
        writer.add_head_count_kv(shape["kv_heads"])
        writer.add_key_length(shape["head_dim"])
        writer.add_value_length(shape["head_dim"])
        writer.add_rope_dimension_count(shape["head_dim"])
        writer.add_rope_freq_base(shape["rope_theta"])
        writer.add_layer_norm_rms_eps(shape["rms_eps"])
        writer.add_vocab_size(shape["vocab"])
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        writer.add_tokenizer_model("no_vocab")
        for name in weights.files:
            if name == "shape":
                continue
            weight = weights[name]
            if name.endswith("q_proj.weight"):
                weight = interleaved(weight, shape["heads"])
            elif name.endswith("k_proj.weight"):
                weight = interleaved(weight, shape["kv_heads"])
            writer.add_tensor(gguf_name(name), np.ascontiguousarray(weight))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def quantise(source: str, target: str) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    params.pure = True
    if status := llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)):
        raise SystemExit(f"llama.cpp cannot quantise {source}: status {status}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive")
    parser.add_argument("out")
    parser.add_argument("--q4", help="the same weights in Q4_0")
    options = parser.parse_args()
    write(options.archive, options.out)
    if options.q4:
        quantise(options.out, options.q4)


if __name__ == "__main__":
    main()
