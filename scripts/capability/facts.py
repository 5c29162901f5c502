"""Facts that most grown people know, each beside three wrong answers of the same kind.

A group is a sentence with a gap and the words that belong together: `word = answer, word = answer`. The wrong options of one
are the answers of others in its group, so no group holds two words with equally good answers. What has no such family is
written out with its wrong answers. Nothing here changes with the news.
"""

from capability.drawing import Item, placed

# Subject: the sentence, and what belongs together.
GROUPS = {
    "capitals": (
        "The capital of {} is",
        "France = Paris, Germany = Berlin, Italy = Rome, Spain = Madrid, Portugal = Lisbon, Austria = Vienna, Greece = "
        "Athens, Japan = Tokyo, China = Beijing, Russia = Moscow, Egypt = Cairo, Norway = Oslo, Sweden = Stockholm, "
        "Denmark = Copenhagen, Finland = Helsinki, Ireland = Dublin, Poland = Warsaw, Hungary = Budapest, Turkey = "
        "Ankara, Cuba = Havana, Peru = Lima, Kenya = Nairobi, Canada = Ottawa, Australia = Canberra, Argentina = Buenos "
        "Aires, Thailand = Bangkok, South Korea = Seoul, Iran = Tehran, Iraq = Baghdad, Belgium = Brussels",
    ),
    "continents": (
        "On the map, you find {} in",
        "France = Europe, Poland = Europe, Norway = Europe, Portugal = Europe, Japan = Asia, Vietnam = Asia, India = "
        "Asia, Mongolia = Asia, Kenya = Africa, Nigeria = Africa, Ghana = Africa, Morocco = Africa, Brazil = South "
        "America, Chile = South America, Peru = South America, Uruguay = South America, Canada = North America, Mexico = "
        "North America",
    ),
    "languages": (
        "Most people in {} speak",
        "Brazil = Portuguese, Mexico = Spanish, Egypt = Arabic, Austria = German, Australia = English, Japan = Japanese, "
        "Russia = Russian, Greece = Greek, Poland = Polish, Italy = Italian, Iran = Persian, Denmark = Danish, Israel = "
        "Hebrew",
    ),
    "days": (
        "The day that comes right after {} is",
        "Monday = Tuesday, Tuesday = Wednesday, Wednesday = Thursday, Thursday = Friday, Friday = Saturday, Saturday = "
        "Sunday, Sunday = Monday",
    ),
    "days_before": (
        "The day that comes right before {} is",
        "Monday = Sunday, Tuesday = Monday, Wednesday = Tuesday, Thursday = Wednesday, Friday = Thursday, Saturday = "
        "Friday, Sunday = Saturday",
    ),
    "months": (
        "The month that comes right after {} is",
        "January = February, February = March, March = April, April = May, May = June, June = July, July = August, August "
        "= September, September = October, October = November, November = December, December = January",
    ),
    "months_before": (
        "The month that comes right before {} is",
        "January = December, February = January, March = February, April = March, May = April, June = May, July = June, "
        "August = July, September = August, October = September, November = October, December = November",
    ),
    "opposites": (
        "The opposite of {} is",
        "hot = cold, big = small, up = down, fast = slow, light = dark, wet = dry, old = young, rich = poor, strong = "
        "weak, early = late, full = empty, open = closed, happy = sad, hard = soft, high = low, long = short, loud = "
        "quiet, left = right, near = far, sweet = bitter, thick = thin, true = false, wide = narrow, win = lose, begin = "
        "end, buy = sell, remember = forget, day = night, love = hate, clean = dirty, guilty = innocent, victory = "
        "defeat, shallow = deep, generous = stingy, expand = shrink",
    ),
    "colors": (
        "The usual color of {} is",
        "fresh snow = white, grass = green, blood = red, coal = black, a ripe banana = yellow, a clear sky at noon = "
        "blue, chocolate = brown, milk = white, a ripe strawberry = red, a lemon = yellow, a frog = green, a crow = "
        "black, a flamingo = pink, an elephant = gray, salt = white, a carrot = orange, spinach = green, a ripe tomato = "
        "red",
    ),
    "young_animals": (
        "The young of a {} is called a",
        "dog = puppy, cat = kitten, cow = calf, sheep = lamb, horse = foal, goat = kid, deer = fawn, pig = piglet, bear = "
        "cub, duck = duckling, frog = tadpole, hen = chick, kangaroo = joey",
    ),
    "jobs": (
        "Someone who {} is called",
        "bakes bread = a baker, flies planes = a pilot, catches fish = a fisherman, cuts hair = a barber, repairs pipes = "
        "a plumber, treats sick animals = a veterinarian, treats teeth = a dentist, designs houses = an architect, grows "
        "crops = a farmer, puts out fires = a firefighter, sews suits = a tailor, sells meat = a butcher, makes furniture "
        "from wood = a carpenter, lends books to readers = a librarian, plays the piano = a pianist, writes novels = a "
        "novelist, delivers letters = a mailman, judges cases in court = a judge, digs coal = a miner, serves food in a "
        "restaurant = a waiter, works with electric wires = an electrician, travels into space = an astronaut, prepares "
        "medicine = a pharmacist, steals from others = a thief",
    ),
    "tools": (
        "For {} you use a",
        "measuring temperature = thermometer, driving in nails = hammer, cutting wood = saw, finding north = compass, "
        "digging a hole = shovel, sweeping the floor = broom, opening a lock = key, taking photographs = camera, sewing = "
        "needle, looking at stars = telescope, looking at bacteria = microscope, weighing flour = scale, eating soup = "
        "spoon, crossing a river = bridge, keeping food cold = refrigerator, driving in screws = screwdriver, climbing "
        "onto a roof = ladder",
    ),
    "numbers": (
        "The number of {} is",
        "days in a week = 7, hours in a day = 24, months in a year = 12, minutes in an hour = 60, centimeters in a meter "
        "= 100, grams in a kilogram = 1000, legs of a spider = 8, legs of an insect = 6, sides of a triangle = 3, sides "
        "of a square = 4, sides of a pentagon = 5, wheels of a bicycle = 2, players of a soccer team on the field = 11, "
        "years in a century = 100, years in a decade = 10, eggs in a dozen = 12, inches in a foot = 12, letters in the "
        "English alphabet = 26, planets in the solar system = 8, degrees in a right angle = 90, degrees in a full circle "
        "= 360, days in a leap year = 366, weeks in a year = 52, zeros in a million = 6, cards in a full deck = 52, "
        "squares on a chessboard = 64",
    ),
    "symbols": (
        "The chemical symbol of {} is",
        "gold = Au, iron = Fe, oxygen = O, hydrogen = H, carbon = C, nitrogen = N, silver = Ag, sodium = Na, lead = Pb, "
        "copper = Cu, helium = He, potassium = K, calcium = Ca, zinc = Zn",
    ),
    "materials": (
        "People make {} from",
        "bread = flour, cheese = milk, wine = grapes, paper = wood, glass = sand, popcorn = corn, omelettes = eggs, "
        "sweaters = wool, leather shoes = the skin of animals, beer = barley, tofu = soybeans",
    ),
    "homes": (
        "The home of a {} is called a",
        "bird = nest, bee = hive, spider = web, rabbit = burrow, horse = stable, pig = sty, lion = den, dog = kennel, "
        "king = palace, monk = monastery",
    ),
    "body": (
        "The part of the body that people use to {} is the",
        "see = eye, hear = ear, smell = nose, taste = tongue, breathe = lung, think = brain, chew = tooth, pump blood = "
        "heart, digest food = stomach, hold a pen = hand, walk = leg",
    ),
    "synonyms": (
        "A word that means nearly the same as {} is",
        "physician = doctor, car = automobile, rock = stone, present = gift, sickness = disease, woods = forest, error = "
        "mistake, movie = film, shop = store, cab = taxi, instructor = teacher, infant = baby",
    ),
}  # fmt: skip

