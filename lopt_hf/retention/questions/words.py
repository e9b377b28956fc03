"""Questions on words: letters, spelling, order, meaning, forms."""

from collections.abc import Callable
from random import Random

from lopt_hf.retention.questions.question import LEVELS, NUM_WRONG, Question, draw, near, wrong_answers
from lopt_hf.retention.questions.word_lists import (
    ALSO_FITS,
    ALSO_RIGHT,
    ANALOGIES,
    ANTONYMS,
    CATEGORIES,
    PLURALS,
    SPELLED,
    VERBS,
    WORDS,
)

__all__ = ["words"]

ORDINALS = "first second third fourth fifth sixth".split()
# Two categories between which a word could be meant otherwise: an orange is a fruit, and orange a color
ALIKE = (
    {"fruit", "color"},
    {"fruit", "tree"},
    {"fruit", "vegetable"},
    {"flower", "color"},
    {"tree", "flower"},
    {"metal", "color"},
    {"metal", "tool"},
    {"insect", "sport"},
    {"fish", "color"},
    {"drink", "color"},
)
VOWELS = "aeiou"


def words(random: Random) -> list[Question]:
    """Makes the questions on words."""
    return [
        *draw(random, letter_count, 12),
        *draw(random, letter_at, 12),
        *draw(random, alphabetical, 12),
        *draw(random, backwards, 8),
        *spelling(random),
        *antonym(random),
        *category(random),
        *analogy(random),
        *plural(random),
        *verb_form(random),
    ]


def letter_count(random: Random, level: int) -> Question | None:
    """How often a letter is in a word, or how many letters it has."""
    word = random.choice(WORDS[level])
    if random.random() < 0.7:  # of which any place among the choices is possible
        answer, text = len(word), f'How many letters does the word "{word}" have?'
        wrong = near(random, answer, [1, 2, 3])
    else:
        repeated = [letter for letter in word if word.count(letter) > 1]
        letter = random.choice(repeated if repeated and random.random() < 0.5 else word)
        answer = word.count(letter)
        text = f'How many times does the letter "{letter}" occur in the word "{word}"?'
        below = random.randint(min(answer - 1, 1), min(answer, NUM_WRONG))  # so many of the wrong ones are
        wrong = tuple(str(answer + step) for step in range(-below, NUM_WRONG - below + 1) if step)
    return Question(text, str(answer), wrong, "letter count", level, f"letters of {word}")


def letter_at(random: Random, level: int) -> Question | None:
    """The letter at a place of a word."""
    word = random.choice(WORDS[min(level, 4)])
    places: dict[int, list[int]] = {1: [0], 2: [0, len(word) - 1], 3: [1, 2], 4: [2, 3, 4], 5: [5, 4, -2, -3]}
    place = random.choice(places[level])
    if place >= len(word) or len(set(word)) < 3:
        return None
    name = {len(word) - 1: "last", -2: "second to last", -3: "third to last"}.get(place)
    name = name or ORDINALS[place]
    answer = word[place]
    others = [letter for letter in dict.fromkeys(word + random.choice(VOWELS) + random.choice("rstn"))]
    if len(set(others) - {answer}) < NUM_WRONG:
        return None
    wrong = wrong_answers(random, answer, others)
    return Question(
        f'Which is the {name} letter of the word "{word}"?', answer, wrong, "letter at a place", level, f"at {word}"
    )


def alphabetical(random: Random, level: int) -> Question | None:
    """The first or the last word in alphabetical order; with the level, words begin more alike."""
    pool = sorted({word for level_words in WORDS.values() for word in level_words} | set(_all_category_words()))
    alike = {1: 0, 2: 0, 3: 1, 4: 2, 5: 2}[level]
    start = random.choice(pool)[:alike]
    same = [word for word in pool if word.startswith(start) and word[alike:]]
    if alike == 0:
        same = list({word[0]: word for word in random.sample(pool, 40)}.values())
    if len(same) < 4:
        return None
    chosen = random.sample(same, 4)
    which, pick = ("first", min) if level % 2 else ("last", max)
    answer = pick(chosen)
    wrong = tuple(word for word in chosen if word != answer)
    text = f"Which of the words {', '.join(chosen[:3])} and {chosen[3]} comes {which} in alphabetical order?"
    return Question(text, answer, wrong, "alphabetical order", level, f"alphabetical {which} {level}")


def _all_category_words() -> list[str]:
    return [word for names in CATEGORIES.values() for word in names.split()]


def backwards(random: Random, level: int) -> Question | None:
    """A word written backwards."""
    word = random.choice(WORDS[level])
    answer = word[::-1]

    def misspelled() -> str:
        places = list(answer)
        for _ in range(random.choice((1, 2))):
            i = random.randrange(len(places) - 1)
            places[i], places[i + 1] = places[i + 1], places[i]
        return "".join(places)

    # From one another, as well as from the answer, so that it is not the one that all others are like
    others = [misspelled() for _ in range(30)]
    others = [text for text in dict.fromkeys(others) if text not in (answer, word)]
    if len(others) < NUM_WRONG:
        return None
    text = f'How is the word "{word}" written backwards?'
    return Question(text, answer, tuple(others[:NUM_WRONG]), "backwards", level, f"backwards {word}")


def spelling(random: Random) -> list[Question]:
    """The right spelling among wrong ones of the same word, and the word that is spelled right among others."""
    found = []
    for level, entries in SPELLED.items():
        for word, *slips in entries:
            text = f"Which spelling is right: {_in_some_order(random, [word, *slips])}?"
            found.append(Question(text, word, tuple(slips), "spelling", level, f"spelling {word}"))
        for word, *_ in entries:
            others = random.sample([entry for entry in entries if entry[0] != word], NUM_WRONG)
            wrong = tuple(random.choice(entry[1:]) for entry in others)
            text = f"Which of these words is spelled right: {_in_some_order(random, [word, *wrong])}?"
            found.append(Question(text, word, wrong, "spelling", min(level + 1, 5), f"spelling {word}"))
    return found


