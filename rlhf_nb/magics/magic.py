"""The magic function: a verb's words to one public call, and what it returns to the cell."""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rlhf_nb import workspace as workspaces
from rlhf_nb.errors import NotFoundError, RunFailedError, SpecError, UnavailableError, did_you_mean, first_fault
from rlhf_nb.magics import awaiting, parser

if TYPE_CHECKING:
    from rlhf_nb.protocol.spec import LoRA
    from rlhf_nb.run import Run
    from rlhf_nb.workspace import Workspace

_TOP = ("policy", "base", "data", "prompts", "reward", "gold", "pretraining", "adapter", "launch", "title")


class RlhfMagic:
    # `%rlhf?` reads `__doc__`. Making it imports every method's class, so it is made only then.
    __name__ = "rlhf"
    __doc__ = property(lambda self: help_text())

    def __call__(self, line: str, cell: str | None = None) -> Any:
        words = parser.split(line)
        if cell is not None:
            return _cell(words, cell)
        if not words:
            return workspaces.current().status()
        verb, rest = words[0], words[1:]
        if verb in parser.CELL_VERBS:
            raise SpecError(f"{verb} is a cell magic: write %%rlhf {verb} NAME, with the function below it")
        return call(verb, parser.parser(verb).parse_args(rest))

    async def wait(self, line: str) -> Any:
        """`%rlhf wait …`, awaited: see `awaiting.py`."""
        verb, *rest = parser.split(awaiting.expanded(line))
        args = parser.parser(verb).parse_args(rest)
        run = _run(workspaces.current(), args.run)
        await run.wait_async(args.timeout)
        return Lines([repr(run)[1:-1]])


def help_text() -> str:
    """What `%rlhf?` shows."""
    lines = ["RLHF that you steer while it runs.", "", "%rlhf      what is attached, which workspace, the runs"]
    for verb in parser.verbs():
        words = parser.parser(verb)
        usage = " ".join(words.format_usage().removeprefix("usage: ").split())
        lines.append(f"{usage}\n        {words.description}")
    lines += [
        "%%rlhf reward-function NAME\n        The cell's Python is the reward: def f(prompts, completions, **columns).",
        "%%rlhf METHOD\n        The cell's TOML is the configuration: policy, data, reward …, and the method's knobs.",
    ]
    return "\n".join(lines)


def call(verb: str, args: argparse.Namespace) -> Any:
    """Call the one public function that a verb stands for."""
    if verb == "workspace":
        return _workspace(args.target)
    if verb == "quickstart":
        from rlhf_nb.stages.quickstart import quickstart

        return quickstart(args.directory)
    ws = workspaces.current()
    if parser.is_training(verb):
        return _train(ws, verb, vars(args), parser.assignments(args.set, verb))
    return _CALLS[verb](ws, args)


def _workspace(target: str | None) -> Any:
    if target is not None:
        from rlhf_nb.workspace import Workspace

        workspaces.use(Workspace(target))
    return workspaces.current().status()


def _train(ws: Workspace, verb: str, words: dict[str, Any], knobs: dict[str, Any]) -> Run:
    from rlhf_nb import registry

    method = registry.methods.get(verb).create(**knobs)
    adapter = _adapter(verb, words.get("adapter"))
    run = ws.train(
        method,
        policy=words.get("policy"),
        data=words.get("data"),
        reward=words.get("reward"),
        gold=words.get("gold"),
        pretraining=words.get("pretraining"),
        adapter=adapter,
        launch=words.get("launch"),
        title=words.get("title") or "",
    )
    return _show(run)


def _adapter(verb: str, value: Any) -> LoRA | None:
    """What a line or a cell says of an adapter: nothing or false, "lora" or true, or a table of its knobs."""
    from pydantic import ValidationError

    from rlhf_nb.protocol.spec import LoRA

    if value is None or value is False:
        return None
    if value is True or value == "lora":
        return LoRA()
    if not isinstance(value, dict):
        raise SpecError(
            f'{verb}: adapter={value!r} is no adapter; write "lora", false, or a table [adapter] with r = 8'
        )
    try:
        return LoRA(**value)
    except ValidationError as error:
        (field, given, said), known = first_fault(error), list(LoRA.model_fields)
        if error.errors()[0]["type"] == "extra_forbidden":
            hint = did_you_mean(field, known)
            raise SpecError(f'{verb}: "{field}" is no knob of an adapter{hint}  known: {", ".join(known)}') from None
        raise SpecError(f"{verb}: adapter.{field}={given!r}: {said}") from None


