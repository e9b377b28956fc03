"""Questions on what short Python programs print; the answers are what Python itself prints."""

import builtins
import io
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from random import Random

from lopt_hf.retention.questions.question import Question, draw, near, wrong_answers

__all__ = ["programs", "run"]

NAMES = "anna ben cleo dora emil fred gina hugo".split()
ITEMS = "red blue green pink black white".split()
LETTERS = "python banana kitten summer orange planet rocket window".split()

# Program, programs with a slip of thought in it, name of the pattern
Draft = tuple[str, tuple[str, ...], str]

# What a program has to do to raise each
FAILURES: Mapping[int, tuple[tuple[str, str], ...]] = {
    1: (("{n} / 0", "ZeroDivisionError"), ("[{n}, {m}][{m} + 2]", "IndexError"), ("int('{word}')", "ValueError")),
    2: (
        ("{{'{word}': {n}}}['{other}']", "KeyError"),
        ("'{word}' + {n}", "TypeError"),
        ("print({word})", "NameError"),
        ("None.{word}()", "AttributeError"),
    ),
    3: (
        ("[{n}].remove({n} + {m})", "ValueError"),
        ("len({n})", "TypeError"),
        ("import {word}_{other}", "ModuleNotFoundError"),
        ("'{word}'.{other}", "AttributeError"),
        ("{n} % ({m} - {m})", "ZeroDivisionError"),
    ),
    4: (
        ("next(iter([]), *[])  # {word}", "StopIteration"),
        ("open('/no/{word}/{other}')", "FileNotFoundError"),
        ("a, b = [{n}, {m}, {n}]", "ValueError"),
        ("assert {n} < {n} - {m}", "AssertionError"),
        ("{{'{word}'}}.remove('{other}')", "KeyError"),
        ("'{word}'[{n}{m}:][0]", "IndexError"),
    ),
    5: (
        ("{{[{n}]: '{word}'}}", "TypeError"),
        ("b'\\xff{word}'.decode('utf-8')", "UnicodeDecodeError"),
        ("'{word}\\u00e9'.encode('ascii')", "UnicodeEncodeError"),
        ("max([])  # {word}", "ValueError"),
        ("({n}, {m})[0] = {m}", "TypeError"),
        ("import math; math.exp({n}000)", "OverflowError"),
    ),
}


def programs(random: Random) -> list[Question]:
    """Makes the questions on programs."""
    return [*draw(random, number_printed, 40), *draw(random, text_printed, 40), *draw(random, exception, 10)]


def run(program: str) -> str:
    """Returns what a program prints, without the end of the last line; of one that fails, its exception's name."""
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            exec(program, {})
    except Exception as error:  # whichever the program raises is the answer
        return type(error).__name__
    return printed.getvalue().removesuffix("\n")


def _asked(program: str) -> str:
    return f"What does this Python program print?\n{program}"


def number_printed(random: Random, level: int) -> Question | None:
    """Programs that print a number."""
    program, _, pattern = random.choice(NUMBERS[level])(random)
    printed = run(program)
    answer = int(printed)
    if not -50 <= answer <= 100_000:
        return None
    wrong = near(random, answer, [1, 2, 3, *((5, 10) if abs(answer) > 12 else ())], least=min(0, answer - 9))
    return Question(_asked(program), printed, wrong, "program: number", level, f"program {pattern}")


def text_printed(random: Random, level: int) -> Question | None:
    """Programs that print a text, a list or a truth value; the wrong ones are those of programs with a slip."""
    program, slips, pattern = random.choice(TEXTS[level])(random)
    answer = run(program)
    others = dict.fromkeys(text for text in map(run, slips) if text.strip() == text not in (answer, ""))
    if len(others) < 3 or not answer or any("\n" in text for text in (answer, *others)):
        return None
    wrong = wrong_answers(random, answer, others)
    return Question(_asked(program), answer, wrong, "program: text", level, f"program {pattern}")