def _in_some_order(random: Random, items: list[str], joint: str = "or") -> str:
    *most, last = random.sample(items, len(items))
    return f"{', '.join(most)} {joint} {last}"


def antonym(random: Random) -> list[Question]:
    """Opposites; the wrong ones are opposites of other words of the same level."""
    found = []
    for level, entries in ANTONYMS.items():
        for one, other in entries:
            rest = [word for pair in entries if pair != (one, other) for word in pair]
            text = f'Which word means the opposite of "{one}"?'
            found.append(Question(text, other, wrong_answers(random, other, rest), "antonym", level, f"antonym {one}"))
    return found


def category(random: Random) -> list[Question]:
    """Which word belongs to a category, and which does not; rarer words are of a higher level."""
    found = []
    for name, members in CATEGORIES.items():
        others = [other for other in CATEGORIES if other != name and {name, other} not in ALIKE]
        for number, word in enumerate(members.split()):
            level = LEVELS[number // 2]
            if number % 2:
                wrong = [random.choice(CATEGORIES[other].split()[2 * level - 2 : 2 * level]) for other in others]
                what = f"a{'n' if name[0] in VOWELS else ''} {name}"
                shown = wrong_answers(random, word, wrong)
                text = f"Which of these is {what}: {_in_some_order(random, [word, *shown])}?"
                found.append(Question(text, word, shown, "category", level, f"category {name}"))
            else:
                strange = random.choice(CATEGORIES[random.choice(others)].split()[2 * level - 2 : 2 * level])
                shown = wrong_answers(random, strange, members.split())
                mixed = _in_some_order(random, [strange, *shown], "and")
                text = f"Three of the words {mixed} are of one kind, and one is of another. "
                text += "Which word is of another kind?"  # than "which does not belong?", which a small model misreads
                found.append(Question(text, strange, shown, "odd one out", level, f"odd one out of {name}"))
    return found


def analogy(random: Random) -> list[Question]:
    """The fourth word of an analogy; at higher levels the wrong ones stand in the same relation to other words."""
    found = []
    for number, (relation, entries) in enumerate(ANALOGIES.items()):
        everything = [entry[1] for name, other in ANALOGIES.items() if name != relation for entry in other]
        for place, (one, other) in enumerate(entries):
            example = entries[(place + 1 + number % 3) % len(entries)]
            own = [entry[1] for entry in entries if entry not in ((one, other), example)]
            own = [word for word in own if word not in ALSO_FITS.get(one, ())]
            level = 1 + 4 * place // len(entries)
            level = min(5, level + (place % 2))
            wrong = wrong_answers(random, other, random.sample(everything, 8) if level == 1 else own)
            text = f'"{example[0]}" is to "{example[1]}" as "{one}" is to which word?'
            found.append(Question(text, other, wrong, "analogy", level, f"analogy {relation}"))
    return found


def _with_other_vowels(random: Random, word: str) -> list[str]:
    """Two words of the same length, with another vowel in the place of the last one."""
    place = max(number for number, letter in enumerate(word) if letter in VOWELS)
    others = [vowel for vowel in VOWELS if vowel != word[place]]
    return [word[:place] + vowel + word[place + 1 :] for vowel in random.sample(others, 2)]


def _wrong_plurals(random: Random, singular: str, plural: str) -> list[str]:
    stem = singular[:-2] if len(singular) > 4 else singular
    made = [f"{singular}s", f"{singular}es", f"{plural}s", singular, f"{singular[:-1]}ies", f"{stem}i", f"{stem}en"]
    made += _with_other_vowels(random, plural)
    return [form for form in made if form not in (plural, *ALSO_RIGHT.get(singular, ()))]


def plural(random: Random) -> list[Question]:
    """Plurals, and singulars."""
    found = []
    for level, entries in PLURALS.items():
        for one, many in entries:
            wrong = wrong_answers(random, many, _wrong_plurals(random, one, many))
            text = f'Which form completes "one {one}, many ..."?'
            found.append(Question(text, many, wrong, "plural", level, f"plural {one}"))
            others = [f"{many}s", many, f"{one}e", many[:-1], many.removesuffix("es"), f"{one[:-1]}us", f"{one}en"]
            others += _with_other_vowels(random, one)
            wrong = wrong_answers(random, one, [form for form in others if form != one])
            text = f'Which form completes "many {many}, one ..."?'
            found.append(Question(text, one, wrong, "plural", level, f"plural {one}"))
    return found


def verb_form(random: Random) -> list[Question]:
    """Past tense and participle of irregular verbs; the wrong ones are the other forms and made-up ones."""
    asked: tuple[tuple[str, Callable[[tuple[str, ...]], str]], ...] = (
        ("the past tense", lambda forms: forms[1]),
        ("the past participle", lambda forms: forms[2]),
    )
    found = []
    for level, entries in VERBS.items():
        for base, past, participle in entries:
            made_up = [f"{base}{'d' if base.endswith('e') else 'ed'}", f"{past}ed", f"{past}en"]
            for name, pick in asked:
                answer = pick((base, past, participle))
                others = [base, past, participle, *made_up, *_with_other_vowels(random, answer)]
                others = [form for form in others if form not in ALSO_RIGHT.get(base, ())]
                wrong = wrong_answers(random, answer, others)
                text = f'Which is {name} of the verb "{base}"?'
                found.append(Question(text, answer, wrong, "verb form", level, f"verb {base}"))
    return found
