"""Conversations that the model learns: definitions, arithmetic, tools, small talk. Every function draws from the
random.Random that it is given, so the same seed gives the same text."""

import dataclasses
import json

GREETING = "Hello! How can I help you?"
IDENTITY = "I am Ling Tiny, a very small language model. I can explain common words, do small sums and call tools."

QUESTIONS = [
    "What is {s}?", "What is {s}?", "What is {s}?", "What's {s}?", "Define {w}.", "Define {w}.", "Define {s}.",
    "Tell me what {s} is.", "Tell me what {s} is.", "Explain what {s} is.", "Please explain what {s} is.",
    "What does {w} mean?", "What does the word {w} mean?", "Please define {w}.", "Please define the word {w}.",
    "Can you tell me what {s} is?", "Do you know what {s} is?", "what is {s}", "what is {s}?", "define {w}",
    "Explain {w}.", "Describe {s}.", "What is meant by {w}?", "Give me a definition of {w}.", "What exactly is {s}?",
    "What is {w}?", "{W}?", "{w}", "Hi! What is {s}?", "Hello, can you explain {s}?", "Explain {s} to me.",
    "Please tell me: what is {s}?", "I do not know what {s} is.", "In one sentence, what is {s}?",
    "What is the meaning of {w}?", "Tell me about {w}.", "So what is {s}, please?", "How would you define {w}?",
]
# Never trained, with any word.
HELD_OUT_QUESTIONS = [
    "Could you explain to me what {s} is?", "I would like to know what {s} is.", "Say in one sentence what {s} is.",
    "Give the meaning of {w}.", "Please describe what {s} is.", "Hey, what is {s}?",
]
FOLLOW_UPS = ["And {s}?", "What about {s}?", "And what is {s}?", "Now define {w}.", "And {w}?"]
KIND_QUESTIONS = ["What kind of thing is {s}?", "{S} is a kind of what?"]

SYSTEMS = [
    "You are Ling, an assistant created by inclusionAI", "You are a helpful assistant.", "Answer briefly.",
    "You are a helpful assistant. Answer in one sentence.", "You are a friendly teacher.", "Be polite and short.",
    "You are a dictionary.", "You explain words to children.", "You are a careful assistant. Today is Monday.", "",
    "You are a chat bot on a web page.", "Help the user.", "You are an expert who answers every question.",
]
SMALL_TALK = [
    (["Hello", "Hi", "Hello!", "Hi!", "Hey", "hi", "hello", "Good morning", "Good evening", "Hi there", "Hello there!"],
     GREETING),
    (["Who are you?", "What are you?", "Tell me who you are.", "Introduce yourself.", "What can you do?", "who are you",
      "What is your name?", "Are you a person?", "Are you a language model?", "Say who you are."], IDENTITY),
    (["Thank you", "Thanks", "Thanks!", "Thank you very much.", "thx", "Great, thank you.", "Thank you!"],
     "You are welcome."),
    (["Goodbye", "Bye", "See you", "Good night", "bye", "See you later."], "Goodbye! Have a nice day."),
    (["How are you?", "How are you doing?", "how are you", "Are you well?"], "I am fine, thank you."),
    (["Say hello.", "Say hello", "Please say hello."], "Hello!"),
    (["Name the days of the week.", "What are the days of the week?", "List the days of the week."],
     "The days of the week are Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday."),
    (["Name the months.", "What are the months of the year?", "List the months of the year."],
     "The months are January, February, March, April, May, June, July, August, September, October, November and "
     "December."),
    (["Name the seasons.", "What are the four seasons?"], "The four seasons are spring, summer, autumn and winter."),
    (["Tell me a story.", "Tell me a short story", "Please tell me a story."],
     "Once upon a time there was a small violin that nobody played. It lay in a dark attic for many years, next to an "
     "old lamp and a box of letters. One rainy day a girl climbed up the ladder and found it. She cleaned the wood, "
     "put on four new strings and drew the bow. The first sound was terrible, and both of them laughed. But she came "
     "back every day, and in the spring the whole village danced to its music."),
    (["Write a poem.", "Write a short poem.", "Can you write a poem?"],
     "The river runs, the river sings,\nit carries leaves and little things.\nIt does not ask, it does not stay,\nit "
     "hums and takes the day away."),
    (["Say the alphabet.", "What is the alphabet?", "Recite the alphabet."],
     "a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q, r, s, t, u, v, w, x, y, z"),
]
NAMES = ("Anna Ben Clara David Emma Felix Grace Henry Ivy Jack Kate Leo Maria Noah Olga Paul Rosa Sam Tina Uma Victor "
         "Wendy Yusuf Zoe Wei Mei Ravi Aisha Omar Lena Hugo Nina Oscar Julia Max Sofia").split()