def _show(run: Run) -> Run:
    """Show the panel now, also where the result is assigned; the returned handle then shows nothing more."""
    from rlhf_nb.ui import show

    show(run)
    run.shown_once()
    return run


def _attach(ws: Workspace, args: argparse.Namespace) -> Any:
    target: Any = "local"
    if args.target != "local":
        if not args.where:
            what = "a URL" if args.target == "server" else "a connection file"
            raise SpecError(f"attach {args.target}: needs {what}; %rlhf? shows the form")
        if args.target == "server":
            from rlhf_nb.compute.transports.server import Server

            extra = {"kernel": args.kernel} if args.kernel else {}
            extra |= {"token_env": args.token_env} if args.token_env else {}
            target = Server(args.where, **extra)
        else:
            from rlhf_nb.compute.transports.kernel_file import KernelFile

            target = KernelFile(args.where)
    return ws.attach(target, launch=args.launch, standby=not args.no_standby, replace=args.replace)


def _run(ws: Workspace, name: str | None) -> Run:
    if name is not None:
        return ws.run(name)
    ids = ws.run_ids()
    if not ids:
        raise NotFoundError("no run yet; %rlhf sft --base toy --data toy-demonstrations starts one")
    return ws.run(ids[-1])


def _begun(ws: Workspace, name: str, verb: str) -> Run:
    run = ws.run(name)
    if run.state == "waiting":
        raise UnavailableError(f"{verb}: {name} waits and has no policy yet; %rlhf {verb} answers once it runs")
    return run


def _set(ws: Workspace, args: argparse.Namespace) -> Any:
    run = ws.run(args.run)
    asked: dict[str, Any] = {}
    for name, number in parser.assignments(args.assignments, "set").items():
        if name.partition("/")[0] == "reward":
            asked[name] = number
        elif isinstance(number, bool) or not isinstance(number, (int, float)):
            raise SpecError(f"set: {name}={number!r} is no number; write for example {name}=0.1")
        else:
            asked[name] = float(number)
    # None of a line is sent before all of it is known to be right.
    for name, one in asked.items():
        run.check_set(name, one)
    pending = [run.set(name, one, why=args.why) for name, one in asked.items()]
    if (state := run.state) in ("paused", "waiting"):
        # Nothing comes into force before the run goes on or starts; the panel shows it as asked.
        then = "goes on" if state == "paused" else "runs"
        return Lines([f"{p.what} asked; in force when the run {then}" for p in pending])
    return Lines([str(p.wait()) for p in pending])


def _preview(ws: Workspace, args: argparse.Namespace) -> Any:
    run = _begun(ws, args.run, "preview")
    pending = [
        run.preview(name, value, prompts=args.prompts, samples=args.samples)
        for name, value in parser.assignments(args.assignments, "preview").items()
    ]
    found: list[Any] = [one.wait() for one in pending]
    first = found[0]
    lines = [f"now      {first.name} {first.now:<8.4g} reward {first.reward:7.3f}  KL {first.kl:6.2f} nats"]
    lines += [
        f"settles  {each.name} {one.value:<8.4g} reward {one.reward:7.3f}  KL {one.kl:6.2f} nats  "
        f"({one.effective:.1f} of {each.samples} completions a prompt carry it)"
        for each in found
        for one in each.predictions
    ]
    if first.gap is not None:
        lines.append(f"still to be gained at {first.now:g}: {first.gap:.3f}")
    return Lines(lines)


def _resume(ws: Workspace, args: argparse.Namespace) -> Any:
    run = _run(ws, args.run)
    restarted = run.resume()
    return _show(run) if restarted is run else _acknowledged(run, "resume", restarted)