def exception(random: Random, level: int) -> Question | None:
    """Statements that fail; each exception is right about as often as it is wrong."""
    pattern, _ = random.choice(FAILURES[level])
    word, other = random.sample(LETTERS, 2)
    n, m = random.randint(2, 9), random.randint(1, 9)
    statement = pattern.format(n=n, m=m, word=word, other=other).partition("  #")[0]
    answer = run(statement)
    names = [name for entries in FAILURES.values() for _, name in entries if not _is_one(answer, name)]
    wrong = tuple(dict.fromkeys(random.sample(names, len(names))))[:3]  # those that are right often are wrong often
    text = f"Which exception does this Python statement raise?\n{statement}"
    return Question(text, answer, wrong, "exception", level, f"exception {pattern}")


def _is_one(name: str, other: str) -> bool:
    """Whether an exception is another one too, as a `UnicodeDecodeError` is a `ValueError`."""
    return issubclass(getattr(builtins, name), getattr(builtins, other))


def _sum(random: Random) -> Draft:
    a, b = random.sample(range(2, 20), 2)
    return f"print({a} + {b})", (), "sum"


def _length(random: Random) -> Draft:
    return f'print(len("{random.choice(LETTERS + NAMES)}"))', (), "length of a text"


def _items(random: Random) -> Draft:
    return f"print(len({random.sample(range(1, 99), random.randint(2, 7))}))", (), "length of a list"


def _extreme(random: Random) -> Draft:
    return f"print({random.choice(('max', 'min'))}({random.sample(range(1, 60), 4)}))", (), "extreme of a list"


def _precedence(random: Random) -> Draft:
    a, b, c = random.sample(range(2, 10), 3)
    return f"print({a} + {b} * {c})", (), "precedence"


def _floor(random: Random) -> Draft:
    a, b = random.randint(10, 60), random.randint(3, 9)
    return f"print({a} {random.choice(('//', '%'))} {b})", (), "floor division and remainder"


def _assigned(random: Random) -> Draft:
    a, b = random.sample(range(2, 12), 2)
    return f"x = {a}\ny = x + {b}\nprint(x * y)", (), "assignment"


def _indexed(random: Random) -> Draft:
    numbers = random.sample(range(1, 60), 5)
    return f"numbers = {numbers}\nprint(numbers[{random.choice((1, 2, 3, -1, -2))}])", (), "index"


def _loop_sum(random: Random) -> Draft:
    a = random.randint(4, 8)
    return f"total = 0\nfor i in range({a}):\n    total += i\nprint(total)", (), "sum in a loop"


def _branch(random: Random) -> Draft:
    x, y, a, b = random.randint(1, 20), random.randint(5, 15), random.randint(2, 5), random.randint(3, 9)
    return f"x = {x}\nif x > {y}:\n    x = x * {a}\nelse:\n    x = x + {b}\nprint(x)", (), "branch"


def _function(random: Random) -> Draft:
    a, b, c = random.sample(range(2, 10), 3)
    return f"def f(x, y={a}):\n    return x * y + 1\n\nprint(f({b}) + f({c}, 2))", (), "function with a default"


def _counted(random: Random) -> Draft:
    limit, divisor = random.randint(12, 30), random.randint(3, 5)
    return f"print(len([n for n in range({limit}) if n % {divisor} == 0]))", (), "comprehension"


def _range(random: Random) -> Draft:
    a, b, c = random.randint(1, 5), random.randint(14, 25), random.randint(3, 5)
    return f"print(sum(range({a}, {b}, {c})))", (), "range with a step"


def _nested(random: Random) -> Draft:
    a, b = random.randint(3, 5), random.randint(3, 6)
    return (
        f"count = 0\nfor i in range({a}):\n    for j in range(i, {b}):\n        count += 1\nprint(count)",
        (),
        "nested loops",
    )


def _while(random: Random) -> Draft:
    n = random.randint(20, 90)
    return f"n, steps = {n}, 0\nwhile n > 1:\n    n //= 2\n    steps += 1\nprint(steps + n)", (), "halving loop"


def _aliased(random: Random) -> Draft:
    numbers, add = random.sample(range(1, 10), 3), random.randint(1, 9)
    copied = random.choice(("", "[:]"))
    return f"a = {numbers}\nb = a{copied}\nb.append({add})\nprint(sum(a))", (), "alias or copy"