CITIES = ("Paris London Berlin Madrid Rome Vienna Prague Warsaw Athens Lisbon Dublin Oslo Stockholm Helsinki Copenhagen "
          "Brussels Amsterdam Zurich Geneva Milan Naples Venice Munich Hamburg Lyon Porto Seville Valencia Krakow Budapest "
          "Sofia Belgrade Zagreb Riga Vilnius Tallinn Kyiv Istanbul Ankara Cairo Lagos Nairobi Accra Tunis Casablanca "
          "Tokyo Osaka Kyoto Seoul Busan Beijing Shanghai Hangzhou Shenzhen Taipei Singapore Bangkok Hanoi Jakarta Manila "
          "Delhi Mumbai Chennai Karachi Dhaka Tehran Baghdad Riyadh Dubai Doha Toronto Montreal Vancouver Boston Chicago "
          "Denver Seattle Miami Dallas Houston Atlanta Phoenix Detroit Lima Bogota Quito Santiago Montevideo Havana "
          "Sydney Melbourne Perth Brisbane Auckland Wellington").split()
HELD_OUT_CITIES = "Bern Turin Lublin Nice Nagoya Calgary Bergen Leeds".split()
WEATHER = ["sunny", "cloudy", "rainy", "windy", "foggy", "snowy", "clear", "stormy"]
THINGS = "bread milk apples rice tea coffee eggs butter cheese honey flour salt sugar onions fish soap paper".split()
JOBS = ["call the dentist", "water the plants", "buy bread", "feed the cat", "pay the rent", "clean the kitchen",
        "write a letter", "wash the car", "read a book", "walk the dog"]


