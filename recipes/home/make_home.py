"""Make train.jsonl and test.jsonl of the home data set: what people say to a smart home, and the command it means.

    python recipes/home/make_home.py [FOLDER]

Everything is drawn with a fixed seed from phrases.txt (wordings) and the tables below (things, rooms, numbers), so the
same files come out byte for byte. Some wordings are kept for the test alone. This file knows nothing of Tenon.
"""

from __future__ import annotations

import json
import random
import re
import string
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

SEED = 20
HERE = Path(__file__).resolve().parent
HELD_OUT_SHARE = 0.18  # of the wordings of each section: never in train
UNSEEN_TEST_SHARE = 0.5  # of the test rows: from those wordings

# verb -> rows in train; the test has a fifth of each.
TRAIN_ROWS = {
    "on": 110, "off": 120, "dim": 50, "temp": 65, "open": 90, "close": 90, "lock": 70, "unlock": 70,
    "play": 70, "pause": 50, "timer": 65, "alarm": 80, "clean": 35, "buy": 35,
}  # fmt: skip

# Word of the command -> ways to say it: (after "in": "in the kitchen", before a noun: "the kitchen lamp").
ROOMS: dict[str, list[tuple[str, str]]] = {
    "kitchen": [("the kitchen", "kitchen"), ("our kitchen", "kitchen")],
    "bedroom": [("the bedroom", "bedroom"), ("my bedroom", "bedroom")],
    "bathroom": [("the bathroom", "bathroom"), ("the washroom", "washroom")],
    "hall": [("the hall", "hall"), ("the hallway", "hallway"), ("the corridor", "corridor")],
    "office": [("the office", "office"), ("my office", "office"), ("the study", "study")],
    "kids": [("the kids' room", "kids' room"), ("the children's room", "children's room"), ("the nursery", "nursery")],
    "living": [("the living room", "living room"), ("the lounge", "lounge"), ("the sitting room", "sitting room")],
    "attic": [("the attic", "attic"), ("the loft", "loft")],
}
ITEMS = {"light": ["light", "lamp"], "fan": ["fan", "ceiling fan"], "tv": ["TV", "telly", "television"]}
COVERS = {"blinds": ["blinds", "shades"], "curtains": ["curtains", "drapes"], "window": ["windows"]}
DOORS = {
    "front": ["front door", "main door"],
    "back": ["back door", "rear door"],
    "garage": ["garage door", "garage"],
    "gate": ["gate", "garden gate"],
}
MUSIC = {
    "jazz": ["jazz", "some jazz", "a bit of jazz"],
    "blues": ["some blues", "the blues"],
    "rock": ["rock music", "some rock", "rock"],
    "pop": ["pop music", "some pop"],
    "techno": ["techno", "some techno"],
    "reggae": ["reggae", "some reggae"],
    "classical": ["classical music", "something classical"],
    "lullabies": ["lullabies", "a few lullabies"],
    "news": ["the news", "the latest news"],
}
FOOD = """
    milk bread eggs butter cheese apples bananas tomatoes potatoes onions carrots rice pasta flour sugar salt honey
    tea coffee juice yogurt chicken fish soap toothpaste batteries napkins lemons garlic mushrooms
""".split()  # noqa: SIM905
ONES = """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen
""".split()  # noqa: SIM905
TENS = ["", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
DEGREES = range(16, 26)
PERCENTS = (10, 15, 20, 25, 30, 35, 40, 45, 50, 55, 60, 65, 70, 75, 80, 90)
MINUTES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 18, 20, 25, 30, 35, 40, 45, 50, 60, 90)
SPOKEN_MINUTES = {15: "a quarter of an hour", 30: "half an hour", 60: "an hour", 90: "an hour and a half"}
HOURS = range(5, 11)
QUARTERS = (0, 15, 30, 45)

# Around an order: {x} is the order, {X} the order with a capital.
ORDERS = [
    "{X}.", "{X}.", "{X}.", "{X}!", "{x}", "{x}", "{X}, please.", "Please {x}.", "{X} please", "Could you {x}?",
    "Can you {x}?", "Could you please {x}?", "Can you {x} for me?", "Would you {x}?", "Would you kindly {x}?",
    "I'd like you to {x}.", "I need you to {x}.", "I want you to {x}.", "Be so kind and {x}.", "Go ahead and {x}.",
    "Quick, {x}!", "Hey, {x}.", "Hey, can you {x}?", "Ok, {x}.", "Now {x}.", "{X} now.", "{X}, will you?",
    "{X}, would you?", "{X}, thanks.", "Thanks if you {x}.", "Time to {x}.", "It's time to {x}.", "Just {x}.",
    "Listen, {x}.", "Sorry to bother you, but could you {x}?", "If it's not too much trouble, {x}.", "{X} asap",
    "You may {x} now.", "pls {x}", "{x} pls", "Do me a favour and {x}.", "Any chance you could {x}?",
    "My wife says you should {x}.", "First of all, {x}.", "Don't forget to {x}.", "Someone has to {x}.", "yo, {x}",
    "Can somebody {x}?", "I was wondering if you could {x}.", "When you have a second, {x}.",
]  # fmt: skip
OPENERS = ["Hey.", "Hello.", "Ugh.", "Oh no.", "Listen.", "Hi there.", "Hmm.", "Right.", "Okay.", "Excuse me."]
SAYINGS_PLAIN = 0.8  # share of whole sentences without an opener
CASUAL = 0.15  # typed in a hurry: no capitals, no full stop
TYPO = 0.04  # two letters swapped in one long word


