"""Words and sentence frames of the sentiment task. The two splits share no frame and no opener.

Fields: ``s`` what is reviewed, ``t`` and ``u`` its parts, ``x`` and ``y`` adjectives that fit the label, ``z`` an
adjective of the opposite label.
"""

from __future__ import annotations

from .rows import Split, listed

POSITIVE = listed("""
good great excellent wonderful fantastic superb lovely delightful brilliant amazing outstanding marvelous pleasant
charming perfect impressive terrific splendid enjoyable beautiful fabulous stunning remarkable magnificent
exceptional satisfying refreshing elegant reliable friendly comfortable delicious gorgeous thrilling captivating
heartwarming flawless helpful polished inviting memorable tasty cheerful gripping dazzling clever smooth spotless
generous inspiring thoughtful adorable sturdy touching exquisite hilarious welcoming graceful dependable
""")

NEGATIVE = listed("""
bad terrible awful horrible dreadful poor disappointing boring dull unpleasant ugly lousy mediocre disgusting
annoying frustrating useless broken dirty rude noisy pathetic miserable tedious bland sloppy shoddy cheap
uncomfortable unreliable confusing clumsy filthy appalling atrocious painful irritating depressing forgettable
stale greasy overpriced flimsy unhelpful careless messy tiresome disastrous abysmal unfriendly slow faulty
lifeless infuriating embarrassing inferior gloomy tasteless unbearable grim
""")

SUBJECTS = listed("""
hotel restaurant movie book phone laptop cafe concert game course museum tour airline camera app play series album
gym bakery bar hostel resort festival podcast headset vacuum mattress jacket backpack bicycle printer tablet
bookshop theater ferry kitchen watch novel sofa lamp scooter drone gallery zoo campsite cruise workshop lecture train
""")

THINGS = listed("""
service staff food room breakfast plot acting ending soundtrack battery screen keyboard price view location design
packaging delivery support manual sound picture menu dessert coffee bathroom bed lighting atmosphere music story
cast dialogue pacing seat handle zipper fabric color quality interface graphics camera speaker check-in guide
""")

OPENERS: dict[Split, list[str]] = {
    "train": [
        "I went with my family last week.",
        "Got it as a gift.",
        "My second visit this year.",
        "I bought this a month ago.",
        "Here is my honest opinion.",
        "We had read about it online.",
        "Long review, sorry.",
        "A few words about it.",
    ],
    "heldout": [
        "A friend told me about it.",
        "I have had two weeks to decide.",
        "Writing this on the way home.",
        "Let me keep this short.",
    ],
}

FRAMES: dict[str, dict[Split, list[str]]] = {
    "plain": {
        "train": [
            "the {t} was {x} and the {u} was {y}.",
            "a {x} {s} with a {y} {t}.",
            "this {s} is simply {x}.",
            "what a {x} {s}!",
            "I found the {t} {x}, and the rest was {y} too.",
            "{x} {t}, {y} {u}.",
            "the {t} of this {s} is {x}.",
            "everything about the {s} felt {x}, even the {t}.",
            "honestly, the {s} turned out to be {x}.",
            "the {s} has a {x} {t}.",
            "I can only call the {t} {x}.",
            "so {x}! The {t} and the {u} were both {y}.",
        ],
        "heldout": [
            "all of us thought the {s} was {x}.",
            "the word for this {t} is {x}, and the {u} is just as {y}.",
            "every single part of this {s} is {x}.",
            "you will notice the {x} {t} first, then the {y} {u}.",
        ],
    },
    "turn": {
        "train": [
            "I expected a {z} {s}, but it was {x}.",
            "people said the {t} was {z}; I found it {x}.",
            "it looked {z} at first and then turned out {x}.",
            "the reviews called it {z}, yet the {s} was {x} and {y}.",
            "not {z} as I had feared or hoped, but {x}.",
            "although the advert looked {z}, the {s} itself is {x}.",
            "the old one was {z}, this {s} is {x}.",
        ],
        "heldout": [
            "I had prepared for something {z} and got a {x} {s} instead.",
            "my neighbour finds the {s} {z}, whereas I think it is {x}.",
            "it used to be {z}; these days the {t} is {x}.",
        ],
    },
    "negated": {
        "train": [
            "the {t} was not {z} at all.",
            "this {s} is not {z}.",
            "nothing about the {s} was {z}.",
            "I would never call the {t} {z}.",
            "there was nothing {z} about the {t} or the {u}.",
            "the {s} isn't {z} in the slightest.",
        ],
        "heldout": [
            "you could not call this {s} {z}.",
            "the {t} wasn't {z} and neither was the {u}.",
            "I saw no {z} {t} here.",
        ],
    },
    "positive": {
        "train": [
            "I would go back to this {s} tomorrow.",
            "worth every penny, especially the {t}.",
            "I loved the {t} and so did everyone else.",
            "the {s} made my whole week.",
            "we recommend this {s} to all our friends.",
            "I smiled the whole time because of the {t}.",
            "five stars for the {t}.",
            "the {t} was {x} and I will gladly come again.",
            "thank you for such a {x} {s}.",
            "could not be happier with the {s}.",
        ],
        "heldout": [
            "I already told my sister she has to try this {s}.",
            "the {t} won me over within minutes.",
            "I enjoyed the {t} so much that I stayed longer than planned.",
            "buy this {s}, you will thank me.",
        ],
    },
    "negative": {
        "train": [
            "I want my money back after seeing the {t}.",
            "I would not go back to this {s} if it were free.",
            "a waste of money, especially the {t}.",
            "I hated the {t} and so did everyone else.",
            "the {s} ruined my whole week.",
            "we warn all our friends about this {s}.",
            "one star for the {t}, and that is generous.",
            "the {t} was {x} and I will never come again.",
            "I complained about the {x} {s} and nobody cared.",
            "could not be more upset with the {s}.",
        ],
        "heldout": [
            "I already told my sister to avoid this {s}.",
            "the {t} let me down within minutes.",
            "I disliked the {t} so much that I left early.",
            "skip this {s}, you will thank me.",
        ],
    },
}
