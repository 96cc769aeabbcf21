"""Tiers of memory, their budgets, and what is really used."""
