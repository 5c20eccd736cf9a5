"""Caption store: what it holds, fewer and larger files, and what can be removed.

example: python jobs/caption_store.py --storage s3://bucket/runs status
         python jobs/caption_store.py --storage runs compact
         python jobs/caption_store.py --storage runs clean            # lists only; --yes deletes

Every job that describes a batch of tiles adds a small file to <storage>/caption_store. From some thousands of them on, listing
and opening them is what a repeated job waits for: `compact` makes a few large ones of them. It may be run while jobs write and
read, and stopped at any time: every caption stays in some file. How far one run is says jobs/caption.py --status.
"""

from urbanclip_ray.command_line import run_caption_store

if __name__ == "__main__":
    run_caption_store(__doc__)
