"""A shop's log, and questions about it: what was viewed, bought or returned, when, and at which price.

It stands in for the question answering over user behaviour that the paper (arXiv 2602.01766) evaluates
on and does not publish. Customers, things, prices and days are drawn anew for each text.
"""

from __future__ import annotations

import itertools
import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, ClassVar, NamedTuple

import numpy as np

from ..inputs import check_count
from .logs import NUMBER, Log
from .samples import Question, Words
from .scoring import contains_all

__all__ = ["Event", "Events"]

COLOURS = (
    "amber", "black", "blue", "brown", "copper", "cream", "crimson", "emerald", "golden", "green", "grey",
    "indigo", "ivory", "lilac", "orange", "pink", "purple", "red", "scarlet", "silver", "turquoise",
    "violet", "white", "yellow",
)  # fmt: skip
STOCK = {
    "clothing": ("belt", "coat", "glove", "hat", "jacket", "scarf", "shirt", "sock", "sweater"),
    "garden": ("bench", "hose", "lantern", "parasol", "rake", "shovel", "trowel", "wheelbarrow"),
    "kitchen": ("bowl", "grater", "kettle", "ladle", "mug", "pan", "teapot", "toaster", "whisk"),
    "music": ("banjo", "cello", "drum", "flute", "guitar", "harp", "trumpet", "violin"),
    "office": ("binder", "calculator", "folder", "notebook", "pen", "ruler", "stapler"),
    "sports": ("ball", "helmet", "kayak", "racket", "skateboard", "sledge", "surfboard"),
    "tools": ("chisel", "drill", "hammer", "ladder", "pliers", "sander", "saw", "wrench"),
    "toys": ("doll", "kite", "puppet", "puzzle", "robot", "scooter", "train", "yoyo"),
}
"""Things by their category."""

CUSTOMERS = (
    "Agnes", "Boris", "Carla", "Dennis", "Edith", "Frank", "Gloria", "Hugo", "Irene", "Jonas", "Karin",
    "Lukas", "Marta", "Nils", "Olga", "Peter", "Rosa", "Simon", "Tessa", "Victor",
)  # fmt: skip
ACTIONS = ("viewed", "put into the cart", "bought", "returned", "rated")
CATEGORIES = {thing: category for category, things in STOCK.items() for thing in things}

MOST_OWNED = 20
"""Things that a customer still may rate or return: the last ones bought."""


def _price(cents: int) -> str:
    return f"{cents / 100:.2f}"


def _category(item: str) -> str:
    return CATEGORIES[item.split()[1]]


def _any_of(names: Sequence[str]) -> str:
    return rf"(?<!\w)(?:{'|'.join(names)})(?!\w)"


class Event(NamedTuple):
    """A line of the log."""

    time: str
    """Such as "2031-04-02 18:07"; no two events have the same one."""

    customer: str
    """A name; empty where there is one customer only."""

    action: str
    item: str
    category: str
    cents: int
    """The price shown."""

    stars: int
    """Of a rating."""

    def __str__(self) -> str:
        head, _, tail = self.action.partition(" ")
        if self.stars:
            tail = f"with {self.stars} of 5 stars"
        who = f"{self.customer} " * bool(self.customer)
        thing = f"the {self.item} ({self.category}, {_price(self.cents)})"
        return f"{self.time} {who}{head} {thing}{f' {tail}' * bool(tail)}\n"


