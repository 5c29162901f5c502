"""Minimal pairs: two sentences that differ in one point of grammar, one of them right.

A paradigm is a function of a random generator and a turn. Its variants (singular and plural, he and she) come by turns, so
that a model which merely likes one form better gets half of them.
"""

import random
from collections.abc import Callable, Sequence

from capability.drawing import Item, distinct

PAIRS_OF_EACH = 15

PEOPLE = {
    "teacher": "teachers",
    "farmer": "farmers",
    "nurse": "nurses",
    "driver": "drivers",
    "baker": "bakers",
    "painter": "painters",
    "student": "students",
    "lawyer": "lawyers",
    "neighbor": "neighbors",
    "doctor": "doctors",
    "gardener": "gardeners",
    "sailor": "sailors",
    "child": "children",
    "guest": "guests",
    "singer": "singers",
}
MALE = {"king": "kings", "boy": "boys", "father": "fathers", "uncle": "uncles", "waiter": "waiters", "brother": "brothers"}
FEMALE = {"queen": "queens", "girl": "girls", "mother": "mothers", "aunt": "aunts", "waitress": "waitresses", "sister": "sisters"}
THINGS = {
    "lamp": "lamps",
    "chair": "chairs",
    "letter": "letters",
    "basket": "baskets",
    "bottle": "bottles",
    "carpet": "carpets",
    "book": "books",
    "picture": "pictures",
    "ladder": "ladders",
    "blanket": "blankets",
    "cup": "cups",
    "box": "boxes",
    "knife": "knives",
    "window": "windows",
    "coat": "coats",
}
PLACES = ("garden", "kitchen", "market", "station", "library", "harbor", "village", "school", "bridge", "church")
ADJECTIVES = ("old", "heavy", "small", "clean", "wooden", "broken", "cheap", "beautiful", "narrow", "dusty")
# Third person singular, plural.
INTRANSITIVE = (
    ("laughs", "laugh"),
    ("sings", "sing"),
    ("works", "work"),
    ("sleeps", "sleep"),
    ("waits", "wait"),
    ("walks", "walk"),
    ("smiles", "smile"),
    ("listens", "listen"),
    ("swims", "swim"),
    ("dances", "dance"),
)
# Base, past, participle of verbs that take a thing and cannot do without.
TRANSITIVE = (
    ("break", "broke", "broken"),
    ("take", "took", "taken"),
    ("choose", "chose", "chosen"),
    ("see", "saw", "seen"),
    ("steal", "stole", "stolen"),
    ("hide", "hid", "hidden"),
    ("draw", "drew", "drawn"),
    ("throw", "threw", "thrown"),
    ("forget", "forgot", "forgotten"),
)
HANDLED = ("carried", "moved", "cleaned", "washed", "repaired", "found", "bought", "lifted", "touched", "dropped")
FELT = ("admired", "blamed", "hurt", "described", "introduced", "praised", "protected", "trusted")
LIKES = (("likes", "like"), ("knows", "know"), ("helps", "help"), ("watches", "watch"), ("visits", "visit"))
CHORES = (
    ("clean", "cleaning"),
    ("move", "moving"),
    ("open", "opening"),
    ("wash", "washing"),
    ("paint", "painting"),
    ("sell", "selling"),
    ("repair", "repairing"),
)
# None of these can stand without an object.
NEEDY = ("repaired", "found", "bought", "touched", "needed", "damaged", "owned", "received", "wanted", "mentioned")
WITHOUT_OBJECT = ("vanished", "slept", "arrived", "sneezed", "laughed", "existed", "fainted", "stumbled")
VOWEL_WORDS = ("apple", "orange", "umbrella", "engine", "old map", "empty glass", "island", "onion", "open door", "ugly hat")
CONSONANT_WORDS = ("pear", "lemon", "hammer", "clock", "new map", "full glass", "mountain", "carrot", "closed door", "red hat")
UNCOUNTED = ("water", "rice", "sand", "furniture", "advice", "luggage", "milk", "money", "bread", "snow")
# A verb or adjective, the preposition it asks for, and one that it does not take here.
PREPOSITIONS = (
    ("The price depends", "on", "at", "the weather"),
    ("The girl listened", "to", "at", "the radio"),
    ("The farmer waited", "for", "of", "the rain"),
    ("My uncle is afraid", "of", "from", "the dark"),
    ("She is good", "at", "of", "chess"),
    ("The twins are interested", "in", "on", "old coins"),
    ("The box is full", "of", "from", "nails"),
    ("He apologized", "for", "of", "the noise"),
    ("The book belongs", "to", "of", "my sister"),
    ("The cake consists", "of", "at", "eggs and flour"),
    ("We agreed", "with", "from", "the doctor"),
    ("The road leads", "to", "of", "the lake"),
    ("They believe", "in", "at", "good luck"),
    ("The nurse cares", "for", "at", "the patients"),
    ("I am proud", "of", "at", "my brother"),
    ("The house is different", "from", "for", "the others"),
    ("The team succeeded", "in", "to", "finding the boat"),
    ("The door is covered", "with", "at", "paint"),
    ("He is famous", "for", "at", "his paintings"),
    ("The train arrived", "at", "to", "the station"),
    ("She married", "into", "at", "a rich family"),
    ("The child pointed", "at", "of", "the moon"),
    ("The walls are made", "of", "at", "stone"),
    ("She reminded me", "of", "at", "my aunt"),
    ("The bus is similar", "to", "from", "a train"),
)

