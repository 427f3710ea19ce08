"""The words after `%rlhf`: one small parser a verb. Errors are one line and name the way out."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable
from typing import Any, NoReturn

from rlhf_nb import registry
from rlhf_nb.errors import SpecError, did_you_mean


class Words(argparse.ArgumentParser):
    """argparse that raises one line instead of printing usage and leaving."""

    def __init__(self, verb: str, about: str) -> None:
        super().__init__(prog=f"%rlhf {verb}", description=about, add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        hint = did_you_mean(unknown.split()[0], self.flags()) if unknown != message and unknown else ""
        usage = " ".join(self.format_usage().removeprefix("usage: ").split())
        raise SpecError(f"{self.prog.removeprefix('%rlhf ')}: {message}{hint}  usage: {usage}")

    def flags(self) -> list[str]:
        return [flag for action in self._actions for flag in action.option_strings]


def value(text: str) -> Any:
    """`0.1` is a number, `true` a bool, `[1, 2]` a list; anything else is the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def assignments(pairs: list[str] | None, verb: str) -> dict[str, Any]:
    """`["kl_coef=0.1", "seed=3"]` as a dict.

    Raises:
        SpecError: A word without `=`.
    """
    out: dict[str, Any] = {}
    for pair in pairs or []:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise SpecError(f'{verb}: "{pair}" is no assignment; write key=value, for example learning_rate=1e-4')
        out[key.strip()] = value(text.strip())
    return out


def _train(name: str) -> Callable[[], Words]:
    def make() -> Words:
        method = registry.methods.get(name)
        words = Words(name, f"{method.title}. Trains on {' or '.join((method.rows, *method.also))}.")
        words.add_argument("--policy", "--base", dest="policy", metavar="MODEL")
        words.add_argument("--data", "--prompts", dest="data", metavar="DATA")
        if method.needs_reward:
            words.add_argument("--reward", metavar="REWARD", help="what is optimised")
        words.add_argument("--gold", metavar="REWARD", help="only plotted")
        if "ptx_coef" in method.model_fields:
            words.add_argument("--pretraining", metavar="DATA", help="demonstrations that ptx_coef keeps up")
        words.add_argument("--adapter", choices=["lora"])
        words.add_argument("--launch", metavar="FLAGS", help="accelerate launch flags for this run")
        words.add_argument("--title", default="")
        words.add_argument(
            "--set", nargs="+", action="extend", metavar="key=value", help=", ".join(method.model_fields)
        )
        return words

    return make


def _make(verb: str, about: str, *arguments: tuple[tuple[str, ...], dict[str, Any]]) -> Callable[[], Words]:
    def make() -> Words:
        words = Words(verb, about)
        for names, options in arguments:
            words.add_argument(*names, **options)
        return words

    return make


