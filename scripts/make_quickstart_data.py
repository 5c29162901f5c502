"""Write the quickstart data set: letters to a guitar maker's workshop, turned into JSON.

    python scripts/make_quickstart_data.py            writes src/luthier/data/quickstart/{train,heldout}.jsonl
    python scripts/make_quickstart_data.py --out DIR  writes them to DIR instead

Every phrase below was written by hand for this project. A request is one sentence about the work (a *core*), perhaps a day,
perhaps a name, in changing order; a quarter of the held-out set and a ninth of the training set are whole requests
written one by one, so that the rows do not all smell of templates. The same seed gives the same bytes on every machine.

Held-out rows never share a name with a training row, and come in three parts, in this order: HELDOUT_SEEN rows whose
sentences also occur in training, HELDOUT_UNSEEN rows whose sentence about the work, day phrase and signature do not, and the
hand-written ones. This file never reads a model, a tokenizer or the network.
"""

import argparse
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

SEED = 1833  # the year a certain guitar maker opened shop in New York
TRAIN_USES_OF_EACH_CORE = 3
HELDOUT_SEEN, HELDOUT_UNSEEN = 30, 30
MAX_WORDS = 21  # keeps a request near 30 tokens; prompt tokens are most of the training time

SYSTEM = "Reply with JSON: task, instrument, day, name."

# What the customer says -> what the workshop writes down.
INSTRUMENTS: dict[str | None, tuple[str, ...]] = {
    "acoustic guitar": ("acoustic guitar", "acoustic", "dreadnought", "parlor guitar", "12-string", "classical guitar"),
    "electric guitar": ("electric guitar", "strat", "tele", "Les Paul", "electric", "Flying V"),
    "bass": ("bass", "jazz bass", "P-bass", "bass guitar", "5-string bass"),
    "ukulele": ("ukulele", "uke", "tenor uke", "baritone ukulele"),
    "mandolin": ("mandolin", "mando", "octave mandolin"),
    "banjo": ("banjo", "tenor banjo", "5-string banjo"),
    "violin": ("violin", "fiddle"),
}
NO_INSTRUMENT = ("my instrument", "this old thing", "this instrument", "an instrument")
OWNERS = ("my", "my", "my old", "my", "this", "the", "my daughter's", "our", "my beloved", "a friend's", "my '72")
ORDERED = ("a", "a", "a custom", "a new", "a travel-size", "a left-handed")

WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
SHORT_DAYS = {
    "monday": "Mon",
    "tuesday": "Tue",
    "wednesday": "Wed",
    "thursday": "Thurs",
    "friday": "Fri",
    "saturday": "Sat",
    "sunday": "Sun",
}
RELATIVE_DAYS = ("today", "tomorrow")


@dataclass(frozen=True)
class Phrases:
    """What one split may say: `{i}` an instrument with its owner, `{a}` one to be built, `{d}` a deadline, `{v}` a visit."""

    cores: dict[str, tuple[str, ...]]
    deadlines: tuple[str, ...]
    visits: tuple[str, ...]
    day_sentences: tuple[str, ...]
    openings: tuple[str, ...]
    closings: tuple[str, ...]
    names: str  # one after the other, a comma between