Paradigm = Callable[[random.Random, int], tuple[str, str]]


def of_person(rng: random.Random, is_plural: int, people: dict[str, str] = PEOPLE) -> str:
    """Return someone, in the number asked for."""
    one, many = rng.choice(sorted(people.items()))
    return many if is_plural else one


def one_right(forms: Sequence[str], right: int, sentence: str) -> tuple[str, str]:
    """Return the sentence with the right one of two forms in its gap, and with the other."""
    return sentence.format(forms[right]), sentence.format(forms[1 - right])


def subject_verb_agreement(rng: random.Random, turn: int) -> tuple[str, str]:
    """Give a verb right after its subject."""
    plural = turn % 2
    return one_right(rng.choice(INTRANSITIVE), plural, f"The {of_person(rng, plural)} {{}} in the {rng.choice(PLACES)}.")


def agreement_past_a_phrase(rng: random.Random, turn: int) -> tuple[str, str]:
    """Put a noun of the other number between subject and verb."""
    plural = turn % 2
    between = rng.choice(("near", "behind", "beside", "with"))
    thing = rng.choice(sorted(THINGS.items()))[1 - plural]
    return one_right(rng.choice(INTRANSITIVE), plural, f"The {of_person(rng, plural)} {between} the {thing} {{}} every day.")


def agreement_past_two_phrases(rng: random.Random, turn: int) -> tuple[str, str]:
    """Put two nouns of the other number between subject and verb."""
    plural = turn % 2
    near, far = (each[1 - plural] for each in rng.sample(sorted(THINGS.items()), 2))
    start = f"The {of_person(rng, plural)} with the {near} beside the {far}"
    return one_right(rng.choice(INTRANSITIVE), plural, f"{start} {{}} now and then.")


def agreement_of_two(rng: random.Random, turn: int) -> tuple[str, str]:
    """Let two singulars count as many, but not where one of them is only named beside the other."""
    together = turn % 2
    one, other = rng.sample(sorted(PEOPLE), 2)
    start = f"The {one} and the {other}" if together else f"The {one}, like the {other},"
    return one_right(rng.choice(INTRANSITIVE), together, f"{start} {{}} all day.")


def agreement_of_each(rng: random.Random, turn: int) -> tuple[str, str]:
    """Let the quantifier decide, not the plural after it."""
    plural = turn % 2
    start = f"{(('Each', 'Both'), ('One', 'Two'))[turn // 2 % 2][plural]} of the {of_person(rng, 1)}"
    return one_right(rng.choice(INTRANSITIVE), plural, f"{start} {{}} in the {rng.choice(PLACES)}.")


def agreement_past_a_clause(rng: random.Random, turn: int) -> tuple[str, str]:
    """Put a relative clause whose subject has the other number between subject and verb."""
    plural = turn % 2
    inside = f"that the {of_person(rng, 1 - plural, FEMALE)} {rng.choice(LIKES)[1 - plural]}"
    return one_right(rng.choice(INTRANSITIVE), plural, f"The {of_person(rng, plural)} {inside} {{}} very often.")


def agreement_of_there(rng: random.Random, turn: int) -> tuple[str, str]:
    """Let the verb agree with what comes after it."""
    plural = turn % 2
    one, many = rng.choice(sorted(THINGS.items()))
    what = f"{rng.choice(('two', 'three', 'many', 'several'))} {many}" if plural else f"one {one}"
    return one_right(("was", "were"), plural, f"There {{}} {what} in the {rng.choice(PLACES)}.")


def agreement_of_be(rng: random.Random, turn: int) -> tuple[str, str]:
    """Use the forms of the commonest verb."""
    plural = turn % 2
    thing = rng.choice(sorted(THINGS.items()))[plural]
    return one_right(("is", "are"), plural, f"The {thing} in the {rng.choice(PLACES)} {{}} {rng.choice(ADJECTIVES)}.")


