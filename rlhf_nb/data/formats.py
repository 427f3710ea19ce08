"""What people's preference files look like, and how each becomes rows.

A format is a name, the kind of its rows, a test on one record and a conversion of one record. The first whose test most
of the leading records pass is taken for the whole source. A conversion raises `Drop` for a record that cannot become a
row: it is counted under its reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from rlhf_nb.data.rows import Row, is_messages

Record = Mapping[str, Any]

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"

_ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
_YES = {"true", "yes", "1", "good", "up", "+1", "thumbs_up", "desirable"}
_NO = {"false", "no", "0", "-1", "bad", "down", "thumbs_down", "undesirable"}


class Drop(Exception):
    """This record becomes no row; the message is the reason it is counted under."""


@dataclass(frozen=True)
class Format:
    """One shape of file."""

    name: str
    kind: str
    matches: Callable[[Record], bool]
    convert: Callable[[Record], Row]
    doubt: Callable[[Iterable[Record]], str] | None = None
    """Of all records together: why they cannot be read, and the way out; empty where they can."""


def detect(records: Iterable[Record]) -> list[Format]:
    """The formats whose test at least half of the first 20 records pass, best first."""
    sample = list(islice(records, 20))
    return [each for each in FORMATS if 2 * sum(map(each.matches, sample)) >= len(sample)]


def has(*columns: str) -> Callable[[Record], bool]:
    return lambda record: all(column in record for column in columns)


def rest(record: Record, *used: str) -> Row:
    """The columns a conversion did not use."""
    return {key: value for key, value in record.items() if key not in used}


def messages_of(value: Any) -> list[dict[str, str]]:
    """Chat messages from any of the usual spellings: role/content, from/value, role/text."""
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list) or not value:
        raise Drop("no messages")
    messages = []
    for each in value:
        if not isinstance(each, Mapping):
            raise Drop("a message is not an object")
        role = each.get("role", each.get("from"))
        content = next((each[key] for key in ("content", "value", "text") if key in each), None)
        if isinstance(content, list):  # the parts form of vision models
            if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
                raise Drop("a message holds more than text")
            content = "".join(part["text"] for part in content)
        if not isinstance(role, str) or not isinstance(content, str):
            raise Drop("a message has no role or no text")
        messages.append({"role": _ROLES.get(role.lower(), role), "content": content})
    return messages


def _looks_like_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and isinstance(value[0], Mapping)
        and bool({"role", "from"} & set(value[0]))
    )


def completion_of(value: Any, column: str) -> str:
    """A completion as text, from text or from one assistant message."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if value is None:
        raise Drop(f"no {column}")
    if not isinstance(value, list | Mapping):
        raise Drop(f"{column} is not text")
    messages = messages_of(value)
    if len(messages) != 1:
        raise Drop(f"{column} is several messages")
    if messages[0]["role"] != "assistant":
        raise Drop(f"{column} is not the assistant's")
    return messages[0]["content"]


def _prompt_of(value: Any) -> Any:
    return messages_of(value) if _looks_like_messages(value) else value


def _until_last_assistant(messages: list[dict[str, str]]) -> tuple[list[dict[str, str]], str]:
    if messages[-1]["role"] != "assistant":
        raise Drop("the last message is not the assistant's")
    if len(messages) == 1:
        raise Drop("no prompt before the completion")
    return messages[:-1], messages[-1]["content"]


def _instruction(record: Record) -> str:
    """Alpaca's instruction and optional input."""
    parts = [record.get(key) for key in ("instruction", "input")]
    return "\n\n".join(part for part in parts if isinstance(part, str) and part.strip())


# Pairs


