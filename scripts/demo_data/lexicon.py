"""Word lists shared by the tasks, and a maker of invented words.

Invented words are what teaches a model to copy a name it has never seen instead of recalling one.
"""

from __future__ import annotations

import random

from .rows import Split, keep, listed, split_of

TABLE_NOUNS = listed("""
orders customers invoices payments shipments suppliers employees departments projects tickets books authors
students teachers courses exams rooms hotels guests bookings flights airports pilots trains stations drivers
vehicles engines parts repairs patients doctors clinics visits medicines recipes ingredients restaurants menus
dishes songs albums artists concerts venues films actors studios reviews players teams matches stadiums coaches
tournaments cities countries rivers mountains lakes parks animals keepers plants gardens farms crops tractors
houses tenants leases agents banks accounts loans cards transfers policies claims museums paintings sculptors
galleries ships harbors captains cargoes satellites rockets planets sensors readings devices routers servers
backups licenses contracts lawyers judges trials donors grants volunteers events tracks lessons machines factories
bridges tunnels routes buses bicycles helmets puppies kennels bakeries wines vineyards festivals magazines editors
""")

TEXT_COLUMNS = listed("""
name title city country region status category color brand owner author genre language department role level
supplier manufacturer model type material currency street state district continent climate species breed flavor
position sport league coach venue instructor subject faculty degree diagnosis ward specialty manager office
channel platform format publisher label nationality origin destination airline carrier terminal gender season
topic method priority severity branch division team client vendor agent architect style shape texture
""")

NUMBER_COLUMNS = listed("""
price quantity total age salary weight height length width depth score rating rank year stock duration distance
speed capacity population area budget revenue profit cost discount tax balance amount limit votes goals points
wins losses temperature rainfall altitude voltage power mileage seats floors pages copies downloads visitors
credits hours bonus rent deposit premium fee volume pressure humidity output yield attendance calories
""")

FIRST_NAMES = listed("""
Alice Bruno Carla Daniel Elena Felix Grace Hugo Irene Jonas Karen Liam Marta Nadia Oscar Paula Quentin Rosa Simon
Tara Ulrich Vera Walter Xenia Yusuf Zoe Amir Bianca Cedric Dora Emil Fatima Gustav Hannah Ivan Jasmin Kofi Leila
Mateo Nora Otto Priya Rafael Sofia Tomas Ursula Viktor Wendy Arjun Beatrice Chen Dmitri Esther Farid Greta Hiro
Ingrid Jamal Katya Lorenzo Mei Niko Olga Pedro Renata Stefan Thandi Umar Valeria Winston Yara Zane
""")

LAST_NAMES = listed("""
Abbott Bergman Castillo Dupont Eriksen Fischer Gallagher Hoffman Ibarra Jensen Keller Lindqvist Moreau Novak Okafor
Petrov Quinn Rossi Schmidt Tanaka Ueda Vargas Weber Xu Yamada Zimmer Andrade Bakker Chowdhury Doyle Engel Farouk
Greene Haddad Iyer Johansson Kowalski Lambert Mbeki Nilsson Ortega Pereira Ramsey Santoro Thorne Vidal Whitaker
""")

CITIES = listed("""
Lisbon Oslo Madrid Vienna Prague Dublin Athens Warsaw Berlin Paris Rome Milan Naples Porto Seville Geneva Zurich
Munich Hamburg Brussels Antwerp Rotterdam Copenhagen Stockholm Helsinki Tallinn Riga Vilnius Budapest Bucharest Sofia
Zagreb Belgrade Istanbul Ankara Cairo Tunis Rabat Lagos Accra Nairobi Kampala Harare Durban Mumbai Delhi Chennai
Bangkok Hanoi Manila Jakarta Seoul Busan Osaka Kyoto Tokyo Nagoya Sydney Perth Brisbane Auckland Toronto Montreal
Vancouver Calgary Boston Chicago Denver Seattle Portland Houston Dallas Austin Miami Atlanta Phoenix Bogota Lima
Quito Santiago Montevideo Havana Caracas Recife Glasgow Leeds Bristol Cardiff Belfast Lyon Nice Bordeaux Turin
""")

COLORS = listed("""
red blue green yellow black white purple orange pink brown grey silver golden turquoise beige crimson navy olive
maroon teal ivory violet indigo scarlet amber lavender magenta cyan khaki bronze copper plum peach mint coral salmon
charcoal mustard cream burgundy lilac ruby cobalt rust
""")

ITEMS = listed("""
lamp chair table sofa desk mirror carpet kettle toaster blender camera laptop tablet phone keyboard monitor printer
backpack suitcase umbrella jacket scarf sweater helmet bicycle guitar violin piano drum telescope microscope hammer
drill ladder shovel tent lantern kayak paddle vase candle clock blanket pillow notebook pencil stapler whiteboard
fan heater radio speaker basket bucket broom teapot skillet bookshelf wardrobe
""")

JOBS = listed("""
engineer nurse teacher lawyer plumber baker architect designer accountant electrician carpenter pharmacist analyst
surgeon dentist journalist translator photographer librarian chemist biologist mechanic pilot firefighter tailor
editor gardener geologist painter chef cashier florist veterinarian programmer therapist
""")

MONTHS = listed("January February March April May June July August September October November December")

_ONSETS = listed("b br c ch cl d dr f fl g gl gr h j k kl l m n p pl pr qu r s sh sk st t th tr v w y z")
_VOWELS = listed("a a a e e e i i i o o o u u ai ea oo")
_CODAS = ["", "", "b", "ck", "d", "g", "k", "l", "ll", "m", "n", "nd", "nt", "p", "r", "rk", "s", "st", "t", "x", "z"]


def invented_word(rng: random.Random, split: Split) -> str:
    """Return a pronounceable word of one to three syllables that belongs to ``split``."""
    while True:
        syllables = rng.choice((1, 2, 2, 2, 3))
        word = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(syllables)) + rng.choice(_CODAS)
        if split_of(word) == split:
            return word


def numbers(low: int, high: int, split: Split) -> list[int]:
    """Return the numbers from ``low`` to ``high`` that belong to ``split``."""
    return [int(text) for text in keep((str(n) for n in range(low, high + 1)), split)]
