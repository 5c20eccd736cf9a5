"""Experiment: a recipe and its ablations, several pretraining seeds each, probed on other tiles in one table with intervals.

example: python jobs/experiment.py --recipe rsicd_against_none --set source.uri=RSICD \\
             --probe-recipe kingcounty_probe --probe-set source.uri=KINGCOUNTY --storage runs

Baselines of the first recipe are trained with every seed, too. What is finished is kept: the same command goes on. An arm that
fails is a row with its error.
"""

from urbanclip_ray.command_line import run_experiment_job

if __name__ == "__main__":
    run_experiment_job(__doc__)
