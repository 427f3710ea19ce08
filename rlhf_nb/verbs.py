"""The verbs, as methods of a workspace: each starts one stage and returns what it gives."""

# Every method's `self` is a Workspace, which inherits them: mypy wants a supertype of the class that holds them.
# mypy: disable-error-code="misc"

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_nb.protocol.spec import LoRA

if TYPE_CHECKING:
    from rlhf_nb.labelling.session import LabelSession
    from rlhf_nb.methods.base import Method
    from rlhf_nb.run import Run
    from rlhf_nb.stages.evaluate import Evaluation
    from rlhf_nb.stages.export import Exported
    from rlhf_nb.stages.iterate import Iteration
    from rlhf_nb.stages.lineage import Node
    from rlhf_nb.workspace import Workspace


class Verbs:
    """What one does in a workspace. The words are those of the magics."""

    def label(
        self: Workspace, name: str, *, mode: str = "pair", annotator: str | None = None, n: int | None = None
    ) -> LabelSession:
        """A labelling session over the pairs of a data set. `ws.dataset("NAME-labels")` gives the answers."""
        from rlhf_nb.stages.label import label

        return label(self, name, mode=mode, annotator=annotator, n=n)

    def train(
        self: Workspace,
        method: Method,
        *,
        policy: Any = None,
        base: Any = None,
        data: Any = None,
        prompts: Any = None,
        reward: Any = None,
        gold: Any = None,
        pretraining: Any = None,
        adapter: LoRA | None = None,
        launch: str | None = None,
        title: str = "",
    ) -> Run:
        """Start a run and return its handle at once.

        Args:
            method: `rl.SFT(...)`, `rl.PPO(...)` …
            policy, base: The model to train; a run, a name, a directory or a hub id. SFT and reward models say `base`.
            data, prompts: Rows; online methods say `prompts` and take those of any data set, or of several with their
                shares, `{"mine": 0.8, "toy-prompts": 0.2}`.
            reward: A reward-model run, a registered name or a function `f(prompts, completions, **columns)`; several
                as a list, or as a dict with their weights.
            gold: A reward that is plotted and never optimised.
            pretraining: Demonstrations whose likelihood `ptx_coef` keeps up.
            adapter: `rl.LoRA(...)` to train an adapter, None to train all weights.
            launch: `accelerate launch` flags for this run; default: the attach's.

        Raises:
            SpecError, NotFoundError, DataError: With the field, the value and the way out.
            AttachError: Nothing is attached.
        """
        from rlhf_nb.stages.train import train

        return train(
            self,
            method,
            policy=policy,
            base=base,
            data=data,
            prompts=prompts,
            reward=reward,
            gold=gold,
            pretraining=pretraining,
            adapter=adapter,
            launch=launch,
            title=title,
        )

    def evaluate(self: Workspace, model: Any, *, data: Any = "toy-pairs", timeout: float | None = None) -> Evaluation:
        """Accuracy of a reward model on pairs, with its interval and the pick-the-longer null beside it."""
        from rlhf_nb.stages.evaluate import evaluate

        return evaluate(self, model, data=data, timeout=timeout)

    def generate(
        self: Workspace,
        model: Any,
        *,
        prompts: Any,
        n: int = 4,
        reward: Any = None,
        gold: Any = None,
        launch: str | None = None,
        title: str = "",
        **settings: Any,
    ) -> Run:
        """Draw completions of prompts as a data set. Returns at once; the run is what `data=` of the next one takes.

        `run.wait().data` is the data set, its rows `prompt`, `completions` and, with a reward, `scores`. Killed at any
        moment it goes on with `run.resume()` and gives the same rows.

        Args:
            model: A run, a name, a directory or a hub id.
            prompts: Any data set; each of its prompts is completed `n` times.
            reward: What scores the completions, as `train` takes it; `run.fold.results` then tell what best-of-n would
                score for every n up to this one. gold: A second one, only noted beside.
            settings: `temperature`, `max_new_tokens`, `seed`, `batch_size`, `precision`, `rollout_backend`; and
                `keep`: "best" (demonstrations: best-of-n, rejection sampling), "best_and_worst" (pairs), "threshold"
                with `threshold=`, "top_fraction" with `fraction=`.
        """
        from rlhf_nb.stages.generate import generate

        return generate(
            self, model, prompts=prompts, n=n, reward=reward, gold=gold, launch=launch, title=title, **settings
        )

    def refit(
        self: Workspace, model: Any, *, scored: Any, labels: Any, per_prompt: int = 1, weight: float = 1.0, **knobs: Any
    ) -> Run:
        """Fit a reward model again, with the completions added that it scores high and fresh labels reject.

        Args:
            model: Its run.
            scored: Completions of a policy with this reward model's scores.
            labels: Pairs or thumbs of these completions; or a function `f(prompt, completion) -> bool`, or a simulated
                annotator's name, which then judges all of them.
            per_prompt: At most so many errors of a prompt, the largest first.
            weight: What an error counts against a row of the old data.
            knobs: Of the method, where they differ from the run's.

        Raises:
            DataError: No error is among the labels.
        """
        from rlhf_nb.stages.refit import refit

        return refit(self, model, scored=scored, labels=labels, per_prompt=per_prompt, weight=weight, **knobs)

    def judge(
        self: Workspace,
        data: Any,
        *,
        judge: Any,
        constitution: Any = None,
        principle: str = "",
        launch: str | None = None,
        title: str = "",
        **settings: Any,
    ) -> Run:
        """Label pairs with a judge, each in both orders, as a data set. Returns at once, as `generate` does.

        `run.wait().data` holds the pairs that it decides, each with its judge, prompt and principle; `run.fold.result`
        says how often it agrees with the labels that were there before, flips with the order, and fails to answer.

        Args:
            data: Pairs; their labels are set aside.
            judge: A chat model (a run, a name, a directory, a hub id), `rl.Endpoint(url, model=..., token_env=...)`, or
                "toy-annotator".
            constitution: A file, or the name of a shipped one; each pair is judged under a principle drawn from it.
            principle: One of the constitution's by name; without a constitution, the question itself.
            settings: `principles="each"`, `ask="reasons"`, `seed`, `batch_size`.
        """
        from rlhf_nb.stages.judge import judge as start

        return start(
            self,
            data,
            judge=judge,
            constitution=constitution,
            principle=principle,
            launch=launch,
            title=title,
            **settings,
        )

    def constitutional(
        self: Workspace,
        policy: Any,
        *,
        prompts: Any,
        constitution: Any,
        judge: Any = None,
        launch: str | None = None,
        title: str = "",
        **settings: Any,
    ) -> Run:
        """Demonstrations or pairs out of a model's own drafts, under a constitution. Returns at once.

        Args:
            policy: The model that drafts.
            constitution: A file, or the name of a shipped one.
            judge: Who criticises and revises, or compares, as for `judge`; the policy itself if None.
            settings: `half="revisions"` (demonstrations) or "preferences" (pairs), `rounds`, `temperature`,
                `max_new_tokens`, `ask`, `seed`, `batch_size`.
        """
        from rlhf_nb.stages.judge import constitutional

        return constitutional(
            self,
            policy,
            prompts=prompts,
            constitution=constitution,
            judge=judge,
            launch=launch,
            title=title,
            **settings,
        )

    def export(
        self: Workspace,
        model: Any,
        directory: str | Path | None = None,
        *,
        form: str = "merged",
        push: str = "",
        private: bool = True,
        timeout: float | None = None,
    ) -> Exported:
        """Write a model to a directory of the compute host that plain transformers and vLLM load, with a card.

        Args:
            form: "merged", the whole model; "adapter", the adapter alone with the name of its base; "base", the whole
                model with its adapter taken off.
            push: Hub repository, owner/name, to upload it to, with the token that the compute host has.
            private: Of a repository that is made now.
        """
        from rlhf_nb.stages.export import export

        return export(self, model, directory, form=form, push=push, private=private, timeout=timeout)

    def iterate(
        self: Workspace,
        method: Method,
        *,
        policy: Any,
        prompts: Any,
        rounds: int = 3,
        reward: Any = None,
        judge: Any = None,
        constitution: Any = None,
        principle: str = "",
        n: int | None = None,
        prompts_per_round: int | None = None,
        adapter: LoRA | None = None,
        launch: str | None = None,
        name: str = "",
        **sampling: Any,
    ) -> Iteration:
        """Rounds of sample, label and train, the policy of each the start and the reference of the next.

        Returns at once. With a reward or a judge all rounds are submitted, each run waiting for the one before. Without
        people label: `.wait()` comes back when a round's pairs are there, `.label()` asks, `.advance()` goes on.

        Args:
            method: One that trains on pairs: `rl.DPO(...)`, `rl.ORPO(...)`, `rl.SimPO(...)`.
            reward: Orders the completions: the best and the worst of `n` make a pair. judge: Compares them two by
                two, as `judge` does, under a `constitution` or `principle`. Neither: people compare them.
            n: Completions of each prompt; 4 with a reward, 2 for people.
            prompts_per_round: None uses all prompts in each round.
            name: Of an iteration that exists: goes on with it, where the settings are the same.
            sampling: `temperature`, `max_new_tokens`, `seed`, `batch_size`, as `generate` takes them.
        """
        from rlhf_nb.stages.iterate import iterate

        return iterate(
            self,
            method,
            policy=policy,
            prompts=prompts,
            rounds=rounds,
            reward=reward,
            judge=judge,
            constitution=constitution,
            principle=principle,
            n=n,
            prompts_per_round=prompts_per_round,
            adapter=adapter,
            launch=launch,
            name=name,
            **sampling,
        )

    def iteration(self: Workspace, name: str) -> Iteration:
        """An iteration by name, from any process."""
        from rlhf_nb.stages.iterate import iteration

        return iteration(self, name)

    def lineage(self: Workspace, of: Any) -> Node:
        """What a run, a model or a data set was made from, back to rows and labels. Prints as a tree.

        `.find(name)` gives a node of it, with its `.rows` or `.labels`.
        """
        from rlhf_nb.stages.lineage import lineage

        return lineage(self, of)
