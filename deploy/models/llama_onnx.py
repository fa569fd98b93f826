"""The Llama writer under the name that training uses; it is nodes.model_tools.llama_onnx."""

from nodes.model_tools.llama_onnx import Array, LlamaShape, TokenIds, rotary_caches, weight_shapes, write_llama

__all__ = ["Array", "LlamaShape", "TokenIds", "rotary_caches", "weight_shapes", "write_llama"]
