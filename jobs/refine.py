"""Refine: keep or reject every sentence, with its reason, into the dataset `pairs`.

example: python jobs/refine.py --recipe own_tiles --set source.uri=my_tiles --set refine.max_words=40

For captions of a language model, --set 'refine.rules=[all]' switches on the rules of captioners/rules.yaml; or name some of
them.
--quality writes a page on what was kept and rejected.
"""

from typing import Any

from urbanclip_ray.command_line import Look, run_job


def quality(run: Any, _: int | None) -> None:
    from urbanclip_ray.evaluate.caption_quality import show_quality

    show_quality(run)


if __name__ == "__main__":
    look = Look("--quality", "write a page, JSON and CSV on the finished dataset beside the run's", quality, at_result=True)
    run_job(__doc__, sections=["refine"], stages=["pairs"], looks=[look])
