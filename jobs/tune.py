"""Tune: search loss weights, learning rate and other keys with Ray Tune; prints the trials, the best one and its test score.

example: python jobs/tune.py --recipe demo_search
         python jobs/tune.py --recipe own_tiles --set source.uri=my_tiles --set source.metadata=labels.csv \\
             --set 'tune.spaces=[loss_weights, optimisation, probe]' --set tune.sampler=tpe --set tune.max_minutes=120
         python jobs/tune.py --recipe own_tiles --set source.uri=my_tiles --set source.metadata=labels.csv \\
             --set 'tune.space={"train.lr": {"loguniform": [1e-4, 1e-3]}, "train.caption_weight": {"choice": [0.5, 1, 2]}}'

It makes what comes before pretraining where that is missing. The same command goes on with an interrupted search. The best
trial is a recipe file, which --recipe of every job takes.
"""

from urbanclip_ray.command_line import run_job

if __name__ == "__main__":
    run_job(__doc__, sections=["tune", "train", "embed", "probe", "resources"], stages=["search"])
