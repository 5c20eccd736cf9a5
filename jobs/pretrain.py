"""Pretrain: train the CoCa model on Ray Train with DeepSpeed ZeRO; the same command resumes.

example: python jobs/pretrain.py --recipe own_tiles --set source.uri=my_tiles --set train.lr=5e-4
"""

from urbanclip_ray.command_line import run_job

if __name__ == "__main__":
    run_job(__doc__, sections=["model", "train", "pixels", "resources"], stages=["pretrain"])
