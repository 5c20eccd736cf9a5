"""Pretraining: shards, batches, the DeepSpeed engine, the loop, checkpoints and the launch on Ray Train."""
