"""Factors fitted to measured runs."""
