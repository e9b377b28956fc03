"""Questions on Python's standard library: what is where, and what it is for.

The descriptions are this package's own; that each name is where it is said to be, and in no other of the modules
offered, is tested on the Python that runs the tests.
"""

from random import Random

from lopt_hf.retention.questions.question import Question, wrong_answers

__all__ = ["FUNCTIONS", "METHODS", "library"]

# Module, name, level, what it is for
FUNCTIONS: tuple[tuple[str, str, int, str], ...] = (
    ("math", "sqrt", 1, "gives the square root of a number"),
    ("math", "floor", 1, "rounds a number down to a whole one"),
    ("math", "ceil", 2, "rounds a number up to a whole one"),
    ("math", "gcd", 2, "gives the greatest common divisor"),
    ("math", "factorial", 1, "multiplies all whole numbers from 1 to a given one"),
    ("math", "hypot", 3, "gives the length of a vector from its coordinates"),
    ("math", "isclose", 3, "says whether two floats are nearly equal"),
    ("math", "fsum", 4, "adds floats without piling up rounding errors"),
    ("math", "comb", 3, "counts the ways to choose some of several things, in any order"),
    ("math", "perm", 4, "counts the ordered arrangements of some of several things"),
    ("math", "isqrt", 4, "gives the whole part of a square root as an integer"),
    ("math", "copysign", 5, "gives a number the sign of another one"),
    ("random", "randint", 1, "draws a whole number between two bounds, both included"),
    ("random", "shuffle", 1, "brings a list into a random order, in place"),
    ("random", "choice", 1, "draws one element of a sequence"),
    ("random", "sample", 2, "draws several elements without replacement"),
    ("random", "choices", 3, "draws several elements with replacement"),
    ("random", "seed", 2, "makes what is drawn the same in every run"),
    ("random", "gauss", 3, "draws a float from a normal distribution"),
    ("random", "getrandbits", 5, "draws an integer of so many random bits"),
    ("itertools", "chain", 2, "goes through several iterables, one after the other"),
    ("itertools", "product", 2, "pairs every element of one iterable with every element of another"),
    ("itertools", "permutations", 2, "gives all orders of the elements"),
    ("itertools", "combinations", 2, "gives all subsets of a given size"),
    ("itertools", "islice", 3, "takes a slice of an iterator"),
    ("itertools", "groupby", 3, "puts neighbors with the same key together"),
    ("itertools", "takewhile", 3, "goes on until a condition is first false"),
    ("itertools", "dropwhile", 4, "leaves out elements until a condition is first false"),
    ("itertools", "accumulate", 3, "gives running totals"),
    ("itertools", "zip_longest", 3, "walks through iterables in parallel and fills up the shorter ones"),
    ("itertools", "starmap", 4, "calls a function with the elements of each tuple as its arguments"),
    ("itertools", "tee", 5, "makes several independent iterators of one"),
    ("itertools", "compress", 5, "keeps the elements whose selector is true"),
    ("functools", "reduce", 2, "folds an iterable into one value with a function of two arguments"),
    ("functools", "partial", 2, "fixes some of a function's arguments"),
    ("functools", "lru_cache", 2, "remembers the most recent results of a function"),
    ("functools", "wraps", 3, "keeps the name and docstring of a decorated function"),
    ("functools", "total_ordering", 4, "completes the comparison methods of a class"),
    ("functools", "singledispatch", 4, "picks a function by the type of its first argument"),
    ("functools", "cmp_to_key", 4, "turns an old-style comparison into a sort key"),
    ("os", "getcwd", 2, "names the current working directory"),
    ("os", "listdir", 1, "lists the names in a directory"),
    ("os", "makedirs", 2, "makes a directory together with its missing parents"),
    ("os", "getpid", 2, "gives the number of the current process"),
    ("os", "scandir", 4, "iterates over a directory's entries with their file types"),
    ("os", "replace", 4, "renames a file and overwrites the target if there is one"),
    ("os", "urandom", 4, "gives random bytes that are fit for cryptography"),
    ("os", "cpu_count", 2, "counts the processors of the machine"),
    ("shutil", "copyfile", 2, "copies the content of a file"),
    ("shutil", "rmtree", 2, "deletes a directory with all that is in it"),
    ("shutil", "move", 1, "moves a file or directory to another place"),
    ("shutil", "which", 3, "finds the path of an executable"),
    ("shutil", "disk_usage", 3, "tells how much room a disk has"),
    ("shutil", "make_archive", 3, "packs a directory into a zip or tar file"),
    ("json", "dumps", 1, "turns an object into a JSON string"),
    ("json", "loads", 1, "turns a JSON string into an object"),
    ("json", "dump", 2, "writes an object to a file as JSON"),
    ("json", "load", 2, "reads an object from a file of JSON"),
    ("heapq", "heappush", 2, "adds an element to a heap"),
    ("heapq", "heappop", 2, "removes the smallest element of a heap"),
    ("heapq", "heapify", 3, "turns a list into a heap, in place"),
    ("heapq", "nlargest", 3, "gives the greatest elements of an iterable"),
    ("heapq", "heappushpop", 5, "adds an element to a heap and then removes the smallest"),
    ("heapq", "heapreplace", 5, "removes the smallest element of a heap and then adds another"),
    ("bisect", "bisect_left", 3, "finds the place in a sorted list before equal elements"),
    ("bisect", "bisect_right", 3, "finds the place in a sorted list after equal elements"),
    ("bisect", "insort_left", 4, "puts an element into a sorted list, before those equal to it"),
    ("bisect", "insort_right", 4, "puts an element into a sorted list, after those equal to it"),
    ("statistics", "median", 1, "gives the middle value of data"),
    ("statistics", "mode", 2, "gives the most common value of data"),
    ("statistics", "stdev", 2, "gives the standard deviation of a sample"),
    ("statistics", "pstdev", 4, "gives the standard deviation of a whole population"),
    ("statistics", "fmean", 3, "gives the arithmetic mean as a float, fast"),
    ("statistics", "quantiles", 3, "cuts data into intervals of equal probability"),
    ("time", "sleep", 1, "suspends the program for some seconds"),
    ("time", "perf_counter", 3, "reads the most precise clock for short durations"),
    ("time", "monotonic", 3, "reads a clock that never goes backwards"),
    ("time", "process_time", 4, "gives the processor time that the program has used"),
    ("time", "strftime", 2, "formats a time as text"),
    ("time", "strptime", 3, "reads a time from text"),
    ("re", "sub", 2, "replaces what a pattern matches"),
    ("re", "findall", 1, "lists all matches of a pattern"),
    ("re", "fullmatch", 3, "asks whether a pattern matches all of a text"),
    ("re", "split", 1, "cuts a text wherever a pattern matches"),
    ("re", "escape", 3, "puts backslashes before special characters of a pattern"),
    ("re", "finditer", 3, "iterates over the match objects of a pattern"),
    ("re", "subn", 5, "replaces what a pattern matches and counts the replacements"),
    ("copy", "deepcopy", 1, "copies an object and all that is inside it"),
    ("textwrap", "dedent", 3, "removes the indentation that all lines share"),
    ("textwrap", "shorten", 4, "cuts a text at a word to a given width"),
    ("textwrap", "indent", 2, "puts a prefix before the lines of a text"),
    ("textwrap", "fill", 3, "breaks a paragraph into lines and returns one string"),
    ("inspect", "signature", 3, "tells the parameters of a callable"),
    ("inspect", "getsource", 2, "returns the source code of an object"),
    ("inspect", "isgenerator", 2, "says whether an object is a generator"),
    ("contextlib", "contextmanager", 3, "makes a context manager of a generator function"),
    ("contextlib", "suppress", 3, "ignores certain exceptions inside a with statement"),
    ("contextlib", "redirect_stdout", 3, "sends what is printed to another file"),
    ("contextlib", "nullcontext", 4, "is a context manager that does nothing"),
    ("operator", "itemgetter", 3, "makes a function that looks up an item of its argument"),
    ("operator", "attrgetter", 3, "makes a function that fetches an attribute of its argument"),
    ("operator", "methodcaller", 4, "makes a function that calls a method of its argument"),
    ("operator", "matmul", 4, "multiplies matrices as the sign @ does"),
    ("collections", "deque", 2, "is a list that is fast at both ends"),
    ("collections", "Counter", 1, "counts how often each element occurs"),
    ("collections", "defaultdict", 2, "is a dictionary that fills in missing keys"),
    ("collections", "namedtuple", 2, "makes tuples whose fields have names"),
    ("collections", "OrderedDict", 2, "is a dictionary that can move a key to its end"),
    ("collections", "ChainMap", 4, "searches several dictionaries as if they were one"),
    ("threading", "Lock", 2, "lets one thread at a time into a section"),
    ("threading", "Semaphore", 3, "lets a limited number of threads into a section"),
    ("threading", "Event", 3, "lets threads wait until another one sets a flag"),
    ("threading", "Barrier", 4, "lets threads wait until all have arrived"),
    ("threading", "Timer", 2, "calls a function in a thread after some seconds"),
    ("asyncio", "gather", 3, "waits for several coroutines and collects their results"),
    ("asyncio", "wait_for", 4, "waits for a coroutine, but no longer than a timeout"),
    ("asyncio", "create_task", 3, "starts a coroutine in the background"),
    ("asyncio", "to_thread", 4, "runs a blocking function in a thread and awaits it"),
)