# The sentence, its answer, and what is wrong.
SINGLE = """
Water freezes at a temperature of | 0 degrees Celsius | 50 degrees Celsius | 100 degrees Celsius | 20 degrees Celsius
At sea level, water boils at | 100 degrees Celsius | 40 degrees Celsius | 0 degrees Celsius | 500 degrees Celsius
Frozen water is called | ice | steam | oil | sand
Water that has become a gas is called | steam | ice | dust | mud
The gas that people need to breathe is | oxygen | helium | neon | carbon monoxide
To grow, green plants take from the air | carbon dioxide | helium | methane | argon
Plants make their food with the help of | sunlight | moonlight | sound | gravity
The star nearest to the Earth is | the Sun | Mars | the Moon | Sirius
The Earth moves around | the Sun | the Moon | Mars | Venus
The Moon moves around | the Earth | Saturn | Venus | Jupiter
The largest planet of the solar system is | Jupiter | Mercury | Earth | Mars
The planet nearest to the Sun is | Mercury | Neptune | Saturn | Jupiter
The red planet is | Mars | Venus | Uranus | Neptune
The planet famous for its rings is | Saturn | Venus | Mercury | Mars
The force that pulls things to the ground is | gravity | friction | magnetism | electricity
A magnet attracts objects made of | iron | wood | glass | paper
The hardest of these materials is | diamond | butter | chalk | wax
The fastest of these is | light | sound | a train | a horse
The largest animal in the world is the | blue whale | elephant | ant | horse
The tallest animal on land is the | giraffe | rabbit | pig | goat
The animal called the king of beasts is the | lion | sheep | goose | mouse
A bird that cannot fly is the | penguin | eagle | swallow | pigeon
An animal that lays eggs is the | hen | cow | dog | horse
An animal that gives people wool is the | sheep | fish | snake | frog
An insect that makes honey is the | bee | fly | mosquito | moth
A caterpillar turns into a | butterfly | spider | bird | snail
The largest ocean in the world is the | Pacific Ocean | Arctic Ocean | Indian Ocean | Atlantic Ocean
The longest river of Africa is the | Nile | Rhine | Danube | Amazon
The highest mountain in the world is | Mount Everest | Mont Blanc | Mount Fuji | Kilimanjaro
The largest desert of Africa is the | Sahara | Gobi | Alps | Amazon
The Eiffel Tower stands in | Paris | London | Rome | Berlin
The Great Wall was built in | China | Spain | Canada | Brazil
The pyramids of Giza stand in | Egypt | Norway | Japan | Peru
The Colosseum stands in | Rome | Cairo | Tokyo | Moscow
The Statue of Liberty stands in | New York | Madrid | Vienna | Sydney
The coldest season of the year is | winter | summer | spring | autumn
The hottest season of the year is | summer | winter | spring | autumn
The sun rises in the | east | west | north | south
The sun sets in the | west | east | north | south
A compass needle points to the | north | sky | ocean | sun
A shape with three sides is a | triangle | square | circle | hexagon
A shape without corners is a | circle | square | triangle | rectangle
Half of one hundred is | fifty | thirty | ten | eighty
Two times twelve is | twenty-four | twelve | fourteen | two hundred
The first letter of the alphabet is | A | Z | M | K
The last letter of the alphabet is | Z | A | G | L
The author of Romeo and Juliet is | William Shakespeare | Charles Dickens | Jane Austen | Mark Twain
The painter of the Mona Lisa is | Leonardo da Vinci | Vincent van Gogh | Claude Monet | Pablo Picasso
The theory of relativity comes from | Albert Einstein | Isaac Newton | Charles Darwin | Marie Curie
The theory of evolution by natural selection comes from | Charles Darwin | Galileo Galilei | Louis Pasteur | Thomas Edison
The first person to walk on the Moon was | Neil Armstrong | Yuri Gagarin | Christopher Columbus | Albert Einstein
The first president of the United States was | George Washington | Abraham Lincoln | Winston Churchill | Napoleon
The Second World War ended in the year | 1945 | 1918 | 1812 | 1989
Columbus crossed the Atlantic in the year | 1492 | 1066 | 1776 | 1914
The money of Japan is the | yen | dollar | pound | peso
The money of the United Kingdom is the | pound | yen | peso | ruble
The main ingredient of an omelette is | egg | rice | corn | fish
The dish called sushi comes from | Japan | Germany | Egypt | Ireland
The dish called pizza comes from | Italy | Sweden | China | Peru
A vegetable that makes people cry when they cut it is the | onion | carrot | potato | cucumber
The metal that is liquid at room temperature is | mercury | iron | gold | copper
Diamonds are made of | carbon | oxygen | silver | water
Table salt is a compound of chlorine and | sodium | gold | helium | carbon
The natural satellite of the Earth is | the Moon | Mars | the Sun | Pluto
A doctor for children is a | pediatrician | dentist | surgeon | psychologist
Blood is pumped through the body by the | heart | liver | brain | stomach
The largest organ of the human body is the | skin | heart | ear | eye
Bones meet at the | joints | lungs | veins | nails
"""


def facts() -> list[Item]:
    """Return the questions of all groups and those written out, each with its right answer among four options."""
    questions: list[tuple[Item, str, list[str]]] = []
    for subject, (sentence, words) in GROUPS.items():
        known = dict(pair.split(" = ") for pair in words.split(", "))
        for number, (word, answer) in enumerate(known.items(), start=1):
            asked: Item = {"id": f"{subject}-{number:02}", "subject": subject, "question": sentence.format(word)}
            questions.append((asked, answer, sorted({*known.values()} - {answer})))
    for number, line in enumerate(SINGLE.strip().splitlines(), start=1):
        question, answer, *wrong = line.split(" | ")
        questions.append(({"id": f"general-{number:02}", "subject": "general", "question": question}, answer, wrong))
    return placed("facts", questions)
