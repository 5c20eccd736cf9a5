"""Pairs out: tiles with their accepted sentences as WebDataset shards or a Hugging Face dataset. Sources take them in again."""