def reflexive_number(rng: random.Random, turn: int) -> tuple[str, str]:
    """Ask for one or for many in the reflexive."""
    plural = turn % 2
    someone = of_person(rng, plural, MALE)
    return one_right(("himself", "themselves"), plural, f"The {someone} {rng.choice(FELT)} {{}} in front of the guests.")


def reflexive_gender(rng: random.Random, turn: int) -> tuple[str, str]:
    """Ask for him or for her in the reflexive."""
    female = turn % 2
    someone = of_person(rng, 0, FEMALE if female else MALE)
    return one_right(("himself", "herself"), female, f"The {someone} {rng.choice(FELT)} {{}} yesterday evening.")


def reflexive_past_a_phrase(rng: random.Random, turn: int) -> tuple[str, str]:
    """Name someone in the other number nearer to the reflexive, who is not meant."""
    plural = turn % 2
    subject, other = of_person(rng, plural, MALE), of_person(rng, 1 - plural, MALE)
    return one_right(("himself", "themselves"), plural, f"The {subject} behind the {other} {rng.choice(FELT)} {{}}.")


def reflexive_past_a_clause(rng: random.Random, turn: int) -> tuple[str, str]:
    """Name someone of the other gender nearer to the reflexive, who is not meant."""
    female = turn % 2
    subject, other = of_person(rng, 0, FEMALE if female else MALE), of_person(rng, 0, MALE if female else FEMALE)
    return one_right(("himself", "herself"), female, f"The {subject} that the {other} met {rng.choice(FELT)} {{}}.")


