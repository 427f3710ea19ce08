"""The toy world: the embedded default of the package, with a true reward that is known.

A small town (`world`), what people ask there (`questions`) and what is said (`grammar`), the true reward of what is
said (`reward`), annotators who err in known ways (`annotators`), answers that flatter or do not (`flattery`), data
sets (`data`) and a tiny language model
(`model/`, made by `python -m rlhf_nb.toy.build`). Importing this imports neither torch nor transformers.

Because the true reward is known, over-optimisation can be seen: a reward model fitted to the annotators' answers is
a flawed proxy. World, annotators and recipe are not tuned to the results obtained with them.
"""

from __future__ import annotations

from rlhf_nb.toy.annotators import Annotator
from rlhf_nb.toy.data import (
    DEFAULT_SIZES,
    candour_demonstrations,
    candour_pairs,
    dataset,
    demonstrations,
    held_out_prompts,
    is_held_out,
    pairs,
    prompts,
    rankings,
    thumbs,
)
from rlhf_nb.toy.recipe import COMPLETION_TOKENS, SFT_RECIPE, model_path
from rlhf_nb.toy.reward import quality_scores, true_reward

__all__ = [
    "COMPLETION_TOKENS",
    "DEFAULT_SIZES",
    "SFT_RECIPE",
    "Annotator",
    "candour_demonstrations",
    "candour_pairs",
    "dataset",
    "demonstrations",
    "held_out_prompts",
    "is_held_out",
    "model_path",
    "pairs",
    "prompts",
    "quality_scores",
    "rankings",
    "thumbs",
    "true_reward",
]