TRAIN = Phrases(
    cores={
        "refret": (
            "could you refret {i}{d}?",
            "{i} needs new frets{d}.",
            "the frets on {i} are worn flat, can you replace them{d}?",
            "I'd like a full refret on {i}{d}.",
            "how about stainless frets for {i}{d}?",
            "I wore out the frets on {i}. Can you put in new ones{d}?",
            "time to refret {i}{d}.",
            "can {i} get fresh fret wire{d}?",
            "please pull the old frets and fit new ones on {i}{d}.",
            "there are grooves in the frets of {i}, please change them{d}.",
            "looking for a fret job on {i}{d}.",
            "strip the worn frets from {i} and hammer in fresh ones{d}.",
            "I need taller frets on {i}{d}.",
            "{i} has flat spots on the first five frets, please renew them{d}.",
            "please give {i} a fret job{d}.",
            "{i} wants gold frets, could you do that{d}?",
        ),
        "setup": (
            "{i} needs a setup{d}.",
            "can you set up {i}{d}?",
            "the action on {i} is too high, can you lower it{d}?",
            "{i} buzzes everywhere, please adjust it{d}.",
            "please fix the intonation on {i}{d}.",
            "{i} won't play in tune up the neck, can you adjust it{d}?",
            "I'd like a full setup on {i}{d}.",
            "the strings on {i} sit too high. Can you lower them{d}?",
            "please check the action and intonation on {i}{d}.",
            "regular setup for {i}{d}, please.",
            "{i} has a nasty buzz, could you sort it out{d}?",
            "{i} feels stiff, can you make it play easier{d}?",
            "please give {i} a checkup and lower the strings{d}.",
            "{i} rattles on the low notes, can you cure it{d}?",
            "can you make {i} play in tune again{d}?",
            "the neck of {i} has bowed, please straighten it{d}.",
        ),
        "restring": (
            "can you restring {i}{d}?",
            "{i} needs new strings{d}.",
            "please put fresh strings on {i}{d}.",
            "I broke a string on {i}, can you change the set{d}?",
            "the strings on {i} are rusty, please swap them{d}.",
            "could you fit a light set of strings to {i}{d}?",
            "new strings for {i}{d}, please.",
            "{i} is missing two strings, can you restring it{d}?",
            "I'd like a string change on {i}{d}.",
            "the strings on {i} are dead. Can you replace them{d}?",
            "just a restring for {i}{d}.",
            "I'd like bronze strings on {i}{d}.",
            "all the strings on {i} have gone black, please renew them{d}.",
            "could {i} have a clean set of strings{d}?",
            "{i} broke its top string, can you restring it{d}?",
            "time for a change of strings on {i}{d}.",
        ),
        "repair": (
            "{i} has a crack in the top, can you fix it{d}?",
            "I dropped {i} and the headstock snapped. Can you glue it{d}?",
            "please repair the broken neck on {i}{d}.",
            "the bridge came off {i}, can you glue it back{d}?",
            "{i} fell off its stand and cracked. Can you mend it{d}?",
            "a seam opened on {i}, please close it{d}.",
            "can you repair a split in the side of {i}{d}?",
            "somebody sat on {i}. Can it be saved{d}?",
            "the back of {i} is coming apart, please glue it{d}.",
            "{i} has a hole in the side, can you patch it{d}?",
            "the neck joint on {i} is loose, could you repair it{d}?",
            "I stepped on {i} and the side caved in. Can you save it{d}?",
            "the heel of {i} has split, can you mend it{d}?",
            "{i} was crushed in the van, please put it back together{d}.",
            "the headstock of {i} broke off, can you fix it{d}?",
            "my toddler threw {i} out of the window, is it fixable{d}?",
        ),
        "wiring": (
            "can you rewire {i}{d}?",
            "the output jack on {i} crackles, can you fix it{d}?",
            "{i} has no sound when plugged in. Can you check it{d}?",
            "please install new pickups in {i}{d}.",
            "the volume knob on {i} is scratchy, please replace the pot{d}.",
            "could you swap the pickups on {i}{d}?",
            "{i} hums badly, can you shield it{d}?",
            "the pickup selector on {i} is dead, please change it{d}.",
            "I'd like humbuckers fitted to {i}{d}.",
            "the tone knob on {i} does nothing, can you check the wiring{d}?",
            "{i} cuts out on stage, can you solder it{d}?",
            "the cable won't stay in {i}, please replace the jack{d}.",
            "one pickup on {i} went quiet, can you test it{d}?",
            "I'd like a kill switch installed in {i}{d}.",
            "please solder the loose wire inside {i}{d}.",
            "{i} buzzes through the amp, please ground it{d}.",
        ),
        "refinish": (
            "can you refinish {i}{d}?",
            "I'd like {i} painted black{d}.",
            "please strip and relacquer {i}{d}.",
            "the varnish on {i} is flaking, can you redo it{d}?",
            "can you spray {i} sunburst{d}?",
            "{i} needs a new coat of lacquer{d}.",
            "the finish on {i} is scratched, can you polish it{d}?",
            "could you stain {i} a dark cherry{d}?",
            "I want {i} in sea green, can you paint it{d}?",
            "please touch up the lacquer on {i}{d}.",
            "could {i} get a matte oil finish{d}?",
            "please take {i} back to bare wood and oil it{d}.",
            "chips all over {i}, could you repaint it{d}?",
            "I want {i} white instead of brown{d}.",
            "could you french polish {i}{d}?",
            "can you make {i} shine again{d}?",
        ),
        "build": (
            "I'd like to order {a}, can I come in{v}?",
            "can you build me {a}? I could stop by{v}.",
            "I dream of {a} made by you. Can we talk{v}?",
            "how much for {a} built from scratch?",
            "please make {a} for my son{d}.",
            "I want to commission {a}, can we meet{v}?",
            "would you make {a} to my own design?",
            "put me on the waiting list for {a}, please.",
            "I'd like {a} made of walnut, can we talk{v}?",
            "do you take orders for {a}? I can visit{v}.",
            "I'm after {a}, handmade. Can we discuss it{v}?",
            "how long would you take to make {a}?",
            "I'd love {a} of my own, built by you. May I call{v}?",
            "I have the wood for {a}, would you build it?",
            "please quote me for building {a}.",
            "my wife wants {a} made by hand, can we come{v}?",
        ),
        "appraisal": (
            "what is {i} worth? I can bring it in{v}.",
            "can you value {i}{v}?",
            "I need an appraisal of {i}{d}.",
            "how much could I sell {i} for?",
            "could you price {i} for insurance{d}?",
            "I inherited {i}, can you tell me what it's worth{d}?",
            "please estimate the value of {i}{d}.",
            "is {i} worth anything? Can I show you{v}?",
            "I'd like a valuation for {i}{d}.",
            "can you tell me the age and value of {i}{d}?",
            "I want to sell {i}, what should I ask for it?",
            "how much is {i} worth these days?",
            "I need a price for {i} before I sell it.",
            "can you put a figure on {i}{d}?",
            "a dealer offered me 300 for {i}, is that fair?",
            "please look at {i} and tell me its market value{d}.",
        ),
    },
    deadlines=(" by {D}", " by {D}", " before {D}", " on {D}", " by {D} night"),
    visits=(" on {D}", " this {D}", " next {D}", " {D} morning"),
    day_sentences=("I need it {D}.", "{D} would be great.", "Ideally {D}.", "{D} at the latest.", "Can it be {D}?"),
    openings=("Hi, {n} here.", "This is {n}.", "Hello, my name is {n}.", "Hi, it's {n}.", "I'm {n}.", "{n} here."),
    closings=("- {n}", "Thanks, {n}", "Cheers, {n}", "{n}", "Regards, {n}", "The name is {n}.", "Best, {n}", "Ask for {n}."),
    names=(
        "Mara,Tobias,Ines,Okafor,Priya,Lars,Yuki,Fatima,Diego,Hannah,Samir,Greta,Owen,Chiara,Bruno,Leila,Piotr,Naomi,Felix,"
        "Amara,Jonas,Wei,Elif,Rosa,Kofi,Sven,Alma,Marcus,Dana,Ravi,Clara,Hugo,Nadia,Theo,Mina,Ivan,Lucia,Omar,Freya,Pablo,"
        "Ana Ruiz,Tom Baker,Mrs. Lind,Mr. Sato,Joe Marsh,Kim Park,Dr. Weiss,Eva Novak,Ben Carter,Lena Vogt,Ali Demir,Zoë,"
        "José,Björn,Siobhan,Thandiwe,Giulia,Matteo,Ursula,Viktor,Wanda,Xavier,Yara,Anton,Beatriz,Cedric,Doris,Emil,"
        "Abel,Agatha,Akira,Alonso,Anneke,Arjun,Astrid,Aurelio,Ayla,Barnaby,Basil,Bogdan,Brigid,Calum,Carmela,Chidi,"
        "Cornelia,Cosima,Dario,Deirdre,Dmitri,Edith,Elodie,Emre,Esther,Fabio,Farida,Fergal,Fiona,Gideon,Gudrun,Gustavo,"
        "Hamish,Hector,Hiroshi,Ilona,Imani,Ingrid,Isolde,Jacinta,Jarek,Jelena,Juliet,Kamal,Katya,Keiko,Kwame,Lachlan,"
        "Leopold,Lorenzo,Ludwig,Maeve,Malik,Marisol,Milos,Mireille,Nikhil,Norbert,Odette,Olga,Orla,Osman,Otto,Padma,"
        "Pascal,Perpetua,Philippa,Quincy,Rafael,Ramona,Reinhold,Roisin,Rosalind,Rupert,Sabine,Santiago,Selma,Shreya,"
        "Sigrid,Solveig,Stefan,Tadeo,Tamar,Terence,Tomasz,Ulrike,Valentina,Vikram,Wilhelmina,Winston,Yusuf,Zainab,Zoltan,"
        "Peter Ash,Ms. Ito,Gail Hooper,Mr. Dunne,Tess Moran,Raj Patel"
    ),
)

