"""Questions on numbers: calculations, comparisons, sequences, numerals."""

from collections.abc import Callable
from random import Random

from lopt_hf.retention.questions.question import Question, draw, near, wrong_answers

__all__ = ["number_words", "numbers", "roman_numeral"]

ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
TENS = "zero ten twenty thirty forty fifty sixty seventy eighty ninety".split()
ROMAN = {1000: "M", 900: "CM", 500: "D", 400: "CD", 100: "C", 90: "XC", 50: "L", 40: "XL", 10: "X", 9: "IX", 5: "V"}
ROMAN |= {4: "IV", 1: "I"}
NAMES = "Anna Ben Clara David Emma Frank Grace Henry Ida Jack Karen Leo Maria Noah Olga Paul".split()
THINGS = "apples books coins stamps cards pencils shells marbles stickers eggs".split()


def numbers(random: Random) -> list[Question]:
    """Makes the questions on numbers."""
    return [
        *draw(random, addition, 18),
        *draw(random, multiplication, 16),
        *draw(random, word_problem, 18),
        *draw(random, comparison, 10),
        *draw(random, sequence, 14),
        *draw(random, numeral, 12),
        *draw(random, roman, 8),
        *draw(random, percentage, 10, (2, 3, 4, 5)),
        *draw(random, property_of_number, 10, (2, 3, 4, 5)),
    ]


def number_words(number: int) -> str:
    """Returns a number from 0 to 999,999 in words."""
    if number >= 1000:
        thousands, rest = divmod(number, 1000)
        return f"{number_words(thousands)} thousand{f' {number_words(rest)}' if rest else ''}"
    if number >= 100:
        hundreds, rest = divmod(number, 100)
        return f"{ONES[hundreds]} hundred{f' {number_words(rest)}' if rest else ''}"
    if number >= 20:
        tens, ones = divmod(number, 10)
        return TENS[tens] + (f"-{ONES[ones]}" if ones else "")
    return ONES[number]


def roman_numeral(number: int) -> str:
    """Returns a number from 1 to 3,999 in Roman numerals."""
    text = ""
    for value, letters in ROMAN.items():
        count, number = divmod(number, value)
        text += letters * count
    return text


def of_digits(random: Random, digits: int) -> int:
    """Draws a number of so many digits; of one digit none below 2."""
    return random.randint(max(2, 10 ** (digits - 1)), 10**digits - 1)


def _slips(answer: int) -> list[int]:
    """How far from a sum the usual mistakes lead: one off, or a carry forgotten."""
    return [1, 2, 3, *(10**power for power in range(1, len(str(answer))))]


def addition(random: Random, level: int) -> Question | None:
    """Sums and differences of numbers of as many digits as the level says; of level 5 with three numbers."""
    a, b = sorted((of_digits(random, level), of_digits(random, level)), reverse=True)
    sign = random.choice("+-")
    text, answer = (f"{a} {sign} {b}", a + b if sign == "+" else a - b)
    if level == 5:
        c = of_digits(random, 4)
        text, answer = f"{text} + {c}", answer + c
    wrong = near(random, answer, [*_slips(answer), 9, 11] if level > 1 else [1, 2, 3])
    return Question(f"What is {text}?", str(answer), wrong, "addition", level, f"addition {sign} {level}")


def multiplication(random: Random, level: int) -> Question | None:
    """Products, and divisions without a remainder."""
    low, high = {1: ((2, 5), (2, 9)), 2: ((2, 9), (6, 12)), 3: ((3, 9), (13, 99)), 4: ((11, 39), (11, 99))}.get(
        level, ((41, 99), (111, 999))
    )
    a, b = random.randint(*low), random.randint(*high)
    if random.random() < 0.5:
        steps = [a, b, 2 * a, 10, 1, 2, 20]
        sign, text, answer = "*", f"{a} * {b}", a * b
    else:
        steps = [1, 2, 3, 10]
        sign, text, answer = "/", f"{a * b} / {a}", b
    wrong = near(random, answer, steps, least=1)
    return Question(f"What is {text}?", str(answer), wrong, "multiplication", level, f"multiplication {sign} {level}")


def _gets(random: Random, most: int) -> tuple[str, int]:
    name, thing, a, b = random.choice(NAMES), random.choice(THINGS), *random.sample(range(3, most), 2)
    return f"{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have now?", a + b


def _gives(random: Random, most: int) -> tuple[str, int]:
    name, thing, b = random.choice(NAMES), random.choice(THINGS), random.randint(3, most)
    a = b + random.randint(2, most)
    return f"{name} has {a} {thing} and gives {b} of them away. How many {thing} are left?", a - b


def _boxes(random: Random, most: int) -> tuple[str, int]:
    thing, a, b = random.choice(THINGS), random.randint(3, most), random.randint(4, 12)
    return f"There are {a} boxes with {b} {thing} in each. How many {thing} are there in all?", a * b


