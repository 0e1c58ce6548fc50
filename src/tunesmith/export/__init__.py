"""A fine-tune in the forms that others read: quantized, GGUF, on a hub; a room for each."""