def _explicit_pairs(record: Record) -> Row:
    prompt = _prompt_of(record["prompt"])
    chosen, rejected = record["chosen"], record["rejected"]
    if all(_looks_like_messages(side) and len(side) > 1 for side in (chosen, rejected)):
        # The prompt is repeated inside both conversations; the messages say more than the text beside them.
        row = _implicit_conversations(record)
        return {
            "prompt": row["prompt"],
            "chosen": row["chosen"],
            "rejected": row["rejected"],
            **rest(row, *row.keys() & _PAIR),
        }
    sides = {"chosen": completion_of(chosen, "chosen"), "rejected": completion_of(rejected, "rejected")}
    if isinstance(prompt, str) and _looks_like_messages(chosen):
        prompt = [{"role": "user", "content": prompt}]
    return {"prompt": prompt, **sides, **rest(record, *_PAIR)}


_PAIR = {"prompt", "chosen", "rejected"}


def _transcripts(record: Record) -> Row:
    """Anthropic's HH form. `prompt + chosen` is the original text, to the character."""
    chosen, rejected = _texts(record)
    if chosen.strip() == rejected.strip():
        raise Drop("identical chosen and rejected")
    heads, tails = [], []
    for text in (chosen, rejected):
        head, turn, tail = text.rpartition(ASSISTANT)
        if not turn:
            raise Drop("no Assistant turn")
        if HUMAN in tail:
            raise Drop("the last turn is not the Assistant's")
        heads.append(head + turn)
        tails.append(tail)
    if heads[0] != heads[1]:
        raise Drop("the two transcripts part before the last turn")
    return {"prompt": heads[0], "chosen": tails[0], "rejected": tails[1], **rest(record, "chosen", "rejected")}


def _implicit_texts(record: Record) -> Row:
    """TRL's implicit prompt: what both texts begin with. Never cut inside a word, where TRL would."""
    chosen, rejected = _texts(record)
    if chosen.strip() == rejected.strip():
        raise Drop("identical chosen and rejected")
    shorter = min(len(chosen), len(rejected))
    cut = next((at for at in range(shorter) if chosen[at] != rejected[at]), shorter)
    sides = (chosen, rejected)
    # A side that ends exactly here is at a border; otherwise go back while a letter would be parted from its word.
    while cut and any(cut < len(s) and s[cut].isalnum() for s in sides) and chosen[cut - 1].isalnum():
        cut -= 1
    if cut and chosen[cut - 1] == " ":
        cut -= 1
    if not chosen[:cut].strip():
        raise Drop("no common prompt")
    return {
        "prompt": chosen[:cut],
        "chosen": chosen[cut:],
        "rejected": rejected[cut:],
        **rest(record, "chosen", "rejected"),
    }


def _texts(record: Record) -> tuple[str, str]:
    for column in ("chosen", "rejected"):
        if not isinstance(record.get(column), str):
            raise Drop(f"no {column}" if record.get(column) is None else f"{column} is not text")
    return record["chosen"], record["rejected"]


def _implicit_conversations(record: Record) -> Row:
    chosen, rejected = messages_of(record["chosen"]), messages_of(record["rejected"])
    if chosen == rejected:
        raise Drop("identical chosen and rejected")
    (prompt, good), (other, bad) = _until_last_assistant(chosen), _until_last_assistant(rejected)
    if prompt != other:
        raise Drop("the two conversations part before the last message")
    return {"prompt": prompt, "chosen": good, "rejected": bad, **rest(record, "prompt", "chosen", "rejected")}


def _sharegpt_pairs(record: Record) -> Row:
    column = "conversations" if "conversations" in record else "messages"
    prompt = messages_of(record[column])
    if isinstance(record.get("system"), str) and record["system"].strip():
        prompt = [{"role": "system", "content": record["system"]}, *prompt]
    sides = {side: completion_of(record[side], side) for side in ("chosen", "rejected")}
    return {"prompt": prompt, **sides, **rest(record, column, "system", "chosen", "rejected")}


def _alpaca_pairs(record: Record) -> Row:
    sides = {side: completion_of(record[side], side) for side in ("chosen", "rejected")}
    return {"prompt": _instruction(record), **sides, **rest(record, "instruction", "input", "chosen", "rejected")}