def determiner_past_an_adjective(rng: random.Random, turn: int) -> tuple[str, str]:
    """Put an adjective between determiner and noun."""
    plural = turn % 2
    determiner = (("this", "these"), ("that", "those"))[turn // 2 % 2][plural]
    things = rng.choice(sorted(THINGS.items()))
    return one_right(things, plural, f"The {of_person(rng, 0)} {rng.choice(HANDLED)} {determiner} {rng.choice(ADJECTIVES)} {{}}.")


def article_before_a_vowel(rng: random.Random, turn: int) -> tuple[str, str]:
    """Choose a or an."""
    vowel = turn % 2
    what = rng.choice(VOWEL_WORDS if vowel else CONSONANT_WORDS)
    return one_right(("a", "an"), vowel, f"The {of_person(rng, 0)} pointed to {{}} {what}.")


def ever_under_no(rng: random.Random, turn: int) -> tuple[str, str]:
    """Allow `ever` by a negative subject only."""
    _, _, participle = rng.choice(TRANSITIVE)
    whose = (("No", "Some"), ("None of the", "Most of the"))[turn % 2]
    return one_right(whose, 0, f"{{}} {of_person(rng, 1)} have ever {participle} the {rng.choice(sorted(THINGS))}.")


def ever_in_scope(rng: random.Random, turn: int) -> tuple[str, str]:
    """Allow `ever` by a negation that reaches it, not by one inside a relative clause."""
    inside = f"{of_person(rng, turn % 2, FEMALE)} trusted"
    rest = f"ever {rng.choice(TRANSITIVE)[2]} the {rng.choice(sorted(THINGS))}."
    someone = of_person(rng, 1)
    return f"No {someone} that the {inside} have {rest}", f"The {someone} that no {inside} have {rest}"


def any_under_not(rng: random.Random, turn: int) -> tuple[str, str]:
    """Allow `any` under a negation only."""
    base, _, _ = rng.choice(TRANSITIVE)
    free = ("really", "probably", "also")[turn % 3]
    start, rest = f"The {of_person(rng, turn % 2)} did", f"{base} any {rng.choice(sorted(THINGS.values()))}."
    return f"{start} not {rest}", f"{start} {free} {rest}"


def adjunct_island(rng: random.Random, turn: int) -> tuple[str, str]:
    """Refuse a question that asks for something inside an adverbial clause."""
    (asked, _), (_, other) = rng.sample(CHORES, 2)
    when, thing = ("before", "after", "without")[turn % 3], rng.choice(sorted(THINGS))
    start = f"What did the {of_person(rng, 0)} {asked}"
    return f"{start} {when} {other} the {thing}?", f"{start} the {thing} {when} {other}?"


def coordinate_island(rng: random.Random, turn: int) -> tuple[str, str]:
    """Refuse a question that asks for one half of a pair."""
    asked, other = rng.sample(sorted(THINGS.values()), 2)
    verb = ("carry", "sell", "wash", "buy", "repair")[turn % 5]
    start = f"Which {asked} did the {of_person(rng, 0)} {verb}"
    return f"{start} with the {other}?", f"{start} and the {other}?"


def left_branch(rng: random.Random, turn: int) -> tuple[str, str]:
    """Keep a question word and its noun together."""
    word, thing = ("Whose", "Which", "How many")[turn % 3], rng.choice(sorted(THINGS.values()))
    rest = f"did the {of_person(rng, 0)} {rng.choice(TRANSITIVE)[0]}"
    return f"{word} {thing} {rest}?", f"{word} {rest} {thing}?"


def missing_gap(rng: random.Random, turn: int) -> tuple[str, str]:
    """Leave the object out only where a question word stands for it."""
    knows = ("I know", "We remember", "Nobody understood", "She told us")[turn % 4]
    rest = f"the {of_person(rng, 0)} {rng.choice(NEEDY)}."
    return f"{knows} what {rest}", f"{knows} that {rest}"


def participle_after_have(rng: random.Random, turn: int) -> tuple[str, str]:
    """Use the participle after `have`, and the past without it."""
    _, past, participle = rng.choice(TRANSITIVE)
    someone, thing = of_person(rng, 0), rng.choice(sorted(THINGS))
    frame = (f"The {someone} {{}} the {thing} last night.", f"The {someone} has {{}} the {thing} again.")[turn % 2]
    return one_right((past, participle), turn % 2, frame)


def base_after_did(rng: random.Random, turn: int) -> tuple[str, str]:
    """Use the plain form after `did`."""
    base, past, _ = rng.choice(TRANSITIVE)
    helper = ("did not", "could not", "would never", "must not")[turn % 4]
    return one_right((base, past), 0, f"The {of_person(rng, turn % 2)} {helper} {{}} the {rng.choice(sorted(THINGS))}.")


def verbs_without_object(rng: random.Random, turn: int) -> tuple[str, str]:
    """Give an object only to verbs that take one."""
    thing = rng.choice(sorted(THINGS.items()))[turn % 2]
    return one_right((rng.choice(HANDLED), rng.choice(WITHOUT_OBJECT)), 0, f"The {of_person(rng, 0)} {{}} the {thing}.")


def pronoun_case(rng: random.Random, turn: int) -> tuple[str, str]:
    """Tell subject from object by the pronoun's form."""
    pronouns = (("he", "him"), ("she", "her"), ("they", "them"), ("we", "us"))[turn // 2 % 4]
    verb, someone = rng.choice(("visited", "called", "helped", "invited", "followed")), of_person(rng, turn // 3 % 2)
    frame = (f"Yesterday {{}} {verb} the {someone}.", f"Yesterday the {someone} {verb} {{}}.")[turn % 2]
    return one_right(pronouns, turn % 2, frame)


def tense_and_time(rng: random.Random, turn: int) -> tuple[str, str]:
    """Let the day that is named fit the tense."""
    base, past, _ = rng.choice(TRANSITIVE)
    days = (("Yesterday", "Tomorrow"), ("Last week", "Next week"))[turn // 2 % 2]
    tense = (past, f"will {base}")[turn % 2]
    return one_right(days, turn % 2, f"{{}} the {of_person(rng, 0)} {tense} the {rng.choice(sorted(THINGS))}.")


def much_and_many(rng: random.Random, turn: int) -> tuple[str, str]:
    """Tell what is counted from what is not."""
    many = turn % 2
    what = rng.choice(sorted(THINGS.values())) if many else rng.choice(UNCOUNTED)
    return one_right(("much", "many"), many, f"The {of_person(rng, 0)} did not need {{}} {what}.")


def prepositions(rng: random.Random, turn: int) -> tuple[str, str]:
    """Use the preposition that a verb or an adjective asks for."""
    start, right, wrong, rest = PREPOSITIONS[turn % len(PREPOSITIONS)]
    return one_right((right, wrong), 0, f"{start} {{}} {rest}.")


PARADIGMS: tuple[Paradigm, ...] = (
    subject_verb_agreement,
    agreement_past_a_phrase,
    agreement_past_two_phrases,
    agreement_past_a_clause,
    agreement_of_two,
    agreement_of_each,
    agreement_of_there,
    agreement_of_be,
    reflexive_number,
    reflexive_gender,
    reflexive_past_a_phrase,
    reflexive_past_a_clause,
    determiner_past_an_adjective,
    article_before_a_vowel,
    ever_under_no,
    ever_in_scope,
    any_under_not,
    adjunct_island,
    coordinate_island,
    left_branch,
    missing_gap,
    participle_after_have,
    base_after_did,
    verbs_without_object,
    pronoun_case,
    tense_and_time,
    much_and_many,
    prepositions,
)


def grammar() -> list[Item]:
    """Return the pairs of all paradigms."""
    return [
        {"id": f"{make.__name__}-{number:02}", "paradigm": make.__name__, "good": good, "bad": bad}
        for make in PARADIGMS
        for number, (good, bad) in enumerate(distinct(make.__name__, PAIRS_OF_EACH, make), start=1)
    ]
