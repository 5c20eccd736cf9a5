"""Caption: describe every tile, into the dataset `captions`.

example: python jobs/caption.py --recipe own_tiles --set source.uri=my_tiles --set caption.captioner=land_cover
"""

from urbanclip_ray.command_line import run_job

if __name__ == "__main__":
    run_job(__doc__, sections=["caption", "pixels"], stages=["captions"])