def _voted_pairs(record: Record) -> Row:
    """PandaLM: annotators say 0 (tie), 1 or 2; the majority wins."""
    votes = Counter(str(value) for key, value in record.items() if key.startswith("annotator") and value is not None)
    ahead = votes["1"] - votes["2"]
    top = max(votes.values(), default=0)
    if ahead == 0 or votes["0"] == top:
        raise Drop("the annotators' majority is a tie")
    good, bad = ("response1", "response2") if ahead > 0 else ("response2", "response1")
    extra = rest(record, "instruction", "input", "response1", "response2")
    sides = {"chosen": completion_of(record[good], "chosen"), "rejected": completion_of(record[bad], "rejected")}
    return {"prompt": _instruction(record), **sides, **extra}


def _judged_pairs(prompt: str, first: str, second: str, verdict: str) -> Callable[[Record], Row]:
    def convert(record: Record) -> Row:
        side = _side(record[verdict], first, second)
        if side not in (first, second):
            raise Drop(side or f"{verdict} is neither side")
        good, bad = (first, second) if side == first else (second, first)
        extra = rest(record, prompt, first, second)
        sides = {"chosen": completion_of(record[good], "chosen"), "rejected": completion_of(record[bad], "rejected")}
        return {"prompt": record[prompt], **sides, **extra}

    return convert


def _side(value: Any, first: str, second: str) -> str:
    """The column that a verdict prefers, "a tie", or nothing."""
    # A column of numbers with a gap in it is read as 1.0 and 2.0.
    said = str(value).strip().lower().removesuffix(".0")
    if said in ("1", "a", first) or said.startswith("a-is-"):
        return first
    if said in ("2", "b", second) or said.startswith("b-is-"):
        return second
    return "a tie" if "tie" in said or said in ("0", "both") else ""


def _counted_from_zero(first: str, second: str, verdict: str) -> Callable[[Iterable[Record]], str]:
    """0 is a tie beside 1 and 2, and beside 1 alone more likely the first: then 1 must not be read as the first."""

    def doubt(records: Iterable[Record]) -> str:
        said = {str(record.get(verdict)).strip().lower().removesuffix(".0") for record in records}
        if "0" not in said or any(_side(each, first, second) in (first, second) for each in said - {"1"}):
            return ""
        return (
            f"{verdict} holds {' and '.join(sorted(said & {'0', '1'}))} and never 2, so that 0 may be a tie or the "
            f"first side; write a or b there (or 1, 2, and 0 for a tie), then import again"
        )

    return doubt


# Rankings, thumbs, demonstrations, prompts


def _rankings(record: Record) -> Row:
    completions = [completion_of(each, "a completion") for each in record["completions"] or ()]
    row = {"prompt": _prompt_of(record["prompt"]), "completions": completions, "ranks": record["ranks"]}
    return {**row, **rest(record, *row)}


def _sampled(record: Record) -> Row:
    row = {"prompt": _prompt_of(record["prompt"]), "completions": record["completions"]}
    return {**row, **rest(record, *row)}


def _tree_rankings(record: Record) -> Row:
    """OpenAssistant: replies to one message, rank 0 the best. What else is known of a reply is kept in `details`."""
    ranked = [each for each in record["responses"] or () if isinstance(each, Mapping) and each.get("rank") is not None]
    if len(ranked) < 2:
        raise Drop("fewer than 2 ranked responses")
    details = [rest(each, "rank", "text") for each in ranked]
    row = {
        "prompt": messages_of(record["messages"]),
        "completions": [each.get("text") for each in ranked],
        "ranks": [each["rank"] for each in ranked],
        **rest(record, "messages", "responses"),
    }
    return {**row, "details": details} if any(details) else row


