"""Report: one HTML page, JSON and CSV about a finished run, about the differences of two, or about a search.

example: python jobs/report.py --recipe own_tiles --set source.uri=my_tiles
         python jobs/report.py --storage runs --runs without_text own_tiles
         python jobs/report.py --storage runs --tune demo_search

With --runs FIRST SECOND (names in --storage, or URIs) it compares what two runs predicted on the same tiles and writes a page
beside the second. With --tune RUN it compares the trials of a search, which may still be running, and writes a page into the
folder of the search. --output says where else.
"""

from urbanclip_ray.command_line import run_report

if __name__ == "__main__":
    run_report(__doc__)