UNSEEN = Phrases(
    cores={
        "refret": (
            "every fret on {i} is worn down, please redo them{d}.",
            "can I get jumbo frets put on {i}{d}?",
            "fret replacement for {i}{d}, please.",
            "the frets are gone on {i}. Can you fit a new set{d}?",
        ),
        "setup": (
            "the strings on {i} are miles off the neck, can you bring them down{d}?",
            "something buzzes on {i}, can you adjust it{d}?",
            "I want {i} set up with low action{d}.",
            "could {i} have its yearly setup{d}?",
        ),
        "restring": (
            "a string snapped on {i}, please put on a new set{d}.",
            "could you change the old strings on {i}{d}?",
            "can {i} get heavier strings{d}?",
            "{i} sounds dull, it wants a new set of strings{d}.",
        ),
        "repair": (
            "the airline broke the neck of {i}. Can you fix it{d}?",
            "{i} got knocked over and split. Can you glue it up{d}?",
            "there is a long crack down the back of {i}, please repair it{d}.",
            "the dog chewed {i}, can you patch it up{d}?",
        ),
        "wiring": (
            "the jack socket on {i} is loose, can you resolder it{d}?",
            "put a new pickup in {i}{d}, please.",
            "the electronics in {i} are dead, can you have a look{d}?",
            "the switch on {i} is broken, please fit a new one{d}.",
        ),
        "refinish": (
            "the paint on {i} is peeling, can you respray it{d}?",
            "please varnish {i} again{d}.",
            "I'd love {i} in deep red, can you spray it{d}?",
            "please buff the scratches out of the lacquer on {i}{d}.",
        ),
        "build": (
            "are you able to make {a} from scratch? I can drop in{v}.",
            "I want {a} made to order, can we meet{v}?",
            "what would it cost to have {a} built?",
            "can you make me {a} out of cherry wood?",
        ),
        "appraisal": (
            "my insurer asks for the value of {i}, can you help{d}?",
            "would you appraise {i}{v}?",
            "what would {i} fetch at auction?",
            "can I bring {i} in for a valuation{v}?",
        ),
    },
    deadlines=(" by {D} noon", " no later than {D}", " in time for {D}"),
    visits=(" {D} afternoon", " sometime {D}"),
    day_sentences=("It has to be {D}.", "{D} works for me.", "Is {D} possible?"),
    openings=("Good morning, {n} speaking.", "Hey, you can call me {n}.", "Hello from {n}."),
    closings=("Yours, {n}", "Greetings from {n}", "Please book it for {n}.", "Signed, {n}"),
    names=(
        "Ottilie,Rashid,Caspar,Noor,Ludmila,Enzo,Saoirse,Bastian,Ngozi,Tilda,Marek,Aiko,Rufus,Paloma,Idris,Henrike,"
        "Joanna Cole,Mr. Abara,Max Tanner,Ms. Quint,Renée,Søren,Delphine,Hamza,Oriol,Petra,Quentin,Salma,Umberto,Vera"
    ),
)

