"""Short English biographies of invented people: training text that needs no download.

Every person has one name, one birthplace, one profession and one year of birth, so that questions such as
"Where was this person born?" have one answer. The words are ASCII. The same seed gives the same text on every
platform and Python version: of `random.Random` only `random()` is used, the one method whose sequence Python
guarantees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

__all__ = ["Person", "biographies", "biography_text", "people"]

_Item = TypeVar("_Item")


def _words(text: str, separator: str = " ") -> list[str]:
    return " ".join(text.split()).split(separator)


_WOMEN = _words("""
Ada Adele Agnes Alice Amelia Anita Anna Astrid Aurora Beatrice Bella Berta Bridget Camilla Cara Carla
Cecilia Celia Clara Cora Dagmar Daisy Delia Diana Dora Edith Eleanor Elena Elisa Ella Elsa Emilia Emma Erika
Esther Eva Fiona Flora Frida Gerda Gloria Grace Greta Hanna Hazel Hedda Helena Ida Ines Ingrid Irene Iris
Isabel Ivy Jana Jenny Johanna Judith Julia Karin Katrin Laura Lea Lena Lidia Lina Livia Lotte Lucia Luisa
Magda Maren Maria Marta Matilda Maya Mina Miriam Mona Nadia Nella Nina Nora Olga Olivia Paula Petra Pia Rita
Rosa Ruth Sara Selma Silvia Sofia Stella Susanna Tamara Tessa Thea Ursula Vera Viola Wanda Wilma Yvonne
Zelda
""")

_MEN = _words("""
Aaron Abel Adam Adrian Alan Albert Alfred Andreas Anton Arthur August Basil Bernard Boris Bruno Carl Caspar
Cedric Conrad Cyril Daniel David Dennis Dominic Edgar Edmund Edwin Elias Emil Enrico Eric Ernest Eugene
Felix Ferdinand Floyd Francis Franz Frederick Gabriel George Gilbert Gregor Gustav Hans Harold Harvey Hector
Henry Herbert Herman Howard Hugo Igor Isaac Ivan Jacob Jasper Jerome Joel Jonas Joseph Julian Karl Kaspar
Lars Laurence Leon Leonard Levin Lorenz Louis Lucas Magnus Marcus Martin Matthias Maurice Max Milo Moritz
Nathan Niels Norman Oliver Oscar Otto Pascal Patrick Paul Percy Philip Quentin Ralph Raymond Robert Roland
Rufus Rupert Samuel Simon Stefan Theodor Thomas Tobias Victor Vincent Walter Wesley Winston
""")

_LAST = _words("""
Abbott Adler Alder Amberg Anders Archer Ashford Atwood Baird Barlow Bauer Becker Bell Berger Birch Blackwell
Bolton Brandt Brennan Bright Brook Burke Calder Carver Castell Chandler Clarke Colby Cooper Corbin Crane
Croft Dahl Dalton Darby Decker Delgado Denham Draper Drew Eaton Eckert Ellis Emerson Falk Farrell Faulkner
Fenwick Ferrer Field Finch Fischer Fleming Foster Frost Fuller Gable Garner Gibson Glover Graham Granger
Griffin Hale Hammond Harding Hartley Hawkins Heller Hobbs Holm Hooper Horn Huxley Irving Jansen Jarvis
Jensen Kaplan Keller Kendall Kessler Kirby Klein Knight Kramer Lambert Landau Lang Larkin Lindgren Lloyd
Lombard Lowell Lund Mallory Marlow Mason Mayer Mercer Milton Monroe Moreau Morland Navarro Newell North
Norwood Oakes Olsen Osborn Palmer Parrish Pearce Penrose Perrin Porter Quill Quinn Ramsey Redford Reed
Reuter Rhodes Rivera Robin Romano Rossi Rowe Sawyer Schiller Sharp Shelby Sloan Sommer Spencer Stern Stone
Sutton Talbot Tanner Thorne Tillman Turner Unger Vance Vega Vogel Wade Walden Warren Weaver Webb Weller
Whitman Wilder Winter Wolfe Wyatt Yates York Zeller Zimmer
""")

_PLACES = _words(
    """
