"""Questions on units, the calendar and the clock."""

from datetime import date, timedelta
from random import Random

from lopt_hf.retention.questions.question import Question, draw, near, wrong_answers

__all__ = ["UTC_OFFSETS", "measures"]

WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = (
    "January February March April May June July August September October November December"  # in their order
).split()

# larger unit, smaller unit, how many of them, level
UNITS = (
    ("minutes", "seconds", 60, 2),
    ("hours", "minutes", 60, 1),
    ("days", "hours", 24, 1),
    ("weeks", "days", 7, 1),
    ("years", "months", 12, 1),
    ("decades", "years", 10, 2),
    ("centuries", "years", 100, 2),
    ("hours", "seconds", 3600, 4),
    ("days", "minutes", 1440, 5),
    ("meters", "centimeters", 100, 1),
    ("kilometers", "meters", 1000, 2),
    ("centimeters", "millimeters", 10, 2),
    ("meters", "millimeters", 1000, 3),
    ("kilograms", "grams", 1000, 2),
    ("tonnes", "kilograms", 1000, 3),
    ("liters", "milliliters", 1000, 3),
    ("feet", "inches", 12, 2),
    ("yards", "feet", 3, 2),
    ("yards", "inches", 36, 4),
    ("miles", "feet", 5280, 5),
    ("miles", "yards", 1760, 5),
    ("pounds", "ounces", 16, 3),
    ("gallons", "quarts", 4, 3),
    ("quarts", "pints", 2, 3),
    ("gallons", "pints", 8, 4),
    ("pints", "cups", 2, 4),
    ("hectares", "square meters", 10_000, 5),
    ("square meters", "square centimeters", 10_000, 5),
    ("kilobytes", "bytes", 1000, 3),
    ("kibibytes", "bytes", 1024, 4),
    ("bytes", "bits", 8, 3),
    ("dozens", "pieces", 12, 1),
)

# City, its zone and its hours ahead of UTC; cities that do not change their clocks
UTC_OFFSETS = (
    ("Tokyo", "Asia/Tokyo", 9),
    ("Seoul", "Asia/Seoul", 9),
    ("Shanghai", "Asia/Shanghai", 8),
    ("Hong Kong", "Asia/Hong_Kong", 8),
    ("Singapore", "Asia/Singapore", 8),
    ("Manila", "Asia/Manila", 8),
    ("Bangkok", "Asia/Bangkok", 7),
    ("Jakarta", "Asia/Jakarta", 7),
    ("Dhaka", "Asia/Dhaka", 6),
    ("Karachi", "Asia/Karachi", 5),
    ("Dubai", "Asia/Dubai", 4),
    ("Nairobi", "Africa/Nairobi", 3),
    ("Riyadh", "Asia/Riyadh", 3),
    ("Johannesburg", "Africa/Johannesburg", 2),
    ("Lagos", "Africa/Lagos", 1),
    ("Reykjavik", "Atlantic/Reykjavik", 0),
    ("Accra", "Africa/Accra", 0),
    ("Honolulu", "Pacific/Honolulu", -10),
    ("Bogota", "America/Bogota", -5),
    ("Lima", "America/Lima", -5),
    ("Phoenix", "America/Phoenix", -7),
    ("Brisbane", "Australia/Brisbane", 10),
)


def measures(random: Random) -> list[Question]:
    """Makes the questions on units, the calendar and the clock."""
    return [
        *draw(random, unit, 14),
        *draw(random, weekday, 10),
        *draw(random, month, 6, (1, 2, 3, 4)),
        *draw(random, date_difference, 10, (2, 3, 4, 5)),
        *draw(random, leap_year, 8, (3, 4)),
        *draw(random, clock, 10),
        *draw(random, time_zone, 12, (4, 5)),
    ]