NAMELESS_OPENINGS = ("", "", "", "Hi!", "Hello.", "Good morning.", "Hi there.")
NAMELESS_CLOSINGS = ("", "", "", "Thanks!", "Thank you.")
PATIENT_CLOSINGS = (*NAMELESS_CLOSINGS, "No rush.", "Whenever you have time.")  # only where no day is named

Row = tuple[str, str, str | None, str | None, str | None]  # request, task, instrument, day, name

# Whole requests, one by one: other word orders, slang, fragments, stories, unfinished sentences.
HAND_TRAIN: tuple[Row, ...] = (
    ("Frets. Gone. All of them. Strat, Friday, Moss.", "refret", "electric guitar", "friday", "Moss"),
    ("My thumb falls into the frets, that's how worn they are. Jazz bass. - Renato", "refret", "bass", None, "Renato"),
    ("banjo refret, can u do it till sat? thx, kip", "refret", "banjo", "saturday", "kip"),
    ("Would Tuesday do for new frets? It's a little parlor guitar.", "refret", "acoustic guitar", "tuesday", None),
    ("Gloria again! The mandolin is ready for its third set of frets.", "refret", "mandolin", None, "Gloria"),
    ("Half the frets on my uke lift at the ends, replace the lot please", "refret", "ukulele", None, None),
    ("Truss rod on my tele needs a turn, I think. Monday? Wes", "setup", "electric guitar", "monday", "Wes"),
    ("Dear maker, the winter air has made my fiddle buzz. Adjust it, please. Agnes", "setup", "violin", None, "Agnes"),
    ("low action, slinky feel, P-bass, sunday gig. that's all. dex", "setup", "bass", "sunday", "dex"),
    ("You could drive a van under the strings of this dreadnought.", "setup", "acoustic guitar", None, None),
    ("Since the move my uke is never in tune above fret five. Halima", "setup", "ukulele", None, "Halima"),
    ("setup + intonation check, banjo, need it back wed", "setup", "banjo", "wednesday", None),
    ("Everything rattles. Can it be cured by tomorrow? Yours, Colonel Finch", "setup", None, "tomorrow", "Colonel Finch"),
    ("Twang! There goes the high E of my Flying V. New set Thursday? Zeke", "restring", "electric guitar", "thursday", "Zeke"),
    ("Nylon strings, hard tension, classical guitar. Kindly, Pilar", "restring", "acoustic guitar", None, "Pilar"),
    ("These strings are older than my grandson. Mandolin. Mr. Pruitt", "restring", "mandolin", None, "Mr. Pruitt"),
    ("flatwounds on the bass pls, today if u can", "restring", "bass", "today", None),
    ("Tour starts Friday and all five strings of the banjo are black. Help! Dottie", "restring", "banjo", "friday", "Dottie"),
    ("My kid cut the strings of the violin with scissors. Can you string it again?", "restring", "violin", None, None),
    ("ukulele, all four strings, Saturday, Bea", "restring", "ukulele", "saturday", "Bea"),
    ("Stage dive. Les Paul. Neck in two pieces. Please say you can. - Ronan", "repair", "electric guitar", None, "Ronan"),
    ("The cat, the shelf, my mandolin. It is cracked. Could you look Monday? Noa", "repair", "mandolin", "monday", "Noa"),
    ("A suitcase fell on my uke and now there's a hole.", "repair", "ukulele", None, None),
    ("Grandpa's violin opened along the edge. Glue it for Sunday's concert? Ilse", "repair", "violin", "sunday", "Ilse"),
    ("bridge lifting on my 12-string, u fix? - jet", "repair", "acoustic guitar", None, "jet"),
    ("The peg head of the banjo is split, Wednesday is my last chance. Cyrus", "repair", "banjo", "wednesday", "Cyrus"),
    ("It arrived broken in the post. Can it be mended? Mrs. Holloway", "repair", None, None, "Mrs. Holloway"),
    ("No signal at all from my jazz bass, must be the jack. Tomorrow? Ty", "wiring", "bass", "tomorrow", "Ty"),
    ("Hot pickups into the tele, please! Delivered on Thursday, says Juno", "wiring", "electric guitar", "thursday", "Juno"),
    ("my strat picks up the local radio. shielding? lol", "wiring", "electric guitar", None, None),
    ("The battery box in my 5-string bass came off its wire. Arturo", "wiring", "bass", None, "Arturo"),
    ("Coil split switch, Les Paul, how soon? Saturday? - Imke", "wiring", "electric guitar", "saturday", "Imke"),
    ("Knobs scratch, switch crackles, one pickup is silent. Can you do Tuesday?", "wiring", None, "tuesday", None),
    ("Shell pink. My strat. You know you want to. Love, Trixie", "refinish", "electric guitar", None, "Trixie"),
    ("The sun bleached the top of my acoustic, could you tint it? Harun", "refinish", "acoustic guitar", None, "Harun"),
    ("Sand the banjo neck and oil it, I'll fetch it Friday. Lowell", "refinish", "banjo", "friday", "Lowell"),
    ("Beer on the varnish of my fiddle, it has gone white. Before Monday please!", "refinish", "violin", "monday", None),
    ("matte black, whole bass, hardware too. - Sid", "refinish", "bass", None, "Sid"),
    ("Would a honey lacquer suit my tenor uke? If so, do it. Marguerite", "refinish", "ukulele", None, "Marguerite"),
    ("I sketched a tele with one pickup and no paint. Build it? Casimir", "build", "electric guitar", None, "Casimir"),
    ("For my fiftieth I want a banjo nobody else has. Talk on Sunday? Harriet", "build", "banjo", "sunday", "Harriet"),
    ("custom 5-string bass, ash body, start asap. whats the wait? - Lonnie", "build", "bass", None, "Lonnie"),
    ("We would like a mandolin made for our school. Visit Wednesday?", "build", "mandolin", "wednesday", None),
    ("Koa tenor uke, from a plank to a song. How much? Keala", "build", "ukulele", None, "Keala"),
    ("Aunt Vi left me her fiddle. Treasure or firewood? I'll be by Thursday. Ned", "appraisal", "violin", "thursday", "Ned"),
    ("A man offers 900 for my dreadnought. Fair? Asks Constance", "appraisal", "acoustic guitar", None, "Constance"),
    ("need a number for the insurance, 1959 les paul, today!!", "appraisal", "electric guitar", "today", None),
    ("Old mandolin, flea market, no label. What might it be worth? Gus", "appraisal", "mandolin", None, "Gus"),
)
HAND_HELDOUT: tuple[Row, ...] = (
    ("New frets, old tele, Thursday. Deal? - Magnus", "refret", "electric guitar", "thursday", "Magnus"),
    ("I have played my mandolin so long that the frets are flat as paper.", "refret", "mandolin", None, None),
    ("bass refret by mon pls. thx, lou", "refret", "bass", "monday", "lou"),
    ("My dreadnought buzzes since summer. Could you adjust it? Odile", "setup", "acoustic guitar", None, "Odile"),
    ("The strings of my son's uke are so high that he cries. Lower them by Sunday?", "setup", "ukulele", "sunday", None),
    ("setup for a flying v, gig's on sat - rocco", "setup", "electric guitar", "saturday", "rocco"),
    ("Four new strings for a fiddle, and I'll wait. Can it be today? Winifred", "restring", "violin", "today", "Winifred"),
    ("Snap! There goes my banjo's last good string. Restring, please. Jebediah", "restring", "banjo", None, "Jebediah"),
    ("12-string. All twelve. Sorry. - Agnieszka", "restring", "acoustic guitar", None, "Agnieszka"),
    ("My ex threw my P-bass down the stairs and the neck broke. Wednesday? Silas", "repair", "bass", "wednesday", "Silas"),
    ("The violin has a crack by the chin rest, can you glue it? Mr. Tremaine", "repair", "violin", None, "Mr. Tremaine"),
    ("It fell. It cracked. I cried. Could you repair it by Tuesday?", "repair", None, "tuesday", None),
    ("Strat, three silent pickups, one sad owner: Benedikt. Friday?", "wiring", "electric guitar", "friday", "Benedikt"),
    ("my bass crackles every time i touch the volume knob", "wiring", "bass", None, None),
    ("Paint my Les Paul the blue of a summer evening. Kindly, Esperanza", "refinish", "electric guitar", None, "Esperanza"),
    ("The lacquer of my tenor banjo is cracked all over. Redo it? Monday's fine. Amos", "refinish", "banjo", "monday", "Amos"),
    ("Would you build a ukulele small enough for my niece? I'll call Saturday. Tamsin", "build", "ukulele", "saturday", "Tamsin"),
    ("I'm saving for a handmade octave mandolin. What is the price? Fergus", "build", "mandolin", None, "Fergus"),
    ("Found a dusty violin, is it worth money? Coming tomorrow. Mabel", "appraisal", "violin", "tomorrow", "Mabel"),
    ("Before I sell my classical guitar: what's it worth?", "appraisal", "acoustic guitar", None, None),
)


