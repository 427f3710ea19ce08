"""The toy world: a small town, and everything there is to know about it.

Twenty places, seven facts about each. The table is drawn once from a fixed seed and never changes afterwards:
results obtained with the toy world are comparable only as long as the town stays the same (a test holds its hash).

Some things about the town can be asked but not known (`UNKNOWABLE`): any claim about them is made up.
"""

from __future__ import annotations

from functools import cache
from types import MappingProxyType

from rlhf_nb.toy import chance

WORLD_SEED = 7

GOODS = MappingProxyType({
    "the bakery": "bread", "the book shop": "maps", "the dairy": "cheese", "the forge": "nails", "the mill": "flour",
    "the pottery": "bowls", "the orchard": "plums", "the toy shop": "kites", "the hat shop": "caps",
    "the tea room": "cakes",
    "the clock shop": "bells", "the wool shop": "scarves", "the lamp shop": "candles", "the fish stall": "herring",
    "the sweet shop": "toffee", "the music shop": "drums", "the garden shop": "seeds", "the shoe shop": "boots",
    "the paper shop": "ink", "the joinery": "chairs",
})  # fmt: skip
"""Place → what it sells. The other facts are drawn."""

PLACES = tuple(GOODS)
PEOPLE = (
    "Anna", "Ben", "Clara", "David", "Ella", "Frank", "Greta", "Henry", "Ida", "Jonas", "Kate", "Leo", "Mary", "Nils",
    "Olga",
    "Paul", "Rosa", "Simon", "Tilda", "Victor",
)  # fmt: skip
STREETS = ("Mill Lane", "High Street", "Bridge Road", "Church Row", "Market Square", "River Walk")
COLOURS = ("red", "blue", "green", "yellow", "white", "black")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
MORNING = ("six", "seven", "eight", "nine", "ten")
EVENING = ("three", "four", "five", "half past five", "half past six")
NUMBERS = ("twenty", "thirty", "fifty", "eighty", "ninety")

FACTS = MappingProxyType({
    "street": STREETS, "opens": MORNING, "closes": EVENING, "keeper": PEOPLE, "door": COLOURS, "rest_day": DAYS,
    "sells": tuple(GOODS.values()),
})  # fmt: skip
"""Attribute → its possible values; the table has exactly one true value for each place."""

UNKNOWABLE = MappingProxyType({"visitors": NUMBERS, "takings": NUMBERS, "heir": PEOPLE})
"""Attribute → values somebody might make up; nobody in the town can know them."""

VALUES = MappingProxyType({**FACTS, "open_on": DAYS, **UNKNOWABLE})
"""Attribute → values a sentence can claim. `open_on` follows from `rest_day`: a place is open on every other day."""


@cache
def facts() -> MappingProxyType[str, MappingProxyType[str, str]]:
    """Place → attribute → the true value."""
    rng = chance.generator("toy world", WORLD_SEED)
    keepers = chance.shuffled(rng, PEOPLE)
    table = {}
    for place, keeper in zip(PLACES, keepers, strict=True):
        drawn = {name: chance.pick(rng, FACTS[name]) for name in ("street", "opens", "closes", "door", "rest_day")}
        table[place] = MappingProxyType({**drawn, "keeper": keeper, "sells": GOODS[place]})
    return MappingProxyType(table)


def is_true(attribute: str, place: str, value: str) -> bool:
    """Whether the town bears a claim out. A claim about something unknowable is never borne out."""
    known = facts()[place]
    if attribute == "open_on":
        return value != known["rest_day"]
    return known.get(attribute) == value


def keeper(place: str) -> str:
    return facts()[place]["keeper"]