def _acknowledged(run: Run, word: str, pending: Any) -> Any:
    try:
        step = pending.wait(timeout=30)
    except (TimeoutError, RunFailedError) as error:
        return Lines([str(error)])
    return Lines([f"{run.id}: {word} at step {step}"])


def _wait(ws: Workspace, args: argparse.Namespace) -> Any:
    return Lines([repr(_run(ws, args.run).wait(args.timeout))[1:-1]])


def _label(ws: Workspace, args: argparse.Namespace) -> Any:
    session = ws.label(args.name, mode=args.mode, annotator=args.annotator, n=args.n)
    from rlhf_nb.ui import show_labeller

    show_labeller(session)
    return None


def _sample(ws: Workspace, args: argparse.Namespace) -> Any:
    run = _begun(ws, args.run, "sample")
    answer = run.sample(*args.prompts).wait(timeout=120)
    lines = []
    for item in getattr(answer, "items", []):
        lines += [f"› {item.prompt}", f"  {item.completion}"]
        if item.reference_completion is not None:
            lines.append(f"  before: {item.reference_completion}")
    return Lines(lines)


class Lines:
    """A few plain lines as a result."""

    def __init__(self, lines: list[str]) -> None:
        self.lines = lines

    def __repr__(self) -> str:
        return "\n".join(self.lines)


def _evaluate(ws: Workspace, args: argparse.Namespace) -> Any:
    return ws.evaluate(args.model, data=args.data)


def _export(ws: Workspace, args: argparse.Namespace) -> Any:
    form = "adapter" if args.adapter_only else "base" if args.base_only else "merged"
    return ws.export(args.model, args.directory, form=form, push=args.push, private=not args.public)


def _knobs(args: argparse.Namespace, verb: str, *, flag: str = "set", also: tuple[str, ...] = ()) -> dict[str, Any]:
    """The key=value words of a line, each of them a setting that the line has no other place for.

    Args:
        also: Settings that may be given either way.
    """
    knobs = parser.assignments(getattr(args, flag), verb)
    for key in knobs:
        if key in vars(args) and key not in also:
            raise SpecError(f"{verb}: --{flag} {key}=...: {key} has its own place in the line; %rlhf? shows it")
    return knobs


def _generate(ws: Workspace, args: argparse.Namespace) -> Run:
    knobs = _knobs(args, "generate", also=("n", "keep"))
    knobs |= {"n": args.n} if args.n is not None else {}
    knobs |= {"keep": args.keep} if args.keep is not None else {}
    run = ws.generate(
        args.policy,
        prompts=args.prompts,
        reward=args.reward,
        gold=args.gold,
        launch=args.launch,
        title=args.title,
        **knobs,
    )
    return _show(run)


def _refit(ws: Workspace, args: argparse.Namespace) -> Run:
    knobs = _knobs(args, "refit")
    return _show(ws.refit(args.model, scored=args.scored, labels=args.labels, **knobs))


def _who(args: argparse.Namespace) -> Any:
    if args.url is not None:
        from rlhf_nb.protocol.spec import Endpoint

        if args.judge is None:
            raise SpecError("--url: the model's name there is missing; give --judge NAME")
        return Endpoint(url=args.url, model=args.judge, token_env=args.token_env)
    if args.token_env:
        raise SpecError("--token-env: it goes with --url, the address that asks for a token")
    return args.judge


def _judge(ws: Workspace, args: argparse.Namespace) -> Run:
    knobs = _knobs(args, "judge")
    who, by = _who(args), args.constitution
    more = {"principle": args.principle, "launch": args.launch, "title": args.title}
    return _show(ws.judge(args.data, judge=who, constitution=by, **more, **knobs))


def _constitutional(ws: Workspace, args: argparse.Namespace) -> Run:
    knobs = _knobs(args, "constitutional")
    more = {"half": args.half, "launch": args.launch, "title": args.title}
    made = ws.constitutional(
        args.policy, prompts=args.prompts, constitution=args.constitution, judge=_who(args), **more, **knobs
    )
    return _show(made)