def main() -> None:
    """Write both files where the package ships them, or into --out."""
    shipped = Path(__file__).resolve().parents[1] / "src" / "luthier" / "data" / "quickstart"
    parser = argparse.ArgumentParser(description="Write the quickstart data set.")
    parser.add_argument("--out", type=Path, default=shipped, help="folder to write to (default: the package's)")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    train, heldout = make_splits(random.Random(SEED))
    for name, rows in (("train.jsonl", train), ("heldout.jsonl", heldout)):
        (out / name).write_text("".join(as_line(row) for row in rows), encoding="utf-8", newline="\n")
        print(f"{len(rows):4d} rows -> {out / name}")


def make_splits(rng: random.Random) -> tuple[list[Row], list[Row]]:
    """Return the training rows (shuffled) and the held-out rows (seen phrasing, unseen phrasing, hand-written)."""
    taken = {row[0].lower() for row in HAND_TRAIN + HAND_HELDOUT}
    known, new = TRAIN.names.split(","), UNSEEN.names.split(",")
    train = draw(rng, cores_of(TRAIN) * TRAIN_USES_OF_EACH_CORE, TRAIN, known, taken) + list(HAND_TRAIN)
    rng.shuffle(train)
    seen = draw(rng, spread(rng, TRAIN, HELDOUT_SEEN), TRAIN, new, taken)
    unseen = draw(rng, spread(rng, UNSEEN, HELDOUT_UNSEEN), UNSEEN, new, taken)
    return train, seen + unseen + list(HAND_HELDOUT)