Aberdeen, Alexandria, Algiers, Amsterdam, Antwerp, Athens, Auckland, Baltimore, Barcelona, Basel, Belfast,
Belgrade, Bergen, Berlin, Bern, Bilbao, Bologna, Bombay, Boston, Bremen, Bristol, Brussels, Bucharest,
Budapest, Buenos Aires, Cairo, Calcutta, Cape Town, Cardiff, Chicago, Cologne, Copenhagen, Cork, Dakar,
Delhi, Dresden, Dublin, Edinburgh, Florence, Frankfurt, Geneva, Genoa, Ghent, Glasgow, Gothenburg, Graz,
Halifax, Hamburg, Hanover, Havana, Heidelberg, Helsinki, Istanbul, Jaffa, Kiel, Krakow, Kyoto, Leeds,
Leipzig, Lima, Lisbon, Liverpool, London, Lyon, Madrid, Manchester, Manila, Marseille, Melbourne, Mexico
City, Milan, Montreal, Munich, Nairobi, Nantes, Naples, New York, Odessa, Oslo, Oxford, Palermo, Paris,
Philadelphia, Porto, Prague, Quebec, Riga, Rome, Rotterdam, Salzburg, Santiago, Seville, Shanghai,
Singapore, Sofia, Stockholm, Strasbourg, Stuttgart, Sydney, Tallinn, Tokyo, Toronto, Trieste, Tunis, Turin,
Utrecht, Valencia, Venice, Vienna, Vilnius, Warsaw, Zagreb, Zurich
""",
    ", ",
)

# profession: what the person is remembered for
_WORKS = {
    "actor": ("a tour through forty small theatres", "roles in silent films", "a school for young players"),
    "architect": (
        "a library of glass and brick",
        "two bridges over the old harbour",
        "houses built around gardens",
    ),
    "astronomer": (
        "a catalogue of faint stars",
        "the first photographs of a comet",
        "a table of the moons of Saturn",
    ),
    "baker": ("a rye bread that kept for a month", "a bakery that never closed", "a book of winter cakes"),
    "biologist": (
        "studies of river insects",
        "a theory of how birds find their way",
        "drawings of deep sea fish",
    ),
    "botanist": (
        "an atlas of mountain flowers",
        "a garden of medicinal plants",
        "work on the roots of grasses",
    ),
    "chemist": ("a cheap blue dye", "a method to clean drinking water", "experiments with rare metals"),
    "clockmaker": (
        "a clock that showed the tides",
        "very small pocket watches",
        "the great clock of the town hall",
    ),
    "composer": ("three string quartets", "songs for children", "an opera about a lighthouse"),
    "dancer": ("a dance without music", "performances in ruined halls", "a company of twelve dancers"),
    "doctor": ("a hospital for miners", "a treatment for fever", "free visits to the poor"),
    "economist": (
        "a study of the price of bread",
        "essays on trade between islands",
        "a theory of small banks",
    ),
    "engineer": ("a railway across the marshes", "a quiet steam engine", "the design of a mountain tunnel"),
    "explorer": (
        "a journey along the northern coast",
        "maps of the inner desert",
        "a winter spent on the ice",
    ),
    "farmer": (
        "an apple that ripens in winter",
        "new ways to water dry fields",
        "letters about country life",
    ),
    "geologist": ("a map of the coal fields", "work on sleeping volcanoes", "a collection of river stones"),
    "historian": ("a history of the salt trade", "a life of an unknown queen", "lectures on ancient roads"),
    "inventor": ("a folding bicycle", "a lamp that needs no oil", "a machine that sorts letters"),
    "journalist": (
        "reports from the harbour strikes",
        "a weekly paper for farmers",
        "interviews with old sailors",
    ),
    "judge": ("a fair code of trade", "patient hearings", "a book on the rights of tenants"),
    "linguist": (
        "a grammar of a vanishing language",
        "a dictionary of sea words",
        "work on the sounds of dialects",
    ),
    "mathematician": ("a proof about prime numbers", "the theory of knots", "tables that sailors still use"),
    "musician": ("concerts on the open street", "a new way to tune the violin", "recordings of old dances"),
    "nurse": ("the first school for nurses", "service in three wars", "clean and quiet hospital wards"),
    "painter": ("portraits of fishermen", "large pictures of empty rooms", "landscapes in grey and green"),
    "philosopher": ("a short book on doubt", "lectures about friendship", "letters on the limits of reason"),
    "photographer": ("pictures of the night trains", "portraits of workers", "a book about rain"),
    "physicist": ("measurements of the speed of sound", "a theory of falling drops", "work on weak magnets"),
    "pilot": ("a flight over the mountains at night", "the first mail flights", "a school for women who fly"),
    "poet": ("poems about the sea", "a long poem in plain words", "verses that children learn by heart"),
    "printer": ("beautiful small books", "a clear new typeface", "the first newspaper of the valley"),
    "sailor": (
        "a voyage around the world alone",
        "charts of a dangerous strait",
        "the rescue of a lost crew",
    ),
    "sculptor": ("a stone horse in the market", "figures made of driftwood", "monuments without names"),
    "singer": ("a voice of four octaves", "folk songs from the border", "the main part in nine operas"),
    "teacher": ("a school in a former mill", "a reading book for beginners", "lessons in the open air"),
    "translator": (
        "the tales of the north in English",
        "a new version of old plays",
        "a life between five languages",
    ),
    "weaver": ("cloth with a pattern of waves", "a loom driven by water", "carpets of undyed wool"),
    "writer": ("a novel about two brothers", "ghost stories", "a diary of one long summer"),
}

# each opening states all four facts once
_OPENINGS = (
    "{name} was {a_job} born in {place} in {year}.",
    "{name}, born in {place} in {year}, was {a_job}.",
    "{name} was born in {place} in {year} and became {a_job}.",
    "Born in {place} in {year}, {name} was {a_job}.",
    "{name} (born {year}) was {a_job} from {place}.",
    "The {job} {name} was born in {year} in {place}.",
    "{name} came into the world in {place} in {year} and grew up to be {a_job}.",
    "In {year} {name}, later {a_job}, was born in {place}.",
)
_MIDDLES = (
    "{He} moved to {city} at the age of {age} and stayed there for {span} years.",
    "After school {he} went to {city}, where {he} worked for {span} years.",
    "{His} family wanted {him} to keep a shop, but {he} left for {city} at {age}.",
    "At {age} {he} won a prize in {city}.",
    "{He} studied in {city} until {late}.",
    "From {late} on {he} lived in {city}.",
    "{He} learned the trade from {his} {parent} and finished {his} training in {city} in {late}.",
)
_CLOSINGS = (
    "{He} is remembered for {work}.",
    "{His} name is tied to {work}.",
    "{He} became known for {work}.",
    "What remains of {last}: {work}.",
    "Most people know {last} for {work}.",
    "{He} is best known for {work}.",
)
_SHE = {"he": "she", "him": "her", "his": "her", "parent": "mother", "He": "She", "His": "Her"}
_HE = {"he": "he", "him": "him", "his": "his", "parent": "father", "He": "He", "His": "His"}


@dataclass(frozen=True)
class Person:
    """One invented person.

    Attributes:
        name: first and last name; no two people of one call share it.
        birthplace: the city of birth.
        profession: in lower case, without article.
        year: the year of birth.
        biography: one to three sentences that state the four facts above, without a line end.
    """

    name: str
    birthplace: str
    profession: str
    year: int
    biography: str


def people(n: int, seed: int = 0) -> list[Person]:
    """Return `n` people with different names.

    The first people of a longer list are those of a shorter one of the same seed.

    Args:
        n: how many, 0 up to the number of names there are (more than 30,000).
        seed: chooses the people.

    Raises:
        ValueError: when `n` is negative or larger than the number of names.
    """
    firsts = [(first, _SHE) for first in _WOMEN] + [(first, _HE) for first in _MEN]
    limit = len(firsts) * len(_LAST)
    if not 0 <= n <= limit:
        raise ValueError(f"n={n} must be in 0..{limit}; there are no more names than that")
    rng = Random(seed)
    names = list(range(limit))
    found = []
    for i in range(n):
        # one step of a shuffle: the names before i are taken
        j = i + int(rng.random() * (limit - i))
        names[i], names[j] = names[j], names[i]
        first, pronouns = firsts[names[i] // len(_LAST)]
        found.append(_person(rng, first, _LAST[names[i] % len(_LAST)], pronouns))
    return found


def biographies(n: int, seed: int = 0) -> list[str]:
    """Return the biographies of `people(n, seed)`, one line each, without line ends."""
    return [person.biography for person in people(n, seed)]


def biography_text(n: int, seed: int = 0) -> str:
    """Return the biographies of `people(n, seed)` as one text, each followed by a line end."""
    return "".join(line + "\n" for line in biographies(n, seed))


def _person(rng: Random, first: str, last: str, pronouns: dict[str, str]) -> Person:
    place, city = _pick(rng, _PLACES), _pick(rng, _PLACES)
    job = _pick(rng, list(_WORKS))
    year = 1870 + int(rng.random() * 90)
    age = 17 + int(rng.random() * 20)
    words = {
        **pronouns,
        "name": f"{first} {last}",
        "last": last,
        "place": place,
        # the next place in the list when the two drawn are the same
        "city": city if city != place else _PLACES[(_PLACES.index(city) + 1) % len(_PLACES)],
        "job": job,
        "a_job": ("an " if job[0] in "aeiou" else "a ") + job,
        "work": _pick(rng, _WORKS[job]),
        "year": str(year),
        "late": str(year + age),
        "age": str(age),
        "span": _pick(
            rng, ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "twelve")
        ),
    }
    sentences = [_pick(rng, _OPENINGS)]
    length = rng.random()
    if length < 0.75:
        sentences.append(_pick(rng, _MIDDLES))
    if length > 0.1:
        sentences.append(_pick(rng, _CLOSINGS))
    return Person(words["name"], place, job, year, " ".join(sentences).format(**words))


def _pick(rng: Random, items: Sequence[_Item]) -> _Item:
    return items[int(rng.random() * len(items))]
