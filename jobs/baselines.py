"""Baselines: train the encoders to be compared with, on the same tiles and as many samples as the pretraining.

example: python jobs/baselines.py --recipe own_tiles --set source.uri=my_tiles --set 'baselines.names=[pca, simclr, image_only]'
"""

from urbanclip_ray.command_line import run_job

if __name__ == "__main__":
    run_job(__doc__, sections=["baselines", "train", "model", "pixels"], stages=["baselines"])