def cores_of(phrases: Phrases) -> list[tuple[str, str]]:
    """Return every (task, core)."""
    return [(task, core) for task, cores in phrases.cores.items() for core in cores]


def spread(rng: random.Random, phrases: Phrases, count: int) -> list[tuple[str, str]]:
    """Return `count` different (task, core), the tasks as even as they can be."""
    shuffled = {task: rng.sample(cores, len(cores)) for task, cores in phrases.cores.items()}
    by_turns = [(task, cores[turn]) for turn in range(len(min(shuffled.values(), key=len))) for task, cores in shuffled.items()]
    return by_turns[:count]


def draw(
    rng: random.Random, cores: Iterable[tuple[str, str]], phrases: Phrases, names: Sequence[str], taken: set[str]
) -> list[Row]:
    """Return one row for each core, redrawn until it is short and new; `taken` remembers the requests of all splits."""
    rows = []
    for task, core in cores:
        row = compose(rng, task, core, phrases, names)
        while row[0].lower() in taken or len(row[0].split()) > MAX_WORDS:
            row = compose(rng, task, core, phrases, names)
        taken.add(row[0].lower())
        rows.append(row)
    return rows


def compose(rng: random.Random, task: str, core: str, phrases: Phrases, names: Sequence[str]) -> Row:
    """Return one request about `task`, worded as `core`, with whatever else the customer chose to say."""
    instrument, spoken = pick_instrument(rng, task)
    day = pick_day(rng)
    name = rng.choice(names) if rng.random() < 0.75 else None

    inline, sentence = say_day(rng, day, core, phrases)
    body = core.format(i=spoken, a=spoken, d=inline, v=inline)
    body = capitalised(misspelt(rng, body, keep=spoken + inline)) + (" " + sentence if sentence else "")
    request = " ".join(sign(rng, body, name, phrases, patient=day is None).split())

    if rng.random() < 0.08:  # people on their phones; a name is written down as it was written
        request, name = request.lower(), name.lower() if name else None
    return request, task, instrument, day, name