# Of which built-in type, method, level, what it does
METHODS: tuple[tuple[str, str, int, str], ...] = (
    ("list", "append", 1, "adds an element to the end"),
    ("list", "extend", 1, "adds all elements of an iterable to the end"),
    ("list", "insert", 1, "puts an element at a given place"),
    ("list", "reverse", 1, "turns the order around, in place"),
    ("list", "index", 2, "tells where a value first occurs"),
    ("list", "pop", 2, "removes the last element and returns it"),
    ("list", "remove", 2, "removes the first element equal to a value"),
    ("dict", "items", 1, "gives the keys together with their values"),
    ("dict", "keys", 1, "gives the keys"),
    ("dict", "get", 2, "returns a value, or a default if the key is missing"),
    ("dict", "setdefault", 3, "returns a value, and stores a default if the key is missing"),
    ("dict", "popitem", 4, "removes the pair that was added last and returns it"),
    ("dict", "update", 2, "takes over the pairs of another mapping"),
    ("dict", "fromkeys", 4, "makes a new one with the same value for all keys"),
    ("str", "upper", 1, "makes all letters capital"),
    ("str", "strip", 1, "removes white space at both ends"),
    ("str", "split", 1, "cuts the text into a list of words"),
    ("str", "join", 2, "puts the parts of an iterable together, with the text between"),
    ("str", "startswith", 1, "says whether the text begins with a prefix"),
    ("str", "zfill", 3, "fills up with zeros on the left"),
    ("str", "rjust", 3, "fills up with spaces on the left"),
    ("str", "partition", 3, "cuts at the first separator and always returns three parts"),
    ("str", "casefold", 4, "prepares the text for a comparison that ignores case"),
    ("str", "translate", 4, "replaces characters by means of a table"),
    ("str", "isidentifier", 4, "says whether the text could be the name of a variable"),
    ("str", "removeprefix", 3, "takes a given beginning away, if it is there"),
    ("str", "splitlines", 2, "cuts the text at its line ends"),
    ("str", "expandtabs", 4, "replaces tabs by spaces"),
    ("set", "add", 1, "adds an element"),
    ("set", "discard", 3, "removes an element, and raises nothing if it is missing"),
    ("set", "union", 1, "gives the elements of either"),
    ("set", "intersection", 1, "gives the elements that both have"),
    ("set", "issubset", 2, "says whether another one has all of its elements"),
    ("set", "isdisjoint", 3, "says whether it has no element in common with another one"),
    ("set", "symmetric_difference", 3, "gives the elements that only one of both has"),
)


