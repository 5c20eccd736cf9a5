"""Embed: frozen image encoders (ours, baselines, embed.also) turn tiles into vectors; retrieval of held-out tiles is measured.

example: python jobs/embed.py --recipe own_tiles --set source.uri=my_tiles --set embed.views=8
"""

from urbanclip_ray.command_line import run_job

if __name__ == "__main__":
    run_job(__doc__, sections=["embed", "pixels"], stages=["embed"])