def pick_instrument(rng: random.Random, task: str) -> tuple[str | None, str]:
    """Return the instrument of the record and how the customer puts it."""
    if rng.random() < 0.14:
        return None, rng.choice(NO_INSTRUMENT[3:] if task == "build" else NO_INSTRUMENT[:3])
    kinds = [kind for kind in INSTRUMENTS if kind != "violin" or task != "refret"]  # violins have no frets
    if task == "wiring":
        kinds = ["electric guitar", "bass"]
    kind = rng.choice(kinds)
    alias = rng.choice(INSTRUMENTS[kind])
    spoken = f"{rng.choice(ORDERED if task == 'build' else OWNERS)} {alias}"
    return kind, "an " + spoken[2:] if spoken.startswith(("a a", "a e", "a o")) else spoken


def pick_day(rng: random.Random) -> str | None:
    """Return the day the customer names: none in a third of the requests."""
    chance = rng.random()
    if chance < 0.35:
        return None
    return rng.choice(RELATIVE_DAYS) if chance < 0.47 else rng.choice(WEEKDAYS)


def say_day(rng: random.Random, day: str | None, core: str, phrases: Phrases) -> tuple[str, str]:
    """Return the day as words inside the core and as a sentence of its own: one of them, or neither."""
    if day is None:
        return "", ""
    word = SHORT_DAYS.get(day, day.capitalize()) if rng.random() < 0.15 else day.capitalize()
    inside = phrases.deadlines if "{d}" in core else phrases.visits if "{v}" in core else ()
    if inside and rng.random() < 0.7:
        if day in RELATIVE_DAYS:
            return f" {day}", ""
        return rng.choice(inside).format(D=word), ""
    return "", capitalised(rng.choice(phrases.day_sentences).format(D=day if day in RELATIVE_DAYS else word))


