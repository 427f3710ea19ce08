"""One kind of rows from another, with a count of what could not come along."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import combinations
from typing import Any

from rlhf_nb.data.formats import Drop, transcript_messages
from rlhf_nb.data.rankings import best_places, is_strict, worst_places
from rlhf_nb.data.rows import COLUMNS, Row, fault, prompt_key
from rlhf_nb.errors import DataError

Converted = tuple[list[Row], dict[str, int]]
Conversion = Callable[[Iterable[Mapping[str, Any]]], Converted]

_SAID = {column for columns in COLUMNS.values() for column in columns} - {"prompt"}
_SAID |= {"details", "draft", "score", "scores", "golds", "chosen_score", "rejected_score"}
_SAID |= {"completion_lengths", "completion_ended"}
"""The completions, and what is said of one of them or of a list of them: in rows of another kind it has no place."""
_COMPARED = {"margin", "weight", "annotator", "preference", "agrees", "judge", "judge_prompt"}
_COMPARED |= {"constitution", "principle", "principles", "critiques"}
"""What somebody said of the completions together: it holds as long as the same ones are compared, with the same end."""


def about_completions(column: str) -> bool:
    """Whether a column belongs to the completions of a row and not to its prompt: with other completions, or with
    another label, it goes."""
    return column in _SAID or column in _COMPARED


def pairs_to_thumbs(rows: Iterable[Mapping[str, Any]]) -> Converted:
    """Each pair gives a thumb up and a thumb down; the same thumb of a prompt and completion is kept once."""
    return _distinct_thumbs(
        (row["prompt"], row[side], side == "chosen") for row in rows for side in ("chosen", "rejected")
    )


def rankings_to_pairs(rows: Iterable[Mapping[str, Any]]) -> Converted:
    """Every two completions with different ranks: K(K-1)/2 of a ranking without ties."""
    pairs: list[Row] = []
    dropped: Counter[str] = Counter()
    for row in rows:
        extra = _beside(row)
        for (one, one_rank), (two, two_rank) in combinations(zip(row["completions"], row["ranks"], strict=True), 2):
            chosen, rejected = (one, two) if one_rank < two_rank else (two, one)
            pair = {"prompt": row["prompt"], "chosen": chosen, "rejected": rejected, **extra}
            reason = "equal ranks" if one_rank == two_rank else fault("pairs", pair)
            if reason:
                dropped[reason] += 1
            else:
                pairs.append(pair)
    return pairs, dict(dropped)


def rankings_to_ends(rows: Iterable[Mapping[str, Any]]) -> Converted:
    """One pair a ranking: a best completion against a worst one, the first where several are."""
    pairs: list[Row] = []
    dropped: Counter[str] = Counter()
    for row in rows:
        if not is_strict(row["ranks"]):
            dropped["every completion has the same rank"] += 1
            continue
        best, worst = (row["completions"][ends(row["ranks"])[0]] for ends in (best_places, worst_places))
        pair = {"prompt": row["prompt"], "chosen": best, "rejected": worst, **_beside(row)}
        if reason := fault("pairs", pair):
            dropped[reason] += 1
        else:
            pairs.append(pair)
    return pairs, dict(dropped)


def rankings_to_thumbs(rows: Iterable[Mapping[str, Any]]) -> Converted:
    """Of each ranking a thumb up for what nothing is better than, down for what nothing is worse than."""
    thumbs: list[tuple[Any, str, bool]] = []
    dropped: Counter[str] = Counter()
    for row in rows:
        if not is_strict(row["ranks"]):
            dropped["every completion has the same rank"] += 1
            continue
        ends = dict.fromkeys(best_places(row["ranks"]), True) | dict.fromkeys(worst_places(row["ranks"]), False)
        thumbs += [(row["prompt"], row["completions"][place], up) for place, up in sorted(ends.items())]
        if between := len(row["completions"]) - len(ends):
            dropped["neither best nor worst"] += between
    made, repeated = _distinct_thumbs(thumbs)
    return made, dict(dropped) | repeated


def rankings_to_demonstrations(rows: Iterable[Mapping[str, Any]]) -> Converted:
    """The best completion of each ranking; none where several tie for it."""
    rows = list(rows)
    decided = [row for row in rows if len(best_places(row["ranks"])) == 1]
    best = [
        {"prompt": row["prompt"], "completion": row["completions"][best_places(row["ranks"])[0]]} for row in decided
    ]
    tied = len(rows) - len(decided)
    return best, {"several tie for the best": tied} if tied else {}


def completions_to_rankings(rows: Iterable[Mapping[str, Any]]) -> Converted:
    """Scored completions in the order of their scores, the highest best; the same text of a prompt once."""
    made: list[Row] = []
    dropped: Counter[str] = Counter()
    for row in rows:
        if not row.get("scores"):
            dropped["no scores"] += 1
            continue
        said = [(text, score) for text, score in zip(row["completions"], row["scores"], strict=True) if text.strip()]
        if empty := len(row["completions"]) - len(said):
            dropped["empty completion"] += empty
        once = dict(said)
        if repeated := len(said) - len(once):
            dropped["repeated completion"] += repeated
        order = sorted(set(once.values()), reverse=True)
        ranks = [order.index(score) for score in once.values()]
        ranking = {"prompt": row["prompt"], "completions": list(once), "ranks": ranks, **_beside(row)}
        if reason := fault("rankings", ranking):
            dropped[reason] += 1
        else:
            made.append(ranking)
    return made, dict(dropped)


def _by_score(to: Conversion) -> Conversion:
    """A conversion of rankings, for completions in the order of their scores."""

    def convert_scored(rows: Iterable[Mapping[str, Any]]) -> Converted:
        ranked, lost = completions_to_rankings(rows)
        made, more = to(ranked)
        return made, dict(Counter(lost) + Counter(more))

    return convert_scored


def pairs_to_rankings(rows: Iterable[Mapping[str, Any]]) -> Converted:
    """Each pair as a ranking of two."""
    made = [
        {"prompt": row["prompt"], "completions": [row["chosen"], row["rejected"]], "ranks": [0, 1], **_beside(row)}
        for row in rows
    ]
    return made, {}


def thumbs_to_pairs(rows: Iterable[Mapping[str, Any]]) -> Converted:
    """Of each prompt its thumbs up against its thumbs down, in their order, each used once."""
    by_prompt: dict[str, tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]] = {}
    for row in rows:
        ups, downs = by_prompt.setdefault(prompt_key(row["prompt"]), ([], []))
        (ups if row["label"] else downs).append(row)
    pairs: list[Row] = []
    dropped: Counter[str] = Counter()
    for ups, downs in by_prompt.values():
        for up, down in zip(ups, downs, strict=False):
            pair = {"prompt": up["prompt"], "chosen": up["completion"], "rejected": down["completion"]}
            if reason := fault("pairs", pair):
                dropped[reason] += 1
            else:
                pairs.append(pair)
        if left := abs(len(ups) - len(downs)):
            dropped["thumb without its opposite for the same prompt"] += left
    return pairs, dict(dropped)


def pairs_to_demonstrations(rows: Iterable[Mapping[str, Any]]) -> Converted:
    """The chosen completion of each pair."""
    return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows], {}


def thumbs_to_demonstrations(rows: Iterable[Mapping[str, Any]]) -> Converted:
    """Completions with a thumb up."""
    rows = list(rows)
    good = [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows if row["label"]]
    return good, {"thumb down": len(rows) - len(good)} if len(good) < len(rows) else {}


def to_prompts(rows: Iterable[Mapping[str, Any]]) -> Converted:
    """Each prompt once, with what its first row says beside: a verifier reads the answer or the tests from there."""
    rows = list(rows)
    distinct: dict[str, Row] = {}
    for row in rows:
        kept = {column: value for column, value in row.items() if not about_completions(column)}
        distinct.setdefault(prompt_key(row["prompt"]), kept)
    prompts = list(distinct.values())
    return prompts, {"repeated prompt": len(rows) - len(prompts)} if len(prompts) < len(rows) else {}


def to_chat(rows: Iterable[Mapping[str, Any]]) -> Converted:
    """Rows whose text prompts are HH transcripts, with chat messages instead; other rows stay as they are."""
    converted: list[Row] = []
    dropped: Counter[str] = Counter()
    for row in rows:
        if not isinstance(row["prompt"], str) or "\n\nHuman:" not in row["prompt"]:
            converted.append(dict(row))
            continue
        try:
            prompt = transcript_messages(row["prompt"])
        except Drop as reason:
            dropped[str(reason)] += 1
            continue
        texts = {key: row[key].strip() for key in ("chosen", "rejected", "completion") if isinstance(row.get(key), str)}
        converted.append({**row, "prompt": prompt, **texts})
    return converted, dict(dropped)


def _beside(row: Mapping[str, Any]) -> Row:
    """Columns that hold where the comparison stays: of the prompt, of the annotator, of all completions together."""
    return {column: value for column, value in row.items() if column != "prompt" and column not in _SAID}


def _distinct_thumbs(thumbs: Iterable[tuple[Any, str, bool]]) -> Converted:
    rows: list[Row] = []
    seen: set[tuple[str, str, bool]] = set()
    dropped: Counter[str] = Counter()
    for prompt, completion, label in thumbs:
        key = (repr(prompt), completion, label)
        if key in seen:
            dropped["repeated thumb"] += 1
            continue
        seen.add(key)
        rows.append({"prompt": prompt, "completion": completion, "label": label})
    return rows, dict(dropped)


CONVERSIONS: dict[tuple[str, str], Conversion] = {
    ("pairs", "thumbs"): pairs_to_thumbs,
    ("pairs", "rankings"): pairs_to_rankings,
    ("pairs", "demonstrations"): pairs_to_demonstrations,
    ("rankings", "pairs"): rankings_to_pairs,
    ("rankings", "thumbs"): rankings_to_thumbs,
    ("rankings", "demonstrations"): rankings_to_demonstrations,
    ("thumbs", "pairs"): thumbs_to_pairs,
    ("thumbs", "demonstrations"): thumbs_to_demonstrations,
    ("demonstrations", "prompts"): to_prompts,
    ("pairs", "prompts"): to_prompts,
    ("rankings", "prompts"): to_prompts,
    ("thumbs", "prompts"): to_prompts,
    ("completions", "rankings"): completions_to_rankings,
    ("completions", "pairs"): _by_score(rankings_to_pairs),
    ("completions", "demonstrations"): _by_score(rankings_to_demonstrations),
    ("completions", "prompts"): to_prompts,
}
SERVES = {("pairs", "thumbs"), ("rankings", "pairs")}
"""Kinds of rows that hold all that another kind asks for: they are converted unasked. Prompts are, out of any kind."""
GIVES = {
    ("pairs", "rankings"): "each pair as a ranking of two",
    ("pairs", "demonstrations"): "the chosen completion of each pair",
    ("rankings", "thumbs"): "the best of each ranking up, the worst down",
    ("rankings", "demonstrations"): "the best completion of each ranking",
    ("thumbs", "pairs"): "thumbs up against thumbs down to the same prompt",
    ("thumbs", "demonstrations"): "completions with a thumb up",
    ("completions", "rankings"): "completions in the order of their scores",
    ("completions", "pairs"): "the higher against the lower score, of every two completions",
    ("completions", "demonstrations"): "the completion of each prompt that scores highest",
}
"""What is lost or assumed in a conversion that a person has to ask for."""


def convert(rows: Iterable[Mapping[str, Any]], from_kind: str, to_kind: str) -> Converted:
    """Rows of another kind.

    Raises:
        DataError: that kind does not contain what the other needs.
    """
    if from_kind == to_kind:
        return [dict(row) for row in rows], {}
    if (from_kind, to_kind) not in CONVERSIONS:
        ways = [to for start, to in CONVERSIONS if start == from_kind]
        out = f"it can become {', '.join(ways)}" if ways else "nothing else can be made of it"
        raise DataError(f"{from_kind} cannot become {to_kind}: {out}")
    return CONVERSIONS[from_kind, to_kind](rows)
