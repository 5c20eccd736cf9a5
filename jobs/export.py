"""Export: tiles with their accepted sentences, as WebDataset shards or a Hugging Face dataset with a card.

example: python jobs/export.py --recipe own_tiles --set source.uri=my_tiles --format huggingface --licence CC-BY-4.0 \\
             --output s3://bucket/pairs

--no-pixels leaves the images out, for imagery that may not be shared: texts and the sha256 of each tile remain. The same
command goes on after an interruption. source.kind=webdataset and source.kind=huggingface read such folders again.
"""

from urbanclip_ray.command_line import run_export

if __name__ == "__main__":
    run_export(__doc__)
