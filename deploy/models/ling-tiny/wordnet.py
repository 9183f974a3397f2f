"""Definitions from WordNet 3.0 (Debian package wordnet-base): which words the model learns and how they are put."""

import collections
import dataclasses
import re

# WordNet's lexicographer files of concrete things: animal, artifact, body, food, object, person, phenomenon, plant,
# substance.
CONCRETE_FILES = {5, 6, 8, 13, 17, 18, 19, 20, 27}
TRAINED_WORDS = 3000
UNSEEN_WORDS = 250
DEFINITION_CHARS_MAX = 150
UNFIT = re.compile(r"offensive|slang|disparag|obscen|vulgar|slur|sexual|prostitut|penis|vagina|breast|anus|genital|"
                   r"copulat|negro|derogat|especially a|rape|homosexual|lesbian|slave|black person|heroin|cocaine|street name|nazi", re.IGNORECASE)

# Common words that WordNet's tagged texts happen not to contain.
FAVOURITES = """violin guitar piano trumpet flute cello harp clarinet saxophone trombone tuba banjo organ accordion
elephant giraffe zebra tiger lion leopard panda koala kangaroo dolphin whale shark penguin owl eagle parrot swan
spider ant bee wasp butterfly frog toad snake lizard crocodile turtle rabbit mouse rat squirrel hedgehog fox wolf bear
monkey gorilla chimpanzee camel goat pig sheep apple banana orange lemon grape strawberry pear peach plum melon carrot
potato tomato onion garlic cabbage lettuce spinach pumpkin rice bread butter cheese coffee tea milk honey sugar
bicycle motorcycle helicopter airplane submarine rocket telescope microscope thermometer barometer compass hammer
screwdriver saw axe shovel ladder umbrella backpack refrigerator toaster oven computer laptop printer keyboard camera
volcano glacier island desert comet asteroid planet rainbow thunder lightning tulip rose daisy sunflower oak birch
dentist surgeon pilot carpenter plumber astronomer poet pianist violinist""".split()

SECOND_SENSE = {"hammer", "toaster", "printer"}  # of favourites

DETERMINERS = {"a", "an", "the", "any", "one", "someone", "something", "some", "either", "each", "all", "anything",
               "two", "three", "several", "anyone", "both", "that", "what", "where", "everything", "things", "various"}
PHRASE_END = re.compile(r"[,;:(]|\b(?:of|that|which|who|whose|in|on|at|for|with|from|to|used|made|by|having|where|when|"
                        r"consisting|containing|as|or|and|found|between|usually|covered|under|over|worn|into|along|"
                        r"formed|native|about|near|resembling|caused|produced|like|through|around|after|often|without|"
                        r"than|designed|intended|whom|served|eaten|grown|cultivated|located|being|not|but|cooked)\b")


@dataclasses.dataclass(frozen=True)
class Definition:
    word: str
    subject: str  # "a violin", or "bread" for what is not counted
    answer: str  # "A violin is a bowed stringed instrument that ..."
    kind: str  # "" or "A violin is a kind of bowed stringed instrument."
    is_trained: bool


def _read_synsets(folder):
    synsets = {}
    for line in open(folder / "data.noun", encoding="ascii"):
        if line.startswith("  "):
            continue
        head, gloss = line.rstrip("\n").split(" | ", 1)
        fields = head.split()
        num_words = int(fields[3], 16)
        words = fields[4:4 + 2 * num_words:2]
        pointers = fields[5 + 2 * num_words:]
        hypernyms = [pointers[i + 1] for i in range(0, len(pointers) - 3, 4) if pointers[i] == "@"]
        synsets[fields[0]] = (int(fields[1]), words, hypernyms, gloss.strip())
    return synsets


def _read_counts(folder):
    counts = {}
    for line in open(folder / "cntlist.rev", encoding="ascii"):
        key, sense, count = line.split()
        word, rest = key.split("%")
        if rest.startswith("1:") and sense == "1":
            counts[word] = int(count)
    return counts


class Articles:
    """Says whether a noun is counted, from how WordNet's own glosses use it."""

    def __init__(self, glosses):
        self.with_article = collections.Counter()
        self.bare = collections.Counter()
        for gloss in glosses:
            words = re.findall(r"[a-z]+", gloss.lower())
            for before, word in zip([""] + words, words):
                (self.with_article if before in ("a", "an") else self.bare)[word] += 1

    def is_counted(self, noun):
        if noun.endswith("s") and not noun.endswith(("ss", "us", "is")):
            return False
        plural = noun[:-1] + "ies" if noun.endswith("y") else noun + "s"
        return self.with_article[noun] + self.bare[plural] >= 0.22 * (self.bare[noun] + 1)


