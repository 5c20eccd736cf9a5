"""CoCa on open_clip: architecture, tokenizing, losses, weights in and out. Plain torch, rank-blind."""
