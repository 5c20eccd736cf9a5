"""Caption: describe every tile, into the dataset `captions`.

example: python jobs/caption.py --recipe own_tiles --set source.uri=my_tiles --set caption.captioner=land_cover

With a model (--set caption.captioner=transformers --set caption.model=..., or coca and a run), what is generated is kept in
<storage>/caption_store: --plan says how much is missing, --status how far a job is that runs or was stopped, --preview shows a
sample, and none of them makes the dataset. jobs/caption_store.py looks after the store itself.
"""

from typing import Any

from urbanclip_ray.command_line import Look, run_job


def preview(run: Any, limit: int | None) -> None:
    from urbanclip_ray.captioners.preview import NUM_TILES_SHOWN, preview_captions
    from urbanclip_ray.stages import caption_work

    print(f"preview: {preview_captions(caption_work(run), run.uri, limit or NUM_TILES_SHOWN)}")


def plan(run: Any, limit: int | None) -> None:
    from urbanclip_ray.captioners.plan import NUM_TIMED_TILES, plan_captions
    from urbanclip_ray.stages import caption_work

    print(plan_captions(caption_work(run), limit or NUM_TIMED_TILES))


def status(run: Any, limit: int | None) -> None:
    from urbanclip_ray.captioners.status import show_progress
    from urbanclip_ray.stages import caption_work

    show_progress(caption_work(run), limit)


if __name__ == "__main__":
    run_job(
        __doc__,
        sections=["caption", "pixels"],
        stages=["captions"],
        looks=[
            Look("--preview", "caption a sample (50 tiles) and write a contact sheet beside the run's datasets", preview),
            Look("--plan", "count tiles and captions, time a sample (16 tiles), and print what the rest would cost", plan),
            Look("--status", "say what is done, failed (why) and to do, how fast it goes, and how long it takes", status),
        ],
    )
