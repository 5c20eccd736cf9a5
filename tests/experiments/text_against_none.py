"""Does text help? RSICD with its captions against the same image tower without text, judged on King County's unseen zipcodes.

    python tests/experiments/text_against_none.py --rsicd FOLDER --kingcounty FOLDER --storage runs/text_against_none

Three pretraining seeds of `coca_tiny_96`, each with its baselines (SimCLR, the image tower alone, PCA) on the same tiles and as
many samples; ablations with the first seed; five draws of the probe for all of them. Finished datasets are kept, so the same
command goes on, and text_against_none.json and .md beside this file hold what is finished so far.

Time on two cores with --epochs 3: 88 minutes with other work beside it, of which a pretraining 5, its two baselines with
gradients 11 to 15 side by side, embeddings and probes of a seed 5. --arms of all that the recipe has, and --probe-set
embed.views=8, take longer; what was made is kept.
"""

from __future__ import annotations

import json
from pathlib import Path

from options import add_seeds_and_changes, experiment_parser, rsicd_pretraining

from urbanclip_ray import apply_overrides, load_recipe
from urbanclip_ray.experiment import Experiment, markdown, run_experiment
from urbanclip_ray.storage import join

OUTPUT = Path(__file__).with_suffix(".json")
ARMS = ("without_contrastive", "without_caption", "paragraph")


def main() -> None:
    parser = experiment_parser(__doc__, num_epochs=3)
    add_seeds_and_changes(parser, str(OUTPUT))
    parser.add_argument("--arms", nargs="*", default=list(ARMS), help=f"ablations (default: {' '.join(ARMS)})")
    options = parser.parse_args()
    pretraining = rsicd_pretraining(options)
    probing = apply_overrides(
        load_recipe("kingcounty_probe"),
        [f"source.uri={options.kingcounty}", f"storage={options.storage}", "embed.views=1", *options.probe_set],
    )
    experiment = Experiment(pretraining, probing, tuple(options.arms), tuple(range(options.seeds)), num_arm_seeds=1)
    record = run_experiment(experiment, join(options.storage, "results"))
    Path(options.output).write_text(json.dumps(record, indent=1) + "\n")
    Path(options.output).with_suffix(".md").write_text(markdown(record))
    print(markdown(record))


if __name__ == "__main__":
    main()
