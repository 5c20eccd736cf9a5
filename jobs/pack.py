"""Pack: shuffle tiles and sentences into the training files of the dataset `shards`; test tiles stay out.

example: python jobs/pack.py --recipe own_tiles --set source.uri=my_tiles
"""

from urbanclip_ray.command_line import run_job

if __name__ == "__main__":
    run_job(__doc__, sections=["pack"], stages=["shards"])