def _recursion(random: Random) -> Draft:
    a, b = random.randint(5, 9), random.randint(1, 3)
    return (
        f"def f(n):\n    if n < 2:\n        return {b}\n    return f(n - 1) + f(n - 2)\n\nprint(f({a}))",
        (),
        "recursion",
    )


def _bits(random: Random) -> Draft:
    a, b = random.sample(range(5, 31), 2)
    return f"print({a} {random.choice('&|^')} {b})", (), "bits"


def _collatz(random: Random) -> Draft:
    n = random.randint(5, 12)
    return (
        f"n, steps = {n}, 0\nwhile n != 1:\n    n = 3 * n + 1 if n % 2 else n // 2\n    steps += 1\nprint(steps)",
        (),
        "3n + 1",
    )


def _closure(random: Random) -> Draft:
    a, b, c = random.sample(range(2, 9), 3)
    return (
        f"def make(k):\n    def add(x):\n        nonlocal k\n        k += x\n        return k\n    return add\n\n"
        f"f = make({a})\nf({b})\nprint(f({c}))",
        (),
        "closure",
    )


def _default_list(random: Random) -> Draft:
    a, b, c = random.sample(range(2, 9), 3)
    return (
        f"def f(x, seen=[]):\n    seen.append(x)\n    return sum(seen)\n\nf({a})\nf({b})\nprint(f({c}))",
        (),
        "list as a default",
    )


Writer = Callable[[Random], Draft]
NUMBERS: Mapping[int, tuple[Writer, ...]] = {
    1: (_sum, _length, _items, _extreme),
    2: (_precedence, _floor, _assigned, _indexed),
    3: (_loop_sum, _branch, _counted, _aliased),
    4: (_function, _range, _nested, _while),
    5: (_recursion, _bits, _collatz, _closure, _default_list),
}


def _variants(first: str, *others: str, pattern: str) -> Draft:
    return first, others, pattern


def _method(random: Random) -> Draft:
    word = random.choice(LETTERS + NAMES)
    calls = ["upper()", "capitalize()", "title().swapcase()", "lower()", "upper()[:-1]", "capitalize()[::-1]"]
    first = random.choice(calls[:2])
    return _variants(*(f'print("{word}".{call})' for call in (first, *calls)), pattern=f"method {first}")


def _compared(random: Random) -> Draft:
    a, b = random.sample(range(1, 20), 2)
    first = f"print({a} {random.choice('<>')} {b})"
    return _variants(first, "print(True)", "print(False)", "print(None)", f"print({a})", pattern="comparison")


def _joined(random: Random) -> Draft:
    one, two = random.sample(LETTERS + NAMES, 2)
    orders = [f'"{one}" + "{two}"', f'"{two}" + "{one}"', f'"{one} {two}"', f'"{one}" + "{one}"', f'"{two} {one}"']
    return _variants(*(f"print({order})" for order in orders), pattern="texts joined")


def _added(random: Random) -> Draft:
    a, b = random.sample(range(1, 10), 2)
    rows = [f"[{a}] + [{b}]", f"[{b}, {a}]", f"[{a + b}]", f"[{a}, {b}, {b}]", f"[[{a}], [{b}]]", f"[{b}]"]
    return _variants(*(f"print({row})" for row in rows), pattern="lists joined")


def _slice(random: Random) -> Draft:
    word, i, j = random.choice(LETTERS), random.randint(1, 2), random.randint(3, 5)
    spans = [(i, j), (i, j + 1), (i - 1, j), (i + 1, j), (i - 1, j - 1), (i + 1, j + 1), (i, j - 1)]
    return _variants(*(f'print("{word}"[{a}:{b}])' for a, b in spans), pattern="slice of a text")


def _sorted(random: Random) -> Draft:
    numbers = random.sample(range(1, 30), 4)
    calls = ["sorted(x)", "sorted(x, reverse=True)", "x", "x[::-1]", "sorted(x)[1:] + sorted(x)[:1]"]
    first = random.choice(calls[:2])
    return _variants(*(f"x = {numbers}\nprint({call})" for call in (first, *calls)), pattern="sorted list")


