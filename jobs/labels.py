"""Labels: gather indicators (the source's, a CSV's, rasters') of tiles that are ingested into the dataset `labels`.

example: python jobs/labels.py --recipe own_tiles --set source.kind=scene --set source.uri=scenes \
    --set 'labels.rasters={population: {uri: worldpop.tif, operation: sum}}'
"""

from urbanclip_ray.command_line import run_job

if __name__ == "__main__":
    run_job(__doc__, sections=["labels"], stages=["labels"])
