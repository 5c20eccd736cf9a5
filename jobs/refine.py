"""Refine: keep or reject every sentence, with its reason, into the dataset `pairs`.

example: python jobs/refine.py --recipe own_tiles --set source.uri=my_tiles --set refine.max_words=40
"""

from urbanclip_ray.command_line import run_job

if __name__ == "__main__":
    run_job(__doc__, sections=["refine"], stages=["pairs"])
