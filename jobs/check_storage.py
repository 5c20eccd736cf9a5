"""Check storage: holds every dataset, checkpoint and caption part against its checksum, and names what is damaged.

example: python jobs/check_storage.py --storage s3://bucket/runs
         python jobs/check_storage.py --storage runs --run demo

It reads every byte, in Ray tasks, changes nothing, and ends with 1 where a file is damaged or missing. Runs may go on beside
it. What runs read in the meantime they check themselves: the seals of manifests, commits and caption parts, the checksums of a
checkpoint that is resumed, and of each page of a Parquet file.
"""

from urbanclip_ray.command_line import run_check_storage

if __name__ == "__main__":
    run_check_storage(__doc__)
