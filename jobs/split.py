"""Split: give every tile its part in train, validation and test, into the dataset `splits`.

example: python jobs/split.py --recipe own_tiles --set source.uri=my_tiles --set split.block_km=3
"""

from urbanclip_ray.command_line import run_job

if __name__ == "__main__":
    run_job(__doc__, sections=["split"], stages=["splits"])
