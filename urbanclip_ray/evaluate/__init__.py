"""Embeddings, splits, probes, baselines, retrieval and the report."""