@dataclass(frozen=True)
class Wording:
    """One line of phrases.txt: the answer it means, its text with slots, and whether it is an order."""

    answer: str
    text: str
    order: bool

    @property
    def verb(self) -> str:
        """First word of the answer."""
        return self.answer.split()[0]


@dataclass(frozen=True)
class Row:
    """One example: what is said, the command, and the wording it was made from."""

    said: str
    command: str
    wording: Wording


@dataclass
class Decks:
    """Draws from named lists so that each element comes up once before any comes up twice."""

    rng: random.Random
    decks: dict[str, list[int]] = field(default_factory=dict)

    def draw(self, name: str, size: int) -> int:
        """The next index below `size` of the deck `name`."""
        deck = self.decks.setdefault(name, [])
        if not deck:
            deck.extend(range(size))
            self.rng.shuffle(deck)
        return deck.pop()


def read_wordings(path: Path) -> list[Wording]:
    """Every wording of phrases.txt, in order; raises ValueError on a line before the first section."""
    wordings: list[Wording] = []
    answer = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            answer = line[3:]
        elif line and not line.startswith("#"):
            if not answer:
                raise ValueError(f"{path.name}: a wording before the first section: {line}")
            wordings.append(Wording(answer, line.removeprefix("> "), line.startswith("> ")))
    return wordings