def _iterate(ws: Workspace, args: argparse.Namespace) -> Any:
    from rlhf_nb import registry
    from rlhf_nb.protocol.spec import LoRA

    if args.policy is None:
        if not args.name:
            raise SpecError("iterate: no policy to start from; give --policy and --prompts, or --name to go on")
        found = ws.iteration(args.name).resume()
    else:
        found = ws.iterate(
            registry.methods.get(args.method).create(**parser.assignments(args.set, args.method)),
            policy=args.policy,
            prompts=args.prompts,
            reward=args.reward,
            judge=_who(args),
            constitution=args.constitution,
            principle=args.principle,
            rounds=args.rounds,
            n=args.n,
            prompts_per_round=args.prompts_per_round,
            adapter=LoRA() if args.adapter else None,
            launch=args.launch,
            name=args.name,
            **_knobs(args, "iterate", flag="sampling"),
        )
    if found.state == "labelling" and found.rows_are_there:
        from rlhf_nb.ui import show_labeller

        show_labeller(found.label())
    return found


def _pending(word: str) -> Callable[[Workspace, argparse.Namespace], Any]:
    def act(ws: Workspace, args: argparse.Namespace) -> Any:
        run = _run(ws, args.run)
        return _acknowledged(run, word, getattr(run, word)())

    return act


_CALLS: dict[str, Callable[[Any, argparse.Namespace], Any]] = {
    "attach": _attach,
    "detach": lambda ws, args: ws.detach(),
    "import": lambda ws, args: ws.import_data(args.source, name=args.name, kind=args.kind, split=args.split),
    "label": _label,
    "evaluate": _evaluate,
    "export": _export,
    "generate": _generate,
    "lineage": lambda ws, args: ws.lineage(args.of),
    "refit": _refit,
    "judge": _judge,
    "constitutional": _constitutional,
    "iterate": _iterate,
    "models": lambda ws, args: ws.models(),
    "data": lambda ws, args: ws.datasets(),
    "runs": lambda ws, args: ws.runs(),
    "watch": lambda ws, args: _show(_run(ws, args.run)),
    "set": _set,
    "preview": _preview,
    "pause": _pending("pause"),
    "resume": _resume,
    "stop": _pending("stop"),
    "checkpoint": _pending("checkpoint"),
    "wait": _wait,
    "sample": _sample,
}


def _cell(words: list[str], cell: str) -> Any:
    if not words:
        raise SpecError("%%rlhf: which one? %%rlhf reward-function NAME, or %%rlhf METHOD with TOML below it")
    verb, rest = words[0], words[1:]
    ws = workspaces.current()
    if verb == "reward-function":
        if len(rest) != 1 or not rest[0].replace("-", "_").isidentifier():
            raise SpecError("reward-function: give one name, letters and dashes: %%rlhf reward-function NAME")
        ws.reward_function(rest[0], cell)
        return Lines([f'reward "{rest[0]}" kept; use it with --reward {rest[0]}'])
    if not parser.is_training(verb):
        parser.parser(verb)
        raise SpecError(f"{verb} takes no cell; write %rlhf {verb} ... on one line")
    try:
        config = tomllib.loads(cell)
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"{verb}: the cell is not TOML: {error}") from None
    args = vars(parser.parser(verb).parse_args(rest))
    top = {key: config.pop(key) for key in _TOP if key in config}
    for key in ("title", "launch"):
        if not isinstance(top.get(key, ""), str):
            raise SpecError(f'{verb}: {key}={top[key]!r} is no text; write {key} = "..."')
    if "policy" in top and "base" in top:
        raise SpecError(f"{verb}: policy and base name the same model; give one of them")
    if "data" in top and "prompts" in top:
        raise SpecError(f"{verb}: data and prompts name the same rows; give one of them")
    if isinstance(top.get("adapter"), dict):
        # `--adapter lora` says no more than that there is one.
        args.pop("adapter", None)
    top["policy"] = top.pop("policy", None) or top.pop("base", None)
    top["data"] = top.pop("data", None) or top.pop("prompts", None)
    merged = {**top, **{key: given for key, given in args.items() if given}}
    return _train(ws, verb, merged, {**config, **parser.assignments(args.get("set"), verb)})
