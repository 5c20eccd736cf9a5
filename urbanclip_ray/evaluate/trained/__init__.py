"""Baselines of the paper's table, trained on the same tiles as the pretraining and with its budget: one module an idea."""