def library(random: Random) -> list[Question]:
    """Makes the questions on the standard library."""
    found = []
    for module, name, level, purpose in FUNCTIONS:
        cluster = f"library {module}"
        wrong = _other_modules(random, module, name)
        text = f'Which module of the Python standard library has "{name}"?'
        found.append(Question(text, module, wrong, "library: module", level, cluster))
        neighbors = [other for home, other, *_ in FUNCTIONS if home == module and other != name]
        strangers = [other for home, other, *_ in FUNCTIONS if home != module]
        pool = neighbors if len(neighbors) >= 3 and level > 1 else strangers
        wrong = wrong_answers(random, name, [other for other in pool if not _are_alike(name, other)])
        text = f"Which function or class of the Python standard library {purpose}?"
        found.append(Question(text, name, wrong, "library: name", level, cluster))
    for kind, name, level, purpose in METHODS:
        pool = [other for home, other, *_ in METHODS if home == kind and other != name]
        wrong = wrong_answers(random, name, pool)
        text = f"Which method of a Python {kind} {purpose}?"
        found.append(Question(text, name, wrong, "method", level, f"methods of {kind}"))
    return found


# Modules of the list that have a name too: their own of that name, or imported for their own use, in some Python
ELSEWHERE: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("sqrt", "hypot", "fsum", "groupby", "reduce", "bisect_left", "bisect_right"), ("statistics",)),
    **dict.fromkeys(("itemgetter", "Counter", "defaultdict"), ("statistics",)),
    **dict.fromkeys(("sleep", "Lock", "Semaphore", "Event", "Barrier"), ("asyncio",)),
    **dict.fromkeys(("wraps", "deque"), ("contextlib",)),
    **dict.fromkeys(("attrgetter", "OrderedDict"), ("inspect",)),
    "namedtuple": ("functools", "inspect", "statistics"),
    "replace": ("copy",),
    "sub": ("operator",),
}


def _other_modules(random: Random, module: str, name: str) -> tuple[str, ...]:
    """Three modules without the name; those that are right often are wrong often."""
    taken = {module, *ELSEWHERE.get(name, ())}
    others = [other for other, *_ in FUNCTIONS if other not in taken]
    return tuple(dict.fromkeys(random.sample(others, len(others))))[:3]


def _are_alike(one: str, other: str) -> bool:
    """Whether what one is for could be said of the other too."""
    return {one, other} in ({"choice", "choices"}, {"sub", "subn"}, {"Lock", "Semaphore"}, {"findall", "finditer"})
