"""Report: one HTML page and one JSON file about a finished run.

example: python jobs/report.py --recipe own_tiles --set source.uri=my_tiles
"""

from urbanclip_ray.command_line import run_job

if __name__ == "__main__":
    run_job(__doc__, sections=[], stages=["report"])
