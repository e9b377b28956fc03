"""Questions on facts of the world: countries, elements, characters, status codes."""

import unicodedata
from collections.abc import Iterable
from http import HTTPStatus
from random import Random

from lopt_hf.retention.questions.countries import CONTINENTS, COUNTRIES, Country
from lopt_hf.retention.questions.question import Question, wrong_answers

__all__ = ["CHARACTERS", "ELEMENTS", "ELEMENT_SYMBOLS", "STATUS_CODES", "world"]

# In the order of their atomic numbers
ELEMENT_SYMBOLS = (
    "H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr Rb Sr Y Zr "
    "Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Hf Ta W Re Os Ir Pt "
    "Au Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu"
).split()
ELEMENTS = (
    "hydrogen helium lithium beryllium boron carbon nitrogen oxygen fluorine neon sodium magnesium aluminum silicon "
    "phosphorus sulfur chlorine argon potassium calcium scandium titanium vanadium chromium manganese iron cobalt "
    "nickel copper zinc gallium germanium arsenic selenium bromine krypton rubidium strontium yttrium zirconium "
    "niobium molybdenum technetium ruthenium rhodium palladium silver cadmium indium tin antimony tellurium iodine "
    "xenon cesium barium lanthanum cerium praseodymium neodymium promethium samarium europium gadolinium terbium "
    "dysprosium holmium erbium thulium ytterbium lutetium hafnium tantalum tungsten rhenium osmium iridium platinum "
    "gold mercury thallium lead bismuth polonium astatine radon francium radium actinium thorium protactinium uranium "
    "neptunium plutonium"
).split()
ELEMENT_LEVELS = {
    1: "hydrogen helium carbon nitrogen oxygen iron gold silver copper calcium".split(),
    2: "sodium potassium chlorine aluminum zinc lead mercury neon sulfur silicon uranium nickel".split(),
    3: "lithium magnesium phosphorus fluorine argon tin iodine platinum titanium chromium cobalt radium".split(),
    4: "manganese bromine barium tungsten antimony xenon plutonium krypton arsenic beryllium boron cesium".split(),
}

# Characters by block, and the level of the block
CHARACTERS: tuple[tuple[str, int], ...] = (
    ('!"#$%&()*+,-./:;<=>?@[\\]^_{|}~', 1),
    ("äöüéèêàçñåøßæ", 2),
    ("αβγδεζηθλμνξπρστφχψω", 2),
    ("€£¥¢§©®°±×÷µ¶", 3),
    ("←↑→↓↔↕⇒⇔", 3),
    ("абвгджзклмнпрстуфхцчшщыэюя", 4),
    ("∀∂∃∅∇∈∉∋∏∑√∝∞∠∧∨∩∪∫∴≈≠≡≤≥⊂⊃⊆⊕⊗", 4),
    ("♀♂♠♣♥♦♪♭♯★☆☎☠☢☮☯☺", 3),
    ("אבגדהוזחטיכלמנסעפצקרשת", 5),
    ("ابتثجحخدذرزسشصضطظعغفقكلمنهوي", 5),
    ("─│┌┐└┘├┤┬┴┼═║╔╗╚╝", 5),
)

WITH_ARTICLE = ("GB", "PH", "MV", "BS", "GM")
MOST_OF_A_BLOCK = 12
BETWEEN_CONTINENTS = ("TR", "GE", "AM", "AZ", "KZ", "RU", "EG")
ALSO_PAID_WITH = {"PA": "dollar", "BT": "rupee", "KH": "dollar", "LB": "dollar", "VE": "dollar"}

STATUS_CODES = {
    200: 1,
    404: 1,
    500: 2,
    403: 2,
    401: 2,
    301: 2,
    400: 2,
    201: 3,
    204: 3,
    302: 3,
    304: 3,
    405: 3,
    408: 3,
    429: 3,
    502: 3,
    503: 3,
    504: 4,
    100: 4,
    101: 4,
    202: 4,
    206: 4,
    307: 4,
    308: 4,
    406: 4,
    409: 4,
    410: 4,
    415: 4,
    418: 4,
    411: 5,
    412: 5,
    417: 5,
    421: 5,
    423: 5,
    424: 5,
    428: 5,
    451: 5,
    501: 4,
    505: 5,
    507: 5,
    511: 5,
}


def world(random: Random) -> list[Question]:
    """Makes the questions on facts of the world."""
    found = []
    for country in COUNTRIES:
        found += _of_country(random, country)
    return [*found, *elements(random), *characters(random), *status_codes(random)]


