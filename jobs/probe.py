"""Probe: predict every indicator from the vectors, beside the baselines, on every split.

example: python jobs/probe.py --recipe own_tiles --set source.uri=my_tiles --set probe.target=log
"""

from urbanclip_ray.command_line import run_job

if __name__ == "__main__":
    run_job(__doc__, sections=["probe"], stages=["probe"])