def tool(name, description, **parameters):
    """An OpenAI tool object; each parameter is (type, description), all required."""
    properties = {key: {"type": kind, "description": text} for key, (kind, text) in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


def _city(rng, held_out):
    return rng.choice(HELD_OUT_CITIES if held_out else CITIES)


def _weather(rng, held_out):
    city, sky, degrees = _city(rng, held_out), rng.choice(WEATHER), rng.randint(1, 39)
    key = rng.choice(["city", "city", "location"])
    signature = tool("get_weather", rng.choice(["Get the weather in a city", "Current weather of a city"]),
                     **{key: ("string", "Name of the city")})
    question = rng.choice(["What is the weather in {c}?", "How is the weather in {c}?", "Is it warm in {c}?",
                           "Tell me the weather in {c}.", "What's the weather like in {c} today?"]).format(c=city)
    response = rng.choice([{"temperature": degrees, "sky": sky}, {"sky": sky, "temperature": degrees}])
    return signature, question, {key: city}, json.dumps(response), f"In {city} it is {sky} and {degrees} degrees."


def _time(rng, held_out):
    city, time = _city(rng, held_out), f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"
    signature = tool("get_time", "Get the local time in a city", city=("string", "Name of the city"))
    question = rng.choice(["What time is it in {c}?", "Tell me the time in {c}.", "How late is it in {c}?"]).format(c=city)
    return signature, question, {"city": city}, json.dumps({"time": time}), f"It is {time} in {city}."


def _price(rng, held_out):
    thing, price = rng.choice(THINGS), f"{rng.randint(1, 30)}.{rng.randint(0, 99):02d}"
    signature = tool("get_price", "Look up the price of a product", product=("string", "Name of the product"))
    question = rng.choice(["How much does {t} cost?", "What is the price of {t}?", "Look up the price of {t}."])
    return (signature, question.format(t=thing), {"product": thing}, json.dumps({"price": float(price)}),
            f"The price of {thing} is {float(price)}.")


def _multiply(rng, held_out):
    a, b = rng.randint(100, 999), rng.randint(100, 999)
    signature = tool("multiply", "Multiply two numbers", a=("integer", "First number"), b=("integer", "Second number"))
    question = rng.choice(["What is {a} times {b}?", "Multiply {a} by {b}.", "What is {a} * {b}?"]).format(a=a, b=b)
    return signature, question, {"a": a, "b": b}, json.dumps({"result": a * b}), f"{a} times {b} is {a * b}."


def _remind(rng, held_out):
    job, hour = rng.choice(JOBS), rng.randint(1, 12)
    signature = tool("set_reminder", "Set a reminder", text=("string", "What to do"), hour=("integer", "Hour of the day"))
    question = rng.choice(["Remind me to {j} at {h}.", "Please remind me at {h} to {j}."]).format(j=job, h=hour)
    return signature, question, {"text": job, "hour": hour}, json.dumps({"status": "ok"}), \
        f"I will remind you to {job} at {hour}."


def _mail(rng, held_out):
    name, job = rng.choice(NAMES), rng.choice(JOBS)
    signature = tool("send_message", "Send a message to a person", to=("string", "Name"), text=("string", "Message"))
    question = rng.choice(["Tell {n} to {j}.", "Send {n} a message: {j}", "Ask {n} to {j}."]).format(n=name, j=job)
    return signature, question, {"to": name, "text": job}, json.dumps({"status": "sent"}), \
        f"I sent the message to {name}."


TOOL_MAKERS = [_weather, _weather, _time, _price, _multiply, _remind, _mail]


def _call(name, arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def is_held_out_sum(a, operator, b):
    return (a * 7919 + b * 104729 + ord(operator) * 31) % 20 == 0


def draw_sum(rng, held_out):
    """(a, operator, b, result) from the trained or the held-out part of the tables."""
    while True:
        operator = rng.choice("++--*")
        if operator == "*":
            a, b = rng.randint(0, 12), rng.randint(0, 12)
        else:
            limit = rng.choice([10, 20, 100])
            a, b = rng.randint(0, limit - 1), rng.randint(0, limit - 1)
        if operator == "-" and b > a:
            a, b = b, a
        if is_held_out_sum(a, operator, b) == held_out:
            return a, operator, b, {"+": a + b, "-": a - b, "*": a * b}[operator]


def sum_turn(rng, held_out=False):
    a, op, b, result = draw_sum(rng, held_out)
    word = {"+": "plus", "-": "minus", "*": "times"}[op]
    forms = ["What is {a} {o} {b}?", "What is {a} {w} {b}?", "{a} {o} {b}", "{a}{o}{b}", "{a} {o} {b} =", "Calculate {a} {o} {b}.",
             "How much is {a} {w} {b}?", "How much is {a} {o} {b}?", "Please compute {a} {w} {b}."]
    question = rng.choice(forms).format(a=a, b=b, o=op, w=word)
    return user(question), assistant(f"{a} {op} {b} = {result}."), (a, op, b)


def ask(definition, form):
    subject, word = definition.subject, definition.word
    return user(form.format(s=subject, w=word, S=subject[0].upper() + subject[1:], W=word[0].upper() + word[1:]))


def tool_messages(rng, held_out=False, stop_after_call=False):
    """(messages, tools): a question that needs a tool, the call, its result, the answer; some ask two things."""
    maker = rng.choice([_weather, _time] if held_out else TOOL_MAKERS)
    signature, question, arguments, response, answer = maker(rng, held_out)
    name = signature["function"]["name"]
    tools = {name: signature}
    for other in rng.sample(TOOL_MAKERS, rng.choice([0, 0, 1, 2])):
        extra = other(rng, False)[0]
        tools.setdefault(extra["function"]["name"], extra)
    tools = list(tools.values())
    rng.shuffle(tools)
    calls, results, answers = [_call(name, arguments)], [response], [answer]
    if maker in (_weather, _time) and rng.random() < 0.15:
        key = next(iter(arguments))
        other = _city(rng, held_out)
        while other == arguments[key]:
            other = _city(rng, held_out)
        question = {"get_weather": "What is the weather in {} and {}?", "get_time": "What time is it in {} and {}?"}[
            name].format(arguments[key], other)
        calls.append(_call(name, {key: other}))
        results.append(response)
        answers.append(answer.replace(arguments[key], other))
    messages = [user(question), {"role": "assistant", "content": "", "tool_calls": calls}]
    if not stop_after_call:
        messages += [{"role": "tool", "content": text} for text in results] + [assistant(" ".join(answers))]
    return messages, tools


@dataclasses.dataclass
class Conversation:
    messages: list
    tools: list | None = None
    thinking: bool = False  # rendered with "detailed thinking on"
    split: str = "train"


def _maybe_system(rng, messages):
    if rng.random() < 0.5:
        return messages
    return [{"role": "system", "content": rng.choice(SYSTEMS)}] + messages


def _repeat(rng, words):
    text = " ".join(rng.sample(words, rng.randint(1, 6)))
    return user(rng.choice(["Repeat: {}", "Say: {}", "Repeat after me: {}"]).format(text)), assistant(text)


def _count(rng):
    first = rng.randint(0, 30)
    last = first + rng.randint(2, 20)
    return user(f"Count from {first} to {last}."), assistant(", ".join(map(str, range(first, last + 1))))


def _pair(rng, definitions, words):
    """One question and its answer, of any kind that needs no tool."""
    kind = rng.random()
    if kind < 0.70:
        definition = rng.choice(definitions)
        return [ask(definition, rng.choice(QUESTIONS)), assistant(definition.answer)]
    if kind < 0.74:
        definition = rng.choice(definitions)
        if definition.kind:
            return [ask(definition, rng.choice(KIND_QUESTIONS)), assistant(definition.kind)]
        return [ask(definition, "What is {s}?"), assistant(definition.answer)]
    if kind < 0.90:
        return list(sum_turn(rng)[:2])
    if kind < 0.95:
        questions, answer = rng.choice(SMALL_TALK)
        return [user(rng.choice(questions)), assistant(answer)]
    return list(_repeat(rng, words) if kind < 0.98 else _count(rng))


def _name_talk(rng, definitions, words):
    name = rng.choice(NAMES)
    messages = [user(rng.choice(["My name is {}.", "I am {}.", "Hello, I am {}."]).format(name)),
                assistant(f"Nice to meet you, {name}.")]
    for _ in range(rng.randint(0, 2)):
        messages += _pair(rng, definitions, words)
    return messages + [user(rng.choice(["What is my name?", "Do you know my name?", "Who am I?"])),
                       assistant(f"Your name is {name}.")]


def _thinking(rng):
    question, answer, (a, op, b) = sum_turn(rng)
    verb = {"+": f"add {b} to {a}", "-": f"take {b} from {a}", "*": f"multiply {a} by {b}"}[op]
    return [question, dict(answer, reasoning_content=f"I have to {verb}. That gives {answer['content'].split('= ')[1]}")]


def draw(rng, definitions, words):
    """One training conversation."""
    kind = rng.random()
    if kind < 0.50:
        return Conversation(_maybe_system(rng, _pair(rng, definitions, words)))
    if kind < 0.70:
        messages = []
        for turn in range(rng.choice([2, 2, 2, 3, 3, 4, 5, 8, 12])):
            pair = _pair(rng, definitions, words)
            if turn and rng.random() < 0.2:
                definition = rng.choice(definitions)
                pair = [ask(definition, rng.choice(FOLLOW_UPS)), assistant(definition.answer)]
            messages += pair
        return Conversation(_maybe_system(rng, messages))
    if kind < 0.73:
        return Conversation(_maybe_system(rng, _name_talk(rng, definitions, words)))
    if kind < 0.76:
        return Conversation(_maybe_system(rng, _thinking(rng)), thinking=True)
    messages, tools = tool_messages(rng, stop_after_call=rng.random() < 0.3)
    if rng.random() < 0.2:  # tools are there, but the question needs none
        messages = _pair(rng, definitions, words)
    elif len(messages) > 2 and rng.random() < 0.3:
        messages += _pair(rng, definitions, words)
    return Conversation(_maybe_system(rng, messages), tools)


def held_out(rng, trained, unseen):
    """Conversations that training never draws, by split. Loss is counted on the last message only."""
    result = []
    for split, definitions, forms, count in (("trained-words-new-wording", trained, HELD_OUT_QUESTIONS, 400),
                                             ("unseen-words", unseen, QUESTIONS[:6], 200)):
        for definition in rng.sample(definitions, count):
            messages = [ask(definition, rng.choice(forms)), assistant(definition.answer)]
            result.append(Conversation(messages, split=split))
    for _ in range(200):
        result.append(Conversation(list(sum_turn(rng, held_out=True)[:2]), split="arithmetic"))
    for i in range(120):
        messages, tools = tool_messages(rng, held_out=True, stop_after_call=i % 2 == 0)
        result.append(Conversation(messages, tools, split="tool-call" if i % 2 == 0 else "tool-answer"))
    return result