def _label(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    said = str(value).strip().lower().removesuffix(".0")
    if said in _YES:
        return True
    if said in _NO:
        return False
    raise Drop("label is not true or false")


def _thumbs(record: Record) -> Row:
    prompt = _prompt_of(record["prompt"])
    completion = completion_of(record["completion"], "completion")
    return {"prompt": prompt, "completion": completion, "label": _label(record["label"]), **rest(record, *_THUMB)}


_THUMB = ("prompt", "completion", "label")


def _chat_thumbs(messages: str, label: str) -> Callable[[Record], Row]:
    def convert(record: Record) -> Row:
        prompt, completion = _until_last_assistant(messages_of(record[messages]))
        return {
            "prompt": prompt,
            "completion": completion,
            "label": _label(record[label]),
            **rest(record, messages, label),
        }

    return convert


def _demonstrations(prompt: str, completion: str) -> Callable[[Record], Row]:
    def convert(record: Record) -> Row:
        row = {"prompt": _prompt_of(record[prompt]), "completion": completion_of(record[completion], "completion")}
        return {**row, **rest(record, prompt, completion)}

    return convert


def _alpaca(completion: str) -> Callable[[Record], Row]:
    def convert(record: Record) -> Row:
        row = {"prompt": _instruction(record), "completion": completion_of(record[completion], "completion")}
        return {**row, **rest(record, "instruction", "input", completion)}

    return convert


def _worked_answers(record: Record) -> Row:
    """GSM8K: the answer is a demonstration, and what a verifier reads when only the question serves as a prompt."""
    return {**_demonstrations("question", "answer")(record), "answer": record["answer"]}


def _seed_tasks(record: Record) -> Row:
    """Self-Instruct: one instruction, a list of instances; the first counts."""
    instances = record["instances"]
    if not instances:
        raise Drop("no instances")
    prompt = _instruction({"instruction": record["instruction"], "input": instances[0].get("input")})
    return {"prompt": prompt, "completion": instances[0].get("output"), **rest(record, "instruction", "instances")}


def _chat_demonstrations(messages: str) -> Callable[[Record], Row]:
    def convert(record: Record) -> Row:
        prompt, completion = _until_last_assistant(messages_of(record[messages]))
        return {"prompt": prompt, "completion": completion, **rest(record, messages)}

    return convert


def _prompts(column: str) -> Callable[[Record], Row]:
    return lambda record: {"prompt": _prompt_of(record[column]), **rest(record, column)}


def _is_transcript(record: Record) -> bool:
    text = record.get("chosen")
    return isinstance(text, str) and HUMAN in text and ASSISTANT in text


def _voted(record: Record) -> bool:
    return has("instruction", "response1", "response2")(record) and any(key.startswith("annotator") for key in record)


def _sharegpt(*columns: str) -> Callable[[Record], bool]:
    return lambda record: (
        has(*columns)(record) and any(_looks_like_messages(record.get(c)) for c in ("conversations", "messages"))
    )


def _chat(column: str, *more: str) -> Callable[[Record], bool]:
    return lambda record: has(column, *more)(record) and _looks_like_messages(record[column])


def _labelled(column: str, test: Callable[[Record], bool]) -> Callable[[Record], bool]:
    """Also has a yes or a no there: many files have a column `label` that is something else."""
    return lambda record: test(record) and str(record[column]).strip().lower().removesuffix(".0") in _YES | _NO


def _chat_prompts(column: str) -> Callable[[Record], bool]:
    return lambda record: _chat(column)(record) and messages_of(record[column])[-1]["role"] == "user"


FORMATS: tuple[Format, ...] = (
    Format("prompt, completions and ranks", "rankings", has("prompt", "completions", "ranks"), _rankings),
    Format("prompt and completions", "completions", has("prompt", "completions"), _sampled),
    Format("OpenAssistant rankings", "rankings", lambda r: _chat("messages", "responses")(r), _tree_rankings),
    Format("prompt, chosen and rejected", "pairs", has("prompt", "chosen", "rejected"), _explicit_pairs),
    Format("sharegpt pairs", "pairs", _sharegpt("chosen", "rejected"), _sharegpt_pairs),
    Format("instruction, chosen and rejected", "pairs", has("instruction", "chosen", "rejected"), _alpaca_pairs),
    Format("HH transcripts", "pairs", lambda r: has("rejected")(r) and _is_transcript(r), _transcripts),
    Format(
        "conversations that share their beginning",
        "pairs",
        lambda r: has("chosen", "rejected")(r) and _looks_like_messages(r["chosen"]),
        _implicit_conversations,
    ),
    Format("texts that share their beginning", "pairs", has("chosen", "rejected"), _implicit_texts),
    Format("PandaLM votes", "pairs", _voted, _voted_pairs),
    Format(
        "two completions and a preference",
        "pairs",
        has("prompt", "completion_a", "completion_b", "preference"),
        _judged_pairs("prompt", "completion_a", "completion_b", "preference"),
        _counted_from_zero("completion_a", "completion_b", "preference"),
    ),
    Format(
        "two outputs and a label",
        "pairs",
        has("input", "output_1", "output_2", "label"),
        _judged_pairs("input", "output_1", "output_2", "label"),
        _counted_from_zero("output_1", "output_2", "label"),
    ),
    Format("prompt, completion and label", "thumbs", _labelled("label", has("prompt", "completion", "label")), _thumbs),
    Format(
        "chat messages and label",
        "thumbs",
        _labelled("label", _chat("messages", "label")),
        _chat_thumbs("messages", "label"),
    ),
    Format(
        "sharegpt and kto_tag",
        "thumbs",
        _labelled("kto_tag", _chat("conversations", "kto_tag")),
        _chat_thumbs("conversations", "kto_tag"),
    ),
    Format(
        "prompt and completion", "demonstrations", has("prompt", "completion"), _demonstrations("prompt", "completion")
    ),
    Format("prompt and response", "demonstrations", has("prompt", "response"), _demonstrations("prompt", "response")),
    Format("instruction and output", "demonstrations", has("instruction", "output"), _alpaca("output")),
    Format("instruction and response", "demonstrations", has("instruction", "response"), _alpaca("response")),
    Format("Self-Instruct tasks", "demonstrations", has("instruction", "instances"), _seed_tasks),
    Format("question and answer", "demonstrations", has("question", "answer"), _worked_answers),
    Format(
        "problem and solution", "demonstrations", has("problem", "solution"), _demonstrations("problem", "solution")
    ),
    Format("chat messages", "prompts", _chat_prompts("messages"), _prompts("messages")),
    Format("sharegpt", "prompts", _chat_prompts("conversations"), _prompts("conversations")),
    Format("chat messages", "demonstrations", _chat("messages"), _chat_demonstrations("messages")),
    Format("sharegpt", "demonstrations", _chat("conversations"), _chat_demonstrations("conversations")),
    Format("prompts", "prompts", has("prompt"), _prompts("prompt")),
    Format(
        "instructions",
        "prompts",
        has("instruction"),
        lambda r: {"prompt": _instruction(r), **rest(r, "instruction", "input")},
    ),
    Format("questions", "prompts", has("question"), _prompts("question")),
)


def transcript_messages(text: str) -> list[dict[str, str]]:
    """An HH prompt as chat messages; its closing `Assistant:` is where the completion goes, and gives none.

    Raises:
        Drop: it does not begin with a Human turn, or does not end with an open Assistant turn.
    """
    body = text.removesuffix(ASSISTANT)
    if body == text or not text.startswith(HUMAN):
        raise Drop("not a transcript that waits for the Assistant")
    messages = []
    for piece in body.split(HUMAN)[1:]:
        asked, *answers = piece.split(ASSISTANT)
        messages.append({"role": "user", "content": asked.strip()})
        messages += [{"role": "assistant", "content": answer.strip()} for answer in answers]
    if not is_messages(messages):
        raise Drop("no turns")
    return messages