def _arg(*names: str, **options: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    return names, options


_RUN = _arg("run", nargs="?", metavar="RUN", help="default: the last run")

_ENDPOINT = (
    _arg("--url", metavar="URL", help="an OpenAI-compatible address; --judge is the model's name there"),
    _arg("--token-env", default="", metavar="VARIABLE", help="environment variable that holds its token"),
)
_JOB = (
    _arg("--launch", metavar="FLAGS", help="accelerate launch flags for this run"),
    _arg("--title", default=""),
    _arg("--set", nargs="+", action="extend", metavar="key=value", help="the job's knobs: seed, ask, batch_size …"),
)

_VERBS: dict[str, Callable[[], Words]] = {
    "quickstart": _make("quickstart", "Copy the notebooks here.", _arg("directory", nargs="?", default=".")),
    "workspace": _make("workspace", "Use a directory or a database URL.", _arg("target", nargs="?")),
    "attach": _make(
        "attach",
        "Start or find the compute: local, server URL, kernel CONNECTION_FILE.",
        _arg("target", choices=["local", "server", "kernel"]),
        _arg("where", nargs="?", metavar="URL_OR_FILE"),
        _arg("--kernel", metavar="NAME", help="kernelspec on the server; default rlhf"),
        _arg("--token-env", metavar="VARIABLE", help="environment variable that holds the server's token"),
        _arg("--launch", default="", metavar="FLAGS", help="accelerate launch flags for every run"),
        _arg("--no-standby", action="store_true"),
        _arg("--replace", action="store_true"),
    ),
    "detach": _make("detach", "Let go of the attached compute; runs go on."),
    "import": _make(
        "import",
        "Read pairs, rankings, thumbs, prompts or demonstrations.",
        _arg("source", metavar="PATH_OR_HUB_ID"),
        _arg("--as", dest="name", required=True, metavar="NAME"),
        _arg("--kind", choices=["pairs", "rankings", "thumbs", "prompts", "demonstrations"]),
        _arg("--split", metavar="NAME", help="of a hub or saved data set; default train where there is one"),
    ),
    "label": _make(
        "label",
        "Label the pairs of a data set in this cell.",
        _arg("name", metavar="NAME"),
        _arg("--mode", choices=["pair"], default="pair"),
        _arg("--annotator", metavar="WHO"),
        _arg("--n", type=int, metavar="N", help="label only the first N pairs"),
    ),
    "evaluate": _make(
        "evaluate",
        "Accuracy of a reward model on pairs.",
        _arg("model", metavar="REWARD_MODEL"),
        _arg("--data", default="toy-pairs"),
    ),
    "generate": _make(
        "generate",
        "Completions of a model as a data set.",
        _arg("--policy", "--base", dest="policy", metavar="MODEL", required=True),
        _arg("--prompts", "--data", dest="prompts", metavar="DATA", required=True),
        _arg("--n", type=int, help="completions of each prompt; default 4"),
        _arg("--reward", metavar="REWARD", help="scores them"),
        _arg("--gold", metavar="REWARD", help="only noted beside"),
        _arg("--keep", choices=["all", "best", "best_and_worst", "threshold", "top_fraction"]),
        _arg("--launch", metavar="FLAGS", help="accelerate launch flags for this run"),
        _arg("--title", default=""),
        _arg("--set", nargs="+", action="extend", metavar="key=value", help="temperature, max_new_tokens, seed …"),
    ),
    "export": _make(
        "export",
        "Write a model to a directory that transformers and vLLM load; push it to the hub.",
        _arg("model", metavar="MODEL"),
        _arg("directory", nargs="?", metavar="DIRECTORY"),
        _arg("--adapter-only", action="store_true"),
        _arg("--base-only", action="store_true", help="with the adapter taken off"),
        _arg("--push", default="", metavar="OWNER/NAME"),
        _arg("--public", action="store_true", help="a repository that is made now is public"),
    ),
    "lineage": _make(
        "lineage",
        "What a model or data set was made from, back to rows and labels.",
        _arg("of", metavar="RUN_MODEL_OR_DATA"),
    ),
    "refit": _make(
        "refit",
        "Fit a reward model again, with its errors on a policy's completions added.",
        _arg("model", metavar="REWARD_RUN"),
        _arg("--scored", required=True, metavar="DATA", help="completions with the reward model's scores"),
        _arg("--labels", required=True, metavar="DATA_OR_ANNOTATOR", help="pairs or thumbs of these completions"),
        _arg("--set", nargs="+", action="extend", metavar="key=value", help="knobs that differ from the run's"),
    ),
    "judge": _make(
        "judge",
        "Label pairs with a judge, in both orders, as a data set.",
        _arg("data", metavar="DATA"),
        _arg("--judge", metavar="MODEL", required=True, help="a chat model, or toy-annotator"),
        *_ENDPOINT,
        _arg("--constitution", metavar="FILE", help="each pair under a principle drawn from it; toy-town is shipped"),
        _arg("--principle", default="", metavar="WORDS", help="one by name, or the question itself"),
        *_JOB,
    ),
    "constitutional": _make(
        "constitutional",
        "Demonstrations or pairs out of a model's own drafts, under a constitution.",
        _arg("--policy", "--base", dest="policy", metavar="MODEL", required=True),
        _arg("--prompts", "--data", dest="prompts", metavar="DATA", required=True),
        _arg("--constitution", metavar="FILE", required=True, help="toy-town is shipped"),
        _arg("--half", choices=["revisions", "preferences"], default="revisions", help="what for: SFT, or pairs"),
        _arg("--judge", metavar="MODEL", help="who criticises, revises or compares; default: the policy itself"),
        *_ENDPOINT,
        *_JOB,
    ),
    "iterate": _make(
        "iterate",
        "Rounds of sample, label, train: iterative DPO. Without --policy, go on with --name.",
        _arg("--name", metavar="NAME", default="", help="of an iteration that exists: go on with it"),
        _arg("--policy", "--base", dest="policy", metavar="MODEL"),
        _arg("--prompts", "--data", dest="prompts", metavar="DATA"),
        _arg("--reward", metavar="REWARD", help="orders the completions; without it or a judge people label"),
        _arg("--judge", metavar="MODEL", help="compares them: a chat model, or toy-annotator"),
        *_ENDPOINT,
        _arg("--constitution", metavar="FILE", help="of the judge"),
        _arg("--principle", default="", metavar="WORDS", help="of the judge"),
        _arg("--rounds", type=int, default=3),
        _arg("--n", type=int, help="completions of each prompt; 4 with a reward, 2 for people"),
        _arg("--prompts-per-round", type=int, metavar="N", help="default: all of them"),
        _arg("--method", choices=["dpo", "orpo", "simpo"], default="dpo"),
        _arg("--adapter", choices=["lora"]),
        _arg("--launch", metavar="FLAGS", help="accelerate launch flags for its runs"),
        _arg("--set", nargs="+", action="extend", metavar="key=value", help="knobs of the method"),
        _arg("--sampling", nargs="+", action="extend", metavar="key=value", help="temperature, max_new_tokens, seed …"),
    ),
    "models": _make("models", "Models that resolve by name."),
    "data": _make("data", "Data that resolves by name."),
    "runs": _make("runs", "Every run and its state."),
    "watch": _make("watch", "Show a run's live panel.", _RUN),
    "set": _make(
        "set",
        "Change a live coefficient.",
        _arg("run", metavar="RUN"),
        _arg("assignments", nargs="+", metavar="name=value"),
        _arg("--why", default=""),
    ),
    "preview": _make(
        "preview",
        "Where the run would settle with another kl_coef (beta of rloo); nothing is changed.",
        _arg("run", metavar="RUN"),
        _arg("assignments", nargs="+", metavar="kl_coef=value"),
        _arg("--prompts", type=int, default=8),
        _arg("--samples", type=int, default=16, help="completions of each prompt"),
    ),
    "pause": _make("pause", "Pause between optimizer steps.", _RUN),
    "resume": _make("resume", "Continue a paused run; restart a failed or stopped one from its checkpoint.", _RUN),
    "stop": _make("stop", "End after the current step and save the model.", _RUN),
    "checkpoint": _make("checkpoint", "Save a checkpoint.", _RUN),
    "wait": _make("wait", "Wait for the end; interrupting detaches.", _RUN, _arg("--timeout", type=float)),
    "sample": _make(
        "sample", "Completions of the policy as it is now.", _arg("run", metavar="RUN"), _arg("prompts", nargs="+")
    ),
}

CELL_VERBS = ("reward-function",)


def is_training(verb: str) -> bool:
    return verb in registry.methods and registry.methods.get(verb).trains


def training_verbs() -> list[str]:
    return [name for name in registry.methods.names() if is_training(name)]


def verbs() -> list[str]:
    return [*_VERBS, *training_verbs()]


def parser(verb: str) -> Words:
    """The parser of a verb.

    Raises:
        SpecError: No such verb; the message suggests the nearest.
    """
    if verb in _VERBS:
        return _VERBS[verb]()
    if is_training(verb):
        return _train(verb)()
    known = [*verbs(), *CELL_VERBS]
    raise SpecError(f'"{verb}" is no verb of %rlhf{did_you_mean(verb, known)}  verbs: {", ".join(known)}')


def split(line: str) -> list[str]:
    """Words of a line, quotes respected. A semicolon at its end is the notebook's: show no result.

    Raises:
        SpecError: A quote that is not closed.
    """
    try:
        return shlex.split(line.rstrip().removesuffix(";"))
    except ValueError as error:
        raise SpecError(f"%rlhf: {error}; close the quote") from None