def spell(number: int) -> str:
    """A number below one hundred in words."""
    if number < 20:
        return ONES[number]
    return TENS[number // 10] + (f"-{ONES[number % 10]}" if number % 10 else "")


def fill_slots(wording: Wording, decks: Decks) -> tuple[str, str]:
    """The wording with its slots filled, and the command that says the same."""
    said: dict[str, str] = {}
    meant: dict[str, str] = {}
    slots = {name for _, name, _, _ in string.Formatter().parse(wording.text + wording.answer) if name}
    rng, verb = decks.rng, wording.verb
    if slots & {"room", "rm"}:
        meant["room"] = list(ROOMS)[decks.draw(f"{verb} room", len(ROOMS))]
        said["room"], said["rm"] = rng.choice(ROOMS[meant["room"]])
    for slot, table in (("item", ITEMS), ("cover", COVERS), ("door", DOORS), ("music", MUSIC)):
        if slot in slots:
            meant[slot] = list(table)[decks.draw(f"{verb} {slot}", len(table))]
            said[slot] = rng.choice(table[meant[slot]])
    if "food" in slots:
        said["food"] = meant["food"] = FOOD[decks.draw("food", len(FOOD))]
    if "deg" in slots:
        degrees = DEGREES[decks.draw("deg", len(DEGREES))]
        said["deg"] = rng.choice(["{}", "{}", "{} degrees"]).format(rng.choice([str(degrees), spell(degrees)]))
        meant["deg"] = str(degrees)
    if "pct" in slots:
        percent = PERCENTS[decks.draw("pct", len(PERCENTS))]
        said["pct"] = rng.choice([f"{percent}%", f"{percent} percent", f"{spell(percent)} percent"])
        meant["pct"] = str(percent)
    if "dur" in slots:
        minutes = MINUTES[decks.draw("dur", len(MINUTES))]
        said["dur"], meant["dur"] = say_minutes(minutes, rng), str(minutes)
    if "time" in slots:
        hour = HOURS[decks.draw("hour", len(HOURS))]
        minute = QUARTERS[decks.draw("quarter", len(QUARTERS))]
        meant["time"] = f"{hour:02d}:{minute:02d}"
        said["time"], said["clock"] = say_time(hour, minute, rng), say_clock(hour, minute, rng)
    return wording.text.format(**said), wording.answer.format(**meant)


def say_minutes(minutes: int, rng: random.Random) -> str:
    """A length of time: "20 minutes", "twenty minutes", "half an hour"."""
    unit = "minute" if minutes == 1 else "minutes"
    ways = [f"{minutes} {unit}", f"{spell(minutes)} {unit}"]
    if minutes in SPOKEN_MINUTES:
        ways += [SPOKEN_MINUTES[minutes]] * 2
    return rng.choice(ways)


def say_clock(hour: int, minute: int, rng: random.Random) -> str:
    """A time as a clock shows it, or as it is read out: "6:30", "six thirty"."""
    if minute == 0:
        return rng.choice([f"{hour}", f"{hour}:00", spell(hour)])
    return rng.choice([f"{hour}:{minute:02d}", f"{hour}:{minute:02d}", f"{spell(hour)} {spell(minute)}"])


def say_time(hour: int, minute: int, rng: random.Random) -> str:
    """A time as people say it: "half past six", "a quarter past seven"."""
    ways = {0: f"{spell(hour)} o'clock", 15: f"a quarter past {spell(hour)}", 30: f"half past {spell(hour)}"}
    if minute not in ways or rng.random() < 0.25:
        return say_clock(hour, minute, rng)
    return ways[minute]


def capital(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def dress(wording: Wording, text: str, command: str, decks: Decks) -> str:
    """A whole utterance: an order with a sentence around it, a saying with an opener now and then, and a few typos."""
    rng = decks.rng
    if wording.order:
        text = ORDERS[decks.draw("orders", len(ORDERS))].format(x=text, X=capital(text))
    elif rng.random() > SAYINGS_PLAIN:
        text = f"{rng.choice(OPENERS)} {capital(text)}"
    else:
        text = capital(text)
    if rng.random() < CASUAL:
        text = text.lower().rstrip(".!")
    if rng.random() < TYPO:
        text = swap_letters(text, {*ONES, *TENS, *command.split(), "percent", "degrees", "minutes"}, rng)
    return text


def swap_letters(text: str, spared: set[str], rng: random.Random) -> str:
    """The text with two inner neighbours swapped in one word of six letters or more, not in a spared one."""
    words = [m for m in re.finditer(r"[A-Za-z]{6,}", text) if m.group().lower() not in spared]
    if not words:
        return text
    place = rng.choice(words).start() + rng.randrange(1, 4)
    return text[:place] + text[place + 1] + text[place] + text[place + 2 :]


def key_of(said: str) -> str:
    """Two utterances with the same key count as the same: letters and digits, lower case."""
    return " ".join(re.findall(r"[a-z0-9%']+", said.lower()))


def new_rows(wordings: list[Wording], decks: Decks, taken: set[str]) -> Iterator[Row]:
    """Rows without end, wording by wording in turn, no utterance twice."""
    while True:
        for wording in decks.rng.sample(wordings, len(wordings)):
            text, command = fill_slots(wording, decks)
            said = dress(wording, text, command, decks)
            if key_of(said) not in taken:
                taken.add(key_of(said))
                yield Row(said, command, wording)


def split_wordings(wordings: list[Wording], rng: random.Random) -> tuple[list[Wording], list[Wording]]:
    """(wordings for train and test, wordings for the test alone), the same share of each section."""
    seen: list[Wording] = []
    unseen: list[Wording] = []
    for answer in dict.fromkeys(wording.answer for wording in wordings):
        section = [wording for wording in wordings if wording.answer == answer]
        rng.shuffle(section)
        cut = max(1, round(len(section) * HELD_OUT_SHARE))
        unseen += section[:cut]
        seen += section[cut:]
    return seen, unseen


def build(seed: int = SEED) -> tuple[list[Row], list[Row]]:
    """(train rows, test rows), each in a drawn order."""
    rng = random.Random(seed)
    decks, taken = Decks(rng), set[str]()
    seen, unseen = split_wordings(read_wordings(HERE / "phrases.txt"), rng)
    train: list[Row] = []
    test: list[Row] = []
    for verb, count in TRAIN_ROWS.items():
        of_seen = new_rows([w for w in seen if w.verb == verb], decks, taken)
        of_unseen = new_rows([w for w in unseen if w.verb == verb], decks, taken)
        from_unseen = round(count // 5 * UNSEEN_TEST_SHARE)
        train += [next(of_seen) for _ in range(count)]
        test += [next(of_unseen) for _ in range(from_unseen)]
        test += [next(of_seen) for _ in range(count // 5 - from_unseen)]
    rng.shuffle(train)
    rng.shuffle(test)
    return train, test


def as_line(row: Row) -> str:
    """One line of OpenAI `messages` JSONL."""
    messages = [{"role": "user", "content": row.said}, {"role": "assistant", "content": row.command}]
    return json.dumps({"messages": messages}, ensure_ascii=False) + "\n"


def main(folder: Path) -> None:
    """Write train.jsonl and test.jsonl into the folder."""
    for name, rows in zip(("train.jsonl", "test.jsonl"), build(), strict=True):
        (folder / name).write_text("".join(as_line(row) for row in rows), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
