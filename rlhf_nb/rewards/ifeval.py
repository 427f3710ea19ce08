"""Instruction constraints in IFEval's vocabulary.

Zhou et al. 2023, arXiv:2311.07911. Each check is named after its instruction and takes its keyword arguments, so that
IFEval's own rows, and any like them, are prompts with a reward. Three of the paper's tools are others here: languages
are told by py3langid, sentences end where `sentences` says, words in capitals keep their hyphens. And a `letter` that
is none, # in some rows, is counted as it stands, where the paper's code puts a random one in its place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from rlhf_nb.errors import RewardError, did_you_mean

_ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|e\.g|i\.e|No|Inc|Ltd|[A-Z])\.$")
_SENTENCE_END = re.compile(r"[.!?…。！？।]+[\"'”’)\]*_]*(?=\s|$)")


def ifeval(
    prompts: Sequence[Any],
    completions: Sequence[str],
    instruction_id_list: Sequence[Sequence[str]],
    kwargs: Sequence[Sequence[Mapping[str, Any] | None]],
    *,
    score: Literal["all", "share"] = "all",
) -> list[float]:
    """Whether the row's instructions are followed. The registered reward `ifeval`.

    Args:
        instruction_id_list: Names of each row's instructions, `punctuation:no_comma` for one.
        kwargs: Their arguments, one mapping for each instruction; what is None in it is left out.
        score: all: 1 if every one is followed, else 0, the paper's prompt-level strict accuracy. share: the share that
            is followed.

    Returns:
        In [0, 1]; an empty completion follows nothing.

    Raises:
        RewardError: Instructions that are not known, or arguments that do not fit.
    """
    known = {name for names in instruction_id_list for name in names}
    if unknown := sorted(known - set(CHECKS)):
        raise RewardError(
            f"reward ifeval: no check for {', '.join(unknown)}{did_you_mean(unknown[0], CHECKS)}  leave those rows out"
        )
    rows = zip(completions, instruction_id_list, kwargs, strict=True)
    followed = [
        [_followed(name, text, given) for name, given in _each(names, all_given)] for text, names, all_given in rows
    ]
    return [float(all(row)) if score == "all" else sum(row) / max(1, len(row)) for row in followed]


def _each(names: Sequence[str], given: Sequence[Mapping[str, Any] | None]) -> list[tuple[str, Mapping[str, Any]]]:
    if len(names) != len(given):
        raise RewardError(
            f"reward ifeval: {len(names)} instructions and {len(given)} kwargs in a row; give one for each"
        )
    return [(name, one or {}) for name, one in zip(names, given, strict=True)]


def _followed(name: str, text: str, given: Mapping[str, Any]) -> bool:
    arguments = {key: value for key, value in given.items() if value is not None}
    try:
        return bool(text.strip()) and CHECKS[name](text, **arguments)
    except (TypeError, ValueError, AttributeError) as error:
        raise RewardError(f"reward ifeval: {name} with {arguments}: {error}; correct the row's kwargs") from None


def compare(n: int, relation: str, than: int) -> bool:
    if relation not in ("at least", "less than"):
        raise ValueError(f'relation {relation!r} is neither "at least" nor "less than"')
    return n >= than if relation == "at least" else n < than


def language_of(text: str) -> str:
    """ISO 639-1 code of the language a text is most likely in."""
    import py3langid

    return str(py3langid.classify(text)[0])


def sentences(text: str) -> int:
    """How many end in . ! ? … before white space, and not after an abbreviation or an initial; a rest counts as one."""
    ends = [m.end() for m in _SENTENCE_END.finditer(text) if not _ABBREVIATION.search(text[: m.end()][-12:])]
    return len(ends) + bool(text[ends[-1] if ends else 0 :].strip())


def keywords_existence(text: str, keywords: Sequence[str]) -> bool:
    return all(keyword.lower() in text.lower() for keyword in keywords)


def keywords_frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return compare(text.lower().count(keyword.lower()), relation, frequency)


def keywords_forbidden_words(text: str, forbidden_words: Sequence[str]) -> bool:
    return not any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in forbidden_words)


def keywords_letter_frequency(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return compare(text.lower().count(letter.lower()), let_relation, let_frequency)


def language_response_language(text: str, language: str) -> bool:
    return language_of(text) == language


def length_number_sentences(text: str, num_sentences: int, relation: str) -> bool:
    return compare(sentences(text), relation, num_sentences)


def length_number_words(text: str, num_words: int, relation: str) -> bool:
    return compare(len(re.findall(r"\w+", text)), relation, num_words)


def length_number_paragraphs(text: str, num_paragraphs: int) -> bool:
    """Paragraphs are parted by `***`; only the first and the last part may be empty."""
    parts = re.split(r"\s?\*\*\*\s?", text)
    if any(not part.strip() for part in parts[1:-1]):
        return False
    return sum(bool(part.strip()) for part in parts) == num_paragraphs


def length_nth_paragraph_first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Paragraphs are parted by an empty line."""
    parts = text.split("\n\n")
    filled = sum(bool(part.strip()) for part in parts)
    if not 1 <= nth_paragraph <= filled or not (words := parts[nth_paragraph - 1].split()):
        return False
    first = re.split(r"[.,?!'\"]", words[0].lstrip("'\""))[0]
    return filled == num_paragraphs and first.lower() == first_word.lower()


