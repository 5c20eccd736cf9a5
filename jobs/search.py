"""Search: the tiles of a run that are nearest to a text, as a table and a contact sheet.

example: python jobs/search.py "a harbour with ships" --top 12 --recipe own_tiles --set source.uri=my_tiles
"""

from urbanclip_ray.command_line import run_search

if __name__ == "__main__":
    run_search(__doc__)
