"""The requests of lm-evaluation-harness, each list of them as one job."""