def content_number_placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", text)) >= num_placeholders


def content_postscript(text: str, postscript_marker: str) -> bool:
    marker = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}.get(
        postscript_marker, re.escape(postscript_marker.lower())
    )
    return re.search(marker, text.lower()) is not None


def format_number_bullet_lists(text: str, num_bullets: int) -> bool:
    return len(re.findall(r"^[ \t]*(?:\*[^*\n]|-).*$", text, re.MULTILINE)) == num_bullets


def format_constrained_response(text: str) -> bool:
    return any(f"My answer is {word}." in text for word in ("yes", "no", "maybe"))


def format_number_highlighted_sections(text: str, num_highlights: int) -> bool:
    """*highlighted* or **highlighted**, within a line."""
    found = re.findall(r"\*\*[^\n*]+\*\*|\*[^\n*]+\*", text)
    return sum(bool(each.strip("*").strip()) for each in found) >= num_highlights


def format_multiple_sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"\s?{re.escape(section_spliter)}\s?\d+\s?", text)) >= num_sections


def format_json(text: str) -> bool:
    body = re.sub(r"^```(?:json)?|```$", "", text.strip(), flags=re.IGNORECASE)
    try:
        json.loads(body)
    except (ValueError, RecursionError):
        return False
    return True


def format_title(text: str) -> bool:
    return any(title.strip("<> ") for title in re.findall(r"<<[^\n]+>>", text))


def combination_two_responses(text: str) -> bool:
    """Two different answers, parted by six asterisks."""
    parts = text.split("******")
    filled = [part.strip() for part in parts if part.strip()]
    return len(filled) == 2 and filled[0] != filled[1] and all(part.strip() for part in parts[1:-1])


def combination_repeat_prompt(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def startend_end_checker(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def startend_quotation(text: str) -> bool:
    body = text.strip()
    return len(body) > 1 and body[0] == body[-1] == '"'


def case_capital_word_frequency(text: str, capital_frequency: int, capital_relation: str) -> bool:
    return compare(sum(word.isupper() for word in re.findall(r"\w[\w-]*", text)), capital_relation, capital_frequency)


def case_english_capital(text: str) -> bool:
    return text.isupper() and language_of(text.lower()) == "en"


def case_english_lowercase(text: str) -> bool:
    return text.islower() and language_of(text) == "en"


def punctuation_no_comma(text: str) -> bool:
    return "," not in text


CHECKS: dict[str, Callable[..., bool]] = {
    "keywords:existence": keywords_existence,
    "keywords:frequency": keywords_frequency,
    "keywords:forbidden_words": keywords_forbidden_words,
    "keywords:letter_frequency": keywords_letter_frequency,
    "language:response_language": language_response_language,
    "length_constraints:number_sentences": length_number_sentences,
    "length_constraints:number_paragraphs": length_number_paragraphs,
    "length_constraints:number_words": length_number_words,
    "length_constraints:nth_paragraph_first_word": length_nth_paragraph_first_word,
    "detectable_content:number_placeholders": content_number_placeholders,
    "detectable_content:postscript": content_postscript,
    "detectable_format:number_bullet_lists": format_number_bullet_lists,
    "detectable_format:constrained_response": format_constrained_response,
    "detectable_format:number_highlighted_sections": format_number_highlighted_sections,
    "detectable_format:multiple_sections": format_multiple_sections,
    "detectable_format:json_format": format_json,
    "detectable_format:title": format_title,
    "combination:two_responses": combination_two_responses,
    "combination:repeat_prompt": combination_repeat_prompt,
    "startend:end_checker": startend_end_checker,
    "startend:quotation": startend_quotation,
    "change_case:capital_word_frequency": case_capital_word_frequency,
    "change_case:english_capital": case_english_capital,
    "change_case:english_lowercase": case_english_lowercase,
    "punctuation:no_comma": punctuation_no_comma,
}
"""Every instruction of the paper."""
