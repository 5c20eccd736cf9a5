"""Leak: how well place alone predicts a source's labels, on random tiles and on blocks; needs labels, no imagery.

example: python jobs/leak.py --set source.kind=urbanclip --set source.release=released_files \\
             --set 'source.cities=[Beijing, Guangzhou]'

It prints the table with its definition and writes it as JSON, CSV and Markdown. Any source with labels and places will do.
"""

from urbanclip_ray.command_line import run_leak_table

if __name__ == "__main__":
    run_leak_table(__doc__)