def _multiplied(random: Random) -> Draft:
    word, n = random.choice(NAMES)[:3], random.randint(2, 4)
    orders = [
        f'"{word}" * {n}',
        f'"{word}" * {n + 1}',
        f'"{word}" * {n - 1}',
        f'"{word}{n}"',
        f'" ".join(["{word}"] * {n})',
    ]
    return _variants(*(f"print({order})" for order in orders), pattern="text repeated")


def _split(random: Random) -> Draft:
    words = random.sample(ITEMS, 4)
    text = "-".join(words)
    i = random.randrange(4)
    return _variants(
        *(f'print("{text}".split("-")[{n}])' for n in [i, *(n for n in range(4) if n != i)]), pattern="split text"
    )


def _replaced(random: Random) -> Draft:
    word = random.choice(["banana", "kitten", "summer", "rabbit", "pepper", "coffee", "bottle", "letter"])
    letter = random.choice([c for c in word if word.count(c) > 1])
    new = random.choice("xyz")
    calls = [f'replace("{letter}", "{new}")', f'replace("{letter}", "{new}", 1)', f'replace("{letter}", "")']
    calls += ["strip()", f'replace("{letter}", "{new}{new}")', f'replace("{new}", "{letter}")']
    first = random.choice(calls[:3])
    return _variants(*(f'print("{word}".{call})' for call in (first, *calls)), pattern="replaced letters")


def _comprehension(random: Random) -> Draft:
    a, b = random.randint(3, 5), random.randint(2, 4)
    rows = [f"n * {b} for n in range({a})", f"n * {b} for n in range({a + 1})", f"n * {b} for n in range(1, {a + 1})"]
    rows += [f"n + {b} for n in range({a})", f"n ** {b} for n in range({a})", f"n * {b} for n in range(1, {a})"]
    return _variants(*(f"print([{row}])" for row in rows), pattern="list comprehension")


def _dictionary(random: Random) -> Draft:
    (one, two), (a, b, c) = random.sample(NAMES, 2), random.sample(range(1, 20), 3)
    start = f'd = {{"{one}": {a}, "{two}": {b}}}\nd["{one}"] = {c}\n'
    rows = ["list(d.values())", f"[{a}, {b}]", f"[{a}, {b}, {c}]", f"[{b}, {c}]", "list(d)", f"[{c}]"]
    return _variants(*(f"{start}print({row})" for row in rows), pattern="values of a dictionary")


def _stepped(random: Random) -> Draft:
    word = random.choice(LETTERS)
    spans = ["::2", "1::2", "::-1", "::3", ":3", "::-2", "3:"]
    first = random.choice(spans[:4] + spans[5:6])
    return _variants(*(f'print("{word}"[{span}])' for span in (first, *spans)), pattern="slice with a step")


def _zipped(random: Random) -> Draft:
    numbers, word = random.sample(range(1, 10), 3), random.choice(LETTERS)[:2]
    rows = [f'list(zip({numbers}, "{word}"))', f'list(zip("{word}", {numbers}))', f'list(enumerate("{word}"))']
    rows += [
        f'list(enumerate("{word}", 1))',
        f'list(zip({numbers[1:]}, "{word}"))',
        f'list(zip({numbers[::-1]}, "{word}"))',
    ]
    first = random.choice(rows[:4])
    return _variants(*(f"print({row})" for row in (first, *rows)), pattern="pairs")


def _operators(random: Random) -> Draft:
    a, b = random.choice((0, random.randint(1, 9))), random.randint(2, 9)
    word = random.choice(NAMES)
    rows = [
        f'{a} or "{word}"',
        f'{a} and "{word}"',
        f'"{word}" and {b}',
        f'"" or {b}',
        f'not "{word}"',
        "None or False",
    ]
    first = random.choice(rows[:5])
    values = ["True", "False", f"{a}", f"{b}", f'"{word}"', "None"]
    return _variants(*(f"print({row})" for row in (first, *values)), pattern="and, or, not")


