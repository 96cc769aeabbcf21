"""Models in GGUF files: headers, configs and names of tensors. No torch."""