def unit(random: Random, level: int) -> Question | None:
    """A measure in a smaller unit, or in a larger one."""
    large, small, factor, _ = random.choice([entry for entry in UNITS if entry[3] == level])
    number = random.randint(2, 9 if level < 3 else 12)
    if random.random() < 0.65:
        text, answer = f"How many {small} are there in {number} {large}?", number * factor
        steps = [factor, 2 * factor, number, 10] if factor < 100 else [factor, 2 * factor, factor // 2, 100]
        if set(str(factor)) <= {"1", "0"}:  # powers of ten: what is mistaken is how many zeros
            others = [str(number * 10**power) for power in range(len(str(factor)) + 3)]
            wrong = wrong_answers(random, str(answer), others)
            return Question(text, str(answer), wrong, "unit", level, f"{large} {small}")
    else:
        text, answer = f"How many {large} are {number * factor} {small}?", number
        steps = [1, 2, 3, 4]
    return Question(text, str(answer), near(random, answer, steps, least=1), "unit", level, f"{large} {small}")


def weekday(random: Random, level: int) -> Question | None:
    """Days of the week, counted on and back."""
    day = random.randrange(7)
    low, high = {1: (1, 1), 2: (2, 4), 3: (2, 6), 4: (8, 20)}.get(level, (22, 100))
    days = random.randint(low, high)
    on = level != 3 if level != 1 else random.random() < 0.5
    answer = WEEKDAYS[(day + (days if on else -days)) % 7]
    if level == 1:
        text = f"Which day of the week comes right {'after' if on else 'before'} {WEEKDAYS[day]}?"
    elif on:
        text = f"If today is {WEEKDAYS[day]}, which day of the week will it be in {days} days?"
    else:
        text = f"If today is {WEEKDAYS[day]}, which day of the week was it {days} days ago?"
    if level == 5 and random.random() < 0.5:
        start = date(random.randint(1990, 2030), random.randint(1, 12), random.randint(1, 28))
        end = start + timedelta(days=days)
        answer = WEEKDAYS[end.weekday()]
        text = f"{_written(start)} is a {WEEKDAYS[start.weekday()]}. Which day of the week is {_written(end)}?"
    others = [name for name in WEEKDAYS if name not in (answer, WEEKDAYS[day])]
    return Question(text, answer, wrong_answers(random, answer, others), "weekday", level, f"weekday {level}")


def month(random: Random, level: int) -> Question | None:
    """Months, counted on and back."""
    number = random.randrange(12)
    steps = {1: 1, 2: -1, 3: random.randint(2, 5), 4: -random.randint(2, 7)}[level]
    answer = MONTHS[(number + steps) % 12]
    how = f"{abs(steps)} month{'s' if abs(steps) > 1 else ''} {'after' if steps > 0 else 'before'}"
    others = [name for name in MONTHS if name != MONTHS[number]]
    wrong = wrong_answers(random, answer, others)
    return Question(f"Which month is {how} {MONTHS[number]}?", answer, wrong, "month", level, f"month {level}")


def date_difference(random: Random, level: int) -> Question | None:
    """Days between two dates: of one month, of two, of different years."""
    start = date(random.randint(1990, 2030), random.randint(1, 12), random.randint(1, 27))
    days = random.randint(*{2: (2, 9), 3: (10, 20), 4: (20, 60)}.get(level, (200, 500)))
    end = start + timedelta(days=days)
    if (end.month == start.month) != (level < 4):
        return None
    text = f"How many days is it from {_written(start)} to {_written(end)}?"
    wrong = near(random, days, [1, 2, 3, *((7, 10) if level > 3 else ())], least=1)
    return Question(text, str(days), wrong, "date difference", level, f"date difference {level}")


def _written(day: date) -> str:
    return f"{day.day} {MONTHS[day.month - 1]} {day.year}"


def leap_year(random: Random, level: int) -> Question | None:
    """Leap years among others; at level 4 with full centuries, and years that were none."""
    years = range(1904, 2060) if level == 3 else range(1600, 2800, 4)
    leap = [year for year in years if _is_leap(year)]
    others = [year for year in years if not _is_leap(year)]
    if level == 3:
        right, wrong, what = random.choice(leap), random.sample(others, 3), "a leap year"
    else:
        right, wrong, what = random.choice(others), random.sample(leap, 3), "not a leap year"
    shown = random.sample([right, *wrong], 4)
    text = f"Which of the years {', '.join(map(str, shown[:3]))} and {shown[3]} is {what}?"
    return Question(text, str(right), tuple(map(str, wrong)), "leap year", level, f"leap year {level}")


def _is_leap(year: int) -> bool:
    return year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)


def _time(minutes: int) -> str:
    return f"{minutes // 60 % 24:02}:{minutes % 60:02}"


def clock(random: Random, level: int) -> Question | None:
    """Times of the day, counted on and back."""
    start = random.randrange(6 * 60, 20 * 60)
    if level == 1:
        start, step = start // 60 * 60, 60 * random.randint(1, 3)
    elif level == 2:
        start, step = start // 60 * 60, random.randrange(5, 60, 5)
    elif level == 3:
        start, step = start // 5 * 5, random.randrange(35, 90, 5)
    elif level == 4:
        step = -random.randint(11, 59)
    else:
        start, step = random.randrange(18 * 60, 24 * 60), random.randint(200, 700)
    how = f"in {step} minutes" if step > 0 else f"{-step} minutes ago"
    if level == 1:
        how = f"in {step // 60} hour{'s' if step > 60 else ''}"
    tense = "will it be" if step > 0 else "was it"
    answer = _time(start + step)
    slips = [10, -10, 60, -60, 20, -20, 50, -50, *((1, -1) if level > 3 else (5, -5))]
    others = [_time(start + step + slip) for slip in slips]
    wrong = wrong_answers(random, answer, others)
    return Question(f"It is {_time(start)}. What time {tense} {how}?", answer, wrong, "clock", level, f"clock {level}")


def time_zone(random: Random, level: int) -> Question | None:
    """The time in a city, told from UTC, or from another city."""
    (one, _, offset), (two, _, other) = random.sample(UTC_OFFSETS, 2)
    hour = random.randint(0, 23)
    if level == 4:
        offset, where = 0, "in UTC"
    else:
        where = f"in {one}"
    answer = 60 * (hour - offset + other)
    others = [_time(answer + 60 * slip) for slip in (1, -1, 2, -2, 3, -3, 12)]
    text = f"When it is {_time(60 * hour)} {where}, what time is it in {two}?"
    return Question(text, _time(answer), wrong_answers(random, _time(answer), others), "time zone", level, two)
