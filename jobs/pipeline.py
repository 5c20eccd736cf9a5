"""Pipeline: all stages of a recipe in order; what is complete and unchanged is kept.

example: python jobs/pipeline.py --recipe world_demo --storage runs
"""

from urbanclip_ray.command_line import run_job

if __name__ == "__main__":
    run_job(__doc__, sections=["source", "split", "train", "embed", "probe", "resources"], stages=None)