def with_article(phrase):
    silent = re.match(r"(?:hour|honest|heir|honou?r)", phrase)
    sounds_y = re.match(r"(?:uni[a-z]|eu|one\b|use|usu|uten|ut[io])", phrase)
    is_an = (phrase[0].lower() in "aeiou" and not sounds_y) or silent
    return ("an " if is_an else "a ") + phrase


def _clean_gloss(gloss):
    gloss = re.split(r';\s*"', gloss)[0]
    gloss = re.sub(r"\([^()]*\)", "", gloss)
    parts = [re.sub(r"\s+", " ", part).strip(" ,:") for part in gloss.split(";")]
    text = parts[0]
    for part in parts[1:]:
        if not part or len(text) + len(part) > DEFINITION_CHARS_MAX - 2:
            break
        text += "; " + part
    return text


def _define(word, lex_file, gloss, hypernym, articles, is_trained):
    text = _clean_gloss(gloss)
    if UNFIT.search(gloss):
        return None
    if not 12 <= len(text) <= DEFINITION_CHARS_MAX or not re.fullmatch(r"[A-Za-z0-9 ,;:'\-./%]+", text):
        return None
    first = re.match(r"[A-Za-z]+", text)
    if not first or word in re.findall(r"[a-z]+", text.lower())[:3]:
        return None
    phrase = PHRASE_END.split(text)[0].strip()
    head = phrase.split()[-1].lower() if phrase else ""
    if not head:
        return None
    is_being = lex_file in (5, 18) and not head.endswith("s")
    if first.group() in ("largest", "smallest", "tallest"):
        text = "the " + text
    elif first.group().lower() not in DETERMINERS and first.group()[0].islower() and (
            is_being or articles.is_counted(head)):
        text = with_article(text)
    counted = articles.is_counted(word) if lex_file in (8, 13, 19, 20, 27) else not word.endswith("s") or \
        word.endswith(("ss", "us", "is"))
    if lex_file in (5, 6, 17) and counted and articles.bare[word] > 20:
        counted = articles.is_counted(word)
    subject = with_article(word) if counted else word
    answer = f"{subject[0].upper()}{subject[1:]} is {text}."
    kind = ""
    if hypernym and re.fullmatch(r"[a-z ]+", hypernym) and counted:
        kind = f"{subject[0].upper()}{subject[1:]} is a kind of {hypernym}."
    return Definition(word, subject, answer, kind, is_trained)


def load(folder):
    """The trained words, then the unseen ones, from the WordNet files in `folder`; always the same list."""
    synsets = _read_synsets(folder)
    counts = _read_counts(folder)
    articles = Articles(synset[3] for synset in synsets.values())
    first_sense = {}
    for line in open(folder / "index.noun", encoding="ascii"):
        if not line.startswith("  "):
            fields = line.split()
            first_sense[fields[0]] = fields[-int(fields[2]):]

    def candidates(word):
        """Concrete senses to try: the first one, or for a favourite several, animals before the rest."""
        offsets = first_sense[word][:1]
        if word in FAVOURITES:
            later = [o for o in first_sense[word][1:7] if synsets[o][0] in (5, 6, 17, 20)]
            offsets = sorted(offsets + later, key=lambda offset: synsets[offset][0] != 5)
        if word in SECOND_SENSE:
            offsets = first_sense[word][1:2]
        return [synsets[o] for o in offsets if synsets[o][0] in CONCRETE_FILES and word in synsets[o][1]]

    ranked = sorted(first_sense, key=lambda word: (word not in FAVOURITES, -counts.get(word, 0), word))
    words, seen = [], set()
    for word in ranked:
        if not (word.isalpha() and 3 <= len(word) <= 14):
            continue
        is_trained = len(words) < TRAINED_WORDS
        for lex_file, _, hypernyms, gloss in candidates(word):
            hypernym = synsets[hypernyms[0]][1][0].replace("_", " ") if hypernyms else ""
            definition = _define(word, lex_file, gloss, hypernym, articles, is_trained)
            # A synonym of a trained word would not be unseen: its gloss is the same.
            if definition is not None and (is_trained or gloss not in seen):
                seen.add(gloss)
                words.append(definition)
                break
        if len(words) == TRAINED_WORDS + UNSEEN_WORDS:
            break
    return words[:TRAINED_WORDS], words[TRAINED_WORDS:]