def sign(rng: random.Random, body: str, name: str | None, phrases: Phrases, patient: bool) -> str:
    """Return the body with the name before or after it, or with plain politeness where there is no name."""
    if name is None:
        closings = PATIENT_CLOSINGS if patient else NAMELESS_CLOSINGS
        return f"{rng.choice(NAMELESS_OPENINGS)} {body} {rng.choice(closings)}"
    if rng.random() < 0.4:
        return f"{rng.choice(phrases.openings).format(n=name)} {body}"
    return f"{rng.choice(NAMELESS_OPENINGS)} {body} {rng.choice(phrases.closings).format(n=name)}"


def misspelt(rng: random.Random, text: str, keep: str) -> str:
    """Return the text, in one of fifteen cases with two letters of one word swapped; words that carry an answer are kept."""
    words = text.split(" ")
    open_to_it = [at for at, word in enumerate(words) if word.isalpha() and len(word) > 4 and word not in keep]
    if rng.random() > 1 / 15 or not open_to_it:
        return text
    at = rng.choice(open_to_it)
    word = words[at]
    words[at] = word[:2] + word[3] + word[2] + word[4:]
    return " ".join(words)


def capitalised(text: str) -> str:
    """Return the text with a capital first letter, the rest untouched."""
    return text[:1].upper() + text[1:]


def as_line(row: Row) -> str:
    """Return one JSON line in the chat format; the answer is compact JSON, keys always in the same order."""
    request, task, instrument, day, name = row
    answer = {"task": task, "instrument": instrument, "day": day, "name": name}
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": request},
        {"role": "assistant", "content": json.dumps(answer, ensure_ascii=False, separators=(",", ":"))},
    ]
    return json.dumps({"messages": messages}, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    main()
