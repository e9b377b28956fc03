"""Questions on grammar: which form of a verb, which pronoun, a sentence takes."""

from collections.abc import Mapping
from random import Random

from lopt_hf.retention.questions.question import Question, draw

__all__ = ["grammar"]

# Subject by level, one and many; the level says how far the verb is from its noun, and what stands between
SINGULAR: Mapping[int, tuple[str, ...]] = {
    1: ("She", "He", "My sister", "The dog", "Our teacher"),
    2: ("The old farmer", "The girl next door", "Everybody", "The woman at the desk", "Nobody here"),
    3: (
        "The key to the drawers",
        "The owner of the shops",
        "A box of pencils",
        "Each of the boys",
        "One of my friends",
    ),
    4: (
        "The captain that the sailors admire",
        "The letter that came with the parcels",
        "The man whose sons are farmers",
        "The list of all the names",
        "Every one of the neighbors",
    ),
    5: (
        "The report on the causes of the accidents at the factories",
        "Neither of the two candidates that the members prefer",
        "The reason for the delays of the trains",
        "The number of visitors who complain",
        "Not only the players but also the coach",
    ),
}
PLURAL: Mapping[int, tuple[str, ...]] = {
    1: ("They", "We", "My sisters", "The dogs", "Our teachers"),
    2: ("The old farmers", "The girls next door", "Both of us", "The women at the desk", "Most people here"),
    3: (
        "The keys to the drawer",
        "The owners of the shop",
        "Two boxes of chalk",
        "All of the boys",
        "Some of my friends",
    ),
    4: (
        "The sailors that the captain admires",
        "The parcels that came with the letter",
        "The men whose son is a farmer",
        "The names on the list",
        "Several of the neighbors",
    ),
    5: (
        "The reports on the cause of the accident at the factory",
        "Both of the candidates that the chairman prefers",
        "The reasons for the delay of the train",
        "A number of visitors from the town",
        "Not only the coach but also the players",
    ),
}
# third person, base, -ing, participle; what follows
VERBS = (
    ("goes", "go", "going", "gone", "to the market"),
    ("writes", "write", "writing", "written", "to the mayor"),
    ("takes", "take", "taking", "taken", "the early train"),
    ("speaks", "speak", "speaking", "spoken", "to the guests"),
    ("gives", "give", "giving", "given", "too much away"),
    ("eats", "eat", "eating", "eaten", "in the garden"),
    ("drives", "drive", "driving", "driven", "to the coast"),
    ("knows", "know", "knowing", "known", "the answer"),
    ("forgets", "forget", "forgetting", "forgotten", "the keys"),
    ("sings", "sing", "singing", "sung", "in the choir"),
)
REFLEXIVES = {"he": "himself", "she": "herself", "it": "itself", "they": "themselves", "we": "ourselves"}
WHO = {
    "he": ("The boy", "My uncle", "The king", "The waiter", "Her husband"),
    "she": ("The girl", "My aunt", "The queen", "The waitress", "His wife"),
    "it": ("The robot", "The kettle", "The machine", "The old clock", "The computer"),
    "they": ("The children", "My parents", "The neighbors", "The two kings", "The dancers"),
    "we": ("My brother and I", "You and I", "My friends and I", "All of us", "Both of us"),
}
BETWEEN = {
    1: "",
    2: " in the house",
    3: " who came with the queen and her brother",
    4: ", as the king and his daughters told me,",
    5: " that the two boys and their mother had seen with the mayor's wife",
}


def grammar(random: Random) -> list[Question]:
    """Makes the questions on grammar."""
    return [*draw(random, verb, 20), *draw(random, reflexive, 10)]


def verb(random: Random, level: int) -> Question | None:
    """One of four forms of a verb, each of which is right equally often."""
    third, base, running, participle, rest = random.choice(VERBS)
    singular = random.random() < 0.5
    subject = random.choice((SINGULAR if singular else PLURAL)[level])
    auxiliary = random.randrange(4)
    if auxiliary == 0:
        singular, subject = True, random.choice(SINGULAR[level])
        text, answer = f"{subject} ___ {rest} every day", third
    elif auxiliary == 1:
        subject = random.choice(PLURAL[level])
        text, answer = f"{subject} ___ {rest} every day", base
    elif auxiliary == 2:
        text, answer = f"{subject} kept ___ {rest}", running  # after "is", a participle fits too
    else:
        text, answer = f"{subject} {'has' if singular else 'have'} already ___ {rest}", participle
    wrong = tuple(form for form in (third, base, running, participle) if form != answer)
    kind = ("singular", "plural", "progressive", "perfect")[auxiliary]
    question = f'Which word completes the sentence "{text}."?'
    return Question(question, answer, wrong, "agreement", level, f"agreement {kind} {level}")


def reflexive(random: Random, level: int) -> Question | None:
    """The pronoun that goes back to the subject, past other nouns."""
    person = random.choice(list(WHO))
    subject = random.choice(WHO[person])
    if person in ("it", "we") and level in (3, 5):
        return None  # "the kettle who", and "all of us that the boys had seen"
    answer = REFLEXIVES[person]
    others = [form for form in REFLEXIVES.values() if form != answer]
    if level in (3, 5):  # where two of them are never right
        others.remove(random.choice(("itself", "ourselves")))
    others = random.sample(others, 3)
    ending = random.choice(("hurt ___", "blamed ___ for it", "looked after ___", "made a copy of ___"))
    if person == "it":
        ending = random.choice(("switched ___ off", "repaired ___", "moved by ___", "damaged ___"))
    text = f'Which word completes the sentence "{subject}{BETWEEN[level]} {ending}."?'
    return Question(text, answer, tuple(others), "reflexive pronoun", level, f"reflexive {person} {level}")