class _Shop:
    """What is on sale, at which price at the moment, and what each customer likes and owns."""

    def __init__(self, items: int, customers: int, rng: np.random.Generator) -> None:
        self.rng = rng
        things = [*CATEGORIES]
        drawn = rng.choice(len(COLOURS) * len(things), items, replace=False)
        self.items = [f"{COLOURS[i // len(things)]} {things[i % len(things)]}" for i in drawn]
        self.of: dict[str, list[str]] = {}
        for item in self.items:
            self.of.setdefault(_category(item), []).append(item)
        self.cents = {item: self._draw_price() for item in self.items}
        names = [CUSTOMERS[i] for i in rng.permutation(len(CUSTOMERS))[:customers]]
        self.names = names if customers > 1 else [""]
        self.likes = {name: self._some([*self.of]) for name in self.names}
        self.owned: dict[str, list[tuple[str, int]]] = {name: [] for name in self.names}
        self.time = datetime(2031, 1, 1, 9) + timedelta(minutes=int(rng.integers(500_000)))

    def _some(self, things: Sequence[Any]) -> Any:
        return things[int(self.rng.integers(len(things)))]

    def _draw_price(self) -> int:
        return int(self.rng.integers(200, 20000))

    def session(self, views: int) -> Iterator[Event]:
        """What a customer does in one go; prices and likings have changed a bit before."""
        rng = self.rng
        name = self._some(self.names)
        self.time += timedelta(minutes=int(rng.integers(60, 4000)))
        if rng.random() < 0.2:
            self.likes[name] = self._some([*self.of])
        for _ in range(len(self.items) // 8 + 1):
            self.cents[self._some(self.items)] = self._draw_price()
        for _ in range(int(rng.integers(1, 4))):
            yield from self._choose(name, int(rng.integers(2 * views + 1)))
        owned = self.owned[name]
        if owned and rng.random() < 0.5:
            yield self._event(name, "rated", *self._some(owned), stars=int(rng.integers(1, 6)))
        if owned and rng.random() < 0.5:
            yield self._event(name, "returned", *owned.pop(int(rng.integers(len(owned)))))

    def _choose(self, name: str, views: int) -> Iterator[Event]:
        """Look at so many things, take the next one, and perhaps buy it."""
        for _ in range(views + 1):
            is_liked = self.rng.random() < 0.6
            item = self._some(self.of[self.likes[name]] if is_liked else self.items)
            yield self._event(name, "viewed", item, self.cents[item])
        yield self._event(name, "put into the cart", item, self.cents[item])
        if self.rng.random() < 0.8:
            yield self._event(name, "bought", item, self.cents[item])
            self.owned[name] = [*self.owned[name][-MOST_OWNED:], (item, self.cents[item])]

    def _event(self, name: str, action: str, item: str, cents: int, *, stars: int = 0) -> Event:
        self.time += timedelta(minutes=int(self.rng.integers(1, 6)))
        at = f"{self.time:%Y-%m-%d %H:%M}"
        return Event(at, name, action, item, _category(item), cents, stars)


def _period(log: list[Event], rng: np.random.Generator) -> tuple[int, int, str]:
    """Where a part of a log starts and ends, and its time in words: all, before or since a day, a month."""
    day = log[rng.integers(len(log))].time[:10]

    def begin(day: str) -> int:
        return bisect_left(log, day, key=lambda event: event.time)

    way = rng.integers(4)
    if way == 0:
        return 0, len(log), ""
    if way == 1:
        return 0, begin(day), f" before {day}"
    if way == 2:
        return begin(day), len(log), f" since {day}"
    month = day[:7]
    return begin(month), begin(f"{month}-99"), f" in {month}"


def _favourites(bought: Sequence[Event]) -> list[str]:
    """The category most often bought; several, where they are even."""
    counts = Counter(event.category for event in bought)
    most = max(counts.values(), default=0)
    return [name for name, number in counts.items() if number == most]


class _Asked(NamedTuple):
    """What a question is about."""

    log: list[Event]

    start: int
    end: int
    """The part of the log that it is about."""

    when: str
    """That part's time, in words."""

    own: Sequence[Event]
    """What one customer did there, of one action."""

    one: Event
    """Any of it."""

    same: Sequence[Event]
    """What of it was with that one's thing."""

    by: str
    """The customer, in words."""


Told = tuple[str, str] | None
"""A question and its answer; None where it has not exactly one, or is too easy."""


def _ask_count(asked: _Asked, rng: np.random.Generator) -> Told:
    item, action, by, when = asked.one.item, asked.one.action, asked.by, asked.when
    told = f"How many times was the {item} {action}{by}{when}? The number is"
    return (told, str(len(asked.same))) if len(asked.same) > 1 else None


def _ask_end(asked: _Asked, rng: np.random.Generator, name: str, at: int) -> Told:
    item, action, by, when = asked.one.item, asked.one.action, asked.by, asked.when
    if rng.random() < 0.5:
        told = f"When was the {item} {name} {action}{by}{when}? It was on"
        return told, asked.same[at].time
    return f"What was {name} {action}{by}{when}? It was the", asked.own[at].item


def _ask_first(asked: _Asked, rng: np.random.Generator) -> Told:
    return _ask_end(asked, rng, "first", 0)


def _ask_last(asked: _Asked, rng: np.random.Generator) -> Told:
    return _ask_end(asked, rng, "last", -1)


def _ask_next(asked: _Asked, rng: np.random.Generator) -> Told:
    # Within the part, so that it does not matter which of the two verbs its time is of.
    item, action, by, when = asked.one.item, asked.one.action, asked.by, asked.when
    after = bisect_right(asked.log, asked.same[-1].time, key=lambda event: event.time)
    later = (
        event.item
        for event in itertools.islice(asked.log, after, asked.end)
        if event.action == "bought" and event.customer == asked.one.customer
    )
    bought = next(later, None)
    told = f"What was first bought{by} after the {item} was last {action}{by}{when}? It was the"
    return (told, bought) if bought is not None else None


def _ask_preference(asked: _Asked, rng: np.random.Generator) -> Told:
    rest = [
        event
        for event in itertools.chain(asked.log[: asked.start], asked.log[asked.end :])
        if event.action == "bought" and event.customer == asked.one.customer
    ]
    best, other = _favourites(asked.own), _favourites(rest)
    told = f"Things of which category were most often bought{asked.by}{asked.when}? Of the category"
    return (told, best[0]) if len(best) == 1 and other and best[0] not in other else None


def _ask_price(asked: _Asked, rng: np.random.Generator) -> Told:
    name, at = ("first", 0) if rng.random() < 0.5 else ("last", -1)
    item, by, when = asked.one.item, asked.by, asked.when
    told = f"What did the {item} cost when it was {name} bought{by}{when}? It cost"
    return told, _price(asked.same[at].cents)


def _ask_sum(asked: _Asked, rng: np.random.Generator) -> Told:
    paid = [event.cents for event in asked.own if event.category == asked.one.category]
    told = (
        f"How much was paid in all for the things of the category {asked.one.category} "
        f"bought{asked.by}{asked.when}? It was"
    )
    return (told, _price(sum(paid))) if 2 <= len(paid) <= MOST_SUMMED else None


ASK = {
    "count": _ask_count,
    "first": _ask_first,
    "last": _ask_last,
    "next": _ask_next,
    "preference": _ask_preference,
    "price": _ask_price,
    "sum": _ask_sum,
}
"""Questions by their kind."""

OF_BOUGHT = ("preference", "price", "sum")
"""Kinds of questions that are about what was bought alone."""

MOST_SUMMED = 12
"""Prices that an answer sums, at most."""


@dataclass(frozen=True)
class Events(Log):
    """The log of a shop: who viewed, bought, returned and rated what, when, and at which price.

    Kinds of questions: count, first, last, next (what followed), preference (the category bought most
    often in a time that is not that of the rest), price, sum.
    """

    items: int = 40
    """Different things in the shop."""

    customers: int = 1
    """Whose events are mixed. A question is about one of them, and the others distract."""

    views: int = 2
    """Things that are only looked at, for each that is put into the cart: the mean."""

    answer_tokens: ClassVar[int] = 32

    known: ClassVar[tuple[str, ...]] = tuple(ASK)
    banner: ClassVar[str] = (
        "The log of a shop. Each line tells when something was done, what, and with which thing; "
        "its category and its price at that time are in parentheses.\n"
    )
    shapes: ClassVar[tuple[re.Pattern[str], ...]] = (
        NUMBER,
        re.compile(r"(?<!\d)\d{4}-\d\d-\d\d \d\d:\d\d(?!\d)"),
        re.compile(_any_of([*STOCK])),
        re.compile(rf"{_any_of(COLOURS)} {_any_of([*CATEGORIES])}"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("items", self.items, 2, len(COLOURS) * len(CATEGORIES))
        check_count("customers", self.customers, 1, len(CUSTOMERS))
        check_count("views", self.views, 0)

    def least(self, words: Words) -> int:
        """See `Log.least`."""
        named = "Agnes" * (self.customers > 1)
        line = Event("2031-04-02 18:07", named, "bought", "green kettle", "kitchen", 2490, 0)
        lines = 10 + 2 * self.views + 3 * self.questions + 5 * self.most_of_a_kind
        return len(words.encode(str(line))) * lines

    def entries(self, rng: np.random.Generator) -> Iterator[Event]:
        """See `Log.entries`: session by session, of one customer each."""
        shop = _Shop(self.items, self.customers, rng)
        while True:
            yield from shop.session(self.views)

    def index(self, kept: list[Event]) -> list[Event]:
        """See `Log.index`: the events themselves."""
        return kept

    def ask(self, kind: str, indexed: list[Event], rng: np.random.Generator) -> Question | None:
        """See `Log.ask`."""
        action = "bought" if kind in OF_BOUGHT else ACTIONS[rng.integers(len(ACTIONS))]
        start, end, when = _period(indexed, rng)
        seen = [event for event in itertools.islice(indexed, start, end) if event.action == action]
        if not seen:
            return None
        one = seen[rng.integers(len(seen))]
        own = [event for event in seen if event.customer == one.customer]
        same = [event for event in own if event.item == one.item]
        by = f" by {one.customer}" * bool(one.customer)
        told = ASK[kind](_Asked(indexed, start, end, when, own, one, same, by), rng)
        if told is None or contains_all(told[0], [told[1]]):
            return None
        return Question(f"\n{told[0]}", (told[1],), kind)
