"""Several machines: copies of a model, stages of a pipeline, and copies of pipelines."""
