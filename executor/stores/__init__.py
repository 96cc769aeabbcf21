"""Weights, KV cache and hidden states on their tiers."""