def _shared(random: Random, most: int) -> tuple[str, int]:
    thing, a, b = random.choice(THINGS), random.randint(3, 9), random.randint(3, most)
    return f"{a * b} {thing} are shared equally by {a} children. How many {thing} does each child get?", b


def _change(random: Random, most: int) -> tuple[str, int]:
    name, thing, a, price = random.choice(NAMES), random.choice(THINGS), random.randint(2, 9), random.randint(2, most)
    paid = (a * price // 50 + 1) * 50
    return (
        f"{name} buys {a} {thing} for {price} dollars each and pays with {paid} dollars. How many dollars does {name} "
        "get back?",
        paid - a * price,
    )


def _boxes_and_loose(random: Random, most: int) -> tuple[str, int]:
    name, thing = random.choice(NAMES), random.choice(THINGS)
    a, b, c = random.randint(3, 9), random.randint(4, most), random.randint(3, 20)
    return f"{name} has {a} bags of {b} {thing} and {c} loose ones. How many {thing} does {name} have?", a * b + c


def _speed(random: Random, most: int) -> tuple[str, int]:
    a, speed, b = random.randint(2, 5), random.randint(3, most) * 10, random.randint(20, 90)
    return (
        f"A train goes for {a} hours at {speed} kilometers an hour, and then {b} kilometers more. How many kilometers "
        "does it go?",
        a * speed + b,
    )


def _two_friends(random: Random, most: int) -> tuple[str, int]:
    one, two, thing = *random.sample(NAMES, 2), random.choice(THINGS)
    a, times, given = random.randint(12, most), random.randint(2, 6), random.randint(3, 11)
    return (
        f"{one} has {a} {thing}. {two} has {times} times as many, and gives {given} of them to {one}. How many "
        f"{thing} does {two} have then?",
        a * times - given,
    )


def _ages(random: Random, most: int) -> tuple[str, int]:
    one, two, three = random.sample(NAMES, 3)
    a, older, twice, years = random.randint(5, most), random.randint(2, 9), random.randint(2, 3), random.randint(3, 12)
    return (
        f"{one} is {a} years old. {two} is {older} years older than {one}, and {three} is {twice} times as old as "
        f"{two}. How old will {three} be in {years} years?",
        (a + older) * twice + years,
    )


Story = Callable[[Random, int], tuple[str, int]]
STORIES: dict[int, tuple[tuple[Story, int], ...]] = {
    1: ((_gets, 10), (_gives, 9)),
    2: ((_gets, 60), (_gives, 40), (_boxes, 9)),
    3: ((_shared, 15), (_boxes, 30), (_gives, 400)),
    4: ((_change, 19), (_boxes_and_loose, 20), (_speed, 11)),
    5: ((_two_friends, 60), (_ages, 14)),
}


def word_problem(random: Random, level: int) -> Question | None:
    """Short stories: one step up to level 3, two at level 4, three at level 5."""
    story, most = random.choice(STORIES[level])
    text, answer = story(random, most)
    wrong = near(random, answer, [1, 2, 3, 5, 10, *(step for step in (12, 20, 100) if level > 2)], least=1)
    return Question(text, str(answer), wrong, "word problem", level, f"word problem{story.__name__} {level}")


def _listed(items: list[str]) -> str:
    return f"{', '.join(items[:-1])} and {items[-1]}"


def comparison(random: Random, level: int) -> Question | None:
    """The largest or the smallest of four numbers: whole ones, decimals, fractions."""
    makers: dict[int, Callable[[], str]] = {
        1: lambda: str(random.randint(10, 99)),
        2: lambda: str(random.randint(1000, 1999)),
        3: lambda: f"0.{random.randint(10, 99)}",
        4: lambda: f"{random.randint(7, 9)}.{random.choice([random.randint(1, 9), random.randint(11, 99)])}",
        5: lambda: f"{(top := random.randint(2, 9))}/{top + random.randint(1, 9)}",
    }
    shown = [makers[level]() for _ in range(4)]
    values = [_value(text) for text in shown]
    if len(set(values)) < 4:
        return None
    which, pick = random.choice((("largest", max), ("smallest", min)))
    answer = shown[values.index(pick(values))]
    wrong = tuple(text for text in shown if text != answer)
    return Question(
        f"Which is the {which} of the numbers {_listed(shown)}?",
        answer,
        wrong,
        "comparison",
        level,
        f"{which} {level}",
    )


def _value(text: str) -> float:
    top, _, bottom = text.partition("/")
    return int(top) / int(bottom) if bottom else float(text)


def sequence(random: Random, level: int) -> Question | None:
    """The number that continues a sequence."""
    start, step = random.randint(1, 20), random.randint(2, 9)
    if level == 1:
        step = random.choice((1, 2, 5, 10))
        terms, kind = [start + step * i for i in range(6)], "steps"
    elif level == 2:
        terms, kind = [100 + start - step * i for i in range(6)], "steps down"
    elif level == 3:
        first, factor = random.choice((1, start)), random.choice((2, 3))
        terms, kind = [first * factor**i for i in range(5)], "factors"
    elif level == 4:
        terms, kind = [start, start + step], "sums of two"
        while len(terms) < 7:
            terms.append(terms[-1] + terms[-2])
    else:
        kind = "growing steps"
        terms = [start + i * step + i * (i + 1) for i in range(6)]
    *shown, answer = terms
    wrong = near(random, answer, [1, 2, 3, 4, 10, step], least=1)
    return Question(
        f"Which number comes next: {', '.join(map(str, shown))}?", str(answer), wrong, "sequence", level, kind
    )


def _swapped(number: int) -> list[int]:
    """Numbers whose digits are those of another one in a different order, or one of them changed."""
    text = str(number)
    places = range(len(text) - 1)
    swaps = [int(text[:i] + text[i + 1] + text[i] + text[i + 2 :]) for i in places]
    changed = [number + sign * 10**power for power in range(len(text)) for sign in (1, -1)]
    return [other for other in (*swaps, *changed) if other != number and len(str(other)) == len(text)]


def numeral(random: Random, level: int) -> Question | None:
    """Numbers in words and in digits."""
    number = random.randint(*{1: (11, 59), 2: (60, 199), 3: (200, 999), 4: (1001, 9999)}.get(level, (10_001, 999_999)))
    others = _swapped(number)
    others += [number + step for step in (2, 20, -2) if len(str(number + step)) == len(str(number))]
    if random.random() < 0.5:
        wrong = wrong_answers(random, str(number), map(str, others))
        text = f'Which number is "{number_words(number)}"?'
        return Question(text, str(number), wrong, "numeral", level, f"from words {level}")
    answer = number_words(number)
    wrong = wrong_answers(random, answer, map(number_words, others))
    return Question(f"How is {number} written in words?", answer, wrong, "numeral", level, f"in words {level}")


def roman(random: Random, level: int) -> Question | None:
    """Roman numerals."""
    number = random.randint(*{1: (2, 12), 2: (11, 29), 3: (30, 99), 4: (100, 499)}.get(level, (500, 2500)))
    steps = [1, 2, 3, 4, *((10, 20) if level > 2 else ()), *((50, 100) if level > 3 else ())]
    if random.random() < 0.6:
        wrong = near(random, number, steps, least=1)
        text = f"Which number is written {roman_numeral(number)} in Roman numerals?"
        return Question(text, str(number), wrong, "Roman numeral", level, f"from Roman {level}")
    others = [number + sign * step for step in steps for sign in (1, -1) if number + sign * step > 0]
    answer = roman_numeral(number)
    wrong = wrong_answers(random, answer, map(roman_numeral, others))
    return Question(
        f"How is {number} written in Roman numerals?", answer, wrong, "Roman numeral", level, f"in Roman {level}"
    )


def percentage(random: Random, level: int) -> Question | None:
    """Parts of a number."""
    if level == 2:
        whole, (name, part) = 4 * random.randint(3, 30), random.choice((("half", 2), ("a quarter", 4)))
        text, answer = f"What is {name} of {whole}?", whole // part
    else:
        rate = random.choice({3: (10, 50), 4: (20, 25, 5)}.get(level, (15, 35, 45, 60, 85)))
        whole = 20 * random.randint(2, 40)
        text, answer = f"What is {rate} percent of {whole}?", whole * rate // 100
    wrong = near(random, answer, [1, 2, 3, 5, 10, 20], least=1)
    return Question(text, str(answer), wrong, "percentage", level, f"percentage {level}")


def property_of_number(random: Random, level: int) -> Question | None:
    """Even, divisible, square and prime numbers among others."""
    divisor = random.choice((6, 7, 8, 9))
    kinds: dict[int, tuple[str, Callable[[int], bool], range]] = {
        2: ("an even number", lambda number: number % 2 == 0, range(11, 300)),
        3: ("a square number", lambda number: round(number**0.5) ** 2 == number, range(16, 230)),
        4: (f"divisible by {divisor}", lambda number: number % divisor == 0, range(20, 200)),
        5: ("a prime number", is_prime, range(51, 400, 2)),
    }
    name, has_it, span = kinds[level]
    right = random.choice([number for number in span if has_it(number)])
    wrong = [number for number in span if not has_it(number) and len(str(number)) == len(str(right))]
    chosen = random.sample(wrong, 3)
    shown = [str(number) for number in random.sample([right, *chosen], 4)]
    text = f"Which of {_listed(shown)} is {name}?"
    return Question(text, str(right), tuple(map(str, chosen)), "property of a number", level, name)


def is_prime(number: int) -> bool:
    """Whether a number has no divisor but 1 and itself."""
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
