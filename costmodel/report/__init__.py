"""A policy, and perhaps its run, as one HTML file: pictures, tables, and no network."""
