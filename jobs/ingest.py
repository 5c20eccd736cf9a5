"""Ingest: read the source's tiles and labels into the datasets `tiles` and `labels`.

example: python jobs/ingest.py --recipe own_tiles --set source.uri=my_tiles --set source.metadata=tiles.csv
"""

from urbanclip_ray.command_line import run_job

if __name__ == "__main__":
    run_job(__doc__, sections=["source", "ingest", "labels"], stages=["tiles", "labels"])
