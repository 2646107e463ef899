"""Compressed models on disk, in the formats of the libraries.

packing   a weight's codes in 32-bit words, as compressed-tensors, GPTQ and AWQ lay them
folder    a whole model as a Hugging Face folder, written and opened; start here
gguf_file a whole model as a file of llama.cpp
"""

from llmlab.compression.formats.folder import FORMATS, load, save
from llmlab.compression.formats.gguf_file import TYPES, save_gguf

__all__ = ["FORMATS", "TYPES", "load", "save", "save_gguf"]