def _keyed(random: Random) -> Draft:
    words = random.sample(ITEMS, 4)
    keys = ["key=len", "key=lambda word: word[-1]", "", "reverse=True", "key=len, reverse=True"]
    first = random.choice((keys[0], keys[1], keys[4]))
    start = f"words = {words}\n"
    rows = [*(f"sorted(words, {key})[:2]" for key in (first, *keys)), "words[:2]", "words[2:]", "words[1:3]"]
    return _variants(*(f"{start}print({row})" for row in rows), pattern="sorted by a key")


def _format(random: Random) -> Draft:
    number = random.randint(1000, 99_999) / 100
    specs = [".1f", ".0f", ".2f", ".3f", "08.1f", "08.2f", ".1e"]
    first = random.choice((".1f", ".0f", ".3f", ".1e"))
    return _variants(*(f'print(f"{{{number}:{spec}}}")' for spec in (first, *specs)), pattern="format of a number")


def _generator(random: Random) -> Draft:
    a, b = random.randint(2, 4), random.randint(2, 5)
    start = f"def f(n):\n    while n > 0:\n        yield n\n        n -= {a}\n\n"
    top = a * b + random.randint(1, a)
    rows = [
        f"list(f({top}))",
        f"list(f({top}))[1:]",
        f"list(range({top}, -{a}, -{a}))",
        f"list(range({top}, 1, -1))[:4]",
    ]
    rows += [f"list(range({top}, 0, -{a}))[:-1]", f"list(f({top}))[::-1]"]
    return _variants(*(f"{start}print({row})" for row in rows), pattern="generator")


def _shared_rows(random: Random) -> Draft:
    a, n = random.randint(1, 9), random.randint(2, 3)
    made = random.choice((f"[[0] * 2] * {n}", f"[[0] * 2 for _ in range({n})]"))
    start = f"rows = {made}\nrows[0][1] = {a}\n"
    others = [f"[[0, {a}]] + [[0, 0]] * {n - 1}", f"[[0, {a}]] * {n}", f"[[{a}, 0]] * {n}", f"[[0, 0]] * {n}"]
    others += [f"[[{a}, 0]] + [[0, 0]] * {n - 1}"]
    return _variants(f"{start}print(rows)", *(f"print({row})" for row in others), pattern="rows shared or not")


def _unpacked(random: Random) -> Draft:
    numbers = random.sample(range(1, 20), 5)
    targets = ["a, *b", "*b, a", "a, *b, c", "a, c, *b", "*b, a, c"]
    first = random.choice(targets)
    return _variants(*(f"{target} = {numbers}\nprint(b)" for target in (first, *targets)), pattern="starred target")


def _sets(random: Random) -> Draft:
    a, b = sorted(random.sample(range(1, 10), 4)), sorted(random.sample(range(1, 10), 4))
    first = random.choice("&|-^")
    rows = [f"sorted(set({a}) {sign} set({b}))" for sign in (first, *"&|-^")]
    return _variants(*(f"print({row})" for row in [*rows, f"{a}", f"{b}"]), pattern="sets")


def _modified(random: Random) -> Draft:
    numbers = random.sample(range(1, 10), 4)
    i, new = random.randint(1, 2), random.randint(10, 19)
    calls = [
        f"insert({i}, {new})",
        f"append({new})",
        f"insert({i + 1}, {new})",
        f"insert({i - 1}, {new})",
        f"pop({i})",
    ]
    first = random.choice((calls[0], calls[4], f"remove({numbers[i]})"))
    return _variants(
        *(f"x = {numbers}\nx.{call}\nprint(x)" for call in (first, *calls, "reverse()")), pattern="list changed"
    )


TEXTS: Mapping[int, tuple[Writer, ...]] = {
    1: (_method, _joined, _added, _compared),
    2: (_slice, _sorted, _multiplied, _split),
    3: (_replaced, _comprehension, _dictionary, _modified),
    4: (_stepped, _zipped, _operators, _sets),
    5: (_keyed, _format, _generator, _shared_rows, _unpacked),
}