def _of_country(random: Random, country: Country) -> list[Question]:
    """Up to five questions on one country; the wrong answers are of others, at higher levels of its continent."""
    others = [other for other in COUNTRIES if other != country]
    near_by = [other for other in others if other.continent == country.continent]
    pool = near_by if country.level > 2 and len(near_by) > 8 else others
    pool = random.sample(pool, len(pool))
    named, cluster = f"{'the ' * (country.code in WITH_ARTICLE)}{country.name}", f"country {country.name}"

    def ask(text: str, answer: str, wrong: Iterable[str], topic: str, level: int = country.level) -> Question:
        return Question(text, answer, wrong_answers(random, answer, wrong), topic, level, cluster)

    found = []
    if not _is_named_alike(country):
        capitals = [other.capital for other in pool[:8]]
        found.append(ask(f"Which city is the capital of {named}?", country.capital, capitals, "capital"))
        names = [other.name for other in pool[:8]]
        found.append(ask(f"Of which country is {country.capital} the capital?", country.name, names, "country"))
    level = min(country.level + 1, 5)
    found.append(
        ask(
            f"What is the currency of {named} called?", country.currency, _currencies(pool, country), "currency", level
        )
    )
    codes = [other.code for other in others if other.code[0] == country.code[0]]
    codes += random.sample([other.code for other in others if other.code[0] != country.code[0]], 3)
    found.append(ask(f"What is the two-letter country code of {named}?", country.code, codes, "country code"))
    if country.level > 1 and country.code not in BETWEEN_CONTINENTS:
        continents = [CONTINENTS[code] for code in ("EU", "AF", "AS") if code != country.continent]
        rest = [name for code, name in CONTINENTS.items() if code not in ("EU", "AF", "AS", country.continent)]
        continents = [*continents, *random.sample(rest, 1)][:3]
        text, answer = f"On which continent does {named} lie?", CONTINENTS[country.continent]
        found.append(Question(text, answer, tuple(continents), "continent", country.level - 1, cluster))
    return found


def _is_named_alike(country: Country) -> bool:
    """Whether a capital's name gives away its country's."""
    return country.capital[:4] == country.name[:4]


def _currencies(pool: list[Country], country: Country) -> list[str]:
    """Currencies of other countries that are not used in this one, nor named nearly as its own."""
    too = {country.currency, ALSO_PAID_WITH.get(country.code, "")}
    names = dict.fromkeys(other.currency for other in (*pool, *COUNTRIES) if other.currency not in too)
    return [name for name in names if not _are_alike(name, country.currency)][:8]


def _are_alike(one: str, other: str) -> bool:
    """Whether two currencies' names are so alike that one could be taken for the other."""
    families = (
        {"krona", "krone"},
        {"rial", "riyal"},
        {"pound", "pound sterling"},
        {"pound", "lira"},
        {"franc", "CFA franc"},
    )
    return one != other and {one, other} in families


def elements(random: Random) -> list[Question]:
    """Chemical elements: symbols and atomic numbers."""
    found = []
    common = {name: level for level, names in ELEMENT_LEVELS.items() for name in names}
    for number, (name, symbol) in enumerate(zip(ELEMENTS, ELEMENT_SYMBOLS, strict=True), 1):
        level, cluster = common.get(name, 5), f"element {name}"
        others = [other for other in ELEMENT_SYMBOLS if other != symbol and other[0] == symbol[0]]
        others += random.sample([other for other in ELEMENT_SYMBOLS if other[0] != symbol[0]], 4)
        wrong = wrong_answers(random, symbol, others)
        text = f"What is the chemical symbol of {name}?"
        found.append(Question(text, symbol, wrong, "element", level, cluster))
        if level < 5 or number % 2:
            others = [other for other in ELEMENTS if other != name and other[0] == name[0]]
            others += random.sample([other for other in ELEMENTS if other[0] != name[0]], 4)
            wrong = wrong_answers(random, name, others)
            text = f'Which chemical element has the symbol "{symbol}"?'
            found.append(Question(text, name, wrong, "element", level, cluster))
        if level < 5:
            neighbors = [str(other) for other in range(max(1, number - 4), number + 5) if other != number]
            text = f"What is the atomic number of {name}?"
            wrong = wrong_answers(random, str(number), neighbors)
            found.append(Question(text, str(number), wrong, "atomic number", min(level + 1, 5), cluster))
    return found


def characters(random: Random) -> list[Question]:
    """Unicode's names of characters; the wrong ones are of the same block."""
    found = []
    for number, (block, level) in enumerate(CHARACTERS):
        chosen = random.sample(block, min(len(block), MOST_OF_A_BLOCK))
        for place, character in enumerate(chosen):
            name, cluster = unicodedata.name(character), f"characters {number}"
            others = [other for other in block if other != character]
            if place % 2:
                names = [unicodedata.name(other) for other in random.sample(others, min(len(others), 7))]
                text = f"What is the Unicode name of the character {character}?"
                wrong = wrong_answers(random, name, names)
                found.append(Question(text, name, wrong, "Unicode name", level, cluster))
            else:
                text = f'Which character has the Unicode name "{name}"?'
                wrong = wrong_answers(random, character, others)
                found.append(Question(text, character, wrong, "Unicode character", min(level + 1, 5), cluster))
    return found


def status_codes(random: Random) -> list[Question]:
    """Status codes of HTTP and their phrases."""
    found = []
    for code, level in STATUS_CODES.items():
        phrase, cluster = HTTPStatus(code).phrase, f"status code {code}"
        same = [other for other in STATUS_CODES if other // 100 == code // 100 and other != code]
        rest = [other for other in STATUS_CODES if other // 100 != code // 100]
        others = random.sample(same, len(same)) if level > 2 and len(same) >= 3 else random.sample(rest, 8)
        wrong = wrong_answers(random, str(code), [str(other) for other in others])
        text = f'Which HTTP status code means "{phrase}"?'
        found.append(Question(text, str(code), wrong, "HTTP status", level, cluster))
        phrases = [HTTPStatus(other).phrase for other in others[:7]]
        text = f"What does the HTTP status code {code} mean?"
        found.append(Question(text, phrase, wrong_answers(random, phrase, phrases), "HTTP status", level, cluster))
    return found
